"""Adaptation to a support set: what it is judged by, that it can be repeated, and that it never harms."""

import itertools
import logging
import shutil
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from sam2sgp.adaptation import Adaptation, SupportAdaptation, adapt, plan, store
from sam2sgp.adaptation.corrector import Corrector, Trunk, bounded
from sam2sgp.adaptation.groups import Groups
from sam2sgp.adaptation.judging import Choice
from sam2sgp.adaptation.pairs import Pair, Pairs
from sam2sgp.adaptation.plan import Plan
from sam2sgp.adaptation.record import AdaptationRecord
from sam2sgp.adaptation.run import Run
from sam2sgp.adaptation.training import Training
from sam2sgp.engines import adapted
from sam2sgp.errors import ConfigError
from sam2sgp.inferers import InferenceSettings, SupportSetInferer, VolumeMemory
from sam2sgp.networks import SAM2SGP
from sam2sgp.transforms import to_three_channels
from tests.adaptation.banks import SIZE, bank, phantom, queries, volume

STEPS = 2
CASES = [phantom(number) for number in range(8)]


@pytest.fixture(scope="module", autouse=True)
def small_correctors():
    """Correctors at the size of the phantoms."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "WHOLE_SIZE", SIZE)
        yield


@pytest.fixture(scope="module")
def network() -> SAM2SGP:
    """A network whose own results are bad."""
    torch.manual_seed(0)
    return SAM2SGP("nano", SIZE, pmg={"prior": False, "regression": False}, refinement=False).eval()


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


def bright_discs() -> list[dict]:
    """Phantoms whose objects are what is white."""
    cases = [phantom(number) for number in range(8)]
    for case in cases:
        case["image"] = case["image_full"] = torch.where(case["label"][:, None] > 0, 1.0, 0.6 * case["image"])
    return cases


def test_the_network_and_the_bank_stay_as_they_were(network, made):
    assert all(torch.equal(value, made[2][name]) for name, value in network.state_dict().items())
    assert not network.training
    support = bank(CASES)
    adapt(network, support, None, 1, progress=False)
    assert support.embedding is None and len(support) == len(CASES)
    assert list(support.patients) == [f"p{number}" for number in range(8)]


def test_a_corrector_starts_from_what_the_network_finds_and_learns_its_pairs(network):
    torch.manual_seed(0)
    support = bright_discs()
    found = torch.full((1, SIZE, SIZE), -2.0)
    pairs = [Pair(case["image"][0], found, case["label"] > 0, (1.0, 1.0)) for case in support]
    plan, corrector = Plan(SIZE, False), Corrector(Trunk(network), 1)
    image, logits = torch.stack([pair.image for pair in pairs[6:]]), found.expand(2, 1, SIZE, SIZE)
    torch.testing.assert_close(plan.predict([corrector], image, logits), bounded(logits).sigmoid())
    training = Training(corrector, Pairs(pairs, plan, torch.device("cpu")), range(6), 0)
    training.planned = 16
    for _ in range(training.planned):
        training.step()
    corrected = plan.predict([training.finish()], image, logits) > 0.5
    truth = torch.stack([pair.mask for pair in pairs[6:]])
    assert 2 * (corrected & truth).sum() / (corrected.sum() + truth.sum()) > 0.5


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


def test_every_image_is_judged_by_a_corrector_that_has_not_seen_its_patient(network, monkeypatch):
    trained, judged = {}, []
    cases = [phantom(number, patient=f"p{number // 2}") for number in range(12)]
    image_of = {round(float(case["image"].half().float().mean()), 5): case["patient"] for case in cases}
    init, predict = Training.__init__, Plan.predict

    def remember(self, corrector, pairs, index, seed) -> None:
        init(self, corrector, pairs, index, seed)
        trained[corrector] = {patient_of(pairs.images[number]) for number in index}

    def patient_of(image: Tensor) -> str | None:
        return image_of.get(round(float(image[:1].half().float().mean()), 5))

    def watch(self, correctors, images, logits, pixel=(1.0, 1.0)) -> Tensor:
        if (patient := patient_of(images[0])) is not None:
            judged.append((correctors[0], patient))
        return predict(self, correctors, images, logits, pixel)

    monkeypatch.setattr(Training, "__init__", remember)
    monkeypatch.setattr(Plan, "predict", watch)
    record = adapt(network, bank(cases), None, 1, progress=False).record
    assert record.groups.by == "patients" and len(record.groups) == 6 and record.judged == len(judged) == 12
    assert all(patient not in trained[corrector] and len(trained[corrector]) == 4 for corrector, patient in judged)


def test_volumes_are_judged_as_volumes_and_never_guided_by_their_own_slices(network, monkeypatch):
    calls = []
    chunks = SupportSetInferer.chunks

    def watch(self, inputs, network, patient=None, group=None, volume=False, step=None):
        calls.append((len(inputs), patient, volume, self.settings.volume_memory is not None))
        for chunk in chunks(self, inputs, network, patient, group, volume, step):
            owners = {self.bank.items[number].patient for entry in chunk.retrieved for number in entry.index.flatten()}
            assert patient not in owners and owners
            yield chunk

    monkeypatch.setattr(SupportSetInferer, "chunks", watch)
    support = bank([volume(number) for number in range(3)])
    inferer = SupportSetInferer(support, InferenceSettings(region_below=0.0, volume_memory=VolumeMemory()))
    record = adapt(network, support, None, 1, progress=False, inferer=inferer).record
    assert [(count, volume, memory) for count, _, volume, memory in calls] == [(8, True, True)] * 3
    assert record.judged == len(record.groups) == 3


@pytest.mark.parametrize(("once", "expected"), [(0, [8, 4, 4, 4]), (15, [8, 4, 4])])
def test_short_of_time_few_slices_of_many_volumes_are_judged(network, monkeypatch, once, expected):
    """`once`: seconds that the first slices take besides, for the support set's own encodings."""
    counts, chunks, now = [], SupportSetInferer.chunks, itertools.count()
    clock = SimpleNamespace(seconds=0.0, monotonic=lambda: clock.seconds + next(now) / 1000)

    def slow(self, inputs, *arguments, **more):
        clock.seconds += len(inputs) + (0 if counts else once)
        counts.append(len(inputs))
        yield from chunks(self, inputs, *arguments, **more)

    monkeypatch.setattr(SupportSetInferer, "chunks", slow)
    for module in ("support_adaptation", "run"):
        monkeypatch.setattr(f"sam2sgp.adaptation.{module}.time", clock)
    monkeypatch.setattr("sam2sgp.adaptation.run.WARMUP", 1)
    support = bank([volume(number, 12) for number in range(4)])
    inferer = SupportSetInferer(support, InferenceSettings(region_below=0.0, volume_memory=VolumeMemory()))
    record = adapt(network, support, 60.0, 1, progress=False, inferer=inferer).record
    assert counts == expected and record.judged == len(expected)


def test_of_a_volume_that_is_too_long_both_ends_are_judged_in_turn(network):
    support = bank([volume(number, 12) for number in range(3)])
    run = Run(network, support, SupportSetInferer(support), None, 1, 0, 0.0, False)
    ends = []
    for at_top in (False, True):
        case = replace(run._cases()[0], slices=4, at_top=at_top)
        ends.append((run._prepare(case)["label"] > 0).flatten(1).any(1).tolist())
    assert ends == [[False, True, True, True], [True, True, True, False]]


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


@pytest.mark.parametrize("change", ["label", "image", "patient", "weights", "seed"])
def test_another_support_set_network_or_setting_is_another_adaptation(network, change):
    support, other, settings = bank(CASES), network, {"seed": 0}
    before = store.key_of(network, support, settings)
    if change == "label":
        support.items[3].label = support.items[3].label.roll(1, 0)
    elif change == "image":
        support.items[3].image = support.items[3].image + 0.01
    elif change == "patient":
        support.items[3].patient = "p0"
    elif change == "weights":
        other = deepcopy(network)
        with torch.no_grad():
            other.memory_tpos[0] += 1e-3
    else:
        settings = {"seed": 1}
    assert store.key_of(other, support, settings) != before == store.key_of(network, bank(CASES), {"seed": 0})


@pytest.mark.parametrize("name", ["correctors.safetensors", "adaptation.json"])
def test_a_damaged_entry_is_not_used_and_costs_one_warning(network, made, tmp_path, caplog, name):
    (written,) = made[1].glob("*/adaptation.json")
    folder = Path(shutil.copytree(written.parent, tmp_path / "entry"))
    assert store.load(folder, network, 1) is not None
    (folder / name).write_bytes((folder / name).read_bytes()[:-20])
    assert store.load(folder, network, 1) is None
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert str(folder) in warning.getMessage()


@pytest.mark.parametrize("distance, share", [(0.5, 0.8), (float("nan"), 0.8), (1.4, 0.4), (10.0, 0.0)])
def test_a_query_unlike_the_support_set_leans_on_the_plain_network(network, distance, share):
    choice = Choice(8, 0.5, 0.7, 0.7, 0.2, 0.02, 0.8)
    record = AdaptationRecord(1, Groups(("p",), "patients"), ["p"], Plan(SIZE, False), choices={"class_1": choice})
    adaptation = Adaptation([lambda image, found: torch.full_like(found, 3.0)], record)
    logits, image = torch.full((1, 1, SIZE, SIZE), -2.0), to_three_channels(torch.rand(1, 1, SIZE, SIZE))
    found = adaptation.average(logits, image, (1.0, 1.0), torch.tensor([distance])).sigmoid()
    expected = (1 - share) * logits.sigmoid() + share * torch.tensor(3.0).sigmoid()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_switched_off_it_is_the_plain_path(network):
    adapter = SupportAdaptation(0, None, progress=False)
    assert not adapter.active and str(adapter) == "none"
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
