"""Whether a class is in an image at all: SAM2's object score, with a threshold that the support set itself teaches.

The object score tells images with the class from those without, but where to cut differs from task to task. Support
items without the class, such as the slices beyond its end, are segmented like queries, each guided by other patients,
and so are items with the class. A threshold is kept where the score tells the two apart, and where cutting there pays:
where it takes away more than it costs. Otherwise nothing is cut, because losing a structure is worse than finding it
once too often.
"""

import torch
from torch import Tensor

# Of what is not there: a probability of 0.00005.
ABSENT_LOGIT = -10.0
# Support items judged at most; and how many without the class it takes to learn a threshold.
MAX_JUDGED = 64
MIN_ABSENT = 10
# Of pairs of an image with and one without the class, the share that the score must order rightly (area under the ROC
# curve).
MIN_SEPARATION = 0.9
# A pixel lost counts as much as this many found wrongly; the least gain, as a share of the pixels found rightly.
LOSS_WEIGHT = 3.0
MIN_GAIN = 0.02


def without_absent(logits: Tensor, absent: Tensor) -> Tensor:
    """Logits (B, C, H, W) with those of absent classes, (B, C) bool, at `ABSENT_LOGIT` at most."""
    return torch.where(absent[..., None, None], logits.clamp(max=ABSENT_LOGIT), logits)


def presence_threshold(score: Tensor, right: Tensor, wrong: Tensor, absent: Tensor) -> float:
    """The object score up to which a class counts as absent; minus infinity where no threshold pays.

    It maximises sum(wrong) - 3 sum(right) over the images cut away.

    Args:
        score: (n,) object scores of n images.
        right: (n,) pixels found that are of the class.
        wrong: (n,) pixels found in images without the class, 0 for others.
        absent: (n,) bool, images without the class.
    """
    if int(absent.sum()) < MIN_ABSENT or bool(absent.all()):
        return -torch.inf
    higher = score[~absent][:, None] > score[absent]
    if higher.float().mean() < MIN_SEPARATION:
        return -torch.inf
    order = score.argsort()
    gain = (wrong - LOSS_WEIGHT * right)[order].cumsum(0)
    best = int(gain.argmax())
    if gain[best] <= MIN_GAIN * right.sum() or best == len(order) - 1:
        return -torch.inf
    return float(score[order[best : best + 2]].mean())
