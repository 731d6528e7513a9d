"""Pictures have the right colours in the right places, and the report is one safe, self-contained file."""

import base64
import hashlib
import io
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from sam2sgp.evaluation import case_metrics, summarise
from sam2sgp.report.html import CaseFigure, Report, SupportThumb, write_report
from sam2sgp.report.overlays import class_colour, draw_overlay, montage, spread_slices, to_display

GREY = 90
NASTY = "<img src=x onerror=alert(1)>\"'&.png"


def plain(height: int = 40, width: int = 40) -> np.ndarray:
    return np.full((height, width, 3), GREY, dtype=np.uint8)


def square_map(value: int = 1, start: int = 10, side: int = 20) -> np.ndarray:
    labels = np.zeros((40, 40), dtype=np.uint8)
    labels[start : start + side, start : start + side] = value
    return labels


class Page(HTMLParser):
    """Tags with their attributes, the text, and the script of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


def decode(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition("base64,")[2]))))


@pytest.mark.parametrize(
    ("image", "first", "last"),
    [
        (np.array([[0.0, 1.0]]), 0, 255),
        (torch.tensor([[[0.0, 0.5]]]), 0, 128),
        (np.array([[-1000.0, 240.0]]), 0, 255),  # HU
        (np.array([[7, 42]], dtype=np.uint8), 7, 42),
        (np.array([[100.0, 900.0]]), 0, 255),
        (np.array([[np.nan, 1.0]]), 0, 255),
        (np.array([[5.0, 5.0]]), 0, 0),
        (np.stack([np.array([[0.0, 1.0]]), np.array([[1.0, 0.0]])]), 0, 255),
    ],
)
def test_grey_images_become_grey_pictures(image, first, last):
    picture = to_display(image)
    assert picture.shape == (1, 2, 3) and picture.dtype == np.uint8
    assert (picture[0, 0] == first).all() and (picture[0, 1] == last).all()


def test_colours_stay():
    colours = np.array([10, 200, 30], dtype=np.uint8)
    assert to_display(colours[:, None, None])[0, 0].tolist() == [10, 200, 30]
    assert to_display(np.append(colours, 255)[:, None, None].astype(np.uint8))[0, 0].tolist() == [10, 200, 30]
    assert to_display(colours[:, None, None].astype(np.float32))[0, 0].tolist() == [10, 200, 30]
    assert to_display(colours[:, None, None].astype(np.uint16) * 257)[0, 0].tolist() == [10, 200, 30]


def test_impossible_image_is_refused():
    with pytest.raises(ValueError, match="found shape"):
        to_display(np.zeros(4))


def test_class_colours_are_distinct_for_many_classes():
    assert len({class_colour(value) for value in range(1, 22)}) == 21


def test_contour_has_the_class_colour_at_the_masks_edge_and_a_light_fill_inside():
    picture = draw_overlay(plain(), square_map(2), scale=4)
    assert picture.shape == (160, 160, 3)
    row = picture[80]
    for edge in (39, 40, 119, 120):  # the mask covers pixels 10..29, that is 40..119
        assert tuple(row[edge]) == class_colour(2)
    assert (row[30] == GREY).all() and (row[130] == GREY).all()
    assert not (row[80] == GREY).all() and np.abs(row[80].astype(int) - GREY).max() < 60


def test_masks_and_colours_may_be_given_by_class():
    by_class = draw_overlay(plain(), {2: square_map(2) == 2}, scale=4)
    np.testing.assert_array_equal(by_class, draw_overlay(plain(), square_map(2), scale=4))
    red = draw_overlay(plain(), square_map(2), colours={2: (255, 0, 0)}, scale=4)
    assert tuple(red[80, 40]) == (255, 0, 0)


def test_truth_is_dashed_white_and_lets_the_masks_contour_show():
    edge = (slice(45, 115), slice(39, 41))  # along the left side of the square
    truth = draw_overlay(plain(), truth=square_map(), scale=4)
    white, ground = ((truth[edge] == level).all((1, 2)) for level in (255, GREY))
    assert 0.3 < white.mean() < 0.7 and ground.mean() > 0.1
    mask = draw_overlay(plain(), square_map(), scale=4)
    both = draw_overlay(plain(), square_map(), truth=square_map(), scale=4)
    assert (mask[edge] == class_colour(1)).all()
    assert (both[edge] == 255).all((1, 2)).mean() > 0.3
    assert (both[edge] == class_colour(1)).all((1, 2)).mean() > 0.1


def test_box_is_drawn_where_it_is_and_not_if_there_is_none():
    boxed = draw_overlay(plain(), box={1: (10, 5, 30, 35)}, scale=4)
    colour = np.array(class_colour(1))
    drawn = np.argwhere((boxed == colour).all(-1))
    assert drawn.min(0).tolist() == [20, 40] and drawn.max(0).tolist() == [139, 119]
    np.testing.assert_array_equal(draw_overlay(plain(), box={1: (-1, -1, -1, -1)}, scale=1), plain())


def test_overlays_fit_the_report_and_keep_the_aspect():
    assert draw_overlay(plain(50, 100)).shape == (160, 320, 3)
    dot = np.zeros((2000, 1000), dtype=np.uint8)
    dot[1000, 500] = 1
    small = draw_overlay(plain(2000, 1000), dot)
    assert small.shape == (320, 160, 3)
    assert (small == class_colour(1)).all(-1).any(), "a mask of one pixel is lost"


def test_image_is_not_changed():
    image = plain()
    draw_overlay(image, square_map(), truth=square_map(), box={1: (1, 1, 5, 5)}, scale=1)
    np.testing.assert_array_equal(image, plain())


def test_montage_takes_slices_that_hold_something_with_both_ends():
    prediction, truth = np.zeros((40, 16, 16), dtype=np.uint8), np.zeros((40, 16, 16), dtype=np.uint8)
    prediction[10:30, 4:8, 4:8] = 1
    truth[31, 4:8, 4:8] = 1
    chosen = spread_slices(prediction, truth)
    assert len(chosen) == 9 and chosen[0] == 10 and chosen[-1] == 31 and chosen == sorted(set(chosen))
    assert spread_slices(prediction[10:14]) == [0, 1, 2, 3]
    assert spread_slices(np.zeros((3, 4, 4))) == [0, 1, 2]
    picture = montage(np.zeros((40, 3, 16, 16), dtype=np.float32), prediction, truth)
    assert picture.shape == (639, 639, 3)
    assert montage(np.zeros((5, 16, 8), dtype=np.float32), prediction[10:15, :, :8]).shape == (426, 318, 3)


def evaluation_report(name: str = "case_1.png") -> Report:
    names = {1: "liver", 2: "tumour"}
    truth, prediction = square_map(1)[None], square_map(1, 12)[None]
    rows = [{"case": name, **row} for row in case_metrics(prediction, truth, names)]
    figure = CaseFigure(
        name,
        "Slice 1 of 1",
        [("Query", plain(2000, 1000)), ("Final mask", draw_overlay(plain(), square_map(2)))],
        rows,
        [
            {"id": "a1", "class_name": "liver", "similarity": 0.876},
            {"id": "gone", "class_name": "liver", "similarity": -0.5},
        ],
        section="Worst cases",
    )
    best = CaseFigure("other", support=[{"id": "a1", "class_name": "tumour", "similarity": 0.5}], section="Best cases")
    return Report(
        "Evaluation",
        "on phantoms",
        {"Data": name},
        names,
        summarise(rows),
        rows,
        [figure, best],
        {"a1": SupportThumb("a1", plain(), "patient_3")},
        [{"case": "broken.nii.gz", "error": f"can't read {name}"}],
    )


def page_of(tmp_path, report: Report) -> tuple[Page, str]:
    write_report(tmp_path / "out" / "report.html", report)
    html = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    return Page(html), html


def test_report_is_self_contained(tmp_path):
    page, html = page_of(tmp_path, evaluation_report())
    for tag, attributes in page.tags:
        for key in ("src", "href", "srcset", "action", "poster"):
            assert attributes.get(key, "#").startswith(("#", "data:")), (tag, key)
    assert "@import" not in html and "url(" not in html and not page.all("link")
    targets = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    links = {attributes["href"][1:] for tag, attributes in page.tags if tag in ("a", "use")}
    assert links and links <= targets
    policy = page.all("meta")[1]["content"]
    script = html.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy


def test_pictures_decode_to_the_right_colours_and_size(tmp_path):
    page, _ = page_of(tmp_path, evaluation_report())
    query, final = page.all("img")
    assert decode(query["src"]).shape == (320, 160, 3)
    assert query["alt"] == "case_1.png: Query"
    picture = decode(final["src"]).astype(int)
    assert np.abs(picture[160, 79:81] - class_colour(2)).max() < 30  # left edge of the mask, 10 * 8
    assert np.abs(picture[160, 20] - GREY).max() < 6


def test_support_is_shown_with_its_similarity_and_embedded_once(tmp_path):
    page, html = page_of(tmp_path, evaluation_report())
    text = " ".join(page.text)
    assert "0.88" in text and "-0.50" in text and "patient_3" in text and "gone" in text
    assert len(page.all("use")) == 2 and len(page.all("image")) == 1
    assert decode(page.all("image")[0]["href"]).shape == (40, 40, 3)
    assert "Not for diagnosis" in text


def test_worst_cases_come_before_best_and_failures_are_told(tmp_path):
    page, _ = page_of(tmp_path, evaluation_report())
    text = " ".join(page.text)
    order = [text.rindex(part) for part in ("Metrics per class", "Worst cases", "Best cases", "can't read", "All rows")]
    assert order == sorted(order)
    assert "1 case failed." in text


def test_tables_show_numbers_with_units_and_a_dash_for_nothing(tmp_path):
    page, _ = page_of(tmp_path, evaluation_report())
    text = [part.strip() for part in page.text]
    assert {"0.810", "2.00 px", "400 px", "–", "Dice", "HD95", "Truth size"} <= set(text)
    assert not {"nan", "None", "Unit", "size_unit"} & set(text)


def test_everything_is_escaped(tmp_path):
    report = evaluation_report(NASTY)
    report.title = report.subtitle = NASTY
    report.meta[NASTY] = NASTY
    report.classes[1] = NASTY
    report.support["a1"].caption = NASTY
    report.figures[0].caption = report.figures[1].section = NASTY
    report.figures[0].support[0]["class_name"] = NASTY
    report.figures[0].support[1]["id"] = NASTY
    report.figures[0].panels[0] = (NASTY, plain())
    report.summary_rows[0]["class_name"] = NASTY
    report.case_rows[0][NASTY] = NASTY
    page, html = page_of(tmp_path, report)
    assert "<img src=x" not in html
    assert len(page.all("img")) == 2 and all("onerror" not in attributes for _, attributes in page.tags)
    assert page.all("img")[0]["alt"] == f"{NASTY}: {NASTY}"
    assert sum(NASTY in part for part in page.text) >= 10


def test_name_that_utf8_can_not_hold(tmp_path):
    page, _ = page_of(tmp_path, Report("Run", errors=[{"case": b"bad\xff.png".decode(errors="surrogateescape")}]))
    assert "bad\\udcff.png" in " ".join(page.text)


def test_inference_report_leaves_out_what_it_has_not(tmp_path):
    rows = [{"case": "q", "class_name": "liver", "size": 12.5, "size_unit": "mm2", "support": "a1; a2"}]
    rows[0]["seconds"] = np.float32(0.5)
    page, _ = page_of(tmp_path, Report("Inference", case_rows=rows, figures=[CaseFigure("q", metrics=rows)]))
    text = [part.strip() for part in page.text]
    assert {"Queries", "12.5 mm²", "0.50", "a1; a2"} <= set(text)
    assert not {"Metrics per class", "Failed cases", "truth"} & set(text)
    empty, _ = page_of(tmp_path, Report("Nothing"))
    assert not empty.all("section")
