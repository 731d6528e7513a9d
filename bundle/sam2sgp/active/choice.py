"""Which images to label next, from their embeddings and uncertainties."""

import torch
from torch import Tensor

from sam2sgp.active.coverage import distances, k_centre, represent
from sam2sgp.errors import ConfigError

STRATEGIES = ("uncertainty", "coverage", "hybrid")
# Images that stand for the pool in `hybrid`, so that a choice among 10,000 takes a fraction of a second.
MAX_POOL = 256


def choose(
    strategy: str, candidates: Tensor, labelled: Tensor, uncertainty: Tensor, count: int = 1
) -> tuple[Tensor, Tensor]:
    """Images to label next, best first.

    - "uncertainty": by falling uncertainty;
    - "coverage": `k_centre`;
    - "hybrid": `represent`, in which an image of the pool weighs as much as it is uncertain: what is labelled is what
      helps most with that which the support set leaves open, for a query is guided by the items most like it.

    Args:
        strategy: one of `STRATEGIES`.
        candidates: (N, D) L2-normalised embeddings of unlabelled images.
        labelled: (M, D) of the labelled ones, M may be 0.
        uncertainty: (N,) in [0, 1] of the candidates; NaN where it is not known counts as their mean.
        count: how many.

    Returns:
        Indices (min(count, N),), and the candidates' distances (N,) to the nearest labelled image.

    Raises:
        ConfigError: unknown strategy.
    """
    if strategy not in STRATEGIES:
        raise ConfigError(f"strategy is {strategy!r}: expected one of {', '.join(STRATEGIES)}.")
    distance = distances(candidates, labelled)
    known = uncertainty.isfinite()
    uncertainty = uncertainty.where(known, uncertainty[known].mean() if known.any() else torch.ones(()))
    if strategy == "uncertainty":
        return uncertainty.argsort(descending=True, stable=True)[:count], distance
    if strategy == "coverage":
        return k_centre(candidates, labelled, count), distance
    stand_in = torch.linspace(0, max(len(candidates) - 1, 0), min(len(candidates), MAX_POOL)).round().long()
    return represent(candidates, labelled, count, candidates[stand_in], uncertainty[stand_in]), distance
