"""Class names are declared or made up, and labels are checked against them."""

import pytest

from sam2sgp.data.classes import check_label_values, class_names, complete_class_names
from sam2sgp.errors import DataError
from tests.helpers.data_folders import paired, write_json


def test_class_names_are_declared_or_made_up(tmp_path):
    paired(tmp_path, "a")
    assert class_names(tmp_path) == {} and class_names(tmp_path, [0, 2, 5]) == {2: "class_2", 5: "class_5"}
    write_json(tmp_path / "labels.json", {"cup": 2, "disc": 1, "background": 0})
    assert class_names(tmp_path) == {1: "disc", 2: "cup"} == class_names(tmp_path, [0, 2])
    assert complete_class_names({2: "b", 1: "a"}, [7]) == {1: "a", 2: "b"}
    with pytest.raises(DataError, match=r"1 disc, 2 cup.*value 3"):
        class_names(tmp_path, [0, 3])
    write_json(tmp_path / "labels.json", {"cup": "two"})
    with pytest.raises(DataError, match="labels.json.*class names"):
        class_names(tmp_path)


def test_undeclared_value_is_an_error_that_names_label_and_value():
    with pytest.raises(DataError, match=r"a.png: .*1 liver.*value 4"):
        check_label_values("a.png", [0, 1, 4], {1: "liver"})
    check_label_values("a.png", [0, 1], {1: "liver", 2: "tumour"})
    check_label_values("a.png", [0, 9], {})
