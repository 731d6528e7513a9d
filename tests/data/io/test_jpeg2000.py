"""JPEG 2000 with tiles or parts of tiles missing, which decoders leave black."""

import io
import struct

import numpy as np
import pydicom
import pytest
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000Lossless

from sam2sgp.data.io import read_image
from sam2sgp.data.io.jpeg2000 import TILE_PART, missing_tiles
from sam2sgp.errors import DataError
from tests.helpers.uploads import GREY, dicom, picture

# Three by four tiles.
TILED = picture(GREY, "JPEG2000", no_jp2=True, tile_size=(8, 8))
PARTS = [place for place in range(len(TILED)) if TILED.startswith(TILE_PART + b"\0\x0a", place)]


def as_dicom(*streams: bytes) -> bytes:
    dataset = pydicom.dcmread(io.BytesIO(dicom(NumberOfFrames=1)))
    dataset.file_meta.TransferSyntaxUID = JPEG2000Lossless
    dataset.NumberOfFrames = len(streams)
    dataset.PixelData = encapsulate(list(streams))
    dataset["PixelData"].VR, dataset["PixelData"].is_undefined_length = "OB", True
    target = io.BytesIO()
    dataset.save_as(target)
    return target.getvalue()


def test_whole_streams_are_read(tmp_path):
    for stream in (TILED, picture(GREY, "JPEG2000", no_jp2=True), picture(GREY, "JPEG2000")):
        assert missing_tiles(stream) == 0
    (tmp_path / "a.dcm").write_bytes(as_dicom(TILED))
    assert np.array_equal(read_image(tmp_path / "a.dcm").slices[0, 0], GREY)


@pytest.mark.parametrize("number", [0, 2, 11])
def test_a_stream_without_one_of_its_tiles_is_refused(tmp_path, number):
    end = PARTS[number + 1] if number + 1 < len(PARTS) else len(TILED) - 2
    stream = TILED[: PARTS[number]] + TILED[end:]
    (tmp_path / "a.dcm").write_bytes(as_dicom(stream))
    with pytest.raises(DataError, match="1 are missing"):
        read_image(tmp_path / "a.dcm")


def test_a_tile_of_which_a_part_is_missing_counts_as_missing():
    last = PARTS[-1]
    stream = bytearray(TILED)
    # It says that it is the first of two parts, and leaves its length open, as the last one may.
    struct.pack_into(">IBB", stream, last + 6, 0, 0, 2)
    assert missing_tiles(bytes(stream)) == 1
    struct.pack_into(">IBB", stream, last + 6, 0, 0, 1)
    assert missing_tiles(bytes(stream)) == 0


def test_what_is_no_stream_is_left_to_the_decoder():
    for stream in (b"", b"\xff\x4f\xff\x51", TILED[:20], bytes(100)):
        assert missing_tiles(stream) == 0
