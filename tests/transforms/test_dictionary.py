"""The dictionary transforms: what they refuse, and in how many bytes they carry labels."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from sam2sgp.data.io import limits
from sam2sgp.errors import DataError, TooLargeError
from sam2sgp.support.items import prepare_items
from sam2sgp.transforms import FitToSquared, LoadCased, OutputNames, ScaleIntensityByModalityd
from tests.helpers.nifti_files import save_nifti


def test_many_tiny_slices_are_refused_before_they_fill_the_memory(monkeypatch):
    """A file of one megabyte holds a million slices of 4 x 4, of which each becomes a square of the network's size."""
    monkeypatch.setattr(limits, "default_memory", lambda: 1 << 20)
    fit = FitToSquared(size=64)
    case = {"geometry": SimpleNamespace(spacing=None, slice_axis=2), "source": "tiny.nii.gz"}
    assert fit({**case, "image": torch.rand(128, 1, 4, 4)})["image"].shape == (128, 1, 64, 64)
    for image in (torch.rand(129, 1, 4, 4), torch.rand(43, 3, 4, 4)):
        with pytest.raises(TooLargeError, match="tiny.nii.gz: expected an image of at most 2 MB in memory"):
            fit({**case, "image": image})


@pytest.mark.parametrize("highest, dtype", [(255, torch.uint8), (256, torch.int32), (65535, torch.int32)])
def test_labels_are_carried_in_as_few_bytes_as_their_values_need(tmp_path, highest, dtype):
    values = np.zeros((8, 6, 4), np.int32)
    values[2:6, 1:4, 1:3], values[0, 0, 3] = highest, 254
    case = {"image": save_nifti(tmp_path / "image.nii.gz", np.zeros((8, 6, 4), np.int16))}
    case["label"] = save_nifti(tmp_path / "label.nii.gz", values)
    case = FitToSquared(size=16)(ScaleIntensityByModalityd()(LoadCased()(case)))
    assert case["label"].dtype == case["label_full"].dtype == dtype
    for label in (case["label"], case["label_full"]):
        assert label.unique().tolist() == [0, 254, highest]
    assert int((case["label_full"] == highest).sum()) == 24 and int((case["label"] == highest).sum()) == 96
    if highest == 255:
        listing, items = prepare_items(case, 2)
        assert listing.values == (0, 254, 255) and listing.main_shares == {254: 1.0, 255: 1.0}
        assert {value for item in items for value in item.label.unique().tolist()} == {0, 254, 255}


@pytest.mark.parametrize("labelled, is_sparse", [(range(2, 7), False), ([4], True), ([2, 4, 6], True)])
def test_of_a_volume_labelled_on_single_slices_the_others_are_not_taken_as_empty(tmp_path, labelled, is_sparse):
    """A ball's other slices show it, too; taken as empty, they taught the object gate to cut it: Dice .26 for .99."""
    image = np.random.default_rng(0).normal(size=(16, 16, 9)).astype(np.float32)
    label = np.zeros(image.shape, np.uint8)
    label[4:12, 4:12, list(labelled)] = 1
    case = {"image": save_nifti(tmp_path / "image.nii.gz", image)}
    case["label"] = save_nifti(tmp_path / "label.nii.gz", label)
    case = FitToSquared(size=16)(ScaleIntensityByModalityd()(LoadCased()(case)))
    assert [sentence[:19] for sentence in case["warnings"]] == ["Only single slices "] * is_sparse
    listing, items = prepare_items(case, 9)
    assert sum(not info.holds for info in listing.items) == (0 if is_sparse else 4)
    assert sum(bool(info.holds) for info in listing.items) == len(labelled) == len(items) - (0 if is_sparse else 4)
    assert listing.main_shares == ({} if is_sparse else {1: 1.0})


@pytest.mark.parametrize("orientation, is_said", [(1, False), (3, True), (4, True), (6, True)])
def test_a_label_that_may_be_drawn_on_a_turned_picture_as_stored_is_said(tmp_path, orientation, is_said):
    """Turned by half, or square, a picture has one size as stored and as displayed, so nothing else tells."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 20)).astype(np.uint8))
    picture.save(tmp_path / "image.png", exif=exif)
    for name, options in (("plain.png", {}), ("turned.png", {"exif": exif})):
        Image.fromarray(np.eye(20, dtype=np.uint8)).save(tmp_path / name, **options)
        warnings = LoadCased()({"image": tmp_path / "image.png", "label": tmp_path / name})["warnings"]
        said = ["An EXIF tag turns it f"] * (is_said and name == "plain.png")
        assert [sentence[:22] for sentence in warnings] == said


def test_names_of_results_differ_in_more_than_case_and_form_of_unicode(tmp_path):
    """Where the folder of results lies on a file system that doesn't tell these, one would replace the other."""
    sources = ["a/Anna.nii.gz", "b/anna.nii.gz", "c/Zo\u00eb.png", "d/Zoe\u0308.png"]
    names = OutputNames(str(tmp_path), sources)
    given = [names.claim(source, ".png" if source.endswith("png") else ".nii.gz").name for source in sources]
    assert given == ["Anna.nii.gz", "anna.nii.gz.nii.gz", "Zo\u00eb.png", "Zoe\u0308.png.png"]
    assert names.has(sources[1], ["anna.nii.gz.nii.gz"]) and not names.has(sources[1], ["Anna.nii.gz"])


def test_results_beside_the_queries_never_take_the_name_of_one(tmp_path):
    """The result of x.jpg is x.png, which may be another query, or what somebody drew."""
    sources = [str(tmp_path / name) for name in ("x.jpg", "x.png", "y.jpg")]
    for source in sources:
        Path(source).write_bytes(b"content")
    names = OutputNames(str(tmp_path), sources)
    assert [Path(names.claim(sources[number], ".png")).name for number in (0, 2)] == ["x.jpg.png", "y.png"]
    with pytest.raises(DataError, match="x.png: expected a folder for results, found the query there"):
        names.claim(sources[1], ".png")


def test_a_grey_border_of_a_white_mask_is_said(tmp_path):
    mask = np.zeros((16, 16), np.uint8)
    mask[4:10, 4:10], mask[4, 4:10] = 255, 128
    Image.fromarray(mask).save(tmp_path / "label.png")
    Image.fromarray(mask // 2).save(tmp_path / "image.png")
    [told] = LoadCased()({"image": tmp_path / "image.png", "label": tmp_path / "label.png"})["warnings"]
    assert told.startswith("Value 128 of its label is found only along the border of 255")
