"""NRRD headers: what ITK reads in them is read, and what leaves a doubt is refused."""

import pytest

from tests.helpers.itk_files import NRRD, NRRD_REFUSED, is_refused_in_one_sentence, same_as_simpleitk, written

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


@pytest.mark.parametrize("name", NRRD_REFUSED)
def test_a_header_that_leaves_a_doubt_is_refused_in_one_sentence(tmp_path, name):
    is_refused_in_one_sentence(written(tmp_path, NRRD_REFUSED[name], "a.nrrd"))
