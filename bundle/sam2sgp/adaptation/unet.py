"""A small U-Net that is trained from scratch on a support set within a minute.

In: images (B, 3, S, S) in [0, 1]. Out: logits (B, C, S, S), a channel for each class. It shares nothing with SAM2-SGP,
so it errs elsewhere; the average of both is better than either.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from monai.networks.blocks import Convolution
from torch import Tensor, nn

WIDTHS = (16, 32, 64, 128)
GROUPS = 8
STANDARD_EPS = 1e-3
SIZE = 128


def _layer(channels: int, width: int, stride: int = 1) -> Convolution:
    return Convolution(
        2, channels, width, strides=stride, act="LEAKYRELU", norm=("GROUP", {"num_groups": GROUPS}), bias=False
    )


class SmallUNet(nn.Module):
    """U-Net at `SIZE` pixels at most, whose first layer halves the grid; half a million parameters.

    Args:
        classes: number of output channels C, each of its own sigmoid.

    Example:
        >>> SmallUNet(2)(torch.rand(1, 3, 64, 64)).shape
        torch.Size([1, 2, 64, 64])
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(_layer(3, WIDTHS[0], 2), _layer(WIDTHS[0], WIDTHS[0]))
        self.down = nn.ModuleList(nn.Sequential(_layer(a, b, 2), _layer(b, b)) for a, b in pairwise(WIDTHS))
        self.up = nn.ModuleList(nn.Sequential(_layer(a + b, a), _layer(a, a)) for a, b in pairwise(WIDTHS))
        self.head = nn.Conv2d(WIDTHS[0], classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Images (B, 3, S, S) of any size -> logits (B, C, S, S); each image is standardised by itself."""
        size = image.shape[-2:]
        if max(size) > SIZE:
            image = F.interpolate(image, size=(SIZE, SIZE), mode="bilinear", align_corners=False, antialias=True)
        std, mean = torch.std_mean(image, dim=(1, 2, 3), keepdim=True)
        levels = [self.stem((image - mean) / (std + STANDARD_EPS))]
        for stage in self.down:
            levels.append(stage(levels[-1]))
        x = levels.pop()
        for stage in reversed(self.up):
            skip = levels.pop()
            x = F.interpolate(x, size=skip.shape[-2:], mode="bilinear", align_corners=False)
            x = stage(torch.cat([skip, x], dim=1))
        return F.interpolate(self.head(x), size=size, mode="bilinear", align_corners=False)
