"""DICOM files are opened whatever they lack, and no further than they should be."""

import io
import struct

import numpy as np
import pydicom
import pytest
from pydicom.uid import RLELossless

from sam2sgp.data.io import dicom_file, is_image, read_image
from sam2sgp.data.io.formats import without_pixels
from sam2sgp.errors import DataError
from tests.helpers.dicom_files import item, write_dicom, write_enhanced
from tests.helpers.uploads import GREY, dicom

RNG = np.random.default_rng(0)


def test_a_class_of_several_values_is_none(tmp_path):
    path = tmp_path / "x.dcm"
    path.write_bytes(dicom().replace(b"1.2.840.10008.5.", b"1.2.840.10008\\5.", 1))
    assert without_pixels(path) is None and is_image(path)


def test_enhanced_objects_and_private_values_are_read_as_before(tmp_path):
    write_enhanced(tmp_path / "e.dcm", np.stack([GREY] * 40).astype(np.uint16), list(range(40)))
    assert read_image(tmp_path / "e.dcm").slices.shape[0] == 40
    private = pydicom.dcmread(io.BytesIO(dicom(SequenceOfUltrasoundRegions=item(RegionSpatialFormat=1))))
    private.private_block(0x19, "house", create=True).add_new(1, "UN", bytes(2 << 20))
    private.save_as(tmp_path / "p.dcm")
    assert read_image(tmp_path / "p.dcm").slices.any()


def test_run_lengths_that_unpack_to_far_more_than_the_picture_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(dicom_file, "FEW_RUNS", 0)
    sound = dicom(syntax=RLELossless)
    (tmp_path / "sound.dcm").write_bytes(sound)
    expected = read_image(tmp_path / "sound.dcm").slices
    (tmp_path / "plain.dcm").write_bytes(dicom())
    assert np.array_equal(expected, read_image(tmp_path / "plain.dcm").slices)
    for runs in (b"\x81\x00" * 100_000, b"\x80" * 100_000):
        dataset = pydicom.dcmread(io.BytesIO(sound))
        dataset.PixelData = pydicom.encaps.encapsulate([struct.pack("<16L", 1, 64, *[0] * 14) + runs])
        dataset.save_as(tmp_path / "bomb.dcm")
        with pytest.raises(DataError, match="run lengths"):
            read_image(tmp_path / "bomb.dcm")


@pytest.mark.parametrize("implicit", [True, False])
def test_file_without_preamble_and_meta_header_is_read(tmp_path, implicit):
    values = RNG.integers(0, 4096, (6, 7)).astype(np.uint16)
    dataset = pydicom.dcmread(
        write_dicom(
            tmp_path / "whole.dcm", values, BitsStored=12, HighBit=11, RescaleSlope=2.0, RescaleIntercept=-100.0
        )
    )
    bare = pydicom.Dataset({element.tag: element for element in dataset})
    bare.is_little_endian, bare.is_implicit_VR = True, implicit
    pydicom.dcmwrite(tmp_path / "bare", bare)
    assert (tmp_path / "bare").read_bytes()[:2] == b"\x08\x00"
    assert np.array_equal(read_image(tmp_path / "bare").slices[0, 0], values * 2.0 - 100)
    (tmp_path / "noise.dcm").write_bytes(RNG.bytes(2000))
    with pytest.raises(DataError, match="noise.dcm: expected a DICOM file"):
        read_image(tmp_path / "noise.dcm")
