"""The U-Net of an adaptation: the network's own trunk, with a decoder that starts from nothing.

In: images (B, 3, H, W) in [0, 1]. Out: logits (B, C, H, W), a channel for each class. It knows the support set by its
weights, the in-context network by attention; they err differently, and the average of both is better than either.

A pretrained trunk is what makes it good within a minute: trained from scratch on 16 pairs, the same U-Net loses up to
0.2 Dice (right ventricle of acdc). Where the network's trunk is the convolutional one of the `lite` backbone, also its
level at stride 2 is used.
"""

from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam2sgp.networks import SAM2SGP, merge_lora
from sam2sgp.networks.lite import LiteTrunk

# Widths of the decoder's blocks, from the coarsest level on, and channels per group of their normalisation.
WIDTHS = (96, 64, 48, 32)
GROUP = 8
# Heights and widths are padded to a multiple of this: the coarsest stride.
MULTIPLE = 32
STANDARD_EPS = 1e-3


class _Block(nn.Module):
    """Enlarge, put the finer level beside, and convolve twice."""

    def __init__(self, width: int, skip: int, out: int) -> None:
        super().__init__()
        self.layers = nn.Sequential()
        for channels in (width + skip, out):
            self.layers.append(nn.Conv2d(channels, out, 3, padding=1, bias=False))
            self.layers.append(nn.GroupNorm(out // GROUP, out))
            self.layers.append(nn.SiLU())

    def forward(self, values: Tensor, skip: Tensor) -> Tensor:
        enlarged = F.interpolate(values, size=skip.shape[-2:], mode="nearest")
        return self.layers(torch.cat([enlarged, skip], 1))


class TrunkUNet(nn.Module):
    """U-Net on a copy of a network's trunk.

    Args:
        network: whose trunk is copied, with its LoRA merged into it.
        classes: number of output channels C, each of its own sigmoid.

    Example:
        >>> TrunkUNet(SAM2SGP("lite", 64), 2)(torch.rand(1, 3, 96, 64)).shape
        torch.Size([1, 2, 96, 64])
    """

    def __init__(self, network: SAM2SGP, classes: int) -> None:
        super().__init__()
        plain = deepcopy(network)
        merge_lora(plain)
        self.trunk = trunk = plain.image_encoder.trunk.requires_grad_(True)
        with torch.no_grad():
            device = next(trunk.parameters()).device
            channels = [level.shape[1] for level in self._levels(torch.zeros(1, 3, 64, 64, device=device))]
        width, blocks = channels[-1], []
        for skip, out in zip(channels[-2::-1], WIDTHS, strict=False):
            blocks.append(_Block(width, skip, out))
            width = out
        self.blocks = nn.ModuleList(blocks)
        # No activation before it: one that can't be negative would hold the logits at one side of 0.
        self.head = nn.Conv2d(width, classes, 3, padding=1)
        self.to(device)

    def _levels(self, image: Tensor) -> list[Tensor]:
        """The trunk's levels, the finest first."""
        return self.trunk.pyramid(image) if isinstance(self.trunk, LiteTrunk) else self.trunk(image)

    def decoder_parameters(self) -> list[nn.Parameter]:
        """What starts from nothing."""
        return [*self.blocks.parameters(), *self.head.parameters()]

    def forward(self, image: Tensor) -> Tensor:
        """Images (B, 3, H, W) of any size -> logits (B, C, H, W); each image is standardised by itself."""
        height, width = image.shape[-2:]
        std, mean = torch.std_mean(image, dim=(1, 2, 3), keepdim=True)
        image = (image - mean) / (std + STANDARD_EPS)
        image = F.pad(image, (0, -width % MULTIPLE, 0, -height % MULTIPLE))
        *skips, values = self._levels(image)
        for block, skip in zip(self.blocks, reversed(skips), strict=True):
            values = block(values, skip)
        logits = F.interpolate(self.head(values), size=image.shape[-2:], mode="bilinear", align_corners=False)
        return logits[..., :height, :width]
