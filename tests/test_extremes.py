"""Inference on files as folders hold them: extreme shapes and values, and what is no image."""

import csv

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from sam2sgp.engines import ResultWriter
from tests.helpers.bundle_runs import random_weights, run

FAST = {"k": 2, "slices_per_class": 1, "support_max_items": 4, "region_below": 0, "image_size": 64, "progress": False}
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return random_weights(tmp_path_factory.mktemp("model") / "model.pt")


def infer(model, support, queries, output) -> list[dict]:
    places = {"support_dir": str(support), "dataset_dir": str(queries), "output_dir": str(output)}
    run("inferring", "inference.json", model_file=str(model), report_figures=9, **places, **FAST)
    return table(output)


def table(output) -> list[dict]:
    with open(output / "summary.csv", newline="") as file:
        return list(csv.DictReader(file))


def volume(path, array):
    nib.save(nib.Nifti1Image(array.astype(np.int16), np.diag([1.0, 1.0, 3.0, 1.0])), path)


def test_progress_is_shown_inside_a_volume(phantoms, model, tmp_path, monkeypatch):
    shares = []
    monkeypatch.setattr(ResultWriter, "_show_share", lambda _, engine: shares.append(engine.share_done))
    (tmp_path / "queries").mkdir()
    volume(tmp_path / "queries" / "sound.nii.gz", RNG.integers(0, 900, (20, 24, 12)))
    infer(model, phantoms / "support" / "mr", tmp_path / "queries", tmp_path / "out")
    assert shares == sorted(shares) and shares[-1] == 1.0 and len(shares) > 12


def test_extreme_images_have_a_result_with_a_warning_and_other_files_a_row(phantoms, model, tmp_path):
    queries, output = tmp_path / "queries", tmp_path / "out"
    (queries / "nested").mkdir(parents=True)
    volume(queries / "voxel.nii.gz", np.full((1, 1, 1), 7))
    volume(queries / "line.nii.gz", RNG.integers(0, 900, (1, 1, 5)))
    volume(queries / "constant.nii.gz", np.full((20, 20, 3), 100))
    volume(queries / "nested" / "sound.nii.gz", RNG.integers(0, 900, (20, 24, 3)))
    for name, shape in {"pixel": (1, 1), "wide": (12, 240), "tall": (240, 12)}.items():
        Image.fromarray(RNG.integers(0, 255, shape).astype(np.uint8)).save(queries / f"{name}.png")
    (queries / "notes.txt").write_text("seen on Monday")
    (queries / "array.npz").write_bytes(b"PK")
    rows = infer(model, phantoms / "support" / "mr", queries, output)
    said = {row["case"]: row["warnings"] for row in rows if not row["skipped"]}
    assert said.pop("sound") == ""
    beginnings = {
        "voxel": "All its values are the same",
        "line": "only 1 x 1 pixels",
        "constant": "All its values are the same",
        "pixel": "only 1 x 1 pixels",
    }
    # They are seen window by window.
    assert said.pop("wide") == said.pop("tall") == ""
    assert said.keys() == beginnings.keys()
    assert all(text in said[name] for name, text in beginnings.items())
    for name in ("voxel", "line", "constant"):
        assert nib.load(output / f"{name}.nii.gz").shape == nib.load(queries / f"{name}.nii.gz").shape
    for name in ("pixel", "wide", "tall"):
        with Image.open(queries / f"{name}.png") as before, Image.open(output / f"{name}.png") as after:
            assert before.size == after.size
    skipped = {row["case"]: row["skipped"] for row in rows if row["skipped"]}
    assert skipped.keys() == {"notes.txt", "array.npz"} and skipped["notes.txt"] == "not an image (.txt)"
    assert {row["scaling"] for row in rows if row["case"] == "sound"} == {"percentiles (like the support set)"}
    report = (output / "report.html").read_text()
    assert "4 cases may be wrong" in report and "2 files not used" in report and "array.npz" in report


def discs(path, shape, centres) -> np.ndarray:
    """Write a picture of bright discs on noise. Returns where they are."""
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    masks = [(rows - row) ** 2 + (columns - column) ** 2 < 26**2 for row, column in centres]
    mask = np.any([np.zeros(shape, bool), *masks], 0)
    picture = RNG.normal(80, 15, shape) + 90 * mask
    Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(path)
    return mask


@pytest.mark.parametrize("support_is_wide", [False, True])
def test_pictures_much_longer_than_wide_are_segmented_window_by_window(support_is_wide, tmp_path):
    for name in ("support/images", "support/labels", "queries"):
        (tmp_path / name).mkdir(parents=True)
    for number in range(3):
        shape = (160, 1600) if support_is_wide else (160, 200)
        mask = discs(tmp_path / f"support/images/{number}.png", shape, [(60 + 20 * number, 100 - 10 * number)])
        Image.fromarray((255 * mask).astype(np.uint8)).save(tmp_path / f"support/labels/{number}.png")
    truth = discs(tmp_path / "queries/wide.png", (160, 2000), [(80, 90), (60, 700), (100, 1130), (90, 1950)])
    places = {name: str(tmp_path / name) for name in ("out", "support", "queries")}
    run(
        "inferring",
        "inference.json",
        support_dir=places["support"],
        dataset_dir=places["queries"],
        output_dir=places["out"],
        progress=False,
    )
    (row,) = table(tmp_path / "out")
    assert row["warnings"] == ""
    found = np.asarray(Image.open(tmp_path / "out/wide.png")) > 0
    # Seen as a whole, a long picture gives 0.6 among supports that are not long.
    assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) > (0.95 if support_is_wide else 0.8)


def test_a_table_keeps_its_columns_when_every_query_fails(phantoms, model, tmp_path):
    (tmp_path / "queries").mkdir()
    (tmp_path / "queries" / "broken.nii.gz").write_bytes(b"this is no image")
    with pytest.raises(SystemExit):
        infer(model, phantoms / "support" / "mr", tmp_path / "queries", tmp_path / "out")
    (row,) = table(tmp_path / "out")
    assert {"case", "class_name", "voxels", "mean_confidence", "scaling", "warnings", "error"} <= row.keys()
    assert "broken.nii.gz" in row["error"]
