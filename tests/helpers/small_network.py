"""A small network with random weights, and masks of squares, for tests."""

import torch

from sam2sgp.networks import SAM2SGP

SIZE = 64


def network(**settings) -> SAM2SGP:
    torch.manual_seed(0)
    return SAM2SGP("nano", SIZE, **settings).eval()


def square_masks(count: int, classes: int = 1) -> torch.Tensor:
    masks = torch.zeros(count, classes, SIZE, SIZE)
    masks[:, :, 10:40, 20:50] = 1
    return masks
