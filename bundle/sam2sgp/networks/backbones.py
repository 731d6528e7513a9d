"""SAM 2.1 models by name: the four of the `sam2` package, built from that package's own YAML, `nano` and `lite`.

In: a backbone name and an image size. Out: a `sam2.modeling.sam2_base.SAM2Base` on the CPU with random weights, from
which `SAM2SGP` takes its parts.
"""

from dataclasses import dataclass
from importlib.resources import files
from inspect import signature

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from sam2.modeling.backbones.hieradet import Hiera
from sam2.modeling.backbones.utils import PatchEmbed
from sam2.modeling.sam2_base import SAM2Base
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sam2sgp.errors import ConfigError
from sam2sgp.networks.hiera import BandedBlock, in_bands
from sam2sgp.networks.lite import BLOCK_COUNT, STEM_WIDTH, LiteTrunk

SIZE_MULTIPLE = 32
QUIET = 0.1


@dataclass(frozen=True)
class Backbone:
    """Where a backbone is defined (`yaml` is a path inside `package`) and what `SAM2SGP` uses with it by default.

    feature_norm: normalise each channel of the encoder's levels over the image. Without it, training from scratch lets
    the levels drift to large constant vectors, in which what differs between pixels drowns.
    memory_pool: side of the square of places whose memory tokens are averaged into one.
    regression_dim: learned features per pixel of the support regression.
    regression_on_trunk: the support regression reads the trunk's levels in place of the neck's.
    """

    package: str
    yaml: str
    checkpoint: str | None
    prior_levels: int = 1
    prior_dim: int = 64
    normalization: str = "imagenet"
    feature_norm: bool = False
    memory_pool: int = 2
    regression_dim: int = 40
    regression_on_trunk: bool = False


BACKBONES = {
    "nano": Backbone(
        "sam2sgp.networks",
        "nano.yaml",
        None,
        prior_levels=2,
        prior_dim=32,
        normalization="instance",
        feature_norm=True,
        memory_pool=1,
    ),
    "lite": Backbone(
        "sam2sgp.networks",
        "lite.yaml",
        None,
        prior_levels=2,
        prior_dim=32,
        normalization="lite",
        feature_norm=True,
        memory_pool=1,
        regression_dim=64,
        regression_on_trunk=True,
    ),
    "tiny": Backbone("sam2", "configs/sam2.1/sam2.1_hiera_t.yaml", "sam2.1_hiera_tiny.pt"),
    "small": Backbone("sam2", "configs/sam2.1/sam2.1_hiera_s.yaml", "sam2.1_hiera_small.pt"),
    "base_plus": Backbone("sam2", "configs/sam2.1/sam2.1_hiera_b+.yaml", "sam2.1_hiera_base_plus.pt"),
    "large": Backbone("sam2", "configs/sam2.1/sam2.1_hiera_l.yaml", "sam2.1_hiera_large.pt"),
}


class NanoHiera(Hiera):
    """Hiera whose first convolution has stride 2 instead of 4, so that each stage is twice as fine."""

    def __init__(self, embed_dim: int, **kwargs) -> None:
        super().__init__(embed_dim=embed_dim, **kwargs)
        self.patch_embed = PatchEmbed(kernel_size=(7, 7), stride=(2, 2), padding=(3, 3), embed_dim=embed_dim)


class CheckpointedBlock(BandedBlock):
    """A Hiera block of which the backward pass finds only the input, and computes the rest again."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            return checkpoint(super().forward, x, use_reentrant=False)
        return super().forward(x)


def checkpoint_blocks(trunk: nn.Module) -> None:
    """Make each block (of lite: each stage) of a trunk, with LoRA or without, keep only its input, in place.

    Only the class of Hiera's blocks changes: a wrapper would change the names of all weights.
    """
    for module in trunk.modules():
        if type(module) is BandedBlock:
            module.__class__ = CheckpointedBlock
        elif isinstance(module, LiteTrunk):
            module.features.set_grad_checkpointing()


def backbone(name: str) -> Backbone:
    """The definition of a backbone. Raises `ConfigError` for an unknown name."""
    if name not in BACKBONES:
        raise ConfigError(f"Unknown backbone {name!r}: expected one of {', '.join(BACKBONES)}.")
    return BACKBONES[name]


def _config(name: str) -> DictConfig:
    definition = backbone(name)
    return OmegaConf.create(files(definition.package).joinpath(definition.yaml).read_text()).model


def build_sam2(name: str, image_size: int) -> SAM2Base:
    """Build SAM 2.1 with its image size overridden.

    Args:
        name: one of `BACKBONES`.
        image_size: side S of the square input in pixels, a multiple of 32.

    Raises:
        ConfigError: unknown name, or a size that is no positive multiple of 32.
    """
    if image_size <= 0 or image_size % SIZE_MULTIPLE:
        raise ConfigError(f"image_size is {image_size}: expected a positive multiple of {SIZE_MULTIPLE}.")
    config = _config(name)
    config.image_size = image_size
    model = instantiate(config, _recursive_=True)
    in_bands(model.image_encoder.trunk)
    if backbone(name).checkpoint is None:
        init_from_scratch(model)
    return model


def init_from_scratch(model: nn.Module) -> None:
    """Xavier weights and zero biases in every linear and convolution layer, for training without a checkpoint.

    The mask decoder starts from quiet skips and a quiet hypernetwork: its output is a product of the two, and where it
    starts loud, the first steps silence it by driving the skip below zero, out of which the GELU never comes back.
    """
    built = set(model.image_encoder.trunk.modules()) if isinstance(model.image_encoder.trunk, LiteTrunk) else set()
    for module in model.modules():
        if module in built:  # timm's own initial weights suit its layers
            continue
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name, parameter in model.named_parameters():
        if "pos_embed" in name:
            nn.init.trunc_normal_(parameter, std=0.02)
    decoder = model.sam_mask_decoder
    with torch.no_grad():
        for layer in (decoder.conv_s0, decoder.conv_s1, *(mlp.layers[-1] for mlp in decoder.output_hypernetworks_mlps)):
            layer.weight.mul_(QUIET)


def trunk_size(name: str) -> tuple[int, int]:
    """Width of a backbone's first stage and its number of blocks, which tell the backbones apart, from its YAML."""
    trunk = _config(name).image_encoder.trunk
    if trunk._target_.endswith(LiteTrunk.__name__):
        return STEM_WIDTH, BLOCK_COUNT
    stages = trunk.get("stages", signature(Hiera).parameters["stages"].default)
    return trunk.embed_dim, sum(stages)
