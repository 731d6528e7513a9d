"""The network under adaptation as a PEFT model: LoRA on the image encoder, full copies of everything behind it.

LoRA is on q and v of every block and on the neck. One `LoraConfig` says all of it, so what adaptation learns is one
adapter in PEFT's own format (`adapter_config.json`, `adapter_model.safetensors`), which `PeftModel.from_pretrained`
reads onto the network that was adapted.
"""

from copy import deepcopy
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from sam2sgp.networks import SAM2SGP, merge_lora

ENCODER = "image_encoder"
TARGET_MODULES = r"image_encoder\.(trunk\..*\.(attn\.qkv\.(q|v)|conv_pwl?)|neck\.convs\.\d+\.conv)"
RANK = 8
ALPHA = 16


def plain_copy(network: SAM2SGP) -> SAM2SGP:
    """A copy whose own LoRA, if any, is merged into its weights: what adapters are put on."""
    copy = deepcopy(network)
    merge_lora(copy)
    return copy


def adaptable(network: SAM2SGP) -> PeftModel:
    """A copy of a network, to be trained: LoRA without effect yet, and trainable copies of the decoders and the rest.

    Fully trained is every part of the network with trainable parameters but the encoder. The network given is left
    as it is.
    """
    copy = plain_copy(network)
    trained = [
        name for child, module in copy.named_children() if child != ENCODER for name in _wrappable(child, module)
    ]
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, bias="none", target_modules=TARGET_MODULES, modules_to_save=trained)
    return get_peft_model(copy, config)


def _wrappable(name: str, module: nn.Module) -> list[str]:
    """Names of a module with trainable parameters, or of those in it if it is a list, which PEFT can't copy whole."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        return [inner for key, child in module.named_children() for inner in _wrappable(f"{name}.{key}", child)]
    return [name] if any(parameter.requires_grad for parameter in module.parameters()) else []


def merged(model: PeftModel) -> SAM2SGP:
    """The plain network that computes what the adapted one does, in evaluation mode; `model` is used up."""
    return model.merge_and_unload().eval().requires_grad_(False)


def load_adapted(network: SAM2SGP, directory: str | Path) -> SAM2SGP:
    """A copy of the network that was adapted, with the adapter saved in a folder merged into it."""
    return merged(PeftModel.from_pretrained(plain_copy(network), str(directory)))
