"""A corrector in training on support pairs.

Steps are made one after the other, each a function of the seed and of the steps before, never of the time. After the
warm-up it is known how long a step takes, and so how many there will be; the learning rate follows a cosine over them.
"""

import math
from collections.abc import Sequence

import torch
from monai.losses import DiceCELoss
from torch import nn

from sam2sgp.adaptation.corrector import LIMIT, Corrector
from sam2sgp.adaptation.pairs import Pairs
from sam2sgp.inferers.precision import autocast

BATCH = 4
LEARNING_RATE = 4e-3
WEIGHT_DECAY = 0.01
WARMUP = 10


def fast_precision(device: torch.device) -> str:
    """ "bf16" where the device computes in it, which saves a quarter to a half of the time; else "fp32"."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    capabilities = torch.cpu.get_capabilities()
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"


class Training:
    """A corrector, and what its training has come to.

    Args:
        corrector: what is trained.
        pairs: all pairs. index: numbers of those to train on.
        seed: of the choice and augmentation of pairs.
    """

    def __init__(self, corrector: Corrector, pairs: Pairs, index: Sequence[int], seed: int) -> None:
        self.corrector = corrector
        self.pairs, self.index = pairs, list(index)
        self.generator = torch.Generator().manual_seed(seed)
        self.augment = pairs.augmentation(self.index, self.generator)
        self.criterion = DiceCELoss(sigmoid=True, smooth_nr=1.0, smooth_dr=1.0, batch=True)
        device = next(corrector.parameters()).device
        self.precision = autocast(device.type, fast_precision(device))
        self.steps = 0
        # Steps to be made, the warm-up included; None: not known yet.
        self.planned: int | None = None
        self.parameters = list(corrector.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, LEARNING_RATE, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)

    def step(self) -> None:
        """One step of the optimiser; one whose loss is not finite changes nothing."""
        self.corrector.train()
        image, found, mask = self.augment(*self.pairs.draw(self.index, BATCH, self.generator), -LIMIT)
        with self.precision:
            logits = self.corrector(image, found)
        loss = self.criterion(logits.float(), mask)
        self.optimizer.zero_grad()
        if torch.isfinite(loss):
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
        self.schedule.step()
        self.steps += 1

    def finish(self) -> Corrector:
        """The corrector for evaluation; no step can follow."""
        return self.corrector.eval().requires_grad_(False)

    def _rate(self, step: int) -> float:
        """Share of the learning rate."""
        if step < WARMUP or self.planned is None:
            return min(1.0, (step + 1) / WARMUP)
        progress = (step - WARMUP) / max(1, self.planned - WARMUP)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
