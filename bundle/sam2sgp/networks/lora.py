"""LoRA on the image encoder through `peft`: q and v of every Hiera block, never k (paper section 3.2).

In the lite backbone, which has no attention, it is on the 1x1 convolutions, in which nearly all of its weights are.

SAM2's Hiera computes q, k and v by one fused linear layer. `split_qkv` replaces it by three layers with the same
weights, so that PEFT adapts only q and v, over their full width, in the blocks that widen channels too.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from sam2.modeling.backbones.hieradet import Hiera
from torch import Tensor, nn

from sam2sgp.errors import WeightsError

# `peft` brings `transformers` along, a second or two, so it is imported where there is LoRA.
if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

TARGET_MODULES = r".*\.(attn\.qkv\.(q|v)|conv_pwl?)"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


class SplitQKV(nn.Module):
    """Three linear layers in the place of one fused projection.

    The result equals the fused layer's: (..., dim) -> (..., 3 * dim_out), q then k then v.
    """

    def __init__(self, fused: nn.Linear) -> None:
        super().__init__()
        width = fused.out_features // 3
        for index, name in enumerate("qkv"):
            part = nn.Linear(fused.in_features, width)
            rows = slice(index * width, (index + 1) * width)
            part.weight = nn.Parameter(fused.weight.detach()[rows].clone())
            part.bias = nn.Parameter(fused.bias.detach()[rows].clone())
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        # A single row of windows comes as a view, which linear layers would go through place by place.
        x = x.contiguous()
        return torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1)


def split_qkv(trunk: nn.Module) -> None:
    """Replace the fused qkv layer of every block of a Hiera trunk, in place; nothing in other trunks."""
    for block in trunk.blocks if isinstance(trunk, Hiera) else ():
        block.attn.qkv = SplitQKV(block.attn.qkv)


def add_lora(trunk: nn.Module, r: int, alpha: float, dropout: float = 0.0) -> "PeftModel":
    """Wrap a trunk. B starts at zero, so the output is unchanged until trained.

    Args:
        trunk: Hiera after `split_qkv`, or `LiteTrunk`.
        r: rank of the update.
        alpha: the update is scaled by alpha / r.
        dropout: probability of dropping an input of the update in training.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, bias="none", target_modules=TARGET_MODULES)
    return get_peft_model(trunk, config)


def has_lora(trunk: nn.Module) -> bool:
    """Whether a trunk is what `add_lora` makes of one."""
    return hasattr(trunk, "peft_config")


def lora_layers(network: nn.Module) -> "dict[str, BaseTunerLayer]":
    """The layers with adapters, by name; none where no trunk has LoRA."""
    if not any(map(has_lora, network.modules())):
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: layer for name, layer in network.named_modules() if isinstance(layer, BaseTunerLayer)}


def load_lora(trunk: "PeftModel", directory: str | Path) -> None:
    """Load an adapter saved by PEFT (`adapter_config.json`, `adapter_model.safetensors`) into an adapted trunk.

    Raises:
        WeightsError: the folder holds no readable adapter, or one for another backbone, rank, scale or set of layers.
    """
    from peft import LoraConfig, set_peft_model_state_dict

    path = Path(directory)
    absent = [name for name in ADAPTER_FILES if not (path / name).is_file()]
    if absent:
        raise WeightsError(
            f"{path}: expected a LoRA adapter in PEFT's format ({', '.join(ADAPTER_FILES)}), {absent[0]} is missing; "
            "give the folder that `save_lora` wrote."
        )
    try:
        config = LoraConfig.from_pretrained(str(path))
        r, alpha = config.r, config.lora_alpha
        weights = load_file(path / ADAPTER_FILES[1])
    except Exception as error:  # what a damaged file makes the readers raise has no common type
        raise WeightsError(f"{path}: the adapter can't be read ({error}); write it again.") from error
    own = {name.replace(".default.", "."): value for name, value in trunk.state_dict().items() if ".lora_" in name}
    wrong = sorted(set(own) ^ set(weights)) or sorted(k for k in own if own[k].shape != weights[k].shape)
    if not wrong and alpha != trunk.peft_config["default"].lora_alpha:
        wrong = [f"alpha, which is {trunk.peft_config['default'].lora_alpha} here"]
    if wrong:
        raise WeightsError(
            f"{path}: the adapter (r = {r}, alpha = {alpha}) does not fit this network, first "
            f"difference at {wrong[0]}; use the backbone and the `lora` settings it was trained with."
        )
    set_peft_model_state_dict(trunk, weights)
