"""How far a query is from the support images, measured by how far these are from each other.

In: retrieval embeddings. Out: a ratio for each query. Up to 1 it is as near to its nearest support image as support
images of different patients are to theirs; far above, it is of another kind, and what was learned from the support set
may not hold.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# With fewer patients nothing is known of how far they are from each other.
MIN_PATIENTS = 3
# Support images that are measured, at most: their distances are a table.
MAX_MEASURED = 256
# The reference is a high quantile, not the maximum, of which one odd image would decide.
QUANTILE = 0.9
# From this ratio on a query counts as unlike the support set.
UNLIKE = 1.4


@dataclass(frozen=True)
class Familiarity:
    """What a support set is like inside.

    embedding: (N, D) L2-normalised embeddings of its images. patients: of whom each is. reference: the distance,
    1 - cosine, that images have from the nearest image of another patient; NaN where there are too few patients.
    """

    embedding: Tensor
    patients: tuple[str, ...]
    reference: float

    @classmethod
    def of(cls, embedding: Tensor, patients: Sequence[str]) -> "Familiarity":
        """Learn from embeddings (N, D) and the patient of each."""
        if len(set(patients)) < MIN_PATIENTS:
            return cls(embedding, tuple(patients), float("nan"))
        numbers = {name: number for number, name in enumerate(dict.fromkeys(patients))}
        owner = torch.tensor([numbers[name] for name in patients], device=embedding.device)
        chosen = torch.linspace(0, len(embedding) - 1, min(len(embedding), MAX_MEASURED)).round().long()
        chosen = chosen.to(embedding.device)
        similarity = embedding[chosen] @ embedding.T
        nearest = similarity.masked_fill(owner[chosen][:, None] == owner, -1.0).amax(1)
        return cls(embedding, tuple(patients), float((1 - nearest).quantile(QUANTILE)))

    def __call__(self, embedding: Tensor, patient: str | None = None) -> Tensor:
        """Ratio (B,) of the distance of queries, by their embeddings (B, D), to the reference.

        Images of `patient`, whose own the queries are, do not count. NaN where nothing is known.
        """
        others = torch.tensor([name != patient for name in self.patients], dtype=torch.bool, device=embedding.device)
        if not bool(others.any()):
            return torch.full((len(embedding),), float("nan"))
        nearest = (embedding @ self.embedding[others].T).amax(1)
        return (1 - nearest).clamp(min=0).cpu() / self.reference


def trust(distance: Tensor) -> Tensor:
    """How far what was learned from the support set holds for queries at these ratios: 1 up to 1, 0 from `UNLIKE` on
    twice as far, in between less and less; 1 where nothing is known."""
    falling = 1 - (distance - 1) / (2 * (UNLIKE - 1))
    return torch.where(distance.isnan(), 1.0, falling.clamp(0, 1))


def case_distance(distance: Tensor, found: Tensor) -> float:
    """The ratio of a case: the median over its slices (Z,) on which something was found, over all where nothing was.

    Args:
        distance: (Z,) ratios. found: (Z,) pixels found.
    """
    return float((distance[found > 0] if bool(found.any()) else distance).median())


def is_unlike(distance: float) -> bool:
    """Whether a case counts as unlike the support set; never where nothing is known."""
    return distance > UNLIKE
