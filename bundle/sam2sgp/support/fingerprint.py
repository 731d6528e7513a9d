"""What the targets of a support set are like: how thick, how large, how many, in images of which size.

In: labels on the images' own grid. Out: numbers from which resolution, second pass and adaptation are planned, as
nnU-Net (Isensee et al., doi 10.1038/s41592-020-01008-z) plans its networks from a fingerprint of the data set.

Lengths are in pixels of the image itself or, as a `…_share`, in units of its longer side.
"""

from collections.abc import Iterable
from dataclasses import astuple, dataclass
from statistics import median

import numpy as np
from scipy.ndimage import find_objects
from scipy.ndimage import label as components
from torch import Tensor

from sam2sgp.transforms.array import thickness

# Parts of fewer pixels, unless a target has no larger ones, and of a smaller share of the largest part are specks.
SPECK, SPECK_SHARE = 4, 0.1
# Thickness at the network's size, in pixels and as a share of the network's side, below which a target is seen in
# tiles: one and a half places of the finest grid that masks are predicted on.
THIN, THIN_SHARE = 6.0, 3 / 128
# A target of at least so many parts per image, of at most this share of the image's side, is seen in tiles even where
# it isn't thin: nuclei. Of such a target also images with fewer parts serve as support. A few small parts, such as
# teeth of one kind, are told by what is around them, of which tiles show too little.
MANY_PARTS, SOME_PARTS, SMALL_PART = 8, 4, 0.15
# Side of a tile as a share of the image's longer one. The least bounds the time: nine tiles of a square image.
LARGEST_TILE, SMALLEST_TILE = 0.6, 0.38


@dataclass(frozen=True)
class TargetMeasures:
    """One class in one image.

    thickness: mean thickness in pixels, see `sam2sgp.transforms.array.thickness`.
    area_share: share of the image's pixels. extent_share: longer side of the box around it all, over the image's longer
    side. count: connected parts (8 neighbours). part_share: side of a square as large as the median part, likewise.
    """

    thickness: float
    area_share: float
    extent_share: float
    count: int
    part_share: float

    @classmethod
    def of(cls, mask: Tensor) -> "TargetMeasures":
        """Measures of a mask (H, W) bool that is not empty."""
        values = mask.numpy()
        numbered, count = components(values, structure=np.ones((3, 3)))
        areas = np.bincount(numbered.ravel())[1:]
        areas = areas[areas >= max(min(SPECK, areas.max()), SPECK_SHARE * areas.max())]
        rows, columns = find_objects(values.astype(np.uint8))[0]
        extent = max(rows.stop - rows.start, columns.stop - columns.start)
        return cls(
            thickness=round(thickness(mask), 3),
            area_share=float(values.mean()),
            extent_share=extent / max(values.shape),
            count=len(areas),
            part_share=float(np.median(areas)) ** 0.5 / max(values.shape),
        )


@dataclass(frozen=True)
class ImageMeasures:
    """One image or slice: its height and width in pixels, whether it is of a volume, and its targets by class value."""

    height: int
    width: int
    is_slice: bool
    targets: dict[int, TargetMeasures]

    @classmethod
    def of(cls, label: Tensor, is_slice: bool) -> "ImageMeasures":
        """Measures of a class map (H, W) on the image's own grid, 0 background."""
        values = sorted(set(np.unique(label.numpy()).tolist()) - {0})
        targets = {int(value): TargetMeasures.of(label == value) for value in values}
        height, width = label.shape
        return cls(height, width, is_slice, targets)

    def to_json(self) -> list:
        """As JSON types; `of_json` leads back."""
        return [self.height, self.width, self.is_slice, [[value, *astuple(t)] for value, t in self.targets.items()]]

    @classmethod
    def of_json(cls, values: list) -> "ImageMeasures":
        """The inverse of `to_json`."""
        height, width, is_slice, targets = values
        return cls(height, width, is_slice, {value: TargetMeasures(*rest) for value, *rest in targets})


@dataclass(frozen=True)
class TargetFingerprint:
    """One class in a support set: medians over the images that hold it.

    images: how many hold it. thickness: in pixels of the images themselves; thickness_share: over the image's longer
    side, so that on a grid of S the target is S times as thick. area_share, extent_share, count, part_share: as of
    `TargetMeasures`.
    """

    images: int
    thickness: float
    thickness_share: float
    area_share: float
    extent_share: float
    count: float
    part_share: float


@dataclass(frozen=True)
class SupportFingerprint:
    """A support set.

    images: number of images and slices. patients, groups: whom and what they are of. has_volumes: some are slices.
    height, width: median size in pixels. targets: by class value, of classes that some image holds.
    """

    images: int
    patients: int
    groups: int
    has_volumes: bool
    height: float
    width: float
    targets: dict[int, TargetFingerprint]


def tile_share(
    thickness_share: float, count: float, part_share: float, size: int, many: float = MANY_PARTS
) -> float | None:
    """Side of the tiles that show a target large enough, as a share of the image's longer side; None: no tiles needed.

    Args:
        thickness_share: thickness of the target over the image's longer side.
        count, part_share: see `TargetMeasures`.
        size: side S of the network's input.
        many: number of small parts from which tiles are needed.

    Example:
        >>> thick, thin, thinner = (tile_share(share, 1, 0.1, 256) for share in (0.1, 0.01, 0.001))
        >>> thick, round(thin, 3), thinner
        (None, 0.427, 0.38)
        >>> tile_share(0.1, 20, 0.1, 256), tile_share(0.1, 20, 0.3, 256)
        (0.38, None)
    """
    enough = min(THIN, THIN_SHARE * size)
    if thickness_share * size < enough:
        return min(LARGEST_TILE, max(SMALLEST_TILE, thickness_share * size / enough))
    return SMALLEST_TILE if count >= many and part_share <= SMALL_PART else None


def fingerprint(items: Iterable) -> SupportFingerprint:
    """The fingerprint of support items (`SupportItem`, or anything with `patient`, `group` and `measures`).

    Example:
        >>> from types import SimpleNamespace
        >>> import torch
        >>> label = torch.zeros(100, 200, dtype=torch.uint8)
        >>> label[10:20, 50:150] = 3
        >>> item = SimpleNamespace(patient="p", group="g", measures=ImageMeasures.of(label, is_slice=False))
        >>> found = fingerprint([item])
        >>> found.width, found.targets[3].count, round(found.targets[3].extent_share, 2)
        (200, 1, 0.5)
    """
    items = list(items)
    measures = [item.measures for item in items]
    values = sorted({value for image in measures for value in image.targets})
    return SupportFingerprint(
        images=len(items),
        patients=len({item.patient for item in items}),
        groups=len({item.group for item in items}),
        has_volumes=any(image.is_slice for image in measures),
        height=median([image.height for image in measures]) if items else 0,
        width=median([image.width for image in measures]) if items else 0,
        targets={value: _target([image for image in measures if value in image.targets], value) for value in values},
    )


def _target(images: list[ImageMeasures], value: int) -> TargetFingerprint:
    targets = [image.targets[value] for image in images]

    def middle(name: str) -> float:
        return median(getattr(target, name) for target in targets)

    shares = [t.thickness / max(image.height, image.width) for t, image in zip(targets, images, strict=True)]
    return TargetFingerprint(
        images=len(images),
        thickness=middle("thickness"),
        thickness_share=median(shares),
        area_share=middle("area_share"),
        extent_share=middle("extent_share"),
        count=middle("count"),
        part_share=middle("part_share"),
    )
