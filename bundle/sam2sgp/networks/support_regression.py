"""The support regression: a pixel classifier fitted to the support set in closed form, for each query.

Where the support prior asks which support place looks like this one, the regression asks what tells foreground from
background in the whole support set. It is our addition to the paper (`pmg.regression`), after the closed-form learners
of few-shot learning (ridge regression on learned features: Bertinetto et al., arXiv 1805.08136; in segmentation, Bhat
et al., arXiv 2003.11540). With x(p) the features of pixel p, the constant 1 among them, m the support mask and
y = 2 m - 1:

    w = argmin sum_p a(p) (w . x(p) - y(p))^2 + lambda |w|^2,      score(q) = w . x(q)

solved twice: with a(p) uniform over pixels, and balanced between foreground and background. All that a support item
contributes are two Gram matrices of a few kilobytes, so a query costs the same at any K.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam2sgp.networks.support_prior import LevelProjections

START_RIDGE = 0.02
POSITION_FEATURES = 5
EPS = 1e-6
NORM_EPS = 1e-5


class SupportRegression(nn.Module):
    """Closed-form pixel classifier on several feature levels, on the grid of the finest.

    Args:
        widths: channels of each of the encoder's feature levels, the coarsest first.
        dim: learned features per pixel; position and the constant 1 are added to them.
        normalize: bring each channel of each level to mean 0 and deviation 1 over the image first.
    """

    def __init__(self, widths: Sequence[int], dim: int = 40, normalize: bool = False) -> None:
        super().__init__()
        self.dim = dim
        self.normalize = normalize
        self.projections = LevelProjections(widths, dim)
        self.log_ridge = nn.Parameter(torch.tensor(START_RIDGE).log())

    @property
    def width(self) -> int:
        """Features per pixel, d."""
        return self.dim + POSITION_FEATURES + 1

    def features(self, levels: list[Tensor]) -> Tensor:
        """Pixel features (B, P, d) float32 of levels (B, D, p, p), (B, D', 2p, 2p), …; P = those of the last."""
        if self.normalize:
            levels = [_standardised(level) for level in levels]
        total = self.projections(levels)
        learned = F.gelu(F.instance_norm(total.float())).flatten(2).transpose(1, 2)
        fixed = self._fixed(total.shape[-2:], learned.device).expand(learned.shape[0], -1, -1)
        return torch.cat([learned, fixed], dim=-1)

    @staticmethod
    def _fixed(size: tuple[int, int], device: torch.device) -> Tensor:
        """(1, P, 6): position in [-1, 1] to the second degree, and 1."""
        y, x = torch.meshgrid(*(torch.linspace(-1, 1, length, device=device) for length in size), indexing="ij")
        return torch.stack([x, y, x * y, x * x, y * y, torch.ones_like(x)], -1).flatten(0, 1)[None]

    @staticmethod
    def gram(features: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """What support items contribute: mean of x x^T over the image, and over it weighted by the mask.

        Args:
            features: (N, P, d). masks: (N, C, P) in [0, 1].

        Returns:
            (N, d, d) and (N, C, d, d).
        """
        count = features.shape[1]
        # Rounded to half precision, sums over thousands of pixels no longer tell foreground from background.
        with torch.autocast(features.device.type, enabled=False):
            features = features.float()
            whole = features.transpose(1, 2) @ features / count
            weighted = masks[..., None] * features[:, None]
            return whole, weighted.transpose(2, 3) @ features[:, None] / count

    def forward(self, query: Tensor, whole: Tensor, foreground: Tensor) -> Tensor:
        """Scores of query pixels.

        Args:
            query: (B, P, d) features of the queries.
            whole, foreground: (B, C, K, d, d) Gram matrices of the support items of each query and class.

        Returns:
            (B, C, 2, P): scores around -1 in background and 1 in foreground, of the uniform and the balanced fit.
        """
        whole, foreground = whole.float().mean(2), foreground.float().mean(2)
        background = whole - foreground
        # The last feature is 1, so the last element of a Gram matrix is the share of pixels it was summed over.
        shares = [part[..., -1:, -1:].clamp(min=EPS) for part in (foreground, background)]
        balanced = [part / (2 * share) for part, share in zip((foreground, background), shares, strict=True)]
        positive = torch.stack([foreground, balanced[0]], 2)
        negative = torch.stack([background, balanced[1]], 2)
        identity = torch.eye(whole.shape[-1], device=whole.device)
        identity = identity * (torch.arange(len(identity), device=whole.device) < len(identity) - 1)
        matrix = positive + negative + self.log_ridge.float().exp() * identity
        target = (positive - negative)[..., -1:]
        # An absent or all-covering mask leaves its share empty; a trace of ridge on the constant keeps that solvable.
        matrix = matrix + EPS * torch.eye(whole.shape[-1], device=whole.device)
        weights = torch.linalg.solve(matrix, target)[..., 0]
        return torch.einsum("bpd,bcwd->bcwp", query.float(), weights)


def _standardised(level: Tensor) -> Tensor:
    """Each channel of each image with mean 0 and deviation 1; unlike `F.instance_norm`, of a single place too."""
    variance, mean = torch.var_mean(level.float(), dim=(2, 3), keepdim=True, correction=0)
    return (level - mean) * torch.rsqrt(variance + NORM_EPS)
