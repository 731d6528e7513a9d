"""A corrector learns its pairs, and its learning rate follows the plan."""

import pytest
import torch

from sam2sgp.adaptation.corrector import Corrector, Trunk, bounded
from sam2sgp.adaptation.pairs import Pair, Pairs
from sam2sgp.adaptation.plan import Plan
from sam2sgp.adaptation.training import WARMUP, Training
from tests.helpers.banks import SIZE, bright_discs


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


def test_the_learning_rate_rises_in_the_warm_up_and_falls_to_nothing_over_the_planned_steps(network):
    found, mask = torch.zeros(1, SIZE, SIZE), torch.ones(1, SIZE, SIZE, dtype=torch.bool)
    pairs = Pairs([Pair(torch.rand(1, SIZE, SIZE), found, mask, (1.0, 1.0))], Plan(SIZE, False), torch.device("cpu"))
    training = Training(Corrector(Trunk(network), 1), pairs, [0], 0)
    assert [training._rate(step) for step in (0, WARMUP - 1, WARMUP, 99)] == [1 / WARMUP, 1.0, 1.0, 1.0]
    training.planned = WARMUP + 20
    rates = [training._rate(WARMUP + step) for step in (0, 10, 20, 30)]
    assert rates == pytest.approx([1.0, 0.5, 0.0, 0.0], abs=1e-9)


def test_a_loss_that_is_not_finite_changes_nothing(network, monkeypatch):
    found, mask = torch.zeros(1, SIZE, SIZE), torch.ones(1, SIZE, SIZE, dtype=torch.bool)
    pairs = Pairs([Pair(torch.rand(1, SIZE, SIZE), found, mask, (1.0, 1.0))], Plan(SIZE, False), torch.device("cpu"))
    training = Training(Corrector(Trunk(network), 1), pairs, [0], 0)
    start = [parameter.clone() for parameter in training.parameters]
    training.step()
    before = [parameter.clone() for parameter in training.parameters]
    assert not all(map(torch.equal, start, before))
    criterion = training.criterion
    training.criterion = lambda logits, mask: criterion(logits, mask) * torch.nan
    training.step()
    assert training.steps == 2 and all(map(torch.equal, before, training.parameters))
