"""DICOM headers that unpack, or are understood, to far more than the file: refused before they do."""

import io
import struct
import zlib
from pathlib import Path

import pydicom
import pytest
from pydicom.uid import DeflatedExplicitVRLittleEndian

from lib.checks import UnsupportedFile
from lib.stores.door import admitted
from sam2sgp.data import read_image
from sam2sgp.data.io import dicom_file
from tests.helpers.dicom_files import write_dicom
from tests.helpers.uploads import GREY, dicom

LIMIT = 1 << 28
ITEM = b"\xfe\xff\x00\xe0\0\0\0\0"
UNDEFINED = b"\xff\xff\xff\xff"
# Of a private creator, which no program asks for.
SEQUENCE = struct.pack("<HH", 0x0019, 0x1001) + b"SQ\0\0"


def with_element(element: bytes) -> bytes:
    """A sound file with an element in front of its image, as (0018,xxxx) or (0019,xxxx)."""
    content = dicom()
    place = content.index(struct.pack("<HH", 0x0028, 0x0002))
    return content[:place] + element + content[place:]


def refused(content: bytes, folder: Path) -> str:
    path = folder / "x.dcm"
    path.write_bytes(content)
    with pytest.raises(UnsupportedFile) as told, admitted(path, LIMIT):
        pass
    return str(told.value)


def test_a_deflated_file_is_refused_wherever_its_transfer_syntax_stands(tmp_path):
    dataset = pydicom.dcmread(io.BytesIO(dicom()))
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    dataset.file_meta.PrivateInformationCreatorUID = "1.2.3"
    # Behind the first pages of the file.
    dataset.file_meta.PrivateInformation = bytes(100_000)
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    target = io.BytesIO()
    dataset.save_as(target, write_like_original=False)
    content = target.getvalue()
    # Its syntax is written first: put it last, as some programs do.
    syntax = struct.pack("<HH", 2, 0x10) + b"UI"
    start = content.index(syntax)
    length = 8 + struct.unpack("<H", content[start + 6 : start + 8])[0]
    body = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    end = content.rindex(bytes(100_000)) + 100_000
    moved = content[:start] + content[start + length : end] + content[start : start + length]
    plain = dicom()
    elements = plain[plain.index(struct.pack("<HH", 8, 0x16)) :]
    assert "deflated" in refused(moved + body.compress(elements) + body.flush(), tmp_path)


def test_a_header_of_more_elements_than_any_image_has_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(dicom_file, "MOST_READS", 2000)
    assert read_image(write_dicom(tmp_path / "sound.dcm", GREY, "US")).slices.any()
    end = b"\xfe\xff\xdd\xe0\0\0\0\0"
    assert "elements" in refused(with_element(SEQUENCE + UNDEFINED + ITEM * 2000 + end), tmp_path)
    tiny = b"".join(struct.pack("<HH", 0x0019, 0x1000 + number) + b"LO\0\0" for number in range(2000))
    assert "elements" in refused(with_element(tiny), tmp_path)


def test_a_header_that_takes_too_long_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(dicom_file, "MOST_SECONDS", -1.0)
    assert "elements" in refused(dicom(), tmp_path)


@pytest.mark.parametrize("keyword", ["NumberOfFrames", "PixelSpacing"])
def test_a_value_of_a_million_numbers_is_refused_before_it_is_understood(tmp_path, keyword):
    tag = pydicom.datadict.tag_for_keyword(keyword)
    head = struct.pack("<HH", tag >> 16, tag & 0xFFFF)
    value = b"1\\" * (1 << 20)
    element = head + b"UN\0\0" + struct.pack("<I", len(value)) + value
    assert "elements" in refused(with_element(element), tmp_path)


def test_a_sequence_of_a_known_length_is_judged_before_it_is_understood(tmp_path):
    head = struct.pack("<HH", 0x0018, 0x6011) + b"SQ\0\0"
    value = ITEM * (dicom_file.MOST_ITEMS + 1)
    assert "elements" in refused(with_element(head + struct.pack("<I", len(value)) + value), tmp_path)


def test_sequences_within_each_other_are_an_error_of_the_file(tmp_path):
    one = struct.pack("<HH", 0x0018, 0x6011) + b"SQ\0\0" + UNDEFINED + ITEM[:4] + UNDEFINED
    assert "expected" in refused(with_element(one * 5000), tmp_path)
