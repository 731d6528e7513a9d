"""Labels are told from images, and go with them, by their names."""

import unicodedata
from pathlib import Path

import pytest

from sam2sgp.data.folders import load_datalist
from sam2sgp.errors import DataError
from tests.helpers.data_folders import names, pairs_in, said, touch, write, write_json


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["a.png", "a_mask.png", "a_mask_1.png"], "one label for each image.*image a.png.*a_mask.png, a_mask_1.png"),
        (["a.nii.gz", "a_seg.nii.gz", "a-label.nii.gz"], "one label for each image.*merge them into one class map"),
        (["images/a.png", "masks/a_mask.png", "masks/a_seg.png"], "one label for each image.*masks/a_seg.png"),
        (["p/t1.nii.gz", "p/t2.nii.gz", "p/seg.nii.gz"], "one image for each label.*p/t1.nii.gz, p/t2.*t1_seg.nii.gz"),
        (["p/x_t1.nii.gz", "p/x_t2.nii.gz", "p/x_seg.nii.gz"], "one image for each label.*p/x_t1.nii.gz"),
        (["images/a.png", "images/a.jpg", "labels/a.png"], "one image for each label.*images/a.jpg.*different stems"),
        (["sub-1/anat/sub-1_T1w.nii", *(f"derivatives/{p}/sub-1/anat/sub-1_dseg.nii" for p in "ab")], "one label for"),
    ],
)
def test_pairs_that_are_not_certain_are_refused_for_support_and_no_label_is_a_query(tmp_path, files, message):
    write(tmp_path, *files)
    with pytest.raises(DataError, match=message):
        load_datalist(tmp_path)
    queries = load_datalist(tmp_path, require_labels=False)
    assert not [
        case for case in queries if "seg" in case["image"] or "mask" in case["image"] or "labels" in case["image"]
    ]
    used = {case[key] for case in queries for key in ("image", "label") if key in case}
    assert {str(tmp_path / file) for file in files} == used | {str(file.path) for file in queries.skipped}


def test_names_of_labels_are_images_where_the_folder_says_so(tmp_path):
    write(tmp_path, "images/face_mask.png", "images/a.png", "images/a_mask.png")
    queries = load_datalist(tmp_path, require_labels=False)
    assert pairs_in(queries, tmp_path) == {"images/face_mask.png": None, "images/a.png": "images/a_mask.png"}
    write(tmp_path / "flat", "face_mask.png")
    with pytest.raises(DataError, match=r"1 file \(face_mask.png\) of labels' names and no image"):
        load_datalist(tmp_path / "flat", require_labels=False)


def test_equal_stem_is_preferred_to_a_mask_ending(tmp_path):
    touch(tmp_path, "images/a.png", "labels/a.png", "labels/a_mask.png")
    cases = load_datalist(tmp_path)
    assert cases[0]["label"].endswith("labels/a.png") and len(cases) == 1
    assert said(cases, tmp_path) == {"labels/a_mask.png": "another label of a.png is used"}


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_match_in_both_forms_of_unicode(tmp_path, forms):
    image, label = (unicodedata.normalize(form, "Müller") for form in forms)
    touch(tmp_path / "pairs", f"images/{image}.png", f"masks/{label}.png")
    (case,) = load_datalist(tmp_path / "pairs")
    assert case["label"].endswith(f"{label}.png")
    content = {"training": [{"image": f"pairs/images/{label}.png", "label": f"pairs/masks/{image}.png"}]}
    (case,) = load_datalist(write_json(tmp_path / "list.json", content))
    assert Path(case["image"]).is_file() and Path(case["label"]).is_file()


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
