"""The way from slices as stored to the network's input, and back.

In: slices (Z, C, H, W) in [0, 1], see `sam2sgp.transforms.scaling`. Out: (Z, C, S, S) with the aspect kept by padding,
and the exact way back for maps on the network's grid.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sam2sgp.errors import DataError

REGION_FACTOR = 2.0
SMALLEST_EXTENT = 0.08
STRAY_SHARE = 0.02
# Slices with fewer pixels on a side are too small; those this many times as long as wide are seen through windows.
SMALLEST_SIDE, LONGEST_ASPECT = 4, 8
# Windows that a longer one is seen through, at most.
MOST_WINDOWS = 32
# Least overlap of neighbouring tiles, and the width of the rim over which views are blended, as shares of their side.
OVERLAP = 0.15
RIM = 0.15


def to_three_channels(image: Tensor) -> Tensor:
    """(..., C, H, W) -> (..., 3, H, W): grey is repeated, two channels get their mean, of more the first three."""
    channels = image.shape[-3]
    if channels == 1:
        return image.expand(*image.shape[:-3], 3, *image.shape[-2:])
    if channels == 2:
        return torch.cat([image, image.mean(-3, keepdim=True)], dim=-3)
    return image[..., :3, :, :]


def pixel_size(spacing: tuple[float, float, float] | None) -> tuple[float, float]:
    """Height and width in mm of a slice's pixel, from spacing (slice, row, column); (1, 1) where it is unknown."""
    return (1.0, 1.0) if spacing is None else (spacing[1], spacing[2])


@dataclass(frozen=True)
class Letterbox:
    """How slices were put into the network's square: resized to `inner` (h, w), placed at `offset` (top, left)."""

    original: tuple[int, int]
    inner: tuple[int, int]
    offset: tuple[int, int]
    size: int

    @classmethod
    def of(cls, shape: tuple[int, int], size: int, pixel: tuple[float, float] = (1.0, 1.0)) -> "Letterbox":
        """Letterbox slices of `shape` (H, W), with pixels of `pixel` (row, column) mm, into a square of side `size`."""
        extent = [length * spacing for length, spacing in zip(shape, pixel, strict=True)]
        scale = size / max(extent)
        height, width = (min(size, max(1, round(length * scale))) for length in extent)
        offset = (size - height) // 2, (size - width) // 2
        return cls((shape[0], shape[1]), (height, width), offset, size)

    @property
    def warnings(self) -> list[str]:
        """Sentences on why the network can hardly see what is letterboxed; none as a rule."""
        found = []
        if min(self.original) < SMALLEST_SIDE:
            height, width = self.original
            found.append(f"Its slices have only {height} x {width} pixels, too few to find anything.")
        elif LONGEST_ASPECT * min(self.inner) <= max(self.inner):
            ratio = max(self.inner) / min(self.inner)
            found.append(
                f"It is {ratio:.0f} times as long as wide, so only {min(self.inner)} of the network's {self.size} "
                f"pixels show its width, and small objects are missed; cut it into parts shorter than {LONGEST_ASPECT} "
                "to 1."
            )
        return found

    def apply(self, slices: Tensor) -> Tensor:
        """Images (Z, C, H, W) -> (Z, C, S, S), bilinear with antialiasing, padded with 0."""
        resized = slices.float()
        if resized.shape[-2:] != self.inner:
            resized = F.interpolate(resized, size=self.inner, mode="bilinear", align_corners=False, antialias=True)
        return self._pad(resized)

    def apply_label(self, labels: Tensor) -> Tensor:
        """Class maps (Z, H, W) -> (Z, S, S), nearest pixel, so that areas are kept and no value is invented."""
        return self._pad(_nearest(labels, self.inner))

    def restore(self, maps: Tensor) -> Tensor:
        """Maps (Z, C, S, S) on the network's grid -> (Z, C, H, W) on the slices' own, bilinear."""
        top, left = self.offset
        inner = maps[..., top : top + self.inner[0], left : left + self.inner[1]].float()
        if self.inner == self.original:
            return inner
        return F.interpolate(inner, size=self.original, mode="bilinear", align_corners=False)

    def restore_label(self, labels: Tensor) -> Tensor:
        """Class maps (Z, S, S) on the network's grid -> (Z, H, W) on the slices' own, nearest pixel."""
        top, left = self.offset
        return _nearest(labels[:, top : top + self.inner[0], left : left + self.inner[1]], self.original)

    def restore_box(self, box: list[float]) -> list[float]:
        """x0, y0, x1, y1 in network pixels -> in pixels of the slice, clipped to it."""
        scale = [original / inner for original, inner in zip(self.original, self.inner, strict=True)]
        moved = [(box[i] - self.offset[1 - i % 2]) * scale[1 - i % 2] for i in range(4)]
        return [min(max(value, 0.0), float(self.original[1 - i % 2])) for i, value in enumerate(moved)]

    def _pad(self, slices: Tensor) -> Tensor:
        top, left = self.offset
        bottom, right = self.size - self.inner[0] - top, self.size - self.inner[1] - left
        if not any((left, right, top, bottom)):
            return slices  # where F.pad would copy, and a long CT is gigabytes
        return F.pad(slices, (left, right, top, bottom))


@dataclass(frozen=True)
class Region:
    """A rectangle of an image, letterboxed into the network's square like an image of its own.

    top, left: of the rectangle in pixels; letterbox: of its height and width.
    """

    top: int
    left: int
    letterbox: Letterbox

    @classmethod
    def around(
        cls, mask: Tensor, size: int, pixel: tuple[float, float] = (1.0, 1.0), below: float = 1.0
    ) -> "Region | None":
        """A square of `REGION_FACTOR` times the extent of a mask (H, W), around it and within the image.

        The extent leaves out the outermost two percent of the mask on each side, which strays would otherwise stretch.
        It is taken to be at least `SMALLEST_EXTENT` of the image.

        Args:
            size: side S of the network's square.
            pixel: height and width of a pixel in mm.
            below: None is returned for an extent of this share of the image's longer side or more.
        """
        if not mask.any():
            return None
        longest = max(length * spacing for length, spacing in zip(mask.shape, pixel, strict=True))
        ends = [_ends(mask.sum(axis, dtype=torch.float64)) for axis in (1, 0)]
        extent = max((stop - start) * spacing for (start, stop), spacing in zip(ends, pixel, strict=True))
        if extent >= below * longest:
            return None
        side = REGION_FACTOR * max(extent, SMALLEST_EXTENT * longest)
        edges = []
        for (start, stop), spacing, length in zip(ends, pixel, mask.shape, strict=True):
            half, centre = side / spacing / 2, (start + stop) / 2
            first = max(0, round(centre - half))
            edges.append((first, min(length, max(round(centre + half), first + 1))))
        (top, bottom), (left, right) = edges
        return cls(top, left, Letterbox.of((bottom - top, right - left), size, pixel))

    @classmethod
    def tiles(
        cls, shape: tuple[int, int], size: int, share: float, pixel: tuple[float, float] = (1.0, 1.0)
    ) -> list["Region"]:
        """Overlapping square tiles that cover an image (H, W), each with `share` of the image's longer side."""
        longest = max(length * spacing for length, spacing in zip(shape, pixel, strict=True))
        return cls._covering(shape, size, share * longest, pixel)

    @classmethod
    def windows(cls, shape: tuple[int, int], size: int, pixel: tuple[float, float] = (1.0, 1.0)) -> list["Region"]:
        """Overlapping windows in a row that cover an image (H, W) at least `LONGEST_ASPECT` times as long as wide.

        They are square, and longer only where there would be more than `MOST_WINDOWS`. An image of another shape, or
        too small to show anything, has none.
        """
        shorter, longer = sorted(length * spacing for length, spacing in zip(shape, pixel, strict=True))
        if longer < LONGEST_ASPECT * shorter or min(shape) < SMALLEST_SIDE:
            return []
        return cls._covering(shape, size, max(shorter, longer / (1 + (1 - OVERLAP) * (MOST_WINDOWS - 1))), pixel)

    @classmethod
    def _covering(cls, shape: tuple[int, int], size: int, side: float, pixel: tuple[float, float]) -> list["Region"]:
        """Overlapping rectangles that cover an image, `side` mm long or as long as the image."""
        extent, starts = [], []
        for length, spacing in zip(shape, pixel, strict=True):
            tile = min(length, max(1, round(side / spacing)))
            count = 1 + math.ceil((length - tile) / ((1 - OVERLAP) * tile))
            extent.append(tile)
            starts.append([round(start) for start in torch.linspace(0, length - tile, count).tolist()])
        letterbox = Letterbox.of((extent[0], extent[1]), size, pixel)
        return [cls(top, left, letterbox) for top in starts[0] for left in starts[1]]

    @property
    def place(self) -> tuple[slice, slice]:
        """Rows and columns of the rectangle."""
        height, width = self.letterbox.original
        return slice(self.top, self.top + height), slice(self.left, self.left + width)

    def window(self, shape: tuple[int, int]) -> Tensor:
        """Weights (height, width) in (0, 1] for blending: 1 inside, falling to 0 over a rim of `RIM` of the side.

        There is no rim where the rectangle ends with the image (H, W), beyond which nothing else is seen.
        """
        profiles = []
        for start, extent, length in zip((self.top, self.left), self.letterbox.original, shape, strict=True):
            place = torch.arange(extent) + 0.5
            rim = max(1.0, RIM * extent)
            before = place if start > 0 else torch.full_like(place, rim)
            after = extent - place if start + extent < length else torch.full_like(place, rim)
            profiles.append((torch.minimum(before, after) / rim).clamp(max=1.0))
        return profiles[0][:, None] * profiles[1]

    def apply(self, slices: Tensor) -> Tensor:
        """Images (Z, C, H, W) -> the rectangle as (Z, C, S, S)."""
        return self.letterbox.apply(slices[(..., *self.place)])

    def apply_label(self, labels: Tensor) -> Tensor:
        """Class maps (Z, H, W) -> the rectangle as (Z, S, S)."""
        return self.letterbox.apply_label(labels[(..., *self.place)])

    def restore(self, maps: Tensor) -> Tensor:
        """Maps (Z, C, S, S) on the network's grid -> on the rectangle's own, (Z, C, height, width)."""
        return self.letterbox.restore(maps)


def _nearest(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Class maps (Z, H, W) -> (Z, *size), nearest pixel; slice by slice, for a long volume is gigabytes as float32."""
    resized = labels.new_empty(len(labels), *size)
    for target, part in zip(resized, labels, strict=True):
        target.copy_(F.interpolate(part[None, None].float(), size=size, mode="nearest-exact")[0, 0])
    return resized


def thickness(mask: Tensor) -> float:
    """Mean thickness of a mask (H, W) in pixels, twice its area over the number of its border pixels; 2 for lines."""
    values = mask[None, None].float()
    inner = -F.max_pool2d(F.pad(-values, (1, 1, 1, 1)), 3, stride=1) > 0
    border = mask & ~inner[0, 0]
    return 2 * float(mask.sum()) / max(1, int(border.sum()))


def _ends(profile: Tensor) -> tuple[int, int]:
    """First and past-the-last position between which all but the outermost share of a profile (L,) lies."""
    share = profile.cumsum(0) / profile.sum()
    first = int((share > STRAY_SHARE).to(torch.uint8).argmax())
    last = int((share >= 1 - STRAY_SHARE).to(torch.uint8).argmax())
    return first, last + 1


def label_map(logits: Tensor) -> Tensor:
    """Class logits (Z, C, H, W) -> index of the winning class plus one, 0 where none is above 0; (Z, H, W) uint8."""
    if logits.shape[1] > 255:
        raise DataError(f"{logits.shape[1]} classes in one run: expected at most 255; use labels with fewer classes.")
    best, index = logits.max(1)
    return torch.where(best > 0, index + 1, 0).to(torch.uint8)


def class_probabilities(logits: Tensor) -> Tensor:
    """Class logits (Z, C, H, W) -> probabilities (Z, C + 1, H, W) of background and classes, float16.

    The softmax over the logits with 0, the threshold of `label_map`, as the background's; with one class that is the
    sigmoid. The largest is that of `label_map`, also where rounding to float16 would have made it equal to another.
    """
    probabilities = _with_background(logits).softmax(1).half()
    winner = label_map(logits)[:, None].long()
    own = probabilities.gather(1, winner)
    rival = probabilities.scatter(1, winner, -1.0).amax(1, keepdim=True)
    # The next float16 above a positive one has the next bit pattern.
    above = (rival.view(torch.int16) + 1).view(torch.float16)
    return probabilities.scatter(1, winner, torch.where(own > rival, own, above))


def uncertainty(logits: Tensor) -> Tensor:
    """Class logits (Z, C, H, W) -> normalised entropy (Z, H, W) of their `class_probabilities` p, float16 in [0, 1].

    H = -sum_c p_c log p_c / log(C + 1): 0 where one class is certain, 1 where all and background are equally likely.
    """
    log_p = _with_background(logits).log_softmax(1)
    entropy = -(log_p.exp() * log_p).sum(1) / math.log(log_p.shape[1])
    return entropy.clamp(0.0, 1.0).half()


def _with_background(logits: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(logits[:, :1]), logits], dim=1).float()
