"""MetaImage headers: what ITK reads in them is read, and what leaves a doubt is refused."""

import pytest

from tests.helpers.itk_files import META, META_REFUSED, is_refused_in_one_sentence, same_as_simpleitk, written

VARIANTS = {
    "as written": META,
    "of channels": META.replace("DimSize = 3 4 5", "DimSize = 4 5 1\nElementNumberOfChannels = 3"),
    "without geometry": "\n".join(META.splitlines()[:5] + META.splitlines()[11:]) + "\n",
    "of two dimensions": META.replace("NDims = 3", "NDims = 2")
    .replace("0 1 0 -1 0 0 0 0 1", "0 1 -1 0")
    .replace("10 -20 30.5", "1 2")
    .replace("0 0 0\n", "0 0\n")
    .replace("0.5 0.75 2", "0.5 0.75")
    .replace("3 4 5", "12 5"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_values_and_places_are_those_of_simpleitk(tmp_path, name):
    same_as_simpleitk(written(tmp_path, VARIANTS[name]))


@pytest.mark.parametrize("name", META_REFUSED)
def test_a_header_that_leaves_a_doubt_is_refused_in_one_sentence(tmp_path, name):
    is_refused_in_one_sentence(written(tmp_path, META_REFUSED[name], "a.mha"))
