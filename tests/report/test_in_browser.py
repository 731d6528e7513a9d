"""The report in a browser: filter, enlarge and scroll, without a network."""

import pytest
from playwright.sync_api import expect

from sam2sgp.evaluation import summarise
from sam2sgp.report.html import CaseFigure, Report, ShownSlice, write_report
from tests.e2e.browsers import page
from tests.helpers.drawn import plain


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A report of a picture with a lesion, a volume of five slices with a liver, and nine measured cases."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    row = {"source": "a/rather/long/path/to/an/image.nii.gz", "scaling": "percentiles (a grey picture)", "seconds": 1.0}
    rows = [
        row | {"case": "lesion_1", "class_name": "lesion", "size": 5.0, "size_unit": "mm2", "mean_confidence": 0.4},
        row | {"case": "liver_1", "class_name": "liver", "size": 4e5, "size_unit": "ml", "mean_confidence": 0.9},
    ]
    frames = [ShownSlice(plain(), f"Slice {number} of 5") for number in range(1, 6)]
    figures = [
        CaseFigure(
            "liver_1",
            panels=[("Query", plain()), ("Segmentation", plain())],
            frames=frames,
            start=1,
            sides="RLAP",
            window=(-160, 240, "HU"),
        ),
        CaseFigure("lesion_1", panels=[("Query", plain()), ("Segmentation", plain())]),
    ]
    classes = {1: "liver", 2: "lesion"}
    measured = {
        "truth_size": 5.0,
        "predicted_size": 500000.0,
        "size_unit": "mm2",
        "unit": "mm",
        "support_items": "a; b",
    }
    scores = [{"class": 1, "class_name": "liver", "case": str(n), "dice": n / 9, "iou": 0.5} for n in range(9)]
    scores = [row | score | measured | {"hd95": 100.0, "nsd": 0.5} for score in scores]
    report = Report("Run", classes=classes, case_rows=rows + scores, figures=figures, meta={"Command": "x " * 200})
    report.summary_rows = summarise(scores)
    write_report(path, report)
    return path.as_uri()


@pytest.fixture
def opened(address):
    with page() as found:
        problems = []
        found.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        found.on("pageerror", lambda error: problems.append(str(error)))
        found.goto(address)
        yield found
        assert problems == []


def test_the_filter_leaves_the_cases_of_a_class_or_those_that_need_a_look(opened):
    tiles = opened.locator(".tile:visible", has=opened.locator("img")).locator(".name")
    expect(tiles).to_have_text(["lesion_1", "liver_1"])
    opened.get_by_role("button", name="liver", exact=True).click()
    expect(tiles).to_have_text(["liver_1"])
    expect(opened.locator("article:visible h3")).to_have_text(["liver_1"])
    expect(opened.locator("#count")).to_have_text("8 of 9 tiles")
    opened.get_by_role("button", name="Needs a look").click()
    expect(tiles).to_have_text(["lesion_1"])
    opened.get_by_role("button", name="All", exact=True).click()
    expect(tiles).to_have_count(2)


def test_a_click_enlarges_and_slices_scroll_by_keys_wheel_and_slider(opened):
    dialog = opened.locator("dialog")
    expect(dialog).to_be_hidden()
    opened.locator(".tile", has_text="liver_1").locator("a").click()
    expect(dialog.locator("strong")).to_have_text("liver_1: Slice 2 of 5")
    expect(dialog.locator(".side")).to_have_text(["R", "L", "A", "P"])
    opened.keyboard.press("ArrowRight")
    expect(dialog.locator("strong")).to_have_text("liver_1: Slice 3 of 5")
    dialog.locator(".stage").hover()
    opened.mouse.wheel(0, -100)
    expect(dialog.locator("strong")).to_have_text("liver_1: Slice 2 of 5")
    dialog.get_by_role("button", name="Previous").click()
    expect(dialog.locator("strong")).to_have_text("liver_1: Slice 1 of 5")
    assert dialog.locator("img").bounding_box()["width"] > 400
    opened.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    opened.locator("article", has_text="lesion_1").get_by_role("button", name="Query").click()
    expect(dialog.locator("strong")).to_have_text("lesion_1: Query")
    dialog.get_by_role("button", name="Close").click()
    # Without enlarging, too.
    volume = opened.locator(".volume")
    expect(volume.locator("figcaption:visible")).to_have_text(["Slice 2 of 5"])
    volume.get_by_label("Slice", exact=True).fill("0")
    expect(volume.locator("figcaption:visible")).to_have_text(["Slice 1 of 5"])


def test_level_and_width_spread_what_a_picture_holds(opened):
    dialog = opened.locator("dialog")
    opened.locator(".tile", has_text="liver_1").locator("a").click()
    expect(dialog.locator("output")).to_have_text("40 ± 200 HU")
    middle = "image => { const canvas = document.createElement('canvas'); canvas.width = canvas.height = 1;"
    middle += " const context = canvas.getContext('2d'); context.filter = image.style.filter || 'none';"
    middle += " context.drawImage(image, 0, 0, 1, 1); return context.getImageData(0, 0, 1, 1).data[0]; }"
    grey = dialog.locator("img").evaluate(middle)
    dialog.get_by_label("Width").fill("50")
    expect(dialog.locator("output")).to_have_text("40 ± 100 HU")
    # (v - 0.25) / 0.5, of levels from 0 to 255.
    assert dialog.locator("img").evaluate(middle) == pytest.approx((grey - 255 / 4) * 2, abs=3)
    dialog.get_by_label("Level").fill("30")
    expect(dialog.locator("output")).to_have_text("-40 ± 100 HU")
    assert dialog.locator("img").evaluate(middle) == pytest.approx((grey - 255 * 0.05) * 2, abs=3)
    # Beyond what the picture holds the window does not go; the keys are the slider's there.
    dialog.get_by_label("Level").fill("5")
    expect(dialog.locator("output")).to_have_text("-60 ± 100 HU")
    opened.keyboard.press("ArrowRight")
    expect(dialog.locator("strong")).to_have_text("liver_1: Slice 2 of 5")
    # The next slice has the same window, and another case its own.
    dialog.get_by_role("button", name="Next").click()
    assert "contrast" in dialog.locator("img").evaluate("image => image.style.filter")
    dialog.get_by_role("button", name="Reset").click()
    expect(dialog.locator("output")).to_have_text("40 ± 200 HU")
    dialog.get_by_role("button", name="Close").click()
    opened.locator("article", has_text="lesion_1").get_by_role("button", name="Query").click()
    expect(dialog.locator("output")).to_have_text("50 ± 50 % of what is shown")


@pytest.mark.parametrize("width", [400, 820, 1280])
def test_nothing_is_wider_than_the_page(address, width):
    with page(width) as found:
        found.goto(address)
        found.locator("#rows summary").click()
        assert found.evaluate("document.documentElement.scrollWidth") <= width
        wide = "[...document.querySelectorAll('.scroll')].filter(part => part.scrollWidth > part.clientWidth).length"
        assert found.evaluate(wide) == 0
        # Small pictures are enlarged to their place, so that sides and scale bar can be read.
        shown = found.locator("article").first.locator(".panels .view")
        assert all(shown.nth(number).bounding_box()["width"] > 120 for number in range(shown.count()))
