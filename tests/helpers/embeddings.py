"""Embeddings for tests: points on the unit circle."""

import torch


def at(*degrees: float) -> torch.Tensor:
    """Points on the unit circle."""
    angle = torch.tensor(degrees).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], 1)
