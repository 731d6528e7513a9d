"""Strategies on stored scores: what is offered, how often, and at what cost with 10,000 images."""

import math

import pytest
import torch

from lib.activelearning.scoring import Scores
from lib.activelearning.strategies import SECONDS_OF_AN_OFFER, Choices, strategies
from sam2sgp.active import ImageScore

NAMES = ("uncertainty", "coverage", "hybrid", "random")


class Images:
    """A datastore of names; counts what it is asked."""

    def __init__(self, names: list[str], labelled: tuple[str, ...] = ()) -> None:
        self.names, self.labelled, self.asked = names, set(labelled), 0
        self.drafted: set[str] = set()

    def get_unlabeled_images(self, label_tag=None, labels=None) -> list[str]:
        self.asked += 1
        return [name for name in self.names if name not in self.labelled]

    def get_labeled_images(self, label_tag=None, labels=None) -> list[str]:
        self.asked += 1
        return sorted(self.labelled)

    def tags(self) -> dict[str, list[str]]:
        self.asked += 1
        return {name: ["original", "draft"] if name in self.drafted else ["original"] for name in self.names}


def score(degrees: float, uncertainty: float | None = None) -> ImageScore:
    angle = math.radians(degrees)
    return ImageScore(torch.tensor([math.cos(angle), math.sin(angle)]), uncertainty, {})


@pytest.fixture
def scores(tmp_path) -> Scores:
    """`near` is like what is labelled, `far` is not; `doubt` lies between and is the most uncertain."""
    scores = Scores(tmp_path / "scores.sqlite")
    scores.write("done", "s", "w", None, score(0))
    for name, degrees, uncertainty in (("near", 3, 0.6), ("doubt", 60, 0.9), ("far", 170, 0.1)):
        scores.write(name, "s", "w", "b", score(degrees, uncertainty))
    return scores


def images(*labelled: str) -> Images:
    return Images(["done", "near", "doubt", "far"], labelled)


def offered(scores: Scores, name: str, datastore: Images) -> dict:
    return strategies(Choices(scores))[name]({"strategy": name}, datastore)


def test_each_strategy_offers_what_it_stands_for(scores):
    assert list(strategies(Choices(scores)))[0] == "hybrid"
    assert offered(scores, "uncertainty", images("done"))["id"] == "doubt"


def test_coverage_goes_by_distance(scores):
    found = offered(scores, "coverage", images("done"))
    assert found["id"] == "far"
    assert found["distance"] == pytest.approx(math.sin(math.radians(85)), abs=1e-2)
    assert found["uncertainty"] == 0.1 and "note" not in found


def test_a_fresh_label_counts_before_it_is_scored_again(scores):
    """Once `far` is labelled, nothing is farther than `doubt`."""
    assert offered(scores, "coverage", images("done", "far"))["id"] == "doubt"


@pytest.mark.parametrize("name", NAMES)
def test_all_are_offered_once_and_no_labelled_one_ever(scores, name):
    strategy, datastore = strategies(Choices(scores))[name], images("done")
    found = [strategy({"strategy": name}, datastore)["id"] for _ in range(3)]
    assert sorted(found) == ["doubt", "far", "near"]
    # Then the one offered the longest ago comes again, whoever asks.
    assert strategies(Choices(scores))[name]({}, datastore)["id"] == found[0]
    assert strategy({}, images("done", "near", "doubt", "far")) is None


def test_an_offer_ends(scores):
    scores.offer("far", 1.0)
    assert offered(scores, "coverage", images("done"))["id"] == "far"
    assert SECONDS_OF_AN_OFFER > 0 and scores.offers()["far"] > 1.0


def test_what_is_not_scored_is_said(scores, tmp_path):
    datastore = images("done")
    datastore.names.append("new")
    assert offered(scores, "hybrid", datastore)["note"].startswith("1 of 4 images are not scored")
    empty = Scores(tmp_path / "empty.sqlite")
    found = offered(empty, "hybrid", datastore)
    assert found["id"] in datastore.names and "at random" in found["note"]


def test_scores_written_meanwhile_are_read(scores):
    strategy = strategies(Choices(scores))["coverage"]
    datastore = images("done")
    assert strategy({}, datastore)["id"] == "far"
    datastore.names.append("new")
    scores.write("new", "s", "w", "b", score(270, 0.5))
    assert strategy({}, datastore)["id"] == "new"


def test_embeddings_of_two_weights_are_not_compared(scores):
    scores.write("far", "s", "other", "b", score(1, 0.1))
    found = offered(scores, "coverage", images("done"))
    assert found["id"] == "doubt" and "1 of 3" in found["note"]


def test_ten_thousand_images_cost_a_fixed_number_of_reads(tmp_path):
    scores = Scores(tmp_path / "scores.sqlite")
    count, size = 10_000, 64
    generator = torch.Generator().manual_seed(0)
    embedding = torch.nn.functional.normalize(torch.randn(count, size, generator=generator), dim=1)
    uncertainty = torch.rand(count, generator=generator).tolist()
    names = [f"image{number}" for number in range(count)]
    with scores._open() as connection:
        connection.execute("BEGIN")
        connection.executemany(
            "INSERT INTO scores VALUES (?, 's', 'w', 'b', ?, ?, '{}', NULL, ?)",
            [
                (name, embedding[number].half().numpy().tobytes(), uncertainty[number], number + 1)
                for number, name in enumerate(names)
            ],
        )
        connection.execute("COMMIT")
    datastore = Images(names, tuple(names[:100]))
    read = []
    newer = scores.newer
    scores.newer = lambda serial: read.append(rows := newer(serial)) or rows
    chosen = strategies(Choices(scores))
    found = [chosen[name]({}, datastore)["id"] for name in ("hybrid", "coverage", "uncertainty", "hybrid")]
    assert len(set(found)) == 4 and not set(found) & datastore.labelled
    best = max((value, name) for value, name in zip(uncertainty, names, strict=True) if name not in datastore.labelled)
    assert found[2] == best[1] or best[1] in found[:2]
    # All rows are read once; of the datastore only its three lists are asked for.
    assert [len(rows) for rows in read] == [count, 0, 0, 0]
    assert datastore.asked == 3 * 4


@pytest.mark.parametrize("name", NAMES)
def test_an_image_whose_draft_waits_for_an_approval_comes_after_all_others(scores, name):
    datastore = Images(["done", "near", "doubt", "far"], ("done",))
    datastore.drafted = {"doubt", "far"}
    assert offered(scores, name, datastore)["id"] == "near"
    datastore.drafted.add("near")
    assert offered(scores, name, datastore)["id"] in datastore.drafted


def test_the_ranking_for_people_names_every_image_and_offers_none(scores):
    choices = Choices(scores)
    assert choices.ranked("uncertainty", ["near", "doubt", "far", "unscored"], ["done"])[0] == "doubt"
    assert choices.ranked("coverage", ["near", "doubt", "far", "unscored"], ["done"])[0] == "far"
    ranked = choices.ranked("hybrid", ["unscored", "near", "doubt", "far"], ["done"])
    assert sorted(ranked) == ["doubt", "far", "near", "unscored"] and ranked[-1] == "unscored"
    assert scores.offers() == {}
