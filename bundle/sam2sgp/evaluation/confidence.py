"""How sure a result is of itself: the mean probability of each class where it was found."""

import numpy as np

# A result of less than this is marked in the report, and a single image is segmented again: below it lie most of the
# results that fail, see docs/results.md.
LOW_CONFIDENCE = 0.85


def confidence_sums(classes: np.ndarray, probability: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """What mean confidences are made of, also of a result that comes in parts.

    Args:
        classes: class indices 0..C of pixels, of any shape. probability: of the class that each pixel has, in [0, 1].
        count: the number of classes with the background, C + 1.

    Returns:
        Per class index, the sum of the probabilities, and of how many pixels.

    Example:
        >>> sums, counts = confidence_sums(np.array([0, 1, 1]), np.array([0.1, 0.8, 0.6]), 3)
        >>> sums.round(2).tolist(), counts.tolist()
        ([0.1, 1.4, 0.0], [1, 2, 0])
    """
    flat = classes.ravel()
    return np.bincount(flat, probability.ravel().astype(float), count), np.bincount(flat, minlength=count)


def is_doubtful(classes: np.ndarray, probability: np.ndarray, count: int) -> bool:
    """Whether a class that was found has a low mean confidence; arguments as of `confidence_sums`.

    Example:
        >>> is_doubtful(np.array([0, 1, 1]), np.array([0.1, 0.9, 0.9]), 3)
        False
        >>> is_doubtful(np.array([0, 1, 2]), np.array([0.1, 0.9, 0.6]), 3)
        True
        >>> is_doubtful(np.array([0, 0]), np.array([0.1, 0.1]), 3)
        False
    """
    sums, counts = confidence_sums(classes, probability, count)
    found = counts[1:] > 0
    return bool((sums[1:][found] < LOW_CONFIDENCE * counts[1:][found]).any())
