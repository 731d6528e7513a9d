"""One self-contained HTML file that shows a run: what needs a look first, metrics, cases, failures and every row.

In: a `Report` of plain values and uint8 pictures. Out: a file that loads nothing else (its content security policy
forbids it), works offline, and escapes every text it was given.
"""

import base64
import hashlib
import io
import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from numbers import Integral, Real
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from sam2sgp import __version__
from sam2sgp.drawing import EDGE, Picture, class_colour
from sam2sgp.evaluation.confidence import LOW_CONFIDENCE
from sam2sgp.files import write_text
from sam2sgp.report.overview import (
    LOW_DICE,
    NOTHING_SAID,
    TINY_SHARE,
    Histogram,
    Look,
    histograms,
    looks,
)

THUMB_EDGE = 112
TILE_EDGE = 160
# Cases without pictures that need a look, shown in the overview.
MORE_TILES = 100
JPEG_QUALITY = 85

LABELS = {
    "case": "Case",
    "class_name": "Class",
    "dice": "Dice",
    "iou": "IoU",
    "hd95": "HD95",
    "nsd": "NSD",
    "truth_size": "Truth size",
    "predicted_size": "Predicted size",
    "unlike_support": "Unlike support set",
    "maybe_absent": "May be absent",
    "mean_confidence": "Confidence",
    "support_items": "Support used",
}
# Columns shown within another one's cells.
UNITS = {"hd95": "unit", "truth_size": "size_unit", "predicted_size": "size_unit", "size": "size_unit"}
SHARES = {"dice", "iou", "nsd", "mean_confidence", "similarity"}
# Shown as links of the case, and voxels beside sizes.
HIDDEN = {"source", "output", "voxels", "truth_voxels", "predicted_voxels"}
# Where all rows of a table say the same, it is said once.
TOLD_ONCE = {"class_name", "scaling", "unlike_support", "maybe_absent", "support_items"}
METRICS = ("dice", "iou", "hd95", "nsd")
UNIT_TEXT = {"mm2": "mm²"}


@dataclass
class SupportThumb:
    """A support item as it is shown: its id, a picture (H, W, 3) uint8, best with its mask, and what it is."""

    id: str
    image: Picture
    caption: str = ""


@dataclass
class ShownSlice:
    """One slice of a volume: its picture, with the mask, and where it lies."""

    image: Picture
    caption: str


@dataclass
class CaseFigure:
    """One case: pictures, metrics, and the support items that guided it.

    Args:
        name: the case's name.
        caption: one sentence on it, such as which slice is shown.
        panels: (title, picture (H, W, 3) uint8) in order of the method: query, truth, pseudo-mask and box, final mask.
            Pictures are made smaller to at most `EDGE` = 320 pixels a side.
        metrics: rows of a small table: of `case_metrics`, or of summary.csv.
        support: dicts of id (a key of `Report.support`), class_name, similarity in [-1, 1], best first.
        frames: slices of a volume in their order, to scroll through.
        start: which of them is shown first.
        section: heading under which the case stands; cases of one section follow each other.
        sides: letters at the left, right, upper and lower edge of the pictures, such as "RLAP".
        width_mm: of a picture; None if the size of pixels is unknown.
        window: values at black and at white, and their unit, as in (-160, 240, "HU"); None where they are not known.
    """

    name: str
    caption: str = ""
    panels: list[tuple[str, Picture]] = field(default_factory=list)
    metrics: list[dict] = field(default_factory=list)
    support: list[dict] = field(default_factory=list)
    frames: list[ShownSlice] = field(default_factory=list)
    start: int = 0
    section: str = "Queries"
    sides: str = ""
    width_mm: float | None = None
    window: tuple[float, float, str] | None = None


@dataclass
class Report:
    """What `write_report` shows. Every part may be empty, and is then left out.

    Args:
        title, subtitle: what was run, on what.
        meta: what is known of the run, {name: value}, by which it can be repeated.
        classes: {class value: name}, for the colour legend.
        summary_rows: of `sam2sgp.evaluation.summarise`.
        case_rows: every row of the run's CSV file.
        figures: cases in order, for an evaluation the worst ones first. Those of the section "Queries" are brought
            into the order of the overview: what needs a look first.
        support: the support items that figures refer to, by id.
        errors: rows of failed cases: case and error.
        support_warnings: sentences on what may be wrong with the labelled images.
        warnings: rows of cases that may be wrong: case and warnings.
        skipped: rows of files that are not used: source and skipped, which says why.
    """

    title: str
    subtitle: str = ""
    meta: dict[str, str] = field(default_factory=dict)
    classes: dict[int, str] = field(default_factory=dict)
    summary_rows: list[dict] = field(default_factory=list)
    case_rows: list[dict] = field(default_factory=list)
    figures: list[CaseFigure] = field(default_factory=list)
    support: dict[str, SupportThumb] = field(default_factory=dict)
    errors: list[dict] = field(default_factory=list)
    support_warnings: list[str] = field(default_factory=list)
    warnings: list[dict] = field(default_factory=list)
    skipped: list[dict] = field(default_factory=list)


@dataclass
class _Cell:
    text: str
    sort: float | str
    numeric: bool
    colour: str | None = None
    address: str | None = None


def write_report(path: str | Path, report: Report) -> None:
    """Write `report` to the HTML file `path` in one atomic step; the folder is made if missing."""
    environment = Environment(
        loader=PackageLoader("sam2sgp.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = environment.get_template("report.js.j2").render()
    colours = {name: _css(class_colour(value)) for value, name in report.classes.items()}
    used = dict.fromkeys(item["id"] for figure in report.figures for item in figure.support)
    thumbs = {key: _thumb(f"support-{i}", report.support[key]) for i, key in enumerate(used) if key in report.support}
    ordered = looks([*report.case_rows, *report.errors])
    place = {look.name: number for number, look in enumerate(ordered)}
    shown = sorted(
        report.figures,
        key=lambda figure: place.get(figure.name, len(place)) if figure.section == CaseFigure.section else -1,
    )
    anchors = {figure.name: f"case-{number}" for number, figure in enumerate(shown)}
    look_of = {look.name: look for look in ordered}
    folder = Path(path).absolute().parent
    sections = [
        {
            "title": title,
            "figures": [
                _figure(figure, anchors[figure.name], look_of.get(figure.name), folder, thumbs, colours)
                for figure in figures
            ],
        }
        for title, figures in groupby(shown, key=lambda figure: figure.section)
    ]
    tiles, more = _tiles(ordered, {figure.name: figure for figure in shown}, anchors)
    rows = [row for row in report.case_rows if not row.get("error")]
    html = environment.get_template("report.html.j2").render(
        report=report,
        colours=colours,
        cases=len(ordered),
        pictured=len(shown),
        tiles=tiles,
        more_tiles=more,
        limits={"dice": LOW_DICE, "confidence": LOW_CONFIDENCE, "tiny": round(100 * TINY_SHARE)},
        marked=sum(look.urgency < NOTHING_SAID for look in ordered),
        summary=_summary(report.summary_rows, colours),
        histograms=[_bars(histogram, colours) for histogram in histograms(rows)],
        sections=sections,
        thumbs=thumbs.values(),
        rows=_table(rows, colours, HIDDEN, folder),
        errors=_table(report.errors, colours, HIDDEN, folder),
        warnings=_table([{key: row[key] for key in ("case", "warnings")} for row in report.warnings], colours),
        skipped=_table([{key: row[key] for key in ("source", "skipped")} for row in report.skipped], colours),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        version=__version__,
    )
    write_text(path, html)


def _tiles(
    ordered: Sequence[Look], figures: Mapping[str, CaseFigure], anchors: Mapping[str, str]
) -> tuple[list[dict], int]:
    """The overview's tiles, and how many cases that need a look are left out; those without pictures are bounded."""
    tiles, without = [], 0
    for look in ordered:
        figure = figures.get(look.name)
        without += figure is None and look.urgency < NOTHING_SAID
        if figure is None and (look.urgency == NOTHING_SAID or without > MORE_TILES):
            continue
        pictures = [panel for _, panel in figure.panels] if figure else []
        tiles.append(
            {
                "name": look.name,
                "anchor": anchors.get(look.name),
                "reasons": look.reasons,
                "dice": f"Dice {look.dice:.2f}" if look.dice >= LOW_DICE else "",
                "classes": look.classes,
                "picture": _picture(pictures[-1], TILE_EDGE) if pictures else None,
            }
        )
    return tiles, max(0, without - MORE_TILES)


def _bars(histogram: Histogram, colours: Mapping[str, str]) -> dict:
    """A histogram as rectangles in a box of 100 by 40."""
    most, width = max(histogram.counts), 100 / len(histogram.counts)
    unit = UNIT_TEXT.get(histogram.unit, histogram.unit)
    key = "dice" if histogram.unit == "" else "size"
    low, high, median = (_number(key, value) for value in (histogram.low, histogram.high, histogram.median))
    return {
        "title": histogram.title,
        "class_name": histogram.class_name,
        "colour": colours.get(histogram.class_name),
        "bars": [
            {"x": f"{i * width:.2f}", "y": f"{40 - 40 * count / most:.2f}", "height": f"{40 * count / most:.2f}"}
            for i, count in enumerate(histogram.counts)
            if count
        ],
        "width": f"{width * 0.9:.2f}",
        "low": "0",
        "high": f"{'1' if not unit else high} {unit}".strip(),
        "median": f"{median} {unit}".strip(),
        "at": f"{100 * (histogram.median - histogram.low) / (histogram.high - histogram.low):.2f}",
        "number": histogram.number,
    }


def _links(rows: Sequence[Mapping], folder: Path) -> list[dict]:
    """The files of a case, as links relative to the report."""
    found = {}
    for key, text in (("output", "label file"), ("source", "image")):
        path = next((row[key] for row in rows if row.get(key)), None)
        if path:
            found[text] = quote(os.path.relpath(path, folder).encode("utf-8", "surrogateescape"))
    return [{"text": text, "address": address} for text, address in found.items()]


def _scale_bar(width_mm: float | None) -> dict | None:
    """A bar of a round length, about a quarter of a picture that is `width_mm` wide."""
    if not width_mm:
        return None
    power = 10 ** math.floor(math.log10(width_mm / 3))
    length = next(step * power for step in (5, 2, 1) if step * power <= width_mm / 3)
    return {"text": f"{length:g} mm", "percent": f"{100 * length / width_mm:.2f}"}


def _picture(picture: Picture, edge: int) -> dict:
    """A picture as a data URI, at most `edge` pixels a side."""
    image = Image.fromarray(picture)
    image.thumbnail((edge, edge), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    # Without chroma subsampling, which would wash out thin coloured contours.
    image.save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0, optimize=True)
    uri = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
    return {"uri": uri, "width": image.width, "height": image.height}


def _thumb(reference: str, thumb: SupportThumb) -> dict:
    return {"reference": reference, "caption": thumb.caption, **_picture(thumb.image, THUMB_EDGE)}


def _figure(
    figure: CaseFigure,
    anchor: str,
    look: Look | None,
    folder: Path,
    thumbs: Mapping[str, dict],
    colours: Mapping[str, str],
) -> dict:
    support: dict[str, list[dict]] = {}
    for item in figure.support:
        shown = {"id": item["id"], "similarity": f"{item['similarity']:.2f}", "thumb": thumbs.get(item["id"])}
        support.setdefault(item["class_name"], []).append(shown)
    hidden = {"case", *(key for row in figure.metrics for key in row if key.endswith("_voxels"))}
    return {
        "name": figure.name,
        "anchor": anchor,
        "classes": look.classes if look else [],
        "reasons": look.reasons if look else [],
        "links": _links(look.found if look else figure.metrics, folder),
        "caption": figure.caption,
        "panels": [{"title": title, **_picture(picture, EDGE)} for title, picture in figure.panels],
        "frames": [{"title": frame.caption, **_picture(frame.image, EDGE)} for frame in figure.frames],
        "start": figure.start,
        "sides": figure.sides,
        "bar": _scale_bar(figure.width_mm),
        "window": figure.window,
        "metrics": _table(figure.metrics, colours, hidden),
        "support": [
            {"class_name": name, "colour": colours.get(name), "items": items} for name, items in support.items()
        ],
    }


def _summary(rows: Sequence[Mapping], colours: Mapping[str, str]) -> list[dict]:
    """Rows of the summary table; the one over all classes says nothing new where there is one class."""
    classes = [row for row in rows if row["class"] is not None]
    return [_summary_row(row, colours) for row in (rows if len(classes) > 1 else classes)]


def _summary_row(row: Mapping, colours: Mapping[str, str]) -> dict:
    metrics = [
        {
            "title": LABELS[metric],
            "mean": _number(metric, row[f"{metric}_mean"]),
            "std": _number(metric, row[f"{metric}_std"]),
            "median": _number(metric, row[f"{metric}_median"]),
            "n": row[f"{metric}_n"],
            "interval": _interval(metric, row),
            "unit": f" {row['unit']}" if metric == "hd95" and row["unit"] != "mixed" else "",
        }
        for metric in METRICS
    ]
    overall = row["class"] is None
    name = "All classes" if overall else row["class_name"]
    return {"name": name, "colour": None if overall else colours.get(name), "overall": overall, "metrics": metrics}


def _interval(metric: str, row: Mapping) -> str:
    low, high = (row.get(f"{metric}_{end}", math.nan) for end in ("low", "high"))
    return "" if math.isnan(low) else f"{_number(metric, low)} to {_number(metric, high)}"


def _table(
    rows: Sequence[Mapping], colours: Mapping[str, str], hidden: Collection[str] = (), folder: Path | None = None
) -> dict:
    """Column titles and cells of rows of any keys; units stand with their numbers, class names with their colours.

    Columns without a value are named beside the table instead, and so are those of one value, with the value. With
    `folder`, a case's name links to its file.
    """
    keys = list(dict.fromkeys(key for row in rows for key in row if key not in hidden))
    inside = {UNITS[key] for key in keys if key in UNITS} | ({"class"} if "class_name" in keys else set())
    keys = [key for key in keys if key not in inside]
    values = {key: {_cell(key, row, colours).text for row in rows} for key in keys}
    empty = [key for key in keys if values[key] <= {"", "–"}]
    equal = [key for key in keys if len(rows) > 2 and key in TOLD_ONCE and key not in empty and len(values[key]) == 1]
    keys = [key for key in keys if key not in (*empty, *equal)]
    cells = [[_cell(key, row, colours) for key in keys] for row in rows]
    if folder is not None and "case" in keys:
        for row, line in zip(rows, cells, strict=True):
            links = _links([row], folder)
            line[keys.index("case")].address = links[0]["address"] if links else None
    numeric = [any(line[i].numeric for line in cells) for i in range(len(keys))]
    notes = [f"{_title(key)}: {next(iter(values[key]))}" for key in equal]
    notes += [f"No values: {', '.join(_title(key) for key in empty)}"] if empty else []
    return {"columns": list(zip(map(_title, keys), numeric, strict=True)), "rows": cells, "notes": notes}


def _title(key: str) -> str:
    return LABELS.get(key, str(key).replace("_", " ").capitalize())


def _cell(key: str, row: Mapping, colours: Mapping[str, str]) -> _Cell:
    value = row.get(key)
    if value is None:
        return _Cell("", "", False)
    if isinstance(value, bool):
        return _Cell("yes" if value else "no", str(value), False)
    if isinstance(value, Real):
        number = int(value) if isinstance(value, Integral) else float(value)
        text = _number(key, number)
        unit = row.get(UNITS.get(key))
        if unit and not math.isnan(number):
            text += f" {UNIT_TEXT.get(unit, unit)}"
        return _Cell(text, "" if math.isnan(number) else number, True)
    return _Cell(str(value), str(value), False, colours.get(value) if key == "class_name" else None)


def _number(key: str, value: float) -> str:
    """Three decimals for shares; else whole numbers as they are, and about three digits; thousands are set apart."""
    if math.isnan(value):
        return "–"
    if key in SHARES:
        return f"{value:.3f}"
    if isinstance(value, Integral):
        return f"{value:,}"
    size = abs(value)
    return f"{value:,.{0 if size >= 100 else 1 if size >= 10 else 2}f}"


def _css(colour: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)
