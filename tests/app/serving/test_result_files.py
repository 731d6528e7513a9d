"""Results as files: on their image's own grid in every format."""

import itk
import nibabel as nib
import numpy as np
import pytest
from PIL import ExifTags, Image

from lib.checks import RequestError
from lib.serving.result_files import EXTENSIONS, write_result
from sam2sgp.data.io import read_image, read_label

OBLIQUE = np.array([[-0.7, 0.2, 0.4, 10.0], [0.3, 0.8, -0.1, -20.0], [-0.1, 0.1, 2.5, 5.0], [0, 0, 0, 1.0]])


@pytest.fixture
def written():
    """Writes results and removes them in the end."""
    paths = []

    def write(*args):
        paths.append(write_result(*args))
        return paths[-1]

    yield write
    for path in paths:
        path.unlink()


@pytest.fixture
def volume(tmp_path):
    """A volume (7, 6, 5) on an oblique grid with orthogonal axes, and a class map on it with one marked voxel."""
    rotation = np.linalg.qr(OBLIQUE[:3, :3])[0]
    affine = np.eye(4)
    affine[:3, :3] = rotation @ np.diag([0.7, 0.9, 2.5])
    affine[:3, 3] = OBLIQUE[:3, 3]
    path = tmp_path / "image.nii.gz"
    nib.save(nib.Nifti1Image(np.random.default_rng(0).random((7, 6, 5)).astype(np.float32), affine), path)
    labels = np.zeros((7, 6, 5), np.uint8)
    labels[4, 2, 1], labels[0, 5, 3] = 3, 1
    return path, labels, affine


@pytest.mark.parametrize("extension", [".nii.gz", ".nrrd", None])
def test_a_volume_result_lies_on_the_images_grid_in_every_format(volume, written, extension):
    path, labels, affine = volume
    geometry = read_image(path).geometry
    result = written(geometry.from_native(labels), geometry, extension)
    assert result.name.endswith(extension or ".nii.gz")
    assert np.array_equal(geometry.to_native(read_label(result, geometry)), labels)
    image = itk.imread(str(result))
    # ITK's world is LPS: the marked voxel lies where the image says.
    place = np.array(image.TransformIndexToPhysicalPoint([4, 2, 1])) * [-1, -1, 1]
    assert itk.array_from_image(image)[1, 2, 4] == 3
    assert np.allclose(place, (affine @ [4, 2, 1, 1])[:3], atol=1e-4)


@pytest.mark.parametrize("extension", [".png", ".nii.gz", ".nrrd", None])
def test_a_picture_result_lies_on_the_picture_in_every_format(tmp_path, written, extension):
    labels = np.zeros((5, 8), np.uint8)
    labels[1, 6], labels[4, 0] = 2, 1
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (5, 8)).astype(np.uint8)).save(path)
    geometry = read_image(path).geometry
    result = written(labels[None], geometry, extension)
    assert np.array_equal(read_label(result, geometry)[0], labels)
    seen, shown = itk.imread(str(path)), itk.imread(str(result))
    assert np.squeeze(itk.array_from_image(shown))[1, 6] == 2
    assert np.allclose(_place(seen), _place(shown))


@pytest.mark.parametrize(("qform_code", "sform_code"), [(1, 2), (1, 1), (0, 0)])
def test_a_result_lies_where_itk_puts_an_image_of_two_forms(tmp_path, written, qform_code, sform_code):
    path = tmp_path / "image.nii.gz"
    image = nib.Nifti1Image(np.zeros((6, 5, 4), np.int16), None)
    image.header.set_qform(np.diag([-1.5, -1.5, 3.0, 1.0]), code=qform_code)
    image.header.set_sform(nib.affines.from_matvec(np.diag([-1.5, -1.5, 3.0]), [10, 20, 30]), code=sform_code)
    nib.save(image, path)
    geometry = read_image(path).geometry
    labels = np.random.default_rng(0).integers(0, 3, geometry.shape).astype(np.uint8)
    for extension in (".nrrd", ".nii.gz"):
        result = written(labels, geometry, extension)
        seen, shown = itk.imread(str(path)), itk.imread(str(result))
        assert np.allclose(seen.GetOrigin(), shown.GetOrigin()) and np.allclose(seen.GetSpacing(), shown.GetSpacing())
        assert np.array_equal(itk.array_from_image(shown).T, geometry.to_native(labels))
        assert np.array_equal(read_label(result, geometry), labels)


def test_a_result_for_a_turned_photograph_lies_on_it_in_browsers_and_in_itk(tmp_path, written):
    path = tmp_path / "photo.jpg"
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(np.zeros((16, 24), np.uint8)).save(path, exif=exif)
    geometry = read_image(path).geometry
    labels = np.random.default_rng(0).integers(0, 3, (1, 24, 16)).astype(np.uint8)
    with Image.open(written(labels, geometry, ".png")) as picture:
        assert np.array_equal(np.asarray(picture), labels[0])
    result = written(labels, geometry, ".nrrd")
    # ITK shows the pixels as stored.
    assert np.squeeze(itk.array_from_image(itk.imread(str(path)))).shape == (16, 24)
    shown = np.squeeze(itk.array_from_image(itk.imread(str(result))))
    assert np.array_equal(np.rot90(shown, -1), labels[0])
    assert np.array_equal(read_label(result, geometry), labels)


def test_formats_that_cannot_hold_a_result_are_refused(volume, tmp_path):
    geometry = read_image(volume[0]).geometry
    labels = np.zeros(geometry.shape, np.uint8)
    with pytest.raises(RequestError, match="expected a volume format for 5 slices, found '.png'"):
        write_result(labels, geometry, ".png")
    with pytest.raises(RequestError, match=f"expected one of {', '.join(EXTENSIONS)}, found '.exe'"):
        write_result(labels, geometry, ".exe")


def _place(image) -> np.ndarray:
    """Where ITK sees the pixel in row 1, column 6."""
    return np.array(image.TransformIndexToPhysicalPoint([6, 1, 0][: image.GetImageDimension()]))[:2]
