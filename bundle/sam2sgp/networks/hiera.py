"""SAM2's image encoder in less memory, with SAM2's own layers, weights and names of weights.

At 1024 px the blocks at stride 4, and the positional encodings of levels that nobody asks for, took more memory than
all that comes after them.
"""

import torch
from sam2.modeling.backbones.hieradet import MultiScaleBlock
from sam2.modeling.backbones.image_encoder import FpnNeck
from torch import Tensor, nn

# Bytes of the widest tensor in a band; what fits into a cache is fastest.
BAND_BYTES = 8 * 2**20


class BandedBlock(MultiScaleBlock):
    """A Hiera block that goes through rows of windows, a few at a time, which only attention within windows allows.

    Windows know nothing of each other, and all else in a block is for each place by itself, so the result is the same.
    Only on a CPU, where no gradient is needed: a backward pass would keep all of them, and a GPU has no use for it.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, D) -> (B, h, w, D'); of half the sides where the block pools."""
        rows = self._band(x)
        if rows >= x.shape[1] or x.device.type != "cpu" or torch.is_grad_enabled():
            return super().forward(x)
        return torch.cat([super(BandedBlock, self).forward(band) for band in x.split(rows, 1)], 1)

    def _band(self, x: Tensor) -> int:
        """How many rows at a time."""
        if not self.window_size:
            return x.shape[1]
        hidden = self.mlp.layers[0].out_features
        row_of_windows = self.window_size * x[:, 0, :, 0].numel() * hidden * x.element_size()
        return self.window_size * max(1, BAND_BYTES // row_of_windows)


def in_bands(trunk: nn.Module) -> None:
    """Make the blocks of a Hiera trunk `BandedBlock`, in place; nothing in other trunks.

    Only their class changes: a wrapper would change the names of all weights.
    """
    for module in trunk.modules():
        if type(module) is MultiScaleBlock:
            module.__class__ = BandedBlock


def take_position_encoding(neck: FpnNeck) -> nn.Module:
    """Take the positional encoding from a neck, which makes, keeps and copies one as large as each of its levels; in
    place of it the neck returns the level itself."""
    encoding = neck.position_encoding
    neck.position_encoding = nn.Identity()
    return encoding
