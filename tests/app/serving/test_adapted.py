"""An adaptation beside published weights: what it counts for as labels come and go."""

import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest

from lib.serving.adapted import ADAPTED_TO, AdaptedTo, ServedAdaptation, Standing, gain_of, is_adapted
from lib.serving.published_weights import Version
from sam2sgp.errors import WeightsError
from sam2sgp.support import ItemRules


def a_item(content: str, patient: str, name: str):
    return SimpleNamespace(content=content, patient=patient, case={"name": name})


def a_bank(items: dict[str, str], classes=(1, 2), settings="hash"):
    """Items by content, whose first letter names their case, with their patients."""
    return SimpleNamespace(
        items=[a_item(key, own, f"case {key[0]}") for key, own in items.items()],
        data=[{"name": f"case {key[0]}"} for key in items],
        catalogue=SimpleNamespace(rules=ItemRules()),
        patients=dict.fromkeys(items.values()),
        class_values=list(classes),
        class_names={value: f"class_{value}" for value in classes},
        settings=settings,
    )


BEFORE = a_bank({"a": "anna", "b": "berta"})
MADE_FOR = AdaptedTo.of(BEFORE, ["group 1", "group 2"])


def served(bank) -> ServedAdaptation:
    return ServedAdaptation(SimpleNamespace(), MADE_FOR, bank)


def test_items_keep_their_groups_and_later_ones_are_their_patients():
    assert served(a_bank({"c": "carla", "b": "berta"})).owners == ["carla", "group 2"]


def test_it_counts_as_long_as_classes_and_preprocessing_are_those_that_it_was_made_for():
    assert served(BEFORE).obstacle is None and served(a_bank({"c": "carla"})).obstacle is None
    renamed = a_bank({"a": "anna"})
    renamed.class_names[1] = "liver"
    assert served(renamed).obstacle is None
    for bank, why in (
        (a_bank({"a": "anna"}, classes=(1,)), "classes class_1, class_2, and the approved labels have class_1"),
        (a_bank({"a": "anna"}, classes=(1, 2, 3)), "have class_1, class_2, class_3"),
        (a_bank({}, classes=()), "have none"),
        (a_bank({"a": "anna"}, settings="other"), "prepared by other settings"),
    ):
        assert why in served(bank).obstacle and "`adapt` again" in served(bank).obstacle


def test_one_of_another_release_ends_no_start_and_is_not_used(tmp_path):
    (tmp_path / ADAPTED_TO).write_text(json.dumps({**asdict(MADE_FOR), "method": MADE_FOR.method - 1}))
    found = ServedAdaptation.of(Version("1", tmp_path / "model.pt"), None, BEFORE)
    assert "another release" in found.obstacle and "`adapt` again" in found.obstacle


def test_what_it_has_learned_from_is_remembered_when_a_label_is_taken_back():
    now = served(a_bank({"b": "berta"}))
    assert now.has_learned_from("case a", None) and now.has_learned_from("another", "berta")
    assert not now.has_learned_from("another", None) and not now.has_learned_from("another", "carla")


def test_labels_that_were_corrected_or_removed_since_are_told_and_later_ones_are_no_fault():
    same = served(BEFORE).standing()
    assert (same.labels, same.changed, same.later, same.outdated) == (2, (), 0, None)
    assert same.told()["text"] == "Adapted to 2 labels." and same.told()["used"]
    later = served(a_bank({"a": "anna", "b": "berta", "c": "carla"})).standing()
    assert later.outdated is None and later.told()["text"].endswith(
        "1 label came later, from which it has not learned."
    )
    corrected = served(a_bank({"a2": "anna", "b": "berta"})).standing()
    assert corrected.changed == ("case a",)
    assert "Of the 2 labels that the adaptation learned from, 1 was corrected or removed since (case a)" in (
        corrected.outdated
    )
    assert corrected.outdated.endswith("Run the training `adapt` again.") and corrected.told()["used"]
    removed = served(a_bank({"b": "berta"})).standing()
    assert removed.told() | {"text": ""} == {
        "labels": 2, "changed": ["case a"], "later": 0, "used": True, "text": ""
    }  # fmt: skip
    gone = served(a_bank({}, classes=())).standing()
    assert gone.changed == ("case a", "case b") and not gone.told()["used"]
    assert gone.told()["text"] == gone.obstacle != gone.outdated


def test_a_label_that_shows_nothing_any_more_is_changed_and_one_without_room_is_not():
    bank = a_bank({"b": "berta"})
    bank.data.append({"name": "case a"})
    assert served(bank).standing().changed == ("case a",)
    bank.catalogue.rules = ItemRules(max_items=1)
    assert served(bank).standing().changed == ()


def test_of_many_changed_labels_a_few_are_named():
    many = Standing(9, tuple("abcdefg"), 0, None)
    assert "7 were corrected or removed since (a, b, c, d, e and 2 more)" in many.outdated


def test_only_weights_with_an_adaptation_have_its_gain_and_only_while_it_is_used(tmp_path):
    version = Version("1", tmp_path / "model.pt", metrics={"dice": 0.7, "dice_before": 0.6})
    assert not is_adapted(version) and gain_of(version, BEFORE) == 0
    (tmp_path / ADAPTED_TO).write_text(json.dumps(asdict(MADE_FOR)))
    assert is_adapted(version) and gain_of(version, BEFORE) == pytest.approx(0.1)
    assert gain_of(version, a_bank({"a": "anna"}, classes=(1, 2, 3))) == 0
    (tmp_path / ADAPTED_TO).write_text("{")
    with pytest.raises(WeightsError, match=f"{tmp_path}: expected the adaptation"):
        gain_of(version, BEFORE)


@pytest.mark.parametrize("text", ["{", "[]", "{}", json.dumps({"classes": {}, "other": 1})])
def test_a_damaged_file_is_named_with_its_folder(tmp_path, text):
    (tmp_path / ADAPTED_TO).write_text(text)
    with pytest.raises(WeightsError, match=f"{tmp_path}: expected the adaptation"):
        ServedAdaptation.of(Version("1", tmp_path / "model.pt"), None, BEFORE)
