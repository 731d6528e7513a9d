"""What items teach is learned once, from the right group, and again when what guides them has changed."""

from types import SimpleNamespace

import torch

from sam2sgp.inferers.items_as_queries import ItemsAsQueries, Judgement, TaughtByItems


def bank() -> SimpleNamespace:
    """Four items of two groups, each guided by the one before."""
    made = SimpleNamespace(version=0, class_values=[1])
    info = SimpleNamespace(holds=(1,))
    made.items = [SimpleNamespace(content=f"c{number}", group="aabb"[number], info=info) for number in range(4)]
    made.guides = [3, 0, 1, 2]
    made.retrieve_for = lambda number, sampler: [SimpleNamespace(value=1, index=torch.tensor([[made.guides[number]]]))]
    return made


class Judge:
    """Finds as many pixels as the item's number says."""

    def __init__(self) -> None:
        self.judged: list[int] = []

    def __call__(self, number, retrieved) -> Judgement:
        self.judged.append(number)
        return Judgement(*(torch.tensor([float(number)]) for _ in range(5)))


class Mean(TaughtByItems[float]):
    def _learn(self, judge, members) -> float:
        return float(self.items(judge, members).found.mean())


def test_an_item_is_judged_once_as_long_as_the_same_items_guide_it():
    support, judge = bank(), Judge()
    items = ItemsAsQueries(support, None)
    assert items(judge, [0, 2]).found[:, 0].tolist() == [0.0, 2.0]
    items(judge, [2, 1])
    assert judge.judged == [0, 2, 1]
    assert {number: found.size.item() for number, found in items.judged.items()} == {0: 0.0, 2: 2.0, 1: 1.0}
    support.version, support.guides = 1, [3, 0, 0, 2]
    items(judge, [0, 1, 2])
    assert judge.judged == [0, 2, 1, 2], "the one whose guide is another"
    items.forget()
    assert items.judged == {}
    items(judge, [0])
    assert judge.judged[4:] == [0]


def test_what_was_known_two_versions_ago_is_forgotten():
    support, judge = bank(), Judge()
    items = ItemsAsQueries(support, None)
    items(judge, [0, 1])
    for support.version in (1, 2):
        items(judge, [0])
        assert list(items.judged) == [0]
    items(judge, [1])
    assert judge.judged == [0, 1, 1]


def test_a_group_teaches_for_itself_and_an_unknown_one_learns_from_all():
    support, judge = bank(), Judge()
    mean = Mean(ItemsAsQueries(support, None))
    assert [mean(judge, group) for group in ("a", "b", "other", None)] == [0.5, 2.5, 1.5, 1.5]
    assert len(judge.judged) == 4
    support.version, support.items = 1, support.items[:3]
    assert mean(judge, "b") == 2.0
