"""Connected parts of masks of whole volumes.

In: masks or class maps (Z, H, W). Out: the largest part, and how much of each class it holds. Voxels are connected over
faces, not over edges or corners.
"""

import numpy as np
from scipy.ndimage import find_objects, label

# Voxels counted at a time: NumPy counts in a copy of eight bytes a voxel, which of a long volume is gigabytes.
COUNTED_AT_A_TIME = 1 << 22


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


def _parts(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number of the part that each voxel belongs to (0: none), and the voxels of each part, from number 1 on."""
    numbers, count = label(mask)
    sizes = np.zeros(count + 1, np.int64)
    for start in range(0, numbers.size, COUNTED_AT_A_TIME):
        sizes += np.bincount(numbers.ravel()[start : start + COUNTED_AT_A_TIME], minlength=count + 1)
    return numbers, sizes[1:]
