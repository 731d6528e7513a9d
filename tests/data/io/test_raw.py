"""NRRD and MetaImage files: their voxels are where the header says, all of them, and no more than that."""

import gzip
import zlib

import numpy as np
import pytest
import SimpleITK

from sam2sgp.data.io import read_image, read_label
from sam2sgp.data.io.itk import raw_header
from sam2sgp.errors import DataError, FormatError, TooLargeError
from tests.helpers.itk_files import META, NRRD, RNG, VOXELS, same_as_simpleitk, written


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
