"""Segmentation of the slices of a case guided by a support bank, a batch of slices at a time."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from monai.inferers import Inferer
from torch import Tensor

from sam2sgp.inferers.episode import autocast
from sam2sgp.inferers.region import SECOND_PASS_WEIGHT, RegionPass
from sam2sgp.networks import SAM2SGP, SGPOutput
from sam2sgp.support.bank import Retrieved, SupportBank
from sam2sgp.support.sampler import SupportSampler
from sam2sgp.transforms.array import to_three_channels

if TYPE_CHECKING:
    from sam2sgp.adaptation import Adapter

ABSENT_LOGIT = -10.0


@dataclass
class Chunk:
    """Result for the slices [start, start + B) of a case: maps of all C classes of the bank, and their support."""

    start: int
    output: SGPOutput
    retrieved: list[Retrieved]


class SupportSetInferer(Inferer):
    """Segment with the support items that the sampler chooses for each slice and class.

    Args:
        bank: the support bank. It is encoded at the first use and again after `reset`.
        sampler: chooses the items.
        batch_size: slices at a time; bounds memory.
        precision: "fp32", "bf16" or, on a GPU, "fp16".
        adapter: adapts the network to the bank before it is encoded; None, or one without a limit, does not.
        region_below: objects of an extent below this share of the image are segmented a second time in a region of
            interest, see `RegionPass`; 0 for never.

    Classes without an eligible support item get `ABSENT_LOGIT` everywhere: they are not segmented.
    """

    def __init__(
        self,
        bank: SupportBank,
        sampler: SupportSampler,
        batch_size: int = 8,
        precision: str = "fp32",
        adapter: "Adapter | None" = None,
        region_below: float = 0.0,
    ) -> None:
        self.bank = bank
        self.sampler = sampler
        self.batch_size = batch_size
        self.precision = precision
        self.adapter = adapter
        self.adaptation = None
        self.region_pass = RegionPass(bank, sampler, region_below, batch_size)

    def reset(self) -> None:
        """Forget the encoded support set, because the network has changed."""
        self.bank.forget()

    def __call__(self, inputs: Tensor, network: SAM2SGP, *args, **kwargs) -> Tensor:
        """Images (Z, C', S, S) in [0, 1] -> logits (Z, C, S, S); keyword arguments as of `chunks`."""
        return torch.cat([chunk.output.logits for chunk in self.chunks(inputs, network, **kwargs)])

    @torch.no_grad()
    def chunks(
        self, inputs: Tensor, network: SAM2SGP, patient: str | None = None, group: str | None = None
    ) -> Iterator[Chunk]:
        """Segment slice by slice.

        Args:
            inputs: (Z, C', S, S) images in [0, 1], on any device.
            network: on the device to compute on, in evaluation mode.
            patient: support items of this patient are not used.
            group: where the bank holds items of this group, only those are used.
        """
        device = next(network.parameters()).device
        if self.bank.embedding is None:
            self.adaptation = self.adapter(network, self.bank, self.sampler) if self.adapter else None
        if self.adaptation is not None:
            self.adaptation.refuse(patient, self.bank)
            network = self.adaptation.network
        with autocast(device.type, self.precision):
            if self.bank.embedding is None:
                self.bank.encode(network, device)
            for start in range(0, len(inputs), self.batch_size):
                batch = inputs[start : start + self.batch_size].to(device, torch.float32)
                image = to_three_channels(batch)
                features = network.encode(image)
                retrieved = self.bank.retrieve(network, features, self.sampler, patient, group)
                output = self._segment(network, features, retrieved)
                if self.adaptation is not None:
                    output = self.adaptation.combine(output, image, [entry.value for entry in retrieved])
                yield Chunk(start, output, retrieved)

    def second_pass(
        self,
        logits: Tensor,
        images: Tensor,
        network: SAM2SGP,
        pixel: tuple[float, float] = (1.0, 1.0),
        patient: str | None = None,
        group: str | None = None,
    ) -> Tensor:
        """Correct logits (B, C, H, W) that `chunks` gave, brought to the images' grid: see `RegionPass`."""
        weight = SECOND_PASS_WEIGHT
        if self.adaptation is not None:
            network = self.adaptation.network
            weight *= self.adaptation.network_share
        with autocast(logits.device.type, self.precision):
            return self.region_pass(logits, images, network, pixel, patient, group, weight)

    def _segment(self, network: SAM2SGP, features, retrieved: list[Retrieved]) -> SGPOutput:
        """Segment the classes of equal K together, and put the results in the order of the bank's classes."""
        batch, classes = len(features), len(self.bank.class_values)
        size = network.image_size
        device = features.embedding.device
        out = SGPOutput(
            logits=torch.full((batch, classes, size, size), ABSENT_LOGIT, device=device),
            pseudo_logits=torch.full((batch, classes, size, size), ABSENT_LOGIT, device=device),
            box=torch.full((batch, classes, 4), -1.0, device=device),
            iou=torch.zeros(batch, classes, device=device),
            object_score=torch.full((batch, classes), ABSENT_LOGIT, device=device),
        )
        by_count = defaultdict(list)
        for entry in retrieved:
            by_count[entry.index.shape[1]].append(entry)
        for entries in by_count.values():
            part = network.segment(features, self.bank.select(entries))
            columns = [self.bank.class_values.index(entry.value) for entry in entries]
            for name, values in vars(part).items():
                getattr(out, name)[:, columns] = values.float()
        return out
