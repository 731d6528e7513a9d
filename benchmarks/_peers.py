"""What a support set gives without SAM2-SGP: floors that need no training, and networks trained on it from scratch.

In: support pairs on the network's grid, images (N, 3, S, S) in [0, 1] and masks (N, 1, S, S) in {0, 1}. Out: for
query images (B, 3, S, S), maps (B, 1, S, S) that are foreground where > 0. `train_volumes` has whole volumes instead.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from monai.inferers import SlidingWindowInferer
from monai.losses import DiceCELoss
from monai.metrics import compute_dice
from monai.networks.nets import BasicUNet, DynUNet, SwinUNETR
from monai.transforms import (
    Compose,
    NormalizeIntensityd,
    RandAdjustContrastd,
    RandAffined,
    RandCropByPosNegLabeld,
    RandGaussianNoised,
    SpatialPadd,
)
from monai.utils import set_determinism
from torch import Tensor, nn

from sam2sgp.networks import SAM2SGP

THRESHOLDS = [level / 20 for level in range(1, 20)]
EPS = 1e-6

BATCH = 8
WEIGHT_DECAY = 0.01
BETAS = (0.9, 0.99)
# Share of the time in which the learning rate rises; the rest is a cosine down to zero.
WARMUP = 0.05
MAX_GRADIENT_NORM = 5.0
# A flip is an augmentation only where the mirrored target lies about where the target lies.
FLIP_OVERLAP = 0.9
# The later outputs of deep supervision, each half as large as the one before, count half as much, as in nnU-Net.
DEPTH_DECAY = 0.5

# Patches of volumes, (Z, H, W): the support volumes' median size, up to this, in multiples of the first.
PATCH_STEP = np.array([8, 16, 16])
LARGEST_PATCH = np.array([48, 160, 160])
VOLUME_BATCH = 2
VOLUME_FILTERS = (32, 64, 128, 256, 320)
# An axis of fewer voxels is not halved any more.
SMALLEST_AXIS = 8

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """A network to train from scratch: how it is built for 3-channel images of side S, and its learning rate."""

    build: Callable[[int], nn.Module]
    learning_rate: float


def _basic_unet(size: int) -> nn.Module:
    """BasicUNet with MONAI's own widths at half the resolution, which takes a quarter of the time per step.

    Within a minute on a CPU steps are what it lacks. No pixel is lost: 2x2 pixels become channels, and back.
    """
    network = BasicUNet(spatial_dims=2, in_channels=12, out_channels=4)
    return nn.Sequential(nn.PixelUnshuffle(2), network, nn.PixelShuffle(2))


def _dyn_unet(size: int) -> nn.Module:
    """nnU-Net's 2D plan: 3x3 kernels, halved down to 4 px at the bottom, widths doubled, deep supervision."""
    levels = max(3, int(math.log2(size)) - 1)
    return DynUNet(
        spatial_dims=2,
        in_channels=3,
        out_channels=1,
        kernel_size=[3] * levels,
        strides=[1] + [2] * (levels - 1),
        upsample_kernel_size=[2] * (levels - 1),
        filters=[min(32 * 2**level, 512) for level in range(levels)],
        deep_supervision=True,
        deep_supr_num=levels - 2,
    )


def _swin_unetr(size: int) -> nn.Module:
    return SwinUNETR(in_channels=3, out_channels=1, feature_size=24, spatial_dims=2)


PEERS = {
    "basic_unet": Peer(_basic_unet, 3e-3),
    "dyn_unet": Peer(_dyn_unet, 1e-3),
    "swin_unetr": Peer(_swin_unetr, 1e-3),
}


def mean_mask(masks: Tensor) -> Map:
    """The mean of the support masks, cut at the level that suits these masks best."""
    mean = masks.mean(0, keepdim=True)
    scores = [compute_dice((mean > level).float().expand_as(masks), masks).nanmean() for level in THRESHOLDS]
    level = THRESHOLDS[int(torch.stack(scores).argmax())]
    return lambda images: (mean - level).expand(len(images), -1, -1, -1)


def nearest_copy(network: SAM2SGP, images: Tensor, masks: Tensor) -> Map:
    """The mask of the support image that is most similar by the network's retrieval embedding."""

    @torch.no_grad()
    def embed(batch: Tensor) -> Tensor:
        return torch.cat([network.retrieval_embedding(network.encode(part)) for part in batch.split(BATCH)])

    keys = embed(images)
    return lambda queries: masks[(embed(queries) @ keys.T).argmax(1)] - 0.5


def train(peer: Peer, images: Tensor, masks: Tensor, seconds: float, seed: int) -> tuple[Map, int]:
    """Train a network on the pairs for a number of seconds; returns it and the number of steps it made.

    Each step is a batch of `BATCH` pairs drawn without replacement and augmented. All but the time limit is
    determined by the seed.
    """
    torch.manual_seed(seed)
    network = peer.build(images.shape[-1]).to(images.device)
    axes = flip_axes(masks)
    order: list[int] = []

    def draw() -> tuple[Tensor, Tensor]:
        while len(order) < BATCH:
            order.extend(torch.randperm(len(images)).tolist())
        chosen = order[:BATCH]
        del order[:BATCH]
        batch, target = augment(images[chosen], masks[chosen], axes)
        return standardise(batch), target

    steps = fit(network, peer.learning_rate, seconds, draw, DiceCELoss(sigmoid=True, batch=True))
    return torch.no_grad()(lambda queries: network(standardise(queries))), steps


def fit(
    network: nn.Module,
    learning_rate: float,
    seconds: float,
    draw: Callable[[], tuple[Tensor, Tensor]],
    loss_function: nn.Module,
) -> int:
    """Train a network for a number of seconds on the batches that are drawn; returns the number of steps."""
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), learning_rate, betas=BETAS, weight_decay=WEIGHT_DECAY)
    steps, started = 0, time.perf_counter()
    while (share := (time.perf_counter() - started) / seconds) < 1:
        rise, fall = min(1.0, share / WARMUP + EPS), 0.5 * (1 + math.cos(math.pi * share))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rise * fall
        batch, target = draw()
        out = network(batch)
        # Deep supervision stacks the outputs of all levels, resized to the first one's size.
        outputs = out.unbind(1) if out.ndim > batch.ndim else [out]
        weights = [DEPTH_DECAY**level for level in range(len(outputs))]
        losses = [weight * loss_function(logits, target) for weight, logits in zip(weights, outputs, strict=True)]
        optimizer.zero_grad(set_to_none=True)
        (sum(losses) / sum(weights)).backward()
        nn.utils.clip_grad_norm_(network.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        steps += 1
    network.eval()
    return steps


def train_volumes(volumes: Sequence[tuple[Tensor, Tensor]], classes: int, seconds: float, seed: int) -> tuple[Map, int]:
    """Train MONAI's 3D DynUNet, nnU-Net's network, on patches of volumes for a number of seconds.

    Args:
        volumes: images (C, Z, H, W) and class maps (1, Z, H, W) of 0 (background) to `classes`.

    Returns:
        A map from an image (C, Z, H, W) to class values (Z, H, W), and the number of steps.
    """
    set_determinism(seed)
    median = np.median([label.shape[1:] for _, label in volumes], axis=0)
    patch = np.minimum(np.ceil(median / PATCH_STEP) * PATCH_STEP, LARGEST_PATCH).astype(int)
    network = _volume_network(len(volumes[0][0]), classes, patch)
    both = ("image", "label")
    prepare = Compose([NormalizeIntensityd("image", channel_wise=True), SpatialPadd(both, patch)])
    change = Compose(
        [
            RandCropByPosNegLabeld(both, "label", patch, pos=2, neg=1),
            RandAffined(
                both,
                prob=0.7,
                rotate_range=(0.4, 0, 0),
                scale_range=(0, 0.2, 0.2),
                mode=("bilinear", "nearest"),
                padding_mode="border",
            ),
            RandAdjustContrastd("image", prob=0.3, gamma=(0.7, 1.5), retain_stats=True),
            RandGaussianNoised("image", prob=0.3, std=0.1),
        ]
    )
    prepared = [prepare({"image": image.float(), "label": label}) for image, label in volumes]

    def draw() -> tuple[Tensor, Tensor]:
        chosen = [change(prepared[int(torch.randint(len(prepared), ()))])[0] for _ in range(VOLUME_BATCH)]
        return tuple(torch.stack([case[key].as_tensor() for case in chosen]) for key in both)

    loss_function = DiceCELoss(softmax=True, to_onehot_y=True, include_background=False, batch=True)
    steps = fit(network, 1e-3, seconds, draw, loss_function)
    windows = SlidingWindowInferer(patch.tolist(), sw_batch_size=VOLUME_BATCH, overlap=0.5, mode="gaussian")

    @torch.no_grad()
    def segment(image: Tensor) -> Tensor:
        image = NormalizeIntensityd("image", channel_wise=True)({"image": image.float()})["image"]
        return windows(image[None].as_tensor(), network)[0].argmax(0)

    return segment, steps


def _volume_network(channels: int, classes: int, patch: np.ndarray) -> DynUNet:
    """A DynUNet whose axes are halved as long as they are long enough, as in nnU-Net's plan."""
    size, strides, kernels = patch.copy(), [], []
    for level in range(len(VOLUME_FILTERS)):
        stride = np.where(size >= 2 * SMALLEST_AXIS if level else 0, 2, 1)
        if level and (stride == 1).all():
            break
        size = size // stride
        strides.append(stride.tolist())
        kernels.append([3, 3, 3])
    return DynUNet(
        spatial_dims=3,
        in_channels=channels,
        out_channels=classes + 1,
        kernel_size=kernels,
        strides=strides,
        upsample_kernel_size=strides[1:],
        filters=VOLUME_FILTERS[: len(strides)],
        deep_supervision=True,
        deep_supr_num=max(1, len(strides) - 2),
    )


def standardise(images: Tensor) -> Tensor:
    """Each image to mean 0 and deviation 1."""
    deviation, mean = torch.std_mean(images, dim=(1, 2, 3), keepdim=True)
    return (images - mean) / (deviation + 1e-3)


def flip_axes(masks: Tensor) -> list[int]:
    """Axes of (N, 1, H, W) along which the mean mask is as good as its mirror image."""
    mean = masks.mean(0)
    own = float((mean * mean).sum()) + EPS
    return [axis - 3 for axis in (1, 2) if float((mean * mean.flip(axis)).sum()) / own >= FLIP_OVERLAP]


def augment(images: Tensor, masks: Tensor, axes: list[int]) -> tuple[Tensor, Tensor]:
    """Flips, affine and elastic deformation of both; gamma, contrast, brightness and noise of the images."""
    count, device = len(images), images.device

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, device=device)

    angle, scale = uniform(-0.4, 0.4), uniform(0.75, 1.3)
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    shift = uniform(-0.2, 0.2, 2)
    matrix = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    for axis in axes:
        # grid_sample's x, the first row of the matrix, runs along the last axis.
        sign = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
        matrix[:, -1 - axis] *= sign[:, None]
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    bend = torch.randn(count, 2, 6, 6, device=device) * uniform(0, 0.06, 1, 1, 1)
    bend = F.interpolate(bend, size=images.shape[-2:], mode="bicubic", align_corners=False)
    grid = grid + bend.permute(0, 2, 3, 1)
    images = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    masks = F.grid_sample(masks, grid, mode="nearest", padding_mode="zeros", align_corners=False)
    images = images.clamp(0, 1) ** torch.exp(uniform(-0.5, 0.5, 1, 1, 1))
    images = images * uniform(0.8, 1.2, 1, 1, 1) + uniform(-0.1, 0.1, 1, 1, 1)
    return images + torch.randn_like(images) * uniform(0, 0.06, 1, 1, 1), masks
