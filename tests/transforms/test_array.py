"""The letterbox in the network's square, and the way back."""

import math
from itertools import pairwise

import pytest
import torch

from sam2sgp.transforms import (
    Letterbox,
    class_probabilities,
    label_map,
    to_three_channels,
    uncertainty,
)
from sam2sgp.transforms.array import Region


def test_channels():
    grey = torch.rand(2, 1, 4, 4)
    assert torch.equal(to_three_channels(grey), grey.repeat(1, 3, 1, 1))
    two = torch.rand(2, 4, 4)
    torch.testing.assert_close(to_three_channels(two)[2], two.mean(0))
    assert to_three_channels(torch.rand(5, 4, 4)).shape == (3, 4, 4)


@pytest.mark.parametrize("shape", [(37, 91), (200, 128), (128, 128), (1, 50), (700, 3)])
def test_aspect_is_kept_and_the_way_back_has_the_original_size(shape):
    letterbox = Letterbox.of(shape, 128)
    assert max(letterbox.inner) == 128
    assert letterbox.inner[0] / letterbox.inner[1] == pytest.approx(shape[0] / shape[1], rel=0.5)
    assert letterbox.apply(torch.rand(2, 3, *shape)).shape == (2, 3, 128, 128)
    assert letterbox.restore(torch.rand(2, 3, 128, 128)).shape == (2, 3, *shape)


def test_aspect_is_physical_where_pixels_are_not_square():
    assert Letterbox.of((100, 100), 128, pixel=(2.0, 0.5)).inner == (128, 32)


def test_round_trip_of_a_disc_keeps_place_and_area():
    rows, columns = torch.meshgrid(torch.arange(300), torch.arange(200), indexing="ij")
    disc = ((rows - 100) ** 2 + (columns - 60) ** 2 < 40**2).long()[None]
    letterbox = Letterbox.of((300, 200), 128)
    small = letterbox.apply_label(disc)
    back = (letterbox.restore((small[:, None].float() - 0.5) * 2) > 0)[0, 0].long()
    overlap = 2 * (back * disc[0]).sum() / (back.sum() + disc[0].sum())
    assert overlap > 0.97
    assert back.sum() / disc.sum() == pytest.approx(1.0, abs=0.02)


def test_masks_do_not_shrink_on_the_way_in():
    """Bilinear resizing with truncation, as in the authors' code, loses 9 % of the area."""
    rows, columns = torch.meshgrid(torch.arange(512), torch.arange(512), indexing="ij")
    disc = ((rows - 256) ** 2 + (columns - 256) ** 2 < 60**2).long()[None]
    share = Letterbox.of((512, 512), 128).apply_label(disc).float().mean() / disc.float().mean()
    assert share == pytest.approx(1.0, abs=0.02)


def test_label_values_stay_whole():
    label = torch.randint(0, 7, (1, 50, 80)) * 30
    small = Letterbox.of((50, 80), 64).apply_label(label)
    assert set(small.unique().tolist()) <= set(label.unique().tolist()) | {0}


def test_label_map_takes_the_winner_and_leaves_background_where_none_is_positive():
    logits = torch.tensor([[-1.0, 2.0, 3.0], [-2.0, 5.0, 1.0]]).reshape(1, 2, 1, 3)
    assert label_map(logits).flatten().tolist() == [0, 2, 1]


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_largest_probability_is_the_label_maps_class_and_all_sum_to_one(classes):
    torch.manual_seed(0)
    logits = 4 * torch.randn(3, classes, 40, 50)
    found = class_probabilities(logits)
    assert found.shape == (3, classes + 1, 40, 50) and found.dtype == torch.float16
    assert found.min() >= 0 and found.max() <= 1
    torch.testing.assert_close(found.float().sum(1), torch.ones(3, 40, 50), atol=2e-3, rtol=0)
    assert torch.equal(found.float().argmax(1), label_map(logits).long())
    if classes == 1:
        torch.testing.assert_close(found[:, 1].float(), logits[:, 0].sigmoid(), atol=1e-3, rtol=0)


def test_rounding_to_half_precision_makes_no_tie():
    """Logits that differ by less than a float16 can tell, all above or around the threshold of 0."""
    logits = torch.tensor([[2.0, 1e-6, -1e-6, 0.0, 3.0], [2.000001, 0.0, -2e-6, 0.0, 2.999999]]).reshape(1, 2, 1, 5)
    found = class_probabilities(logits).numpy()
    assert found.argmax(1).flatten().tolist() == label_map(logits).flatten().tolist() == [2, 1, 0, 0, 1]
    last = found[:, ::-1].argmax(1)
    assert (2 - last).flatten().tolist() == [2, 1, 0, 0, 1], "the largest is larger than any other"


def test_uncertainty_is_the_normalised_entropy():
    logits = torch.tensor([[0.0, 20.0, -20.0, 0.0], [0.0, -20.0, -20.0, -20.0]]).reshape(1, 2, 1, 4)
    expected = torch.tensor([1.0, 0.0, 0.0, math.log(2) / math.log(3)])
    torch.testing.assert_close(uncertainty(logits).flatten().float(), expected, atol=1e-3, rtol=0)
    log_odds = torch.linspace(-30, 30, 61).reshape(1, 1, 1, 61)
    found = uncertainty(log_odds).flatten()
    assert found.min() >= 0 and found.max() == found[30] == 1 and (found[:31].diff() >= 0).all()


def test_a_long_image_is_seen_through_overlapping_windows_in_a_row():
    windows = Region.windows((100, 1000), 128)
    assert {(window.place[0].start, window.place[0].stop) for window in windows} == {(0, 100)}
    columns = [window.place[1] for window in windows]
    assert columns[0].start == 0 and columns[-1].stop == 1000
    assert {place.stop - place.start for place in columns} == {100}
    assert all(before.stop - after.start >= 14 for before, after in pairwise(columns))
    assert Region.windows((100, 790), 128) == [] and Region.windows((3, 900), 128) == []
    # By their size in mm, and no more than so many.
    assert Region.windows((100, 1000), 128, pixel=(1.0, 0.5)) == []
    assert len(Region.windows((400, 100), 128, pixel=(2.0, 0.5))) == 19
    assert len(Region.windows((10, 5000), 128)) <= 33
