"""Which support items are held out, and how maps are measured on them."""

import pytest
import torch

from sam2sgp.adaptation.judging import class_dice, hold_out
from tests.adaptation.banks import bank, phantom


def test_whole_patients_are_held_out():
    support = bank([phantom(number, patient=f"p{number // 3}") for number in range(15)])
    split = hold_out(support, seed=0)
    patients = [{support.items[i].patient for i in part.tolist()} for part in (split.fit, split.held)]
    assert split.by == "patients" and not patients[0] & patients[1]
    assert len(split.held) == 3 and len(split.fit) == 12


@pytest.mark.parametrize("seed", range(5))
def test_one_of_two_patients_is_held_out_whole_but_never_most_of_the_items(seed):
    support = bank([phantom(number, patient="a" if number < 3 else "b") for number in range(8)])
    split = hold_out(support, seed)
    assert split.by == "patients" and split.held.tolist() == [0, 1, 2]


@pytest.mark.parametrize("seed", range(5))
def test_two_items_of_a_rare_class_stay_to_fit(seed):
    support = bank([phantom(number, (1, 2) if number < 2 else (1,)) for number in range(8)])
    split = hold_out(support, seed)
    assert not {0, 1} & set(split.held.tolist()) and len(split.held) == 2


def test_nothing_is_held_out_of_three_items():
    assert hold_out(bank([phantom(number) for number in range(3)]), seed=0) is None


def test_dice_counts_a_class_where_map_or_truth_has_it():
    truth = torch.zeros(3, 2, 4, 4)
    truth[:2, 0, :2] = 1
    logits = torch.full((3, 2, 4, 4), -1.0)
    logits[0, 0, :2] = 1
    logits[1, 0, :1] = 1
    logits[1, 1, 3:] = 1
    dice = class_dice(logits, truth)
    assert dice[0] == pytest.approx((1 + 2 / 3) / 2) and dice[1] == 0
