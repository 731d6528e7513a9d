"""Pictures of images with masks, boxes and truth drawn on them.

In: images as the network or a reader has them, class maps and boxes on the same pixel grid. Out: uint8 RGB pictures
(H, W, 3) of a size fit for a report. A class has the same colour everywhere: `class_colour`.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw
from skimage.measure import find_contours
from skimage.segmentation import find_boundaries

from sam2sgp.transforms.array import thickness
from sam2sgp.transforms.scaling import choose_scaling, scale_intensity

# Okabe and Ito, "Color Universal Design" (2008): told apart in all common colour deficiencies. Its black is left out,
# and the darkest colours come last, because medical images are dark.
PALETTE = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (204, 121, 167),
    (240, 228, 66),
    (213, 94, 0),
    (0, 114, 178),
)
WHITE, BLACK = (255, 255, 255), (0, 0, 0)
EDGE = 320
MONTAGE_TILES = 9
MONTAGE_EDGE = 213
FILL = 0.22
DASH, GAP = 5.0, 8.0
# Pixels of the output below which a truth is so thin that dashes, four pixels wide with their rim, would hide it.
THIN_TRUTH = 6.0

Picture = NDArray[np.uint8]


def class_colour(value: int) -> tuple[int, int, int]:
    """RGB of a class value >= 1. Beyond the palette's seven, its colours come again, mixed with white."""
    again, place = divmod(value - 1, len(PALETTE))
    whiteness = 1 - 0.5**again
    red, green, blue = (round(level + (255 - level) * whiteness) for level in PALETTE[place])
    return red, green, blue


def to_display(image: ArrayLike) -> Picture:
    """An image as a uint8 RGB picture (H, W, 3).

    Args:
        image: (H, W) or (C, H, W), array or tensor. uint8 stays as it is, and so do floats of [0, 1] (the network's
            grid) but for their range; Hounsfield units get the soft-tissue window, three channels of values >= 0 are
            colours, and all else is scaled from its 0.5 to its 99.5 percentile. Two channels, and more than four, show
            the first; of four the last (alpha) is dropped. NaN and infinite pixels are black.

    Raises:
        ValueError: the image has another number of axes.

    Example:
        >>> to_display(np.linspace(0, 1, 4).reshape(2, 2))[1, 1].tolist()
        [255, 255, 255]
    """
    image = np.asarray(image)
    if image.ndim not in (2, 3):
        raise ValueError(f"expected an image (H, W) or (C, H, W), found shape {image.shape}")
    channels = image[None] if image.ndim == 2 else image
    channels = channels[:3] if len(channels) in (3, 4) else channels[:1]
    if channels.dtype != np.uint8:
        channels = _to_bytes(channels)
    return np.ascontiguousarray(np.broadcast_to(np.moveaxis(channels, 0, -1), (*channels.shape[1:], 3)))


def draw_overlay(
    image: Picture,
    masks: ArrayLike | Mapping[int, ArrayLike] | None = None,
    colours: Mapping[int, tuple[int, int, int]] | None = None,
    box: Mapping[int, Sequence[float]] | None = None,
    truth: ArrayLike | Mapping[int, ArrayLike] | None = None,
    scale: float | None = None,
) -> Picture:
    """Draw masks as solid contours over a light fill, boxes as thin rectangles, and the truth as dashed white contours.

    Where truth and mask agree, the mask's colour shows through the gaps of the dashes. Of a truth as thin as vessels,
    which dashes would hide together with the mask, only what the mask misses is drawn, filled with white.

    Args:
        image: picture (H, W, 3) uint8, not changed.
        masks, truth: class map (H, W) of integers, or {class value: mask (H, W) bool}.
        colours: {class value: RGB}; `class_colour` for classes not in it.
        box: {class value: (x0, y0, x1, y1)} in pixels, x1 and y1 exclusive; one with x0 < 0 is not drawn.
        scale: output pixels per pixel; None makes the longer side `EDGE` = 320.

    Returns:
        Picture (round(scale H), round(scale W), 3) uint8.
    """
    height, width = image.shape[:2]
    scale = EDGE / max(height, width) if scale is None else scale
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    stretch = np.array([size[1] / height, size[0] / width])
    colours = colours or {}
    picture = np.array(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))

    filled = {value: _resize_mask(mask, size) for value, mask in _masks(masks).items()}
    edges = {value: find_boundaries(np.pad(mask, 1), mode="thick")[1:-1, 1:-1] for value, mask in filled.items()}
    for value, mask in filled.items():
        colour = np.array(colours.get(value, class_colour(value)))
        picture[mask] = np.round((1 - FILL) * picture[mask] + FILL * colour)
    for value, edge in edges.items():  # after all fills, so that no fill covers a contour
        picture[edge] = colours.get(value, class_colour(value))

    canvas = Image.fromarray(picture)
    draw = ImageDraw.Draw(canvas)
    for value, corners in (box or {}).items():
        if corners[0] >= 0:
            _draw_box(draw, np.asarray(corners, dtype=float), stretch, colours.get(value, class_colour(value)))
    picture = np.array(canvas)
    for value, mask in _masks(truth).items():
        if mask.any() and thickness(torch.from_numpy(np.ascontiguousarray(mask))) * scale < THIN_TRUTH:
            found = filled[value] | edges[value] if value in filled else np.zeros(size[::-1], bool)
            picture[_resize_mask(mask, size) & ~found] = WHITE
            continue
        for contour in find_contours(np.pad(mask, 1).astype(float), 0.5):
            _draw_dashes(picture, (contour - 0.5) * stretch)
    return picture


def spread_slices(prediction: ArrayLike, truth: ArrayLike | None = None, count: int = MONTAGE_TILES) -> list[int]:
    """Up to `count` slices (Z, H, W) that hold something in prediction or truth, both ends included, evenly spread.

    If no slice does, the slices are spread over the whole volume.
    """
    used = np.asarray(prediction).astype(bool).any((1, 2))
    if truth is not None:
        used = used | np.asarray(truth).astype(bool).any((1, 2))
    found = np.flatnonzero(used) if used.any() else np.arange(len(used))
    places = np.linspace(0, len(found) - 1, min(count, len(found)))
    return [int(found[round(place)]) for place in places]


def montage(
    volume: ArrayLike,
    prediction: ArrayLike,
    truth: ArrayLike | None = None,
    colours: Mapping[int, tuple[int, int, int]] | None = None,
    numbers: Sequence[int] | None = None,
    total: int | None = None,
) -> Picture:
    """A grid of slices of a volume, each with its number (from 1) in a corner.

    Args:
        volume: (Z, H, W) or (Z, C, H, W) as `to_display` takes them; all slices should share one intensity scale, best
            [0, 1].
        prediction, truth: class maps (Z, H, W).
        numbers: where only some slices of a volume are given, which ones (from 0); all of them are shown. None: the
            volume is whole, and up to `MONTAGE_TILES` = 9 slices are chosen by `spread_slices`.
        total: number of slices of the whole volume.

    Returns:
        Picture (rows * h, columns * w, 3) uint8, tiles of at most `MONTAGE_EDGE` = 213 pixels a side.
    """
    volume, prediction = np.asarray(volume), np.asarray(prediction)
    truth = None if truth is None else np.asarray(truth)
    tiles = []
    shown = spread_slices(prediction, truth) if numbers is None else range(len(volume))
    for index in shown:
        picture = to_display(volume[index])
        scale = MONTAGE_EDGE / max(picture.shape[:2])
        seen = None if truth is None else truth[index]
        tile = Image.fromarray(draw_overlay(picture, prediction[index], colours, truth=seen, scale=scale))
        ImageDraw.Draw(tile).text(
            (5, 3),
            f"{(index if numbers is None else numbers[index]) + 1}/{total or len(volume)}",
            fill=WHITE,
            stroke_width=1,
            stroke_fill=BLACK,
            font_size=13,
        )
        tiles.append(np.asarray(tile))
    columns = int(np.ceil(np.sqrt(len(tiles))))
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % columns)
    return np.concatenate([np.concatenate(tiles[i : i + columns], 1) for i in range(0, len(tiles), columns)])


def _to_bytes(channels: np.ndarray) -> Picture:
    """Channels (C, H, W) of any scale -> uint8."""
    values = channels.astype(np.float32)
    finite = np.isfinite(values)
    values = np.where(finite, values, values[finite].min() if finite.any() else 0)
    if values.min() < 0 or values.max() > 1:
        slices = torch.from_numpy(values)[None]
        colour = len(values) == 3 and values.min() >= 0
        values = scale_intensity(slices, choose_scaling(slices, is_rgb=colour))[0].numpy()
    return np.round(255 * np.where(finite, values, 0)).astype(np.uint8)


def _masks(masks: ArrayLike | Mapping[int, ArrayLike] | None) -> dict[int, np.ndarray]:
    if masks is None:
        return {}
    if isinstance(masks, Mapping):
        return {value: np.asarray(mask).astype(bool) for value, mask in masks.items()}
    labels = np.asarray(masks)
    return {int(value): labels == value for value in np.unique(labels) if value != 0}


def _resize_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Nearest pixel when enlarged; made smaller, a pixel counts if any of it does: no small mask is lost."""
    grey = Image.fromarray(mask.astype(np.uint8) * 255)
    if size[0] >= grey.width:
        return np.asarray(grey.resize(size, Image.Resampling.NEAREST)) > 0
    return np.asarray(grey.resize(size, Image.Resampling.BOX)) > 0


def _draw_box(draw: ImageDraw.ImageDraw, box: np.ndarray, stretch: np.ndarray, colour: tuple[int, int, int]) -> None:
    x0, y0, x1, y1 = np.round(box * np.tile(stretch[::-1], 2)).astype(int)
    # A dark rim outside, two pixels of colour inside
    for grow, outline, width in ((1, BLACK, 1), (0, colour, 2)):
        corners = (x0 - grow, y0 - grow, max(x0, x1 - 1) + grow, max(y0, y1 - 1) + grow)
        draw.rectangle(corners, outline=outline, width=width)


def _draw_dashes(picture: Picture, contour: np.ndarray) -> None:
    """White dashes, two pixels wide in a dark rim, along a contour (N, 2) of distances down and right in pixels."""
    along = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(contour, axis=0).T))])
    steps = np.arange(0, along[-1], 0.5)
    steps = steps[steps % (DASH + GAP) < DASH]
    corner = np.stack([np.interp(steps, along, contour[:, axis]) for axis in (0, 1)]).round().astype(int)
    last = np.array(picture.shape[:2])[:, None] - 1
    for reach, colour in ((2, BLACK), (1, WHITE)):
        for offset in np.ndindex(2 * reach, 2 * reach):
            rows, columns = np.clip(corner + np.array(offset)[:, None] - reach, 0, last)
            picture[rows, columns] = colour
