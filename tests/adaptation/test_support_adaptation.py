"""Adaptation to a support set: what it is judged by, that it can be repeated, and that it never harms."""

import itertools
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from sam2sgp.adaptation import Adaptation, SupportAdaptation, adapt
from sam2sgp.adaptation.judging import Choice
from sam2sgp.adaptation.patient_groups import PatientGroups
from sam2sgp.adaptation.plan import Plan
from sam2sgp.adaptation.record import AdaptationRecord
from sam2sgp.adaptation.training import Training
from sam2sgp.engines import adapted
from sam2sgp.errors import ConfigError
from sam2sgp.inferers import InferenceSettings, SupportSetInferer
from sam2sgp.transforms import to_three_channels
from tests.helpers.banks import SIZE, bank, bright_discs, phantom, queries, volume

pytestmark = pytest.mark.usefixtures("small_correctors")

STEPS = 2
CASES = [phantom(number) for number in range(8)]


@pytest.fixture(scope="module")
def made(network, tmp_path_factory):
    """An adaptation whose correctors count whatever they are worth, its cache, and the network's weights before."""
    before = deepcopy(network.state_dict())
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdaptationRecord, "is_adapted", True)
        return adapt(network, bank(CASES), None, STEPS, cache_dir=cache, progress=False), cache, before


def weights(adaptation: Adaptation) -> list[Tensor]:
    return [value for corrector in adaptation.correctors for value in corrector.state_dict().values()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) > 0 and all(map(torch.equal, first, second))


def segment(network, support, adapter=None) -> Tensor:
    """Logits (8, C, S, S) of the queries."""
    # Without a second pass, which would take most of the time.
    inferer = SupportSetInferer(support, InferenceSettings(region_below=0.0))
    if adapter is not None:
        inferer = adapted(inferer, network, adapter)
    found = inferer.segment_case(query_case(), network)
    return torch.cat([logits for _, logits, _ in found])


def query_case() -> dict:
    images, labels = queries()
    return phantom(0) | {"image": images, "image_full": images, "label": labels, "label_full": labels}


def finding(monkeypatch, find) -> None:
    """Let correctors find `find(image)`, probabilities (B, 1, H, W), without any training."""
    monkeypatch.setattr(Training, "step", lambda self: setattr(self, "steps", self.steps + 1))
    monkeypatch.setattr(
        Plan, "predict", lambda self, correctors, images, logits, pixel=(1.0, 1.0): find(images[:, :1].float())
    )


def test_the_network_and_the_bank_stay_as_they_were(network, made):
    assert all(torch.equal(value, made[2][name]) for name, value in network.state_dict().items())
    assert not network.training
    support = bank(CASES)
    adapt(network, support, None, 1, progress=False)
    assert support.embedding is None and len(support) == len(CASES)
    assert list(support.patients) == [f"p{number}" for number in range(8)]


def test_the_same_steps_give_the_same_correctors_and_another_seed_others(network, made, monkeypatch):
    monkeypatch.setattr(AdaptationRecord, "is_adapted", True)
    again = adapt(network, bank(CASES), 60.0, STEPS, progress=False)
    assert same(weights(again), weights(made[0])) and again.record.steps == [STEPS] * 3
    other = adapt(network, bank(CASES), None, STEPS, seed=1, progress=False)
    assert not same(weights(other), weights(made[0]))


def test_correctors_that_are_right_decide_the_result(network, monkeypatch):
    finding(monkeypatch, lambda image: (image > 0.8).float())
    adapter = SupportAdaptation(None, STEPS, progress=False)
    support = bank(bright_discs())
    inferer = adapted(SupportSetInferer(support, InferenceSettings(region_below=0.0)), network, adapter)
    case = bright_discs()[3]
    found = torch.cat([logits for _, logits, _ in inferer.segment_case(case, network)]) > 0
    choice = adapter.last.record.choices["class_1"]
    assert choice.groups == 8 and choice.corrected == choice.adapted == 1 and choice.plain < 0.5 and choice.share > 0
    assert torch.equal(found[:, 0], case["label"] > 0)
    assert f"{choice.plain:.3f} before, {choice.adapted:.3f} after" in str(adapter)


def test_correctors_that_do_not_help_are_dropped_and_leave_the_plain_result(network, monkeypatch):
    finding(monkeypatch, lambda image: torch.zeros_like(image))
    adapter = SupportAdaptation(None, STEPS, progress=False)
    assert torch.equal(segment(network, bank(CASES), adapter), segment(network, bank(CASES)))
    assert not adapter.last.correctors and "no clear gain" in str(adapter)


def test_each_class_has_its_own_share(network, monkeypatch):
    def right_on_the_first_class(self, correctors, images, logits, pixel=(1.0, 1.0)) -> Tensor:
        return torch.cat([(images > 0.8).float(), torch.zeros_like(images)], 1)

    finding(monkeypatch, None)
    monkeypatch.setattr(Plan, "predict", right_on_the_first_class)
    cases = [phantom(number, (1, 2)) for number in range(6)]
    for case in cases:
        case["image"] = case["image_full"] = torch.where(case["label"][:, None] == 1, 1.0, 0.6 * case["image"])
    choices = adapt(network, bank(cases), None, STEPS, progress=False).record.choices
    assert choices["class_1"].share > 0 and choices["class_2"].share == 0


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_patients_leave_the_network_as_it_is_and_are_told(network, tmp_path, count):
    cases = [phantom(number, patient=f"p{number % 2}") for number in range(4)] if count == 2 else [volume(0)]
    for _ in range(2):
        adaptation = adapt(network, bank(cases), 60.0, cache_dir=tmp_path, progress=False)
        assert not adaptation.correctors and not adaptation.record.is_adapted
        assert "evidence is thin" in str(adaptation.record) and len(adaptation.record.groups) == count


def test_a_time_limit_decides_the_number_of_steps_and_nothing_else(network, monkeypatch):
    monkeypatch.setattr(AdaptationRecord, "is_adapted", True)
    with monkeypatch.context() as patch:
        # A clock that advances when it is read: the limit then means the same on a machine of any load.
        ticks = itertools.count()
        clock = SimpleNamespace(monotonic=lambda: next(ticks) / 50)
        for module in ("support_adaptation", "run"):
            patch.setattr(f"sam2sgp.adaptation.{module}.time", clock)
        patch.setattr("sam2sgp.adaptation.run.WARMUP", 2)
        limited = adapt(network, bank(CASES), 1.0, progress=False)
    made, planned = limited.record.steps, limited.record.planned
    assert 2 <= min(made) and max(made) <= planned < 200


def test_what_is_in_the_cache_is_not_trained_again(network, made, monkeypatch):
    monkeypatch.setattr(Training, "step", None)
    again = adapt(network, bank(CASES), None, STEPS, cache_dir=made[1], progress=False)
    assert same(weights(again), weights(made[0])) and again.record == made[0].record


@pytest.mark.parametrize("distance, share", [(0.5, 0.8), (float("nan"), 0.8), (1.4, 0.4), (10.0, 0.0)])
def test_a_query_unlike_the_support_set_leans_on_the_plain_network(network, distance, share):
    choice = Choice(8, 0.5, 0.7, 0.7, 0.2, 0.02, 0.8)
    groups = PatientGroups(("p",), "patients")
    record = AdaptationRecord(1, groups, ["p"], Plan(SIZE, False), choices={"class_1": choice})
    adaptation = Adaptation([lambda image, found: torch.full_like(found, 3.0)], record)
    logits, image = torch.full((1, 1, SIZE, SIZE), -2.0), to_three_channels(torch.rand(1, 1, SIZE, SIZE))
    found = adaptation.average(logits, image, (1.0, 1.0), torch.tensor([distance])).sigmoid()
    expected = (1 - share) * logits.sigmoid() + share * torch.tensor(3.0).sigmoid()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_switched_off_it_is_the_plain_path(network):
    adapter = SupportAdaptation(0, None, progress=False)
    assert str(adapter) == "none"
    assert torch.equal(segment(network, bank(CASES), adapter), segment(network, bank(CASES)))
    assert adapter.last is None


def test_a_patient_that_was_learned_from_is_refused_as_a_query_of_its_own(network, made):
    adapter = SupportAdaptation(None, STEPS, cache_dir=made[1], progress=False)
    inferer = adapted(SupportSetInferer(bank(CASES), InferenceSettings(region_below=0.0)), network, adapter)
    with pytest.raises(ConfigError, match="'p3'"):
        inferer(queries()[0], network, patient="p3")
    assert inferer(queries()[0], network, patient="someone else").shape[1] == 1


@pytest.mark.parametrize("seconds, steps", [(-1, None), (True, None), ("60", None), (0, -2), (0, 1.5)])
def test_limits_that_can_not_work_are_refused(seconds, steps):
    with pytest.raises(ConfigError, match="adapt_"):
        SupportAdaptation(seconds, steps)


def test_the_api_wants_a_limit(network):
    with pytest.raises(ConfigError, match="limit"):
        adapt(network, bank(CASES), 0)
