"""Batches of support pairs, as a corrector sees them."""

import pytest
import torch

from sam2sgp.adaptation.corrector import LIMIT
from sam2sgp.adaptation.pairs import Pair, Pairs
from sam2sgp.adaptation.plan import Plan


@pytest.mark.parametrize("plan", [Plan(64, False), Plan(64, True)])
def test_batches_hold_every_pair_and_its_own_mask(plan):
    images = [torch.full((1, 50 + 40 * n, 80), 0.1 * (n + 1)) for n in range(3)]
    masks = [torch.zeros(2, 50 + 40 * n, 80, dtype=torch.bool) for n in range(3)]
    for image, mask in zip(images, masks, strict=True):
        image[:, 20:40, 30:60] += 0.5
        mask[1, 20:40, 30:60] = True
    found = [torch.where(mask, 3.0, -3.0) for mask in masks]
    pairs = [Pair(*values, (1.0, 1.0)) for values in zip(images, found, masks, strict=True)]
    pairs = Pairs(pairs, plan, torch.device("cpu"))
    image, found, mask = pairs.draw([0, 2], 8, torch.Generator().manual_seed(0))
    assert image.shape == (8, 3, 64, 64) and mask.shape == (8, 2, 64, 64)
    assert ((found > 0) == (mask > 0)).float().mean() > 0.97 and found.min() >= -LIMIT
    assert not mask[:, 0].any() and ((image[:, 0] > 0.45) == (mask[:, 1] > 0)).float().mean() > 0.97
    levels = image.flatten(1).median(1).values if not plan.patches else image.flatten(1).amax(1) - 0.5
    assert sum(abs(level - 0.1) < 0.03 for level in levels.tolist()) == 4
