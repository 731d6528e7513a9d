"""Held-out support pairs: which they are, and how well they are segmented.

In: a support bank. Out: the numbers of the items to fit and to hold out, and Dice of logits on the latter.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sam2sgp.support.bank import SupportBank
from sam2sgp.transforms.array import label_map

MIN_ITEMS = 4
HELD_OUT_SHARE = 0.25
MAX_HELD_OUT = 16
MAX_GUIDES = 32


@dataclass(frozen=True)
class Split:
    """Numbers of the items to fit and of those held out, and by what they were held out: "patients" or "items"."""

    fit: Tensor
    held: Tensor
    by: str


def hold_out(bank: SupportBank, seed: int) -> Split | None:
    """Hold out about a quarter of the items: whole patients, and single items only where there is no other way.

    At least half of the items stay to fit, and two of every class, unless there were fewer.

    Returns:
        None where there are too few items to hold any out.
    """
    count = len(bank)
    if count < MIN_ITEMS:
        return None
    patients = sorted({item.patient for item in bank.items})
    owner = torch.tensor([patients.index(item.patient) for item in bank.items])
    target = min(MAX_HELD_OUT, round(HELD_OUT_SHARE * count))
    for by, unit in (("patients", owner), ("items", torch.arange(count))):
        held = torch.zeros(count, dtype=torch.bool)
        for number in torch.randperm(int(unit.max()) + 1, generator=torch.Generator().manual_seed(seed)):
            wider = held | (unit == number)
            lost = bank.holds[wider & ~held].any(0)
            enough = bool((bank.holds[~wider].sum(0)[lost] >= 2).all())
            if enough and int(wider.sum()) <= (target if held.any() else count // 2):
                held = wider
            if int(held.sum()) >= target:
                break
        if held.any():
            return Split(torch.nonzero(~held)[:, 0], torch.nonzero(held)[:, 0], by)
    return None


def class_dice(logits: Tensor, mask: Tensor) -> Tensor:
    """Dice of each class (C,), the mean over the images; those without the class in map and truth are not counted.

    Args:
        logits: (B, C, S, S); the strongest class above 0 wins, as in the result a user gets.
        mask: (B, C, S, S) in {0, 1}.
    """
    winner = label_map(logits)
    predicted = torch.stack([winner == column + 1 for column in range(logits.shape[1])], 1).float()
    both = (predicted * mask).flatten(2).sum(2)
    return (2 * both / (predicted + mask).flatten(2).sum(2)).nanmean(0)
