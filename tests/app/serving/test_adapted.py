"""An adaptation beside published weights: what it counts for as labels come and go."""

import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest

from lib.serving.adapted import ADAPTED_TO, AdaptedTo, ServedAdaptation, gain_of, is_adapted
from lib.serving.published_weights import Version
from sam2sgp.errors import WeightsError


def a_bank(items: dict[str, str], classes=(1, 2), settings="hash"):
    """Items of a case each, by content, with their patients."""
    return SimpleNamespace(
        items=[SimpleNamespace(content=key, patient=own, case={"name": f"case {key}"}) for key, own in items.items()],
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


def test_only_weights_with_an_adaptation_have_its_gain(tmp_path):
    version = Version("1", tmp_path / "model.pt", metrics={"dice": 0.7, "dice_before": 0.6})
    assert not is_adapted(version) and gain_of(version) == 0
    (tmp_path / ADAPTED_TO).write_text("{}")
    assert is_adapted(version) and gain_of(version) == pytest.approx(0.1)


@pytest.mark.parametrize("text", ["{", "[]", "{}", json.dumps({"classes": {}, "other": 1})])
def test_a_damaged_file_is_named_with_its_folder(tmp_path, text):
    (tmp_path / ADAPTED_TO).write_text(text)
    with pytest.raises(WeightsError, match=f"{tmp_path}: expected the adaptation"):
        ServedAdaptation.of(Version("1", tmp_path / "model.pt"), None, BEFORE)
