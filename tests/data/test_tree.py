"""What lies in a folder is an image, a label, or said."""

import os

import itk
import nibabel as nib
import numpy as np
import pydicom
import pytest

from sam2sgp.data.folders import load_datalist
from sam2sgp.data.io import read_image
from sam2sgp.errors import DataError
from tests.helpers.data_folders import names, said, touch
from tests.helpers.dicom_files import write_dicom, write_object, write_series


def test_what_lies_among_queries_is_read_or_said(tmp_path):
    rng = np.random.default_rng(0)
    root = tmp_path / "q"
    voxels = rng.integers(0, 99, (3, 4, 5)).astype(np.int16)
    (root / "site/case").mkdir(parents=True)
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), root / "site/case/deep.nii.gz")
    nib.save(nib.Nifti1Pair(voxels, np.diag([2.0, 2, 2, 1])), root / "pair.img")
    itk.imwrite(itk.image_from_array(voxels), str(root / "header.nhdr"))
    itk.imwrite(itk.image_from_array(voxels), str(root / "meta.mhd"))
    write_series(root / "series", np.zeros((3, 4, 4), np.uint16))
    for number, file in enumerate(sorted((root / "series").iterdir())):
        content = pydicom.dcmread(file)
        content.remove_private_tags()
        # As old archives keep them: without the 128 bytes, the file meta information and an ending.
        with open(root / "series" / f"IM{number}", "wb") as out:
            pydicom.filewriter.write_dataset(pydicom.filebase.DicomFileLike(out), _implicit(content))
        file.unlink()
    (root / "DICOMDIR").write_bytes(b"x")
    write_object(root / "series" / "report.dcm", "1.2.840.10008.5.1.4.1.1.88.11", "SR")
    write_object(root / "structures", "1.2.840.10008.5.1.4.1.1.481.3", "RTSTRUCT")
    touch(
        root, ".DS_Store", "site/._deep.nii.gz", "anim.gif", "array.npz", "notes.txt", "masks/m.png", "empty_file.xyz"
    )
    for name in ("anim.gif", "array.npz", "notes.txt"):
        (root / name).write_bytes(b"content")
    (root / "void").mkdir()
    touch(root, "old/records/x.json", "old/summary.csv", "old/a.png")
    (root / "loop").symlink_to(root, target_is_directory=True)
    (root / "itself").symlink_to(root / "itself")
    (root / "gone.png").symlink_to(root / "nowhere.png")
    os.mkfifo(root / "pipe.png")
    touch(root, "@eaDir/deep.nii.gz", "$RECYCLE.BIN/a.png", "~$a.png")
    cases = load_datalist(root, require_labels=False)
    assert names(cases) == ["deep", "header", "meta", "pair", "series"]
    found = said(cases, root)
    assert found.pop("$RECYCLE.BIN") == "a hidden or system file, and 4 more"
    beginnings = {
        "DICOMDIR": "an index of DICOM files",
        "anim.gif": ".gif files are not read; convert",
        "array.npz": ".npz files are not read; convert",
        "notes.txt": "not an image (.txt)",
        "masks/m.png": "a label without an image of its name",
        "empty_file.xyz": "an empty file",
        "void": "an empty folder",
        "old": "results of an earlier run",
        "loop": "a link to a folder that it lies in",
        "itself": "a link to nothing",
        "gone.png": "a link to nothing",
        "pipe.png": "neither a file nor a folder",
        "series/report.dcm": "a DICOM object without pixels (Basic Text SR)",
        "structures": "a DICOM object without pixels (RT Structure Set)",
    }
    assert found.keys() == beginnings.keys()
    assert all(found[name].startswith(text) for name, text in beginnings.items())
    for name in ("pair", "header", "meta"):
        image = read_image(next(case["image"] for case in cases if case["name"] == name))
        expected = voxels if name == "pair" else voxels.T
        assert sorted(image.slices.ravel()) == sorted(expected.ravel())


def _implicit(dataset):
    dataset.is_little_endian, dataset.is_implicit_VR = True, False
    return dataset


def test_dicom_series_folder_is_one_image(tmp_path):
    write_series(tmp_path / "images/p1", np.zeros((3, 4, 4), np.uint16))
    touch(tmp_path, "labels/p1.nii.gz", "images/not_dicom/readme.txt")
    (case,) = load_datalist(tmp_path)
    assert case["image"] == str(tmp_path / "images/p1") and case["label"].endswith("p1.nii.gz")


def test_queries_may_be_files_folders_and_series(tmp_path):
    series = write_series(tmp_path / "q/ct", np.zeros((3, 4, 4), np.uint16))
    touch(tmp_path, "q/a.png", "q/readme.md")
    assert names(load_datalist(tmp_path / "q", require_labels=False)) == ["a", "ct"]
    assert load_datalist(tmp_path / "q/a.png", require_labels=False)[0]["name"] == "a"
    (case,) = load_datalist(series, require_labels=False)
    assert case["image"] == str(series) and case["name"] == "ct"
    with pytest.raises(DataError, match="another kind"):
        load_datalist(touch(tmp_path, "notes.txt") / "notes.txt", require_labels=False)


def test_separate_radiographs_in_one_folder_are_separate_images(tmp_path):
    for name in ("r1.dcm", "r2.dcm"):
        write_dicom(tmp_path / name, np.zeros((4, 4), np.uint16), "DX")
    assert names(load_datalist(tmp_path, require_labels=False)) == ["r1", "r2"]


def test_two_series_in_one_folder_are_an_error(tmp_path):
    for name in ("a", "b"):
        write_series(tmp_path / name, np.zeros((2, 4, 4), np.uint16))
        for file in list((tmp_path / name).iterdir()):
            file.rename(tmp_path / f"{name}{file.name}")
        (tmp_path / name).rmdir()
    with pytest.raises(DataError, match="found 2.*2 files"):
        load_datalist(tmp_path, require_labels=False)
