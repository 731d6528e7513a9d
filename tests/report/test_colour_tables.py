"""Label files come with the names and colours that ITK-SNAP and 3D Slicer read, and with pictures on request."""

import json
import re

import numpy as np
from PIL import Image

from sam2sgp.data import class_names, load_datalist
from sam2sgp.drawing import class_colour
from sam2sgp.report.colour_tables import write_colour_tables
from sam2sgp.transforms import LoadCased

NAMES = {1: 'left "kidney"', 2: "Läsion", 9: "vessel"}
# As ITK-SNAP reads a line: seven numbers and a quoted name.
SNAP = re.compile(r'\s*(\d+)\s+(\d+)\s+(\d+)\s+(\d+)\s+([\d.]+)\s+([01])\s+([01])\s+"([^"]*)"\s*')


def snap_table(path) -> dict[int, tuple]:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    read = [SNAP.fullmatch(line) for line in lines]
    assert all(read)
    return {int(line[1]): (tuple(int(line[i]) for i in (2, 3, 4)), line[8]) for line in read}


def slicer_table(path) -> dict[int, tuple]:
    """As 3D Slicer reads a table: value, a name without blanks, red, green, blue, alpha."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    fields = [line.split(" ") for line in lines]
    assert all(len(line) == 6 for line in fields)
    return {int(line[0]): (tuple(map(int, line[2:5])), line[1]) for line in fields}


def test_tables_have_the_colours_of_the_report_and_are_read_back(tmp_path):
    write_colour_tables(tmp_path, NAMES)
    assert class_names(tmp_path) == NAMES
    snap, slicer = snap_table(tmp_path / "labels.txt"), slicer_table(tmp_path / "labels.ctbl")
    assert snap.keys() == slicer.keys() == {0, 1, 2, 9}
    for value in NAMES:
        assert snap[value][0] == slicer[value][0] == class_colour(value)
    assert (snap[1][1], slicer[1][1], snap[2][1]) == ("left 'kidney'", 'left_"kidney"', "Läsion")


def test_the_value_of_binary_pictures_has_a_name_too(tmp_path):
    write_colour_tables(tmp_path, {1: "cyst"})
    assert json.loads((tmp_path / "labels.json").read_text()) == {"1": "cyst"}
    for table in (snap_table(tmp_path / "labels.txt"), slicer_table(tmp_path / "labels.ctbl")):
        assert table[255] == table[1] == (class_colour(1), "cyst")


def test_what_is_known_of_a_case_before_it_is_read_is_told_with_its_warnings(tmp_path):
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / "a.bmp")
    case = LoadCased("image")(load_datalist(tmp_path, require_labels=False)[0])
    assert ["has the same stem" in sentence for sentence in case["warnings"]] == [True]
