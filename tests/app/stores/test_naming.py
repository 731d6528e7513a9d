"""Class values follow class names, whatever a viewer numbers its segments."""

import nrrd
import numpy as np
import pytest

from lib.checks import BadLabel
from lib.stores.naming import agreed, declared, names_by_value, renumber, renumbering, told

KNOWN = {"disc": 1, "ellipse": 2, "ring": 3}


@pytest.mark.parametrize(
    ("values", "sent", "changes"),
    [
        ([0, 1, 2, 3], {1: "disc", 2: "ellipse", 3: "ring"}, {}),
        ([0, 1, 2], {1: "disc", 2: "ring"}, {2: 3}),
        ([1, 2], {1: "ring", 2: "disc"}, {1: 3, 2: 1}),
        ([1, 2], {1: "disc", 2: "tumour"}, {2: 4}),
        ([1, 7], {1: "disc", 7: "tumour"}, {}),
        ([1, 2], {1: "disc"}, {}),
        ([1, 2], {1: "ring", 2: "ring"}, {}),
        ([0], {1: "ring"}, {}),
    ],
)
def test_values_follow_known_names(values, sent, changes):
    assert renumbering(values, sent, KNOWN) == changes


@pytest.mark.parametrize(
    ("values", "sent", "expected"),
    [
        # As 3D Slicer sends the segments of an image: those that are empty there, too.
        ([1], {1: "tumour", 2: "ellipse"}, ({1: 4}, {4: "tumour", 2: "ellipse"})),
        ([1], {1: "disc", 2: "ring"}, ({}, {1: "disc", 3: "ring"})),
        ([1], {1: "disc", 2: "tumour"}, ({}, {1: "disc"})),
        ([1], {1: "disc", 7: "tumour"}, ({}, {1: "disc", 7: "tumour"})),
        ([], {2: "disc"}, ({}, {1: "disc"})),
        ([1, 2], {1: "disc"}, ({}, {1: "disc"})),
        ([1, 2], {1: "Ring", 2: "DISC"}, ({1: 3, 2: 1}, {3: "ring", 1: "disc"})),
        # Of a prediction that was made before the classes had names.
        ([1, 2], {1: "class_1", 2: "class_2"}, ({}, {1: "disc", 2: "ellipse"})),
        ([1], {1: "class_3"}, ({1: 3}, {3: "ring"})),
    ],
)
def test_a_name_means_one_value_and_a_value_one_name(values, sent, expected):
    assert agreed(values, sent, KNOWN) == expected
    changes, names = expected
    again = [changes.get(value, value) for value in values]
    assert agreed(again, names, KNOWN) == ({}, names)


@pytest.mark.parametrize(
    ("values", "sent"),
    [
        ([1, 2, 3], {2: "disc"}),
        ([1, 2], {1: "disc", 2: "disc"}),
        ([1, 2], {1: "disc", 2: "Disc"}),
        ([1, 2], {1: "tumour"}),
        # Numbered from 0.
        ([1, 2, 3], {1: "ellipse", 2: "ring"}),
    ],
)
def test_names_that_contradict_those_of_other_labels_and_are_too_few_to_follow_are_refused(values, sent):
    with pytest.raises(BadLabel, match="expected one name for each value of the label, as in other labels"):
        agreed(values, sent, KNOWN)


def test_a_first_name_is_given_to_a_class_that_had_none_unless_the_sender_knows_of_it():
    unnamed = {"class_1": 1, "class_2": 2}
    assert agreed([1, 2], {1: "disc", 2: "ellipse"}, unnamed) == ({}, {1: "disc", 2: "ellipse"})
    assert agreed([1, 2], {1: "class_2", 2: "disc"}, unnamed) == ({1: 2, 2: 3}, {2: "class_2", 3: "disc"})
    assert names_by_value({"disc": 1, **unnamed}) == {1: "disc", 2: "class_2"}


@pytest.mark.parametrize(
    ("values", "sent", "known", "expected"),
    [
        # The second class of a prediction, of a server that has no approved label yet.
        ([1], {1: "class_2"}, {}, ({1: 2}, {2: "class_2"})),
        # Declared names that count from 0.
        ([2], {2: "class_1"}, {"class_0": 1, "class_1": 2, "class_2": 3}, ({}, {2: "class_1"})),
        ([], {1: "class_1", 2: "class_2"}, {"disc": 1, "class_1": 1}, ({}, {1: "disc", 2: "class_2"})),
    ],
)
def test_a_placeholder_stands_for_its_value_unless_that_is_a_name_of_another(values, sent, known, expected):
    assert agreed(values, sent, known) == expected
    assert agreed([expected[0].get(value, value) for value in values], expected[1], known) == ({}, expected[1])


def test_two_names_that_other_labels_have_for_one_value_do_not_make_one_class_of_two():
    with pytest.raises(BadLabel, match="found 'Disc' for value 1, and value 3 for this name in other labels"):
        agreed([1, 2], {1: "Disc", 2: "disc"}, {"Disc": 3, "disc": 3})


@pytest.mark.parametrize(
    ("sent", "known", "told"),
    [
        ({1: "RING", 2: "ring"}, {}, "'RING' for value 1 and 'ring' for value 2, which differ in upper and lower case"),
        ({1: "RING", 2: "ring"}, {"disc": 1}, "'RING' for value 1 and 'ring' for value 2, which differ in upper and"),
        ({1: "ring", 2: "ring"}, {}, "'ring' for value 1 and 'ring' for value 2; make them one segment"),
    ],
)
def test_two_values_of_one_label_with_one_name_are_refused_whatever_its_case(sent, known, told):
    with pytest.raises(BadLabel, match=f"expected one name for each value of the label, found {told}"):
        agreed([1, 2], sent, known)
    assert agreed([1], {1: "RING", 2: "ring"}, {}) == ({}, {1: "RING"}), "the other one is empty"


def test_two_names_that_differ_in_case_and_are_known_for_two_values_stay_so():
    known = {"Disc": 1, "disc": 2}
    assert agreed([1, 2], {1: "Disc", 2: "disc"}, known) == ({}, {1: "Disc", 2: "disc"})


def test_what_was_agreed_on_is_agreed_on_again():
    """Otherwise an approval would start again for ever, see `again_if_renumbered`."""
    rng = np.random.default_rng(0)
    names = ["disc", "Disc", "ring", "tumour", "class_1", "class_2", "class_3", "Segment_1"]

    def some() -> dict[str, int]:
        return {names[number]: int(rng.integers(1, 5)) for number in rng.permutation(8)[: rng.integers(6)]}

    for _ in range(2000):
        known, sent = some(), {value: name for name, value in some().items()}
        values = [value for value in range(1, 5) if rng.random() < 0.5]
        try:
            changes, agreed_on = agreed(values, sent, known)
        except BadLabel:
            continue
        again = [changes.get(value, value) for value in values]
        assert len(set(again)) == len(values)
        assert agreed(again, agreed_on, known) == ({}, agreed_on)


def test_a_segmentation_names_its_segments_itself_and_must_not_contradict_what_is_sent_with_it(tmp_path):
    path = tmp_path / "a.seg.nrrd"
    names = {"Segment0_ID": "Segment_1", "Segment0_Name": "ring", "Segment0_LabelValue": "1"}
    names |= {"Segment1_ID": "Segment_2", "Segment1_Name": "Segment_2", "Segment1_LabelValue": "2"}
    nrrd.write(str(path), np.arange(3, dtype=np.uint8).reshape(3, 1, 1), names)
    assert told(path, {}) == {1: "ring"}
    sent = [{"name": "Ring", "idx": 1}, {"name": "disc", "idx": 2}]
    assert told(path, {"label_info": sent}) == {1: "Ring", 2: "disc"}
    assert told(path, {"label_info": [{"name": "class_1", "idx": 1}]}) == {1: "ring"}
    with pytest.raises(BadLabel, match="'ring' in the file and 'disc' in label_info"):
        told(path, {"label_info": [{"name": "disc", "idx": 1}]})


def test_all_values_change_at_once():
    labels = np.array([[0, 1], [2, 5]])
    assert renumber(labels, {1: 2, 2: 1}).tolist() == [[0, 2], [1, 5]]


@pytest.mark.parametrize(
    "info", [{}, {"label_info": None}, {"label_info": ["x", {"idx": "1", "name": "a"}, {"idx": 0}]}]
)
def test_ill_declarations_declare_nothing(info):
    assert declared(info) == {}
