"""The `sam2` package's own tiny model with random weights: as a checkpoint file, and as the reference at any size."""

from functools import cache

import pytest
import torch
from sam2.build_sam import build_sam2

from sam2sgp import networks
from tests.helpers.small_network import SIZE

TINY_YAML = "configs/sam2.1/sam2.1_hiera_t.yaml"


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """A file like sam2.1_hiera_tiny.pt. Parameters that SAM2 starts at zero are random too, so that they count."""
    torch.manual_seed(0)
    model = build_sam2(TINY_YAML, device="cpu", apply_postprocessing=False)
    for parameter in model.parameters():
        if not parameter.detach().any():
            torch.nn.init.normal_(parameter, std=0.02)
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.pt"
    torch.save({"model": model.state_dict()}, path)
    return path


@pytest.fixture(scope="session")
def sam2_reference(tiny_checkpoint):
    """The package's own model, built and loaded by the package, for an image size."""

    @cache
    def build(size):
        override = [f"++model.image_size={size}"]
        return build_sam2(
            TINY_YAML, str(tiny_checkpoint), "cpu", hydra_overrides_extra=override, apply_postprocessing=False
        )

    return build


@pytest.fixture(scope="module")
def tiny_model():
    return networks.build_sam2("tiny", 64)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(5, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
