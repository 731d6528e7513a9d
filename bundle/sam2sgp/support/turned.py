"""Whether the labels of a support set lie turned or mirrored on their images, as tools that swap axes store them.

Where sizes and headers agree, nothing but the pixels tells. Outlines lie on edges: `edge_fits` measures how strong the
image's gradient is along a label's outlines, for the label as it is and for the label turned in each way that fits the
image's size, and `how_turned` concludes from all labels of a set together. One label alone tells nothing.
"""

from collections.abc import Iterable, Mapping

import numpy as np
from scipy.ndimage import gaussian_gradient_magnitude

AS_STORED = "as stored"
# Turns of slices (H, W) as displayed; those that exchange rows and columns are for squares only.
TURNS = {
    AS_STORED: lambda labels: labels,
    "mirrored top to bottom": lambda labels: labels[::-1],
    "mirrored left to right": lambda labels: labels[:, ::-1],
    "turned by 180 degrees": lambda labels: labels[::-1, ::-1],
    "with rows and columns exchanged": lambda labels: labels.T,
    "with rows and columns exchanged and turned by 180 degrees": lambda labels: labels[::-1, ::-1].T,
    "turned by 90 degrees": lambda labels: np.rot90(labels),
    "turned by 270 degrees": lambda labels: np.rot90(labels, 3),
}
REVERSED = "with the order of slices reversed"
# Slices of a volume, and pixels of their longer side, that are looked at.
MOST_SLICES, LONGEST = 12, 256
# A turn is told where so many labels or more, and of these such a share, fit better with it, on average by so much and
# so well: of a few labels without edges there is always a turn with which they fit better, and none with which well.
LEAST_CASES, LEAST_SHARE, LEAST_GAIN, LEAST_FIT = 3, 0.8, 0.05, 0.6


def edge_fits(image: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Mean rank (0..1) of the image's gradient along a label's outlines, among all pixels of the slice, by turn.

    Args:
        image: (Z, C, H, W). labels: (Z, H, W) class map.

    Returns:
        {} for a label without outlines.
    """
    held = np.flatnonzero(labels.any(axis=(1, 2)))
    if not held.size:
        return {}
    held = held[np.unique(np.linspace(0, len(held) - 1, MOST_SLICES).astype(int))]
    step = -(-max(labels.shape[1:]) // LONGEST)
    found: dict[str, list[np.ndarray]] = {turn: [] for turn in TURNS}
    found[REVERSED] = []
    for index in held:
        gradient, ranked = _gradient(image[index, :, ::step, ::step])
        outlined = labels[index, ::step, ::step]
        for turn, turned in TURNS.items():
            if turned(outlined).shape == outlined.shape:
                found[turn].append(_ranks(gradient[_outlines(turned(outlined))], ranked))
        if len(labels) > 1:
            gradient, ranked = _gradient(image[len(labels) - 1 - index, :, ::step, ::step])
            found[REVERSED].append(_ranks(gradient[_outlines(outlined)], ranked))
    means = {turn: np.concatenate(ranks) for turn, ranks in found.items() if ranks}
    return {turn: float(ranks.mean()) for turn, ranks in means.items() if ranks.size}


def how_turned(fits: Iterable[Mapping[str, float]]) -> str | None:
    """The turn with which the labels of a set fit clearly better than as they are; None where none does.

    Args:
        fits: of each label, see `edge_fits`.
    """
    fits = [fit for fit in fits if fit]
    gains = {}
    for turn in (*TURNS, REVERSED):
        reached = np.array([fit[turn] for fit in fits if turn in fit])
        if not LEAST_CASES <= len(reached) == len(fits) or reached.mean() < LEAST_FIT:
            continue
        gained = reached - [fit[AS_STORED] for fit in fits]
        if (gained > 0).mean() >= LEAST_SHARE:
            gains[turn] = float(gained.mean())
    best = max(gains, key=lambda turn: gains[turn], default=None)
    return best if best is not None and gains[best] > LEAST_GAIN else None


def _gradient(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The size of the gradient (H, W) of a slice (C, H, W), and the same in order."""
    gradient = gaussian_gradient_magnitude(image.mean(0, dtype=np.float32), 1.0)
    return gradient, np.sort(gradient, axis=None)


def _ranks(values: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    """Ranks in 0..1 of values among all in order; equal ones have the middle."""
    return (np.searchsorted(ordered, values) + np.searchsorted(ordered, values, "right")) / (2 * len(ordered))


def _outlines(labels: np.ndarray) -> np.ndarray:
    """Pixels (H, W) whose class is another one than that of the next pixel in their row or column."""
    outlines = np.zeros(labels.shape, bool)
    outlines[:-1] |= labels[:-1] != labels[1:]
    outlines[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    return outlines
