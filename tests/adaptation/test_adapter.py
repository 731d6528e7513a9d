"""Adaptation to a support set: it helps on images never seen, is never kept where it does not, and can be repeated."""

import itertools
import json
import logging
import shutil
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sam2sgp.adaptation.lora import merged
from sam2sgp.adaptation.members import Member, NetworkMember, Pairs, UNetMember
from torch import Tensor

from sam2sgp.adaptation import Adaptation, Adapter, adapt, store
from sam2sgp.adaptation.judging import class_dice
from sam2sgp.adaptation.run import share_of_second
from sam2sgp.errors import ConfigError
from sam2sgp.inferers import SupportSetInferer
from sam2sgp.networks import SAM2SGP, save_weights
from sam2sgp.support import SupportSampler
from tests.adaptation.banks import SIZE, bank, phantom, queries

STEPS = {"network": [3, 1], "unet": [40, 10]}
CASES = [phantom(number) for number in range(8)]


@pytest.fixture(scope="module")
def network() -> SAM2SGP:
    torch.manual_seed(0)
    return SAM2SGP("nano", SIZE).eval()


@pytest.fixture(scope="module")
def made(network, tmp_path_factory):
    """An adaptation with its cache, and the weights of the network before."""
    before = deepcopy(network.state_dict())
    cache = tmp_path_factory.mktemp("cache")
    return adapt(network, bank(CASES), None, STEPS, cache_dir=cache, progress=False), cache, before


def segment(network, support, adapter=None, images=None) -> Tensor:
    return SupportSetInferer(support, SupportSampler(), adapter=adapter)(
        queries()[0] if images is None else images, network
    )


def masks(labels: Tensor, support) -> Tensor:
    return torch.stack([labels == value for value in support.class_values], 1).float()


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def small(steps: int = 2) -> dict:
    return {"network": [1, 0], "unet": [steps, 0]}


def test_the_network_and_the_bank_stay_as_they_were(network, made):
    assert same(network.state_dict(), made[2])
    assert not network.training
    support = bank(CASES)
    adapt(network, support, None, small(), progress=False)
    assert support.embedding is None and len(support) == len(CASES)


def test_images_never_seen_are_segmented_better(network, made):
    images, labels = queries()
    support = bank(CASES)
    truth = masks(labels, support)
    plain = float(class_dice(segment(network, support), truth).mean())
    adapter = Adapter(None, STEPS, cache_dir=made[1], progress=False)
    adapted = float(class_dice(segment(network, bank(CASES), adapter), truth).mean())
    assert adapted > plain + 0.05
    assert made[0].record["dice"][made[0].record["kept"]] >= made[0].record["dice"]["plain"]


def test_only_the_logits_become_the_ensembles(network, made):
    adapter = Adapter(None, STEPS, cache_dir=made[1], progress=False)
    inferer = SupportSetInferer(bank(CASES), SupportSampler(), adapter=adapter)
    chunk = next(inferer.chunks(queries()[0], network))
    alone = next(SupportSetInferer(bank(CASES), SupportSampler()).chunks(queries()[0], made[0].network))
    assert torch.equal(chunk.output.pseudo_logits, alone.output.pseudo_logits)
    assert torch.equal(chunk.output.box, alone.output.box)
    if made[0].unet is not None:
        unet = made[0].unet(queries()[0].expand(-1, 3, -1, -1)).sigmoid()
        share = made[0].record["unet_share"]
        expected = (1 - share) * alone.output.logits.sigmoid() + share * unet
        torch.testing.assert_close(chunk.output.logits.sigmoid(), expected, atol=1e-5, rtol=1e-5)


def test_leave_one_out_training_of_the_network_lowers_its_loss(network):
    pairs = Pairs.of(bank(CASES), torch.device("cpu"))
    member = NetworkMember(network, pairs, 0)
    member.module.train()

    def loss() -> float:
        member.generator.manual_seed(5)
        with torch.no_grad():
            return float(member.loss(pairs))

    before = loss()
    for _ in range(6):
        member.step(pairs)
    assert loss() < 0.95 * before


def test_the_same_steps_give_the_same_weights_and_another_seed_others(network, made):
    again = adapt(network, bank(CASES), 60.0, STEPS, progress=False)
    assert same(again.network.state_dict(), made[0].network.state_dict())
    assert same(again.unet.state_dict(), made[0].unet.state_dict())
    other = adapt(network, bank(CASES), None, small(), seed=1, progress=False)
    assert not same(other.unet.state_dict(), made[0].unet.state_dict())


def test_a_time_limit_decides_the_number_of_steps_alone(network, monkeypatch):
    with monkeypatch.context() as patch:
        # A clock that advances when it is read: the limit then means the same on a machine of any load.
        ticks = itertools.count()
        clock = SimpleNamespace(monotonic=lambda: next(ticks) / 100)
        for module in ("adapter", "run"):
            patch.setattr(f"sam2sgp.adaptation.{module}.time", clock)
        limited = adapt(network, bank(CASES), 1.5, progress=False)
    steps = limited.record["steps"]
    assert 0 < steps["unet"][0] < 100
    again = adapt(network, bank(CASES), None, steps, progress=False)
    assert again.record["steps"] == steps and again.record["dice"] == limited.record["dice"]
    assert same(limited.network.state_dict(), again.network.state_dict())
    assert (limited.unet is None) == (again.unet is None)
    assert limited.unet is None or same(limited.unet.state_dict(), again.unet.state_dict())


RELOAD = """
import sys, torch
from peft import PeftModel
from sam2sgp.networks import SAM2SGP, load_weights
weights, adapter, inputs, result = sys.argv[1:]
network = SAM2SGP("nano", 64)
load_weights(network, weights)
network = PeftModel.from_pretrained(network, adapter).eval()
with torch.no_grad():
    torch.save(network(**torch.load(inputs)), result)
"""


def adapter_folder(cache):
    (folder,) = [path.parent for path in cache.glob("*/adaptation.json")]
    return folder


def test_the_adapter_is_read_by_peft_in_a_fresh_process(network, made, tmp_path):
    assert "network" in made[0].record["kept"]
    folder = adapter_folder(made[1])
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    for name, parameter in network.named_parameters():
        behind = "." in name and not name.startswith("image_encoder.") and parameter.requires_grad
        assert behind == any(name.startswith(f"{module}.") for module in config["modules_to_save"]) or not behind, name
    inputs = {"image": torch.rand(2, 3, SIZE, SIZE), "support_image": torch.rand(3, 3, SIZE, SIZE)}
    inputs["support_label"] = (torch.rand(3, 1, SIZE, SIZE) > 0.5).float()
    torch.save(inputs, tmp_path / "inputs.pt")
    save_weights(network, tmp_path / "model.pt")
    arguments = [tmp_path / "model.pt", folder, tmp_path / "inputs.pt", tmp_path / "logits.pt"]
    subprocess.run([sys.executable, "-c", RELOAD, *map(str, arguments)], check=True)
    with torch.no_grad():
        expected, plain = made[0].network(**inputs), network(**inputs)
    reloaded = torch.load(tmp_path / "logits.pt")
    torch.testing.assert_close(reloaded, expected, atol=1e-3, rtol=1e-3)
    assert (plain - expected).abs().max() > 0.05


def test_what_is_in_the_cache_is_not_trained_again(network, made, monkeypatch):
    monkeypatch.setattr(Member, "step", None)
    again = adapt(network, bank(CASES), None, STEPS, cache_dir=made[1], progress=False)
    assert same(again.network.state_dict(), made[0].network.state_dict())
    assert same(again.unet.state_dict(), made[0].unet.state_dict())
    without_files = {key: value for key, value in again.record.items() if key != "files"}
    assert without_files == json.loads(json.dumps(made[0].record))


@pytest.mark.parametrize("change", ["label", "image", "patient", "weights", "seed", "steps"])
def test_another_support_set_network_or_setting_is_another_adaptation(network, made, change, monkeypatch):
    support, other, steps, seed = bank(CASES), network, STEPS, 0
    if change == "label":
        support.items[3].label = support.items[3].label.roll(1, 0)
    elif change == "image":
        support.items[3].image = support.items[3].image.clone()
        support.items[3].image[0, 5, 5] += 0.01
    elif change == "patient":
        support.items[3].patient = "p0"
    elif change == "weights":
        other = deepcopy(network)
        with torch.no_grad():
            other.memory_tpos[0] += 1e-3
    elif change == "seed":
        seed = 1
    else:
        steps = {**STEPS, "unet": [30, 14]}
    monkeypatch.setattr(Member, "step", None)
    with pytest.raises(TypeError):
        adapt(other, support, None, steps, seed, made[1], progress=False)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "unet.safetensors", "adaptation.json"])
def test_a_damaged_entry_is_not_used_and_costs_one_warning(network, made, tmp_path, caplog, name):
    folder = Path(shutil.copytree(adapter_folder(made[1]), tmp_path / "entry"))
    assert store.load(folder, network, 1) is not None
    (folder / name).write_bytes((folder / name).read_bytes()[:-20])
    assert store.load(folder, network, 1) is None
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert str(folder) in warning.getMessage()


def test_a_damaged_entry_is_made_anew(network, tmp_path):
    settings = {"seconds": None, "max_steps": small(), "cache_dir": tmp_path, "progress": False}
    adapt(network, bank(CASES[:4]), **settings)
    record = adapter_folder(tmp_path) / "adaptation.json"
    whole = json.loads(record.read_text())
    record.write_text("{")
    adapt(network, bank(CASES[:4]), **settings)
    again = json.loads(record.read_text())
    assert again["files"].keys() == whole["files"].keys() and again["dice"] == whole["dice"]


def spoil(member, pairs) -> None:
    """A step after which the member is of no use."""
    member.steps += 1
    with torch.no_grad():
        for parameter in member.average.module:
            parameter.fill_(-1.0)


def test_members_that_do_not_help_are_dropped_and_leave_the_plain_result(network, monkeypatch):
    monkeypatch.setattr(Member, "step", spoil)
    adapter = Adapter(None, small(), progress=False)
    assert torch.equal(segment(network, bank(CASES), adapter), segment(network, bank(CASES)))
    adaptation = adapter.last
    assert adaptation.record["kept"] == "plain" and set(adaptation.record["dropped"]) == {"network", "unet"}
    assert adaptation.network is network and adaptation.unet is None


def test_a_bad_unet_alone_is_dropped_alone(network, monkeypatch):
    monkeypatch.setattr(UNetMember, "step", spoil)
    adaptation = adapt(network, bank(CASES), None, {"network": [2, 1], "unet": [1, 1]}, progress=False)
    assert adaptation.record["kept"] in ("network", "plain")
    assert adaptation.unet is None and adaptation.record["steps"]["unet"] == [1, 0]


@pytest.mark.parametrize("share, weight", [(0.0, 0.5), (0.5, 0.25), (1.0, 0.0)])
def test_the_second_pass_counts_as_much_as_the_network_does(network, share, weight):
    inferer = SupportSetInferer(bank(CASES), SupportSampler(), region_below=0.9)
    images, _ = queries()
    logits = inferer(images, network)
    corrected = inferer.second_pass(logits, images, network)
    assert (corrected - logits).abs().max() > 0.01
    inferer.adaptation = Adaptation(network, None, {"unet_share": share})
    torch.testing.assert_close(
        inferer.second_pass(logits, images, network), logits + 2 * weight * (corrected - logits), atol=1e-4, rtol=1e-4
    )


def test_the_better_one_has_the_larger_share():
    assert share_of_second(0.7, 0.7) == 0.5
    assert share_of_second(0.8, 0.4) == pytest.approx(0.1)
    assert share_of_second(0.4, 1.0) > 0.999 and share_of_second(1.0, 0.4) < 0.001


def test_too_few_images_to_hold_any_out_leave_the_network_as_it_is(network, tmp_path):
    adaptation = adapt(network, bank(CASES[:3]), 60.0, cache_dir=tmp_path, progress=False)
    assert adaptation.network is network and adaptation.unet is None
    assert adaptation.record["kept"] == "plain" and "at least 4" in adaptation.summary
    again = adapt(network, bank(CASES[:3]), 60.0, cache_dir=tmp_path, progress=False)
    assert again.network is network and again.record["kept"] == "plain"


def test_several_classes_of_which_one_is_rare(network):
    support = bank([phantom(number, (1, 2) if number in (1, 4, 6) else (1,)) for number in range(8)])
    images, labels = queries((1, 2))
    truth = masks(labels, support)
    plain = class_dice(segment(network, support, None, images), truth)
    adapter = Adapter(None, {"network": [2, 0], "unet": [150, 0]}, progress=False)
    adapted = class_dice(segment(network, support.part(range(8)), adapter, images), truth)
    assert set(adapter.last.record["dice_per_class"]["plain"]) == {"class_1", "class_2"}
    assert adapted.shape == (2,) and adapted.mean() > plain.mean()


def test_one_patient_alone_is_held_out_by_items(network):
    support = bank([phantom(number, patient="same") for number in range(6)])
    record = adapt(network, support, None, small(), progress=False).record
    assert record["held_out_by"] == "items" and len(record["held_out"]) == 2


def test_lora_that_the_network_has_already_is_merged_first(tmp_path):
    torch.manual_seed(0)
    network = SAM2SGP("nano", SIZE, lora={"r": 2, "alpha": 4}).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
    before = deepcopy(network.state_dict())
    pairs = Pairs.of(bank(CASES[:4]), torch.device("cpu"))
    member = NetworkMember(network, pairs, 0)
    image, mask = torch.rand(4, 3, SIZE, SIZE), pairs.mask
    with torch.no_grad(), member.averaged() as untrained:
        expected = network(image, support_image=pairs.image, support_label=mask)
        found = untrained(image, support_image=pairs.image, support_label=mask)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    member.step(pairs)
    store.save(tmp_path, {}, member.finish(), None)
    adapted = store.load(tmp_path, network, 1)[1]
    assert same(merged(member.module).state_dict(), adapted.state_dict()) and same(network.state_dict(), before)
    assert not any(".lora_" in name for name in adapted.state_dict())


def test_switched_off_it_is_the_plain_path(network):
    adapter = Adapter(0, None, progress=False)
    assert not adapter.active and str(adapter) == "none"
    assert torch.equal(segment(network, bank(CASES), adapter), segment(network, bank(CASES)))
    assert adapter.last is None


def test_a_patient_that_was_learned_from_is_refused_as_a_query_of_its_own(network, made):
    adapter = Adapter(None, STEPS, cache_dir=made[1], progress=False)
    inferer = SupportSetInferer(bank(CASES), SupportSampler(), adapter=adapter)
    with pytest.raises(ConfigError, match="'p3'"):
        inferer(queries()[0], network, patient="p3")
    assert inferer(queries()[0], network, patient="someone else").shape[1] == 1


@pytest.mark.parametrize(
    "seconds, steps", [(-1, None), (True, None), ("60", None), (0, -2), (0, 1.5), (0, {"network": [1, 2]})]
)
def test_limits_that_can_not_work_are_refused(seconds, steps):
    with pytest.raises(ConfigError, match="adapt_"):
        Adapter(seconds, steps)


def test_the_api_wants_a_limit(network):
    with pytest.raises(ConfigError, match="limit"):
        adapt(network, bank(CASES), 0)
