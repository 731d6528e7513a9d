"""The training loss: Dice and cross-entropy (or focal) on final and pseudo logits, and on SAM2's scores."""

import torch
import torch.nn.functional as F
from monai.losses import DiceCELoss, DiceFocalLoss
from torch import Tensor, nn

from sam2sgp.errors import ConfigError

KINDS = {"dice_ce": DiceCELoss, "dice_focal": DiceFocalLoss}


class SGPLoss(nn.Module):
    """final + w * decay^epoch * pseudo + s * (object score + predicted IoU).

    Args:
        kind: "dice_ce" or "dice_focal".
        pseudo_weight: w, of the pseudo-mask's own loss.
        pseudo_decay: factor per epoch on it (0.5 * 0.95^epoch is what the paper's code intends).
        score_weight: s, of the two scores, trained as SAM2 trains them.

    Raises:
        ConfigError: unknown kind.
    """

    def __init__(
        self, kind: str = "dice_ce", pseudo_weight: float = 0.5, pseudo_decay: float = 0.95, score_weight: float = 0.05
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ConfigError(f"loss kind is {kind!r}: expected one of {', '.join(KINDS)}.")
        self.mask_loss = KINDS[kind](sigmoid=True, smooth_nr=1.0, smooth_dr=1.0)
        self.pseudo_weight = pseudo_weight
        self.pseudo_decay = pseudo_decay
        self.score_weight = score_weight
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Tell the epoch, counted from 0, which the weight of the pseudo-mask's loss depends on."""
        self.epoch = epoch

    def forward(self, prediction: dict[str, Tensor], label: Tensor) -> Tensor:
        """Loss of a training output of `SAM2SGP` against binary masks (B, C, S, S) in {0, 1}."""
        mask = label.flatten(0, 1)[:, None]
        logits, pseudo = (prediction[key].flatten(0, 1)[:, None] for key in ("logits", "pseudo_logits"))
        weight = self.pseudo_weight * self.pseudo_decay**self.epoch
        loss = self.mask_loss(logits, mask) + weight * self.mask_loss(pseudo, mask)
        present = mask.flatten(1).amax(1)
        score = F.binary_cross_entropy_with_logits(prediction["object_score"].flatten(), present)
        with torch.no_grad():
            predicted = (logits > 0).float()
            intersection = (predicted * mask).flatten(1).sum(1)
            union = (predicted + mask).clamp(max=1).flatten(1).sum(1)
            iou = intersection / union.clamp(min=1)
        return loss + self.score_weight * (score + F.mse_loss(prediction["iou"].flatten(), iou))
