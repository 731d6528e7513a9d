"""NRRD and MetaImage headers: what ITK reads in them is read, and what leaves a doubt is refused."""

import gzip
import zlib

import numpy as np
import pytest
import SimpleITK

from sam2sgp.data.io import read_image, read_label
from sam2sgp.data.io.itk import raw_header
from sam2sgp.errors import DataError, FormatError, TooLargeError
from tests.data.io.itk_files import META, NRRD, RNG, VOXELS, same_as_simpleitk, written

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
    "MetaImage": META,
    "MetaImage of channels": META.replace("DimSize = 3 4 5", "DimSize = 4 5 1\nElementNumberOfChannels = 3"),
    "MetaImage without geometry": "\n".join(META.splitlines()[:5] + META.splitlines()[11:]) + "\n",
    "MetaImage of two dimensions": META.replace("NDims = 3", "NDims = 2")
    .replace("0 1 0 -1 0 0 0 0 1", "0 1 -1 0")
    .replace("10 -20 30.5", "1 2")
    .replace("0 0 0\n", "0 0\n")
    .replace("0.5 0.75 2", "0.5 0.75")
    .replace("3 4 5", "12 5"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_values_and_places_are_those_of_simpleitk(tmp_path, name):
    same_as_simpleitk(written(tmp_path, VARIANTS[name]))


@pytest.mark.parametrize("dtype", "u1 i1 u2 i2 u4 i4 u8 i8 f4 f8".split())
@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_every_type_and_compression_that_itk_writes_is_read_exactly(tmp_path, dtype, suffix):
    for compressed in (False, True):
        image = SimpleITK.GetImageFromArray(RNG.integers(0, 120, (4, 5, 6)).astype(dtype))
        SimpleITK.WriteImage(image, str(tmp_path / f"a{suffix}"), compressed)
        same_as_simpleitk(tmp_path / f"a{suffix}")


@pytest.mark.parametrize("header", [NRRD, META], ids=["NRRD", "MetaImage"])
def test_a_file_that_is_saved_again_is_the_same_image_without_the_rest(tmp_path, header):
    packed = header.replace("encoding: raw", "encoding: gzip").replace(
        "CompressedData = False", "CompressedData = True"
    )
    pack = gzip.compress if header is NRRD else zlib.compress
    for text, data in ((header, VOXELS.tobytes()), (packed, pack(VOXELS.tobytes()))):
        path = written(tmp_path, text, data=data + b"something behind")
        original = raw_header(path)
        path = tmp_path / f"again{path.suffix}"
        original.save(path)
        again = raw_header(path)
        assert np.array_equal(again.read(), VOXELS.transpose(2, 1, 0)) and np.array_equal(again.affine, original.affine)
        assert again.fields == original.fields and again.canonical == original.canonical
        assert path.read_bytes() == again.canonical + again.last.replace(b"%d", str(len(data)).encode()) + data
        assert b"0008|0060" not in path.read_bytes() and b"#" not in again.canonical
        same_as_simpleitk(path)
    if header is NRRD:
        assert again.fields["Segment0_Name"] == "left: lung := Lunge"


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
    "MetaImage elsewhere": META.replace("LOCAL", "/etc/passwd"),
    "MetaImage beside": META.replace("LOCAL", "beside.raw"),
    "MetaImage list": META.replace("LOCAL", "LIST\n/etc/passwd"),
    "MetaImage list of dimensions": META.replace("LOCAL", "LIST 2D\n/etc/passwd"),
    "MetaImage pattern": META.replace("LOCAL", "x%03d.raw 1 5 1"),
    "MetaImage decoy after space": " ElementDataFile = /etc/passwd\n" + META,
    "MetaImage decoy after tab": "\tElementDataFile = /etc/passwd\n" + META,
    "MetaImage decoy after return": "\rElementDataFile = /etc/passwd\n" + META,
    "MetaImage decoy with a colon": "ElementDataFile : /etc/passwd\n" + META,
    "MetaImage decoy with both": "ElementDataFile : /etc/passwd = x\n" + META,
    "MetaImage decoy with a tab": "ElementDataFile\t= /etc/passwd\n" + META,
    "MetaImage first is elsewhere": "ElementDataFile = /etc/passwd\n" + META,
    "MetaImage skip": META.replace("NDims = 3", "NDims = 3\nHeaderSize = 100"),
    "MetaImage skip to the end": META.replace("NDims = 3", "NDims = 3\nHeaderSize = -1"),
    "MetaImage text": META.replace("BinaryData = True", "BinaryData = False"),
    "MetaImage twice": META.replace("NDims = 3", "NDims = 3\nNDims = 3"),
    "MetaImage synonym twice": META.replace("NDims = 3", "NDims = 3\nPosition = 1 1 1"),
    "MetaImage dimensions": META.replace("NDims = 3", "NDims = 10"),
    "MetaImage sizes": META.replace("DimSize = 3 4 5", "DimSize = 3 -4 -5"),
    "MetaImage channels": META.replace("NDims = 3", "NDims = 3\nElementNumberOfChannels = -1"),
    "MetaImage type": META.replace("MET_SHORT", "MET_STRING"),
    "MetaImage object": META.replace("ObjectType = Image", "ObjectType = Scene"),
    "MetaImage number": META.replace("10 -20 30.5", "10 -20 inf"),
    "MetaImage long line": META.replace("0008|0060 = CT", "x = " + "y" * 5000),
    "MetaImage without an end": META.replace("ElementDataFile = LOCAL\n", "x = y\n" * 200_000),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_header_that_leaves_a_doubt_is_refused_in_one_sentence(tmp_path, name):
    (tmp_path / "beside.raw").write_bytes(VOXELS.tobytes())
    suffix = "a.nrrd" if REFUSED[name].startswith("NRRD") else "a.mha"
    with pytest.raises(FormatError) as caught:
        raw_header(written(tmp_path, REFUSED[name], suffix))
    assert "expected" in str(caught.value) and len(str(caught.value)) < 500 and str(caught.value).isprintable()


def test_voxels_in_another_file_are_read_from_the_same_folder_only(tmp_path):
    (tmp_path / "series").mkdir()
    (tmp_path / "outside.raw").write_bytes(VOXELS.tobytes())
    (tmp_path / "series" / "beside.raw").write_bytes(VOXELS.tobytes())
    (tmp_path / "series" / "linked.raw").symlink_to(tmp_path / "outside.raw")
    path = written(tmp_path / "series", META.replace("LOCAL", "beside.raw"), "a.mhd", b"")
    assert np.array_equal(raw_header(path, detached=True).read(), VOXELS.transpose(2, 1, 0))
    assert read_image(path).geometry.native_shape == (3, 4, 5)
    (tmp_path / "series" / "Scan 1 (copy).raw").write_bytes(VOXELS.tobytes())
    same_as_simpleitk(written(tmp_path / "series", META.replace("LOCAL", "Scan 1 (copy).raw"), "Scan 1.mhd", b""))
    (tmp_path / "series" / "LIST 2").write_bytes(VOXELS.tobytes())
    outside = "../outside.raw", str(tmp_path / "outside.raw"), "linked.raw"
    for name in (*outside, ".", "none.raw", "beside.raw x", "LIST 2"):
        with pytest.raises(FormatError, match="same folder|another"):
            read_image(written(tmp_path / "series", META.replace("LOCAL", name), "b.mhd", b""))


def test_what_is_promised_and_not_there_costs_no_memory(tmp_path):
    huge = META.replace("DimSize = 3 4 5", "DimSize = 300 400 500\nElementNumberOfChannels = 100")
    with pytest.raises(TooLargeError, match="MB in memory"):
        raw_header(written(tmp_path, huge)).check(limit=1 << 30)
    with pytest.raises(DataError, match="expected 12000000000 bytes"):
        raw_header(written(tmp_path, huge)).check(limit=1 << 40)
    bomb = NRRD.replace("raw", "gzip").replace("3 4 5", "512 512 512")
    for label in (False, True):
        path = written(tmp_path, bomb, data=gzip.compress(bytes(1 << 20)))
        with pytest.raises(DataError, match="which no image does" if not label else "expected 268435456 bytes"):
            raw_header(path).read(label)


def test_a_damaged_or_longer_stream_is_refused(tmp_path):
    header, data = NRRD.replace("encoding: raw", "encoding: gzip"), gzip.compress(VOXELS.tobytes())
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 64
    for content in (data[:-20], bytes(flipped), b"no gzip", b"", gzip.compress(bytes(4 << 20))):
        with pytest.raises(DataError, match="expected"):
            raw_header(written(tmp_path, header, data=content)).read()
    in_two = gzip.compress(VOXELS.tobytes()[:50]) + gzip.compress(VOXELS.tobytes()[50:])
    found = raw_header(written(tmp_path, header, data=in_two)).read()
    assert np.array_equal(found, VOXELS.transpose(2, 1, 0))


def test_a_label_larger_than_its_image_is_not_unpacked(tmp_path):
    image = read_image(written(tmp_path, NRRD))
    bomb = NRRD.replace("raw", "gzip").replace("3 4 5", "512 512 512")
    with pytest.raises(TooLargeError):
        read_label(written(tmp_path, bomb, "b.nrrd", gzip.compress(bytes(1 << 28))), image.geometry)
