"""The support prior: a dense match of query to support features that carries the support masks over.

This is our addition to the paper, one switch (`pmg.prior`). SAM2's memory attention alone must discover which of
its value channels means foreground; from scratch that is never found in reasonable time. The prior states it:

    p_match(x) = sum_y softmax_y(t * cos(f(x), f(y))) * m(y)      over all support positions y
    p_pos(x)   = mean over the support items of m at the same place

with f a projection of the encoder's features, m the support mask pooled to f's grid and t a learnable temperature.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam2sgp.errors import ConfigError

START_TEMPERATURE = 30.0
PROBABILITY_MARGIN = 1e-3
LOGIT_SCALE = 0.2


class SupportPrior(nn.Module):
    """Dense matching at the grid of the finest feature level used.

    Args:
        channels: width D of the encoder's feature levels.
        levels: 1 matches on the embedding's grid (g), 2 adds the next finer FPN level and matches on 2g, 3 on 4g.
        dim: width d of the matched features.
        zero_init: start without any effect on the decoder's input, for decoders with pretrained weights.
    """

    def __init__(self, channels: int, levels: int = 1, dim: int = 64, zero_init: bool = False) -> None:
        super().__init__()
        if levels not in (1, 2, 3):
            raise ConfigError(f"pmg.prior_levels is {levels}: expected 1, 2 or 3 feature levels.")
        self.projections = nn.ModuleList([nn.Conv2d(channels, dim, 1) for _ in range(levels)])
        for projection in self.projections:
            nn.init.orthogonal_(projection.weight)
            nn.init.zeros_(projection.bias)
        self.log_temperature = nn.Parameter(torch.tensor(START_TEMPERATURE).log())
        self.to_dense = nn.Conv2d(4, channels, 1)
        if zero_init:
            nn.init.zeros_(self.to_dense.weight)
            nn.init.zeros_(self.to_dense.bias)
        self.logit_weights = nn.Parameter(torch.tensor([0.3, 0.1]))

    def keys(self, levels: list[Tensor]) -> Tensor:
        """L2-normalised features (B, P, d) of images whose feature levels are (B, D, g, g), (B, D, 2g, 2g), …"""
        size = levels[len(self.projections) - 1].shape[-2:]
        total = 0
        for projection, level in zip(self.projections, levels, strict=False):
            feature = projection(level)
            if feature.shape[-2:] != size:
                feature = F.interpolate(feature, size=size, mode="bilinear", align_corners=False)
            total = total + feature
        return F.normalize(total.flatten(2).transpose(1, 2), dim=-1)

    def pool_masks(self, masks: Tensor, positions: int) -> Tensor:
        """Masks (N, C, S, S) in {0, 1} -> mean in each cell of the matching grid, (N, C, P) in [0, 1]."""
        side = round(positions**0.5)
        return F.adaptive_avg_pool2d(masks, side).flatten(2)

    def forward(self, query: Tensor, support: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Match queries to their support.

        Args:
            query: (B, P, d) keys of the query images.
            support: (B, C, K, P, d) keys of the support items of each query and class.
            masks: (B, C, K, P) pooled support masks.

        Returns:
            p_match and p_pos, each (B, C, P) in [0, 1].
        """
        batch, classes, items, positions, dim = support.shape
        q = (query * self.log_temperature.exp())[:, None].expand(-1, classes, -1, -1)
        k = support.reshape(batch, classes, items * positions, dim)
        # Values as wide as keys let PyTorch use its fused attention, which never holds the (P, K*P) matrix.
        values = F.pad(masks.reshape(batch, classes, items * positions, 1), (0, dim - 1)).to(q.dtype)
        match = F.scaled_dot_product_attention(q, k.to(q.dtype), values, scale=1.0)[..., 0]
        return match.clamp(0, 1), masks.mean(2)

    def dense(self, match: Tensor, position: Tensor, side: int) -> Tensor:
        """Both probabilities (N, 1, p, p) as a dense prompt (N, D, side, side) for the decoder."""
        maps = torch.cat([match, position], dim=1)
        maps = torch.cat([maps, LOGIT_SCALE * _logit(maps)], dim=1)
        if maps.shape[-1] != side:
            maps = F.adaptive_avg_pool2d(maps, side)
        return self.to_dense(maps)

    def logits(self, match: Tensor, position: Tensor, size: tuple[int, int]) -> Tensor:
        """Both probabilities (N, 1, p, p) as one weighted logit map (N, 1, *size)."""
        total = self.logit_weights[0] * _logit(match) + self.logit_weights[1] * _logit(position)
        return F.interpolate(total, size=size, mode="bilinear", align_corners=False)


def _logit(probability: Tensor) -> Tensor:
    return torch.logit(probability.float(), eps=PROBABILITY_MARGIN)
