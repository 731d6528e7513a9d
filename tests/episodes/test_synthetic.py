"""Synthetic tasks are functions of their generator and of the image."""

import numpy as np
import torch

from sam2sgp.episodes.synthetic import noise_task, superpixel_task, threshold_task

SIZE = 32


def test_synthetic_tasks_depend_on_the_generator_alone():
    first, second = (noise_task(np.random.default_rng(3), 3, SIZE) for _ in range(2))
    for (image, mask), (image_again, mask_again) in zip(first, second, strict=True):
        assert torch.equal(image, image_again) and torch.equal(mask, mask_again)


def test_superpixels_are_of_the_image_itself():
    image = torch.zeros(3, SIZE, SIZE) + 0.2
    image[:, 8:20, 8:20] = 0.9
    pairs = superpixel_task(np.random.default_rng(0), image, 3)
    assert len(pairs) == 3
    assert all(torch.equal(one, image) and torch.equal(mask, pairs[0][1]) for one, mask in pairs)
    assert 0 < pairs[0][1].sum() < SIZE * SIZE
    assert superpixel_task(np.random.default_rng(0), torch.zeros(3, SIZE, SIZE), 3) is None


def test_a_threshold_task_is_a_band_of_intensity():
    images = [torch.linspace(0, 1, SIZE).expand(3, SIZE, SIZE).clone() for _ in range(3)]
    pairs = threshold_task(np.random.default_rng(1), images)
    columns = pairs[0][1][0].any(0).nonzero()[:, 0]
    assert pairs[0][1][0].all(0).sum() == len(columns) == columns[-1] - columns[0] + 1
