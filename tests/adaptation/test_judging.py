"""How much of the result is the U-Net's."""

import pytest
import torch

from sam2sgp.adaptation.judging import (
    SHARES,
    Choice,
    agreement,
    case_dice,
    choose_share,
    judged_shares,
    mix,
    trust_in_agreement,
    usual_agreement,
)


def dice(plain: list[float], *gains: float) -> torch.Tensor:
    """Dice (G, len(SHARES) + 1) with the same gains in every group; the U-Net by itself is as good as the last one."""
    return torch.tensor(plain)[:, None] + torch.tensor([0.0, *gains, gains[-1]])


def choose(table: torch.Tensor) -> Choice:
    return choose_share(table, judged_shares(len(table)), 0.3)


def test_a_gain_in_every_group_gives_the_unet_its_share_and_the_plain_network_keeps_some():
    choice = choose(dice([0.5, 0.6, 0.4, 0.5], 0.05, 0.1, 0.12, 0.11))
    assert choice.adapted == pytest.approx(0.62) and choice.gain == pytest.approx(0.12)
    assert choice.share == pytest.approx(0.75 * 4 / 5) and choice.agreement == 0.3


def test_the_more_groups_the_larger_the_share():
    shares = [choose(dice([0.5] * count, 0.05, 0.1, 0.12, 0.11)).share for count in (3, 6, 16)]
    assert shares == sorted(shares) and shares[0] < shares[-1] < 0.75


def test_ties_go_to_the_plain_network():
    assert choose(dice([0.5, 0.6, 0.4, 0.5], 0, 0, 0, 0)).share == 0
    assert choose(dice([0.5, 0.6, 0.4, 0.5], 0.1, 0.1, 0.1, 0.1)).share == judged_shares(4)[1]


def test_a_gain_within_its_standard_error_is_none():
    table = dice([0.5] * 4, 0, 0, 0, 0)
    # One group of four gains much, which raises the mean but says little.
    table[0, 1:] += 0.3
    table[1, 1:] -= 0.02
    choice = choose(table)
    assert choice.share == 0 and choice.adapted == choice.plain


def test_the_plain_network_goes_where_it_clearly_only_harms():
    table = dice([0.1, 0.2, 0.1, 0.2, 0.1, 0.2], 0.1, 0.3, 0.5, 0.7)
    assert choose(table).share == pytest.approx(6 / 7, abs=1e-3)
    # The gain of leaving it out is within its standard error.
    table[::2, 4] -= 0.39
    assert choose(table).share == pytest.approx(0.75 * 6 / 7, abs=1e-3)


@pytest.mark.parametrize("groups", [0, 1, 2])
def test_two_groups_tell_nothing(groups):
    choice = choose(dice([0.5] * groups, 0.2, 0.3, 0.4, 0.4).reshape(groups, len(SHARES) + 1))
    assert choice.share == 0 and choice.groups == groups


def test_a_mix_averages_probabilities():
    logits, unet = torch.tensor([[[[2.0, -2.0]]]]), torch.tensor([[[[0.1, 0.9]]]])
    mixed = mix(logits, unet, 0.25).sigmoid()
    torch.testing.assert_close(mixed, 0.75 * logits.sigmoid() + 0.25 * unet)
    torch.testing.assert_close(mix(logits, unet, 0.0), logits, atol=1e-4, rtol=1e-4)


def test_dice_of_a_case_is_of_all_its_slices_and_counts_a_class_where_map_or_label_has_it():
    labels = torch.zeros(2, 4, 4)
    labels[0, :2] = 3
    logits = torch.full((2, 3, 4, 4), -1.0)
    logits[0, 0, :2] = 1
    logits[1, 0, :1] = 1
    logits[1, 1, 3:] = 1
    found = case_dice(logits, labels, [3, 5, 7])
    assert found[0] == pytest.approx(2 * 8 / (8 + 12)) and found[1] == 0 and torch.isnan(found[2])


def test_where_both_disagree_more_than_on_labels_the_unet_is_believed_less():
    plain = torch.full((4, 1, 4, 4), -1.0)
    unet = torch.zeros(4, 1, 4, 4)
    plain[:3, :, :2] = 1
    unet[0, :, :2] = unet[1, :, 1:3] = 1
    found = agreement(plain, unet)
    assert found[:3, 0].tolist() == [1, 0.5, 0] and found[3].isnan()
    usual = usual_agreement(torch.tensor([[0.8], [0.9], [0.8], [1.0], [float("nan")]]))
    assert usual.tolist() == pytest.approx([0.8])
    assert trust_in_agreement(found, usual)[:, 0].tolist() == pytest.approx([1, 0.625, 0, 1])
    # Where both never agreed, the network being poor, disagreement tells nothing.
    assert trust_in_agreement(found, usual_agreement(torch.zeros(5, 1)))[:, 0].tolist() == [1, 1, 1, 1]
