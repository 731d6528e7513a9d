"""State dicts: recognised, and read without running code."""

import pickle
from pathlib import Path

import pytest
import torch

from sam2sgp.errors import WeightsError
from sam2sgp.networks import (
    SAM2SGP,
    identify_backbone,
    load_lora,
    load_sam2_checkpoint,
    load_weights,
    save_lora,
)


@pytest.mark.parametrize("name", ["nano", "lite", "tiny", "small", "base_plus"])
@pytest.mark.parametrize("lora", [None, {"r": 2, "alpha": 2}])
def test_the_backbone_is_identified_by_the_weights(name, lora):
    assert identify_backbone(SAM2SGP(name, 64, lora=lora).state_dict()) == name


class Bomb:
    """Writes a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("writer", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_code_in_a_weights_file_is_never_run(tiny_model, tmp_path, writer):
    exploded, path = tmp_path / "exploded", tmp_path / "model.pt"
    network = SAM2SGP("nano", 64, lora={"r": 2, "alpha": 2})
    adapter = tmp_path / "lora"
    save_lora(network, adapter)
    writer({"model": {"weight": Bomb(exploded)}}, path)
    (adapter / "adapter_model.safetensors").write_bytes(path.read_bytes())
    for load in (
        lambda: load_sam2_checkpoint(tiny_model, path, "tiny"),
        lambda: load_weights(network, path),
        lambda: load_lora(network.image_encoder.trunk, adapter),
    ):
        with pytest.raises(WeightsError, match="can't be read"):
            load()
    assert not exploded.exists()
    Bomb(exploded).__reduce__()[0](exploded)
    assert exploded.exists()
