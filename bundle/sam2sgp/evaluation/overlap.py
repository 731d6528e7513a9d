"""Dice of two class maps by counting alone, for where the other figures of `metrics` would take too long."""

from collections.abc import Iterable

import numpy as np


def dice_of_values(found: np.ndarray, truth: np.ndarray, values: Iterable[int]) -> dict[int, float]:
    """Dice = ``2|P∩T| / (|P| + |T|)`` of each class that is in at least one of two maps.

    Args:
        found, truth: class values, of one shape.
        values: of the classes to measure, greater than 0.

    Returns:
        Dice by class value, in the order given; classes that neither map holds are missing.

    Raises:
        ValueError: the maps differ in shape.

    Example:
        >>> dice_of_values(np.array([1, 1, 0, 0]), np.array([1, 0, 0, 2]), [1, 2, 3])
        {1: 0.6666666666666666, 2: 0.0}
    """
    if found.shape != truth.shape:
        raise ValueError(f"the maps differ in shape: {found.shape} and {truth.shape}")
    dice = {}
    for value in values:
        of_found, of_truth = found == value, truth == value
        size = np.count_nonzero(of_found) + np.count_nonzero(of_truth)
        if size:
            dice[int(value)] = 2 * np.count_nonzero(of_found & of_truth) / size
    return dice
