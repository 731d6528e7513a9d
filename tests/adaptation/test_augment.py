"""Augmentation of batches."""

import torch

from sam2sgp.adaptation.augment import Augmentation, Strength, flip_axes

NONE = Strength(0, 0, 0, 0, 0, 0, gamma=0, colour=0, bias=0, noise=0, blur=0)


def test_only_axes_along_which_objects_keep_their_place_are_flipped():
    masks = torch.zeros(4, 1, 32, 32)
    masks[:, :, 4:12, 8:24] = 1
    assert flip_axes(masks) == (False, True)
    masks = masks.clone()
    masks[:, :, 20:28, 8:24] = 1
    assert flip_axes(masks) == (True, True)


def test_without_strength_images_come_back_flipped_along_the_axes_given_at_most():
    image, mask = torch.rand(32, 3, 16, 16), (torch.rand(32, 1, 16, 16) > 0.5).float()
    generator = torch.Generator().manual_seed(0)
    changed, _, labels = Augmentation(NONE, (False, True), generator)(image, mask, mask, 0.0)
    flipped = [torch.allclose(new, old.flip(2), atol=1e-3) for new, old in zip(changed, image, strict=True)]
    kept = [torch.allclose(new, old, atol=1e-3) for new, old in zip(changed, image, strict=True)]
    assert all(a != b for a, b in zip(flipped, kept, strict=True)) and 5 < sum(flipped) < 27
    for new, old, flip in zip(labels, mask, flipped, strict=True):
        assert torch.equal(new, old.flip(2) if flip else old)


def test_masks_and_what_was_found_follow_their_images():
    image = torch.zeros(16, 3, 48, 48)
    image[:, :, 14:30, 20:36] = 1
    strength = Strength(0.5, 0.3, 0.1, 0.1, 0.1, 0.03, gamma=0, colour=0, bias=0, noise=0, blur=0)
    augment = Augmentation(strength, (True, True), torch.Generator().manual_seed(1))
    changed, found, mask = augment(image, 8 * image[:, :1] - 4, image[:, :1], -4.0)
    assert found.min() == -4 and ((found > 0) == (mask > 0)).float().mean() > 0.99
    bright = (changed[:, :1] > 0.5).float()
    assert (bright == mask).float().mean() > 0.99
    assert (mask - image[:, :1]).abs().mean() > 0.02 and set(mask.unique().tolist()) == {0.0, 1.0}
    assert changed.min() >= 0 and changed.max() <= 1
