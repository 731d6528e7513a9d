"""Connected parts of masks of whole volumes.

In: masks or class maps (Z, H, W). Out: the largest part, how much of each class it holds, and whether only single
slices are labelled. Voxels are connected over faces, not over edges or corners.
"""

from collections.abc import Sequence

import numpy as np
from scipy.ndimage import find_objects, label

# Voxels counted at a time: NumPy counts in a copy of eight bytes a voxel, which of a long volume is gigabytes.
COUNTED_AT_A_TIME = 1 << 22
# What is this many times as wide as its slice is thick goes on in the neighbouring slices.
LONE_WIDTH = 2.0


def boxes_of(classes: np.ndarray, largest: int) -> dict[int, tuple[slice, ...]]:
    """The box of each class value 1 to `largest` that is in a map of whole numbers."""
    found = find_objects(classes, largest) if largest > 0 else []
    return {value: box for value, box in enumerate(found, 1) if box is not None}


def largest_part(mask: np.ndarray) -> np.ndarray:
    """The largest connected part of a mask (Z, H, W) bool, bool; of an empty mask nothing.

    Example:
        >>> largest_part(np.array([[[True, True, False, True]]])).tolist()
        [[[True, True, False, False]]]
    """
    numbers, sizes = _parts(mask)
    return numbers == sizes.argmax() + 1 if len(sizes) > 1 else mask


def main_shares(classes: np.ndarray, largest: int) -> dict[int, float]:
    """For each class value 1 to `largest` in a map (Z, H, W), the share of its voxels in its largest connected part.

    Example:
        >>> main_shares(np.array([[[0, 7, 7, 7, 0, 7]]]), 255)
        {7: 0.75}
    """
    shares = {}
    for value, box in boxes_of(classes, largest).items():
        _, sizes = _parts(classes[box] == value)
        shares[value] = round(float(sizes.max() / sizes.sum()), 4)
    return shares


def is_sparse(classes: np.ndarray, spacing: Sequence[float] | None) -> bool:
    """Whether a volume seems to be labelled on single slices only, so that the others may hold the classes, too.

    That is so where, of three slices or more, no two neighbouring ones are labelled, and something labelled is at least
    twice as wide as the slices are apart.

    Args:
        classes: (Z, H, W) class values.
        spacing: (slice, row, column) in mm; None: unknown, then voxels count as cubes.

    Example:
        >>> organ = np.zeros((5, 8, 8), int)
        >>> organ[2, 1:7, 1:7] = 1
        >>> is_sparse(organ, None), is_sparse(organ, (5, 1, 1)), is_sparse(organ[2:3], None)
        (True, False, False)
    """
    sizes = np.array([np.count_nonzero(part) for part in classes])
    is_labelled = sizes > 0
    if len(classes) < 3 or not is_labelled.any() or (is_labelled[1:] & is_labelled[:-1]).any():
        return False
    between, row, column = spacing or (1.0, 1.0, 1.0)
    return bool(np.sqrt(sizes.max() * row * column) >= LONE_WIDTH * between)


def _parts(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number of the part that each voxel belongs to (0: none), and the voxels of each part, from number 1 on."""
    numbers, count = label(mask)
    sizes = np.zeros(count + 1, np.int64)
    for start in range(0, numbers.size, COUNTED_AT_A_TIME):
        sizes += np.bincount(numbers.ravel()[start : start + COUNTED_AT_A_TIME], minlength=count + 1)
    return numbers, sizes[1:]
