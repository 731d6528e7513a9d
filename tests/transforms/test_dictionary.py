"""The dictionary transforms: what they refuse, and in how many bytes they carry labels."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sam2sgp.data.io import limits
from sam2sgp.errors import TooLargeError
from sam2sgp.support.items import prepare_items
from sam2sgp.transforms import FitToSquared, LoadCased, ScaleIntensityByModalityd
from tests.helpers.nifti_files import save_nifti


def test_many_tiny_slices_are_refused_before_they_fill_the_memory(monkeypatch):
    """A file of one megabyte holds a million slices of 4 x 4, of which each becomes a square of the network's size."""
    monkeypatch.setattr(limits, "default_memory", lambda: 1 << 20)
    fit = FitToSquared(size=64)
    case = {"geometry": SimpleNamespace(spacing=None), "source": "tiny.nii.gz"}
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
