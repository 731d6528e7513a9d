"""Weights of whole networks, and LoRA adapters.

In: files named by the user. Out: a network that holds exactly what the file says, or a `WeightsError` that tells which
key differs and what to change. Nothing here loads a part of a file in silence, or leaves a half-written file under the
name asked for: files are written in a temporary folder next to their target and moved there when complete, so several
processes may save the same file at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import SafetensorError
from torch import Tensor

from sam2sgp.errors import ConfigError, WeightsError
from sam2sgp.files import replacing
from sam2sgp.networks.lora import ADAPTER_FILES, has_lora
from sam2sgp.networks.sam2_sgp import SAM2SGP
from sam2sgp.networks.states import identify_backbone, is_sgp, misfit, plain_name, read_state


def save_weights(network: SAM2SGP, path: str | Path, half: bool = False) -> None:
    """Write the whole state dict of a network; an old file stays until the new one is complete.

    Args:
        half: store float32 as float16, half the size; else every tensor as it is.

    Raises:
        WeightsError: the file can't be written.
    """
    path = Path(path)
    try:
        with replacing(path) as part:
            state = network.state_dict()
            if half:
                state = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
            torch.save(state, part)
    except (OSError, RuntimeError) as error:
        raise WeightsError(f"{path}: can't be written ({error}); free space, or choose another folder.") from error


def load_weights(network: SAM2SGP, path: str | Path) -> SAM2SGP:
    """Load what `save_weights` wrote, strictly, and return the network; fp16 weights load into an fp32 one of any size.

    The file may also be safetensors, or hold its state dict under "model" or "network". A file without LoRA loads into
    a network with LoRA: its weights become the base weights and the adapters are set to no effect, to be trained.

    Raises:
        WeightsError: the file is missing, unreadable, or was written by a network with other settings.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such file; expected the weights of a SAM2SGP network: check the path.")
    state = read_state(path)
    own = network.state_dict()
    fitted = _without_effect(state, own) if _lora_rank(own) and not _lora_rank(state) else state
    difference = misfit(network.backbone, own, fitted)
    if difference:
        raise WeightsError(f"{path}: {difference} {_sgp_origin(state, own)}")
    network.load_state_dict(fitted)
    return network


def _without_effect(state: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without LoRA under the names of a network with it, its adapters B at zero."""
    names = {plain_name(key): key for key in own if ".lora_" not in key}
    fitted = {names.get(key, key): value for key, value in state.items()}
    for key, value in own.items():
        if ".lora_" in key:
            fitted[key] = torch.zeros_like(value) if ".lora_B." in key else value
    return fitted


def _lora_rank(state: Mapping[str, Tensor]) -> int | None:
    return next((len(value) for key, value in state.items() if ".lora_A." in key), None)


@dataclass(frozen=True)
class _Settings:
    """The settings of `SAM2SGP` that show in the names and shapes of a state dict."""

    backbone: str | None
    lora_rank: int | None
    prior: bool
    second_decoder: bool
    guided: bool
    regression: bool
    refinement: bool

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> "_Settings":
        return cls(
            identify_backbone(state),
            _lora_rank(state),
            any(key.startswith("prior.") for key in state),
            any(key.startswith("pma_decoder.") for key in state),
            "pma_decoder.strength" in state,
            any(key.startswith("regression.") for key in state),
            any(key.startswith("refinement.") for key in state),
        )


def _sgp_origin(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """How the settings of the network that wrote a file differ from one's own, and what to change."""
    if not is_sgp(state):
        found = identify_backbone(state)
        if "maskmem_tpos_enc" in state:
            overlay = f", with configs/backbones/{found}.json" if found else ""
            return f"The file is a SAM 2 checkpoint: give it as `checkpoint`{overlay}."
        return "The file holds no SAM2SGP network."
    file, network = _Settings.of(state), _Settings.of(own)
    advice = []
    if file.backbone != network.backbone:
        use = f"use configs/backbones/{file.backbone}.json" if file.backbone else "it is none of ours"
        advice.append(f"backbone {file.backbone}, the network {network.backbone}: {use}")
    if file.lora_rank is not None and file.lora_rank != network.lora_rank:
        ranks = (f"LoRA of rank {rank}" if rank else "no LoRA" for rank in (file.lora_rank, network.lora_rank))
        remedy = f"set `lora` to rank {file.lora_rank}, or merge it by `sam2sgp export --fine-tune`"
        advice.append("{}, the network {}: {}".format(*ranks, remedy))
    if file.prior != network.prior:
        has = "a support prior" if file.prior else "no support prior"
        advice.append(f"{has}, unlike the network: set `pmg.prior` to {str(file.prior).lower()}")
    elif file.regression != network.regression:
        has = "a support regression" if file.regression else "no support regression"
        advice.append(f"{has}, unlike the network: set `pmg.regression` to {str(file.regression).lower()}")
    if file.prior and network.prior and file.refinement != network.refinement:
        has = "a refinement" if file.refinement else "no refinement"
        advice.append(f"{has}, unlike the network: set `refinement` to {str(file.refinement).lower()}")
    if file.second_decoder != network.second_decoder:
        own_text, remedy = ("none", "on") if file.second_decoder else ("one", "all off")
        has = "a second decoder" if file.second_decoder else "no second decoder"
        advice.append(f"{has}, the network {own_text}: switch `pma` (box, attention, dense) {remedy}")
    elif file.guided != network.guided:
        has, value = ("attention guidance", "true") if file.guided else ("no attention guidance", "false")
        advice.append(f"{has}, unlike the network: set `pma.attention` to {value}")
    if not advice:
        return "Its settings seem to be the network's, so it is damaged or of another version of sam2sgp."
    return f"The file has {'; it has '.join(advice)}."


def merge_lora(network: SAM2SGP) -> None:
    """Fold the adapters into the layers that they adapt, in place: the trunk is then that of a network without LoRA.

    The result computes the same. Its trunk stays frozen. Nothing happens where there is no LoRA.
    """
    trunk = network.image_encoder.trunk
    if has_lora(trunk):
        network.image_encoder.trunk = trunk.merge_and_unload()


def save_lora(network: SAM2SGP, directory: str | Path) -> None:
    """Write the adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors` in a folder.

    Each file is replaced only by a complete one; others in the folder stay. `load_lora` reads it back.

    Raises:
        ConfigError: the network has no LoRA.
        WeightsError: the files can't be written.
    """
    trunk = network.image_encoder.trunk
    if not has_lora(trunk):
        raise ConfigError("The network has no LoRA adapters to save: build it with `lora`, e.g. {'r': 8, 'alpha': 16}.")
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".lora.", dir=directory) as folder:
            trunk.save_pretrained(folder, save_embedding_layers=False)
            mode = Path(folder, ADAPTER_FILES[0]).stat().st_mode
            for name in ADAPTER_FILES:
                with replacing(directory / name) as part:
                    Path(folder, name).replace(part)
                    part.chmod(mode)  # safetensors lets only the owner read its files
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{directory}: the adapters can't be written ({error}); choose another folder.") from error
