"""Writes NRRD and MetaImage files for tests, header by header, and compares what is read with SimpleITK."""

from pathlib import Path

import numpy as np
import SimpleITK

from sam2sgp.data.io.itk import raw_header

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
