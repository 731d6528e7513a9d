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
                self._block(fine + maps + 2, fine),
                self._block(fine + middle, middle),
                self._block(middle + coarse, coarse),
            ]
        )
        self.up = nn.ModuleList([self._block(coarse + middle, middle), self._block(middle + fine, fine)])
        self.head = nn.Conv2d(fine, 1, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @staticmethod
    def _block(inputs: int, outputs: int) -> UnetResBlock:
        return UnetResBlock(2, inputs, outputs, 3, 1, norm_name=NORM, act_name=ACTIVATION)

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
        repeats = maps.shape[0] // levels[-1].shape[0]
        embedding, middle, fine = levels
        fine, middle = (for_each_class(level, repeats) for level in (fine, middle))
        coarse = self.skips[2](embedding)
        so_far = (LOGIT_SCALE * torch.cat([pseudo, logits], 1)).clamp(-2, 2)
        at_fine = self.down[0](torch.cat([fine, maps, so_far], 1))
        at_middle = self.down[1](torch.cat([F.avg_pool2d(at_fine, 2), middle], 1))
        at_coarse = self.down[2](torch.cat([F.avg_pool2d(at_middle, 2), coarse], 1))
        at_middle = self.up[0](torch.cat([_double(at_coarse), at_middle], 1))
        at_fine = self.up[1](torch.cat([_double(at_middle), at_fine], 1))
        return self.head(at_fine)


def _double(values: Tensor) -> Tensor:
    return F.interpolate(values, scale_factor=2, mode="bilinear", align_corners=False)
