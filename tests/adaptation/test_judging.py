"""How much of the result is the correctors'."""

import pytest
import torch

from sam2sgp.adaptation.judging import (
    SHARES,
    Choice,
    case_dice,
    choose_share,
    judged_shares,
    mix,
)


def dice(plain: list[float], *gains: float) -> torch.Tensor:
    """Dice (G, len(SHARES) + 1) with the same gains in every group; by themselves the correctors gain as the last."""
    return torch.tensor(plain)[:, None] + torch.tensor([0.0, *gains, gains[-1]])


def choose(table: torch.Tensor) -> Choice:
    return choose_share(table, judged_shares(len(table)))


def test_a_gain_in_every_group_gives_the_correctors_their_share_and_the_plain_network_keeps_some():
    choice = choose(dice([0.5, 0.6, 0.4, 0.5], 0.05, 0.1, 0.12, 0.11))
    assert choice.adapted == pytest.approx(0.62) and choice.gain == pytest.approx(0.12)
    assert choice.share == pytest.approx(0.75 * 4 / 5)


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
    logits, corrected = torch.tensor([[[[2.0, -20.0]]]]), torch.tensor([[[[0.1, 0.9]]]])
    mixed = mix(logits, corrected, 0.25).sigmoid()
    torch.testing.assert_close(mixed, 0.75 * logits.sigmoid() + 0.25 * corrected)
    assert torch.equal(mix(logits, corrected, 0.0), logits)


def test_dice_of_a_case_is_of_all_its_slices_and_counts_a_class_where_map_or_label_has_it():
    labels = torch.zeros(2, 4, 4)
    labels[0, :2] = 3
    logits = torch.full((2, 3, 4, 4), -1.0)
    logits[0, 0, :2] = 1
    logits[1, 0, :1] = 1
    logits[1, 1, 3:] = 1
    found = case_dice(logits, labels, [3, 5, 7])
    assert found[0] == pytest.approx(2 * 8 / (8 + 12)) and found[1] == 0 and torch.isnan(found[2])


def test_dice_of_a_declared_class_beyond_a_byte_is_not_of_the_class_256_below():
    labels = torch.full((1, 4, 4), 44, dtype=torch.uint8)
    logits = torch.tensor([1.0, -1.0, -1.0])[None, :, None, None].expand(1, 3, 4, 4)
    found = case_dice(logits, labels, [44, 256, 300])
    assert found[0] == 1 and found[1:].isnan().all()
