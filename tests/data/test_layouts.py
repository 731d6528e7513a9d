"""Folders as people have them: which image goes with which label, and no label is ever a query."""

import json
import logging
from unicodedata import normalize

import numpy as np
import pytest

from sam2sgp.data import load_datalist, load_queries, skipped_in
from sam2sgp.errors import DataError
from tests.helpers.data_folders import pairs_in, write
from tests.helpers.dicom_files import write_series

NNUNET = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1}, "file_ending": ".nii.gz"}
DECATHLON = {"training": [{"image": f"imagesTr/c_{n}.nii.gz", "label": f"labelsTr/c_{n}.nii.gz"} for n in (1, 2)]}

# {layout: ({image: label, or None}, what else is there)}
LAYOUTS = {
    "nnU-Net v2 without lists": (
        {f"imagesTr/liver_{n}_0000.nii.gz": f"labelsTr/liver_{n}.nii.gz" for n in (1, 2)}
        | {"imagesTs/liver_9_0000.nii.gz": None},
        {"dataset.json": {**NNUNET, "numTraining": 2}, "labelsTs/liver_9.nii.gz": None},
    ),
    "Decathlon": (
        {f"imagesTr/c_{n}.nii.gz": f"labelsTr/c_{n}.nii.gz" for n in (1, 2)} | {"imagesTs/c_3.nii.gz": None},
        {"dataset.json": {**DECATHLON, "test": ["imagesTs/c_3.nii.gz"]}},
    ),
    "images and labels": ({"images/a.png": "labels/a.png", "images/b.png": None}, {}),
    "Images and Masks": ({"Images/a.jpg": "Masks/a.png", "Images/s/b.jpg": "Masks/s/b_mask.png"}, {}),
    "imgs and segmentations": ({"imgs/a.nii": "segmentations/a-seg.nii.gz"}, {"imgs/notes.txt": None}),
    "image and label with numbers of their own": ({"image/img0001.nii.gz": "label/label0001.nii.gz"}, {}),
    "training and test folders": (
        {"train/images/a.png": "train/masks/a.png", "test/images/a.png": "test/masks/a.png"},
        {},
    ),
    **{
        f"beside each other, {ending}": (
            {f"case_{n}.nii.gz": f"case_{n}{ending}.nii.gz" for n in (1, 2, 10)} | {"case_3.nii.gz": None},
            {f"case_4{ending}.nii.gz": None},
        )
        for ending in ("_seg", "-label", "-seg", "_gt", "_mask", "_label", ".seg", "_segmentation")
    },
    "numbered volumes and segmentations": ({f"volume-{n}.nii": f"segmentation-{n}.nii" for n in (0, 12)}, {}),
    "slices named by number": ({f"p1_img_{n}.png": f"p1_seg_{n}.png" for n in ("01", "02")}, {}),
    "the word first": ({"anna.png": "seg_anna.png", "seg_berta.png": None}, {}),
    "one folder a case": (
        {
            "patient01/image.nii.gz": "patient01/seg.nii.gz",
            "patient02/t1.nii.gz": "patient02/label.nii.gz",
            "patient03/ct.nii.gz": "patient03/mask.nii.gz",
            "patient04/ct.nii.gz": None,
        },
        {},
    ),
    "folders and files of one case's name": (
        {"B_001/B_001_flair.nii.gz": "B_001/B_001_seg.nii.gz", "B_002/B_002_flair.nii.gz": "B_002/B_002_seg.nii.gz"},
        {},
    ),
    "BIDS": (
        {
            f"sub-0{n}/anat/sub-0{n}_T1w.nii.gz": f"derivatives/manual/sub-0{n}/anat/sub-0{n}_desc-lesion_dseg.nii.gz"
            for n in (1, 2)
        }
        | {"sub-01/anat/sub-01_T2w.nii.gz": None, "sub-03/ses-1/anat/sub-03_ses-1_T1w.nii.gz": None},
        {
            "dataset_description.json": {},
            "participants.tsv": None,
            "derivatives/manual/sub-01/anat/sub-01_space-MNI152NLin6Asym_dseg.nii.gz": None,
            "derivatives/fmriprep/sub-01/anat/sub-01_desc-preproc_T1w.nii.gz": None,
            "derivatives/fmriprep/sub-01/anat/sub-01_label-GM_probseg.nii.gz": None,
        },
    ),
    "3D Slicer": ({"a.nrrd": "a.seg.nrrd", "b.nrrd": "b-label.nrrd"}, {"scene.mrml": None}),
    "3D Slicer, a scene a folder": (
        {"a/4 Chest.nrrd": "a/Segmentation.seg.nrrd", "b/5 Chest.nrrd": "b/Segmentation_1.seg.nrrd"},
        {"a/Scene.mrml": None},
    ),
    "ITK-SNAP": (
        {"a/t1.nii.gz": "a/t1_seg.nii.gz", "a/t2.nii.gz": None, "b/t1.nii.gz": "b/segmentation.nii.gz"},
        {"a/work.itksnap": None, "b/labels.txt": None},
    ),
    "two forms of Unicode": ({normalize("NFC", "images/Müller.png"): normalize("NFD", "masks/Müller.png")}, {}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pairs_of_a_layout_are_found_and_no_label_is_a_query(tmp_path, layout):
    pairs, more = LAYOUTS[layout]
    write(tmp_path, *pairs, *filter(None, pairs.values()), *more)
    for name, content in more.items():
        if content is not None:
            (tmp_path / name).write_text(json.dumps(content), encoding="utf-8-sig")
    support = load_datalist(tmp_path)
    assert pairs_in(support, tmp_path) == {image: label for image, label in pairs.items() if label}
    queries = load_datalist(tmp_path, require_labels=False)
    assert pairs_in(queries, tmp_path).keys() == pairs.keys()
    # Everything is used by one of both, or said.
    used = {case[key] for cases in (queries, support) for case in cases for key in ("image", "label") if key in case}
    told = {file.path for file in skipped_in(queries, support)}
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        assert str(path) in used or told & {path, *path.parents} or path.name in ("dataset.json", "labels.txt"), path
    # The labelled images are not segmented, unless that is asked for.
    rest = [image for image, label in pairs.items() if label is None]
    if rest:
        assert sorted(pairs_in(load_queries(tmp_path, support), tmp_path)) == sorted(rest)
    else:
        with pytest.raises(DataError, match="all in the support set.*--segment_labelled True"):
            load_queries(tmp_path, support)
    assert pairs_in(load_queries(tmp_path, support, segment_labelled=True), tmp_path).keys() == pairs.keys()


def test_a_dicom_series_goes_with_the_label_in_its_folder_or_beside_it(tmp_path):
    write_series(tmp_path / "p1", np.zeros((3, 4, 4), np.uint16))
    write_series(tmp_path / "p2/ct", np.zeros((3, 4, 4), np.uint16))
    write(tmp_path, "p1/seg.nii.gz", "p2/mask.nii.gz")
    expected = {"p1": "p1/seg.nii.gz", "p2/ct": "p2/mask.nii.gz"}
    assert pairs_in(load_datalist(tmp_path), tmp_path) == expected
    assert pairs_in(load_datalist(tmp_path, require_labels=False), tmp_path).keys() == expected.keys()


@pytest.mark.parametrize(
    ("files", "seen"),
    [
        (["a.png", "b.png"], r"2 images \(a.png, b.png\) and no label.*a_seg.nii.gz"),
        (["a_seg.png"], r"0 images and 1 label \(a_seg.png\).*put the images beside them"),
        (["a.png", "b_seg.png"], r"1 image \(a.png\) and 1 label \(b_seg.png\).*a_seg.png"),
        (["scans/a.png", "outlines/a.png", "scans/b.png", "outlines/b.png"], "outlines/ and scans/ have 2 names in"),
        (["a.png", "a.jpg", "b.png"], r"1 names are there in two formats \(a.\*\)"),
        (["readme.txt"], "found readme.txt"),
    ],
)
def test_a_refusal_shows_what_was_seen_and_the_nearest_layout(tmp_path, files, seen):
    write(tmp_path, *files)
    with pytest.raises(DataError, match=rf"expected a folder with dataset.json.*found.*{seen}|{seen}"):
        load_datalist(tmp_path)


def test_a_folder_of_labels_is_no_folder_of_queries(tmp_path):
    write(tmp_path, "images/a.png", "labels/a.png")
    with pytest.raises(DataError, match="folder of labels by its name, with images/ beside it"):
        load_datalist(tmp_path / "labels", require_labels=False)


def test_the_number_and_the_ending_that_nnunet_states_are_compared(tmp_path, caplog):
    write(tmp_path, "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz", "imagesTr/a.png")
    (tmp_path / "dataset.json").write_text(json.dumps({**NNUNET, "numTraining": 5}))
    cases = load_datalist(tmp_path)
    assert pairs_in(cases, tmp_path) == {"imagesTr/a_0000.nii.gz": "labelsTr/a.nii.gz"}
    assert [file.why for file in cases.skipped] == ["not of the ending .nii.gz that dataset.json gives"]
    assert "numTraining 5, found 1 images with labels" in caplog.text


def test_an_image_that_is_support_and_query_is_left_out_or_warned_of(tmp_path, caplog):
    write(tmp_path, "s/images/a.png", "s/labels/a.png", "s/images/b.png", "q/new.png", "q/copy.png")
    (tmp_path / "q/new.png").write_bytes(b"other")
    support = load_datalist(tmp_path / "s")
    left = load_queries(tmp_path / "s", support)
    assert [case["name"] for case in left] == ["b"]
    with caplog.at_level(logging.WARNING):
        told = skipped_in(left, support)
    assert [(file.path.name, file.why.partition(";")[0]) for file in told] == [
        ("a.png", "a labelled image of the support set")
    ]
    assert caplog.text.count("a.png") == 1
    (asked, _) = load_queries(tmp_path / "s", support, segment_labelled=True)
    assert "its own label guides it" in asked["warnings"][0]
    copy, new = load_queries(tmp_path / "q", support)
    assert f"support set ({support[0]['image']})" in copy["warnings"][0] and "warnings" not in new


def test_equal_stems_among_queries_are_warned_of(tmp_path):
    write(tmp_path, "a.jpg", "a.png", "b.png")
    first, second, third = load_datalist(tmp_path, require_labels=False)
    assert "a.png has the same stem" in first["warnings"][0] and "a.jpg has" in second["warnings"][0]
    assert "warnings" not in third
