"""Images and labels as the review page gets them: a few slices at a time, as plain integers.

In: paths of the datastore. Out: `ShownImage` and `ShownLabel`, whose slices are cut and sent as they are. A file is
read whole and once, by the readers that everything else uses, then kept as integers of 8 or 16 bits for the requests
that follow; which of them stay is bounded in memory. Values of an image are stored as `(value - intercept) / slope`:
whole numbers of up to 16 bits exactly, all others in 65,536 steps from the lowest to the highest.

Any number of threads may ask at once: those that want the same file wait for the one that reads it.
"""

import filecmp
import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lib.checks import MOST_CLASSES, TooLarge
from lib.stamps import image_stamp, stamp
from sam2sgp.data import Geometry, read_image, read_label
from sam2sgp.data.io import PLANES
from sam2sgp.report.slices import SIDES
from sam2sgp.support.lru import ByteLRU
from sam2sgp.transforms import ScaleIntensityByModalityd, SupportScaling
from sam2sgp.transforms.scaling import PERCENTILES, voxels_looked_at, window_of

IMAGES_KEPT_MB, LABELS_KEPT_MB = 1024, 512
# Files that are read at once: each is held whole, and may be a volume of gigabytes.
READING = 2
# Bytes of one slice, which a browser holds several times.
LARGEST_SLICE = 64 << 20
LARGEST_STORED = 65535


@dataclass(frozen=True)
class ShownImage:
    """An image to look at.

    Attributes:
        slices: (Z, H, W, C), uint8 or uint16, in display orientation; C is 1, or 3 for colours.
        slope, intercept: a value of the file is `slope * stored + intercept`.
        lowest, highest: of the file's values.
        spread: the percentiles of the values by which it is scaled where nothing else decides.
        looked_at: (N,) the values that tell what a volume is, see `hounsfield_evidence`; none of pictures and colours.
        is_rgb: whether it is a colour image. modality: as the file states it.
        geometry: of the file.
    """

    slices: np.ndarray
    slope: float
    intercept: float
    lowest: float
    highest: float
    spread: tuple[float, float]
    looked_at: torch.Tensor
    is_rgb: bool
    modality: str | None
    geometry: Geometry

    @property
    def plane(self) -> str | None:
        """How slices lie: axial, coronal or sagittal; None for pictures and files that don't say where they lie."""
        return PLANES[self.geometry.slice_axis] if self._has_place() else None

    @property
    def edges(self) -> str | None:
        """Letters of the patient's directions at the left, right, upper and lower edge; None where unknown."""
        return SIDES[self.geometry.slice_axis] if self._has_place() else None

    def _has_place(self) -> bool:
        return not self.geometry.is_picture and self.geometry.has_spacing


@dataclass(frozen=True)
class ShownLabel:
    """A label to look at.

    Attributes:
        slices: (Z, H, W) class values, uint8 or uint16, in display orientation.
        counts: voxels in each slice, by class value.
    """

    slices: np.ndarray
    counts: dict[int, list[int]]


class Volumes:
    """Images and labels that were looked at lately.

    Args:
        scale: how the network gets to see intensities.
    """

    def __init__(self, scale: ScaleIntensityByModalityd) -> None:
        self._scale = scale
        few = threading.Semaphore(READING)
        self._images = _ReadOnce(IMAGES_KEPT_MB, lambda shown: shown.slices.nbytes + shown.looked_at.nbytes, few)
        self._labels = _ReadOnce(LABELS_KEPT_MB, lambda shown: shown.slices.nbytes, few)

    def image(self, path: str | Path) -> ShownImage:
        """An image, read or as it was kept.

        Raises:
            DataError: it can't be read.
            TooLarge: its slices are too large for a page.
        """
        return self._images.get((str(path), image_stamp(path)), lambda: _read_image(path, self._scale))

    def window(self, shown: ShownImage, support: SupportScaling) -> tuple[tuple[float, float], str]:
        """The values that the network tells apart, lowest and highest, and how it gets to see the image: "ct", "colour"
        or "percentiles".

        Args:
            shown: an image.
            support: how the support set is scaled, which decides where nothing is stated.
        """
        scale, is_picture = self._scale, shown.geometry.is_picture
        scaling = scale.scaling_of(shown.looked_at, shown.is_rgb, is_picture, shown.modality, support=support)
        ends = torch.tensor([shown.lowest, shown.highest])
        window = shown.spread
        if scaling.kind != PERCENTILES:
            window = window_of(ends, scaling, scale.ct_window, scale.percentiles)
        if not window[1] > window[0]:
            window = shown.lowest, shown.highest
        if not window[1] > window[0]:
            window = shown.lowest, shown.lowest + 1
        return window, scaling.kind

    def label(self, path: str | Path, image: str | Path) -> ShownLabel:
        """A label on its image's grid. Raises DataError where it can't be read, doesn't fit or has too many classes."""
        geometry = self.image(image).geometry
        return self._labels.get(_key(path, image), lambda: _read_label(path, geometry))

    def keep_label(self, path: str | Path, image: str | Path, labels: np.ndarray, written: Path) -> None:
        """Keep a label (Z, H, W) that was saved just now for those who look at it next.

        Only where it was stored as it is: `path` must still hold what was `written`.
        """
        key = _key(path, image)
        # In this order another one that comes to its place is seen, or has another key.
        if filecmp.cmp(path, written, shallow=False):
            self._labels.get(key, lambda: _shown_label(labels))


class _ReadOnce:
    """Values that are made when they are first asked for, by one thread for all that ask meanwhile.

    Args:
        megabytes: of the values that are kept. size_of: bytes of one.
        few: how many are made at once.
    """

    def __init__(self, megabytes: float, size_of: Callable[[Any], int], few: threading.Semaphore) -> None:
        self._few = few
        self._kept = ByteLRU(megabytes, size_of)
        self._made: dict[Hashable, Future] = {}
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        with self._lock:
            if key in self._kept:
                return self._kept[key]
            promised = self._made.get(key)
            mine = promised is None
            if promised is None:
                promised = self._made[key] = Future()
        if mine:
            try:
                with self._few:
                    value = make()
            except BaseException as error:
                promised.set_exception(error)
                with self._lock:
                    del self._made[key]
            else:
                with self._lock:
                    self._kept[key] = value
                    del self._made[key]
                promised.set_result(value)
        return promised.result()


def _key(label: str | Path, image: str | Path) -> Hashable:
    return str(label), stamp(label), image_stamp(image)


def _read_image(path: str | Path, scale: ScaleIntensityByModalityd) -> ShownImage:
    image = read_image(path)
    values = image.slices if image.is_rgb else image.slices[:, :1]
    lowest, highest = float(values.min()), float(values.max())
    slope, intercept = _steps(values, lowest, highest)
    kind = np.uint8 if (highest - intercept) / slope <= 255 else np.uint16
    count, channels, height, width = values.shape
    if height * width * channels * np.dtype(kind).itemsize > LARGEST_SLICE:
        raise TooLarge(
            f"image: expected slices of at most {LARGEST_SLICE >> 20} MB to show on a page, found {height} x {width} "
            "pixels; use a viewer for it."
        )
    stored = np.empty((count, height, width, channels), kind)
    # The range of float32 values may be larger than the largest of them, or smaller than the smallest normal one.
    precision = np.float32 if slope == 1.0 else np.float64
    for number, slice_values in enumerate(values):
        steps = np.subtract(slice_values, intercept, dtype=precision) / slope
        stored[number] = np.rint(steps).transpose(1, 2, 0)
    stored.flags.writeable = False
    low, high = (lowest, highest) if image.is_rgb else _percentiles(values, stored, slope, intercept, scale.percentiles)
    is_told = image.is_rgb or image.geometry.is_picture
    looked_at = torch.empty(0) if is_told else voxels_looked_at(torch.from_numpy(image.slices))
    return ShownImage(
        stored, slope, intercept, lowest, highest, (low, high), looked_at, image.is_rgb, image.modality, image.geometry
    )


def _percentiles(
    values: np.ndarray, stored: np.ndarray, slope: float, intercept: float, percents: Sequence[float]
) -> list[float]:
    """`np.percentile` of values without sorting all of them: at most those that share a step with the one asked for.

    Args:
        values: of any shape. stored: the same in steps that go up with them, uint8 or uint16.
        slope, intercept: as of `_steps`.
    """
    counts = np.zeros(int(np.iinfo(stored.dtype).max) + 1, np.int64)
    for part in stored:
        counts += np.bincount(part.reshape(-1), minlength=len(counts))
    ends = counts.cumsum()

    def ranked(rank: int) -> float:
        step = int(np.searchsorted(ends, rank, "right"))
        if slope == 1.0:
            return step + intercept
        inside = values[stored.reshape(values.shape) == step]
        place = rank - int(ends[step] - counts[step])
        return float(np.partition(inside, place)[place])

    found = []
    for percent in percents:
        rank, part = divmod(percent / 100 * (values.size - 1), 1)
        low = ranked(int(rank))
        found.append(low + part * (ranked(int(rank) + 1) - low) if part else low)
    return found


def _steps(values: np.ndarray, lowest: float, highest: float) -> tuple[float, float]:
    """Slope and intercept with which values are stored."""
    is_whole = lowest.is_integer() and highest - lowest <= LARGEST_STORED
    if is_whole and all(np.array_equal(part, np.rint(part)) for part in values):
        # Colours, and what fits anyway, stay as they are.
        return 1.0, 0.0 if lowest >= 0 and highest <= LARGEST_STORED else lowest
    return (highest - lowest) / LARGEST_STORED or 1.0, lowest


def _read_label(path: str | Path, geometry: Geometry) -> ShownLabel:
    return _shown_label(read_label(path, geometry))


def _shown_label(labels: np.ndarray) -> ShownLabel:
    values = labels.astype(np.uint8 if labels.max() <= 255 else np.uint16)
    values.flags.writeable = False
    counts: dict[int, list[int]] = {}
    for number, part in enumerate(values):
        voxels = np.bincount(part.reshape(-1))
        for value in np.flatnonzero(voxels[1:]) + 1:
            counts.setdefault(int(value), [0] * len(values))[number] = int(voxels[value])
        if len(counts) > MOST_CLASSES:
            raise TooLarge(
                f"label: expected at most {MOST_CLASSES} classes to show on a page, found more; use a viewer."
            )
    return ShownLabel(values, dict(sorted(counts.items())))
