"""torch.compile of the image encoder, the part whose shapes are the same for every image."""

import shutil

import torch

from sam2sgp.errors import ConfigError
from sam2sgp.networks.sam2_sgp import SAM2SGP

# Triton, which inductor's GPU code is written in, needs Volta or newer.
MIN_CAPABILITY = (7, 0)


def compile_encoder(network: SAM2SGP) -> SAM2SGP:
    """Compile a network's image encoder, in place; weights and their names stay. The first images take minutes.

    Raises:
        ConfigError: PyTorch can't compile for this device.
    """
    device = next(network.parameters()).device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        found = ".".join(map(str, torch.cuda.get_device_capability(device)))
        raise ConfigError(
            f"compile is set, but {device} has compute capability {found}: expected 7.0; set it to False."
        )
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++"))):
        raise ConfigError("compile is set, which needs a C++ compiler on a CPU: install g++, or set it to False.")
    for part in (network.image_encoder.trunk, network.image_encoder.neck):
        part.compile(dynamic=False)
    return network
