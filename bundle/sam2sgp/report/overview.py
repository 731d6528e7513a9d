"""What needs a look first, and how values are distributed over the cases of a run.

In: rows of a run's CSV file, one per case and class. Out: reasons per case, by which the overview of a report is
sorted, and the bars of its histograms.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from sam2sgp.evaluation.confidence import LOW_CONFIDENCE

LOW_DICE = 0.7
# A class below this share of its median size is tiny in a case.
TINY_SHARE = 0.1
# A class that is missing in a case is told only where this share of at least so many cases holds it.
USUAL_SHARE, FEWEST_CASES = 0.8, 5
BINS = 20

# Reasons in the order of their urgency.
FAILED, WARNED, POOR, DOUBTED, UNSURE, UNLIKE, TINY, EMPTY, NOTHING_SAID = range(9)


@dataclass
class Look:
    """Why a case should be looked at.

    Attributes:
        name: of the case.
        urgency: of its most urgent reason, 0 first.
        dice: smallest of its classes; NaN where it is not measured.
        score: smallest Dice, else smallest confidence of its classes; NaN where there is none.
        reasons: in a few words each.
        classes: names of the classes that were found, or that the truth holds.
        found: rows of the case.
    """

    name: str
    urgency: int = NOTHING_SAID
    dice: float = math.nan
    score: float = math.nan
    reasons: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    found: list[Mapping] = field(default_factory=list)


def looks(rows: Sequence[Mapping]) -> list[Look]:
    """The cases of a run, those that need a look first: failed ones, then by reason and by Dice or confidence."""
    by_case: dict[str, list[Mapping]] = defaultdict(list)
    for row in rows:
        by_case[str(row["case"])].append(row)
    sizes: dict[tuple, list[float]] = defaultdict(list)
    for row in rows:
        if "error" not in row and "class_name" in row:
            sizes[_kind(row)].append(_size(row))
    usual = {}
    for kind, every in sizes.items():
        found = [size for size in every if size]
        if len(every) >= FEWEST_CASES and len(found) >= USUAL_SHARE * len(every):
            usual[kind] = float(np.median(found))
    made = [_look(name, found, usual) for name, found in by_case.items()]
    return sorted(made, key=lambda look: (look.urgency, math.isnan(look.score), look.score, look.name))


def _look(name: str, rows: list[Mapping], usual: Mapping[tuple, float]) -> Look:
    look, told = Look(name, found=rows), []
    errors = [str(row["error"]) for row in rows if row.get("error")]
    if errors:
        look.urgency, look.reasons = FAILED, ["failed"]
        return look
    rows = [row for row in rows if "class_name" in row]
    look.classes = [row["class_name"] for row in rows if _size(row) or row.get("truth_size")]
    # Where there is a truth, Dice says more of a find than its size beside that of other images.
    is_scored = any("dice" in row for row in rows)
    dice = [row["dice"] for row in rows if not math.isnan(row.get("dice", math.nan))]
    look.dice = min(dice, default=math.nan)
    confidence = [row["mean_confidence"] for row in rows if not math.isnan(row.get("mean_confidence", math.nan))]
    look.score = min(dice or confidence, default=math.nan)
    if any(row.get("warnings") for row in rows):
        told.append((WARNED, "warning"))
    if dice and min(dice) < LOW_DICE:
        told.append((POOR, f"Dice {min(dice):.2f}"))
    if confidence and min(confidence) < LOW_CONFIDENCE:
        told.append((UNSURE, f"confidence {min(confidence):.2f}"))
    if any(row.get("unlike_support") for row in rows):
        told.append((UNLIKE, "unlike support set"))
    for row in rows:
        class_name, size = row["class_name"], _size(row)
        if row.get("maybe_absent"):
            told.append((DOUBTED, f"maybe no {class_name}"))
        if is_scored:
            continue
        if size and size < TINY_SHARE * usual.get(_kind(row), 0):
            told.append((TINY, f"tiny {class_name}"))
        elif not size and _kind(row) in usual and len(rows) > 1:
            told.append((EMPTY, f"no {class_name}"))
    if rows and not is_scored and not any(_size(row) for row in rows):
        told.append((EMPTY, "nothing found"))
    if told:
        look.urgency = min(told)[0]
        look.reasons = [reason for _, reason in sorted(told)]
    return look


def _kind(row: Mapping) -> tuple:
    """What sizes can be compared of: one class, in one unit."""
    return row["class_name"], row.get("size_unit")


def _size(row: Mapping) -> float:
    return row.get("size", row.get("predicted_size", 0)) or 0


@dataclass(frozen=True)
class Histogram:
    """Bars of one value of one class: counts per bin from `low` to `high`, both in `unit`."""

    title: str
    class_name: str
    counts: tuple[int, ...]
    low: float
    high: float
    median: float
    unit: str = ""

    @property
    def number(self) -> int:
        return sum(self.counts)


def histograms(rows: Sequence[Mapping]) -> list[Histogram]:
    """Dice (where it was measured), confidence and size of each class that at least three cases have."""
    by_class: dict[str, list[Mapping]] = defaultdict(list)
    for row in rows:
        if "class_name" in row and not row.get("error"):
            by_class[row["class_name"]].append(row)
    made = []
    for name, found in by_class.items():
        for key, title in (("dice", "Dice"), ("mean_confidence", "Confidence")):
            values = [row[key] for row in found if not math.isnan(row.get(key, math.nan))]
            made += _histogram(title, name, values, 1.0)
        unit = Counter(row["size_unit"] for row in found if row.get("size_unit")).most_common(1)
        if unit:
            values = [_size(row) for row in found if row.get("size_unit") == unit[0][0] and _size(row)]
            made += _histogram("Size", name, values, max(values, default=0), unit[0][0])
    return made


def _histogram(title: str, name: str, values: list[float], high: float, unit: str = "") -> list[Histogram]:
    if len(values) < 3 or high <= 0:
        return []
    counts, _ = np.histogram(values, BINS, (0, high))
    return [Histogram(title, name, tuple(counts.tolist()), 0.0, high, float(np.median(values)), unit)]
