import hashlib
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import binary_fill_holes
from scipy.ndimage import label as components

from sam2sgp.data.phantom import (
    CLASS_NAMES,
    LOOKS,
    PICTURE_LOOKS,
    VOLUME_LOOKS,
    main,
    make_phantoms,
    phantom_picture,
    phantom_volume,
)
from sam2sgp.errors import ConfigError, DataError

SMALL = {"patients_per_modality": 4, "size": (64, 64), "num_slices": 6, "progress": False}
COUNT = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_phantoms(tmp_path_factory.mktemp("phantom") / "set", **SMALL)


@pytest.fixture(scope="module")
def slices():
    """look -> list of (image (H, W, channels), label (H, W)): pictures, and the slice of a volume that shows most."""
    made = {}
    for look in LOOKS:
        rng = np.random.default_rng(5)
        made[look] = []
        for _ in range(COUNT):
            if look in VOLUME_LOOKS:
                image, label, _ = phantom_volume(look, rng)
                z = np.count_nonzero(label, axis=(0, 1)).argmax()
                image, label = image[:, :, z], label[:, :, z]
            else:
                image, label = phantom_picture(look, rng)
            made[look].append((image.reshape(*label.shape, -1).astype(float), label))
    return made


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


def test_ct_is_in_hu(slices):
    image, label, _ = phantom_volume("ct", np.random.default_rng(0))
    assert image.dtype == np.int16 and label.dtype == np.uint8 and image.shape == (128, 128, 12)
    assert -1024 <= image.min() and image.max() <= 1500
    assert abs(np.median(image[:6, :6]) + 1000) < 10
    for image, label in slices["ct"]:
        for number in np.unique(label[label > 0]):
            assert -150 < np.median(image[label == number]) < 250


def test_mr_scale_differs_between_patients_and_air_is_rician():
    rng = np.random.default_rng(0)
    volumes = [phantom_volume("mr", rng)[0] for _ in range(6)]
    assert all(volume.dtype == np.float32 for volume in volumes)
    tops = [np.percentile(volume, 99) for volume in volumes]
    assert max(tops) > 3 * min(tops)
    for volume in volumes:
        air = volume[:8, :8] - volume.min()
        assert np.std(air) > 0
        # Of zero signal, Rician noise is Rayleigh noise: mean / std = 1.91.
        assert 1.6 < air.mean() / air.std() < 2.2


def test_pictures_have_the_stated_shapes():
    image, label = phantom_picture("us", np.random.default_rng(0))
    assert image.shape == label.shape == (128, 160) and image.dtype == label.dtype == np.uint8
    assert not image[-1, 0] and not image[0, 0]
    image, label = phantom_picture("rgb", np.random.default_rng(0), (96, 128))
    assert image.shape == (96, 128, 3) and label.shape == (96, 128) and image.dtype == np.uint8


def test_volumes_have_no_target_in_the_end_slices_and_several_in_the_middle():
    rng = np.random.default_rng(0)
    for look in VOLUME_LOOKS:
        for _ in range(5):
            label = phantom_volume(look, rng)[1]
            assert not label[:, :, 0].any() and not label[:, :, -1].any()
            extents = [np.count_nonzero((label == number).any((0, 1))) for number in np.unique(label[label > 0])]
            assert len(extents) >= 2 and all(4 <= extent <= 10 for extent in extents)


@pytest.mark.parametrize("look", LOOKS)
def test_targets_are_of_the_stated_size_whole_and_apart(slices, look):
    for _, label in slices[look]:
        filled = np.zeros(label.shape, int)
        for number in np.unique(label[label > 0]):
            mask = label == number
            # Of a volume, the slice that shows most isn't each target's largest one.
            assert (0.01 if look in VOLUME_LOOKS else 0.03) < mask.mean() < 0.08
            assert components(mask)[1] == 1
            filled += binary_fill_holes(mask)
            hole = binary_fill_holes(mask).sum() - mask.sum()
            assert (hole > 0) == (CLASS_NAMES[number] == "ring")
        assert filled.max() == 1
        assert components(filled)[1] == len(np.unique(label[label > 0]))


@pytest.mark.parametrize("look", LOOKS)
def test_every_class_is_in_most_images_and_lacking_in_some(slices, look):
    present = np.array([[(label == number).any() for number in CLASS_NAMES] for _, label in slices[look]])
    assert (present.mean(0) > 0.75).all()
    assert (present.sum(1) >= 2).all()
    assert 0.1 < (present.sum(1) == 2).mean() < 0.5
    assert (~present).any(0).sum() >= 2


@pytest.mark.parametrize("look", LOOKS)
def test_place_does_not_give_a_class_away(slices, look):
    for number in CLASS_NAMES:
        masks = np.array([label == number for _, label in slices[look] if (label == number).any()])
        mean = masks.mean(0)
        best = 0.0
        for threshold in np.unique(mean)[:-1]:
            guess = mean > threshold
            best = max(best, np.mean([2 * (guess & mask).sum() / (guess.sum() + mask.sum()) for mask in masks]))
        assert 0.1 < best < 0.35


@pytest.mark.parametrize("look", LOOKS)
def test_appearance_tells_the_classes_apart_in_other_patients(slices, look):
    def features(image, mask):
        """Colour and texture of a target against its surroundings, and how dark its inside is."""
        body = image[(image > np.percentile(image, 40)).all(-1)]
        scale = body.std(0) + 1e-6
        inside = image[binary_fill_holes(mask)].mean(0)
        return np.hstack([(image[mask].mean(0) - body.mean(0)), inside - image[mask].mean(0), image[mask].std(0)]) / (
            np.tile(scale, 3)
        )

    cases = [
        (number, features(image, label == number))
        for image, label in slices[look]
        for number in np.unique(label[label > 0])
    ]
    numbers = np.array([number for number, _ in cases])
    values = np.array([value for _, value in cases])
    train = np.arange(len(cases)) < len(cases) // 2
    values = (values - values[train].mean(0)) / values[train].std(0)
    centres = np.array([values[train & (numbers == number)].mean(0) for number in CLASS_NAMES])
    nearest = np.linalg.norm(values[~train, None] - centres, axis=-1).argmin(1) + 1
    assert (nearest == numbers[~train]).mean() > 0.95


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


def test_volumes_and_pictures_have_looks_of_their_own():
    rng = np.random.default_rng(0)
    for look in VOLUME_LOOKS:
        with pytest.raises(ConfigError, match="us, rgb"):
            phantom_picture(look, rng)
    for look in PICTURE_LOOKS:
        with pytest.raises(ConfigError, match="ct, mr"):
            phantom_volume(look, rng)
