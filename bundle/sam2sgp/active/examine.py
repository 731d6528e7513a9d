"""What an image looks like to the network, and how uncertain its segmentation is.

In: a prepared image, the network and an inferer with its support bank. Out: an `ImageScore`. The embedding depends on
only image and network, the uncertainty on the support set as well. An image is encoded once; of a volume, a few slices
evenly spread over it stand for all, each segmented as an image of its own.

Three parts, each in [0, 1] and 0 where there is no doubt. For class c let p be the probabilities sigmoid(final logits)
of all pixels of all slices that are looked at:

- `pseudo`, disagreement of pseudo-mask q and final mask: D(p, q) = 1 - 2 sum pq / (sum p^2 + sum q^2), one minus the
  soft Dice of Milletari et al. 2016 (arXiv 1606.04797): 0 for equal maps, soft or not, 1 for disjoint ones;
- `entropy`, the doubt about a pixel of the class: sum p H(p) / sum p with the binary entropy H in bits;
- `support`, disagreement of disjoint support subsets: D(a, b), where a and b are the final probabilities when the
  support items retrieved for the image are dealt out in turn, by their similarity, to two halves. A query by committee
  (Seung et al. 1992) whose members differ in what they were told.

A part is the mean over the classes of which there is at least about a pixel, and the uncertainty is the mean of the
parts. Where no class is found at all, nothing tells an image without objects from a failure: then it is `UNDECIDED`.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from sam2sgp.inferers import SupportSetInferer
from sam2sgp.inferers.precision import autocast
from sam2sgp.inferers.query_cache import QueryCache
from sam2sgp.networks import SAM2SGP
from sam2sgp.support import SupportSampler
from sam2sgp.transforms import to_three_channels

MAX_SLICES = 16
LEAST_MASS = 1.0
UNDECIDED = 0.5


@dataclass(frozen=True)
class ImageScore:
    """embedding: (D,) float32, L2-normalised. uncertainty: in [0, 1]; None without a support set. parts: by name."""

    embedding: Tensor
    uncertainty: float | None
    parts: dict[str, float]


class _EveryOther:
    """Chooses every other one of the support items that a sampler chooses; the one where there is only one."""

    def __init__(self, sampler: SupportSampler, first: int) -> None:
        self.sampler = sampler
        self.first = first

    def __call__(self, similarity: Tensor, eligible: Tensor) -> tuple[Tensor, Tensor]:
        index, values = self.sampler(similarity, eligible)
        if index.shape[1] < 2:
            return index, values
        return index[:, self.first :: 2], values[:, self.first :: 2]


class _Overlap:
    """One minus the soft Dice of pairs of maps by class, over any number of batches."""

    def __init__(self) -> None:
        self.product = self.squares = torch.zeros((), dtype=torch.float64)

    def add(self, first: Tensor, second: Tensor) -> None:
        """Probabilities (B, C, S, S)."""
        self.product = self.product + (first * second).sum((0, 2, 3), dtype=torch.float64).cpu()
        self.squares = self.squares + (first**2 + second**2).sum((0, 2, 3), dtype=torch.float64).cpu()

    def disagreement(self, counted: Tensor) -> float | None:
        """Mean over the counted classes (C,) bool that have mass; None if none has."""
        found = counted & (self.squares >= LEAST_MASS)
        return float((1 - 2 * self.product[found] / self.squares[found]).mean()) if found.any() else None


def embed(
    network: SAM2SGP, image: Tensor, batch_size: int = 8, precision: str = "fp32", max_slices: int = MAX_SLICES
) -> Tensor:
    """L2-normalised retrieval embedding (D,) float32 of an image (Z, C', S, S) in [0, 1]: the mean over its slices.

    Args:
        network: in evaluation mode.
        batch_size, precision: as of `InferenceSettings`.
        max_slices: slices looked at, evenly spread.
    """
    return _embed(network, _spread(image, max_slices), batch_size, precision, None, None)


def examine(inferer: SupportSetInferer, network: SAM2SGP, case: dict, max_slices: int = MAX_SLICES) -> ImageScore:
    """Score an image.

    Args:
        inferer: as inference uses it, with its bank.
        network: on the device to compute on, in evaluation mode.
        case: prepared for inference, with `image` (Z, C', S, S) in [0, 1], and `group` where it has one.
        max_slices: slices looked at, evenly spread.
    """
    image, settings = _spread(case["image"], max_slices), inferer.settings
    if not inferer.bank.items:
        return ImageScore(_embed(network, image, settings.batch_size, settings.precision, None, None), None, {})
    # Room for all features of this image: it is encoded once for all that follows.
    cache = QueryCache(2**20)
    whole = _guided(inferer, settings.sampler, cache)
    halves = [_guided(inferer, _EveryOther(settings.sampler, first), cache) for first in (0, 1)]
    group, classes = case.get("group"), len(inferer.bank.class_values)
    pseudo, support = _Overlap(), _Overlap()
    doubt, mass = torch.zeros(2, classes, dtype=torch.float64)
    divided = torch.zeros(classes, dtype=torch.bool)
    for chunk, *parts in zip(*(part.chunks(image, network, group=group) for part in (whole, *halves)), strict=True):
        final = chunk.output.logits.sigmoid()
        pseudo.add(final, chunk.output.pseudo_logits.sigmoid())
        support.add(*(part.output.logits.sigmoid() for part in parts))
        doubt += (final * _entropy(chunk.output.logits)).sum((0, 2, 3), dtype=torch.float64).cpu()
        mass += final.sum((0, 2, 3), dtype=torch.float64).cpu()
        for entry in chunk.retrieved:
            divided[inferer.bank.class_values.index(entry.value)] |= entry.index.shape[1] > 1
    found = mass >= LEAST_MASS
    values = {
        "pseudo": pseudo.disagreement(torch.ones_like(found)),
        "entropy": float((doubt[found] / mass[found]).mean()) if found.any() else None,
        "support": support.disagreement(divided),
    }
    known = {name: min(max(value, 0.0), 1.0) for name, value in values.items() if value is not None}
    uncertainty = sum(known.values()) / len(known) if known else UNDECIDED
    fingerprint = inferer.bank.fingerprint
    embedding = _embed(network, image, settings.batch_size, settings.precision, cache, fingerprint)
    return ImageScore(embedding, uncertainty, known)


def _guided(inferer: SupportSetInferer, sampler, cache: QueryCache) -> SupportSetInferer:
    """The same with another sampler and cache; slices don't guide each other."""
    settings = replace(inferer.settings, sampler=sampler, volume_memory=None)
    return replace(inferer, settings=settings, query_cache=cache)


def _spread(image: Tensor, count: int) -> Tensor:
    """At most `count` slices (Z, ...), each in the middle of an equal part of the volume."""
    slices = len(image)
    if slices <= count:
        return image
    return image[((torch.arange(count) + 0.5) * slices / count).long()]


@torch.no_grad()
def _embed(
    network: SAM2SGP,
    image: Tensor,
    batch_size: int,
    precision: str,
    cache: QueryCache | None,
    fingerprint: str | None,
) -> Tensor:
    device = next(network.parameters()).device
    total: Tensor | float = 0.0
    with autocast(device.type, precision):
        for start in range(0, len(image), batch_size):
            # As the inferer encodes, so that the cache holds it.
            part = to_three_channels(image[start : start + batch_size].to(device, torch.float32))
            features = network.encode(part) if cache is None else cache(part, network, fingerprint)
            total = total + network.retrieval_embedding(features).float().sum(0)
    return F.normalize(total, dim=0).cpu()


def _entropy(logits: Tensor) -> Tensor:
    """Binary entropy in bits of sigmoid(logits), exact also where that rounds to 0 or 1."""
    p = logits.sigmoid()
    return -(p * F.logsigmoid(logits) + (1 - p) * F.logsigmoid(-logits)) / torch.log(torch.tensor(2.0))
