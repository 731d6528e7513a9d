"""The part of an adaptation that is trained: a decoder that corrects what the network found.

In: images (B, 3, H, W) in [0, 1], and the network's logits (B, C, H, W) for them. Out: corrected logits (B, C, H, W).

A corrector reads the levels of the network's own trunk, which stays as it is, and the logits at each of them. Its last
layer starts at zero, so that before the first step the result is the network's, and the few steps that a minute
allows go into what the network gets wrong. A U-Net that starts from nothing needs that minute to get as far as the
network is already. The trunk is run without gradients: going back through it takes three quarters of a step.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam2sgp.networks import SAM2SGP
from sam2sgp.networks.lite import LiteTrunk

# Widths of the decoder's blocks, from the coarsest level on, and channels per group of normalisation. Steps count more
# than width: half as wide again, a minute allows two thirds of the steps, and no task of seven gained by it.
WIDTHS = (64, 48, 32, 16)
GROUP = 8
# Heights and widths are padded to a multiple of this: the coarsest stride.
MULTIPLE = 32
# Logits are bounded by this, so that a correction can change the network's mind where it is certain.
LIMIT = 4.0


def bounded(logits: Tensor) -> Tensor:
    """Logits in (-`LIMIT`, `LIMIT`), in order and with the same sign."""
    return LIMIT * torch.tanh(logits.float() / LIMIT)


class Trunk:
    """A network's trunk for images of any size, without gradients; its level at stride 2, too, where it has one."""

    def __init__(self, network: SAM2SGP) -> None:
        self.network = network
        device = next(network.parameters()).device
        self.widths = [level.shape[1] for level in self(torch.zeros(1, 3, 64, 64, device=device))]

    @torch.no_grad()
    def __call__(self, image: Tensor) -> list[Tensor]:
        """Levels (B, D, H / stride, W / stride), the finest first; H and W are multiples of `MULTIPLE`."""
        trunk = self.network.image_encoder.trunk
        image = self.network.normalize(image).contiguous(memory_format=torch.channels_last)
        return trunk.pyramid(image) if isinstance(trunk, LiteTrunk) else trunk(image)


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


class Corrector(nn.Module):
    """A decoder on a trunk's levels that corrects logits; without effect until it is trained.

    Args:
        trunk: whose levels it reads. It is not part of the corrector's weights.
        classes: number of classes C.

    Example:
        >>> trunk = Trunk(SAM2SGP("lite", 64))
        >>> Corrector(trunk, 2)(torch.rand(1, 3, 96, 70), torch.zeros(1, 2, 96, 70)).shape
        torch.Size([1, 2, 96, 70])
    """

    def __init__(self, trunk: Trunk, classes: int) -> None:
        super().__init__()
        self._trunk = trunk
        self.norms = nn.ModuleList(nn.GroupNorm(1, width) for width in trunk.widths)
        width, blocks = trunk.widths[-1] + classes, []
        for skip, out in zip(trunk.widths[-2::-1], WIDTHS, strict=False):
            blocks.append(_Block(width, skip + classes, out))
            width = out
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Conv2d(width, classes, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.to(next(trunk.network.parameters()).device, memory_format=torch.channels_last)

    def forward(self, image: Tensor, found: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] and `bounded` logits (B, C, H, W) of any size -> corrected logits."""
        height, width = image.shape[-2:]
        padding = (0, -width % MULTIPLE, 0, -height % MULTIPLE)
        padded = F.pad(found, padding, value=-LIMIT) / LIMIT
        levels = []
        for norm, level in zip(self.norms, self._trunk(F.pad(image, padding)), strict=True):
            levels.append(torch.cat([norm(level), F.interpolate(padded, size=level.shape[-2:], mode="area")], 1))
        *skips, values = levels
        for block, skip in zip(self.blocks, reversed(skips), strict=True):
            values = block(values, skip)
        correction = F.interpolate(self.head(values).float(), size=padded.shape[-2:], mode="bilinear")
        return found + correction[..., :height, :width]
