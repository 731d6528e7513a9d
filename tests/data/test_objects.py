"""Images in memory become files with the same values and places, and results come back as what was given."""

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch

from sam2sgp.data.io import read_image
from sam2sgp.data.objects import as_file
from sam2sgp.errors import DataError

RNG = np.random.default_rng(0)


def there_and_back(image, folder, **settings):
    """The slices (Z, C, H, W) that are read of an object, and a class map of its bright voxels as it comes back."""
    file = as_file(image, folder, "a", **settings)
    read = read_image(file.path)
    return read, file.restore((read.slices[:, 0] > 50).astype(np.uint8), read.geometry)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int64, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(6, 7), (5, 6, 7)])
def test_an_array_is_read_as_it_is_and_its_result_has_its_shape(tmp_path, dtype, shape):
    array = RNG.integers(0, 100, shape).astype(dtype)
    read, result = there_and_back(array, tmp_path)
    assert np.array_equal(read.slices[:, 0].reshape(shape), array)
    assert isinstance(result, np.ndarray) and np.array_equal(result, array > 50)


def test_large_numbers_do_not_wrap_around(tmp_path):
    array = np.zeros((3, 4, 5), np.int64)
    array[1, 2, 3] = 1 << 40
    read, _ = there_and_back(array, tmp_path)
    assert read.slices[1, 0, 2, 3] == 1 << 40 and read.slices.sum() == 1 << 40


def test_a_tensor_comes_back_as_a_tensor_and_masks_of_bool_are_class_maps(tmp_path):
    mask = torch.from_numpy(RNG.random((4, 6, 7)) > 0.5)
    file = as_file(mask, tmp_path, "mask")
    assert np.array_equal(read_image(file.path).slices[:, 0], mask.numpy())
    _, result = there_and_back(torch.full((3, 6, 7), 99.0), tmp_path)
    assert isinstance(result, torch.Tensor) and result.shape == (3, 6, 7) and result.all()


def test_spacing_is_that_of_slices_rows_and_columns(tmp_path):
    array = RNG.integers(0, 100, (5, 6, 7)).astype(np.int16)
    read, _ = there_and_back(array, tmp_path, spacing=(2.5, 0.8, 0.7))
    assert read.geometry.spacing == pytest.approx((2.5, 0.8, 0.7))
    flat, result = there_and_back(array[0], tmp_path, spacing=(0.8, 0.7))
    assert flat.geometry.spacing[1:] == pytest.approx((0.8, 0.7)) and np.array_equal(result, array[0] > 50)


def test_colours_are_a_picture(tmp_path):
    colours = RNG.integers(0, 255, (6, 7, 3)).astype(np.uint8)
    read, result = there_and_back(colours, tmp_path)
    assert read.is_rgb and np.array_equal(read.slices[0].transpose(1, 2, 0), colours) and result.shape == (6, 7)


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_channels_first_are_not_silently_slices(tmp_path, channels, dtype):
    """As torchvision reads a colour image. A volume of so few slices tells by its spacing."""
    array = RNG.integers(0, 100, (channels, 20, 16)).astype(dtype)
    for image in (array, torch.from_numpy(array)):
        with pytest.raises(DataError, match=rf"found \({channels}, 20, 16\).*spacing=.*move the channels"):
            as_file(image, tmp_path, "query")
    read, result = there_and_back(array, tmp_path, spacing=(3.0, 1.0, 1.0))
    assert np.array_equal(read.slices[:, 0], array) and np.array_equal(result, array > 50)
    assert read_image(as_file(array, tmp_path, "label", is_label=True).path).slices.shape == (channels, 1, 20, 16)


def test_images_of_other_libraries_keep_their_grid(tmp_path):
    array = RNG.integers(0, 100, (5, 6, 7)).astype(np.int16)
    affine = nib.affines.from_matvec(np.diag([-0.7, 0.8, 2.5]), [10.0, 20.0, 30.0])
    image = nib.Nifti1Image(array, affine)
    image.header.set_slope_inter(2.0, -7.0)
    _, result = there_and_back(image, tmp_path)
    assert np.array_equal(np.asarray(result.dataobj), array > 50) and np.allclose(result.affine, affine)
    assert result.header.get_slope_inter() == (1.0, 0.0)
    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing((0.7, 0.8, 2.5))
    image.SetOrigin((1.0, 2.0, 3.0))
    _, result = there_and_back(image, tmp_path)
    assert np.array_equal(SimpleITK.GetArrayFromImage(result), array > 50)
    assert result.GetSpacing() == image.GetSpacing() and result.GetOrigin() == image.GetOrigin()


@pytest.mark.parametrize(
    ("image", "spacing", "message"),
    [
        ([[1, 2]], None, "expected a path, a NumPy array.*found list"),
        (np.zeros((2, 3, 4, 5)), None, r"found float64 \(2, 3, 4, 5\)"),
        (np.zeros((0, 4)), None, "found float64"),
        (np.zeros((4, 4), complex), None, "found complex128"),
        (np.zeros((4, 5)), (1.0, 1.0, 1.0), "expected 2 sizes above 0 in mm"),
        (np.zeros((4, 5)), (1.0, 0.0), "expected 2 sizes above 0 in mm"),
        (np.zeros((4, 5, 3), np.uint8), (1.0, 1.0), "expected colours without `spacing`"),
        ("x.png", (1.0, 1.0), "only with arrays"),
    ],
)
def test_what_is_no_image_is_refused(tmp_path, image, spacing, message):
    with pytest.raises(DataError, match=message):
        as_file(image, tmp_path, "x", spacing)
