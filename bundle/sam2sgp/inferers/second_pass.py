"""The second pass: small and thin objects once more, at the image's own resolution.

At the network's size an object of a few pixels is a cell or two of the embedding. The second pass cuts a square around
what the first pass found, cuts the support images around their own masks by the same rule, so that objects appear in
the same size, and segments the one guided by the other. What may be anywhere, thin structures such as vessels and many
small parts such as nuclei, is seen in overlapping tiles instead, the smaller the thinner it is in the support set: at
most nine of an image, or of each slice of a volume on which the class was found. Tiles of one size are encoded once for
all classes, so that a slice takes at most ten times as long, and longer only where a few classes need tiles of several
sizes. Where the support set has many classes, they share one size, a class counts as found where it wins, and the crops
of a slice are limited, those that show most of a class first.

The mean of both passes' logits is the result, blended over the rims of regions and tiles.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sam2sgp.inferers.precision import autocast
from sam2sgp.inferers.query_cache import QueryCache
from sam2sgp.inferers.settings import InferenceSettings
from sam2sgp.networks import SAM2SGP, ImageFeatures, SupportMemory
from sam2sgp.support.bank import FEW_CLASSES, SupportBank
from sam2sgp.transforms.array import Region, label_map, to_three_channels

SECOND_PASS_WEIGHT = 0.5
EPS = 1e-6
# At most so many crops are segmented again in an image with many classes.
MOST_CROPS = 20


@dataclass
class _Crop:
    """One slice and class to be segmented again."""

    row: int
    class_index: int
    region: Region
    image: Tensor


# Features of one crop each, by its row and region: classes may share it.
_Encoded = dict[tuple[int, Region], ImageFeatures]


class SecondPass:
    """Segment small objects a second time in a region of interest.

    Args:
        bank: the support bank, whose items hold a region per class.
        settings: `region_below` says which objects are small, `sampler` chooses among the items' regions.
        query_cache: features of regions that may come again; None: each is encoded whenever it comes.
    """

    def __init__(self, bank: SupportBank, settings: InferenceSettings, query_cache: QueryCache | None = None) -> None:
        self.bank = bank
        self.settings = settings
        self.query_cache = query_cache

    @torch.no_grad()
    def __call__(
        self,
        logits: Tensor,
        images: Tensor,
        network: SAM2SGP,
        pixel: tuple[float, float] = (1.0, 1.0),
        patient: str | None = None,
        group: str | None = None,
    ) -> Tensor:
        """Correct logits on the images' own grid.

        Args:
            logits: (B, C, H, W) of the first pass, for all classes of the bank.
            images: (B, C', H, W) in [0, 1].
            network: in evaluation mode.
            pixel: height and width of a pixel in mm.
            patient, group: as for `SupportSetInferer.chunks`.

        Returns:
            The logits, those in regions averaged with the second pass.
        """
        if not self.settings.region_below:
            return logits
        with autocast(logits.device.type, self.settings.precision):
            second, weights = self._again(self._crops(logits, images, network, pixel), logits, network, patient, group)
        mean = torch.where(weights > 0, second / weights.clamp(min=EPS), logits)
        return torch.lerp(logits, mean, SECOND_PASS_WEIGHT * weights.clamp(max=1))

    def _again(
        self, crops: list[_Crop], logits: Tensor, network: SAM2SGP, patient: str | None, group: str | None
    ) -> tuple[Tensor, Tensor]:
        """Weighted sums of the crops' logits, and the weights, both of the shape (B, C, H, W) of `logits`."""
        second, weights = torch.zeros_like(logits), torch.zeros_like(logits)
        encoded: _Encoded = {}
        for start in range(0, len(crops), self.settings.batch_size):
            batch = crops[start : start + self.settings.batch_size]
            encoded = self._encode(batch, network, encoded)
            for crop, values in self._segment(batch, encoded, network, patient, group):
                place = (crop.row, crop.class_index, *crop.region.place)
                window = crop.region.window(tuple(logits.shape[-2:])).to(logits.device)
                second[place] += window * crop.region.restore(values[None])[0, 0]
                weights[place] += window
        return second, weights

    def _crops(self, logits: Tensor, images: Tensor, network: SAM2SGP, pixel: tuple[float, float]) -> list[_Crop]:
        """What to segment again of all images, in the order that encodes each tile once."""
        crops = []
        if logits.shape[1] <= FEW_CLASSES:
            for row, masks in enumerate(logits > 0):
                crops += self._crops_of(row, masks, images, network, pixel)
        else:
            numbers = torch.arange(1, logits.shape[1] + 1, device=logits.device)[:, None, None]
            for row, winner in enumerate(label_map(logits)):
                masks = winner == numbers
                crops += _most_useful(self._crops_of(row, masks, images, network, pixel, same_tiles=True), masks)
        # Classes that share a tile come together, so that it is encoded once, also where a batch ends between them.
        return sorted(crops, key=lambda crop: (crop.row, crop.region.top, crop.region.left))

    def _crops_of(
        self,
        row: int,
        masks: Tensor,
        images: Tensor,
        network: SAM2SGP,
        pixel: tuple[float, float],
        same_tiles: bool = False,
    ) -> list[_Crop]:
        """What to segment again of an image, where the classes' masks (C, H, W) are.

        same_tiles: all classes that are seen in tiles share the smallest ones, which are encoded once.
        """
        size = network.image_size
        class_indices = torch.nonzero(masks.flatten(1).any(1))[:, 0].tolist()
        shares = {class_index: self.bank.tile_share(class_index, size) for class_index in class_indices}
        least = min((share for share in shares.values() if share is not None), default=None)
        crops = []
        for class_index in class_indices:
            share = least if same_tiles and shares[class_index] is not None else shares[class_index]
            if share is not None:
                regions = Region.tiles(tuple(masks.shape[-2:]), size, share, pixel)
            else:
                found = Region.around(masks[class_index], size, pixel, self.settings.region_below)
                regions = [] if found is None else [found]
            crops += [_Crop(row, class_index, region, images[row]) for region in regions]
        return crops

    def _encode(self, crops: list[_Crop], network: SAM2SGP, before: _Encoded) -> _Encoded:
        """Features of crops; those of the ones encoded `before` are not made again."""
        images = {(crop.row, crop.region): crop.image for crop in crops}
        new = [place for place in images if place not in before]
        if new:
            device = next(network.parameters()).device
            cut = torch.cat([place[1].apply(images[place][None]) for place in new]).to(device, torch.float32)
            cut = to_three_channels(cut)
            cache = self.query_cache
            features = network.encode(cut) if cache is None else cache(cut, network, self.bank.fingerprint)
            before = before | {place: features[[number]] for number, place in enumerate(new)}
        return {place: before[place] for place in images}

    def _segment(
        self, crops: list[_Crop], encoded: _Encoded, network: SAM2SGP, patient: str | None, group: str | None
    ) -> Iterator[tuple[_Crop, Tensor]]:
        """Crops with their logits (1, S, S); without those of classes of which no support may be used."""
        features = ImageFeatures.concatenate([encoded[crop.row, crop.region] for crop in crops])
        by_class = defaultdict(list)
        for number, crop in enumerate(crops):
            by_class[crop.class_index].append(number)
        # Rows of whatever classes go through the network together where they have equally many support items.
        by_count: dict[int, list[tuple[list[int], SupportMemory]]] = defaultdict(list)
        for class_index, numbers in by_class.items():
            sampler = self.settings.sampler
            support = self.bank.region_support(network, features[numbers], sampler, class_index, patient, group)
            if support is not None:
                by_count[support.tokens.shape[2]].append((numbers, support))
        for members in by_count.values():
            numbers = [number for own, _ in members for number in own]
            support = SupportMemory.concatenate([memory for _, memory in members])
            logits = network.segment(features[numbers], support).logits.float()
            yield from zip([crops[number] for number in numbers], logits, strict=True)


def _most_useful(crops: list[_Crop], masks: Tensor) -> list[_Crop]:
    """At most `MOST_CROPS` of an image's crops: of each class in masks (C, H, W) its best one, then the next one."""
    ranked = []
    by_class = defaultdict(list)
    for crop in crops:
        by_class[crop.class_index].append((int(masks[crop.class_index][crop.region.place].sum()), crop))
    for own in by_class.values():
        own.sort(key=lambda entry: -entry[0])
        ranked += [(place, -pixels, crop) for place, (pixels, crop) in enumerate(own) if pixels]
    ranked.sort(key=lambda entry: entry[:2])
    return [crop for *_, crop in ranked[:MOST_CROPS]]
