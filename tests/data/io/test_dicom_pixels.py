"""From a DICOM file to values: by the arithmetic of the standard, and as SimpleITK and pydicom read them."""

import io
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.pixel_data_handlers.util import apply_modality_lut, convert_color_space
from pydicom.uid import UID, ExplicitVRLittleEndian, JPEG2000Lossless, JPEGBaseline8Bit, RLELossless

from sam2sgp.data.io import read_image
from sam2sgp.errors import DataError
from tests.helpers.dicom_files import item, write_dicom, write_enhanced, write_series

RNG = np.random.default_rng(0)
TWELVE_BITS = {"BitsStored": 12, "HighBit": 11, "RescaleSlope": 2.0, "RescaleIntercept": -100.0}


def view(path: Path) -> np.ndarray:
    """(rows, columns) of a single image."""
    return read_image(path).slices[0, 0]


def simpleitk_view(path: Path) -> np.ndarray:
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))[0]


def compressed(path: Path, syntax: str) -> Path:
    """The file, with its pixels as they are stored in JPEG 2000 or RLE."""
    dataset = pydicom.dcmread(path)
    if syntax == RLELossless:
        dataset.compress(RLELossless)
    else:
        stream = io.BytesIO()
        Image.fromarray(dataset.pixel_array.view(np.uint16)).save(stream, "JPEG2000", no_jp2=True)
        dataset.PixelData = encapsulate([stream.getvalue()])
        dataset["PixelData"].is_undefined_length = True
        dataset.file_meta.TransferSyntaxUID = syntax
    dataset.save_as(path)
    return path


@pytest.mark.parametrize("extended", [True, False])
def test_sign_of_fewer_bits_than_allocated(tmp_path, extended):
    values = RNG.integers(-2048, 2048, (6, 7)).astype(np.int16)
    stored = values if extended else (values.view(np.uint16) & 0x0FFF).view(np.int16)
    path = write_dicom(tmp_path / "a.dcm", stored, **TWELVE_BITS)
    # PS3.5 8.1.1: bit 11 is the sign, whatever bits 12 to 15 hold.
    assert np.array_equal(view(path), values * 2.0 - 100)
    assert np.array_equal(view(path), simpleitk_view(path))


def test_bits_beside_the_stored_ones_are_no_part_of_the_values(tmp_path):
    values = RNG.integers(0, 4096, (6, 7)).astype(np.uint16)
    overlay = values | (RNG.integers(0, 16, values.shape) << 12).astype(np.uint16)
    path = write_dicom(tmp_path / "a.dcm", overlay, **TWELVE_BITS)
    assert np.array_equal(view(path), values * 2.0 - 100)
    assert np.array_equal(view(compressed(path, RLELossless)), values * 2.0 - 100)
    # Values in the upper bits, as some old scanners stored them.
    path = write_dicom(tmp_path / "b.dcm", (values << 4) | 5, **{**TWELVE_BITS, "HighBit": 15})
    assert np.array_equal(view(path), values * 2.0 - 100)
    assert any("12 bits stored are read from bit 15 down" in warning for warning in read_image(path).warnings)
    path = write_dicom(tmp_path / "c.dcm", values, BitsStored=12, HighBit=7)
    with pytest.raises(DataError, match="c.dcm.*BitsStored <= HighBit"):
        read_image(path)


@pytest.mark.parametrize("kind", [np.uint16, np.int16])
def test_a_high_bit_that_the_values_contradict_is_refused(tmp_path, kind):
    values = RNG.integers(0, 4096, (6, 7)).astype(np.uint16)
    values = (values.astype(int) - 2048).astype(kind) if kind is np.int16 else values
    tags = {**TWELVE_BITS, "HighBit": 15}
    # SimpleITK and pydicom read these as they are, dcmtk a sixteenth of them.
    path = write_dicom(tmp_path / "a.dcm", values, **tags)
    assert np.array_equal(simpleitk_view(path), values * 2.0 - 100)
    with pytest.raises(DataError, match="a.dcm: expected values in the upper bits.*set HighBit to 11"):
        read_image(path)
    # Few grey values in the upper bits leave the lower ones empty.
    dark = (np.abs(values) & 7).astype(kind)
    assert np.array_equal(view(write_dicom(tmp_path / "b.dcm", dark << 4, **tags)), dark * 2.0 - 100)


@pytest.mark.skipif(shutil.which("dcm2pnm") is None, reason="needs dcmtk")
def test_values_in_the_upper_bits_are_read_as_dcmtk_does(tmp_path):
    values = RNG.integers(0, 4096, (64, 64)).astype(np.uint16)
    path = write_dicom(tmp_path / "a.dcm", values << 4, "MR", BitsStored=12, HighBit=15)
    subprocess.run(["dcm2pnm", "+opw", "+Ww", "2048", "4096", path, tmp_path / "a.pgm"], check=True)
    shown = np.asarray(Image.open(tmp_path / "a.pgm"), float)
    assert np.abs(shown / 65535 * 4095 - view(path)).max() < 1


@pytest.mark.parametrize("syntax", [None, RLELossless, JPEG2000Lossless])
def test_modality_lookup_table_is_applied(tmp_path, syntax):
    values = RNG.integers(0, 1024, (64, 64)).astype(np.uint16)
    table = (65535 - np.arange(1000) * 64).astype(np.uint16)
    sequence = item(LUTDescriptor=[1000, 24, 16], ModalityLUTType="US", LUTData=table.tobytes())
    path = write_dicom(tmp_path / "a.dcm", values, "DX", BitsStored=12, HighBit=11, ModalityLUTSequence=sequence)
    dataset = pydicom.dcmread(path)
    if syntax:
        compressed(path, syntax)
    # PS3.3 C.11.1.1.1: values below the first that is mapped get the first entry, those above the last the last.
    expected = table[np.clip(values.astype(int) - 24, 0, 999)]
    assert np.array_equal(view(path), expected)
    assert np.array_equal(expected, apply_modality_lut(dataset.pixel_array, dataset))


@pytest.mark.parametrize(
    ("photometric", "shape", "inverted"),
    [
        ("MONOCHROME2", "IDENTITY", False),
        ("MONOCHROME2", "INVERSE", True),
        ("MONOCHROME1", None, True),
        # As the standard wants it: both say the same.
        ("MONOCHROME1", "INVERSE", True),
    ],
)
@pytest.mark.parametrize("syntax", [None, JPEG2000Lossless])
def test_low_values_that_are_bright_are_inverted_once(tmp_path, photometric, shape, inverted, syntax):
    values = RNG.integers(0, 4096, (64, 64)).astype(np.uint16)
    tags = {"PhotometricInterpretation": photometric, "PresentationLUTShape": shape}
    path = write_dicom(tmp_path / "a.dcm", values, "DX", BitsStored=12, HighBit=11, **tags)
    if syntax:
        compressed(path, syntax)
    assert np.array_equal(view(path), 4095.0 - values if inverted else values)


@pytest.mark.parametrize("syntax", [None, JPEG2000Lossless])
@pytest.mark.parametrize(("photometric", "dark"), [("MONOCHROME2", 700), ("MONOCHROME1", 3000)])
def test_padding_is_as_dark_as_the_darkest_pixel(tmp_path, photometric, dark, syntax):
    values = RNG.integers(700, 3001, (64, 64)).astype(np.uint16)
    values[:2, :2] = [[700, 3000], [700, 3000]]
    padded = values.copy()
    padded[40:], padded[:, 50:] = 0, 5
    tags = {"PixelPaddingValue": 0, "PixelPaddingRangeLimit": 8, "PhotometricInterpretation": photometric}
    path = write_dicom(tmp_path / "a.dcm", padded, "DX", BitsStored=12, HighBit=11, **tags)
    if syntax:
        compressed(path, syntax)
    values[padded < 9] = dark
    assert np.array_equal(view(path), 4095.0 - values if photometric == "MONOCHROME1" else values)


def test_padding_of_signed_values_may_be_written_as_an_unsigned_number(tmp_path):
    values = RNG.integers(-1000, 1000, (6, 7)).astype(np.int16)
    values[0] = -2000
    path = write_dicom(tmp_path / "a.dcm", values, "MR")
    dataset = pydicom.dcmread(path)
    dataset.add_new("PixelPaddingValue", "US", 63536)
    dataset.save_as(path)
    assert np.array_equal(view(path), np.where(values == -2000, values[1:].min(), values))


@pytest.mark.parametrize("tag", ["RGB", "YBR_FULL_422"])
@pytest.mark.parametrize("stored", ["RGB", "YCbCr"])
def test_a_jpeg_streams_own_marker_tells_its_colours(tmp_path, tag, stored):
    rows, columns = np.mgrid[:48, :64]
    pixels = np.stack([rows * 4, columns * 3, 255 - rows * 2], -1).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=95, keep_rgb=stored == "RGB", subsampling=0)
    path = write_dicom(tmp_path / "a.dcm", pixels, "US", PhotometricInterpretation=tag)
    dataset = pydicom.dcmread(path)
    dataset.PixelData = encapsulate([stream.getvalue()])
    dataset["PixelData"].is_undefined_length = True
    dataset.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    dataset.save_as(path)
    found = read_image(path).slices[0].transpose(1, 2, 0)
    # Decoders of one standard differ by rounding.
    assert np.abs(found - np.asarray(Image.open(stream).convert("RGB"), float)).max() < 6


def test_hounsfield_units_are_never_inverted(tmp_path):
    values = RNG.integers(0, 3000, (6, 7)).astype(np.uint16)
    tags = {"PhotometricInterpretation": "MONOCHROME1", "RescaleSlope": 1, "RescaleIntercept": -1024}
    assert np.array_equal(view(write_dicom(tmp_path / "a.dcm", values, "CT", **tags)), values - 1024.0)


def test_enhanced_frames_lie_by_their_positions_and_have_their_own_slopes(tmp_path):
    volume = RNG.integers(0, 3000, (5, 6, 7)).astype(np.uint16)
    slopes = [1.0, 2.0, 0.5, 4.0, 0.25]
    path = write_enhanced(tmp_path / "ct.dcm", volume, [3, 1, 4, 0, 2], slopes=slopes)
    image = read_image(path)
    assert np.array_equal(image.slices[:, 0], volume * np.array(slopes)[:, None, None] - 1024)
    assert np.allclose(image.geometry.spacing, (2.5, 0.8, 0.7)) and image.modality == "CT"
    classic = read_image(write_series(tmp_path / "classic", volume)).geometry
    assert np.allclose(image.geometry.affine, classic.affine)
    with pytest.raises(DataError, match="each slice position once.*frame.*split the series"):
        read_image(write_enhanced(tmp_path / "twice.dcm", volume, [0, 1, 2, 2, 3]))


@pytest.mark.parametrize(
    ("sequence", "tags", "message"),
    [
        ("PlaneOrientationSequence", {"ImageOrientationPatient": [0.0, 1, 0, 0, 0, -1]}, "ImageOrientationPatient"),
        ("PixelMeasuresSequence", {"PixelSpacing": [0.8, 0.8], "SliceThickness": 2.5}, "PixelSpacing"),
    ],
)
def test_enhanced_frames_of_two_orientations_or_spacings_are_refused(tmp_path, sequence, tags, message):
    path = write_enhanced(tmp_path / "ct.dcm", np.zeros((3, 6, 7), np.uint16), [0, 1, 2])
    dataset = pydicom.dcmread(path)
    setattr(dataset.PerFrameFunctionalGroupsSequence[1], sequence, item(**tags))
    dataset.save_as(path)
    with pytest.raises(DataError, match=f"ct.dcm: expected slices of one size and orientation, found {message}.*frame"):
        read_image(path)


def test_a_rescale_that_all_enhanced_frames_share_is_of_those_without_their_own(tmp_path):
    volume = RNG.integers(0, 3000, (3, 6, 7)).astype(np.uint16)
    path = write_enhanced(tmp_path / "ct.dcm", volume, [2, 0, 1], slopes=[1.0, 2.0, 3.0])
    dataset = pydicom.dcmread(path)
    for frame in (0, 1):
        del dataset.PerFrameFunctionalGroupsSequence[frame].PixelValueTransformationSequence
    shared = item(RescaleSlope=4.0, RescaleIntercept=7.0)
    dataset.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence = shared
    dataset.save_as(path)
    expected = np.stack([4.0 * volume[0] + 7, 2.0 * volume[1] - 1024, 4.0 * volume[2] + 7])
    assert np.array_equal(read_image(path).slices[:, 0], expected)


def test_high_throughput_jpeg_2000_is_decoded_and_private_syntaxes_are_named(tmp_path, monkeypatch):
    # Not known to pydicom 2, which would not write them.
    monkeypatch.setattr(UID, "is_compressed", property(lambda uid: uid not in (ExplicitVRLittleEndian,)))
    values = RNG.integers(0, 4096, (64, 64)).astype(np.uint16)
    path = write_dicom(tmp_path / "a.dcm", values, **TWELVE_BITS)
    # Not high-throughput itself, but OpenJPEG decodes both by what the code stream says.
    assert np.array_equal(view(compressed(path, UID("1.2.840.10008.1.2.4.201"))), values * 2.0 - 100)
    for uid, name in (("1.2.840.113619.5.2", "a private one"), ("1.2.840.10008.1.2.4.102", "MPEG-4")):
        dataset = pydicom.dcmread(path)
        dataset.file_meta.TransferSyntaxUID = UID(uid)
        dataset.is_implicit_VR, dataset.is_little_endian = False, True
        dataset.save_as(tmp_path / "b.dcm")
        with pytest.raises(DataError, match=f"b.dcm: .*{name}.*[(]{uid}[)]; export .*Explicit VR Little Endian"):
            read_image(tmp_path / "b.dcm")


@pytest.mark.parametrize("bits", [10, 16])
def test_deep_colours_fill_the_range_of_colours(tmp_path, bits):
    colours = RNG.integers(0, 2**bits, (6, 7, 3)).astype(np.uint16)
    path = write_dicom(tmp_path / "a.dcm", colours, "US", BitsStored=bits, HighBit=bits - 1)
    expected = pydicom.dcmread(path).pixel_array / (2**bits - 1) * 255
    image = read_image(path)
    assert image.is_rgb and np.allclose(image.slices[0].transpose(1, 2, 0), expected, atol=1e-3)
    write_dicom(path, colours, "US", BitsStored=bits, HighBit=bits - 1, PhotometricInterpretation="YBR_FULL")
    with pytest.raises(DataError, match=f"expected colours of 8 bits or RGB, found YBR_FULL of {bits} bits"):
        read_image(path)


def test_colours_in_the_upper_bits_are_shifted_and_signed_ones_refused(tmp_path):
    colours = RNG.integers(0, 256, (6, 7, 3)).astype(np.uint8)
    path = write_dicom(tmp_path / "a.dcm", colours.astype(np.uint16) << 8, "US", BitsStored=8, HighBit=15)
    assert np.array_equal(read_image(path).slices[0].transpose(1, 2, 0), colours)
    write_dicom(path, colours.view(np.int8), "US")
    with pytest.raises(DataError, match="a.dcm: expected colours from 0 up, found signed ones"):
        read_image(path)


@pytest.mark.parametrize("shared", [True, False])
def test_how_much_is_stored_says_whether_pixels_share_colours(tmp_path, shared):
    colours = convert_color_space(RNG.integers(0, 256, (6, 8, 3)).astype(np.uint8), "RGB", "YBR_FULL")
    content = colours
    if shared:
        # PS3.3 C.7.6.3.1.2: two lights, then the colours that both have.
        colours[:, 1::2, 1:] = colours[:, ::2, 1:]
        content = np.stack([colours[:, ::2, 0], colours[:, 1::2, 0], colours[:, ::2, 1], colours[:, ::2, 2]], -1)
    tags = {"PhotometricInterpretation": "YBR_FULL_422", "PixelData": content.tobytes()}
    image = read_image(write_dicom(tmp_path / "a.dcm", colours, "US", **tags))
    assert np.array_equal(image.slices[0].transpose(1, 2, 0), convert_color_space(colours, "YBR_FULL", "RGB"))


@pytest.mark.parametrize("words, bits", [(np.uint8, 8), (np.uint16, 8), (np.uint16, 16)])
def test_palette_entries_of_8_bits_may_be_stored_in_words_of_16(tmp_path, words, bits):
    table = RNG.integers(0, 256, (256, 3))
    index = RNG.integers(0, 256, (6, 7)).astype(np.uint8)
    tags = {}
    for column, colour in enumerate(("Red", "Green", "Blue")):
        tags[f"{colour}PaletteColorLookupTableData"] = table[:, column].astype(words).tobytes()
        tags[f"{colour}PaletteColorLookupTableDescriptor"] = [256, 0, bits]
    image = read_image(write_dicom(tmp_path / "a.dcm", index, "US", PhotometricInterpretation="PALETTE COLOR", **tags))
    assert image.is_rgb and np.array_equal(image.slices[0].transpose(1, 2, 0), table[index])
