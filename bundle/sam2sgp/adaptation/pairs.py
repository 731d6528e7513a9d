"""Support pairs at the size at which a corrector sees them, and batches of them.

In: images, masks, and what the network finds, on their own grid. Out: batches of images (B, 3, P, P) in [0, 1], logits
and masks (B, C, P, P).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sam2sgp.adaptation.augment import Augmentation, Strength, flip_axes
from sam2sgp.adaptation.corrector import LIMIT
from sam2sgp.adaptation.plan import Plan, letterboxed_logits
from sam2sgp.transforms.array import Letterbox, to_three_channels

WHOLE = Strength(0.4, 0.28, 0.08, 0.1, 0.2, 0.045, gamma=0.5, colour=0.1, bias=0.18, noise=0.05, blur=0.25)
# In patches, scale means more and place nothing.
PATCHES = Strength(0.4, 0.2, 0.08, 0.1, 0.0, 0.03, gamma=0.4, colour=0.1, bias=0.18, noise=0.05, blur=0.15)
# Share of patches that are cut around a pixel of a class.
CENTRED = 0.5
# Side at which masks are compared.
COMPARED = 64


@dataclass(frozen=True)
class Pair:
    """A labelled image on its own grid, and what the network finds without its label.

    image: (C', H, W) in [0, 1]. found: (C, H, W) `bounded` logits. mask: (C, H, W) bool. pixel: its height and width in
    mm.
    """

    image: Tensor
    found: Tensor
    mask: Tensor
    pixel: tuple[float, float]


class Pairs:
    """Pairs brought to the grid of a plan.

    Args:
        pairs: as they are.
        plan: how a corrector sees them.
        device: of the batches.
    """

    def __init__(self, pairs: Sequence[Pair], plan: Plan, device: torch.device) -> None:
        self.plan = plan
        self.images, self.found, self.masks = [], [], []
        for pair in pairs:
            letterbox = plan.letterbox(tuple(pair.image.shape[-2:]), pair.pixel)
            image, mask = to_three_channels(pair.image)[None].float(), pair.mask.to(torch.uint8)
            found = pair.found[None].float()
            if letterbox is not None:
                image, mask, found = (
                    letterbox.apply(image),
                    letterbox.apply_label(mask),
                    letterboxed_logits(letterbox, found),
                )
            self.images.append(image[0].half().to(device))
            self.found.append(found[0].half().to(device))
            self.masks.append(mask.to(device))
        small = [Letterbox.of(tuple(mask.shape[-2:]), COMPARED).apply_label(mask) for mask in self.masks]
        self.small = torch.stack(small).float()

    def __len__(self) -> int:
        return len(self.images)

    @property
    def classes(self) -> int:
        return self.masks[0].shape[0]

    def augmentation(self, index: Sequence[int], generator: torch.Generator) -> Augmentation:
        """What suits some of the pairs: flips along axes on which nothing depends."""
        return Augmentation(PATCHES if self.plan.patches else WHOLE, flip_axes(self.small[list(index)]), generator)

    def draw(self, index: Sequence[int], count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """A batch of `count` of the pairs numbered, each one as often as any other, give or take one."""
        order = torch.randperm(len(index), generator=generator).repeat(-(-count // len(index)))[:count]
        chosen = [index[place] for place in order.tolist()]
        if not self.plan.patches:
            drawn = [(self.images[i], self.found[i], self.masks[i]) for i in chosen]
        else:
            drawn = [self._patch(i, generator) for i in chosen]
        images, found, masks = (torch.stack(values).float() for values in zip(*drawn, strict=True))
        return images, found, masks

    def _patch(self, number: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """A patch of a pair, padded where the image is smaller."""
        image, found, mask, size = self.images[number], self.found[number], self.masks[number], self.plan.size
        foreground = torch.nonzero(mask.amax(0)) if _uniform(generator) < CENTRED else mask.new_zeros(0, 2)
        places = []
        for axis, length in enumerate(image.shape[-2:]):
            start = _uniform(generator) * max(0, length - size)
            if len(foreground):
                if axis == 0:
                    centre = foreground[int(_uniform(generator) * len(foreground))].tolist()
                start = min(max(0, centre[axis] - size / 2), max(0, length - size))
            places.append(slice(round(start), round(start) + size))
        rows, columns = places
        image, found, mask = (values[:, rows, columns] for values in (image, found, mask))
        missing = (0, size - image.shape[-1], 0, size - image.shape[-2])
        return F.pad(image, missing), F.pad(found, missing, value=-LIMIT), F.pad(mask, missing)


def _uniform(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator))
