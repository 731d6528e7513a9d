"""MetaImage headers: what ITK reads in them is read, and what leaves a doubt is refused."""

import pytest

from sam2sgp.data.io.itk import raw_header
from sam2sgp.errors import FormatError
from tests.data.io.itk_files import META, VOXELS, same_as_simpleitk, written

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


REFUSED = {
    "elsewhere": META.replace("LOCAL", "/etc/passwd"),
    "beside": META.replace("LOCAL", "beside.raw"),
    "list": META.replace("LOCAL", "LIST\n/etc/passwd"),
    "list of dimensions": META.replace("LOCAL", "LIST 2D\n/etc/passwd"),
    "pattern": META.replace("LOCAL", "x%03d.raw 1 5 1"),
    "decoy after space": " ElementDataFile = /etc/passwd\n" + META,
    "decoy after tab": "\tElementDataFile = /etc/passwd\n" + META,
    "decoy after return": "\rElementDataFile = /etc/passwd\n" + META,
    "decoy with a colon": "ElementDataFile : /etc/passwd\n" + META,
    "decoy with both": "ElementDataFile : /etc/passwd = x\n" + META,
    "decoy with a tab": "ElementDataFile\t= /etc/passwd\n" + META,
    "first is elsewhere": "ElementDataFile = /etc/passwd\n" + META,
    "skip": META.replace("NDims = 3", "NDims = 3\nHeaderSize = 100"),
    "skip to the end": META.replace("NDims = 3", "NDims = 3\nHeaderSize = -1"),
    "text": META.replace("BinaryData = True", "BinaryData = False"),
    "twice": META.replace("NDims = 3", "NDims = 3\nNDims = 3"),
    "synonym twice": META.replace("NDims = 3", "NDims = 3\nPosition = 1 1 1"),
    "dimensions": META.replace("NDims = 3", "NDims = 10"),
    "sizes": META.replace("DimSize = 3 4 5", "DimSize = 3 -4 -5"),
    "channels": META.replace("NDims = 3", "NDims = 3\nElementNumberOfChannels = -1"),
    "type": META.replace("MET_SHORT", "MET_STRING"),
    "object": META.replace("ObjectType = Image", "ObjectType = Scene"),
    "number": META.replace("10 -20 30.5", "10 -20 inf"),
    "long line": META.replace("0008|0060 = CT", "x = " + "y" * 5000),
    "without an end": META.replace("ElementDataFile = LOCAL\n", "x = y\n" * 200_000),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_header_that_leaves_a_doubt_is_refused_in_one_sentence(tmp_path, name):
    (tmp_path / "beside.raw").write_bytes(VOXELS.tobytes())
    with pytest.raises(FormatError) as caught:
        raw_header(written(tmp_path, REFUSED[name], "a.mha"))
    assert "expected" in str(caught.value) and len(str(caught.value)) < 500 and str(caught.value).isprintable()
