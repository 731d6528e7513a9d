"""Data folders become datalists: pairs, patients, sections, class names."""

import os
import unicodedata
import warnings
from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pydicom
import pytest

from sam2sgp.data.classes import class_names
from sam2sgp.data.folders import load_datalist, skipped_in
from sam2sgp.data.io import read_image
from sam2sgp.errors import DataError
from tests.data.data_folders import names, nnunet, paired, said, touch, write_json
from tests.data.dicom_files import write_dicom, write_object, write_series


@pytest.mark.parametrize("folder", ["labels", "masks"])
@pytest.mark.parametrize("ending", ["", "_mask", "_segmentation"])
def test_images_and_labels_of_equal_stems_are_paired(tmp_path, folder, ending):
    touch(tmp_path, "images/b.nii.gz", f"{folder}/b{ending}.nrrd", "images/a.png", f"{folder}/a{ending}.png")
    touch(tmp_path, "SOURCE.md", "images/.hidden.png", "images/Thumbs.db", "images/notes.json", f"{folder}/SOURCE.md")
    cases = load_datalist(tmp_path)
    assert names(cases) == ["a", "b"]
    assert cases[1] == {
        "image": str(tmp_path / "images/b.nii.gz"),
        "label": str(tmp_path / f"{folder}/b{ending}.nrrd"),
        "patient": "b",
        "group": tmp_path.name,
        "name": "b",
    }


def test_equal_stem_is_preferred_to_a_mask_ending(tmp_path):
    touch(tmp_path, "images/a.png", "labels/a.png", "labels/a_mask.png")
    cases = load_datalist(tmp_path)
    assert cases[0]["label"].endswith("labels/a.png") and len(cases) == 1
    assert said(cases, tmp_path) == {"labels/a_mask.png": "another label of a.png is used"}


def test_unpaired_images_and_labels_are_left_out_and_said(tmp_path):
    paired(tmp_path, "a")
    touch(tmp_path, "images/b.png", "images/c.png", "labels/d.png")
    cases = load_datalist(tmp_path)
    assert names(cases) == ["a"]
    without_image = {"labels/d.png": "a label without an image of its name"}
    without_label = {f"images/{name}.png": "an image without a label" for name in "bc"}
    assert said(cases, tmp_path) == without_image | without_label
    cases = load_datalist(tmp_path, require_labels=False)
    assert names(cases) == ["a", "b", "c"] and "label" not in cases[1]
    assert said(cases, tmp_path) == without_image


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


def test_queries_and_supports_say_each_file_once_and_none_that_the_other_uses(tmp_path, caplog):
    paired(tmp_path, "a")
    touch(tmp_path, "images/b.png", "labels/c.png")
    queries, support = load_datalist(tmp_path, require_labels=False), load_datalist(tmp_path)
    assert [file.path.name for file in skipped_in(queries, support)] == ["c.png"]
    assert [record.message.count("c.png") for record in caplog.records] == [1]
    # Whoever gives a list of his own has nothing to say.
    assert skipped_in([{"image": "x.png"}]) == []


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_match_in_both_forms_of_unicode(tmp_path, forms):
    image, label = (unicodedata.normalize(form, "Müller") for form in forms)
    touch(tmp_path / "pairs", f"images/{image}.png", f"masks/{label}.png")
    (case,) = load_datalist(tmp_path / "pairs")
    assert case["label"].endswith(f"{label}.png")
    content = {"training": [{"image": f"pairs/images/{label}.png", "label": f"pairs/masks/{image}.png"}]}
    (case,) = load_datalist(write_json(tmp_path / "list.json", content))
    assert Path(case["image"]).is_file() and Path(case["label"]).is_file()


def test_nnunet_folder(tmp_path):
    cases = load_datalist(nnunet(tmp_path))
    assert [Path(case["label"]).name for case in cases] == [f"liver_00{n}.nii.gz" for n in range(3)]
    assert {case["modality"] for case in cases} == {"CT"} and class_names(tmp_path) == {1: "liver"}
    assert len(load_datalist(tmp_path, require_labels=False)) == 4
    touch(tmp_path, "imagesTr/liver_001_0001.nii.gz")
    with pytest.raises(DataError, match="2 channels of 'liver_001'.*liver_001_0000.*choose one channel"):
        load_datalist(tmp_path)


def test_several_channels_of_a_case_are_refused_wherever_they_are_given(tmp_path, caplog):
    channels = ["a_0000.nii.gz", "a_0001.nii.gz"]
    refused = "2 channels of 'a'.*a_0000.*choose one channel"
    touch(tmp_path, "nn/imagesTr/b_0000.nii.gz", *(f"nn/imagesTs/{name}" for name in channels))
    for folder in ("nn", "nn/imagesTs"):
        with pytest.raises(DataError, match=refused):
            load_datalist(tmp_path / folder, require_labels=False)
    touch(tmp_path, "pairs/labels/a.nii.gz", "pairs/images/a_0000.nii.gz")
    (case,) = load_datalist(tmp_path / "pairs")
    assert Path(case["image"]).name == "a_0000.nii.gz" and Path(case["label"]).name == "a.nii.gz"
    touch(tmp_path, "pairs/images/a_0001.nii.gz")
    with pytest.raises(DataError, match=refused):
        load_datalist(tmp_path / "pairs")
    entry = {"image": [f"pairs/images/{name}" for name in channels], "label": "pairs/labels/a.nii.gz"}
    with pytest.raises(DataError, match="2 channels of 'pairs/labels/a.nii.gz'.*choose one channel"):
        load_datalist(write_json(tmp_path / "list.json", {"training": [entry]}))
    # In a folder of any name they may as well be numbers; of pictures they are.
    touch(tmp_path, *(f"flat/{name}" for name in (*channels, "f_0000.png", "f_0001.png")))
    assert len(load_datalist(tmp_path / "flat", require_labels=False)) == 4
    (record,) = caplog.records
    assert "a_0000.nii.gz, a_0001.nii.gz may be channels of one case" in record.message


def test_a_dataset_json_without_images_is_told_what_it_lacks(tmp_path):
    write_json(tmp_path / "dataset.json", {"labels": {"1": "disc"}, "name": "x"})
    with pytest.raises(DataError, match=r"dataset.json has 'labels', 'name', but neither lists of images such as"):
        load_datalist(tmp_path)


def test_folder_without_a_pair_is_an_error_that_explains_layouts(tmp_path):
    touch(tmp_path, "images/a.png", "labels/b.png")
    with pytest.raises(
        DataError,
        match=r"dataset.json.*images/ and labels/.*datalist JSON.*1 image \(images/a.png\).*1 label \(labels/b.png\)",
    ):
        load_datalist(tmp_path)
    with pytest.raises(DataError, match=r"datalist JSON.*1 images and no label.*images/"):
        load_datalist(touch(tmp_path / "unlabelled", "images/a.png"))
    with pytest.raises(DataError, match="no such file or folder"):
        load_datalist(tmp_path / "missing")
    with pytest.raises(DataError, match="images/ and labels/.*x.png"):
        load_datalist(touch(tmp_path / "flat", "x.png"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="an empty folder"):
        load_datalist(tmp_path / "empty", require_labels=False)


def test_equal_stems_need_labels_that_tell_them_apart(tmp_path):
    touch(tmp_path, "images/a.png", "images/a.nii.gz", "labels/a.png")
    with pytest.raises(DataError, match=r"one image for each label.*a.nii.gz.*a.png.*labels/a.png.*different stems"):
        load_datalist(tmp_path)
    touch(tmp_path, "labels/a_mask.nii.gz")
    cases = load_datalist(tmp_path)
    pairs = [(case["name"], Path(case["label"]).name) for case in cases]
    assert pairs == [("a.nii.gz", "a_mask.nii.gz"), ("a.png", "a.png")]
    for label in (tmp_path / "labels").iterdir():
        label.unlink()
    assert names(load_datalist(tmp_path, require_labels=False)) == ["a.nii.gz", "a.png"]


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


@pytest.mark.parametrize(
    ("stem", "patient"),
    [
        ("patient001_frame01", "patient001"),
        ("Patient-12-lat", "Patient-12"),
        ("sub-03_ses-1_T1w", "sub-03"),
        ("pat_12", "pat_12"),
        ("subject3.left", "subject3"),
        ("case_0001_0000", "case_0001"),
        ("STS_001_CT", "STS_001"),
        ("TCGA-AB-1234-01", "TCGA-AB-1234"),
        *((stem, stem) for stem in ("benign_12", "d1_001", "hippocampus_001", "CHNCXR_0001_0", "500_HC", "case_study")),
        *((stem, stem) for stem in ("pattern_3", "patch1_2", "subset_1", "my_patient001", "case12b", "01", "sub-")),
    ],
)
def test_patient_is_recognised_at_the_start_of_the_stem(tmp_path, stem, patient):
    assert load_datalist(paired(tmp_path, stem))[0]["patient"] == patient


def test_files_called_alike_are_told_apart_by_their_folders(tmp_path):
    touch(tmp_path, *(f"sub-0{n}/{name}.nii.gz" for n in (1, 2) for name in ("image", "label")))
    entries = [{"image": f"sub-0{n}/image.nii.gz", "label": f"sub-0{n}/label.nii.gz"} for n in (1, 2)]
    cases = load_datalist(write_json(tmp_path / "list.json", {"training": entries}))
    assert [case["patient"] for case in cases] == ["sub-01", "sub-02"] and len(set(names(cases))) == 2


def test_dataset_json_with_names_alone_leaves_pairs_to_the_folders(tmp_path):
    write_json(paired(tmp_path, "a") / "dataset.json", {"labels": {"1": "disc"}})
    assert names(load_datalist(tmp_path)) == ["a"] and class_names(tmp_path) == {1: "disc"}


def test_sound_folders_give_no_warning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load_datalist(paired(tmp_path, "a", "b"))) == 2
