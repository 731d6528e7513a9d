"""Support items: one 2D image, or one slice of a volume, with its label.

In: cases as preprocessing makes them. Out: light `SupportItem`s, whose pixels are read when they are asked for.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from sam2sgp.data.classes import pixels_by_value, values_in
from sam2sgp.drawing import draw_overlay, to_display
from sam2sgp.errors import ConfigError
from sam2sgp.support.fingerprint import SOME_PARTS, ImageMeasures, tile_share
from sam2sgp.support.turned import edge_fits
from sam2sgp.transforms.acquired import Acquired
from sam2sgp.transforms.array import Region, pixel_size
from sam2sgp.transforms.parts import is_sparse, main_shares
from sam2sgp.transforms.scaling import PERCENTILES, Scaling

THUMBNAIL = 128
# Slices without any class that are taken from a volume.
EMPTY_SLICES = 4
# Tiles kept of an item for each class that is seen in tiles, see `fingerprint.tile_share`: those with most of it.
MAX_TILES = 4
# Kinds of crops, in which an item shows one of its classes.
CROPS = ("regions", "tiles")
# Class values fit into a byte.
MAX_VALUE = 255
# The scaling of a preprocessing that does not say how it scales.
AS_GIVEN = Scaling(PERCENTILES, "as given", stated=True)


@dataclass
class Prepared:
    """What preprocessing makes of an item.

    image: (C, S, S) float16 in [0, 1]. label: (S, S) uint8 class map.
    regions: {class value: images (1, C, S, S) float16 and masks (1, S, S) bool}, the item around each of its classes.
    tiles: likewise (T, C, S, S) and (T, S, S), T <= 4 of its tiles, for those of its classes that tiles show
        better, see `fingerprint.tile_share`.
    thumbnail: (H, W, 3) uint8, at most 128 pixels on a side, with the label drawn; None: drawn when asked for.
    """

    image: Tensor
    label: Tensor
    regions: dict[int, tuple[Tensor, Tensor]]
    tiles: dict[int, tuple[Tensor, Tensor]]
    thumbnail: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """As named tensors for a file, with a thumbnail; `of_tensors` leads back."""
        named = {"image": self.image, "label": self.label, "thumbnail": self.drawn()}
        for kind in CROPS:
            for value, (images, masks) in getattr(self, kind).items():
                named |= {f"{kind}.{value}.image": images, f"{kind}.{value}.mask": masks}
        # Slices of a volume are views of one storage, which a file can't hold.
        return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in named.items()}

    @classmethod
    def of_tensors(cls, named: dict[str, Tensor]) -> "Prepared":
        """The inverse of `tensors`."""
        crops: dict[str, dict] = {kind: {} for kind in CROPS}
        for name in named:
            kind, _, rest = name.partition(".")
            if kind in crops and rest.endswith(".image"):
                value = int(rest.removesuffix(".image"))
                crops[kind][value] = named[name], named[f"{kind}.{value}.mask"]
        for kind in CROPS:
            crops[kind] = dict(sorted(crops[kind].items()))
        return cls(named["image"], named["label"], **crops, thumbnail=named["thumbnail"])

    def mirrored(self) -> "Prepared":
        """The same mirrored left to right."""
        crops = {
            kind: {value: (images.flip(-1), masks.flip(-1)) for value, (images, masks) in getattr(self, kind).items()}
            for kind in CROPS
        }
        return Prepared(self.image.flip(-1), self.label.flip(-1), **crops)

    def drawn(self) -> Tensor:
        """The thumbnail."""
        if self.thumbnail is not None:
            return self.thumbnail
        picture = to_display(self.image.float())
        scale = min(1.0, THUMBNAIL / max(picture.shape[:2]))
        return torch.from_numpy(draw_overlay(picture, self.label.numpy(), scale=scale).copy())


@dataclass(frozen=True)
class ItemInfo:
    """Which slice an item is (None: a 2D image), and class values: those it holds at the network's size, those that it
    has a region of, and those that it has tiles of; and the measures of its targets at its own size."""

    slice: int | None
    holds: tuple[int, ...]
    regions: tuple[int, ...]
    tiles: tuple[int, ...]
    measures: ImageMeasures

    @classmethod
    def of(cls, index: int | None, prepared: Prepared, measures: ImageMeasures) -> "ItemInfo":
        holds = tuple(value for value in torch.unique(prepared.label).tolist() if value)
        return cls(index, holds, tuple(prepared.regions), tuple(prepared.tiles), measures)


@dataclass(frozen=True)
class CaseListing:
    """What a case has.

    values: in its whole label at the network's size, 0 too. items: its slices. scaling: how it was scaled.
    main_shares: of a volume for each class value the share of its voxels that the largest connected part holds; {} of
    one labelled on single slices. slice_axis: of a volume, along which it is sliced, see `Geometry.slice_axis`.
    fits: how its label fits the image as it is and turned, see `edge_fits`. warnings: sentences on what may be wrong,
    but for those of the scaling. pixels: of each class value at the label's own size. acquired: what a DICOM header
    says.
    """

    values: tuple[int, ...]
    items: tuple[ItemInfo, ...]
    scaling: Scaling
    main_shares: dict[int, float]
    slice_axis: int | None
    fits: dict[str, float]
    warnings: tuple[str, ...]
    pixels: dict[int, int]
    acquired: Acquired

    def to_json(self) -> bytes:
        rows = [[f.slice, f.holds, f.regions, f.tiles, f.measures.to_json()] for f in self.items]
        shares = list(self.main_shares.items())
        about = [self.slice_axis, self.fits, self.warnings, list(self.pixels.items()), asdict(self.acquired)]
        return json.dumps([self.values, rows, asdict(self.scaling), shares, *about]).encode()

    @classmethod
    def of_json(cls, text: bytes) -> "CaseListing":
        values, rows, scaling, shares, slice_axis, fits, warnings, pixels, acquired = json.loads(text)
        items = (
            ItemInfo(index, tuple(holds), tuple(regions), tuple(tiles), ImageMeasures.of_json(measures))
            for index, holds, regions, tiles, measures in rows
        )
        known = tuple(values), tuple(items), Scaling.of_dict(scaling), dict(shares)
        return cls(*known, slice_axis, fits, tuple(warnings), dict(pixels), Acquired(**acquired))


@dataclass(eq=False)
class SupportItem:
    """One 2D image or one slice of a volume with its label.

    Attributes:
        id: for people: the case's name, of a volume with `#` and the slice.
        content: hash of the image's and the label's content, geometry included, and of the slice; never of a path.
        source: path of the case's image.
        patient, group: of the case.
        case: where it comes from, to be prepared again.
        info: its slice and classes.
        main_shares: of the case, if that is a volume, see `CaseListing`.
        edge_fit: of the case's label as it is, see `sam2sgp.support.turned.edge_fits`; None without outlines.
        load: gives its pixels.
    """

    id: str
    content: str
    source: str
    patient: str
    group: str
    case: dict = field(repr=False)
    info: ItemInfo
    main_shares: dict[int, float]
    edge_fit: float | None
    load: Callable[[], Prepared] = field(repr=False)

    @property
    def slice(self) -> int | None:
        """Its index in the volume, None for a 2D image."""
        return self.info.slice

    @property
    def measures(self) -> ImageMeasures:
        """Its targets at its own size."""
        return self.info.measures

    @property
    def image(self) -> Tensor:
        """(C, S, S) float16 in [0, 1]."""
        return self.load().image

    @image.setter
    def image(self, image: Tensor) -> None:
        self._replace(image=image)

    @property
    def label(self) -> Tensor:
        """(S, S) uint8 class map."""
        return self.load().label

    @label.setter
    def label(self, label: Tensor) -> None:
        self._replace(label=label)

    def _replace(self, **pixels: Tensor) -> None:
        """For experiments with wrong pixels. It makes another item, of which nothing is cached yet."""
        changed = replace(self.load(), thumbnail=None, **pixels)
        self.load = lambda: changed
        (values,) = pixels.values()
        self.content = hashlib.sha256(self.content.encode() + values.contiguous().numpy().tobytes()).hexdigest()

    def mirrored(self) -> "SupportItem":
        """The same item mirrored left to right: another content."""
        content = hashlib.sha256(f"{self.content} mirrored".encode()).hexdigest()
        return replace(self, content=content, load=lambda: self.load().mirrored())

    @property
    def regions(self) -> dict[int, tuple[Tensor, Tensor]]:
        """{class value: images (1, C, S, S) float16 and masks (1, S, S) bool}, around each of its classes."""
        return self.load().regions

    @property
    def tiles(self) -> dict[int, tuple[Tensor, Tensor]]:
        """{class value: images (T, C, S, S) float16 and masks (T, S, S) bool}, for classes seen in tiles."""
        return self.load().tiles

    @property
    def thumbnail(self) -> Tensor:
        """(H, W, 3) uint8, at most 128 pixels on a side, with the label drawn."""
        return self.load().drawn()


def prepare_items(case: dict, slices_per_class: int) -> tuple[CaseListing, list[Prepared]]:
    """The items of a case.

    Args:
        case: preprocessed: image (Z, C, S, S) in [0, 1], label (Z, S, S), both also at their own size as `image_full`
            and `label_full`, geometry, and scaling where there was a choice.
        slices_per_class: slices taken from a volume for each class.

    Some slices without any class are items, too, and so is a picture without any: they guide nothing, but show what an
    image without the classes looks like, see `sam2sgp.inferers.object_gate`.

    Slices much longer than wide are seen through windows, see `Region.windows`, which count as slices. Of a volume that
    is labelled on single slices only, no slice counts as without a class, and nothing is known of its parts.
    """
    volume = len(case["label"]) > 1
    sparse = is_sparse(case["label_full"].numpy(), case["geometry"].spacing)
    shares = main_shares(case["label_full"].numpy(), MAX_VALUE) if volume and not sparse else {}
    slice_axis = case["geometry"].slice_axis if volume else None
    fits = edge_fits(case["image_full"].numpy(), case["label_full"].numpy())
    pixels = pixels_by_value(case["label_full"].numpy())
    case = _in_windows(case)
    label = case["label"]
    flat = label.flatten(1)
    values = values_in(label.numpy())
    chosen: set[int] = set()
    for value in values:
        if value:
            chosen |= set(choose_slices((flat == value).sum(1).numpy(), slices_per_class))
    if not sparse:
        # An object may be too small to be left at the network's size.
        empty = (case["label_full"] == 0).flatten(1).all(1)
        chosen |= set(choose_slices(empty.numpy().astype(int), EMPTY_SLICES))
    measures = {index: ImageMeasures.of(case["label_full"][index], volume) for index in chosen}
    items = [
        Prepared(case["image"][index].half(), label[index].to(torch.uint8), **_crops(case, index, measures[index]))
        for index in sorted(chosen)
    ]
    infos = [
        ItemInfo.of(index if len(label) > 1 else None, item, measures[index])
        for index, item in zip(sorted(chosen), items, strict=True)
    ]
    scaling = case.get("scaling", AS_GIVEN)
    warnings = tuple(told for told in case.get("warnings", ()) if told not in scaling.warnings)
    about = fits, warnings, pixels, case.get("acquired", Acquired())
    return CaseListing(tuple(values), tuple(infos), scaling, shares, slice_axis, *about), items


def choose_slices(areas: np.ndarray, count: int) -> list[int]:
    """Slices of one volume to use as support for one class.

    The largest, and an even spread over the extent with both ends included; never an empty slice.

    Args:
        areas: (Z,) pixels of the class in each slice.
        count: slices wanted, at least 1. With 1 it is only the largest, with 2 the largest and the end farther off;
            from 4 on each further one halves the widest gap.

    Returns:
        Sorted, distinct indices, at most `count`; as many as that where so many slices hold the class.
    """
    areas = np.asarray(areas)
    present = np.flatnonzero(areas > 0)
    if count < 1:
        raise ConfigError(f"slices per class: expected at least 1, found {count}.")
    if len(present) <= count:
        return present.tolist()
    largest = int(np.argmax(areas))
    chosen = {largest}
    ends = sorted((int(present[0]), int(present[-1])), key=lambda end: -abs(end - largest))
    chosen.update(ends[: count - 1])
    while len(chosen) < count:
        free = [int(index) for index in present if int(index) not in chosen]
        chosen.add(max(free, key=lambda index: min(abs(index - other) for other in chosen)))
    return sorted(chosen)


def _in_windows(case: dict) -> dict:
    """A case whose slices are the windows that its own are seen through, if any, slice by slice."""
    shape, size = tuple(case["label_full"].shape[-2:]), case["image"].shape[-1]
    windows = Region.windows(shape, size, pixel_size(case["geometry"].spacing))
    if not windows:
        return case
    image, label = case["image_full"], case["label_full"]
    seen = {
        "image": [window.apply(image) for window in windows],
        "label": [window.apply_label(label) for window in windows],
        "image_full": [image[(..., *window.place)] for window in windows],
        "label_full": [label[(..., *window.place)] for window in windows],
    }
    return case | {key: torch.stack(parts, 1).flatten(0, 1) for key, parts in seen.items()}


def _crops(case: dict, index: int, measures: ImageMeasures) -> dict[str, dict[int, tuple[Tensor, Tensor]]]:
    """Regions and tiles of one slice."""
    image, label = case["image_full"][index][None], case["label_full"][index]
    pixel = pixel_size(case["geometry"].spacing)
    size = case["image"].shape[-1]
    found: dict[str, dict] = {kind: {} for kind in CROPS}
    for value, target in measures.targets.items():
        mask = label == value
        whole = Region.around(mask, size, pixel, below=torch.inf)
        crops = {} if whole is None else {"regions": [whole]}
        share = tile_share(target.thickness / max(label.shape), target.count, target.part_share, size, many=SOME_PARTS)
        if share is not None:
            tiles = Region.tiles(tuple(label.shape), size, share, pixel)
            tiles.sort(key=lambda tile: -int(mask[tile.place].sum()))
            crops["tiles"] = tiles[:MAX_TILES]
        for kind, rectangles in crops.items():
            images = torch.cat([rectangle.apply(image) for rectangle in rectangles]).half()
            masks = [rectangle.apply_label(mask[None].to(torch.uint8)) > 0 for rectangle in rectangles]
            found[kind][value] = images, torch.cat(masks)
    return found
