"""Write a network's graphs as ONNX files, and say what they were made of.

    folder/encode.onnx  memory.onnx  segment.onnx    see `sam2sgp.runtime.graphs`
    folder/graphs.json                               fingerprint of the network, SHA-256 of the files

`graphs.json` is written last and names the files by their content, so an export that was interrupted is noticed, and
graphs of other weights are never run in silence.
"""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from sam2sgp.errors import ConfigError, WeightsError
from sam2sgp.files import replacing, sha256_of, write_text
from sam2sgp.networks import SAM2SGP
from sam2sgp.runtime.graphs import Stage, stages
from sam2sgp.support.content import digest_of, network_fingerprint

# Part of the fingerprint: counted up when graphs of the same network change by the code.
VERSION = 1
MANIFEST = "graphs.json"
STAGES = ("encode", "memory", "segment")
CPU = torch.device("cpu")

logger = logging.getLogger(__name__)


def graphs_folder(model_file: str | Path) -> str:
    """Where the graphs of a weights file lie: next to it, `model.pt` -> `model.graphs`."""
    return str(Path(model_file).with_suffix(".graphs"))


def need(package: str, purpose: str) -> ModuleType:
    """Import an optional package. Raises `ConfigError` if it is not installed."""
    try:
        return import_module(package)
    except ImportError as error:
        raise ConfigError(
            f"{purpose} needs the package {package!r}, which is not installed: run `pip install {package}`."
        ) from error


def graphs_fingerprint(network: SAM2SGP) -> str:
    """Hash of all that a network's graphs depend on: weights, LoRA, image size and switches."""
    with torch.autocast("cpu", enabled=False):
        weights = network_fingerprint(network, CPU)
    return digest_of(VERSION, weights, [network.uses_box, network.uses_attention, network.uses_dense])


def export_graphs(network: SAM2SGP, folder: str | Path) -> None:
    """Export a network to a folder, as it is now; what is there is replaced.

    Args:
        network: with its weights loaded.
        folder: it is made if need be.

    Raises:
        ConfigError: `onnx` or `onnxscript`, which PyTorch exports with, is not installed.
        WeightsError: the files can't be written.
    """
    for package in ("onnx", "onnxscript"):
        need(package, "The export to ONNX")
    folder = Path(folder)
    hashes = {}
    try:
        for name, stage in stages(network).items():
            logger.info("Exporting %s", name)
            program = _program(stage)
            file = folder / f"{name}.onnx"
            with replacing(file) as part:
                program.save(str(part), external_data=False)
                hashes[file.name] = sha256_of(part)
        manifest = {
            "fingerprint": graphs_fingerprint(network),
            "backbone": network.backbone,
            "image_size": network.image_size,
            "torch": torch.__version__,
            "sha256": hashes,
        }
        write_text(folder / MANIFEST, json.dumps(manifest, indent=4))
    except OSError as error:
        raise WeightsError(f"{folder}: the graphs can't be written ({error}); choose another `graphs_dir`.") from error
    logger.info("The graphs are in %s", folder)


def _program(stage: Stage) -> Any:
    """The ONNX program of a stage."""
    shapes = tuple({axis: torch.export.Dim.DYNAMIC for axis in axes} for axes in stage.dynamic)
    with _exporter_silenced():
        return torch.onnx.export(
            stage.eval(),
            tuple(stage.sample.values()),
            input_names=stage.inputs,
            output_names=stage.outputs,
            dynamic_shapes={"tensors": shapes},
            verbose=False,
        )


@contextmanager
def _exporter_silenced() -> Iterator[None]:
    """Without the hundreds of lines that the exporter says of its own inner workings."""
    inner = [logging.getLogger(name) for name in ("onnx_ir", "onnxscript", "torch.onnx", "torch.__trace")]
    levels = [each.level for each in inner]
    try:
        for each in inner:
            each.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for each, level in zip(inner, levels, strict=True):
            each.setLevel(level)


def checked_files(network: SAM2SGP, folder: str | Path) -> dict[str, Path]:
    """The files of a network's graphs by stage, whole and of this very network.

    Raises:
        WeightsError: there are none, they are damaged, or were exported from another network.
    """
    folder = Path(folder)
    again = "export them with `python -m monai.bundle run exporting_onnx` and the options of this run"
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        fingerprint, hashes = manifest["fingerprint"], dict(manifest["sha256"])
        made_for = f"the {manifest['backbone']} network at {manifest['image_size']} px"
    except FileNotFoundError as error:
        raise WeightsError(f"{folder}: expected the exported graphs of the network, found none; {again}.") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{folder / MANIFEST}: can't be read ({error!r}); {again}.") from error
    if fingerprint != graphs_fingerprint(network):
        raise WeightsError(
            f"{folder}: expected graphs of the weights and settings in use ({network.backbone} at "
            f"{network.image_size} px), found graphs of {made_for} with other weights or settings; {again}."
        )
    files = {name: folder / f"{name}.onnx" for name in STAGES}
    for file in files.values():
        if not file.is_file() or sha256_of(file) != hashes.get(file.name):
            raise WeightsError(f"{file}: expected the graph that {MANIFEST} names, found another or none; {again}.")
    return files
