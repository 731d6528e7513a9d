"""Training through the bundle: checkpoints, resuming, LoRA, early stopping, precision and tracking."""

import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sam2sgp.errors import ConfigError, WeightsError, cause_of
from sam2sgp.networks import SAM2SGP, load_weights
from tests.helpers.bundle_runs import SMALL, run


def train(phantoms, output, **overrides) -> dict:
    """Train and return the content of the last checkpoint."""
    settings = {**SMALL, "max_epochs": 2, "dataset_dir": str(phantoms), "output_dir": str(output), **overrides}
    run("training", "train.json", **settings)
    return torch.load(output / "last.pt", weights_only=True)


def losses(output) -> dict[int, float]:
    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars("train_loss")}


def test_a_resumed_training_has_the_losses_and_weights_of_an_unbroken_one(phantoms, tmp_path):
    whole = train(phantoms, tmp_path / "whole")
    first = train(phantoms, tmp_path / "broken", **{"train::trainer::max_epochs": 1})
    assert first["epoch"] == 1 and whole["epoch"] == 2
    resumed = train(phantoms, tmp_path / "broken")
    for name, value in whole["network"].items():
        assert torch.equal(value, resumed["network"][name]), name
    for name, value in whole["state"]["moving_average"].items():
        assert torch.equal(value, resumed["state"]["moving_average"][name]), name
    assert resumed["best_metric"] == whole["best_metric"]
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 4


def test_a_finished_training_is_left_as_it_is_and_other_settings_are_refused(phantoms, tmp_path):
    train(phantoms, tmp_path, max_epochs=1)
    before = (tmp_path / "model.pt").stat().st_mtime_ns
    train(phantoms, tmp_path, max_epochs=1)
    assert (tmp_path / "model.pt").stat().st_mtime_ns == before
    with pytest.raises(Exception) as caught:
        train(phantoms, tmp_path, **{"pmg::prior": False})
    cause = cause_of(caught.value)
    assert isinstance(cause, WeightsError) and "last.pt" in str(cause) and "--resume" in str(cause)


def test_best_weights_load_strictly_and_are_those_of_the_moving_average(phantoms, tmp_path):
    saved = train(phantoms, tmp_path, max_epochs=1)
    network = SAM2SGP("lite", 64)
    load_weights(network, tmp_path / "model.pt")
    average = saved["state"]["moving_average"]
    for name, value in network.state_dict().items():
        assert torch.equal(value, average[f"module.{name}"]), name
    assert any(not torch.equal(value, saved["network"][name]) for name, value in network.state_dict().items())


def test_lora_training_changes_adapters_and_heads_but_not_the_encoder(phantoms, tmp_path):
    settings = {"lora": {"r": 2, "alpha": 4}, "freeze_encoder": True}
    saved = train(phantoms, tmp_path, max_epochs=1, **settings)["network"]
    torch.manual_seed(0)
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["r"] == 2
    assert (tmp_path / "lora" / "adapter_model.safetensors").is_file()
    grown = [name for name, value in saved.items() if ".lora_B." in name and value.abs().sum() > 0]
    assert len(grown) == sum(".lora_B." in name for name in saved) == 31


def test_training_stops_early_when_nothing_gets_better(phantoms, tmp_path):
    saved = train(phantoms, tmp_path, max_epochs=6, patience=2, learning_rate=0.0)
    assert saved["epoch"] == 3 and saved["best_metric_epoch"] == 1


def test_the_last_epoch_can_be_kept_whatever_validation_says(phantoms, tmp_path):
    saved = train(phantoms, tmp_path, max_epochs=3, patience=1, keep_best=False, learning_rate=0.0)
    assert saved["epoch"] == saved["best_metric_epoch"] == 3


def test_accumulation_takes_one_step_for_several_batches(phantoms, tmp_path):
    saved = train(phantoms, tmp_path, max_epochs=1, episodes_per_step=1, accumulation_steps=4)
    steps = {int(state["step"]) for state in saved["state"]["optimizer"]["state"].values()}
    assert steps == {1} and saved["iteration"] == 4


def test_bfloat16_on_a_cpu_trains_nearly_alike(phantoms, tmp_path):
    train(phantoms, tmp_path / "fp32", max_epochs=1)
    train(phantoms, tmp_path / "bf16", max_epochs=1, precision="bf16")
    full, half = losses(tmp_path / "fp32"), losses(tmp_path / "bf16")
    assert full != half
    assert list(half.values()) == pytest.approx(list(full.values()), rel=0.15)


def test_mlflow_tracking_records_the_loss(phantoms, tmp_path):
    import mlflow

    train(phantoms, tmp_path, max_epochs=1, tracking="mlflow")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlruns.db'}")
    runs = mlflow.search_runs(search_all_experiments=True)
    assert any(column.endswith("train_loss") for column in runs.columns)


def test_a_finished_training_goes_on_with_more_epochs_at_the_longer_schedules_rate(phantoms, tmp_path):
    train(phantoms, tmp_path / "longer", max_epochs=1)
    longer = train(phantoms, tmp_path / "longer", max_epochs=3, **{"train::trainer::max_epochs": 2})
    whole = train(phantoms, tmp_path / "whole", max_epochs=3, **{"train::trainer::max_epochs": 2})
    rates = [saved["state"]["optimizer"]["param_groups"][0]["lr"] for saved in (longer, whole)]
    assert longer["epoch"] == 2 and rates[0] == pytest.approx(rates[1]) and 0 < rates[0] < 1e-3


def test_weights_are_there_before_the_first_validation(phantoms, tmp_path):
    train(phantoms, tmp_path, max_epochs=1, val_interval=2)
    load_weights(SAM2SGP("lite", 64), tmp_path / "model.pt")


@pytest.mark.parametrize("setting", [{"resume": "false"}, {"pma::box": "false"}, {"pmg::prior": 0}])
def test_switches_that_are_no_booleans_are_refused(phantoms, tmp_path, setting):
    with pytest.raises(Exception) as caught:
        train(phantoms, tmp_path, **setting)
    cause = cause_of(caught.value)
    assert isinstance(cause, ConfigError) and "capital letter" in str(cause)


def test_cached_features_and_checkpoints_leave_the_losses_as_they_are(phantoms, tmp_path):
    frozen = {"freeze_encoder": True, "augmentation_variants": 1, "max_epochs": 1}
    train(phantoms, tmp_path / "plain", **frozen)
    train(phantoms, tmp_path / "cached", **frozen, feature_cache=True, gradient_checkpointing=True)
    found, expected = losses(tmp_path / "cached"), losses(tmp_path / "plain")
    assert found.keys() == expected.keys()
    assert list(found.values()) == pytest.approx(list(expected.values()), abs=1e-4)
    assert list((tmp_path / "cached" / "cache" / "features" / "trunk").iterdir())
    assert not (tmp_path / "plain" / "cache" / "features").exists()
    with pytest.raises(Exception) as caught:
        train(phantoms, tmp_path / "refused", **{**frozen, "augmentation_variants": None}, feature_cache=True)
    assert isinstance(cause_of(caught.value), ConfigError) and "augmentation_variants" in str(cause_of(caught.value))
