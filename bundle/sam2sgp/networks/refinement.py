"""The refinement: a small U-shaped network that corrects the mask at the finest grid.

SAM2's mask decoder reads its finest feature level through one linear combination per pixel, so it can't weigh a pixel
against its neighbours; thin and small structures are lost there. The refinement is our addition to the paper (switch
`refinement`). It sees the query's three feature levels, everything the support says at the finest grid, and the logits
so far, and returns a correction of them.
"""

import torch
import torch.nn.functional as F
from monai.networks.blocks.dynunet_block import UnetResBlock
from torch import Tensor, nn

from sam2sgp.networks.rows import for_each_class

LOGIT_SCALE = 0.2
NORM = ("GROUP", {"num_groups": 4})
ACTIVATION = ("LEAKYRELU", {"inplace": True, "negative_slope": 0.01})


class ClassesBlock(UnetResBlock):
    """MONAI's residual block for several classes of an image at once.

    A part of its inputs is the image's, the same for all of its classes; that part is convolved once.
    """

    def forward(self, image: Tensor, own: Tensor, image_first: bool) -> Tensor:
        """Images (B, W, h, w) and rows of images and classes (N, W', h, w), N a multiple of B -> (N, W'', h, w).

        image_first: which of them the first input channels are.
        """
        out = self.lrelu(self.norm1(_convolved(self.conv1.conv, image, own, image_first)))
        out = self.norm2(self.conv2(out))
        return self.lrelu(out + self.norm3(_convolved(self.conv3.conv, image, own, image_first)))


class Refinement(nn.Module):
    """Correction of mask logits on the finest feature grid.

    Args:
        channels: width D of the feature levels.
        maps: number of support maps given.
        widths: channels at the grids 4g, 2g and g; multiples of 4.

    The last layer starts at zero: a new refinement changes nothing.
    """

    def __init__(self, channels: int, maps: int, widths: tuple[int, int, int] = (24, 48, 64)) -> None:
        super().__init__()
        self.skips = nn.ModuleList([nn.Conv2d(channels, width, 1) for width in widths])
        for skip in self.skips:
            nn.init.xavier_uniform_(skip.weight)
            nn.init.zeros_(skip.bias)
        fine, middle, coarse = widths
        self.down = nn.ModuleList(
            [
                _block(ClassesBlock, fine + maps + 2, fine),
                _block(ClassesBlock, fine + middle, middle),
                _block(UnetResBlock, middle + coarse, coarse),
            ]
        )
        up = [_block(UnetResBlock, coarse + middle, middle), _block(UnetResBlock, middle + fine, fine)]
        self.up = nn.ModuleList(up)
        self.head = nn.Conv2d(fine, 1, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        # A convolution follows its weights' layout; with channels last it takes two thirds of the time on a CPU.
        self.to(memory_format=torch.channels_last)

    @property
    def skip_layers(self) -> tuple[nn.Conv2d, nn.Conv2d]:
        """Projections of the image's finest level and the next one."""
        fine, middle, _ = self.skips
        return fine, middle

    def forward(self, levels: list[Tensor], maps: Tensor, pseudo: Tensor, logits: Tensor) -> Tensor:
        """Correct.

        Args:
            levels: embedding (N, D, g, g), conditioned on the support, and the image's levels after `skip_layers`,
                (B, W, 2g, 2g) and (B, W', 4g, 4g), N a multiple of B.
            maps: (N, M, 4g, 4g) what the support says.
            pseudo, logits: (N, 1, 4g, 4g) mask logits.

        Returns:
            (N, 1, 4g, 4g), to be added to `logits`.
        """
        # Where one input of a layer isn't channels last, its output isn't either, nor all that follows.
        embedding, middle, fine = (level.contiguous(memory_format=torch.channels_last) for level in levels)
        coarse = self.skips[2](embedding)
        so_far = (LOGIT_SCALE * torch.cat([pseudo, logits], 1)).clamp(-2, 2)
        own = torch.cat([maps, so_far], 1).contiguous(memory_format=torch.channels_last)
        at_fine = self.down[0](fine, own, image_first=True)
        at_middle = self.down[1](middle, F.avg_pool2d(at_fine, 2), image_first=False)
        at_coarse = self.down[2](torch.cat([F.avg_pool2d(at_middle, 2), coarse], 1))
        at_middle = self.up[0](torch.cat([_double(at_coarse), at_middle], 1))
        at_fine = self.up[1](torch.cat([_double(at_middle), at_fine], 1))
        return self.head(at_fine)


def _block(kind: type[UnetResBlock], inputs: int, outputs: int) -> UnetResBlock:
    return kind(2, inputs, outputs, 3, 1, norm_name=NORM, act_name=ACTIVATION)


def _convolved(layer: nn.Conv2d, image: Tensor, own: Tensor, image_first: bool) -> Tensor:
    """What a layer without bias makes of the channels of both."""
    widths = [values.shape[1] for values in ((image, own) if image_first else (own, image))]
    parts = layer.weight.split(widths, 1)
    of_image, of_own = parts if image_first else parts[::-1]
    out = F.conv2d(own, of_own, padding=layer.padding)
    return out + for_each_class(F.conv2d(image, of_image, padding=layer.padding), own.shape[0] // image.shape[0])


def _double(values: Tensor) -> Tensor:
    return F.interpolate(values, scale_factor=2, mode="bilinear", align_corners=False)
