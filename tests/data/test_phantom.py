import hashlib
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from sam2sgp.data.phantom import main, make_phantoms
from sam2sgp.data.phantom_scenes import LOOKS, VOLUME_LOOKS
from sam2sgp.errors import ConfigError, DataError

SMALL = {"patients_per_modality": 4, "size": (64, 64), "num_slices": 6, "progress": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_phantoms(tmp_path_factory.mktemp("phantom") / "set", **SMALL)


def hashes(folder):
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def data_set(folder):
    return json.loads((folder / "dataset.json").read_text())


def test_same_seed_gives_the_same_bytes_and_another_seed_other_images(folder, tmp_path):
    assert hashes(make_phantoms(tmp_path / "again", **SMALL)) == hashes(folder)
    first, other = hashes(folder), hashes(make_phantoms(tmp_path / "other", **SMALL, seed=1))
    assert not any(first[name] == other[name] for name in first if name.startswith("images"))


def test_a_patient_is_the_same_whatever_the_number_of_patients_and_modalities(folder, tmp_path):
    larger = make_phantoms(tmp_path / "larger", **(SMALL | {"patients_per_modality": 5, "modalities": ("us", "ct")}))
    by_name = {Path(name).name: value for name, value in hashes(folder).items() if name.startswith("images")}
    larger_by_name = {Path(name).name: value for name, value in hashes(larger).items() if name.startswith("images")}
    shared = by_name.keys() & larger_by_name.keys()
    assert len(shared) == 4 + 4 * 4
    assert all(by_name[name] == larger_by_name[name] for name in shared)


def test_every_patient_is_in_one_split_and_every_listed_file_is_there(folder):
    content = data_set(folder)
    assert content["labels"] == {"0": "background", "1": "disc", "2": "ellipse", "3": "ring"}
    assert (content["numTraining"], content["numTest"]) == (len(content["training"]), len(content["test"]))
    patients = {part: {entry["patient"] for entry in content[part]} for part in ("training", "validation", "test")}
    assert [len(patients[part]) for part in patients] == [2 * 4, 4, 4]
    assert len(set.union(*patients.values())) == 4 * 4
    for part in patients:
        for entry in content[part]:
            assert entry["modality"] == LOOKS[entry["group"]]
            assert (folder / entry["image"]).is_file() and (folder / entry["label"]).is_file()
            assert entry["image"].startswith("imagesTs/" if part == "test" else "imagesTr/")


def test_support_holds_training_patients_that_show_every_class_and_queries_hold_the_test_images(tmp_path):
    folder = make_phantoms(tmp_path, **(SMALL | {"patients_per_modality": 8, "modalities": ("us",)}))
    content = data_set(folder)
    support = sorted(path.name for path in (folder / "support/us/images").iterdir())
    assert support == sorted(path.name for path in (folder / "support/us/labels").iterdir())
    patient = {Path(entry["image"]).name: entry["patient"] for entry in content["training"]}
    assert len({patient[name] for name in support}) == len(support) == 4
    shown = [set(np.unique(np.array(Image.open(path)))) for path in (folder / "support/us/labels").iterdir()]
    assert shown == [{0, 1, 2, 3}] * 4
    assert json.loads((folder / "support/us/labels.json").read_text()) == {"1": "disc", "2": "ellipse", "3": "ring"}
    assert {path.name for path in (folder / "queries/us").iterdir()} == {
        Path(entry["image"]).name for entry in content["test"]
    }


def test_volume_files_keep_a_real_geometry_and_one_is_oblique(folder):
    orientations, oblique = set(), []
    content = data_set(folder)
    entries = [entry for part in ("training", "validation", "test") for entry in content[part]]
    for entry in (entry for entry in entries if entry["group"] in VOLUME_LOOKS):
        image, label = nib.load(folder / entry["image"]), nib.load(folder / entry["label"])
        assert image.shape == label.shape == (64, 64, 6)
        np.testing.assert_allclose(image.header.get_zooms(), (0.8, 0.8, 3.0), rtol=1e-5)
        np.testing.assert_array_equal(image.affine, label.affine)
        assert np.linalg.norm(image.affine[:3, 3]) > 1
        orientations.add("".join(nib.aff2axcodes(image.affine)))
        if np.abs(nib.affines.obliquity(image.affine)).max() > 0.02:
            oblique.append(entry["patient"])
    assert orientations == {"RAS", "LPS"}
    assert oblique == ["ct_003", "mr_003"]


def test_a_folder_with_the_same_phantoms_is_left_alone_and_others_are_refused(tmp_path, capsys):
    folder = tmp_path / "set"
    arguments = ["--output_dir", str(folder), "--patients", "4", "--size", "64"]
    main(arguments)
    assert "written" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    main(arguments)
    assert "already" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(DataError, match="other parameters"):
        main([*arguments, "--seed", "1"])
    main([*arguments, "--seed", "1", "--force"])
    assert data_set(folder)["phantom"]["seed"] == 1


def test_force_never_replaces_a_folder_that_holds_something_else(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(DataError, match="isn't empty"):
            make_phantoms(tmp_path, **SMALL, force=force)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_run_that_fails_leaves_nothing_and_what_a_killed_run_left_is_removed(tmp_path, monkeypatch):
    folder = tmp_path / "set"
    (folder / ".phantom-killed").mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr("sam2sgp.data.phantom._write_trial", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(DataError, match="disk full"):
            make_phantoms(folder, **SMALL, modalities=("rgb",))
    assert not list(folder.iterdir())
    make_phantoms(folder, **SMALL, modalities=("rgb",))
    assert (folder / "dataset.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patients_per_modality": 3}, "at least 4 patients"),
        ({"size": (32, 128)}, "at least 64 px"),
        ({"num_slices": 5}, "at least 6 slices"),
        ({"seed": -1}, "negative"),
        ({"modalities": ("ct", "pet")}, "choice of ct, mr, us, rgb"),
    ],
)
def test_arguments_out_of_range_are_refused_before_anything_is_written(tmp_path, arguments, message):
    with pytest.raises(ConfigError, match=message):
        make_phantoms(tmp_path / "set", **arguments)
    assert not (tmp_path / "set").exists()
