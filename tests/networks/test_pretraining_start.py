"""What pre-training starts from."""

import pytest
import torch

from sam2sgp.networks import SAM2SGP, parameter_groups, start_pretraining


def test_pretraining_freezes_fine_levels_and_depthwise_filters_and_lowers_the_rate_of_the_rest(tmp_path):
    network = SAM2SGP("lite", 64)
    torch.save(network.state_dict(), tmp_path / "start.pt")
    assert start_pretraining(network, tmp_path / "start.pt", frozen_levels=2) is network
    trained = {name for name, p in network.image_encoder.trunk.named_parameters() if p.requires_grad}
    assert trained and all("conv_pw" in name for name in trained)
    assert min(int(name.split(".")[2]) for name in trained) == 2
    rest, trunk = parameter_groups(network, 1e-3, 0.1)
    assert (rest["lr"], trunk["lr"]) == (1e-3, pytest.approx(1e-4))
    assert len(trunk["params"]) == len(trained)
    everything = [p for p in network.parameters() if p.requires_grad]
    assert len(rest["params"]) + len(trunk["params"]) == len(everything)
    (only,) = parameter_groups(SAM2SGP("nano", 64), 1e-3, 0.1)
    assert only["lr"] == 1e-3
