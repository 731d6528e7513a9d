"""What is trained on a support set: a copy of the network, and a small U-Net.

Both are a `Member`: steps are made one after the other, each a function of the seed and of the steps before, never of
the time. There is no learning rate schedule but a warm-up, because the number of steps is not known beforehand; an
average of the weights over the last steps, which grows with their number, takes the place of a decay.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from monai.losses import DiceCELoss
from peft import PeftModel
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from sam2sgp.adaptation.augment import Augmentation, Strength, flip_axes
from sam2sgp.adaptation.lora import adaptable
from sam2sgp.adaptation.unet import SIZE, SmallUNet
from sam2sgp.engines.loss import SGPLoss
from sam2sgp.inferers.episode import autocast
from sam2sgp.networks import SAM2SGP
from sam2sgp.support.bank import SupportBank
from sam2sgp.support.sampler import EpisodeSupportSampler
from sam2sgp.transforms.array import to_three_channels

STRENGTH = Strength(0.4, 0.28, 0.08, 0.1, 0.2, 0.045, gamma=0.5, colour=0.1, bias=0.18, noise=0.05, blur=0.25)


def fast_precision(device: torch.device) -> str:
    """ "bf16" where the device computes in it, which saves a quarter to a half of the time; else "fp32"."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    capabilities = torch.cpu.get_capabilities()
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"


@dataclass
class Pairs:
    """Support items as tensors.

    image: (N, 3, S, S) in [0, 1]. mask: (N, C, S, S) in {0, 1}. patient: (N,) numbers, on the CPU.
    """

    image: Tensor
    mask: Tensor
    patient: Tensor

    @classmethod
    def of(cls, bank: SupportBank, device: torch.device) -> "Pairs":
        """All items of a bank."""
        names = sorted({item.patient for item in bank.items})
        return cls(
            torch.stack([to_three_channels(item.image.float()) for item in bank.items]).to(device),
            bank.masks(bank.items).to(device),
            torch.tensor([names.index(item.patient) for item in bank.items]),
        )

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, index: Tensor) -> "Pairs":
        place = index.to(self.image.device)
        return Pairs(self.image[place], self.mask[place], self.patient[index])


class Member(ABC):
    """A network in training on support pairs.

    Args:
        module: what is trained.
        learning_rate, weight_decay: of AdamW.
        warmup: steps until the learning rate is reached.
        window: the average covers about the last 1 / window of the steps.
        seed: of the choice and augmentation of pairs. Weights that start at random, and dropout, draw from PyTorch's
            global numbers.
    """

    def __init__(
        self, module: nn.Module, learning_rate: float, weight_decay: float, warmup: int, window: float, seed: int
    ) -> None:
        self.module = module
        self.precision = fast_precision(next(module.parameters()).device)
        self.generator = torch.Generator().manual_seed(seed)
        self.steps = 0
        self.parameters = nn.ParameterList(p for p in module.parameters() if p.requires_grad)
        self.optimizer = torch.optim.AdamW(self.parameters, learning_rate, betas=(0.9, 0.98), weight_decay=weight_decay)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: min(1.0, (step + 1) / warmup))
        # Polynomial-decay averaging (Shamir and Zhang, ICML 2013): needs no knowledge of the last step.
        self.average = AveragedModel(
            self.parameters, avg_fn=lambda old, new, count: old.lerp(new, (window + 1) / (window + 1 + int(count)))
        )

    def prepare(self, pairs: Pairs) -> Pairs:
        """The pairs as `step` wants them."""
        return pairs

    @abstractmethod
    def loss(self, pairs: Pairs) -> Tensor:
        """Loss of a batch drawn from the pairs."""

    def step(self, pairs: Pairs) -> None:
        """One step of the optimiser; one whose loss is not finite changes nothing."""
        self.module.train()
        loss = self.loss(pairs)
        self.optimizer.zero_grad()
        if torch.isfinite(loss):
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.average.update_parameters(self.parameters)
        self.schedule.step()
        self.steps += 1

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """The module with averaged weights, in evaluation mode and without gradients, as long as the block lasts."""
        own = self.snapshot()
        self._put(self.average.module)
        self.module.eval()
        try:
            with torch.no_grad():
                yield self.module
        finally:
            self._put(own)

    def snapshot(self) -> list[Tensor]:
        """Copies of the weights in training."""
        return [parameter.detach().clone() for parameter in self.parameters]

    def rewind(self, weights: list[Tensor]) -> None:
        """Make the average what it was when `averaged` gave these weights."""
        with torch.no_grad():
            for parameter, value in zip(self.average.module, weights, strict=True):
                parameter.copy_(value)

    def finish(self) -> nn.Module:
        """The module with its averaged weights, for evaluation; no step can follow."""
        self._put(self.average.module)
        return self.module.eval()

    @torch.no_grad()
    def _put(self, values: Iterable[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)


class UNetMember(Member):
    """`SmallUNet` on augmented pairs, all classes at once."""

    BATCH = 8

    def __init__(self, pairs: Pairs, seed: int, learning_rate: float = 3e-3) -> None:
        unet = SmallUNet(pairs.mask.shape[1]).to(pairs.image.device)
        super().__init__(unet, learning_rate, weight_decay=0.01, warmup=20, window=8, seed=seed)
        self.augment = Augmentation(STRENGTH, flip_axes(pairs.mask), self.generator)
        self.criterion = DiceCELoss(sigmoid=True, smooth_nr=1.0, smooth_dr=1.0, batch=True)

    def prepare(self, pairs: Pairs) -> Pairs:
        """Pairs reduced to the U-Net's size once, not in every step."""
        if pairs.image.shape[-1] <= SIZE:
            return pairs
        image, mask = (
            F.interpolate(values, size=(SIZE, SIZE), mode="bilinear", align_corners=False, antialias=True)
            for values in (pairs.image, pairs.mask)
        )
        return Pairs(image, (mask > 0.5).float(), pairs.patient)

    def loss(self, pairs: Pairs) -> Tensor:
        order = torch.randperm(len(pairs), generator=self.generator)
        batch = pairs[order.repeat(-(-self.BATCH // len(order)))[: self.BATCH]]
        image, mask = self.augment(batch.image, batch.mask)
        with autocast(image.device.type, self.precision):
            logits = self.module(image)
        return self.criterion(logits.float(), mask)


class NetworkMember(Member):
    """A copy of the network on leave-one-out episodes: in a batch of one class, each item is guided by others."""

    IMAGES = 8
    SAMPLER = EpisodeSupportSampler(2, 5)

    def __init__(self, network: SAM2SGP, pairs: Pairs, seed: int, learning_rate: float = 5e-4) -> None:
        super().__init__(adaptable(network), learning_rate, weight_decay=0.01, warmup=5, window=4, seed=seed)
        self.module: PeftModel
        self.augment = Augmentation(STRENGTH, flip_axes(pairs.mask), self.generator)
        self.criterion = SGPLoss()

    def loss(self, pairs: Pairs) -> Tensor:
        tasks, owner = self.tasks(pairs)
        column = tasks[self._integer(len(tasks))]
        chosen = self._draw(pairs.mask[:, column].flatten(1).amax(1).cpu() > 0, owner)
        batch = pairs[chosen]
        image, mask = self.augment(batch.image, batch.mask[:, column : column + 1])
        holds = mask.flatten(1).amax(1).cpu() > 0
        index = self.SAMPLER(owner[chosen][None], holds[None], self._integer(2**31))
        with autocast(image.device.type, self.precision):
            output = self.module(image, support_label=mask, support_index=index.to(image.device))
        return self.criterion({name: value.float() for name, value in output.items()}, mask)

    @staticmethod
    def tasks(pairs: Pairs) -> tuple[list[int], Tensor]:
        """Classes that can be segmented leaving one out, and whose items (N,) may not guide each other.

        Items of one patient may not, unless no class is held by two patients; then only an item itself may not.
        """
        holds = (pairs.mask.flatten(2).amax(2) > 0).cpu()
        for owner in (pairs.patient, torch.arange(len(pairs))):
            tasks = [column for column in range(holds.shape[1]) if len(owner[holds[:, column]].unique()) > 1]
            if tasks:
                break
        return tasks, owner

    def _integer(self, bound: int) -> int:
        return int(torch.randint(bound, (), generator=self.generator))

    def _draw(self, holds: Tensor, owner: Tensor) -> Tensor:
        """A batch of a class (numbers of items): two of its holders that may guide each other, holders, others."""
        order = torch.randperm(len(holds), generator=self.generator)
        order = torch.cat([order[holds[order]], order[~holds[order]]])
        partner = int((owner[order] != owner[order[0]]).nonzero()[0])
        order = torch.cat([order[:1], order[partner : partner + 1], order[1:partner], order[partner + 1 :]])
        return order[: self.IMAGES]
