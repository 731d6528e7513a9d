"""Dice by counting, for where there is no time for more."""

import numpy as np
import pytest

from sam2sgp.evaluation import case_metrics
from sam2sgp.evaluation.overlap import dice_of_values


def test_it_is_the_dice_of_the_full_measurement():
    rng = np.random.default_rng(0)
    found, truth = (rng.integers(0, 4, (3, 20, 20)).astype(np.uint8) for _ in range(2))
    names = {1: "a", 2: "b", 3: "c"}
    expected = {row["class"]: row["dice"] for row in case_metrics(found, truth, names)}
    assert dice_of_values(found, truth, names) == pytest.approx(expected)


def test_a_class_in_one_map_is_zero_and_one_in_neither_is_left_out():
    found, truth = np.array([[0, 2], [2, 0]]), np.array([[0, 0], [3, 0]])
    assert dice_of_values(found, truth, [3, 2, 9]) == {3: 0.0, 2: 0.0}


def test_maps_of_two_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(2,\) and \(2, 1\)"):
        dice_of_values(np.zeros(2), np.zeros((2, 1)), [1])
