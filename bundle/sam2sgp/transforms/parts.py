"""Connected parts of masks of whole volumes.

In: masks or class maps (Z, H, W). Out: the largest part, and how much of each class it holds. Voxels are connected over
faces, not over edges or corners.
"""

import numpy as np
from scipy.ndimage import find_objects, label


def largest_part(mask: np.ndarray) -> np.ndarray:
    """The largest connected part of a mask (Z, H, W) bool, bool; of an empty mask nothing.

    Example:
        >>> largest_part(np.array([[[True, True, False, True]]])).tolist()
        [[[True, True, False, False]]]
    """
    kept = np.zeros_like(mask)
    for box in find_objects(mask.astype(np.uint8)):
        numbers, count = label(mask[box])
        if count < 2:
            return mask
        kept[box] = numbers == np.bincount(numbers.ravel())[1:].argmax() + 1
    return kept


def main_shares(classes: np.ndarray) -> dict[int, float]:
    """For each class value in a map (Z, H, W), the share of its voxels that its largest connected part holds.

    Example:
        >>> main_shares(np.array([[[0, 7, 7, 7, 0, 7]]]))
        {7: 0.75}
    """
    values, indices = np.unique(classes, return_inverse=True)
    boxes = find_objects(indices.reshape(classes.shape).astype(np.int32) + 1)
    shares = {}
    for value, box in zip(values.tolist(), boxes, strict=True):
        if value:
            mask = classes[box] == value
            shares[int(value)] = round(float(largest_part(mask).sum() / mask.sum()), 4)
    return shares
