"""The report is one safe, self-contained file."""

import base64
import hashlib
import io
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import numpy as np
from PIL import Image

from sam2sgp.drawing import class_colour, draw_overlay
from sam2sgp.evaluation import case_metrics, summarise
from sam2sgp.report.html import CaseFigure, Report, SupportThumb, write_report
from tests.helpers.drawn import GREY, plain, square_map

NASTY = "<img src=x onerror=alert(1)>\"'&.png"


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
            address = attributes.get(key, "#")
            # Links lead to files beside the report.
            assert address.startswith(("#", "data:")) or (tag == "a" and not urlsplit(address).scheme), (tag, key)
    assert "@import" not in html and "url(" not in html and not page.all("link")
    targets = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    addresses = [attributes["href"] for tag, attributes in page.tags if tag in ("a", "use")]
    links = {address[1:] for address in addresses if address.startswith("#")}
    assert links and links <= targets
    policy = page.all("meta")[1]["content"]
    script = html.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy


def test_pictures_decode_to_the_right_colours_and_size(tmp_path):
    page, _ = page_of(tmp_path, evaluation_report())
    tile, query, final = page.all("img")
    assert tile["alt"] == "case_1.png" and decode(tile["src"]).shape == (160, 160, 3)
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
    assert {"0.810", "2.00 px", "400 px", "–", "Dice", "HD95", "Truth size", "Dice 0.81"} <= set(text)
    assert text.index("Mean Dice") < text.index("Overview")
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
    assert len(page.all("img")) == 3 and all("onerror" not in attributes for _, attributes in page.tags)
    assert page.all("img")[1]["alt"] == f"{NASTY}: {NASTY}"
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
    assert not {"Metrics per class", "Failed cases", "truth", "Needs a look"} & set(text)
    many, _ = page_of(tmp_path, Report("Inference", case_rows=[rows[0] | {"size": 145402, "size_unit": "px"}]))
    assert "145,402 px" in [part.strip() for part in many.text]
    empty, _ = page_of(tmp_path, Report("Nothing"))
    assert not empty.all("section")


def test_what_needs_a_look_stands_first_and_the_number_of_pictures_is_told(tmp_path):
    rows = [
        {"case": name, "class_name": "liver", "size": size, "size_unit": "ml", "mean_confidence": confidence, **more}
        for name, size, confidence, more in [
            ("fine", 100.0, 0.95, {}),
            ("fine too", 110.0, 0.93, {}),
            ("usual", 90.0, 0.92, {}),
            ("odd", 95.0, 0.94, {"unlike_support": True}),
            ("small", 2.0, 0.91, {}),
            ("unsure", 100.0, 0.5, {}),
            ("doubted", 100.0, 0.8, {"maybe_absent": True}),
            ("nothing", 0.0, float("nan"), {}),
            ("other scaling", 100.0, 0.9, {"warnings": "scaled otherwise"}),
        ]
    ]
    errors = [{"case": "broken", "error": "can't be read"}]
    figures = [CaseFigure(name, panels=[("Segmentation", plain())]) for name in ("fine", "unsure")]
    page, html = page_of(tmp_path, Report("Run", classes={1: "liver"}, case_rows=rows, errors=errors, figures=figures))
    text = [part.strip() for part in page.text if part.strip()]
    tiles = text[text.index("All") + 3 : text.index("Distributions", text.index("All"))]
    assert tiles == [
        *("no picture", "broken", "failed"),
        *("no picture", "other scaling", "warning"),
        *("no picture", "doubted", "maybe no liver", "confidence 0.80"),
        *("unsure", "confidence 0.50"),
        *("no picture", "odd", "unlike support set"),
        *("no picture", "small", "tiny liver"),
        *("no picture", "nothing", "nothing found"),
        "fine",
    ]
    assert "7 of 10 images may need a look" in html and "2 of 10 are shown with pictures" in html
    # The cases with pictures are in the same order.
    assert [article["id"] for article in page.all("article")] == ["case-0", "case-1"]
    assert html.index("<h3>unsure") < html.index("<h3>fine")


def test_what_may_be_wrong_with_the_labelled_images_is_told_first(tmp_path):
    page, _ = page_of(tmp_path, Report("Run", support_warnings=["a.png: value 7 <5 pixels>", "b.png: turned"]))
    text = [part.strip() for part in page.text if part.strip()]
    assert "Look at some labelled images." in text and {"a.png: value 7 <5 pixels>", "b.png: turned"} <= set(text)
    assert [section["id"] for section in page.all("section")] == ["support-warnings"]


def test_columns_that_say_nothing_are_named_once(tmp_path):
    rows = [
        {"case": f"c{n}", "class_name": "liver", "size": float(n), "size_unit": "ml", "scaling": "CT", "warnings": ""}
        for n in range(3)
    ]
    page, _ = page_of(tmp_path, Report("Run", case_rows=rows))
    assert [row["data-title"] for row in page.all("td")] == ["Case", "Size"] * 3
    caption = next(part for part in page.text if "full precision" in part)
    assert "Class: liver." in caption and "Scaling: CT." in caption and "No values: Warnings." in caption


def test_links_lead_from_the_report_to_the_files(tmp_path):
    image, label = tmp_path / "data" / "a #1 ü.png", tmp_path / "out" / "a #1 ü.png"
    rows = [{"case": "a", "class_name": "x", "size": 1.0, "source": str(image), "output": str(label)}]
    page, _ = page_of(tmp_path, Report("Run", case_rows=rows, figures=[CaseFigure("a")]))
    links = [attributes["href"] for attributes in page.all("a") if not attributes["href"].startswith("#")]
    reached = {(tmp_path / "out" / unquote(link)).resolve() for link in links}
    assert reached == {image, label}
