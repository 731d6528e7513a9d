"""NRRD headers: what ITK reads in them is read, and what leaves a doubt is refused."""

import pytest

from sam2sgp.data.io.itk import raw_header
from sam2sgp.errors import FormatError
from tests.data.io.itk_files import NRRD, VOXELS, same_as_simpleitk, written

VARIANTS = {
    "big-endian": NRRD,
    "no space": "\n".join(line for line in NRRD.splitlines() if not line.startswith("space")) + "\n",
    "spacings": "\n".join(line for line in NRRD.splitlines() if not line.startswith("space")) + "\nspacings: 0.5 1 2\n",
    "LAS": NRRD.replace("right-anterior-superior", "LAS"),
    "carriage returns": NRRD.replace("\n", "\r\n"),
    "channels first": NRRD.replace("sizes: 3 4 5", "sizes: 3 4 5")
    .replace("kinds: domain", "kinds: vector")
    .replace("directions: (0.5,0.1,0) (-0.1, 0.5,0) (0,0,2.5e0)", "directions: none (1,0) (0,2)")
    .replace("space: right-anterior-superior", "space dimension: 2")
    .replace("(-1.25,3,.5)", "(1,2)"),
    "channels last": NRRD.replace("domain domain domain", "domain domain list")
    .replace("directions: (0.5,0.1,0) (-0.1, 0.5,0) (0,0,2.5e0)", "directions: (1,0) (0,2) none")
    .replace("space: right-anterior-superior", "space dimension: 2")
    .replace("(-1.25,3,.5)", "(1,2)"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_values_and_places_are_those_of_simpleitk(tmp_path, name):
    same_as_simpleitk(written(tmp_path, VARIANTS[name]))


REFUSED = {
    "data file": NRRD + "data file: /etc/passwd\n",
    "datafile": NRRD + "datafile: /etc/passwd\n",
    "Data File": NRRD + "Data File: /etc/passwd\n",
    "list": NRRD + "data file: LIST\n/etc/passwd\n",
    "pattern": NRRD + "data file: x%03d.raw 1 5 1\n",
    "beside": NRRD + "data file: beside.raw\n",
    "line skip": NRRD + "line skip: 1\n",
    "byte skip": NRRD + "byteskip: -1\n",
    "field twice": NRRD + "encoding: gzip\n",
    "synonym twice": NRRD + "centers: cell cell cell\ncenterings: cell cell cell\n",
    "key twice": NRRD + "Segment0_ID:=x\n",
    "unknown field": NRRD + "colour: red\n",
    "no separator": NRRD + "something\n",
    "space in front": NRRD + " data file: x\n",
    "tab in front": NRRD + "\tdata file: x\n",
    "without a space": NRRD + "data file:/etc/passwd\n",
    "vertical tab": NRRD + "content: a\vdata file: x\n",
    "carriage return inside": NRRD + "content: a\rdata file: /etc/passwd\n",
    "NUL": NRRD + "content: a\0\n",
    "ASCII": NRRD.replace("encoding: raw", "encoding: ascii"),
    "hex": NRRD.replace("encoding: raw", "encoding: hex"),
    "block": NRRD.replace("type: short", "type: block\nblock size: 4"),
    "no type": NRRD.replace("type: short\n", ""),
    "no endian": NRRD.replace("endian: big\n", ""),
    "sizes of zero": NRRD.replace("3 4 5", "3 4 0"),
    "negative sizes": NRRD.replace("3 4 5", "3 -4 -5"),
    "sizes and dimension": NRRD.replace("dimension: 3", "dimension: 2"),
    "dimensions": NRRD.replace("dimension: 3", "dimension: 16").replace("3 4 5", "1 " * 15 + "1"),
    "directions": NRRD.replace("(0,0,2.5e0)", "(0,0)"),
    "directions no numbers": NRRD.replace("(0,0,2.5e0)", "(0,0,nan)"),
    "all channels": NRRD.replace("domain domain domain", "list list list"),
    "ranges of axes": NRRD.replace("space directions: (0.5,0.1,0) (-0.1, 0.5,0) (0,0,2.5e0)", "axis mins: 0 0 9"),
    "another space": NRRD.replace("right-anterior-superior", "nowhere"),
    "long numbers": NRRD.replace("(0,0,2.5e0)", f"(0,0,{'1' * 100_000})"),
    "endless header": "NRRD0004\n" + "#" * (1 << 21),
    "other magic": NRRD.replace("NRRD0004", "NRRD0009"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_header_that_leaves_a_doubt_is_refused_in_one_sentence(tmp_path, name):
    (tmp_path / "beside.raw").write_bytes(VOXELS.tobytes())
    with pytest.raises(FormatError) as caught:
        raw_header(written(tmp_path, REFUSED[name], "a.nrrd"))
    assert "expected" in str(caught.value) and len(str(caught.value)) < 500 and str(caught.value).isprintable()
