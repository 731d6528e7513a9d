"""Writes NRRD and MetaImage files for tests, header by header, and compares what is read with SimpleITK."""

from pathlib import Path

import numpy as np
import pytest
import SimpleITK

from sam2sgp.data.io.itk import raw_header
from sam2sgp.errors import FormatError

RNG = np.random.default_rng(0)


NRRD = """NRRD0004
# Complete NRRD file format specification at:
# http://teem.sourceforge.net/nrrd/format.html
type: short
dimension: 3
space: right-anterior-superior
sizes: 3 4 5
space directions: (0.5,0.1,0) (-0.1, 0.5,0) (0,0,2.5e0)
kinds: domain domain domain
endian: big
encoding: raw
space origin: (-1.25,3,.5)
Segment0_ID:=Segment_1
Segment0_Name:=left: lung := Lunge
"""


META = """ObjectType = Image
NDims = 3
BinaryData = True
BinaryDataByteOrderMSB = True
CompressedData = False
TransformMatrix = 0 1 0 -1 0 0 0 0 1
Offset = 10 -20 30.5
CenterOfRotation = 0 0 0
AnatomicalOrientation = RAI
ElementSpacing = 0.5 0.75 2
0008|0060 = CT
DimSize = 3 4 5
ElementType = MET_SHORT
ElementDataFile = LOCAL
"""


VOXELS = RNG.integers(-999, 999, (5, 4, 3)).astype(">i2")


def written(folder: Path, header: str, name: str | None = None, data: bytes | None = None) -> Path:
    """A file of 3x4x5 voxels, or others, with a header; NRRD or MetaImage by its first line."""
    is_nrrd = header.startswith("NRRD")
    path = folder / (name or ("a.nrrd" if is_nrrd else "a.mha"))
    data = VOXELS.tobytes() if data is None else data
    path.write_bytes(header.encode() + b"\n" * is_nrrd + data)
    return path


def is_refused_in_one_sentence(path: Path) -> None:
    """Its header is refused, with its voxels in a file beside it, too."""
    (path.parent / "beside.raw").write_bytes(VOXELS.tobytes())
    with pytest.raises(FormatError) as caught:
        raw_header(path)
    assert "expected" in str(caught.value) and len(str(caught.value)) < 500 and str(caught.value).isprintable()


def same_as_simpleitk(path: Path) -> None:
    expected, header = SimpleITK.ReadImage(str(path)), raw_header(path, detached=True)
    dimensions = expected.GetDimension()
    values = SimpleITK.GetArrayFromImage(expected)
    values = values.transpose(*range(dimensions)[::-1], *range(dimensions, values.ndim))
    found = header.read()
    assert np.array_equal(found.reshape(values.shape), values)
    for index in np.ndindex(*(2,) * dimensions):
        place = expected.TransformIndexToPhysicalPoint([int(number) for number in index])
        at = np.zeros(3)
        at[: min(dimensions, 3)] = index[:3]
        assert np.allclose((header.affine @ [*at, 1])[: min(dimensions, 3)], place[:3], atol=1e-9)


NRRD_REFUSED = {
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


META_REFUSED = {
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
    "units": META.replace("NDims = 3", "NDims = 3\nDistanceUnits = um"),
    "object": META.replace("ObjectType = Image", "ObjectType = Scene"),
    "number": META.replace("10 -20 30.5", "10 -20 inf"),
    "long line": META.replace("0008|0060 = CT", "x = " + "y" * 5000),
    "without an end": META.replace("ElementDataFile = LOCAL\n", "x = y\n" * 200_000),
}
