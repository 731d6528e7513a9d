"""The support prior: a dense match of query to support features that carries the support masks over.

This is our addition to the paper, one switch (`pmg.prior`). SAM2's memory attention by itself must discover which of
its value channels means foreground; from scratch that is never found in reasonable time. The prior states it:

    p_match(x) = sum_y softmax_y(t * cos(f(x), f(y))) * m(y)      over all support positions y
    p_pos(x)   = mean over the support items of m at the same place

with f a projection of the encoder's features, m the support mask pooled to f's grid and t a learnable temperature.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

START_TEMPERATURE = 30.0
PROBABILITY_MARGIN = 1e-3
LOGIT_SCALE = 0.2
SCORE_LIMIT = 3.0
# exp(-2 t) must be a float32 far from the smallest one.
HIGHEST_SHARED = 40.0
# Bytes of exponentials held at a time; what fits into a cache is fastest.
WEIGHT_BYTES = 2**20


class LevelProjections(nn.ModuleList):
    """Sum of 1x1 projections of the coarsest feature levels, on the grid of the finest of these.

    Args:
        widths: channels D of each level used, the coarsest first.
        dim: width d of the result.
    """

    def __init__(self, widths: Sequence[int], dim: int) -> None:
        super().__init__([nn.Conv2d(width, dim, 1) for width in widths])
        for projection in self:
            nn.init.orthogonal_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(self, levels: list[Tensor]) -> Tensor:
        """Levels (B, D, g, g), (B, D', 2g, 2g), …, at least as many as projections -> (B, d, p, p)."""
        size = levels[len(self) - 1].shape[-2:]
        total = 0
        for projection, level in zip(self, levels, strict=False):
            feature = projection(level)
            if feature.shape[-2:] != size:
                feature = F.interpolate(feature, size=size, mode="bilinear", align_corners=False)
            total = total + feature
        return total


class SupportPrior(nn.Module):
    """Dense matching at the grid of the finest feature level used.

    Args:
        channels: width D of the encoder's feature levels.
        levels: 1 matches on the embedding's grid (g), 2 adds the next finer FPN level and matches on 2g, 3 on 4g.
        dim: width d of the matched features.
        zero_init: start without any effect on the decoder's input, for decoders with pretrained weights.
        regression: whether the maps hold the two scores of the support regression.
    """

    def __init__(
        self, channels: int, levels: int = 1, dim: int = 64, zero_init: bool = False, regression: bool = False
    ) -> None:
        super().__init__()
        self.projections = LevelProjections([channels] * levels, dim)
        self.log_temperature = nn.Parameter(torch.tensor(START_TEMPERATURE).log())
        self.map_count = 6 if regression else 4
        self.to_dense = nn.Conv2d(self.map_count, channels, 1)
        if zero_init:
            nn.init.zeros_(self.to_dense.weight)
            nn.init.zeros_(self.to_dense.bias)
        self.logit_weights = nn.Parameter(torch.tensor([0.3, 0.1, 0.5, 0.5] if regression else [0.3, 0.1]))

    def keys(self, levels: list[Tensor]) -> Tensor:
        """L2-normalised features (B, P, d) of images whose feature levels are (B, D, g, g), (B, D, 2g, 2g), …"""
        total = self.projections(levels)
        # Contiguous, as PyTorch's fused attention needs it.
        return F.normalize(total.flatten(2).transpose(1, 2).contiguous(), dim=-1)

    def support_keys(self, keys: Tensor) -> Tensor:
        """Keys (N, P, d) of support images pooled to the embedding's grid, (N, T, d): a quarter (or a 16th) as many.

        A query is matched on the fine grid to support on the coarse one: where the support mask ends exactly, the
        regression and the refinement know.
        """
        factor = 2 ** (len(self.projections) - 1)
        if factor == 1:
            return keys
        side = round(keys.shape[1] ** 0.5)
        grid = keys.transpose(1, 2).unflatten(2, (side, side))
        return F.normalize(F.avg_pool2d(grid, factor).flatten(2).transpose(1, 2), dim=-1)

    def forward(self, query: Tensor, support: Tensor, masks: Tensor, item: Tensor | None = None) -> Tensor:
        """Match queries to their support.

        Args:
            query: (B, P, d) keys of the query images.
            support: (B, C, K, T, d) keys of the support items of each query and class.
            masks: (B, C, K, 16 T) support masks on the finest grid, in [0, 1].
            item: see `SupportMemory`. Where most images guide several classes, and no gradient is needed, a CPU
                compares a query with each of them once.

        Returns:
            p_match (B, C, P) in [0, 1].
        """
        batch, classes, items, positions, dim = support.shape
        side = round(positions**0.5)
        coarse = F.avg_pool2d(masks.unflatten(-1, (4 * side, 4 * side)).flatten(0, 2), 4)
        if item is not None and self._shares(query, item):
            temperature = float(self.log_temperature.exp())
            rows = zip(
                query * temperature, support, coarse.reshape(batch, classes, items, positions), item, strict=True
            )
            return torch.stack([_match_once(*row, temperature) for row in rows])
        q = (query * self.log_temperature.exp())[:, None].expand(-1, classes, -1, -1)
        k = support.reshape(batch, classes, items * positions, dim)
        # Values as wide as keys let PyTorch use its fused attention, which never holds the (P, K*T) matrix.
        values = F.pad(coarse.reshape(batch, classes, items * positions, 1), (0, dim - 1)).to(q.dtype)
        match = F.scaled_dot_product_attention(q, k.to(q.dtype), values, scale=1.0)[..., 0]
        return match.float().clamp(0, 1)

    def _shares(self, query: Tensor, item: Tensor) -> bool:
        """Whether comparing once is exact, and faster than PyTorch's fused attention."""
        if query.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return False
        if torch.is_grad_enabled() or self.log_temperature.exp() > HIGHEST_SHARED:
            return False
        return 2 * sum(len(row.unique()) for row in item) <= item.numel()

    def maps(self, match: Tensor, position: Tensor, scores: Tensor | None) -> Tensor:
        """All that the support says at the finest grid, (N, 4 or 6, 4g, 4g).

        Args:
            match: (N, 1, p, p) p_match. position: (N, 1, 4g, 4g) p_pos. scores: (N, 2, 4g, 4g) of the support
                regression, None where it is off.

        Returns:
            Logit of p_match and of p_pos, scaled; both probabilities; the scores.
        """
        match = F.interpolate(match, size=position.shape[-2:], mode="bilinear", align_corners=False)
        both = torch.cat([match, position], 1)
        maps = torch.cat([LOGIT_SCALE * _logit(both), both], 1)
        return maps if scores is None else torch.cat([maps, scores.clamp(-SCORE_LIMIT, SCORE_LIMIT)], 1)

    def dense(self, maps: Tensor, side: int) -> Tensor:
        """Support maps (N, M, 4g, 4g) as a dense prompt (N, D, g, g) for the decoder."""
        return self.to_dense(F.adaptive_avg_pool2d(maps, side))

    def logits(self, maps: Tensor) -> Tensor:
        """Support maps (N, M, 4g, 4g) as one weighted logit map (N, 1, 4g, 4g)."""
        used = torch.cat([maps[:, :2] / LOGIT_SCALE, maps[:, 4:]], 1)
        return torch.einsum("nchw,c->nhw", used, self.logit_weights)[:, None]


def _match_once(query: Tensor, support: Tensor, masks: Tensor, item: Tensor, limit: float) -> Tensor:
    """p_match (C, P) of one image, each support image compared with it once, whatever number of classes it guides.

    A softmax's numerator and denominator are sums of the same exponentials, which are weighted by a class's masks and
    by 1 where an image is of the class's items.

    Args:
        query: (P, d) scaled keys. support: (C, K, T, d). masks: (C, K, T). item: (C, K), see `SupportMemory`.
        limit: no inner product is larger; in place of the largest one, which would take another pass.
    """
    numbers, place = item.unique(return_inverse=True)
    one_of_each = torch.empty_like(numbers).scatter_(0, place.flatten(), torch.arange(place.numel()))
    keys = support.flatten(0, 1)[one_of_each].flatten(0, 1)
    uses = F.one_hot(place, len(numbers)).to(masks.dtype).transpose(1, 2)
    foreground = (uses @ masks).flatten(1)
    everything = uses.sum(2)[..., None].expand(-1, -1, masks.shape[-1]).flatten(1)
    columns = torch.cat([foreground, everything]).T
    parts = query.split(max(1, WEIGHT_BYTES // (4 * len(keys))))
    sums = torch.cat([(part @ keys.T).sub_(limit).exp_() @ columns for part in parts]).T
    part, whole = sums.chunk(2)
    return (part / whole).clamp(0, 1)


def _logit(probability: Tensor) -> Tensor:
    return torch.logit(probability.float(), eps=PROBABILITY_MARGIN)
