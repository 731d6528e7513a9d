"""One self-contained HTML file that shows a run: facts, metrics, cases with pictures, failures and every row.

In: a `Report` of plain values and uint8 pictures. Out: a file that loads nothing else (its content security policy
forbids it), works offline, and escapes every text it was given.
"""

import base64
import hashlib
import io
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from numbers import Integral, Real
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from sam2sgp import __version__
from sam2sgp.drawing import EDGE, MONTAGE_EDGE, Picture, class_colour
from sam2sgp.files import write_text

THUMB_EDGE = 112
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
}
# Columns shown within another one's cells.
UNITS = {"hd95": "unit", "truth_size": "size_unit", "predicted_size": "size_unit", "size": "size_unit"}
SHARES = {"dice", "iou", "nsd", "confidence", "similarity"}
UNIT_TEXT = {"mm2": "mm²"}


@dataclass
class SupportThumb:
    """A support item as it is shown: its id, a picture (H, W, 3) uint8, best with its mask, and what it is."""

    id: str
    image: Picture
    caption: str = ""


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
        montage: a picture for the slices of a volume, at most 3 * `MONTAGE_EDGE` pixels a side.
        section: heading under which the case stands; cases of one section follow each other.
    """

    name: str
    caption: str = ""
    panels: list[tuple[str, Picture]] = field(default_factory=list)
    metrics: list[dict] = field(default_factory=list)
    support: list[dict] = field(default_factory=list)
    montage: Picture | None = None
    section: str = "Queries"


@dataclass
class Report:
    """What `write_report` shows. Every part may be empty, and is then left out.

    Args:
        title, subtitle: what was run, on what.
        meta: facts of the run, {name: value}.
        classes: {class value: name}, for the colour legend.
        summary_rows: of `sam2sgp.evaluation.summarise`.
        case_rows: every row of the run's CSV file.
        figures: cases in order, for an evaluation the worst ones first.
        support: the support items that figures refer to, by id.
        errors: rows of failed cases: case and error.
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
    warnings: list[dict] = field(default_factory=list)
    skipped: list[dict] = field(default_factory=list)


@dataclass
class _Cell:
    text: str
    sort: float | str
    numeric: bool
    colour: str | None = None


def write_report(path: str | Path, report: Report) -> None:
    """Write `report` to the HTML file `path` in one atomic step; the folder is made if missing."""
    environment = Environment(
        loader=PackageLoader("sam2sgp.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = environment.get_template("sort.js.j2").render()
    colours = {name: _css(class_colour(value)) for value, name in report.classes.items()}
    used = dict.fromkeys(item["id"] for figure in report.figures for item in figure.support)
    thumbs = {key: _thumb(f"support-{i}", report.support[key]) for i, key in enumerate(used) if key in report.support}
    sections = [
        {"title": title, "figures": [_figure(figure, thumbs, colours) for figure in figures]}
        for title, figures in groupby(report.figures, key=lambda figure: figure.section)
    ]
    html = environment.get_template("report.html.j2").render(
        report=report,
        colours=colours,
        summary=_summary(report.summary_rows, colours),
        sections=sections,
        thumbs=thumbs.values(),
        rows=_table(report.case_rows, colours),
        errors=_table(report.errors, colours),
        warnings=_table([{key: row[key] for key in ("case", "warnings")} for row in report.warnings], colours),
        skipped=_table([{key: row[key] for key in ("source", "skipped")} for row in report.skipped], colours),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        version=__version__,
    )
    write_text(path, html)


def _picture(picture: Picture, edge: int) -> dict:
    """A picture as a data URI, at most `edge` pixels a side."""
    image = Image.fromarray(picture)
    image.thumbnail((edge, edge), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    # no chroma subsampling: it would wash out thin coloured contours
    image.save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0, optimize=True)
    uri = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
    return {"uri": uri, "width": image.width, "height": image.height}


def _thumb(reference: str, thumb: SupportThumb) -> dict:
    return {"reference": reference, "caption": thumb.caption, **_picture(thumb.image, THUMB_EDGE)}


def _figure(figure: CaseFigure, thumbs: Mapping[str, dict], colours: Mapping[str, str]) -> dict:
    support: dict[str, list[dict]] = {}
    for item in figure.support:
        shown = {"id": item["id"], "similarity": f"{item['similarity']:.2f}", "thumb": thumbs.get(item["id"])}
        support.setdefault(item["class_name"], []).append(shown)
    hidden = {"case", *(key for row in figure.metrics for key in row if key.endswith("_voxels"))}
    return {
        "name": figure.name,
        "caption": figure.caption,
        "panels": [{"title": title, **_picture(picture, EDGE)} for title, picture in figure.panels],
        "montage": None if figure.montage is None else _picture(figure.montage, 3 * MONTAGE_EDGE),
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
            "mean": _number(metric, row[f"{metric}_mean"]),
            "std": _number(metric, row[f"{metric}_std"]),
            "median": _number(metric, row[f"{metric}_median"]),
            "n": row[f"{metric}_n"],
            "unit": f" {row['unit']}" if metric == "hd95" and row["unit"] != "mixed" else "",
        }
        for metric in ("dice", "iou", "hd95", "nsd")
    ]
    overall = row["class"] is None
    name = "All classes" if overall else row["class_name"]
    return {"name": name, "colour": None if overall else colours.get(name), "overall": overall, "metrics": metrics}


def _table(rows: Sequence[Mapping], colours: Mapping[str, str], hidden: Collection[str] = ()) -> dict:
    """Column titles and cells of rows of any keys; units stand with their numbers, class names with their colours."""
    keys = list(dict.fromkeys(key for row in rows for key in row if key not in hidden))
    inside = {UNITS[key] for key in keys if key in UNITS} | ({"class"} if "class_name" in keys else set())
    keys = [key for key in keys if key not in inside]
    cells = [[_cell(key, row, colours) for key in keys] for row in rows]
    numeric = [any(line[i].numeric for line in cells) for i in range(len(keys))]
    titles = [LABELS.get(key, str(key).replace("_", " ").capitalize()) for key in keys]
    return {"columns": list(zip(titles, numeric, strict=True)), "rows": cells}


def _cell(key: str, row: Mapping, colours: Mapping[str, str]) -> _Cell:
    value = row.get(key)
    if value is None:
        return _Cell("", "", False)
    if isinstance(value, bool):
        return _Cell("yes" if value else "no", str(value), False)
    if isinstance(value, Real):
        text = _number(key, value)
        unit = row.get(UNITS.get(key))
        if unit and not math.isnan(value):
            text += f" {UNIT_TEXT.get(unit, unit)}"
        return _Cell(text, "" if math.isnan(value) else value, True)
    return _Cell(str(value), str(value), False, colours.get(value) if key == "class_name" else None)


def _number(key: str, value: float) -> str:
    """Three decimals for shares; else whole numbers as they are, and about three digits."""
    if math.isnan(value):
        return "–"
    if key in SHARES:
        return f"{value:.3f}"
    if isinstance(value, Integral):
        return str(value)
    size = abs(value)
    return f"{value:.{0 if size >= 100 else 1 if size >= 10 else 2}f}"


def _css(colour: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)
