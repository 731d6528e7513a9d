"""State dicts: read from a file, compared with a network's, and recognised by their names and shapes.

Nothing here unpickles code (`weights_only=True` or safetensors).
"""

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from sam2sgp.errors import WeightsError
from sam2sgp.networks.backbones import BACKBONES, trunk_size

WRAPPERS = ("model", "network")
# The first convolution of a trunk, and the number of a block in it: of Hiera, and of lite.
STEMS = ("trunk.patch_embed.proj.weight", "trunk.features.conv_stem.weight")
BLOCK = r"trunk\.(?:features\.)?blocks\.((?<=features\.blocks\.)\d+\.\d+|\d+)\."


def read_state(path: Path) -> dict[str, Tensor]:
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


def misfit(name: str, own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str | None:
    """How a state dict differs from that of the network `name`: a missing, unexpected or differently shaped key; None
    where it fits."""
    differences = []
    for key, value in own.items():
        if key not in given:
            differences.append(f"{key} is missing in the file")
        elif given[key].shape != value.shape:
            differences.append(f"{key} is {tuple(given[key].shape)} in the file, {tuple(value.shape)} in the network")
    differences += [f"{key} in the file is unknown to the network" for key in given if key not in own]
    if not differences:
        return None
    return f"does not fit the {name!r} network, {len(differences)} differences; the first: {differences[0]}."


def identify_backbone(state: Mapping[str, Tensor]) -> str | None:
    """The name of the backbone that a state dict of SAM 2 or of `SAM2SGP` belongs to, None if it is none of ours."""
    plain = {plain_name(key): value for key, value in state.items()}
    width = next((len(value) for key, value in plain.items() if key.endswith(STEMS)), None)
    blocks = {match[1] for key in plain if (match := re.search(BLOCK, key))}
    return next((name for name in BACKBONES if trunk_size(name) == (width, len(blocks))), None)


def is_sgp(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict is that of a `SAM2SGP`."""
    return any(key.startswith("pmg_decoder.") for key in state)


def plain_name(key: str) -> str:
    """The name that a parameter has in a network without LoRA."""
    return key.replace(".trunk.base_model.model.", ".trunk.").replace(".base_layer.", ".")
