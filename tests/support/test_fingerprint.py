"""The fingerprint of a support set."""

from types import SimpleNamespace

import pytest
import torch

from sam2sgp.support.fingerprint import SMALLEST_TILE, SOME_PARTS, ImageMeasures, fingerprint, tile_share


def item(label, patient="a", is_slice=False):
    return SimpleNamespace(patient=patient, group="g", measures=ImageMeasures.of(label, is_slice))


def label(height, width, *boxes):
    values = torch.zeros(height, width, dtype=torch.uint8)
    for value, top, bottom, left, right in boxes:
        values[top:bottom, left:right] = value
    return values


def test_measures_of_a_wide_bar_and_of_three_dots():
    measures = ImageMeasures.of(
        label(100, 200, (1, 10, 20, 50, 150), (2, 50, 54, 10, 14), (2, 60, 64, 10, 14), (2, 60, 64, 100, 104)), False
    )
    bar, dots = measures.targets[1], measures.targets[2]
    assert (bar.count, bar.area_share, bar.extent_share) == (1, 0.05, 0.5)
    assert bar.part_share == pytest.approx(1000**0.5 / 200)
    assert bar.thickness == pytest.approx(2 * 1000 / 216, abs=1e-3)  # 216 of its pixels are at its border
    assert (dots.count, dots.part_share) == (3, 4 / 200)
    assert dots.extent_share == pytest.approx(94 / 200)


def test_specks_do_not_count_as_parts_unless_there_is_nothing_else():
    specks = [(1, 30, 31, 30, 31), (1, 30, 36, 40, 46)]
    speckled = ImageMeasures.of(label(50, 50, (1, 0, 20, 0, 20), *specks), False).targets[1]
    assert (speckled.count, speckled.part_share) == (1, 20 / 50)
    assert ImageMeasures.of(label(50, 50, (1, 30, 31, 30, 31)), False).targets[1].count == 1


def test_a_fingerprint_holds_medians_over_the_images_that_hold_a_class():
    items = [
        item(label(100, 100, (1, 10, 20, 10, 20)), "a"),
        item(label(200, 200, (1, 10, 40, 10, 40)), "b"),
        item(label(400, 400, (1, 10, 20, 10, 20), (2, 100, 300, 100, 300)), "b", is_slice=True),
    ]
    found = fingerprint(items)
    assert (found.images, found.patients, found.groups, found.has_volumes) == (3, 2, 1, True)
    assert (found.height, found.width) == (200, 200)
    assert (found.targets[1].images, found.targets[2].images) == (3, 1)
    assert found.targets[1].extent_share == pytest.approx(0.1)
    assert found.targets[2].area_share == pytest.approx(0.25)
    assert found.targets[1].thickness_share == pytest.approx(found.targets[1].thickness / 100)


def test_measures_survive_json_and_an_empty_label():
    measures = ImageMeasures.of(label(30, 40, (7, 1, 5, 1, 9)), True)
    assert ImageMeasures.of_json(measures.to_json()) == measures
    empty = ImageMeasures.of(label(30, 40), True)
    assert empty.targets == {}
    assert fingerprint([]).images == 0


def test_small_and_many_parts_are_seen_in_tiles_and_one_large_object_is_not():
    assert tile_share(0.1, 7, 0.05, 256) is None
    assert tile_share(0.1, 8, 0.05, 256) == tile_share(0.1, 4, 0.05, 256, many=SOME_PARTS) == SMALLEST_TILE
    # As large as lungs.
    assert tile_share(0.1, 20, 0.3, 256) is None
    # Of thin parts their thickness decides.
    assert tile_share(0.02, 1, 0.1, 256) == tile_share(0.02, 20, 0.1, 256) > SMALLEST_TILE
