"""Whether a class is in an image at all: the evidence for it, with thresholds that the support set itself teaches.

Evidence is SAM2's predicted IoU times the side of a square as large as what was found, each pixel counted by its
certainty, times the square root of the odds by SAM2's object score. Together they tell images with the class from those
without better than any of them does, but where to cut differs from task to task, and from patient to patient. So
support items without the class, such as the slices beyond its end or pictures with an empty label, are segmented like
queries, each guided by other patients, and so are items with the class. They teach two thresholds:

- of a slice's share of the most evidence in its volume: what is beyond an object's end is told from the end by the
  object's middle, however faint a patient is as a whole. Between two slices with more, a slice counts as these;
- of evidence itself, for images by themselves and volumes without the class. Because patients differ, it is set well
  below where it would pay on the support set.

A threshold is kept where evidence tells the two kinds of item apart, and where cutting there pays: where it takes away
more than it costs. Otherwise nothing is cut, because losing a structure is worse than finding it once too often.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from sam2sgp.inferers.items_as_queries import Judge, TaughtByItems
from sam2sgp.networks import SGPOutput

# Logit of what is not there: a probability of 0.00005.
ABSENT_LOGIT = -10.0
# Support items judged, about; and how many without the class it takes to learn a threshold.
MAX_JUDGED = 64
MIN_ABSENT = 5
# And how many with it.
MIN_PRESENT = 3
# Evidence must order this share of the pairs of an image with and one without the class rightly (area under the ROC
# curve); a slice of a volume with the class counts by its pixels of it.
MIN_SEPARATION = 0.8
# A pixel lost counts as much as this many found wrongly; the least gain, as a share of all pixels of the class.
LOSS_WEIGHT = 3.0
MIN_GAIN = 0.005
# The threshold of evidence itself, as a share of where it would pay on the support set.
CAUTION = 0.5
# Object scores count up to this: the odds by higher ones, times the rest, would leave the range of numbers.
MAX_SCORE = 40.0


@dataclass
class Thresholds:
    """The bounds up to which each of C classes counts as absent; minus infinity where nothing is cut.

    in_image: (C,) evidence of an image. in_volume: (C,) share of the most evidence in its volume.
    """

    in_image: Tensor
    in_volume: Tensor

    @classmethod
    def none(cls, classes: int) -> "Thresholds":
        """Nothing is cut."""
        return cls(*torch.full((2, classes), -torch.inf))

    def to(self, device: torch.device) -> "Thresholds":
        return Thresholds(self.in_image.to(device), self.in_volume.to(device))

    def absent(self, evidence: Tensor, most: Tensor | None = None) -> Tensor:
        """Whether classes are absent, (B, C) bool.

        Args:
            evidence: (B, C) of images. most: (C,) in their volume; None: they are images by themselves.
        """
        absent = evidence <= self.in_image
        if most is None:
            return absent
        return absent | (evidence <= self.in_volume * most.clamp(min=torch.finfo(most.dtype).tiny))


class ObjectGate(TaughtByItems[Thresholds]):
    """Thresholds that an encoded support bank teaches."""

    def _learn(self, judge: Judge, members: list[int]) -> Thresholds:
        """Learn from some items as queries, each guided by other patients; of a volume all items are judged or none."""
        bank = self.bank
        present = bank.holds[members].sum(0)
        enough = (present >= MIN_PRESENT) & (len(members) - present >= MIN_ABSENT)
        if not enough.any() or len({bank.items[number].patient for number in members}) < 2:
            return Thresholds.none(len(bank.class_values))
        by_volume = defaultdict(list)
        for number in members:
            by_volume[bank.items[number].source].append(number)
        volumes = list(by_volume.values())
        count = min(len(volumes), max(2, MAX_JUDGED * len(volumes) // len(members)))
        judged = [volumes[place] for place in torch.linspace(0, len(volumes) - 1, count).round().long().tolist()]
        found = self.items(judge, [number for numbers in judged for number in numbers])
        owner = torch.tensor([volume for volume, numbers in enumerate(judged) for _ in numbers])
        return learn(found.evidence, found.size, found.found, owner)


def evidence_of(output: SGPOutput) -> Tensor:
    """Evidence (B, C) for the classes, at least 0."""
    certainty = (2 * output.logits.float().sigmoid() - 1).clamp(min=0)
    odds = output.object_score.float().clamp(max=MAX_SCORE).exp()
    return output.iou.float() * certainty.flatten(2).mean(2).sqrt() * odds.sqrt()


def among_neighbours(evidence: Tensor) -> Tensor:
    """Evidence (Z, C) of neighbouring slices where a slice has at least as much as both its neighbours."""
    between = torch.minimum(evidence[:-2], evidence[2:])
    return torch.cat([evidence[:1], torch.maximum(evidence[1:-1], between), evidence[1:][-1:]])


def without_absent(logits: Tensor, absent: Tensor) -> Tensor:
    """Logits (B, C, H, W) with those of absent classes, (B, C) bool, at `ABSENT_LOGIT` at most."""
    return torch.where(absent[..., None, None], logits.clamp(max=ABSENT_LOGIT), logits)


def learn(evidence: Tensor, size: Tensor, found: Tensor, volume: Tensor) -> Thresholds:
    """Learn thresholds from n images.

    Args:
        evidence: (n, C). size: (n, C) pixels of the class in the image. found: (n, C) pixels found.
        volume: (n,) number of the volume that an image is a slice of, or of the image.
    """
    rows = volume[:, None].expand_as(evidence)
    most = torch.zeros_like(evidence).scatter_reduce(0, rows, evidence, "amax")[volume]
    of_volume = torch.zeros_like(size).scatter_add(0, rows, size)[volume]
    share = evidence / most.clamp(min=torch.finfo(evidence.dtype).tiny)
    in_image, in_volume = [], []
    for class_index in range(evidence.shape[1]):
        in_image.append(CAUTION * gate_threshold(evidence[:, class_index], size[:, class_index], found[:, class_index]))
        held = of_volume[:, class_index] > 0
        in_volume.append(
            gate_threshold(share[held, class_index], size[held, class_index], found[held, class_index], by_pixel=True)
        )
    return Thresholds(torch.tensor(in_image), torch.tensor(in_volume))


def gate_threshold(evidence: Tensor, size: Tensor, found: Tensor, by_pixel: bool = False) -> float:
    """The evidence up to which a class counts as absent; minus infinity where no threshold pays.

    It lies above those images of which those without the class have the most pixels found, less three times the size of
    the class in the others: in full, because what is missed at first a later pass may find.

    Args:
        evidence: (n,) of n images, or their share of the most in their volume.
        size, found: (n,), see `learn`.
        by_pixel: whether evidence tells the two kinds apart is counted by the pixels of the class, as what it costs to
            cut is. An object's ends, with few of its pixels, look much like what lies beyond; it is not lost with them.
    """
    absent = size == 0
    if int(absent.sum()) < MIN_ABSENT or int((~absent).sum()) < MIN_PRESENT:
        return -torch.inf
    higher = (evidence[~absent][:, None] > evidence[absent]).float().mean(1)
    weight = size[~absent].float() if by_pixel else torch.ones_like(higher)
    if (weight * higher).sum() < MIN_SEPARATION * weight.sum():
        return -torch.inf
    order = evidence.argsort()
    gain = (found * absent - LOSS_WEIGHT * size)[order].cumsum(0)
    best = int(gain.argmax())
    if gain[best] <= MIN_GAIN * size.sum() or best == len(order) - 1:
        return -torch.inf
    return float(evidence[order[best : best + 2]].mean())
