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

from sam2sgp.inferers.query_cache import QueryCache
from sam2sgp.inferers.settings import InferenceSettings
from sam2sgp.networks import SAM2SGP, ImageFeatures, SupportMemory
from sam2sgp.support.bank import FEW_CLASSES, SupportBank
from sam2sgp.transforms.array import Region, label_map, to_three_channels

SECOND_PASS_WEIGHT = 0.5
EPS = 1e-6
# Of an image with many classes, crops of classes that are segmented again.
MOST_CROPS = 20


@dataclass
class _Job:
    """One slice and class to be segmented again."""

    row: int
    class_index: int
    region: Region
    image: Tensor


# Features of one crop each, by its row and region.
_Crops = dict[tuple[int, Region], ImageFeatures]


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
        shape = tuple(logits.shape[-2:])
        jobs = []
        if logits.shape[1] <= FEW_CLASSES:
            for row, masks in enumerate(logits > 0):
                jobs += self._jobs(row, masks, images, network, pixel)
        else:
            numbers = torch.arange(1, logits.shape[1] + 1, device=logits.device)[:, None, None]
            for row, winner in enumerate(label_map(logits)):
                masks = winner == numbers
                jobs += _most_useful(self._jobs(row, masks, images, network, pixel, same_tiles=True), masks)
        # Classes that share a tile come together, so that it is encoded once, also where a batch ends between them.
        jobs.sort(key=lambda job: (job.row, job.region.top, job.region.left))
        second = torch.zeros_like(logits)
        weights = torch.zeros_like(logits)
        crops: _Crops = {}
        for start in range(0, len(jobs), self.settings.batch_size):
            batch = jobs[start : start + self.settings.batch_size]
            crops = self._encoded(batch, network, crops)
            for job, values in self._segment(batch, crops, network, patient, group):
                place = (job.row, job.class_index, *job.region.place)
                window = job.region.window(shape).to(logits.device)
                second[place] += window * job.region.restore(values[None])[0, 0]
                weights[place] += window
        mean = torch.where(weights > 0, second / weights.clamp(min=EPS), logits)
        return torch.lerp(logits, mean, SECOND_PASS_WEIGHT * weights.clamp(max=1))

    def _jobs(
        self,
        row: int,
        masks: Tensor,
        images: Tensor,
        network: SAM2SGP,
        pixel: tuple[float, float],
        same_tiles: bool = False,
    ) -> list[_Job]:
        """What to segment again of an image, where the classes' masks (C, H, W) are.

        same_tiles: all classes that are seen in tiles share the smallest ones, which are encoded once.
        """
        size = network.image_size
        class_indices = torch.nonzero(masks.flatten(1).any(1))[:, 0].tolist()
        shares = {class_index: self.bank.tile_share(class_index, size) for class_index in class_indices}
        least = min((share for share in shares.values() if share is not None), default=None)
        jobs = []
        for class_index in class_indices:
            share = least if same_tiles and shares[class_index] is not None else shares[class_index]
            if share is not None:
                regions = Region.tiles(tuple(masks.shape[-2:]), size, share, pixel)
            else:
                found = Region.around(masks[class_index], size, pixel, self.settings.region_below)
                regions = [] if found is None else [found]
            jobs += [_Job(row, class_index, region, images[row]) for region in regions]
        return jobs

    def _encoded(self, jobs: list[_Job], network: SAM2SGP, before: _Crops) -> _Crops:
        """Features of the jobs' crops; those of the jobs `before` are not made again."""
        images = {(job.row, job.region): job.image for job in jobs}
        new = [crop for crop in images if crop not in before]
        if new:
            device = next(network.parameters()).device
            cut = torch.cat([crop[1].apply(images[crop][None]) for crop in new]).to(device, torch.float32)
            cut = to_three_channels(cut)
            cache = self.query_cache
            features = network.encode(cut) if cache is None else cache(cut, network, self.bank.fingerprint)
            before = before | {crop: features[[number]] for number, crop in enumerate(new)}
        return {crop: before[crop] for crop in images}

    def _segment(
        self, jobs: list[_Job], crops: _Crops, network: SAM2SGP, patient: str | None, group: str | None
    ) -> Iterator[tuple[_Job, Tensor]]:
        """Jobs with their logits (1, S, S); without those of classes of which no support may be used."""
        features = ImageFeatures.concatenate([crops[job.row, job.region] for job in jobs])
        by_class = defaultdict(list)
        for number, job in enumerate(jobs):
            by_class[job.class_index].append(number)
        # Rows of whatever classes go through the network together where they have equally many support items.
        by_count: dict[int, list[tuple[list[int], SupportMemory]]] = defaultdict(list)
        for class_index, numbers in by_class.items():
            sampler = self.settings.sampler
            support = self.bank.region_support(network, features[numbers], sampler, class_index, patient, group)
            if support is not None:
                by_count[support.tokens.shape[2]].append((numbers, support))
        for parts in by_count.values():
            numbers = [number for part, _ in parts for number in part]
            support = SupportMemory.concatenate([memory for _, memory in parts])
            logits = network.segment(features[numbers], support).logits.float()
            yield from zip([jobs[number] for number in numbers], logits, strict=True)


def _most_useful(jobs: list[_Job], masks: Tensor) -> list[_Job]:
    """At most `MOST_CROPS` of an image's jobs: of each class in masks (C, H, W) its best crop, then the next one."""
    ranked = []
    by_class = defaultdict(list)
    for job in jobs:
        by_class[job.class_index].append((int(masks[job.class_index][job.region.place].sum()), job))
    for own in by_class.values():
        own.sort(key=lambda entry: -entry[0])
        ranked += [(place, -pixels, job) for place, (pixels, job) in enumerate(own) if pixels]
    ranked.sort(key=lambda entry: entry[:2])
    return [job for *_, job in ranked[:MOST_CROPS]]
