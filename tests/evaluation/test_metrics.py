"""Numbers on shapes whose metrics are known by hand."""

import csv
import math

import numpy as np
import pytest
import torch
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_iou, compute_surface_dice

from sam2sgp.evaluation import METRICS, case_metrics, class_sizes, summarise, write_csv

NAMES = {1: "liver"}


def cube(start: tuple[int, int, int], side: int = 10, shape: tuple[int, int, int] = (24, 32, 32), value: int = 1):
    labels = np.zeros(shape, dtype=np.uint8)
    labels[tuple(slice(s, s + side) for s in start)] = value
    return labels


def square(row: int, column: int, side: int = 10, value: int = 1):
    labels = np.zeros((1, 40, 40), dtype=np.uint8)
    labels[0, row : row + side, column : column + side] = value
    return labels


def test_identical_maps_are_perfect():
    (row,) = case_metrics(cube((4, 5, 6)), cube((4, 5, 6)), NAMES, (5.0, 1.0, 1.0))
    assert [row[metric] for metric in METRICS] == [1, 1, 0, 1]


@pytest.mark.parametrize(
    ("shift", "distance"), [((1, 0, 0), 5.0), ((0, 2, 0), 2.0), ((0, 0, 3), 1.5), ((2, 0, 0), 10.0)]
)
def test_shifted_cubes_with_anisotropic_spacing(shift, distance):
    """Shifted by n of 10 voxels: Dice = (10 - n) / 10, HD95 = n times the spacing along that axis."""
    start = (5, 8, 8)
    shifted = tuple(s + n for s, n in zip(start, shift, strict=True))
    (row,) = case_metrics(cube(shifted), cube(start), NAMES, (5.0, 1.0, 0.5), nsd_tolerance=distance)
    overlap = (10 - sum(shift)) / 10
    assert row["dice"] == pytest.approx(overlap)
    assert row["iou"] == pytest.approx(overlap / (2 - overlap))
    assert row["hd95"] == pytest.approx(distance)
    assert row["nsd"] == 1
    (strict,) = case_metrics(cube(shifted), cube(start), NAMES, (5.0, 1.0, 0.5), nsd_tolerance=0.4 * distance)
    assert 0 < strict["nsd"] < 1
    assert row["unit"] == "mm"


def test_one_slice_is_measured_in_2d():
    (row,) = case_metrics(square(10, 14), square(10, 10), NAMES, (8.0, 2.0, 0.5), nsd_tolerance=2.0)
    assert row["dice"] == pytest.approx(0.6)
    assert row["hd95"] == pytest.approx(2.0)
    assert row["nsd"] == 1
    # an interior pixel is no surface in 2D; were the slice a volume, every pixel would be one and surfaces would meet
    (inner,) = case_metrics(square(5, 5, 30), square(15, 15, 10), NAMES)
    assert inner["nsd"] == 0 and inner["hd95"] >= 10 and inner["unit"] == "px"


def test_class_on_one_slice_of_a_volume_is_measured_in_3d():
    truth, prediction = (np.zeros((8, 20, 20), dtype=np.uint8) for _ in range(2))
    truth[2, 5:15, 5:15] = prediction[2, 5:15, 5:15] = 1
    prediction[5, 5:15, 5:15] = 2
    first, second = case_metrics(prediction, truth, {1: "a", 2: "b"}, (4.0, 1.0, 1.0))
    assert (first["dice"], first["hd95"], first["size_unit"]) == (1, 0, "ml")
    assert second["dice"] == 0


def test_unknown_spacing_means_pixels():
    (row,) = case_metrics(cube((7, 8, 8)), cube((5, 8, 8)), NAMES)
    assert (row["hd95"], row["unit"], row["size_unit"]) == (2.0, "px", "px")
    assert row["truth_size"] == row["truth_voxels"] == 1000


def test_sizes_are_ml_mm2_or_pixels():
    (volume,) = case_metrics(cube((1, 1, 1), side=5), cube((0, 0, 0)), NAMES, (5.0, 0.5, 0.5))
    assert (volume["truth_size"], volume["predicted_size"], volume["size_unit"]) == pytest.approx((1.25, 0.15625, "ml"))
    (picture,) = class_sizes(square(3, 3), NAMES, (9.0, 0.5, 0.2))
    assert picture == {"class": 1, "class_name": "liver", "voxels": 100, "size": pytest.approx(10), "size_unit": "mm2"}
    assert class_sizes(square(3, 3), {3: "none"})[0]["size"] == 0


def test_absent_from_both_is_not_counted_and_absent_from_one_is_zero():
    empty, full = np.zeros((4, 12, 12), dtype=np.int64), np.zeros((4, 12, 12), dtype=np.int64)
    full[1:3, 2:6, 2:6] = 1
    (both,) = case_metrics(empty, empty, NAMES)
    assert all(math.isnan(both[metric]) for metric in METRICS)
    for prediction, truth in ((empty, full), (full, empty)):
        (row,) = case_metrics(prediction, truth, NAMES)
        assert [row["dice"], row["iou"], row["nsd"]] == [0, 0, 0] and math.isnan(row["hd95"])
    assert math.isnan(case_metrics(empty[:1], empty[:1], NAMES)[0]["dice"])


def test_classes_are_measured_apart():
    prediction = cube((2, 2, 2), side=4) + cube((10, 10, 10), side=6, value=3)
    truth = cube((2, 2, 2), side=4) + cube((10, 10, 13), side=6, value=3)
    rows = case_metrics(torch.as_tensor(prediction), torch.as_tensor(truth), {3: "tumour", 1: "liver"})
    assert [(row["class"], row["class_name"]) for row in rows] == [(3, "tumour"), (1, "liver")]
    assert [row["dice"] for row in rows] == pytest.approx([0.5, 1])


@pytest.mark.parametrize("shape", [(1, 60, 70), (14, 40, 50)])
@pytest.mark.parametrize("spacing", [None, (3.0, 0.8, 1.2)])
def test_cropping_changes_nothing(shape, spacing):
    """Against MONAI on the whole maps; the classes touch the border too."""
    random = np.random.default_rng(7)
    prediction, truth = (np.zeros(shape, dtype=np.uint8) for _ in range(2))
    for value, corner in ((1, (0, 0)), (2, (25, 30))):
        region = (slice(0, 9), slice(corner[0], corner[0] + 12), slice(corner[1], corner[1] + 15))
        for labels in (prediction, truth):
            labels[region][random.random(labels[region].shape) > 0.4] = value
    for row in case_metrics(prediction, truth, {1: "a", 2: "b"}, spacing, nsd_tolerance=1.0):
        masks = [torch.as_tensor(labels == row["class"])[None] for labels in (prediction, truth)]
        masks = [mask if shape[0] == 1 else mask[None] for mask in masks]
        options = {"include_background": True, "spacing": spacing and spacing[-2 if shape[0] == 1 else -3 :]}
        assert row["dice"] == compute_dice(*masks).item() and 0 < row["dice"] < 1
        assert row["iou"] == compute_iou(*masks).item()
        assert row["hd95"] == compute_hausdorff_distance(*masks, percentile=95, **options).item()
        assert row["nsd"] == pytest.approx(compute_surface_dice(*masks, [1.0], use_subvoxels=True, **options).item())


@pytest.mark.parametrize(
    ("prediction", "truth"),
    [
        (np.zeros((4, 4), int), np.zeros((4, 4), int)),
        (np.zeros((1, 4, 4), int), np.zeros((1, 4, 5), int)),
        (np.zeros((1, 4, 4)), np.zeros((1, 4, 4), int)),
    ],
)
def test_maps_that_can_not_be_compared_are_refused(prediction, truth):
    with pytest.raises(ValueError):
        case_metrics(prediction, truth, NAMES)


def row(case: str, value: int, dice: float, unit: str = "mm", hd95: float = 1.0) -> dict:
    return {
        "case": case,
        "class": value,
        "class_name": f"class_{value}",
        "dice": dice,
        "iou": dice,
        "hd95": hd95,
        "nsd": dice,
        "unit": unit,
    }


def test_summary_counts_only_what_counts():
    nan = float("nan")
    rows = [row("a", 1, 0.8), row("b", 1, 0.0, hd95=nan), row("c", 1, 0.4), row("a", 2, nan, hd95=nan)]
    first, second, overall = summarise(rows)
    assert (first["dice_mean"], first["dice_median"], first["dice_std"]) == pytest.approx((0.4, 0.4, 0.4))
    assert (first["dice_n"], first["hd95_n"], first["hd95_mean"]) == (3, 2, 1.0)
    assert second["dice_n"] == 0 and math.isnan(second["dice_mean"])
    assert (overall["class"], overall["class_name"], overall["dice_n"]) == (None, "all", 3)
    assert summarise([]) == []


def test_distances_in_mm_and_in_pixels_are_not_averaged():
    summary = summarise([row("a", 1, 0.8), row("b", 1, 0.6, unit="px")])[0]
    assert summary["unit"] == "mixed" and summary["dice_mean"] == pytest.approx(0.7)
    assert (summary["hd95_n"], summary["nsd_n"]) == (0, 0)


def test_csv_round_trip(tmp_path):
    path = tmp_path / "new" / "summary.csv"
    rows = [{"case": 'a,"b"\nü', "dice": 0.1 + 0.2, "hd95": float("nan")}, {"case": "=c", "dice": 1.0, "error": None}]
    write_csv(path, rows)
    with open(path, newline="", encoding="utf-8") as file:
        back = list(csv.DictReader(file))
    assert list(back[0]) == ["case", "dice", "hd95", "error"]
    assert back[0] == {"case": 'a,"b"\nü', "dice": "0.3", "hd95": "", "error": ""}
    assert back[1]["case"] == "=c" and float(back[1]["dice"]) == 1
    assert path.read_bytes().startswith(b"case,dice,hd95,error\r\n")
    assert [file.name for file in path.parent.iterdir()] == ["summary.csv"]


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "summary.csv"
    write_csv(path, [{"case": "a"}])

    def full(_):
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError):
        write_csv(path, [{"case": "b"}])
    assert "a" in path.read_text() and [file.name for file in tmp_path.iterdir()] == ["summary.csv"]
    monkeypatch.undo()
    write_csv(path, [])
    assert path.read_text() == ""


def test_intervals_draw_whole_cases_and_are_always_the_same():
    def row(case, value, class_index=1):
        return {"case": case, "class": class_index, "class_name": "x", "unit": "mm", **dict.fromkeys(METRICS, value)}

    rng = np.random.default_rng(1)
    values = rng.normal(0.8, 0.1, 200)
    (summary, _) = summarise([row(str(number), value) for number, value in enumerate(values)])
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert summary["dice_low"] == pytest.approx(values.mean() - half, abs=0.003)
    assert summary["dice_high"] == pytest.approx(values.mean() + half, abs=0.003)
    again = summarise([row(str(number), value) for number, value in enumerate(values)])[0]
    assert again == summary
    # Ten classes of two cases are no twenty independent cases.
    rows = [row(case, value, number) for case, value in (("a", 0.2), ("b", 1.0)) for number in range(1, 11)]
    overall = summarise(rows)[-1]
    assert (overall["dice_low"], overall["dice_high"]) == pytest.approx((0.2, 1.0))
    assert math.isnan(summarise([row("a", 0.5)])[0]["dice_low"])
