"""Who may guide whom."""

import pytest
import torch

from sam2sgp.errors import ConfigError, DataError
from sam2sgp.support import EpisodeSupportSampler, SupportSampler


def test_similarity_takes_the_most_similar_eligible_items_in_order():
    similarity = torch.tensor([[0.1, 0.9, 0.5, 0.7], [0.8, 0.2, 0.6, 0.4]])
    eligible = torch.tensor([True, False, True, True])
    index, values = SupportSampler("similarity", k=2)(similarity, eligible)
    assert index.tolist() == [[3, 2], [0, 2]]
    torch.testing.assert_close(values, torch.tensor([[0.7, 0.5], [0.8, 0.6]]))


def test_ties_are_resolved_by_the_items_number():
    index, _ = SupportSampler("similarity", k=3)(torch.full((1, 50), 0.5), torch.ones(50, dtype=torch.bool))
    assert index.tolist() == [[0, 1, 2]]


def test_fewer_items_than_k_gives_fewer():
    index, _ = SupportSampler("similarity", k=8)(torch.rand(2, 3), torch.tensor([True, False, True]))
    assert sorted(index[0].tolist()) == [0, 2]


def test_random_is_reproducible_without_replacement_and_differs_by_seed():
    similarity, eligible = torch.rand(2, 40), torch.arange(40) % 2 == 0
    first, _ = SupportSampler("random", k=10, seed=1)(similarity, eligible)
    again, _ = SupportSampler("random", k=10, seed=1)(similarity, eligible)
    other, _ = SupportSampler("random", k=10, seed=2)(similarity, eligible)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len(set(first[0].tolist())) == 10 and all(i % 2 == 0 for i in first[0].tolist())


@pytest.mark.parametrize("arguments", [{"mode": "nearest"}, {"k": 0}])
def test_impossible_settings_are_refused(arguments):
    with pytest.raises(ConfigError):
        SupportSampler(**arguments)


def test_training_support_is_never_the_query_nor_of_its_patient_nor_empty():
    patient = torch.tensor([[0, 0, 1, 1, 2, 2], [3, 4, 5, 6, 7, 8]])
    holds = torch.tensor([[True] * 6, [True, True, False, True, True, True]])
    sampler = EpisodeSupportSampler(min_k=1, max_k=5)
    seen = set()
    for seed in range(60):
        index = sampler(patient, holds, seed)
        assert index.shape[:2] == (12, 1)
        seen.add(index.shape[2])
        for query, chosen in enumerate(index[:, 0].tolist()):
            for item in chosen:
                assert item // 6 == query // 6, "support comes from the query's episode"
                assert patient.flatten()[item] != patient.flatten()[query]
                assert holds.flatten()[item]
    assert seen == {1, 2, 3, 4, 5}


def test_training_support_is_drawn_without_replacement_where_enough_is_there():
    index = EpisodeSupportSampler(4, 4)(torch.arange(6)[None], torch.ones(1, 6, dtype=torch.bool), seed=3)
    assert all(len(set(row)) == 4 for row in index[:, 0].tolist())


def test_training_choice_depends_on_the_seed_alone():
    arguments = torch.arange(6)[None], torch.ones(1, 6, dtype=torch.bool)
    sampler = EpisodeSupportSampler(2, 4)
    assert torch.equal(sampler(*arguments, seed=5), sampler(*arguments, seed=5))
    assert any(not torch.equal(sampler(*arguments, seed=5), sampler(*arguments, seed=s)) for s in range(6, 9))


def test_training_bounds_are_checked():
    with pytest.raises(ConfigError, match="min_k"):
        EpisodeSupportSampler(3, 2)


def test_training_falls_back_to_empty_images_but_never_to_the_querys_own_patient():
    patient = torch.tensor([[0, 0, 1]])
    index = EpisodeSupportSampler(2, 2)(patient, torch.tensor([[True, True, False]]), seed=0)
    assert index[0, 0].tolist() == [2, 2] and set(index[2, 0].tolist()) == {0, 1}
    with pytest.raises(DataError, match="two patients"):
        EpisodeSupportSampler(1, 1)(torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool), seed=0)
