"""In-context pre-training through the bundle."""

import pytest
import torch
from ignite.engine import Engine

from sam2sgp.data.phantom import make_phantoms
from sam2sgp.engines import EpisodeDice
from sam2sgp.networks import SAM2SGP, load_weights
from tests.bundle_runs import SMALL, run


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
    run("exporting", "train.json", "pretrain.json", **settings)
    assert exported.stat().st_size < 0.55 * best.stat().st_size
    network = SAM2SGP("lite", 64)
    load_weights(network, exported)
    for name, value in torch.load(best, weights_only=True).items():
        torch.testing.assert_close(network.state_dict()[name], value, atol=1e-3, rtol=1e-3)


def evaluate(batches: list[dict], **settings) -> float:
    outputs = {id(batch): batch.pop("output") for batch in batches}
    engine = Engine(lambda _, batch: outputs[id(batch)])
    EpisodeDice(**settings).attach(engine, "dice")
    engine.run(batches)
    return engine.state.metrics["dice"]


def episode(group: int, dice: list[float]) -> dict:
    """Two images whose prediction has this Dice; NaN for an image without the target."""
    label = torch.zeros(len(dice), 1, 1, 100)
    pred = torch.full_like(label, -1.0)
    for row, value in enumerate(dice):
        if value == value:
            label[row, ..., :50] = 1
            pred[row, ..., round(50 - 50 * value) : round(100 - 50 * value)] = 1
    return {"group": torch.tensor([group]), "output": {"label": label, "pred": pred}}


def test_groups_count_equally_and_held_out_sets_as_much_as_the_others():
    batches = [episode(0, [1.0, 0.5]), episode(0, [1.0, float("nan")]), episode(1, [0.4, 0.4]), episode(2, [0.2, 0.2])]
    names = ["a", "b", "c/part"]
    assert evaluate([dict(b) for b in batches], groups=names) == pytest.approx((2.5 / 3 + 0.4 + 0.2) / 3)
    held_out = evaluate([dict(b) for b in batches], groups=names, held_out=["c"])
    assert held_out == pytest.approx(((2.5 / 3 + 0.4) / 2 + 0.2) / 2)
