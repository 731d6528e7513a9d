"""Reading NIfTI, checked with another library than the one that wrote the file."""

import nibabel as nib
import numpy as np
import pytest
import SimpleITK

from sam2sgp.data.io import (
    read_image,
    read_label,
    write_label,
)
from sam2sgp.errors import DataError
from tests.data.io.nifti_files import save_nifti

RNG = np.random.default_rng(0)


def test_header_in_microns_is_read_in_mm(tmp_path):
    image = nib.Nifti1Image(np.zeros((4, 5, 6), np.uint8), np.diag([500.0, 500.0, 500.0, 1.0]))
    image.header.set_xyzt_units("micron")
    nib.save(image, tmp_path / "a.nii.gz")
    geometry = read_image(tmp_path / "a.nii.gz").geometry
    assert np.allclose(geometry.spacing, 0.5)
    write_label(tmp_path / "b.nii.gz", np.zeros(geometry.shape, np.uint8), geometry)
    assert np.allclose(SimpleITK.ReadImage(str(tmp_path / "b.nii.gz")).GetSpacing(), 0.5)


@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 1), (1, 5, 6), (5, 1, 6)])
def test_one_slice_image_gives_one_slice_and_its_own_dimensions_back(tmp_path, shape):
    array = np.arange(30, dtype=np.int16).reshape(shape)
    image = read_image(save_nifti(tmp_path / "a.nii.gz", array, np.diag([2.0, 3.0, 4.0, 1.0])), slice_axis=2)
    assert image.slices.shape[:2] == (1, 1)
    assert image.geometry.native_shape == shape
    labels = (image.slices[:, 0] > 7).astype(np.int64)
    write_label(tmp_path / "b.nii.gz", labels, image.geometry)
    written = nib.load(tmp_path / "b.nii.gz")
    assert written.shape == shape and np.array_equal(np.asarray(written.dataobj), array > 7)
    assert np.allclose(written.affine, np.diag([2.0, 3.0, 4.0, 1.0]))
    assert np.array_equal(read_label(tmp_path / "b.nii.gz", image.geometry), labels)


@pytest.mark.parametrize("shape", [(4, 5, 6, 2), (4, 5, 6, 3), (4, 5, 6, 1, 3), (4, 5, 1, 7)])
def test_time_points_and_channels_are_never_taken_for_colours(tmp_path, shape):
    path = save_nifti(tmp_path / "a.nii.gz", np.zeros(shape, np.float32))
    with pytest.raises(DataError, match=f"a.nii.gz.*found {shape[-1]} along further axes.*time points or channels"):
        read_image(path)
    image = read_image(save_nifti(tmp_path / "b.nii.gz", np.zeros((4, 5, 6, 1), np.float32)))
    assert image.slices.shape == (6, 1, 5, 4) and image.geometry.native_shape == (4, 5, 6)


def test_rgb_nifti_is_colour(tmp_path):
    colours = RNG.integers(0, 255, (4, 5, 6, 3)).astype(np.uint8)
    pixels = colours.view([("R", "u1"), ("G", "u1"), ("B", "u1")])[..., 0]
    image = read_image(save_nifti(tmp_path / "a.nii.gz", pixels, np.diag([-1.0, -1.0, 1.0, 1.0])))
    assert image.is_rgb and np.array_equal(image.slices[2], colours[:, :, 2].transpose(2, 1, 0))
