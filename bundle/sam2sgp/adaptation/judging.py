"""How much of the result is the correctors': decided on all labels, by patient groups that they have not seen.

In: Dice of every group with the plain network and with averages of it and the correctors. Out: the correctors' share.
The plain network is the null hypothesis: a share is given up only for a gain that exceeds its standard error over the
groups, and the fewer groups there are, the more the plain network keeps.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sam2sgp.transforms.array import label_map

# Shares of the correctors in the averages that are judged, before `judged_shares`; the first is the plain network's.
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
# With fewer groups the standard error says nothing.
MIN_GROUPS = 3
# Shares are reduced as much as by this many further groups for which the plain network is right.
PRIOR_GROUPS = 1.0
PROBABILITY_EPS = 1e-6


@dataclass(frozen=True)
class Choice:
    """The correctors' share for one class, and why.

    groups: in which the class was judged. plain, corrected, adapted: mean Dice over them of the plain network, of the
    correctors and of the average that was chosen. gain, error: mean and standard error of what each group gains by it.
    share: of the correctors in the result, 0 where the gain is not clear.
    """

    groups: int
    plain: float
    corrected: float
    adapted: float
    gain: float
    error: float
    share: float


def mix(logits: Tensor, corrected: Tensor, share: Tensor | float) -> Tensor:
    """Logits of the average of probabilities: `share` of it the corrected ones, the rest of `logits`.

    Where the share is 0 the logits stay as they are.
    """
    share = torch.as_tensor(share, dtype=corrected.dtype, device=corrected.device)
    mixed = torch.logit(logits.sigmoid().lerp(corrected, share), eps=PROBABILITY_EPS)
    return torch.where(share > 0, mixed, logits)


def case_dice(logits: Tensor, labels: Tensor, values: Sequence[int]) -> Tensor:
    """Dice (C,) of a whole case; NaN for a class that neither the result nor the label has.

    Args:
        logits: (Z, C, H, W). labels: (Z, H, W) class values. values: of the C classes.
    """
    winner = label_map(logits)
    # A byte equals a value 256 higher in PyTorch.
    labels = labels.int()
    found = []
    for class_index, value in enumerate(values):
        predicted, truth = winner == class_index + 1, labels == value
        found.append(2 * (predicted & truth).sum() / (predicted.sum() + truth.sum()))
    return torch.stack(found)


def judged_shares(groups: int) -> list[float]:
    """The shares that are judged on so many groups."""
    return [round(share * groups / (groups + PRIOR_GROUPS), 4) for share in SHARES]


def choose_share(dice: Tensor, shares: Sequence[float]) -> Choice:
    """The share for one class: of those with the best gain less its standard error, the smallest.

    Args:
        dice: (G, len(shares) + 1) of G groups, without NaN: with each share, and of the correctors by themselves.
        shares: those of `judged_shares`.
    """
    count, best = len(dice), 0
    gains, errors = dice - dice[:, :1], torch.zeros(dice.shape[1])
    if count >= MIN_GROUPS:
        errors = gains.std(0) / count**0.5
        last = len(shares) - 1
        best = int((gains.mean(0) - errors)[: last + 1].argmax())
        if best == last and not _exceeds(dice[:, last] - dice[:, last - 1]):
            best = last - 1
    means = dice.mean(0)
    return Choice(
        groups=count,
        plain=_rounded(means[0]),
        corrected=_rounded(means[-1]),
        adapted=_rounded(means[best]),
        gain=_rounded(gains.mean(0)[best]),
        error=_rounded(errors[best]),
        share=shares[best],
    )


def _exceeds(gains: Tensor) -> bool:
    """Whether the mean exceeds its standard error."""
    return bool(gains.mean() > gains.std() / len(gains) ** 0.5)


def _rounded(value: Tensor) -> float:
    return round(float(value), 4)
