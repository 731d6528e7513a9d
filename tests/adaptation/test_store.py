"""Adaptations on disk: found again by what they were made of, and never read where they are damaged."""

import logging
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from sam2sgp.adaptation import store
from sam2sgp.adaptation.corrector import Corrector, Trunk
from sam2sgp.adaptation.patient_groups import PatientGroups
from sam2sgp.adaptation.plan import Plan
from sam2sgp.adaptation.record import AdaptationRecord
from sam2sgp.support import catalogue
from tests.helpers.banks import SIZE, bank, phantom

CASES = [phantom(number) for number in range(4)]


@pytest.fixture
def correctors(network) -> list[Corrector]:
    torch.manual_seed(1)
    made = [Corrector(Trunk(network), 1) for _ in range(2)]
    for corrector in made:
        torch.nn.init.normal_(corrector.head.weight)
    return made


@pytest.fixture
def entry(correctors, tmp_path) -> Path:
    """The folder of a stored adaptation."""
    record = AdaptationRecord(4, PatientGroups(("a", "b"), "patients"), ["a", "b"], Plan(SIZE, False), steps=[2, 2])
    store.save(tmp_path / "entry", record, correctors)
    return tmp_path / "entry"


def test_what_is_stored_comes_back_for_evaluation(network, correctors, entry):
    record, loaded = store.load(entry, network, 1)
    assert record.steps == [2, 2] and sorted(path.name for path in entry.iterdir()) == sorted(
        [store.RECORD, store.CORRECTORS]
    )
    for one, other in zip(correctors, loaded, strict=True):
        assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))
        assert not other.training and not any(parameter.requires_grad for parameter in other.parameters())


def test_the_plain_network_is_stored_without_weights(network, tmp_path):
    store.save(tmp_path, AdaptationRecord(1, PatientGroups(("a",), "patients"), ["a"]), [])
    record, loaded = store.load(tmp_path, network, 1)
    assert loaded == [] and record.files == {} and not (tmp_path / store.CORRECTORS).exists()


def test_a_folder_that_can_not_be_written_costs_one_warning(correctors, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    store.save(tmp_path / "file" / "entry", AdaptationRecord(1, PatientGroups(("a",), "patients"), ["a"]), correctors)
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "can't be kept" in warning.getMessage()


@pytest.mark.parametrize("change", ["label", "image", "patient", "spacing", "crops", "weights", "seed"])
def test_another_support_set_network_or_setting_is_another_adaptation(network, change, monkeypatch):
    support, other, settings = bank(CASES), network, {"seed": 0}
    before = store.key_of(network, support, settings)
    if change == "label":
        support.items[3].label = support.items[3].label.roll(1, 0)
    elif change == "image":
        support.items[3].image = support.items[3].image + 0.01
    elif change == "patient":
        support.items[3].patient = "p0"
    elif change == "spacing":
        support.items[3].content = "the hash of the same pixels of another size"
    elif change == "crops":
        # By which small parts are seen, in the same pixels.
        with monkeypatch.context() as other_code:
            other_code.setattr(catalogue, "VERSION", catalogue.VERSION - 1)
            support = bank(CASES)
    elif change == "weights":
        other = deepcopy(network)
        with torch.no_grad():
            other.memory_tpos[0] += 1e-3
    else:
        settings = {"seed": 1}
    assert store.key_of(other, support, settings) != before == store.key_of(network, bank(CASES), {"seed": 0})


@pytest.mark.parametrize("name", [store.CORRECTORS, store.RECORD])
def test_a_damaged_entry_is_not_used_and_costs_one_warning(network, entry, caplog, name):
    assert store.load(entry, network, 1) is not None
    (entry / name).write_bytes((entry / name).read_bytes()[:-20])
    assert store.load(entry, network, 1) is None
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert str(entry) in warning.getMessage()
