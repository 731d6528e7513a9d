"""How much of the result is the U-Net's: decided on all labels, by groups that it has not seen.

In: Dice of every group with the plain network and with averages of it and the U-Net. Out: the U-Net's share. The plain
network is the null hypothesis: a share is given up only for a gain that exceeds its standard error over the groups, and
the fewer groups there are, the more the plain network keeps.

Labels of one kind say nothing of another one, and no fold tells. But there the U-Net loses its way, and contradicts the
plain network more than it did on any label: so how far both agreed on labels is kept, and where they agree less, the
plain network gets the say.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sam2sgp.transforms.array import label_map

# Of the U-Net in the averages that are judged, before `judged_shares`; the plain network's own result comes first.
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
# With fewer groups the standard error says nothing.
MIN_GROUPS = 3
# Shares are reduced as much as by this many further groups for which the plain network is right.
PRIOR_GROUPS = 1.0
# Of the agreements on labels: below this quantile an agreement is unusual.
UNUSUAL = 0.1
PROBABILITY_EPS = 1e-6


@dataclass(frozen=True)
class Choice:
    """The U-Net's share for one class, and why.

    groups: in which the class was judged. plain, unet, adapted: mean Dice over them of the plain network, the U-Net and
    the average that was chosen. gain, error: mean and standard error of what each group
    gains by it. share: of the U-Net in the result, 0 where the gain is not clear. agreement: of both on labels, as
    `usual_agreement` gives it.
    """

    groups: int
    plain: float
    unet: float
    adapted: float
    gain: float
    error: float
    share: float
    agreement: float


def mix(logits: Tensor, unet: Tensor, share: Tensor | float) -> Tensor:
    """Logits of the average of probabilities: `share` of it the U-Net's probabilities `unet`, the rest of `logits`."""
    return torch.logit(logits.sigmoid().lerp(unet, torch.as_tensor(share, dtype=unet.dtype)), eps=PROBABILITY_EPS)


def case_dice(logits: Tensor, labels: Tensor, values: Sequence[int]) -> Tensor:
    """Dice (C,) of a whole case; NaN for a class that neither the result nor the label has.

    Args:
        logits: (Z, C, H, W). labels: (Z, H, W) class values. values: of the C classes.
    """
    winner = label_map(logits)
    found = []
    for column, value in enumerate(values):
        predicted, truth = winner == column + 1, labels == value
        found.append(2 * (predicted & truth).sum() / (predicted.sum() + truth.sum()))
    return torch.stack(found)


def agreement(logits: Tensor, unet: Tensor) -> Tensor:
    """Dice (B, C) of what the plain network finds, by its logits (B, C, H, W), and what the U-Net does, by its
    probabilities; NaN where neither finds anything."""
    first, second = (found.flatten(2) for found in (logits > 0, unet > 0.5))
    return 2 * (first & second).sum(2) / (first.sum(2) + second.sum(2))


def usual_agreement(agreements: Tensor) -> Tensor:
    """Agreement (C,) from which on nothing is unusual, by those on labelled slices (N, C); 0 where nothing is known."""
    return agreements.nanquantile(UNUSUAL, 0).nan_to_num(0.0)


def trust_in_agreement(found: Tensor, usual: Tensor) -> Tensor:
    """How far (B, C) to believe the U-Net where it agrees by (B, C) with the plain network, and usually by (C,)."""
    return torch.where(found.isnan() | (usual <= 0), 1.0, (found / usual.clamp(min=PROBABILITY_EPS)).clamp(max=1))


def judged_shares(groups: int) -> list[float]:
    """The shares that are judged on so many groups."""
    return [round(share * groups / (groups + PRIOR_GROUPS), 4) for share in SHARES]


def choose_share(dice: Tensor, shares: Sequence[float], agreement: float = 0.0) -> Choice:
    """The share for one class: of those with the best gain less its standard error, the smallest.

    Args:
        dice: (G, len(shares) + 1) of G groups, without NaN: with each share, and of the U-Net by itself.
        shares: those of `judged_shares`.
        agreement: see `Choice`.
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
        unet=_rounded(means[-1]),
        adapted=_rounded(means[best]),
        gain=_rounded(gains.mean(0)[best]),
        error=_rounded(errors[best]),
        share=shares[best],
        agreement=round(agreement, 4),
    )


def _exceeds(gains: Tensor) -> bool:
    """Whether the mean exceeds its standard error."""
    return bool(gains.mean() > gains.std() / len(gains) ** 0.5)


def _rounded(value: Tensor) -> float:
    return round(float(value), 4)
