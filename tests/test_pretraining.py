"""In-context pre-training through the bundle."""

import pytest
import torch

from sam2sgp.data.phantom import make_phantoms
from sam2sgp.networks import SAM2SGP, load_weights
from tests.helpers.bundle_runs import SMALL, run


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    root = tmp_path_factory.mktemp("collection")
    for seed, name in enumerate(("first", "second")):
        make_phantoms(root / name, 6, size=(64, 64), num_slices=6, seed=seed, progress=False)
    return root


def pretrain(collection, output, **overrides) -> dict:
    settings = {**SMALL, "max_epochs": 2, "held_out": ["second"], "val_episodes_per_group": 1}
    settings |= {"dataset_dir": str(collection), "output_dir": str(output), "synthetic_probability": 0.5}
    run("training", "train.json", "pretrain.json", **{**settings, **overrides})
    return torch.load(output / "last.pt", weights_only=True)


def test_pretraining_resumes_exactly(collection, tmp_path):
    whole = pretrain(collection, tmp_path / "whole")
    pretrain(collection, tmp_path / "broken", **{"train::trainer::max_epochs": 1})
    resumed = pretrain(collection, tmp_path / "broken")
    for name, value in whole["network"].items():
        assert torch.equal(value, resumed["network"][name]), name
    assert 0 <= whole["best_metric"] <= 1

    best, exported = tmp_path / "whole" / "model.pt", tmp_path / "exported.pt"
    settings = {**SMALL, "output_dir": str(best.parent), "export_file": str(exported)}
    run("exporting", "train.json", "export.json", **settings)
    assert exported.stat().st_size < 0.55 * best.stat().st_size
    network = SAM2SGP("lite", 64)
    load_weights(network, exported)
    for name, value in torch.load(best, weights_only=True).items():
        torch.testing.assert_close(network.state_dict()[name], value, atol=1e-3, rtol=1e-3)
