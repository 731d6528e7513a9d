"""Inference through the bundle on files of every kind: same name, size and place out as in."""

import csv
import json
import shutil
import subprocess
import sys
import weakref

import highdicom
import itk
import nibabel as nib
import numpy as np
import pydicom
import pytest
import tifffile
import torch
from PIL import Image
from scipy.ndimage import binary_dilation, binary_erosion

from sam2sgp.engines import QueryDataset, QueryEvaluator, results
from sam2sgp.errors import DataError, cause_of
from sam2sgp.networks import SAM2SGP, save_weights
from sam2sgp.transforms import OutputNames
from tests.helpers.bundle_runs import BUNDLE, run
from tests.helpers.dicom_files import write_series

SETTINGS = {"image_size": 64, "progress": False}
FAST = {"k": 2, "slices_per_class": 1, "support_max_items": 6, "region_below": 0, "report_figures": 0}
RNG = np.random.default_rng(0)
OBLIQUE = np.array([[0.7, -0.2, 0.1, -30.0], [0.2, 0.8, 0.3, 12.0], [0.0, -0.2, 2.9, 55.0], [0, 0, 0, 1.0]])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "model.pt"
    save_weights(SAM2SGP("lite", 64), path)
    return path


def infer(model, support, queries, output, **overrides) -> list[dict]:
    arguments = {"model_file": str(model), "support_dir": str(support), "dataset_dir": str(queries)}
    run("inferring", "inference.json", output_dir=str(output), **SETTINGS, **arguments, **overrides)
    return table(output)


def table(output) -> list[dict]:
    with open(output / "summary.csv", newline="") as file:
        return list(csv.DictReader(file))


def picture(path, shape, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    array = RNG.integers(0, 2**16 if mode == "I;16" else 256, shape).astype(np.uint16 if mode == "I;16" else np.uint8)
    Image.fromarray(array).save(path)


def size(path) -> tuple[int, int]:
    with Image.open(path) as opened:
        return opened.size


def test_every_format_comes_back_with_its_own_name_size_and_place(phantoms, model, tmp_path):
    queries, output = tmp_path / "queries", tmp_path / "out"
    picture(queries / "colour.png", (50, 90, 3))
    picture(queries / "photo.jpg", (33, 41))
    picture(queries / "deep.png", (64, 20), "I;16")
    picture(queries / "alpha.png", (30, 30, 4))
    picture(queries / "scan.tif", (40, 60))
    array = RNG.normal(size=(21, 34, 5)).astype(np.float32)
    nib.save(nib.Nifti1Image(array, OBLIQUE), queries / "oblique.nii.gz")
    nib.save(nib.Nifti1Image(array[:, :, 0], OBLIQUE), queries / "flat.nii")
    image = itk.image_from_array(np.ascontiguousarray(array))
    image.SetSpacing([0.5, 0.6, 4.0])
    image.SetOrigin([1.0, -2.0, 3.0])
    itk.imwrite(image, str(queries / "volume.nrrd"))
    itk.imwrite(image, str(queries / "meta.mha"))
    nib.save(nib.Nifti1Image(np.ones((1, 1, 1), np.int16), np.diag([2.0, 2.0, 3.0, 1.0])), queries / "voxel.nii.gz")
    write_series(queries / "series", RNG.integers(-1000, 1000, (4, 24, 30)).astype(np.int16))
    rows = infer(model, phantoms / "support" / "rgb", queries, output)

    for name in ("colour", "photo", "deep", "alpha", "scan"):
        source = next(queries.glob(f"{name}.*"))
        with Image.open(source) as before, Image.open(output / f"{name}.png") as after:
            assert before.size == after.size, name
    for name in ("oblique.nii.gz", "flat.nii", "voxel.nii.gz"):
        before, after = nib.load(queries / name), nib.load(output / f"{name.split('.')[0]}.nii.gz")
        assert before.shape == after.shape
        np.testing.assert_allclose(before.affine, after.affine, atol=1e-5)
    for name in ("volume.nrrd", "meta.mha"):
        before, after = itk.imread(str(queries / name)), itk.imread(str(output / f"{name.split('.')[0]}.nii.gz"))
        assert itk.size(before) == itk.size(after)
        np.testing.assert_allclose(list(before.GetSpacing()), list(after.GetSpacing()), rtol=1e-5)
        np.testing.assert_allclose(list(before.GetOrigin()), list(after.GetOrigin()), rtol=1e-5)
        for matrix in (before, after):
            np.testing.assert_allclose(itk.array_from_matrix(matrix.GetDirection()), np.eye(3), atol=1e-5)
    assert nib.load(output / "series.nii.gz").shape[2] == 4
    assert {row["case"] for row in rows} == {path.name.split(".")[0] for path in queries.iterdir()}
    assert "not for diagnosis" in (output / "report.html").read_text().lower()


def test_a_broken_file_costs_its_row_and_the_exit_code_not_the_run(phantoms, model, tmp_path):
    queries, output = tmp_path / "queries", tmp_path / "out"
    picture(queries / "good.png", (40, 40, 3))
    picture(queries / "later.png", (40, 40, 3))
    (queries / "broken.nii.gz").write_bytes(b"this is no image")
    with pytest.raises(SystemExit) as ended:
        infer(model, phantoms / "support" / "rgb", queries, output)
    assert "1 of 3" in str(ended.value) and "broken" in str(ended.value)
    rows = table(output)
    (failed,) = [row for row in rows if row["error"]]
    assert failed["case"] == "broken" and "broken.nii.gz" in failed["error"] and "transform" not in failed["error"]
    assert {row["case"] for row in rows if not row["error"]} == {"good", "later"}
    assert (output / "good.png").is_file() and (output / "later.png").is_file()
    assert "broken.nii.gz" in (output / "report.html").read_text()


def test_a_case_is_let_go_before_the_next_is_read_and_at_the_end(model, phantoms, tmp_path, monkeypatch):
    """Two long volumes would be twice the memory."""
    held, read = [], QueryDataset.__getitem__
    segment = QueryEvaluator.segment

    def reading(dataset, index):
        held.append([reference() for reference in alive])
        return read(dataset, index)

    def segmenting(evaluator, case):
        found = segment(evaluator, case)
        assert found["pred"].dtype == torch.uint8
        alive.extend(map(weakref.ref, (case["image_full"], found["pred"])))
        return found

    alive: list[weakref.ref] = []
    monkeypatch.setattr(QueryDataset, "__getitem__", reading)
    monkeypatch.setattr(QueryEvaluator, "segment", segmenting)
    monkeypatch.setattr(results, "write_report", lambda *_: held.append([reference() for reference in alive]))
    queries = tmp_path / "queries"
    picture(queries / "first.png", (40, 40, 3))
    picture(queries / "second.png", (40, 40, 3))
    infer(model, phantoms / "support" / "rgb", queries, tmp_path / "out", **FAST)
    assert held == [[], [None] * 2, [None] * 4]


def test_summary_gives_sizes_confidence_and_support(phantoms, model, tmp_path):
    rows = infer(model, phantoms / "support" / "ct", phantoms / "queries" / "ct", tmp_path)
    assert {row["class_name"] for row in rows} == {"disc", "ellipse", "ring"}
    for row in rows:
        label = nib.load(row["output"])
        voxels = int((np.asarray(label.dataobj) == int(row["class"])).sum())
        assert int(row["voxels"]) == voxels and row["size_unit"] == "ml"
        assert float(row["size"]) == pytest.approx(voxels * np.prod(label.header.get_zooms()) / 1000, rel=1e-4)
        assert row["mean_confidence"] == "" if voxels == 0 else 0.0 < float(row["mean_confidence"]) <= 1
        assert row["support_items"] and float(row["seconds"]) > 0


def test_labels_are_written_in_the_coding_of_the_support_labels(model, tmp_path):
    support, queries = tmp_path / "support", tmp_path / "queries"
    for number in range(3):
        picture(support / "images" / f"{number}.png", (40, 40))
        (support / "masks").mkdir(exist_ok=True)
        mask = np.zeros((40, 40), dtype=np.uint8)
        mask[10:30, 5 * number : 5 * number + 20] = 255
        Image.fromarray(mask).save(support / "masks" / f"{number}.png")
    picture(queries / "q.png", (30, 50))
    infer(model, support, queries, tmp_path / "out")
    with Image.open(tmp_path / "out" / "q.png") as opened:
        pixels = np.asarray(opened)
    assert set(np.unique(pixels)) <= {0, 255}


def test_two_queries_of_one_stem_do_not_overwrite_each_other(phantoms, model, tmp_path):
    queries = tmp_path / "queries"
    picture(queries / "a.png", (30, 50))
    picture(queries / "a.jpg", (20, 20))
    rows = infer(model, phantoms / "support" / "rgb", queries, tmp_path / "out")
    outputs = {row["source"].rsplit("/", 1)[1]: row["output"] for row in rows}
    assert len(set(outputs.values())) == 2
    sizes = {name: size(path) for name, path in outputs.items()}
    assert sizes == {"a.png": (50, 30), "a.jpg": (20, 20)}


@pytest.mark.parametrize("retrieval, k, expected", [("similarity", 2, 2), ("random", 3, 3)])
def test_retrieval_settings_reach_the_run(phantoms, model, tmp_path, retrieval, k, expected):
    rows = infer(model, phantoms / "support" / "rgb", phantoms / "queries" / "rgb", tmp_path, retrieval=retrieval, k=k)
    assert max(len(row["support_items"].split("; ")) for row in rows) == expected


def test_missing_weights_are_one_line_of_error_and_a_bad_exit_code(phantoms, tmp_path):
    command = [sys.executable, "-m", "monai.bundle", "run", "inferring", "--config_file", "configs/inference.json"]
    arguments = {
        "model_file": tmp_path / "none.pt",
        "support_dir": phantoms / "support" / "rgb",
        "dataset_dir": phantoms / "queries" / "rgb",
        "output_dir": tmp_path,
    }
    words = [str(word) for key, value in arguments.items() for word in (f"--{key}", value)]
    done = subprocess.run([*command, *words], cwd=BUNDLE, capture_output=True, text=True)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "none.pt" in errors[0]
    assert "Traceback" not in done.stderr


def test_a_result_that_can_not_be_written_ends_the_run_with_the_rows_so_far(phantoms, model, tmp_path, monkeypatch):
    from sam2sgp.transforms import SaveLabeld

    save = SaveLabeld.__call__

    def full_disk(self, data):
        if any(tmp_path.glob("*.png")):
            raise DataError("disk full")
        return save(self, data)

    monkeypatch.setattr(SaveLabeld, "__call__", full_disk)
    with pytest.raises(Exception) as caught:
        infer(model, phantoms / "support" / "rgb", phantoms / "queries" / "rgb", tmp_path)
    assert isinstance(cause_of(caught.value), DataError)
    assert len({row["case"] for row in table(tmp_path)}) == 1


def test_the_report_shows_a_ct_through_the_window_of_the_run(phantoms, model, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(results, "write_report", lambda _, report: shown.append(report.figures[0].panels[0][1]))
    queries = tmp_path / "queries"
    queries.mkdir()
    # Air, water and, from left to right, what lies between -900 and -500 HU.
    volume = np.full((64, 64, 3), -1000, np.int16)
    volume[8:56, 8:56] = np.linspace(-900, -500, 48)[:, None, None]
    nib.save(nib.Nifti1Image(volume, np.eye(4)), queries / "lung.nii.gz")
    for window in ([-160.0, 240.0], [-1000.0, 0.0]):
        infer(
            model,
            phantoms / "support" / "ct",
            queries,
            tmp_path / str(window[0]),
            ct_window=window,
            **FAST | {"report_figures": 1},
        )
    soft, lung = shown
    assert soft.max() == 0
    assert np.unique(lung).size > 40 and abs(int(lung.max()) - 255 * 0.5) <= 3


def test_adaptation_is_a_setting_of_the_run_and_told_in_report_log_and_cache(
    phantoms, model, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("sam2sgp.adaptation.plan.WHOLE_SIZE", 64)
    support, queries = phantoms / "support" / "rgb", phantoms / "queries" / "rgb"
    rows = infer(model, support, queries, tmp_path / "out", adapt_steps=1, support_max_items=6)
    assert rows and not any(row.get("error") for row in rows)
    assert {row["unlike_support"] for row in rows} | {row["maybe_absent"] for row in rows} <= {"True", "False"}
    (record,) = (tmp_path / "out" / "adaptation").glob("*/adaptation.json")
    record = json.loads(record.read_text())
    assert record["steps"] == [1, 1, 1] and len(set(record["groups"]["owner"])) >= 3
    assert record["choices"] and all(choice["adapted"] >= choice["plain"] for choice in record["choices"].values())
    sentence = f"Dice {next(iter(record['choices'].values()))['plain']:.3f} before"
    assert sentence in capsys.readouterr().out and sentence in (tmp_path / "out" / "report.html").read_text()


def test_second_pass_is_a_setting_of_the_run(phantoms, model, tmp_path):
    support, queries = phantoms / "support" / "rgb", phantoms / "queries" / "rgb"
    seen = {}
    for below in (0, 1.0):
        rows = infer(model, support, queries, tmp_path / str(below), region_below=below)
        seen[below] = [row["voxels"] for row in rows]
    assert len(seen[0]) == len(seen[1.0]) and seen[0] != seen[1.0]


def test_probabilities_and_uncertainty_agree_with_the_label_on_its_grid(phantoms, model, tmp_path):
    queries, output = tmp_path / "queries", tmp_path / "out"
    picture(queries / "colour.png", (50, 90, 3))
    nib.save(nib.Nifti1Image(RNG.normal(size=(21, 34, 5)).astype(np.float32), OBLIQUE), queries / "oblique.nii.gz")
    # Named as another query's map would be.
    nib.save(
        nib.Nifti1Image(RNG.normal(size=(9, 8, 1)).astype(np.float32), OBLIQUE), queries / "oblique_probability.nii"
    )
    support = phantoms / "support" / "rgb"
    rows = infer(model, support, queries, output, save_probability=True, save_uncertainty=True, **FAST)
    outputs = {row["case"]: row["output"] for row in rows}
    label, probability, entropy = (
        nib.load(path)
        for path in (outputs["oblique"], output / "oblique_probability.nii.gz", output / "oblique_uncertainty.nii.gz")
    )
    assert probability.shape == (21, 34, 5, 4) and entropy.shape == (21, 34, 5)
    for image in (probability, entropy):
        assert image.get_data_dtype() == np.float32
        np.testing.assert_allclose(image.affine, OBLIQUE, atol=1e-5)
    pages = np.moveaxis(tifffile.imread(output / "colour_probability.tif"), 0, -1)
    shades = tifffile.imread(output / "colour_uncertainty.tif")
    with Image.open(outputs["colour"]) as opened:
        classes = np.asarray(opened)
    assert pages.shape == (50, 90, 4) and pages.dtype == shades.dtype == np.float32
    for p, h, values in ((probability.get_fdata(), entropy.get_fdata(), label.get_fdata()), (pages, shades, classes)):
        np.testing.assert_allclose(p.sum(-1), 1, atol=2e-3)
        assert np.array_equal(p.argmax(-1), values)
        expected = -(p * np.log(np.maximum(p, 1e-12))).sum(-1) / np.log(4)
        np.testing.assert_allclose(h, expected, atol=5e-3)
        assert h.min() >= 0 and h.max() <= 1 and h.std() > 0
    assert nib.load(outputs["oblique_probability"]).shape == (9, 8, 1)
    assert len({str(path) for path in outputs.values()} | {str(output / "oblique_probability.nii.gz")}) == 4


def test_uncertainty_is_higher_at_the_border_of_an_object(phantoms, tmp_path):
    queries = tmp_path / "queries"
    queries.mkdir()
    source = sorted((phantoms / "queries" / "rgb").rglob("*.png"))[0]
    shutil.copy(source, queries / "q.png")
    embedded = BUNDLE / "models" / "model.pt"
    infer(embedded, phantoms / "support" / "rgb", queries, tmp_path / "out", save_uncertainty=True, **FAST)
    with Image.open(tmp_path / "out" / "q.png") as opened:
        found = np.asarray(opened) > 0
    shades = tifffile.imread(tmp_path / "out" / "q_uncertainty.tif")
    border = binary_dilation(found, iterations=2) & ~binary_erosion(found, iterations=2)
    assert found.any() and shades[border].mean() > 3 * shades[~border].mean()


def test_dicom_queries_get_segmentations_and_without_the_settings_nothing_more_is_written(phantoms, tmp_path):
    queries, model = tmp_path / "queries", BUNDLE / "models" / "model.pt"
    tags = {"StudyInstanceUID": "1.2.3", "FrameOfReferenceUID": "1.2.4"}
    write_series(queries / "scan", np.random.default_rng(0).integers(-1000, 1000, (3, 24, 30)).astype(np.int16), **tags)
    picture(queries / "colour.png", (30, 40, 3))
    support = phantoms / "support" / "rgb"
    plain = {"scan.nii.gz", "colour.png", "summary.csv", "report.html", "records"}
    plain |= {"labels.json", "labels.txt", "labels.ctbl"}
    infer(model, support, queries, tmp_path / "off", **FAST)
    assert {path.name for path in (tmp_path / "off").iterdir()} == plain
    # Into a folder of the queries' own: a second run must not take the results for queries.
    for _ in range(2):
        rows = infer(model, support, queries, queries / "on", dicom_seg=True, **FAST)
        assert {row["case"] for row in rows if not row.get("skipped")} == {"scan", "colour"}
    assert [(row["case"], row["skipped"]) for row in rows if row.get("skipped")] == [
        ("on", "results of an earlier run")
    ]
    assert {path.name for path in (queries / "on").iterdir()} == plain | {"scan.dcm"}
    seg = highdicom.seg.segread(queries / "on" / "scan.dcm")
    label = np.asarray(nib.load(queries / "on" / "scan.nii.gz").dataobj)
    uids = [pydicom.dcmread(file).SOPInstanceUID for file in (queries / "scan").iterdir()]
    names = {1: "disc", 2: "ellipse", 3: "ring"}
    for number in seg.segment_numbers:
        (value,) = (key for key, name in names.items() if name == seg.get_segment_description(number).segment_label)
        found = seg.get_pixels_by_source_instance(uids, [number], assert_missing_frames_are_empty=True)
        assert found.sum() == (label == value).sum() > 0
    assert seg.number_of_segments == len(np.unique(label[label > 0]))


def test_names_of_results_are_never_shared(tmp_path):
    sources = ["a/x.nii.gz", "a/x_probability.nii.gz", "b/x.nii.gz", "c/x.nii.gz", "c/x.nrrd"]
    endings = (".nii.gz", "_probability.nii.gz", "_uncertainty.nii.gz")
    names = OutputNames(tmp_path)
    claimed = {(source, ending): names.claim(source, ending) for source in sources for ending in endings}
    assert len(set(claimed.values())) == len(claimed) == 15
    assert claimed["a/x.nii.gz", ".nii.gz"] == tmp_path / "x.nii.gz" == names.claim("a/x.nii.gz", ".nii.gz")
    # Whoever comes first, as the processes of a run do in any order.
    told = OutputNames(tmp_path, sources, ["probability", "uncertainty"])
    assert {pair: told.claim(*pair) for pair in reversed(claimed)} == claimed
