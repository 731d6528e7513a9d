"""Dice, IoU, HD95 and NSD per class and case, sizes per class, their summary, and CSV.

In: class maps (Z, H, W) on the case's own grid, with its spacing where known. Out: lists of flat dicts, one a row, that
`write_csv` writes as they are. Not counted values are NaN here and empty in a CSV file.
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path

import numpy as np
import torch
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_iou, compute_surface_dice
from numpy.typing import ArrayLike
from scipy.ndimage import find_objects

from sam2sgp.files import write_text

DRAWS = 2000
METRICS = ("dice", "iou", "hd95", "nsd")
DISTANCE_METRICS = ("hd95", "nsd")
NAN = float("nan")


def case_metrics(
    prediction: ArrayLike,
    truth: ArrayLike,
    class_names: Mapping[int, str],
    spacing: Sequence[float] | None = None,
    nsd_tolerance: float = 2.0,
) -> list[dict]:
    """Measure one case: one dict per class, in the order of `class_names`.

    Dice = ``2|P∩T| / (|P| + |T|)`` and IoU = ``|P∩T| / |P∪T|``, in [0, 1]. HD95 is the larger of the two 95th
    percentiles of the distances from each surface to the other. NSD, in [0, 1], is the share of both surfaces (by
    length or area, as in Nikolov et al., arXiv 1809.04430) that lies within the tolerance of the other. All are
    MONAI's. A case of one slice is measured in 2D, all others in 3D.

    A class absent from both maps is not counted: all four are NaN. Absent from one of them: Dice = IoU = NSD = 0 and
    HD95 is NaN, for there is no distance to nothing.

    Args:
        prediction, truth: class maps (Z, H, W) of integers >= 0, arrays or tensors.
        class_names: {class value > 0: name}; other values count as background.
        spacing: (slice, row, column) in mm, or None if unknown; HD95 and the tolerance are then in pixels.
        nsd_tolerance: in the unit of HD95.

    Returns:
        Dicts of class, class_name, dice, iou, hd95, nsd, unit ("mm" or "px", of HD95), truth_voxels and
        predicted_voxels, truth_size and predicted_size in size_unit ("ml" for volumes, "mm2" for one slice, "px" if the
        spacing is unknown).

    Raises:
        ValueError: the maps are not (Z, H, W) of integers, or differ in shape.

    Example:
        >>> truth = np.zeros((1, 8, 8), dtype=np.uint8)
        >>> truth[0, 2:6, 2:6] = 1
        >>> case_metrics(truth, truth, {1: "cyst"})[0]["dice"]
        1.0
    """
    prediction, truth = _class_map(prediction), _class_map(truth)
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction and truth differ in shape: {prediction.shape} and {truth.shape}")
    predicted_boxes, true_boxes = find_objects(prediction), find_objects(truth)
    factor, size_unit = _size_factor(prediction.shape, spacing)
    # The whole map decides, not the region: a class on one slice of a volume is measured in 3D.
    space = 0 if len(truth) == 1 else slice(None)
    lengths = None if spacing is None else [float(length) for length in spacing[-truth[space].ndim :]]

    def row(value: int, name: str) -> dict:
        boxes = [found[value - 1] for found in (predicted_boxes, true_boxes) if value <= len(found)]
        region = _union([box for box in boxes if box is not None])
        predicted, true = (labels[region][space] == value for labels in (prediction, truth))
        counts = {"truth": int(true.sum()), "predicted": int(predicted.sum())}
        return {
            "class": value,
            "class_name": name,
            **_mask_metrics(predicted, true, lengths, nsd_tolerance),
            "unit": "px" if spacing is None else "mm",
            **{f"{which}_voxels": count for which, count in counts.items()},
            **{f"{which}_size": count * factor for which, count in counts.items()},
            "size_unit": size_unit,
        }

    return [row(value, name) for value, name in class_names.items()]


def class_sizes(
    labels: ArrayLike, class_names: Mapping[int, str], spacing: Sequence[float] | None = None
) -> list[dict]:
    """Size of each class of a map (Z, H, W): dicts of class, class_name, voxels, size, size_unit as in `case_metrics`.

    Classes that the map does not hold have size 0.
    """
    labels = _class_map(labels)
    factor, unit = _size_factor(labels.shape, spacing)
    bins = max(class_names, default=0) + 1
    counts = np.zeros(bins, np.int64)
    for section in labels:  # slice by slice, which bounds bincount's memory
        counts += np.bincount(section.ravel(), minlength=bins)[:bins]
    return [
        {
            "class": value,
            "class_name": name,
            "voxels": int(counts[value]),
            "size": float(counts[value]) * factor,
            "size_unit": unit,
        }
        for value, name in class_names.items()
    ]


def summarise(rows: Sequence[Mapping]) -> list[dict]:
    """Summary of `case_metrics` rows of many cases: a dict per class in order of appearance, and one over all rows.

    Each has class and class_name (None and "all" for the last), unit, and for every metric m of `METRICS` m_mean,
    m_std (of the sample; NaN for fewer than two values), m_median, m_low and m_high (the 95 % confidence interval of
    the mean: percentiles over 2000 draws of the cases with replacement, always the same ones; NaN for fewer than two
    cases) and m_n, the number of rows counted: those where m is not NaN. Where rows in mm meet rows in pixels, unit is
    "mixed", and HD95 and NSD are not summarised.
    """
    classes: dict[int, list[Mapping]] = {}
    for row in rows:
        classes.setdefault(row["class"], []).append(row)
    summary = [_summary(value, members[0]["class_name"], members) for value, members in classes.items()]
    return [*summary, _summary(None, "all", rows)] if rows else []


def write_csv(path: str | Path, rows: Sequence[Mapping], columns: Sequence[str] = ()) -> None:
    """Write rows as CSV (RFC 4180, UTF-8, a header line) in one atomic step.

    Columns are `columns` and then the rows' other keys in order of first appearance. NaN, None and missing values
    become empty cells, and other floats have eight significant digits.
    """
    columns = list(dict.fromkeys([*columns, *(key for row in rows for key in row)]))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="")
    if columns:
        writer.writeheader()
    for row in rows:
        writer.writerow({key: _cell(value) for key, value in row.items()})
    write_text(path, text.getvalue())


def _class_map(labels: ArrayLike) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.ndim != 3:
        raise ValueError(f"expected a class map (Z, H, W), found shape {labels.shape}")
    if not np.can_cast(labels.dtype, np.int64):
        raise ValueError(f"expected a class map of integers, found {labels.dtype}")
    return labels


def _size_factor(shape: tuple[int, ...], spacing: Sequence[float] | None) -> tuple[float, str]:
    """Size of a voxel, and its unit."""
    if spacing is None:
        return 1, "px"
    if shape[0] == 1:
        return math.prod(spacing[1:]), "mm2"
    return math.prod(spacing) / 1000, "ml"


def _union(boxes: Sequence[tuple[slice, ...]]) -> tuple[slice, ...]:
    """Bounding box of boxes: outside it a class has no surface. One voxel for no boxes."""
    if not boxes:
        return (slice(0, 1),) * 3
    return tuple(slice(min(s.start for s in axis), max(s.stop for s in axis)) for axis in zip(*boxes, strict=True))


def _mask_metrics(
    predicted: np.ndarray, true: np.ndarray, spacing: Sequence[float] | None, nsd_tolerance: float
) -> dict[str, float]:
    """The four metrics of two masks of 2 or 3 axes; for empty masks MONAI's functions differ in what they return."""
    if not (predicted.any() or true.any()):
        return dict.fromkeys(METRICS, NAN)
    if not (predicted.any() and true.any()):
        return {"dice": 0.0, "iou": 0.0, "hd95": NAN, "nsd": 0.0}
    masks = [torch.from_numpy(np.ascontiguousarray(mask))[None, None] for mask in (predicted, true)]
    surface = {"include_background": True, "spacing": spacing}
    return {
        "dice": compute_dice(*masks).item(),
        "iou": compute_iou(*masks).item(),
        "hd95": compute_hausdorff_distance(*masks, percentile=95, **surface).item(),
        "nsd": compute_surface_dice(*masks, [nsd_tolerance], use_subvoxels=True, **surface).item(),
    }


def _summary(value: int | None, name: str, rows: Sequence[Mapping]) -> dict:
    units = {row["unit"] for row in rows}
    unit = units.pop() if len(units) == 1 else "mixed"
    summary = {"class": value, "class_name": name, "unit": unit}
    for metric in METRICS:
        comparable = unit != "mixed" or metric not in DISTANCE_METRICS
        values = np.array([row[metric] for row in rows if comparable and not math.isnan(row[metric])])
        summary[f"{metric}_mean"] = float(values.mean()) if len(values) else NAN
        summary[f"{metric}_std"] = float(values.std(ddof=1)) if len(values) > 1 else NAN
        summary[f"{metric}_median"] = float(np.median(values)) if len(values) else NAN
        low, high = _interval(metric, rows) if comparable else (NAN, NAN)
        summary[f"{metric}_low"], summary[f"{metric}_high"] = low, high
        summary[f"{metric}_n"] = len(values)
    return summary


def _interval(metric: str, rows: Sequence[Mapping]) -> tuple[float, float]:
    """The 95 % confidence interval of a mean over rows. Rows of one case stay together: they are not independent."""
    values: dict[object, list[float]] = {}
    for number, row in enumerate(rows):
        if not math.isnan(row[metric]):
            values.setdefault(row.get("case", number), []).append(row[metric])
    if len(values) < 2:
        return NAN, NAN
    sums, counts = (np.array([measure(found) for found in values.values()], float) for measure in (sum, len))
    drawn = np.random.default_rng(0).integers(len(sums), size=(DRAWS, len(sums)))
    low, high = np.percentile(sums[drawn].sum(1) / counts[drawn].sum(1), (2.5, 97.5))
    return float(low), float(high)


def _cell(value: object) -> object:
    if _is_nan(value):
        return ""
    return float(f"{value:.8g}") if isinstance(value, float) else value


def _is_nan(value: object) -> bool:
    return isinstance(value, Real) and math.isnan(value)
