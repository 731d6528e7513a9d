"""Weights: SAM 2.1 checkpoints, whole networks and LoRA adapters.

In: files named by the user. Out: a network that holds exactly what the file says, or a `WeightsError` that tells which
key differs and what to change. Nothing here unpickles code (`weights_only=True` or safetensors), loads a part of a file
in silence, or leaves a half-written file under the name asked for: files are written in a temporary folder next to
their target and moved there when complete, so several processes may fetch or save the same file at once.
"""

import logging
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING
from urllib.request import Request, urlopen

import torch
from monai.apps.utils import check_hash, download_url
from monai.bundle import ConfigParser
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from sam2.modeling.sam2_base import SAM2Base
from torch import Tensor

from sam2sgp.errors import ConfigError, WeightsError
from sam2sgp.files import replacing
from sam2sgp.networks.backbones import BACKBONES, trunk_size
from sam2sgp.networks.backbones import backbone as backbone_definition
from sam2sgp.networks.lora import ADAPTER_FILES

if TYPE_CHECKING:
    from sam2sgp.networks.sam2_sgp import SAM2SGP

LARGE_FILES = "large_files.yml"
DOWNLOAD_COMMAND = "python -m monai.bundle download_large_files --bundle_path ."
PROBE_SECONDS = 30
WRAPPERS = ("model", "network")
# The first convolution of a trunk, and the number of a block in it: of Hiera, and of lite.
STEMS = ("trunk.patch_embed.proj.weight", "trunk.features.conv_stem.weight")
BLOCK = r"trunk\.(?:features\.)?blocks\.((?<=features\.blocks\.)\d+\.\d+|\d+)\."

logger = logging.getLogger(__name__)


def fetch_checkpoint(backbone: str, bundle_root: str | Path) -> Path:
    """The SAM 2.1 checkpoint of a backbone, downloaded if it is not there yet and checked against its hash.

    Address and hash are those of `<bundle_root>/large_files.yml`, in the format of MONAI's `download_large_files`.

    Args:
        backbone: one of `BACKBONES`.
        bundle_root: the bundle's folder; the file goes to its `models/`.

    Raises:
        ConfigError: unknown backbone, or one without a checkpoint.
        WeightsError: no entry in `large_files.yml`, a wrong hash, or a failed download.
    """
    filename = backbone_definition(backbone).checkpoint
    if filename is None:
        raise ConfigError(
            f"The {backbone!r} backbone has no SAM 2.1 checkpoint to fetch; leave `checkpoint` unset and load its "
            "weights (`models/model.pt`), or choose another backbone."
        )
    target = Path(bundle_root, "models", filename)
    url, hash_val, hash_type = _large_file(Path(bundle_root, LARGE_FILES), f"models/{filename}")
    if target.exists():
        if not check_hash(target, hash_val, hash_type):
            raise WeightsError(
                f"{target}: its {hash_type} differs from {hash_val} in {LARGE_FILES}, so it is damaged, incomplete or "
                "another file; delete it and run again."
            )
        return target
    logger.info("Downloading %s (%s) to %s", url, _remote_size(url), target)
    try:
        with replacing(target) as part:
            download_url(url, part, hash_val, hash_type)
            if not part.is_file():  # download_url logs nothing and returns when permission is denied
                raise PermissionError("permission denied")
    except (OSError, RuntimeError, ValueError, HTTPException) as error:
        raise WeightsError(
            f"{target}: could not be downloaded from {url} ({error}); run again, or fetch that address by other means "
            "and put the file there."
        ) from error
    return target


def _large_file(listing: Path, path: str) -> tuple[str, str, str]:
    """url, hash and hash type of one entry of a `large_files.yml`."""
    if not listing.is_file():
        raise WeightsError(f"{listing}: not found; give the bundle's folder as `bundle_root`.")
    entries = ConfigParser.load_config_file(str(listing)).get("large_files", [])
    for entry in entries:
        if entry.get("path") == path:
            if not entry.get("url") or not entry.get("hash_val"):
                raise WeightsError(f"{listing}: the entry of {path} needs both `url` and `hash_val`.")
            return entry["url"], entry["hash_val"], entry.get("hash_type") or "sha256"
    raise WeightsError(f"{listing}: expected an entry with path {path}, found none; restore the file.")


def _remote_size(url: str) -> str:
    try:
        with urlopen(Request(url, method="HEAD"), timeout=PROBE_SECONDS) as response:
            return f"{int(response.headers['Content-Length']) / 1e6:.1f} MB"
    except (OSError, ValueError, TypeError, HTTPException):  # the download itself reports what is wrong
        return "unknown size"


def load_sam2_checkpoint(model: SAM2Base, path: str | Path, backbone: str) -> None:
    """Load a SAM 2.1 checkpoint strictly: `{"model": state dict}`, a plain state dict, or safetensors.

    Args:
        model: what `build_sam2(backbone, …)` builds.
        path: the file.
        backbone: what the model was built as, for messages.

    Raises:
        WeightsError: the file is missing, unreadable, or differs from the model in any key or shape.
    """
    path = Path(path)
    if not path.is_file():
        how = "check the path"
        if BACKBONES[backbone].checkpoint:
            how = (
                f"get it with `fetch_checkpoint({backbone!r}, bundle_root)` of sam2sgp.networks, or, in the bundle's "
                f"folder, `{DOWNLOAD_COMMAND}`"
            )
        raise WeightsError(f"{path}: no such file; expected a SAM 2.1 checkpoint of the {backbone!r} backbone: {how}.")
    state = _read_state(path)
    differences = _differences(model.state_dict(), state)
    if differences:
        raise WeightsError(f"{path}: {_misfit(backbone, differences)} {_sam2_origin(state, backbone)}")
    model.load_state_dict(state)


def identify_backbone(state: Mapping[str, Tensor]) -> str | None:
    """The name of the backbone that a state dict of SAM 2 or of `SAM2SGP` belongs to, None if it is none of ours."""
    plain = {_plain_name(key): value for key, value in state.items()}
    width = next((len(value) for key, value in plain.items() if key.endswith(STEMS)), None)
    blocks = {match[1] for key in plain if (match := re.search(BLOCK, key))}
    return next((name for name in BACKBONES if trunk_size(name) == (width, len(blocks))), None)


def _sam2_origin(state: Mapping[str, Tensor], wanted: str) -> str:
    """What a file is that is no SAM 2.1 checkpoint of the backbone wanted, and what to do."""
    found = identify_backbone(state)
    if _is_sgp(state):
        overlay = f" of configs/backbones/{found}.json" if found else ""
        return f"The file holds a SAM2SGP network{overlay}: load it with `load_weights`, not as `checkpoint`."
    if found is None:
        return f"The file is no SAM 2.1 checkpoint of any backbone ({', '.join(BACKBONES)})."
    if "maskmem_tpos_enc" in state and "no_obj_embed_spatial" not in state:
        return (
            f"The file is an older SAM 2.0 checkpoint of configs/backbones/{found}.json: use the SAM 2.1 one, "
            f"{BACKBONES[found].checkpoint}."
        )
    if found != wanted:
        return f"The file belongs to configs/backbones/{found}.json: use that overlay, or the file of {wanted!r}."
    return (
        f"The file belongs to configs/backbones/{found}.json, as it should, but is no whole SAM 2.1 checkpoint: use "
        "the original."
    )


def save_weights(network: "SAM2SGP", path: str | Path, half: bool = False) -> None:
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


def load_weights(network: "SAM2SGP", path: str | Path) -> None:
    """Load what `save_weights` wrote, strictly; fp16 weights load into an fp32 network, whatever its image size.

    The file may also be safetensors, or hold its state dict under "model" or "network". A file without LoRA loads into
    a network with LoRA: its weights become the base weights and the adapters are set to no effect, to be trained.

    Raises:
        WeightsError: the file is missing, unreadable, or was written by a network with other settings.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such file; expected the weights of a SAM2SGP network: check the path.")
    state = _read_state(path)
    own = network.state_dict()
    fitted = _without_effect(state, own) if _lora_rank(own) and not _lora_rank(state) else state
    differences = _differences(own, fitted)
    if differences:
        raise WeightsError(f"{path}: {_misfit(network.backbone, differences)} {_sgp_origin(state, own)}")
    network.load_state_dict(fitted)


def _without_effect(state: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without LoRA under the names of a network with it, its adapters B at zero."""
    names = {_plain_name(key): key for key in own if ".lora_" not in key}
    fitted = {names.get(key, key): value for key, value in state.items()}
    for key, value in own.items():
        if ".lora_" in key:
            fitted[key] = torch.zeros_like(value) if ".lora_B." in key else value
    return fitted


def _plain_name(key: str) -> str:
    return key.replace(".trunk.base_model.model.", ".trunk.").replace(".base_layer.", ".")


@dataclass(frozen=True)
class _Settings:
    """The settings of `SAM2SGP` that show in the names and shapes of a state dict."""

    backbone: str | None
    lora_rank: int | None
    prior_levels: int
    second_decoder: bool
    guided: bool
    regression: bool
    refinement: bool

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> "_Settings":
        return cls(
            identify_backbone(state),
            _lora_rank(state),
            sum(re.fullmatch(r"prior\.projections\.\d+\.weight", key) is not None for key in state),
            any(key.startswith("pma_decoder.") for key in state),
            "pma_decoder.strength" in state,
            any(key.startswith("regression.") for key in state),
            any(key.startswith("refinement.") for key in state),
        )


def _sgp_origin(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """How the settings of the network that wrote a file differ from one's own, and what to change."""
    if not _is_sgp(state):
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
        remedy = f"set `lora` to rank {file.lora_rank}, or save the file anew after `merge_lora`"
        advice.append("{}, the network {}: {}".format(*ranks, remedy))
    if file.prior_levels != network.prior_levels:
        levels = f"{file.prior_levels} support prior levels, the network {network.prior_levels}"
        remedy = f"`pmg.prior_levels` to {file.prior_levels}" if file.prior_levels else "`pmg.prior` to false"
        if not network.prior_levels:
            remedy = f"`pmg.prior` to true and {remedy}"
        advice.append(f"{levels}: set {remedy}")
    elif file.regression != network.regression:
        has = "a support regression" if file.regression else "no support regression"
        advice.append(f"{has}, unlike the network: set `pmg.regression` to {str(file.regression).lower()}")
    if file.prior_levels and network.prior_levels and file.refinement != network.refinement:
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


def merge_lora(network: "SAM2SGP") -> None:
    """Fold the adapters into the layers that they adapt, in place: the trunk is then that of a network without LoRA.

    The result computes the same. Its trunk stays frozen. Nothing happens where there is no LoRA.
    """
    trunk = network.image_encoder.trunk
    if isinstance(trunk, PeftModel):
        network.image_encoder.trunk = trunk.merge_and_unload()


def save_lora(network: "SAM2SGP", directory: str | Path) -> None:
    """Write the adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors` in a folder.

    Each file is replaced only by a complete one; others in the folder are left alone. `load_lora` reads it back.

    Raises:
        ConfigError: the network has no LoRA.
        WeightsError: the files can't be written.
    """
    trunk = network.image_encoder.trunk
    if not isinstance(trunk, PeftModel):
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
                    part.chmod(mode)  # safetensors lets the owner alone read its files
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{directory}: the adapters can't be written ({error}); choose another folder.") from error


def _read_state(path: Path) -> dict[str, Tensor]:
    """The state dict in a file, on the CPU; a zip file's tensors are mapped into memory, not read."""
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, weights_only=True, map_location="cpu", mmap=zipfile.is_zipfile(path))
    except Exception as error:  # what a damaged file makes the readers raise has no common type
        reason = str(error).split("\n")[0]
        raise WeightsError(
            f"{path}: can't be read as weights ({reason}): the file is damaged or incomplete, or holds more than "
            "tensors; get or write it again."
        ) from error
    if isinstance(content, Mapping):
        content = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), content)
        if content and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
            return dict(content)
    raise WeightsError(f"{path}: expected a state dict (names and tensors), found none; give a file of weights.")


def _differences(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """One phrase for each key that is missing, of another shape, or unexpected."""
    differences = []
    for key, value in own.items():
        if key not in given:
            differences.append(f"{key} is missing in the file")
        elif given[key].shape != value.shape:
            differences.append(f"{key} is {tuple(given[key].shape)} in the file, {tuple(value.shape)} in the network")
    return differences + [f"{key} in the file is unknown to the network" for key in given if key not in own]


def _misfit(name: str, differences: list[str]) -> str:
    return f"does not fit the {name!r} network, {len(differences)} differences; the first: {differences[0]}."


def _is_sgp(state: Mapping[str, Tensor]) -> bool:
    return any(key.startswith("pmg_decoder.") for key in state)


def _lora_rank(state: Mapping[str, Tensor]) -> int | None:
    return next((len(value) for key, value in state.items() if ".lora_A." in key), None)
