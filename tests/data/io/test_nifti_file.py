"""NIfTI files are opened by their content, and what they lack is told."""

import gzip
import struct

import nibabel as nib
import numpy as np
import pytest
import SimpleITK

from sam2sgp.data.io import read_image, read_label, write_label
from tests.helpers.nifti_files import save_nifti

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(("name", "renamed"), [("a.nii.gz", "b.nii"), ("a.nii", "b.nii.gz")])
def test_whether_a_file_is_compressed_is_told_by_its_content(tmp_path, name, renamed):
    array = RNG.integers(0, 900, (5, 6, 4)).astype(np.int16)
    path = save_nifti(tmp_path / name, array, np.diag([2.0, 2.0, 2.0, 1.0]))
    expected = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))
    image = read_image(path.rename(tmp_path / renamed), slice_axis=2)
    written = tmp_path / "c.nii.gz"
    write_label(written, image.slices[:, 0].astype(np.int64), image.geometry)
    assert np.array_equal(SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(written))), expected)


@pytest.mark.parametrize("form", ["qform", "none", "sform"])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_voxels_without_a_size_are_counted_and_said(tmp_path, form, suffix):
    image = nib.Nifti1Image(np.zeros((4, 5, 6), np.int16), np.diag([1.0, 1.0, 2.5, 1.0]))
    image.set_qform(image.affine, code=int(form == "qform"))
    image.set_sform(image.affine, code=int(form == "sform"))
    nib.save(image, tmp_path / "a.nii")
    content = bytearray((tmp_path / "a.nii").read_bytes())
    content[80:84] = struct.pack("<f", 0.0)  # pixdim[1]
    path = tmp_path / f"b{suffix}"
    path.write_bytes(gzip.compress(content) if suffix == ".nii.gz" else content)
    found = read_image(path)
    if form == "sform":
        assert found.geometry.spacing == (2.5, 1.0, 1.0) and found.warnings == []
    else:
        assert found.geometry.spacing is None and "no size (pixdim is 0)" in found.warnings[0]


def test_members_of_a_gzip_file_may_be_shorter_than_the_header(tmp_path):
    array = RNG.integers(0, 99, (6, 5, 4)).astype(np.int16)
    content = save_nifti(tmp_path / "a.nii", array, np.diag([-1.5, -1.5, 3.0, 1.0])).read_bytes()
    path = tmp_path / "b.nii.gz"
    path.write_bytes(b"".join(gzip.compress(content[start : start + 100]) for start in range(0, len(content), 100)))
    geometry = read_image(path).geometry
    assert np.array_equal(geometry.to_native(read_label(path, geometry)), np.asarray(nib.load(path).dataobj))
