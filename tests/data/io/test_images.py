"""What holds for images of every format."""

import gzip
import tracemalloc

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from PIL import Image

from sam2sgp.data.io import Geometry, images, read_geometry, read_image, read_label
from sam2sgp.errors import DataError
from tests.helpers.dicom_files import write_dicom
from tests.helpers.nifti_files import OBLIQUE, save_nifti

RNG = np.random.default_rng(0)


def test_nan_and_infinite_voxels_become_the_minimum_with_a_warning(tmp_path):
    array = RNG.normal(size=(4, 5, 6)).astype(np.float32)
    array[0, 0, 0], array[1, 1, 1], array[2, 2, 2] = np.nan, np.inf, -np.inf
    path = save_nifti(tmp_path / "holes.nii.gz", array)
    image = read_image(path)
    assert image.warnings == ["3 of its 120 values are NaN or infinite; they are read as the smallest finite value."]
    native = image.geometry.to_native(image.slices[:, 0])
    assert native[0, 0, 0] == native[1, 1, 1] == native[2, 2, 2] == array[np.isfinite(array)].min()
    with pytest.raises(DataError, match="no finite value"):
        read_image(save_nifti(tmp_path / "b.nii.gz", np.full((3, 3, 3), np.nan, np.float32)))


def test_where_voxels_lie_is_told_without_turning_any(tmp_path, monkeypatch):
    path = tmp_path / "a.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros((4, 5, 6), np.int16), np.diag([-2.0, 1.0, 3.0, 1.0])), path)
    read = read_image(path).geometry
    monkeypatch.setattr(Geometry, "display", None)
    told = read_geometry(path)
    assert (told.shape, told.axes, told.flips, told.spacing) == (read.shape, read.axes, read.flips, read.spacing)
    assert np.array_equal(told.affine, read.affine)


def test_constant_image_and_empty_label_are_read(tmp_path):
    image = read_image(save_nifti(tmp_path / "a.nii.gz", np.full((4, 5, 6), 7.0)))
    assert (image.slices == 7).all()
    label = read_label(save_nifti(tmp_path / "b.nii.gz", np.zeros((4, 5, 6), np.uint8)), image.geometry)
    assert label.dtype == np.uint8 and not label.any()


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha", ".png", ".jpg", ".tif", ".bmp", ".dcm"])
@pytest.mark.parametrize("keep", [0, 0.05, 0.6])
def test_truncated_file_is_an_error_that_names_it(tmp_path, suffix, keep):
    path = tmp_path / f"case{suffix}"
    array = RNG.integers(0, 255, (40, 40)).astype(np.uint8)
    if suffix.startswith(".nii"):
        save_nifti(path, np.stack([array] * 5))
    elif suffix in (".nrrd", ".mha"):
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(np.stack([array] * 5)), str(path))
    elif suffix == ".dcm":
        write_dicom(path, array)
    else:
        Image.fromarray(array).save(path)
    assert read_image(path).slices.size
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    for read in (read_image, read_label):
        with pytest.raises(DataError, match=f"case{suffix}: expected"):
            read(path)


def test_a_flipped_bit_in_a_compressed_volume_is_noticed(tmp_path):
    path = save_nifti(tmp_path / "a.nii.gz", RNG.integers(0, 255, (20, 20, 20)).astype(np.uint8))
    content = bytearray(gzip.decompress(path.read_bytes()))
    stored = bytearray(gzip.compress(bytes(content), 0))
    stored[len(stored) // 2] ^= 1
    path.write_bytes(stored)
    with pytest.raises(DataError, match="a.nii.gz"):
        read_image(path)


@pytest.mark.parametrize("name", ["missing.nii.gz", "notes.txt", "empty_folder", "zero.nii.gz", "singular.nii.gz"])
def test_what_is_no_image_is_an_error(tmp_path, name):
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "empty_folder").mkdir()
    save_nifti(tmp_path / "zero.nii.gz", np.zeros((4, 0, 4), np.uint8))
    singular = nib.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4))
    singular.header["qform_code"], singular.header["sform_code"] = 0, 1
    singular.header["srow_x"] = singular.header["srow_y"] = singular.header["srow_z"] = 0
    (tmp_path / "singular.nii.gz").write_bytes(gzip.compress(singular.header.binaryblock + bytes(4 + 64)))
    with pytest.raises(DataError, match=name):
        read_image(tmp_path / name)


@pytest.mark.parametrize("value", [-1000, -9999, 20000, 4095])
def test_a_number_far_from_all_others_that_fills_the_border_of_an_mr_is_padding(tmp_path, value):
    array = np.random.default_rng(0).integers(0, 600, (8, 9, 4)).astype(np.int16)
    array[2, 2, 2], array[:2] = 0, value
    image = read_image(save_nifti(tmp_path / "a.nii.gz", array))
    assert image.slices.min() == 0 and image.slices.max() < 600
    assert [told.split(",")[0] for told in image.warnings] == [f"72 of its 288 values are {value}"]


def test_looking_for_padding_takes_no_copy_of_a_volume():
    array = np.random.default_rng(0).integers(-1023, 900, (96, 64, 64, 1)).astype(np.float32)
    array[:, :2] = -1024
    tracemalloc.start()
    images._darken_padding(array, [], is_ct=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < array.nbytes / 10 and array.min() == -1024


def test_air_of_a_ct_and_what_is_bright_or_dark_in_a_picture_is_no_padding(tmp_path):
    rng = np.random.default_rng(0)
    ct = rng.integers(-150, 900, (8, 9, 4)).astype(np.int16)
    ct[:2] = -1000
    brain = rng.integers(0, 90, (8, 9, 4)).astype(np.int16)
    brain[:2] = -1000
    bright = rng.integers(0, 90, (8, 9)).astype(np.uint8)
    bright[:2], bright[4, 4] = 255, 0
    Image.fromarray(bright).save(tmp_path / "bright.png")
    for path in (save_nifti(tmp_path / "a.nii", ct), save_nifti(tmp_path / "b.nii", brain), tmp_path / "bright.png"):
        image = read_image(path)
        assert image.warnings == [] and image.slices.min() == (0 if image.geometry.is_picture else -1000)
    assert image.slices.max() == 255


@pytest.mark.parametrize(
    "dtype, value", [(np.uint16, 65535), (np.int16, -32768), (np.int16, 32767), (np.int32, 2**31 - 1), (float, -3.4e38)]
)
def test_padding_far_from_all_other_values_becomes_the_lowest_of_them_with_a_warning(tmp_path, dtype, value):
    array = RNG.integers(100, 1500, (9, 8, 4)).astype(dtype)
    plain, lowest = array.copy(), float(array[2:].min())
    array[:2], plain[:2] = value, lowest
    image = read_image(save_nifti(tmp_path / "a.nii", array))
    assert np.array_equal(image.geometry.to_native(image.slices[:, 0]), plain)
    assert image.warnings == [
        f"64 of its 288 values are {float(np.float32(value)):g}, far from all others: they are taken as padding and "
        f"read as {lowest:g}, the lowest of the others."
    ]
    # Something as bright as can be within the image, and values up to it, are none.
    for number, inside in enumerate((np.s_[3:5, 3:5, :], np.s_[:2])):
        array = RNG.integers(100, 1500, (9, 8, 4)).astype(np.uint16)
        array[inside], array[6] = 65535, 100 + number * 50000
        image = read_image(save_nifti(tmp_path / "a.nii", array))
        assert np.array_equal(image.geometry.to_native(image.slices[:, 0]), array) and not image.warnings


def test_axes_that_are_not_at_right_angles_are_said(tmp_path):
    affine = np.diag([2.0, 3.0, 4.0, 1.0])
    for shear, warnings in ((0.02, 0), (1.0, 1)):
        affine[0, 2] = shear
        image = read_image(save_nifti(tmp_path / "a.nii", np.zeros((4, 5, 6), np.int16), affine))
        assert [text[:27] for text in image.warnings] == ["Its axes are 14.0 degrees o"] * warnings
    assert not read_image(save_nifti(tmp_path / "a.nii", np.zeros((4, 5, 6), np.int16), OBLIQUE)).warnings
