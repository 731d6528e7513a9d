"""How well labelled images cover the others in the space of retrieval embeddings.

In: L2-normalised embeddings, one row per image. Out: distances and orders of labelling. Distances are chords of the
unit sphere over its diameter, |a - b| / 2 = sqrt((1 - cos) / 2), in [0, 1].
"""

import torch
from torch import Tensor


def distances(candidates: Tensor, labelled: Tensor) -> Tensor:
    """Distance (N,) of candidates (N, D) to the nearest of the labelled images (M, D); 1 where there are none."""
    if not len(labelled):
        return torch.ones(len(candidates))
    return _chord((candidates @ labelled.T).amax(1))


def k_centre(candidates: Tensor, labelled: Tensor, count: int) -> Tensor:
    """Farthest-first order of labelling: always the candidate that is least like anything labelled or chosen so far.

    The greedy 2-approximation of the k-centre problem, min over sets S of max_x min_{s in S} d(x, s), as a core-set
    for active learning: Sener & Savarese 2018 (arXiv 1708.00489), algorithm 1. With nothing labelled it starts from the
    candidate nearest to the mean, because the farthest is not defined and an outlier teaches least.

    Args:
        candidates: (N, D), L2-normalised. labelled: (M, D), M may be 0.
        count: how many.

    Returns:
        Indices (min(count, N),); equal distances in the order of the candidates.
    """
    nearest = distances(candidates, labelled)
    order: list[int] = []
    while len(order) < min(count, len(candidates)):
        score = nearest if len(labelled) or order else candidates @ candidates.mean(0)
        chosen = int(score.argmax())
        order.append(chosen)
        nearest = torch.minimum(nearest, _chord(candidates @ candidates[chosen]))
        nearest[order] = -1.0
    return torch.tensor(order, dtype=torch.long)


def represent(
    candidates: Tensor, labelled: Tensor, count: int, pool: Tensor | None = None, weight: Tensor | None = None
) -> Tensor:
    """Order of labelling that always takes the candidate which brings labels closest to all images together.

    Greedy facility location, a submodular objective (Wei, Iyer & Bilmes 2015, "Submodularity in data subset selection
    and active learning"): the gain of a candidate c is the sum over the pool of w(x) max(0, d(x) - d(x, c) / 2), where
    d(x, c) is the distance of x to c and d(x) that to the nearest labelled or chosen image. Unlike `k_centre` it does
    not go after outliers.

    Args:
        candidates: (N, D), L2-normalised. labelled: (M, D), M may be 0.
        count: how many.
        pool: (R, D) images that are to be covered; None: the candidates.
        weight: (R,) their weights, at least 0; None: 1 each.

    Returns:
        Indices (min(count, N),); equal gains in the order of the candidates.
    """
    pool = candidates if pool is None else pool
    nearest = distances(pool, labelled)
    between = _chord(candidates @ pool.T)
    weight = torch.ones(len(pool)) if weight is None else weight
    order: list[int] = []
    while len(order) < min(count, len(candidates)):
        gain = (nearest - between).clamp(min=0) @ weight
        gain[order] = -1.0
        order.append(int(gain.argmax()))
        nearest = torch.minimum(nearest, between[order[-1]])
    return torch.tensor(order, dtype=torch.long)


def _chord(cosine: Tensor) -> Tensor:
    return ((1 - cosine) / 2).clamp(0, 1).sqrt()
