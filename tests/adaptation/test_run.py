"""What the correctors are judged by: unseen patients, whole volumes, and as many slices as there is time for."""

import itertools
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest
from torch import Tensor

from sam2sgp.adaptation import adapt
from sam2sgp.adaptation.plan import Plan
from sam2sgp.adaptation.run import AdaptationRun
from sam2sgp.adaptation.training import Training
from sam2sgp.errors import DataError
from sam2sgp.inferers import InferenceSettings, SupportSetInferer, VolumeMemory
from tests.helpers.banks import bank, phantom, volume

pytestmark = pytest.mark.usefixtures("small_correctors")


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


def test_a_network_in_training_stays_so_also_where_an_image_fails(network, monkeypatch):
    trained, modes = deepcopy(network).train(), []

    def fail(self, *arguments, **more):
        modes.append(trained.training)
        raise DataError("empty.")

    monkeypatch.setattr(SupportSetInferer, "segment_case", fail)
    with pytest.raises(DataError, match="empty"):
        adapt(trained, bank([phantom(number) for number in range(4)]), None, 1, progress=False)
    assert modes == [False] and trained.training


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
    run = AdaptationRun(network, support, SupportSetInferer(support), None, 1, 0, 0.0, False)
    ends = []
    for at_top in (False, True):
        case = replace(run._cases()[0], slices=4, at_top=at_top)
        ends.append((run._prepare(case)["label"] > 0).flatten(1).any(1).tolist())
    assert ends == [[False, True, True, True], [True, True, True, False]]


def test_pictures_with_an_empty_label_are_neither_judged_nor_counted(network):
    empty = [phantom(number, ()) for number in range(3, 9)]
    support = bank([*(phantom(number) for number in range(3)), *empty])
    record = adapt(network, support, None, 2, progress=False).record
    assert len(support) == 9 and (record.cases, record.judged, len(record.groups)) == (3, 3, 3)
