"""`sam2sgp.Segmenter` gives what the bundle's run gives, on files and on objects in memory, with their own geometry."""

import itk
import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch
from PIL import Image

import sam2sgp
from sam2sgp.errors import ConfigError, DataError
from tests.helpers.bundle_runs import random_weights, run

SMALL = {"image_size": 64, "support_max_items": 6}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return random_weights(tmp_path_factory.mktemp("weights") / "random.pt")


@pytest.fixture(scope="module")
def folders(phantoms, weights, tmp_path_factory):
    """{look: results of `inferring`}."""
    outputs = {}
    for look in ("rgb", "mr"):
        outputs[look] = tmp_path_factory.mktemp(look)
        places = {"support_dir": phantoms / "support" / look, "dataset_dir": phantoms / "queries" / look}
        texts = {name: str(path) for name, path in {**places, "output_dir": outputs[look]}.items()}
        run("inferring", "inference.json", **texts, model_file=str(weights), progress=False, report_figures=0, **SMALL)
    return outputs


@pytest.fixture(scope="module")
def of_volumes(phantoms, weights):
    return sam2sgp.Segmenter.from_folder(phantoms / "support" / "mr", weights=weights, **SMALL)


@pytest.fixture(scope="module")
def volume(phantoms, folders):
    """Path of a query, and its class map by `inferring` as nibabel reads it."""
    path = sorted((phantoms / "queries" / "mr").rglob("*.nii.gz"))[0]
    return path, np.asarray(nib.load(folders["mr"] / path.name).dataobj)


def test_a_folder_gives_the_label_maps_of_the_bundles_run(phantoms, folders, weights, tmp_path):
    segmenter = sam2sgp.Segmenter.from_folder(phantoms / "support" / "rgb", weights=weights, **SMALL)
    queries = sorted((phantoms / "queries" / "rgb").rglob("*.png"))
    for query in queries[:3]:
        expected = np.asarray(Image.open(folders["rgb"] / query.name))
        assert np.array_equal(segmenter(query), expected)
        assert np.array_equal(segmenter(np.asarray(Image.open(query))), expected)
    written = segmenter(queries[0], output=tmp_path / "a.png")
    assert np.array_equal(np.asarray(Image.open(written)), np.asarray(Image.open(folders["rgb"] / queries[0].name)))
    before = segmenter.last
    with pytest.raises(DataError, match=r"a\.nii\.gz.*\.png"):
        segmenter(queries[0], output=tmp_path / "a.nii.gz")
    assert segmenter.last is before, "it is told before the image is segmented"


def test_images_of_other_libraries_keep_their_place(of_volumes, volume):
    path, expected = volume
    assert expected.any() and np.array_equal(of_volumes(path), expected)
    nibabel_image = nib.load(path)
    found = of_volumes(nibabel_image)
    assert np.array_equal(np.asarray(found.dataobj), expected) and np.array_equal(found.affine, nibabel_image.affine)
    simple = SimpleITK.ReadImage(str(path))
    found = of_volumes(simple)
    assert np.array_equal(SimpleITK.GetArrayFromImage(found), expected.T)
    assert found.GetDirection() == simple.GetDirection() and found.GetOrigin() == simple.GetOrigin()
    image = itk.imread(str(path))
    found = of_volumes(image)
    assert np.array_equal(itk.array_from_image(found), expected.T)
    assert np.array_equal(np.asarray(found.GetDirection()), np.asarray(image.GetDirection()))


def test_arrays_and_tensors_are_slices_rows_and_columns(of_volumes, volume, phantoms):
    path, expected = volume
    image = sam2sgp.data.io.read_image(path)
    # As a radiologist looks at it.
    slices = image.slices[:, 0]
    shown = image.geometry.display(expected.reshape(image.geometry.full_shape))
    found = of_volumes(slices, spacing=image.geometry.spacing)
    assert found.shape == slices.shape and np.array_equal(found, shown)
    found = of_volumes(torch.from_numpy(slices), spacing=image.geometry.spacing)
    assert isinstance(found, torch.Tensor) and np.array_equal(found.numpy(), shown)


def test_it_says_what_it_used_and_how_sure_it_is(of_volumes, volume):
    path, expected = volume
    of_volumes(nib.load(path), maps=True)
    last = of_volumes.last
    assert set(last.confidence) == {"disc", "ellipse", "ring"} and last.seconds > 0 and not last.warnings
    known = {item.id for item in of_volumes._segmenter.inferer.bank.items}
    assert all(used and set(used) <= known for used in last.support_used.values())
    maps = np.stack([np.asarray(image.dataobj) for image in last.probabilities.values()])
    assert list(last.probabilities) == ["background", "disc", "ellipse", "ring"]
    assert np.array_equal(maps.argmax(0), expected) and np.allclose(maps.sum(0), 1, atol=0.01)
    assert np.asarray(last.uncertainty.dataobj).shape == expected.shape


def test_pairs_may_be_added_one_by_one_saved_and_loaded(weights, tmp_path):
    rng = np.random.default_rng(0)

    def pair(row: int) -> tuple[np.ndarray, np.ndarray]:
        mask = np.zeros((40, 44), bool)
        mask[row : row + 12, 10:26] = True
        return (rng.normal(80, 10, mask.shape) + 90 * mask).clip(0, 255).astype(np.uint8), mask

    segmenter = sam2sgp.Segmenter(weights=weights, names={1: "bar"}, **SMALL)
    with pytest.raises(DataError, match="found none: call `add`"):
        segmenter(pair(3)[0])
    for row in (4, 10, 16):
        segmenter.add(*pair(row))
    query = pair(12)[0]
    first = segmenter(query)
    assert segmenter.last.support_used.keys() == {"bar"} and len(segmenter.last.support_used["bar"]) == 3
    segmenter.add(*pair(22), name="fourth", patient="p4")
    second = segmenter(query)
    assert "fourth" in segmenter.last.support_used["bar"]
    segmenter.save(tmp_path / "kept")
    loaded = sam2sgp.Segmenter.load(tmp_path / "kept")
    assert np.array_equal(loaded(query), second) and first.shape == second.shape
    with pytest.raises(DataError, match="expected a new folder"):
        segmenter.save(tmp_path / "kept")
    with pytest.raises(DataError, match="expected what `Segmenter.save` writes"):
        sam2sgp.Segmenter.load(tmp_path)


def test_binary_pictures_are_written_as_the_labelled_ones_are(weights, tmp_path):
    image, mask = np.full((40, 44), 80, np.uint8), np.zeros((40, 44), np.uint8)
    mask[10:22, 10:26] = 255
    image[mask > 0] = 170
    for name, values in (("image", image), ("label", mask)):
        Image.fromarray(values).save(tmp_path / f"{name}.png")
    segmenter = sam2sgp.Segmenter(weights=weights, **SMALL)
    segmenter.add(tmp_path / "image.png", tmp_path / "label.png")
    found = segmenter(image)
    assert found.any()
    assert np.array_equal(np.asarray(Image.open(segmenter(image, output=tmp_path / "binary.png"))), found * 255)
    segmenter.add(image, np.where(mask > 0, 2, 0))
    found = segmenter(image)
    assert np.array_equal(np.asarray(Image.open(segmenter(image, output=tmp_path / "two.png"))), found)


def test_voxels_beside_their_header_are_saved_with_it(weights, tmp_path):
    array = np.zeros((5, 40, 44), np.int16)
    array[:, 10:22, 10:26] = 900
    for name, values in (("image", array), ("label", (array > 0).astype(np.uint8))):
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(values), str(tmp_path / f"{name}.mhd"))
    segmenter = sam2sgp.Segmenter(weights=weights, **SMALL)
    segmenter.add(tmp_path / "image.mhd", tmp_path / "label.mhd")
    expected = segmenter(array)
    segmenter.save(tmp_path / "kept")
    for path in tmp_path.glob("*.*"):
        path.unlink()
    assert np.array_equal(sam2sgp.Segmenter.load(tmp_path / "kept")(array), expected)


def test_adaptation_is_told_in_a_sentence_and_dropped_with_a_new_pair(phantoms, weights, caplog):
    segmenter = sam2sgp.Segmenter.from_folder(phantoms / "support" / "rgb", weights=weights, adapt_steps=2, **SMALL)
    said = segmenter.adapt(seconds=20)
    assert said.startswith("Adapted") or "Not adapted" in said
    pair = next(iter(segmenter._cases))
    segmenter.add(pair["image"], pair["label"], name="again")
    assert "call `adapt` again" in caplog.text


@pytest.mark.parametrize(
    ("image", "spacing", "message"),
    [
        (np.zeros((4, 5, 6, 7)), None, "found float64"),
        (np.zeros((4, 5), complex), None, "found complex128"),
        (np.zeros((32, 40, 1)), None, "leave out the last axis"),
        (np.zeros((32, 40, 3)), None, "expected colours as bytes"),
        (np.zeros((32, 40, 4), np.uint8), None, "expected colours as bytes"),
        (torch.zeros((3, 32, 40)), None, "move the channels of a colour image to the end"),
        (np.zeros((4, 5, 6)), (1.0, 1.0), "expected 3 sizes above 0"),
        (np.zeros((4, 5, 6)), (1.0, 1.0, -1.0), "expected 3 sizes above 0"),
        ([[1, 2]], None, "expected a path, a NumPy array"),
        ("nowhere.png", None, "nowhere.png"),
    ],
)
def test_what_is_no_image_is_refused_in_a_sentence(of_volumes, image, spacing, message):
    with pytest.raises(DataError, match=message):
        of_volumes(image, spacing=spacing)


def test_a_label_that_does_not_fit_is_refused_when_it_is_added(weights):
    segmenter = sam2sgp.Segmenter(weights=weights, **SMALL)
    with pytest.raises(DataError, match="40 x 44|44|shape"):
        segmenter.add(np.zeros((40, 44), np.uint8), np.zeros((40, 45), np.uint8))


def test_a_misspelt_setting_is_told_at_once():
    with pytest.raises(ConfigError, match="object_gate"):
        sam2sgp.Segmenter(objct_gate=False)
    with pytest.raises(ConfigError, match="expected one of .*lite.*found 'lit'"):
        sam2sgp.Segmenter(backbone="lit")
