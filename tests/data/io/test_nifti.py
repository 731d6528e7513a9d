"""Reading NIfTI, checked with another library than the one that wrote the file."""

import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK

from sam2sgp.data.io import itk_affine, read_image, read_label, write_label, write_map
from sam2sgp.errors import DataError
from tests.helpers.nifti_files import save_nifti

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
    for read in (read_image, read_label):
        with pytest.raises(DataError, match=f"a.nii.gz.*found {shape[-1]} along further axes.*time points or channels"):
            read(path)
    image = read_image(save_nifti(tmp_path / "b.nii.gz", np.zeros((4, 5, 6, 1), np.float32)))
    assert image.slices.shape == (6, 1, 5, 4) and image.geometry.native_shape == (4, 5, 6)


def test_rgb_nifti_is_colour(tmp_path):
    colours = RNG.integers(0, 255, (4, 5, 6, 3)).astype(np.uint8)
    pixels = colours.view([("R", "u1"), ("G", "u1"), ("B", "u1")])[..., 0]
    image = read_image(save_nifti(tmp_path / "a.nii.gz", pixels, np.diag([-1.0, -1.0, 1.0, 1.0])))
    assert image.is_rgb and np.array_equal(image.slices[2], colours[:, :, 2].transpose(2, 1, 0))


QFORM = nib.affines.from_matvec(np.diag([-1.5, -1.5, 3.0]), [40.0, 30.0, 0.0])
SFORM = nib.affines.from_matvec(np.diag([-1.5, -1.5, 3.0]), [50.0, 23.0, 5.0])
FORMS = [(1, 2), (1, 1), (2, 1), (4, 3), (1, 0), (0, 2), (0, 0)]


def two_forms(path: Path, qform_code: int, sform_code: int, array: np.ndarray) -> Path:
    image = nib.Nifti1Image(array, None)
    image.header.set_qform(QFORM, code=qform_code)
    image.header.set_sform(SFORM, code=sform_code)
    image.header.set_xyzt_units("mm", "sec")
    image.header.set_slope_inter(2.0, -5.0)
    nib.save(image, path)
    return path


@pytest.mark.parametrize(("qform_code", "sform_code"), FORMS)
def test_result_has_both_forms_of_its_image_and_their_codes(tmp_path, qform_code, sform_code):
    array = RNG.integers(0, 99, (6, 5, 4)).astype(np.int16)
    path = two_forms(tmp_path / "a.nii.gz", qform_code, sform_code, array)
    geometry = read_image(path).geometry
    labels = geometry.from_native((array > 50).astype(np.uint8))
    write_label(tmp_path / "label.nii.gz", labels, geometry)
    write_map(tmp_path / "map.nii.gz", labels.astype(np.float32), geometry)
    expected, placed = nib.load(path).header, SimpleITK.ReadImage(str(path))
    for name in ("label.nii.gz", "map.nii.gz"):
        header = nib.load(tmp_path / name).header
        for field in ("qform_code", "sform_code", "srow_x", "srow_y", "srow_z", "qoffset_x", "pixdim", "xyzt_units"):
            assert np.array_equal(header[field], expected[field]), (name, field)
        assert np.allclose(header.get_qform(), expected.get_qform()) and header.get_slope_inter() == (None, None)
        found = SimpleITK.ReadImage(str(tmp_path / name))
        assert found.GetOrigin() == placed.GetOrigin() and found.GetDirection() == placed.GetDirection()
        assert np.array_equal(SimpleITK.GetArrayFromImage(found).T, array > 50)


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
@pytest.mark.parametrize(("qform_code", "sform_code"), FORMS)
def test_label_on_the_voxels_is_accepted_by_either_form(tmp_path, qform_code, sform_code, suffix):
    array = RNG.integers(0, 2, (6, 5, 4)).astype(np.uint8)
    path = two_forms(tmp_path / "a.nii.gz", qform_code, sform_code, array)
    image = read_image(path)
    expected = image.geometry.from_native(array)
    by_itk = SimpleITK.GetImageFromArray(array.T)
    by_itk.CopyInformation(SimpleITK.ReadImage(str(path)))
    SimpleITK.WriteImage(by_itk, str(tmp_path / f"itk{suffix}"))
    assert np.array_equal(read_label(tmp_path / f"itk{suffix}", image.geometry), expected)
    # As most scripts write it.
    nib.save(nib.Nifti1Image(array, nib.load(path).affine), tmp_path / "nibabel.nii.gz")
    assert np.array_equal(read_label(tmp_path / "nibabel.nii.gz", image.geometry), expected)
    by_itk.SetOrigin((7.0, 8.0, 9.0))
    SimpleITK.WriteImage(by_itk, str(tmp_path / f"elsewhere{suffix}"))
    with pytest.raises(DataError, match="voxels away"):
        read_label(tmp_path / f"elsewhere{suffix}", image.geometry)


def test_forms_that_mirror_each_other_keep_the_order_of_voxels(tmp_path):
    array = np.zeros((6, 5, 4), np.uint8)
    array[0] = 1
    image = nib.Nifti1Image(array, None)
    image.header.set_qform(np.diag([1.0, 1, 1, 1]), code=1)
    image.header.set_sform(nib.affines.from_matvec(np.diag([-1.0, 1, 1]), [5.0, 0, 0]), code=2)
    nib.save(image, tmp_path / "a.nii.gz")
    geometry = read_image(tmp_path / "a.nii.gz").geometry
    by_itk = SimpleITK.GetImageFromArray(array.T)
    by_itk.CopyInformation(SimpleITK.ReadImage(str(tmp_path / "a.nii.gz")))
    SimpleITK.WriteImage(by_itk, str(tmp_path / "b.nii.gz"))
    assert np.array_equal(read_label(tmp_path / "b.nii.gz", geometry), geometry.from_native(array))


def test_vector_of_bytes_is_colour(tmp_path):
    colours = RNG.integers(0, 255, (4, 5, 6, 1, 3)).astype(np.uint8)
    image = read_image(save_nifti(tmp_path / "a.nii.gz", colours, np.diag([-1.0, -1.0, 1.0, 1.0])))
    assert image.is_rgb and np.array_equal(image.slices[2], colours[:, :, 2, 0].transpose(2, 1, 0))
    colours = SimpleITK.GetImageFromArray(RNG.integers(0, 255, (4, 5, 6, 3)).astype(np.uint8), isVector=True)
    SimpleITK.WriteImage(colours, str(tmp_path / "b.nii.gz"))
    image = read_image(tmp_path / "b.nii.gz")
    assert np.array_equal(image.slices.transpose(0, 2, 3, 1), SimpleITK.GetArrayFromImage(colours))


@pytest.mark.parametrize("code", [1, 2])
def test_voxel_sizes_that_contradict_each_other_are_said_and_labels_by_itk_accepted(tmp_path, code):
    array = RNG.integers(0, 2, (6, 5, 4)).astype(np.uint8)
    path = two_forms(tmp_path / "a.nii", 0, code, array)
    content = bytearray(path.read_bytes())
    content[80:92] = struct.pack("<3f", 1.0, 1.25, 3.0)  # pixdim
    path.write_bytes(content)
    image = read_image(path)
    [warning] = image.warnings
    assert "pixdim 1, 1.25, 3; sform 1.5, 1.5, 3" in warning
    assert np.allclose(image.geometry.affine, nib.load(path).affine)
    by_itk = SimpleITK.ReadImage(str(path))
    placed = np.eye(4)
    placed[:3, :3] = np.reshape(by_itk.GetDirection(), (3, 3)) * by_itk.GetSpacing()
    placed[:3, 3] = by_itk.GetOrigin()
    assert np.allclose(np.diag([-1, -1, 1, 1]) @ placed, itk_affine(image.geometry), atol=1e-4)
    label = SimpleITK.GetImageFromArray(array.T)
    label.CopyInformation(by_itk)
    SimpleITK.WriteImage(label, str(tmp_path / "b.nrrd"))
    assert np.array_equal(read_label(tmp_path / "b.nrrd", image.geometry), image.geometry.from_native(array))
    assert not read_image(two_forms(tmp_path / "c.nii", 0, code, array)).warnings


@pytest.mark.parametrize("sform, qform", [(2, 0), (1, 1), (2, 1), (0, 1), (0, 0)])
def test_negative_voxel_sizes_are_said_and_results_lie_on_their_image_in_itk(tmp_path, sform, qform):
    """ITK mirrors such an image and nibabel doesn't; results that only nibabel placed right lay aside in Slicer."""
    array = RNG.integers(0, 2, (6, 5, 4)).astype(np.uint8)
    path = two_forms(tmp_path / "a.nii", qform, sform, array)
    content = bytearray(path.read_bytes())
    content[80:84] = struct.pack("<f", -struct.unpack("<f", content[80:84])[0])
    path.write_bytes(content)
    image = read_image(path)
    assert ["negative sizes (pixdim -" in warning for warning in image.warnings] == [True]
    write_label(tmp_path / "b.nii.gz", image.geometry.from_native(array), image.geometry)
    assert np.allclose(nib.load(tmp_path / "b.nii.gz").affine, nib.load(path).affine)
    by_itk, result = (SimpleITK.ReadImage(str(tmp_path / name)) for name in ("a.nii", "b.nii.gz"))
    placed = np.eye(4)
    placed[:3, :3] = np.reshape(by_itk.GetDirection(), (3, 3)) * by_itk.GetSpacing()
    placed[:3, 3] = by_itk.GetOrigin()
    assert np.allclose(np.diag([-1, -1, 1, 1]) @ placed, itk_affine(image.geometry), atol=1e-4)
    for get in ("GetOrigin", "GetSpacing", "GetDirection"):
        assert np.allclose(getattr(by_itk, get)(), getattr(result, get)(), atol=1e-5)
    # A label that was drawn in Slicer.
    label = SimpleITK.GetImageFromArray(array.T)
    label.CopyInformation(by_itk)
    SimpleITK.WriteImage(label, str(tmp_path / "c.nrrd"))
    assert np.array_equal(read_label(tmp_path / "c.nrrd", image.geometry), image.geometry.from_native(array))
