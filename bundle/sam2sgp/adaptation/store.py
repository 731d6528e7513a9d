"""Adaptations on disk, found again by what they were made of.

    cache_dir/<key>/adapter_config.json, adapter_model.safetensors    the adapted network, in PEFT's format
    cache_dir/<key>/unet.safetensors                                  the small U-Net
    cache_dir/<key>/adaptation.json                                   the record, written last: marks a whole entry

The key is a hash of the support set's content, of the network and of the settings; so nothing is ever out of date.
What was dropped has no files. Several processes may write the same entry at once.
"""

import hashlib
import json
import logging
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from sam2sgp.adaptation.lora import load_adapted
from sam2sgp.adaptation.unet import SmallUNet
from sam2sgp.files import replacing
from sam2sgp.networks import SAM2SGP
from sam2sgp.networks.lora import ADAPTER_FILES
from sam2sgp.support.bank import SupportBank

RECORD = "adaptation.json"
UNET = "unet.safetensors"

logger = logging.getLogger(__name__)


def key_of(network: SAM2SGP, bank: SupportBank, settings: dict) -> str:
    """SHA-256 over images, labels, patients and classes of the support set, the network's weights and the settings."""
    digest = hashlib.sha256()

    def add(name: str, tensor: Tensor) -> None:
        array = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {array.dtype} {tuple(array.shape)}".encode())
        digest.update(array.reshape(-1).view(torch.uint8).numpy())

    digest.update(json.dumps([settings, bank.class_values], sort_keys=True).encode())
    for item in bank.items:
        digest.update(json.dumps([item.patient, item.group]).encode())
        add("image", item.image)
        add("label", item.label)
    switches = (network.backbone, network.image_size, network.normalization)
    digest.update(repr((*switches, network.uses_box, network.uses_attention, network.uses_dense)).encode())
    digest.update(repr([name for name, parameter in network.named_parameters() if parameter.requires_grad]).encode())
    for name, value in network.state_dict().items():
        add(name, value)
    return digest.hexdigest()


def save(directory: Path, record: dict, model: PeftModel | None, unet: SmallUNet | None) -> None:
    """Write an entry. A folder that can't be written costs a warning: the adaptation itself is there.

    Args:
        directory: of the entry.
        record: what is said of the adaptation; hashes of the files are added.
        model: the adapted network before merging, None if it was dropped.
        unet: None if it was dropped.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".new.", dir=directory) as folder:
            if model is not None:
                model.save_pretrained(folder, save_embedding_layers=False)
            if unet is not None:
                save_file(unet.state_dict(), Path(folder, UNET))
            parts = [path for name in (*ADAPTER_FILES, UNET) if (path := Path(folder, name)).is_file()]
            written = Path(folder, RECORD)
            written.write_text(json.dumps({**record, "files": {path.name: _sha256(path) for path in parts}}, indent=2))
            mode = written.stat().st_mode
            for path in (*parts, written):
                with replacing(directory / path.name) as part:
                    path.replace(part)
                    part.chmod(mode)  # safetensors lets the owner alone read its files
    except OSError as error:
        logger.warning(
            "%s: the adaptation can't be kept for the next run (%s); free space, or set another `adapt_dir`.",
            directory,
            error,
        )


def load(directory: Path, network: SAM2SGP, classes: int) -> tuple[dict, SAM2SGP | None, SmallUNet | None] | None:
    """Read an entry: its record, the adapted network and the U-Net, None for what was dropped.

    Returns:
        None where there is no whole entry; a damaged one costs a warning.
    """
    if not (directory / RECORD).is_file():
        return None
    device = next(network.parameters()).device
    try:
        record = json.loads((directory / RECORD).read_text(encoding="utf-8"))
        for name, digest in record["files"].items():
            if _sha256(directory / name) != digest:
                raise ValueError(f"{name} has changed since it was written")
        adapted = load_adapted(network, directory) if ADAPTER_FILES[1] in record["files"] else None
        unet = None
        if UNET in record["files"]:
            unet = SmallUNet(classes)
            unet.load_state_dict(load_file(directory / UNET))
            unet.to(device).eval().requires_grad_(False)
    except Exception as error:  # what a damaged file makes the readers raise has no common type
        logger.warning("%s: the stored adaptation can't be read (%s), so it is made anew.", directory, error)
        return None
    return record, adapted, unet


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
