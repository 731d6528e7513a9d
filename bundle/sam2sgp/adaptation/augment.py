"""Augmentation of whole batches of support pairs, in a few tensor operations.

In: images (B, 3, S, S) in [0, 1], logits that a network found in them, and masks (B, C, S, S) in {0, 1}. Out: the same,
changed alike. A step of a small
network takes tens of milliseconds on one core, in which MONAI's transforms, one image at a time, would augment less
than one image.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

FLIP_TOLERANCE = 0.9
EPS = 1e-4


@dataclass(frozen=True)
class Strength:
    """How far augmentation goes. Lengths are shares of half the image's side, angles radians, factors natural logs.

    Geometry of each image: `rotation`, `scale`, `aspect`, `shear` and `shift` are bounds of a uniform draw, `elastic`
    is the deviation of a smooth displacement. Intensity: `gamma` and `colour` (of each channel) are bounds, `bias` the
    deviation of a smooth field, `noise` the largest deviation of noise, `blur` the probability of a 3 x 3 mean.
    """

    rotation: float
    scale: float
    aspect: float
    shear: float
    shift: float
    elastic: float
    gamma: float
    colour: float
    bias: float
    noise: float
    blur: float


def flip_axes(masks: Tensor) -> tuple[bool, bool]:
    """Whether flipping along rows, and along columns, leaves objects where they are and looking as they do.

    An axis qualifies if masks flipped along it overlap with those of other items nearly as well as unflipped ones.

    Args:
        masks: (N, C, S, S) in {0, 1}.
    """
    base = _mean_overlap(masks, masks)
    rows, columns = (_mean_overlap(masks.flip(axis), masks) >= FLIP_TOLERANCE * base for axis in (2, 3))
    return rows, columns


def _mean_overlap(first: Tensor, second: Tensor) -> float:
    """Mean Dice of all pairs of different items, over the classes."""
    both = torch.einsum("ichw,jchw->cij", first, second)
    sizes = first.sum((2, 3)).T[:, :, None] + second.sum((2, 3)).T[:, None]
    dice = 2 * both / sizes.clamp(min=1)
    others = ~torch.eye(len(first), dtype=torch.bool, device=first.device)
    return float(dice[:, others].mean()) if len(first) > 1 else 1.0


class Augmentation:
    """Random geometry and intensity of every image of a batch.

    Args:
        strength: how far it goes.
        flips: axes (rows, columns) along which half of the images are flipped.
        generator: CPU generator of all random numbers.
    """

    def __init__(self, strength: Strength, flips: tuple[bool, bool], generator: torch.Generator) -> None:
        self.strength = strength
        self.flips = flips
        self.generator = generator

    def __call__(self, image: Tensor, found: Tensor, mask: Tensor, least: float) -> tuple[Tensor, Tensor, Tensor]:
        """Change images (B, 3, S, S) in [0, 1], logits (B, C, S, S) of at least `least`, masks (B, C, S, S) in {0, 1}.

        Beyond the border the image is 0, and nothing is found.
        """
        grid = self._grid(len(image), image.shape[-1]).to(image.device)
        image, found, mask = (
            F.grid_sample(values, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
            for values in (image, found - least, mask)
        )
        return self._intensity(image), found + least, (mask > 0.5).float()

    def _uniform(self, *shape: int) -> Tensor:
        """In [-1, 1)."""
        return torch.rand(shape, generator=self.generator) * 2 - 1

    def _sometimes(self, count: int, probability: float) -> Tensor:
        return (torch.rand(count, 1, 1, 1, generator=self.generator) < probability).float()

    def _grid(self, count: int, size: int) -> Tensor:
        """Where each pixel of the result is taken from, (B, S, S, 2) in `grid_sample`'s coordinates."""
        s = self.strength
        angle, shear = s.rotation * self._uniform(count), s.shear * self._uniform(count)
        scale, aspect = (torch.exp(bound * self._uniform(count)) for bound in (s.scale, s.aspect))
        rows, columns = (torch.where(self._uniform(count) < 0, -1.0, 1.0) if flip else 1.0 for flip in self.flips)
        matrix = [
            [
                scale * aspect * angle.cos() * columns,
                scale * (shear - angle.sin()) * rows,
                s.shift * self._uniform(count),
            ],
            [scale * angle.sin() * columns, scale / aspect * angle.cos() * rows, s.shift * self._uniform(count)],
        ]
        theta = torch.stack([torch.stack(row, 1) for row in matrix], 1)
        grid = F.affine_grid(theta, [count, 1, size, size], align_corners=False)
        coarse = s.elastic * self._sometimes(count, 0.6) * torch.randn(count, 2, 6, 6, generator=self.generator)
        return grid + F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=False).permute(0, 2, 3, 1)

    def _intensity(self, image: Tensor) -> Tensor:
        s, count, size = self.strength, len(image), image.shape[-2:]
        gamma = torch.exp(s.gamma * self._uniform(count, 1, 1, 1) * self._sometimes(count, 0.6))
        gain = torch.exp(s.colour * self._uniform(count, 3, 1, 1) * self._sometimes(count, 0.5))
        offset = s.colour / 3 * self._uniform(count, 3, 1, 1)
        field = s.bias * self._sometimes(count, 0.4) * torch.randn(count, 1, 3, 3, generator=self.generator)
        field = torch.exp(F.interpolate(field, size=size, mode="bilinear", align_corners=False))
        blurred = self._sometimes(count, s.blur)
        noise = s.noise * self._sometimes(count, 0.5) * torch.rand(count, 1, 1, 1, generator=self.generator)
        noise = noise * torch.randn(image.shape, generator=self.generator)
        gamma, gain, offset, field, blurred, noise = (
            value.to(image.device) for value in (gamma, gain, offset, field, blurred, noise)
        )
        image = (image.clamp(0, 1) + EPS) ** gamma * gain * field + offset
        smooth = F.avg_pool2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        return (torch.lerp(image, smooth, blurred) + noise).clamp(0, 1)
