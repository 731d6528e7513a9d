"""How a corrector looks at images, planned by what the support set looks like.

One plan does not serve all: large and few objects want to be seen with all that is around them, thin ones (vessels,
membranes) want pixels. So thin objects are seen in patches of the image's own pixels, others in the whole image.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from monai.inferers import sliding_window_inference
from torch import Tensor

from sam2sgp.adaptation.corrector import LIMIT, Corrector, bounded
from sam2sgp.support.fingerprint import SupportFingerprint
from sam2sgp.transforms.array import Letterbox, to_three_channels

WHOLE_SIZE = 224
PATCH_SIZE = 256
# Mean thickness in pixels of the whole image at `WHOLE_SIZE` below which an object is thin.
THIN = 3.0
# A whole image this much larger shows no more than the image at `WHOLE_SIZE` does.
MIN_GAIN = 1.25
# Longest side in pixels at which patches are cut: bounds the time a query takes.
LONGEST = 1024
OVERLAP = 0.25


@dataclass(frozen=True)
class Plan:
    """What a corrector sees: the whole image as a square of `size` pixels, or patches of `size` of its own pixels."""

    size: int
    patches: bool

    @classmethod
    def of(cls, support: SupportFingerprint) -> "Plan":
        """The plan for a support set: patches where most of its targets are thin in the whole image."""
        thin = [target.thickness_share * WHOLE_SIZE < THIN for target in support.targets.values()]
        patches = 2 * sum(thin) > len(thin) and max(support.height, support.width) >= MIN_GAIN * WHOLE_SIZE
        return cls(PATCH_SIZE if patches else WHOLE_SIZE, patches)

    def letterbox(self, shape: tuple[int, int], pixel: tuple[float, float]) -> Letterbox | None:
        """How images (H, W), with pixels of `pixel` mm, come to the corrector's grid; None: they stay as they are."""
        if not self.patches:
            return Letterbox.of(shape, self.size, pixel)
        return Letterbox.of(shape, LONGEST) if max(shape) > LONGEST else None

    @torch.no_grad()
    def predict(
        self, correctors: Sequence[Corrector], images: Tensor, logits: Tensor, pixel: tuple[float, float] = (1.0, 1.0)
    ) -> Tensor:
        """Mean probabilities (B, C, H, W) of correctors for images (B, C', H, W) in [0, 1] and the network's logits."""
        letterbox = self.letterbox(tuple(images.shape[-2:]), pixel)
        images, found = to_three_channels(images).float(), bounded(logits)
        if letterbox is not None:
            images, found = letterbox.apply(images), letterboxed_logits(letterbox, found)
        fitted = torch.cat([images, found], 1)

        def mean_of(batch: Tensor) -> Tensor:
            image, found = batch[:, :3], batch[:, 3:]
            return torch.stack([corrector(image, found).sigmoid() for corrector in correctors]).mean(0)

        if self.patches:
            found = sliding_window_inference(fitted, (self.size,) * 2, 1, mean_of, overlap=OVERLAP, mode="gaussian")
        else:
            found = torch.cat([mean_of(image) for image in fitted.split(1)])
        return found if letterbox is None else letterbox.restore(found)


def letterboxed_logits(letterbox: Letterbox, found: Tensor) -> Tensor:
    """`bounded` logits (B, C, H, W) -> (B, C, S, S); in the padding nothing is found."""
    return letterbox.apply(found + LIMIT) - LIMIT
