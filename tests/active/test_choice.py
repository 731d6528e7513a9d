"""The choice of the next image, by each strategy."""

import pytest
import torch

from sam2sgp.active import STRATEGIES, choose
from sam2sgp.errors import ConfigError
from tests.helpers.embeddings import at


def test_each_strategy_goes_by_what_it_is_named_after():
    candidates, labelled = at(2, 90, 180), at(0)
    uncertainty = torch.tensor([0.9, 0.8, 0.0])
    order = {name: choose(name, candidates, labelled, uncertainty, 3)[0].tolist() for name in STRATEGIES}
    assert order["uncertainty"] == [0, 1, 2]
    assert order["coverage"][0] == 2
    # Neither the near duplicate of what is labelled, nor what is far but certain.
    assert order["hybrid"][0] == 1
    assert all(sorted(found) == [0, 1, 2] for found in order.values())


def test_an_unknown_uncertainty_counts_as_the_mean():
    uncertainty = torch.tensor([0.2, torch.nan, 0.8])
    assert choose("uncertainty", at(0, 1, 2), at(), uncertainty, 3)[0].tolist() == [2, 1, 0]
    assert choose("hybrid", at(0, 1, 2), at(), torch.full((3,), torch.nan), 2)[0].shape == (2,)


def test_no_candidate_is_no_choice():
    for name in STRATEGIES:
        assert choose(name, torch.zeros(0, 2), at(0), torch.zeros(0))[0].tolist() == []


def test_an_unknown_strategy_is_refused():
    with pytest.raises(ConfigError, match="'best'.*uncertainty, coverage, hybrid"):
        choose("best", at(0), at(0), torch.zeros(1))
