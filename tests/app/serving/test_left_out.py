"""A labelled image is measured as if it had no label, guided by the other patients only."""

import pytest

from lib.serving.left_out import dice_left_out
from sam2sgp.data import read_label

IMAGES = ["us_000_0", "us_001_0", "us_002_0"]


@pytest.fixture
def segmenter(studio):
    made = studio(IMAGES, IMAGES).segmenter()
    made.keep_up()
    return made


def case_of(segmenter, name: str) -> dict:
    return next(case for case in segmenter.inferer.bank.data if case["name"] == name)


def test_it_is_the_dice_with_what_the_others_guide(segmenter):
    steps = []
    with segmenter.lock:
        case = case_of(segmenter, "us_000_0")
        dice = dice_left_out(segmenter, case, steps.append)
        truth = read_label(case["label"], segmenter.prepare(case["image"], case["name"])["geometry"])
    assert dice and all(0 <= value <= 1 for value in dice.values())
    assert dice.keys() <= set(segmenter.inferer.bank.class_names) and steps[0] == 0 and sum(steps) >= 1
    assert {int(value) for value in set(truth.flatten().tolist())} - {0} <= dice.keys()


def test_the_own_patient_is_left_out_and_whoever_waits_can_end_it(segmenter, monkeypatch):
    seen = []
    retrieve = type(segmenter.inferer.bank).retrieve

    def noting(bank, network, features, sampler, patient=None, group=None):
        seen.append(patient)
        return retrieve(bank, network, features, sampler, patient, group)

    monkeypatch.setattr(type(segmenter.inferer.bank), "retrieve", noting)

    class Stop(Exception):
        pass

    def stop(slices: int) -> None:
        if seen:
            raise Stop

    with segmenter.lock, pytest.raises(Stop):
        dice_left_out(segmenter, case_of(segmenter, "us_001_0"), stop)
    assert set(seen) == {case_of(segmenter, "us_001_0")["patient"]}
