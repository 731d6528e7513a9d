"""Plain pictures (40, 40) and class maps to draw on them."""

import numpy as np

GREY = 90


def plain(height: int = 40, width: int = 40) -> np.ndarray:
    return np.full((height, width, 3), GREY, dtype=np.uint8)


def square_map(value: int = 1, start: int = 10, side: int = 20) -> np.ndarray:
    labels = np.zeros((40, 40), dtype=np.uint8)
    labels[start : start + side, start : start + side] = value
    return labels
