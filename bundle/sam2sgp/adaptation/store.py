"""Adaptations on disk, found again by what they were made of.

    cache_dir/<key>/correctors.safetensors    of the folds; missing where the plain network was better
    cache_dir/<key>/adaptation.json           the record, written last: marks a whole entry

The key is a hash of the support set's content, of the network and of the settings; so nothing is ever out of date.
Several processes may write the same entry at once.
"""

import hashlib
import json
import logging
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sam2sgp.adaptation.corrector import Corrector, Trunk
from sam2sgp.adaptation.record import AdaptationRecord
from sam2sgp.files import replacing, sha256_of
from sam2sgp.networks import SAM2SGP
from sam2sgp.support.bank import SupportBank

RECORD = "adaptation.json"
CORRECTORS = "correctors.safetensors"

logger = logging.getLogger(__name__)


def key_of(network: SAM2SGP, bank: SupportBank, settings: dict) -> str:
    """SHA-256 over images, labels, patients, classes and preprocessing of the support set, the network's weights and
    the settings."""
    digest = hashlib.sha256()

    def add(name: str, tensor: Tensor) -> None:
        array = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {array.dtype} {tuple(array.shape)}".encode())
        digest.update(array.reshape(-1).view(torch.uint8).numpy())

    digest.update(json.dumps([settings, bank.settings, bank.class_values], sort_keys=True).encode())
    for item in bank.items:
        # Spacing and the slices that are no items decide, too.
        digest.update(json.dumps([item.patient, item.group, item.content]).encode())
        add("image", item.image)
        add("label", item.label)
    switches = (network.backbone, network.image_size, network.normalization)
    digest.update(repr((*switches, network.uses_box, network.uses_attention, network.uses_dense)).encode())
    for name, value in network.state_dict().items():
        add(name, value)
    return digest.hexdigest()


def save(directory: Path, record: AdaptationRecord, correctors: list[Corrector]) -> None:
    """Write an entry. A folder that can't be written costs a warning: the adaptation itself is there.

    Args:
        directory: of the entry.
        record: what is said of the adaptation; hashes of the files are added.
        correctors: of the folds, none where the plain network was better.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".new.", dir=directory) as folder:
            written, weights = Path(folder, RECORD), Path(folder, CORRECTORS)
            parts = []
            if correctors:
                states = enumerate(map(_state, correctors))
                save_file({f"{n}.{key}": value for n, state in states for key, value in state.items()}, weights)
                parts.append(weights)
            record.files = {path.name: sha256_of(path) for path in parts}
            written.write_text(record.to_json(), encoding="utf-8")
            mode = written.stat().st_mode
            for path in (*parts, written):
                with replacing(directory / path.name) as part:
                    path.replace(part)
                    part.chmod(mode)  # safetensors lets only the owner read its files
    except OSError as error:
        logger.warning(
            "%s: the adaptation can't be kept for the next run (%s); free space, or set another `adapt_dir`.",
            directory,
            error,
        )


def load(directory: Path, network: SAM2SGP, classes: int) -> tuple[AdaptationRecord, list[Corrector]] | None:
    """Read an entry: its record, and the correctors.

    Returns:
        None where there is no whole entry; a damaged one costs a warning.
    """
    if not (directory / RECORD).is_file():
        return None
    try:
        record = AdaptationRecord.of_json((directory / RECORD).read_text(encoding="utf-8"))
        for name, digest in record.files.items():
            if sha256_of(directory / name) != digest:
                raise ValueError(f"{name} has changed since it was written")
        correctors = []
        if record.files:
            weights, trunk = load_file(directory / CORRECTORS), Trunk(network)
            for number in range(len(record.steps)):
                corrector = Corrector(trunk, classes)
                prefix = f"{number}."
                own = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
                corrector.load_state_dict(own)
                correctors.append(corrector.eval().requires_grad_(False))
    except Exception as error:  # what a damaged file makes the readers raise has no common type
        logger.warning("%s: the stored adaptation can't be read (%s), so it is made again.", directory, error)
        return None
    return record, correctors


def _state(corrector: Corrector) -> dict[str, Tensor]:
    """Weights as a file holds them: contiguous."""
    return {name: value.contiguous() for name, value in corrector.state_dict().items()}
