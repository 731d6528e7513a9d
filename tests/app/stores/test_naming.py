"""Class values follow class names, whatever a viewer numbers its segments."""

import numpy as np
import pytest

from lib.stores.naming import agreed, declared, renumber, renumbering

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
    ],
)
def test_a_name_means_one_value_and_a_value_one_name(values, sent, expected):
    assert agreed(values, sent, KNOWN) == expected
    changes, names = expected
    again = [changes.get(value, value) for value in values]
    assert agreed(again, names, KNOWN) == ({}, names)


def test_all_values_change_at_once():
    labels = np.array([[0, 1], [2, 5]])
    assert renumber(labels, {1: 2, 2: 1}).tolist() == [[0, 2], [1, 5]]


@pytest.mark.parametrize(
    "info", [{}, {"label_info": None}, {"label_info": ["x", {"idx": "1", "name": "a"}, {"idx": 0}]}]
)
def test_ill_declarations_declare_nothing(info):
    assert declared(info) == {}
