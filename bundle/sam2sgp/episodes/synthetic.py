"""Synthetic segmentation tasks for pre-training: what can't be learned from a few data sets is drawn.

Three kinds, each an episode of G images of one task: label maps of smooth noise with invented appearances (after
SynthSeg and UniverSeg), superpixels of a real image that are to be found again in deformed copies of it (after
SSL-ALPNet, arXiv 2007.09886), and bands of intensity in real images. All are functions of the random generator given.
"""

import numpy as np
import torch
from scipy.ndimage import gaussian_filter, map_coordinates
from torch import Tensor

SHAPES = ("regions", "blobs", "tubes")
MIN_AREA, MAX_AREA = 0.003, 0.5
ATTEMPTS = 8


def noise_task(rng: np.random.Generator, count: int, size: int) -> list[tuple[Tensor, Tensor]]:
    """Images of one invented anatomy: regions, blobs or tubes, each with an intensity (or colour) and a texture.

    Args:
        count: images G. size: their side S in pixels.

    Returns:
        G pairs of image (3, S, S) float32 in [0, 1] and mask (1, S, S) float32 in {0, 1}.
    """
    labels = int(rng.integers(3, 9))
    shape = SHAPES[rng.integers(len(SHAPES))]
    # In some tasks only the appearance tells the target, in others its place does too.
    fixed_layout = rng.random() < 0.6
    scale = size / rng.uniform(5, 14)
    base = _layout(rng, shape, labels, size, scale)
    colour = rng.random() < 0.3
    means = rng.uniform(0, 1, (labels, 3 if colour else 1))
    texture = rng.uniform(0, 0.12, labels) * (rng.random(labels) < 0.7)
    grain = rng.uniform(0.5, 3.0, labels)
    blur = rng.uniform(0.2, 1.2)
    target = int(rng.integers(1, labels))
    pairs = []
    for _ in range(count):
        layout = base if fixed_layout else _layout(rng, shape, labels, size, scale)
        layout = _warp(rng, layout, size * rng.uniform(0.01, 0.06), size / rng.uniform(4, 10))
        field = gaussian_filter(rng.standard_normal((size, size)), 1.0)
        grains = np.stack([gaussian_filter(field, g) for g in np.unique(np.round(grain))])
        order = np.searchsorted(np.unique(np.round(grain)), np.round(grain))
        grains /= grains.std(axis=(1, 2), keepdims=True) + 1e-6
        shift = rng.normal(0, 0.04, means.shape)
        image = (means + shift)[layout]
        image = image + (texture[layout] * np.take_along_axis(grains, order[layout][None], 0)[0])[..., None]
        image = gaussian_filter(image, (blur, blur, 0)) + rng.normal(0, rng.uniform(0, 0.05), image.shape)
        pairs.append(_pair(np.moveaxis(image, -1, 0), layout == target))
    return pairs


def _layout(rng: np.random.Generator, shape: str, labels: int, size: int, scale: float) -> np.ndarray:
    """Label map (S, S) with values 0 to `labels` - 1."""
    if shape == "regions":
        fields = np.stack([gaussian_filter(rng.standard_normal((size, size)), scale / 2) for _ in range(labels)])
        return fields.argmax(0)
    layout = np.zeros((size, size), int)
    if shape == "tubes":
        for label in range(1, labels):
            field = gaussian_filter(rng.standard_normal((size, size)), scale)
            slope = np.hypot(*np.gradient(field)) + 1e-9
            layout[np.abs(field) / slope < rng.uniform(0.8, 3.0)] = label
        return layout
    y, x = np.mgrid[:size, :size] / size
    for label in range(1, labels):
        for _ in range(int(rng.integers(1, 4))):
            cy, cx = rng.uniform(0.15, 0.85, 2)
            a, b = rng.uniform(0.03, 0.22, 2)
            turn = rng.uniform(0, np.pi)
            u = (x - cx) * np.cos(turn) + (y - cy) * np.sin(turn)
            v = (y - cy) * np.cos(turn) - (x - cx) * np.sin(turn)
            radius = np.hypot(u / a, v / b)
            # A third of the blobs are rings, as walls of organs are.
            inner = rng.uniform(0.5, 0.8) if rng.random() < 0.33 else 0.0
            layout[(radius < 1) & (radius >= inner)] = label
    return _warp(rng, layout, size * 0.04, size / 8)


def _warp(rng: np.random.Generator, layout: np.ndarray, strength: float, scale: float) -> np.ndarray:
    """Move a label map by a smooth random field of `strength` pixels."""
    size = len(layout)
    field = np.stack([gaussian_filter(rng.standard_normal((size, size)), scale) for _ in range(2)])
    field *= strength / (np.abs(field).mean() + 1e-9)
    grid = np.mgrid[:size, :size] + field + rng.normal(0, 0.03 * size, (2, 1, 1))
    return map_coordinates(layout, grid, order=0, mode="nearest")


def superpixel_task(rng: np.random.Generator, image: Tensor, count: int) -> list[tuple[Tensor, Tensor]] | None:
    """`count` times the same image (3, S, S) with one of its superpixels, to be augmented; None where there is none."""
    # Imported where pre-training needs them: they take a tenth of a second.
    from skimage.segmentation import felzenszwalb, slic

    grey = gaussian_filter(image.mean(0).numpy(), 0.7)
    if rng.random() < 0.5:
        segments = felzenszwalb(grey, scale=rng.uniform(20, 150), sigma=0.5, min_size=int(rng.integers(40, 300)))
    else:
        segments = slic(
            grey, n_segments=int(rng.integers(8, 60)), compactness=rng.uniform(0.02, 0.3), channel_axis=None
        )
    values, areas = np.unique(segments, return_counts=True)
    # A black segment is background.
    usable = [
        value
        for value, area in zip(values, areas, strict=True)
        if MIN_AREA * grey.size < area < MAX_AREA * grey.size and grey[segments == value].mean() > 0.06
    ]
    if not usable:
        return None
    mask = torch.from_numpy((segments == rng.choice(usable)).astype(np.float32))[None]
    return [(image.clone(), mask.clone()) for _ in range(count)]


def threshold_task(rng: np.random.Generator, images: list[Tensor]) -> list[tuple[Tensor, Tensor]] | None:
    """Images (3, S, S) with the mask of one band of their blurred intensity; None where no band fits all of them."""
    sigma = rng.uniform(0.8, 3.0)
    blurred = [gaussian_filter(image.mean(0).numpy(), sigma) for image in images]
    for _ in range(ATTEMPTS):
        low = rng.uniform(0.1, 0.9)
        high = low + rng.uniform(0.1, 0.6)
        masks = [(image > low) & (image < high) for image in blurred]
        if all(MIN_AREA < mask.mean() < MAX_AREA for mask in masks):
            return [
                (image, torch.from_numpy(mask[None].astype(np.float32)))
                for image, mask in zip(images, masks, strict=True)
            ]
    return None


def _pair(image: np.ndarray, mask: np.ndarray) -> tuple[Tensor, Tensor]:
    values = torch.from_numpy(image.clip(0, 1).astype(np.float32))
    return values.expand(3, -1, -1).contiguous(), torch.from_numpy(mask[None].astype(np.float32))
