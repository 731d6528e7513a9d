"""Which slices of a labelled volume become support items."""

import numpy as np
import pytest
import torch

from sam2sgp.errors import ConfigError
from sam2sgp.support.fingerprint import ImageMeasures
from sam2sgp.support.items import ItemInfo, Prepared, SupportItem, choose_slices


def test_chosen_slices_are_the_largest_and_an_even_spread_with_both_ends():
    areas = np.zeros(60, int)
    areas[10:51] = 5
    areas[30] = 99
    assert choose_slices(areas, 1) == [30]
    assert choose_slices(areas, 3) == [10, 30, 50]
    assert choose_slices(areas, 5) == [10, 20, 30, 40, 50]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 50])
def test_chosen_slices_are_never_empty_and_never_too_many(count):
    rng = np.random.default_rng(count)
    for _ in range(30):
        areas = rng.integers(0, 9, 40) * (rng.random(40) < 0.5)
        present = np.flatnonzero(areas)
        chosen = choose_slices(areas, count)
        assert chosen == sorted(set(chosen)) and len(chosen) == min(count, len(present))
        assert set(chosen) <= set(present) and int(np.argmax(areas)) in chosen
        if count >= 3 and len(present) > 2:
            assert {present[0], present[-1]} <= set(chosen)
    assert choose_slices(np.zeros(5), count) == []
    with pytest.raises(ConfigError):
        choose_slices(np.ones(5), 0)


def test_a_mirrored_item_is_another_one_with_everything_mirrored():
    image, label = torch.rand(3, 8, 8), torch.zeros(8, 8, dtype=torch.uint8)
    label[2, 1] = 1
    regions = {1: (torch.rand(1, 3, 8, 8), torch.rand(1, 8, 8) > 0.5)}
    info = ItemInfo(None, (1,), (1,), (), ImageMeasures.of(label, False))
    prepared = Prepared(image, label, regions, {})
    item = SupportItem("a", "content", "a.png", "p", "g", {}, info, {}, None, lambda: prepared)
    mirrored = item.mirrored()
    assert mirrored.label.nonzero().tolist() == [[2, 6]] and torch.equal(mirrored.image, image.flip(-1))
    for found, given in zip(mirrored.regions[1], regions[1], strict=True):
        assert torch.equal(found, given.flip(-1))
    assert mirrored.content not in (item.content, mirrored.mirrored().content)
    assert (mirrored.id, mirrored.patient) == ("a", "p")
