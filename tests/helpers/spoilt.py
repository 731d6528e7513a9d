"""Weights that a few steps of training make better."""

from pathlib import Path

import torch

from sam2sgp.networks import SAM2SGP, load_weights, save_weights

EMBEDDED = Path(__file__).parents[2] / "bundle" / "models" / "model.pt"


def save_spoilt_weights(path: Path) -> Path:
    """Write the embedded weights with noise in the refinement."""
    torch.manual_seed(0)
    network = SAM2SGP("lite", 64)
    load_weights(network, EMBEDDED)
    for parameter in network.refinement.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    save_weights(network, path)
    return path
