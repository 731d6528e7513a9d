"""What a corrector sees of an image, and how what it finds comes back to the image's own grid."""

from dataclasses import replace

import pytest
import torch

from sam2sgp.adaptation.plan import LONGEST, PATCH_SIZE, WHOLE_SIZE, Plan
from sam2sgp.support.fingerprint import SupportFingerprint, TargetFingerprint

TARGET = TargetFingerprint(4, 20.0, 0.05, 0.1, 0.4, 1, 500.0)
SUPPORT = SupportFingerprint(4, 4, 1, False, 500, 600, {1: TARGET})


def support(thickness: float, side: int = 600) -> SupportFingerprint:
    """A support set of images of a side, with a target of a thickness in pixels."""
    target = replace(TARGET, thickness=thickness, thickness_share=thickness / side)
    return replace(SUPPORT, height=side, width=side, targets={1: target})


def test_thin_targets_are_seen_in_patches_of_the_images_own_pixels():
    assert Plan.of(support(4.0)) == Plan(PATCH_SIZE, True)
    assert Plan.of(support(40.0)) == Plan(WHOLE_SIZE, False)
    # The image has no more pixels than the whole image at the corrector's size.
    assert Plan.of(support(1.5, 200)) == Plan(WHOLE_SIZE, False)


def bright(image: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """A corrector that finds what is bright."""
    return 20 * (image[:, :1] - 0.5)


def kept(image: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """A corrector that changes nothing."""
    return found


@pytest.mark.parametrize("plan", [Plan(96, False), Plan(64, True)])
@pytest.mark.parametrize("shape", [(150, 100), (40, 130)])
def test_probabilities_come_back_to_where_the_object_is(plan, shape):
    image = torch.zeros(2, 1, *shape)
    image[1, :, 10:30, 60:90] = 1
    for corrector, logits in ((bright, torch.zeros_like(image)), (kept, 20 * (image - 0.5))):
        found = plan.predict([corrector, corrector], image, logits)
        assert found.shape == image.shape
        assert ((found > 0.5) == (image > 0.5)).float().mean() > 0.98 and found[0].max() < 0.1


def test_the_number_of_patches_is_bounded():
    seen = []

    def corrector(image: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
        seen.append(image.shape[-1])
        return image[:, :1]

    found = Plan(PATCH_SIZE, True).predict([corrector], *torch.zeros(2, 1, 1, 3 * LONGEST, 4 * LONGEST))
    assert found.shape[-1] == 4 * LONGEST and len(seen) <= 25
