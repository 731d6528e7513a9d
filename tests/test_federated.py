"""Two clients of MONAI's federated learning API train together, and exchange nothing but what they train."""

import sys

import pytest
import torch
from ignite.engine import Events
from monai.bundle import ConfigParser
from monai.fl.client import MonaiAlgo
from monai.fl.utils.constants import ExtraItems
from monai.fl.utils.exchange_object import ExchangeObject

from sam2sgp.data.phantom import make_phantoms
from sam2sgp.errors import ConfigError
from sam2sgp.federated import TrainableWeights
from sam2sgp.networks import SAM2SGP
from tests.helpers.bundle_runs import BUNDLE, SMALL
from tests.helpers.doc_commands import ROOT

OVERLAYS = ("finetune", "federated")
CONFIGS = [f"configs/{name}.json" for name in ("train", *OVERLAYS)]
# evaluate.json first: finetune.json says which weights the frozen part has.
EVALUATION = [f"configs/{name}.json" for name in ("train", "evaluate", "finetune", "federated")]
ROUNDS = 2
pytestmark = pytest.mark.filterwarnings("ignore:executing the bundle config:UserWarning")


def client(name: str, data, output, weight_diff: bool = False) -> MonaiAlgo:
    settings = {key: value for key, value in SMALL.items() if key != "weights"}
    settings |= {"dataset_dir": str(data), "output_dir": str(output), "bundle_root": str(BUNDLE)}
    settings |= {"learning_rate": 1e-3, "federated_rounds": ROUNDS, "val_interval": ROUNDS + 1}
    algo = MonaiAlgo(
        bundle_root=str(BUNDLE),
        local_epochs=1,
        send_weight_diff=weight_diff,
        config_train_filename=CONFIGS,
        train_kwargs=settings,
        config_evaluate_filename=EVALUATION,
        eval_kwargs=settings | {"validate::handlers": []},
        config_filters_filename=CONFIGS,
    )
    algo.initialize({ExtraItems.CLIENT_NAME: name})
    return algo


def average(sent: list[ExchangeObject]) -> ExchangeObject:
    """What a server makes of equally large clients."""
    return ExchangeObject({name: sum(each.weights[name] for each in sent) / len(sent) for name in sent[0].weights})


@pytest.mark.slow
def test_clients_exchange_what_they_train_and_end_with_the_average(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    clients, losses, begun, rates = [], {}, [], []
    for number, look in enumerate(("us", "rgb")):
        data = make_phantoms(tmp_path / look / "data", 6, (64, 64), 6, seed=number, modalities=[look], progress=False)
        clients.append(client(look, data, tmp_path / look))
    networks = [each.trainer.network for each in clients]
    before = {name: value.clone() for name, value in networks[0].state_dict().items()}
    trained = {name for name, value in networks[0].named_parameters() if value.requires_grad}

    for each, network in zip(clients, networks, strict=True):
        losses[each.client_name] = []
        each.trainer.add_event_handler(
            Events.ITERATION_COMPLETED,
            lambda engine, values=losses[each.client_name]: values.append(engine.state.output[0]["loss"]),
        )
        each.trainer.add_event_handler(
            Events.EPOCH_STARTED,
            lambda engine, network=network: (
                begun.append({name: value.clone() for name, value in network.state_dict().items()}),
                rates.append(engine.optimizer.param_groups[0]["lr"]),
            ),
        )
    shared = ExchangeObject({name: before[name] for name in trained})
    for number in range(ROUNDS):
        sent = []
        for each in clients:
            each.train(shared)
            assert all(torch.equal(begun[-1][name], value) for name, value in shared.weights.items())
            sent.append(each.get_weights())
        assert all(set(each.weights) == trained for each in sent), number
        assert all(each.statistics["num_executed_iterations"] > 0 for each in sent)
        assert any(not torch.equal(sent[0].weights[name], sent[1].weights[name]) for name in trained)
        shared = average(sent)

    # The encoder is frozen but for LoRA, and neither it nor anything else that is not trained has moved or been sent.
    assert all(".lora_" in name for name in trained if name.startswith("image_encoder."))
    assert any(".lora_" in name for name in trained)
    for network in networks:
        after = network.state_dict()
        assert all(torch.equal(after[name], before[name]) for name in before if name not in trained)
    moved = [name for name in trained if not torch.equal(shared.weights[name], before[name])]
    assert len(moved) > len(trained) / 2
    assert all(torch.isfinite(torch.tensor(values)).all() and values for values in losses.values())
    # The second round goes on in the schedule that the first one began, instead of at its end.
    assert rates[2] == rates[3] > 0

    for each in clients:
        metrics = each.evaluate(shared).metrics
        assert 0 < metrics["val_mean_dice"] <= 1
        held = each.evaluator.network.state_dict()
        assert all(torch.equal(held[name], shared.weights.get(name, before[name])) for name in held)
        each.finalize()


@pytest.mark.slow
def test_weight_differences_are_of_what_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    data = make_phantoms(tmp_path / "data", 6, (64, 64), 6, modalities=["us"], progress=False)
    algo = client("one", data, tmp_path, weight_diff=True)
    network = algo.trainer.network
    trained = {name: value for name, value in network.named_parameters() if value.requires_grad}
    start = {name: value.detach().clone() for name, value in trained.items()}
    algo.train(ExchangeObject(dict(start)))
    sent = algo.get_weights().weights
    assert sent.keys() == trained.keys()
    assert all(torch.equal(value, trained[name].detach() - start[name]) for name, value in sent.items())
    algo.finalize()


@pytest.mark.parametrize("overlays", [[], ["backbones/base_plus"]])
def test_a_client_sends_as_many_megabytes_as_the_page_tells_with_and_without_the_filter(overlays):
    parser = ConfigParser()
    parser.read_config([str(BUNDLE / "configs" / f"{name}.json") for name in ("train", *overlays, *OVERLAYS)])
    # As `MonaiAlgo.get_weights` sends it, before and after the filters.
    whole = parser.get_parsed_content("network_def").state_dict()
    (keep,) = parser.get_parsed_content("post_weight_filters")
    sent = keep(ExchangeObject(dict(whole))).weights
    sizes = [sum(value.nbytes for value in weights.values()) / 1e6 for weights in (sent, whole)]
    assert "{:.1f} MB instead of {:.1f} MB".format(*sizes) in (ROOT / "docs/federated.md").read_text()


def test_a_filter_of_another_network_says_so():
    keep = TrainableWeights(SAM2SGP("lite", 64, freeze_encoder=True, lora={"r": 2, "alpha": 4}))
    plain = SAM2SGP("lite", 64, freeze_encoder=True)
    with pytest.raises(ConfigError, match="config_filters_filename"):
        keep(ExchangeObject(dict(plain.state_dict())))
    with pytest.raises(ConfigError, match="trains no parameter"):
        TrainableWeights(plain.requires_grad_(False))
