"""Data folders become datalists: pairs, patients, sections, class names."""

import warnings
from pathlib import Path

import pytest

from sam2sgp.data.classes import class_names
from sam2sgp.data.folders import load_datalist, skipped_in
from sam2sgp.errors import DataError
from tests.helpers.data_folders import names, nnunet, paired, said, touch, write_json


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


def test_queries_and_supports_say_each_file_once_and_none_that_the_other_uses(tmp_path, caplog):
    paired(tmp_path, "a")
    touch(tmp_path, "images/b.png", "labels/c.png")
    queries, support = load_datalist(tmp_path, require_labels=False), load_datalist(tmp_path)
    assert [file.path.name for file in skipped_in(queries, support)] == ["c.png"]
    assert [record.message.count("c.png") for record in caplog.records] == [1]
    # Whoever gives a list of his own has nothing to say.
    assert skipped_in([{"image": "x.png"}]) == []


def test_files_that_are_left_out_for_one_reason_are_one_line_of_the_log(tmp_path, caplog):
    paired(tmp_path, "a")
    touch(tmp_path, *(f"images/c{number}.png" for number in range(7)), "labels/d.png")
    assert len(skipped_in(load_datalist(tmp_path))) == 8
    assert sorted(record.getMessage() for record in caplog.records) == [
        f"Not used: {tmp_path}/labels/d.png: a label without an image of its name.",
        f"Not used: 7 in {tmp_path}/images (c0.png, c1.png, c2.png, c3.png, c4.png and 2 more): "
        "an image without a label.",
    ]


def test_nnunet_folder(tmp_path):
    cases = load_datalist(nnunet(tmp_path))
    assert [Path(case["label"]).name for case in cases] == [f"liver_00{n}.nii.gz" for n in range(3)]
    assert {case["modality"] for case in cases} == {"CT"} and class_names(tmp_path) == {1: "liver"}
    assert len(load_datalist(tmp_path, require_labels=False)) == 4
    touch(tmp_path, "imagesTr/liver_001_0001.nii.gz")
    with pytest.raises(DataError, match="2 channels of 'liver_001'.*liver_001_0000.*choose one channel"):
        load_datalist(tmp_path)


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
