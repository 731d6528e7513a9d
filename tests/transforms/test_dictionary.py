"""The dictionary transforms: what they refuse."""

from types import SimpleNamespace

import pytest
import torch

from sam2sgp.data.io import limits
from sam2sgp.errors import TooLargeError
from sam2sgp.transforms import FitToSquared


def test_many_tiny_slices_are_refused_before_they_fill_the_memory(monkeypatch):
    """A file of one megabyte holds a million slices of 4 x 4, of which each becomes a square of the network's size."""
    monkeypatch.setattr(limits, "default_memory", lambda: 1 << 20)
    fit = FitToSquared(size=64)
    case = {"geometry": SimpleNamespace(spacing=None), "source": "tiny.nii.gz"}
    assert fit({**case, "image": torch.rand(128, 1, 4, 4)})["image"].shape == (128, 1, 64, 64)
    for image in (torch.rand(129, 1, 4, 4), torch.rand(43, 3, 4, 4)):
        with pytest.raises(TooLargeError, match="tiny.nii.gz: expected an image of at most 2 MB in memory"):
            fit({**case, "image": image})
