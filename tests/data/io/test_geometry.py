"""The way from a file's grid to slices in display orientation and back."""

import pickle

import nibabel as nib
import numpy as np
import pytest

from sam2sgp.data.io import (
    read_image,
)
from sam2sgp.errors import ConfigError
from tests.helpers.nifti_files import OBLIQUE, reoriented, save_nifti

RNG = np.random.default_rng(0)


def test_axial_slice_has_rows_to_posterior_and_columns_to_the_left(tmp_path):
    array = np.zeros((4, 5, 6), np.int16)  # RAS+
    array[0, :, 2] = 1  # left
    array[:, 0, 2] += 2  # posterior
    image = read_image(save_nifti(tmp_path / "a.nii.gz", array))
    assert image.slices.shape == (6, 1, 5, 4) and image.slices.dtype == np.float32
    view = image.slices[2, 0]
    assert (view[:-1, -1] == 1).all() and (view[-1, :-1] == 2).all() and view[-1, -1] == 3
    assert image.geometry.slice_axis == 2 and image.modality is None and not image.is_rgb


@pytest.mark.parametrize(
    ("slice_axis", "bottom", "right"), [(0, (2, 0), (1, 0)), (1, (2, 0), (0, 0)), (2, (1, 0), (0, 0))]
)
def test_upright_views_have_inferior_at_the_bottom(tmp_path, slice_axis, bottom, right):
    # (axis, end) of the RAS+ array that must show at the bottom and at the right.
    for (axis, end), edge in ((bottom, np.s_[:, -1, :]), (right, np.s_[:, :, -1])):
        array = np.zeros((4, 5, 6), np.uint8)
        np.moveaxis(array, axis, 0)[end] = 1
        image = read_image(save_nifti(tmp_path / "a.nii", array), slice_axis)
        slices = image.slices[:, 0]
        assert (slices[edge] == 1).all() and slices.sum() == slices[edge].size
        assert image.geometry.slice_axis == slice_axis


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "SAL", "ASR", "ILP"])
def test_stored_axis_order_does_not_change_the_view_and_is_restored_exactly(tmp_path, codes):
    array = RNG.integers(0, 3, (5, 6, 7)).astype(np.uint8)
    expected = read_image(save_nifti(tmp_path / "a.nii.gz", array, OBLIQUE)).slices
    stored = reoriented(array, OBLIQUE, codes)
    nib.save(stored, tmp_path / "b.nii.gz")
    image = read_image(tmp_path / "b.nii.gz")
    assert np.array_equal(image.slices, expected)
    native = image.geometry.to_native(image.slices[:, 0])
    assert np.array_equal(native, np.asarray(stored.dataobj))
    assert np.array_equal(image.geometry.from_native(native), image.slices[:, 0])


@pytest.mark.parametrize(
    ("zooms", "axis"),
    [((1, 1, 1), 2), ((1.4, 1, 1), 2), ((3, 1, 1), 0), ((1, 3, 1), 1), ((1, 1, 5), 2), ((1.5, 1.0, 1.0), 0)],
)
def test_auto_slices_along_the_thick_axis(tmp_path, zooms, axis):
    path = save_nifti(tmp_path / "a.nii.gz", np.zeros((4, 5, 6), np.uint8), np.diag([*zooms, 1.0]))
    geometry = read_image(path).geometry
    assert geometry.slice_axis == axis and geometry.spacing[0] == pytest.approx(zooms[axis])


def test_spacing_is_slice_row_column(tmp_path):
    path = save_nifti(tmp_path / "a.nii.gz", np.zeros((4, 5, 6), np.uint8), np.diag([-0.5, 0.7, 4.0, 1.0]))
    assert np.allclose(read_image(path).geometry.spacing, (4.0, 0.7, 0.5))


def test_unknown_slice_axis_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="slice_axis"):
        read_image(save_nifti(tmp_path / "a.nii", np.zeros((3, 3, 3), np.uint8)), "axial")


def test_thousand_slices(tmp_path):
    array = np.zeros((3, 4, 1000), np.uint8)
    array[..., 777] = 1
    image = read_image(save_nifti(tmp_path / "a.nii.gz", array))
    assert image.slices.shape == (1000, 1, 4, 3) and np.flatnonzero(image.slices.any((1, 2, 3))).tolist() == [777]


def test_geometry_survives_pickling(tmp_path):
    image = read_image(save_nifti(tmp_path / "a.nii.gz", RNG.normal(size=(4, 5, 6)), OBLIQUE))
    copy = pickle.loads(pickle.dumps(image.geometry))
    assert np.array_equal(copy.affine, image.geometry.affine) and copy.shape == image.geometry.shape
    with pytest.raises(ValueError, match="shape"):
        copy.to_native(np.zeros((1, 2, 3)))


def test_spacing_of_an_oblique_volume_is_exactly_that_of_the_upright_one(tmp_path):
    for angle in (0.0, 0.1, 0.3, 0.5):
        affine = nib.eulerangles.euler2mat(angle, -angle, angle / 2) @ np.diag([0.8, 0.8, 3.3])
        path = save_nifti(tmp_path / "a.nii", np.zeros((4, 5, 6), np.uint8), nib.affines.from_matvec(affine))
        assert read_image(path).geometry.spacing == (3.3, 0.8, 0.8)
