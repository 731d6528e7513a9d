"""Data sets that a JSON file lists: MONAI's, the Decathlon's and nnU-Net's."""

import json
from pathlib import Path

import pytest

from sam2sgp.data.classes import class_names
from sam2sgp.data.folders import load_datalist
from sam2sgp.errors import DataError
from tests.helpers.data_folders import names, nnunet, paired, said, touch, write_json


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-8"])
def test_json_is_read_with_a_byte_order_mark(tmp_path, encoding):
    paired(tmp_path, "a")
    (tmp_path / "labels.json").write_text(json.dumps({"1": "Läsion"}), encoding=encoding)
    assert class_names(tmp_path) == {1: "Läsion"}


def test_nnunet_folder_that_lists_its_cases(tmp_path):
    listed = {"a": {"images": ["imagesTr/liver_001_0000.nii.gz"], "label": "labelsTr/liver_001.nii.gz"}}
    nnunet(tmp_path, dataset=listed)
    cases = load_datalist(tmp_path)
    assert [Path(case["label"]).name for case in cases] == ["liver_001.nii.gz"] and cases[0]["modality"] == "CT"
    unlisted = said(cases, tmp_path)
    assert unlisted["imagesTr/liver_000_0000.nii.gz"] == "not listed in dataset.json" and len(unlisted) == 3
    listed["a"]["images"].append("imagesTr/liver_002_0000.nii.gz")
    with pytest.raises(DataError, match="2 channels of 'a'"):
        load_datalist(nnunet(tmp_path, dataset=listed))


def test_decathlon_folder(tmp_path):
    touch(tmp_path, *(f"imagesTr/c_{n}.nii.gz" for n in range(10)), *(f"labelsTr/c_{n}.nii.gz" for n in range(10)))
    touch(tmp_path, "imagesTs/c_90.nii.gz", "imagesTs/c_91.nii.gz")
    content = {
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "liver", "2": "tumour"},
        "training": [{"image": f"./imagesTr/c_{n}.nii.gz", "label": f"./labelsTr/c_{n}.nii.gz"} for n in range(10)],
        "test": ["./imagesTs/c_90.nii.gz", {"image": "./imagesTs/c_91.nii.gz"}],
    }
    write_json(tmp_path / "dataset.json", content)
    cases = load_datalist(tmp_path)
    assert len(cases.skipped) == 2 and {file.why for file in cases.skipped} == {"an image without a label"}
    assert len(cases) == 10 and {case["modality"] for case in cases} == {"CT"}
    assert cases[0]["image"] == str(tmp_path / "imagesTr/c_0.nii.gz")
    assert len(load_datalist(tmp_path, require_labels=False)) == 12
    assert class_names(tmp_path) == {1: "liver", 2: "tumour"}
    content["labels"] = {"background": 0, "tumour": 2, "liver": 1}
    content["modality"] = {"0": "FLAIR", "1": "T1"}
    write_json(tmp_path / "dataset.json", content)
    assert class_names(tmp_path) == {1: "liver", 2: "tumour"} == class_names(tmp_path / "dataset.json")
    assert "modality" not in load_datalist(tmp_path, require_labels=False)[0]


def test_json_sections_with_labels_are_kept_and_the_rest_is_split(tmp_path):
    stems = [f"s{n}" for n in range(20)]
    data = paired(tmp_path / "data", *stems)
    entry = {stem: {"image": f"images/{stem}.jpg", "label": f"labels/{stem}.png"} for stem in stems}
    content = {
        "root": "data",
        "training": [entry[stem] for stem in stems[:16]],
        "validation": [entry[stem] for stem in stems[16:18]],
        "testing": [{"image": entry[stem]["image"]} for stem in stems[18:]],
    }
    path = write_json(tmp_path / "list.json", content)
    sections = {section: names(load_datalist(path, section)) for section in ("train", "val", "test")}
    assert sections["val"] == ["s16", "s17"]
    assert len(sections["test"]) == 3 and sorted(sections["train"] + sections["test"]) == sorted(stems[:16])
    assert load_datalist(path, "val", require_labels=False)[0]["image"] == str(data / "images/s16.jpg")


def test_patient_group_and_modality_of_the_json_win(tmp_path):
    paired(tmp_path, "patient1_a", "patient1_b", "patient1_c")
    pairs = [{"image": f"images/patient1_{k}.jpg", "label": f"labels/patient1_{k}.png"} for k in "abc"]
    pairs[0] |= {"patient_id": 7, "group": "heart", "modality": "MR"}
    pairs[1] |= {"subject": "x"}
    cases = load_datalist(write_json(tmp_path / "list.json", {"training": pairs}))
    assert [case["patient"] for case in cases] == ["7", "x", "patient1"]
    assert [case["group"] for case in cases] == ["heart", tmp_path.name, tmp_path.name]
    assert cases[0]["modality"] == "MR"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "can't be read"),
        ("[]", "JSON object"),
        ('{"cases": []}', "keys"),
        ('{"training": []}', "found none"),
        ('{"training": [{"label": "a.png"}]}', "one `image`"),
        ('{"training": [{"image": "a.png"}]}', "listed image.*a.png"),
    ],
)
def test_wrong_json_is_an_error_that_names_it(tmp_path, content, message):
    (tmp_path / "list.json").write_text(content)
    with pytest.raises(DataError, match=f"list.json: .*{message}"):
        load_datalist(tmp_path / "list.json")
