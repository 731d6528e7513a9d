"""From a DICOM file to the values of its frames.

Stored values are decoded, cut to the bits that are stored (PS3.5 8.1.1; those from HighBit down, which earlier editions
let be any bit), and sent through the modality transformation (PS3.3 C.11.1): a lookup table or a slope and an
intercept, of the frame where it has its own. Grey values where low is bright are inverted (MONOCHROME1, Presentation
LUT Shape INVERSE), Hounsfield units excepted. Padding around the image (PS3.3 C.7.5.1.1.2) becomes as dark as the
darkest pixel. Colours become RGB.
"""

import math
import tempfile
from copy import copy
from pathlib import Path

import numpy as np
from pydicom import Dataset
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate, generate_pixel_data_frame
from pydicom.pixel_data_handlers.util import apply_color_lut, apply_modality_lut, convert_color_space
from pydicom.uid import (
    JPEG2000,
    UID,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLosslessP14,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
    SecondaryCaptureImageStorage,
)

from sam2sgp.data.io.decoding import decode_dicom
from sam2sgp.data.io.dicom_file import UNCOMPRESSED, frame_shape, open_dicom
from sam2sgp.data.io.jpeg import damage
from sam2sgp.data.io.jpeg2000 import missing_tiles
from sam2sgp.errors import DataError

NATIVE_SYNTAXES = (
    ImplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    RLELossless,
)
# High-Throughput JPEG 2000, which pydicom 2 doesn't know by name.
HTJ2K_SYNTAXES = tuple(UID(f"1.2.840.10008.1.2.4.{number}") for number in (201, 202, 203))
JPEG_2000_SYNTAXES = (JPEG2000Lossless, JPEG2000, *HTJ2K_SYNTAXES)
GDCM_SYNTAXES = (
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLosslessP14,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    *JPEG_2000_SYNTAXES,
)
STANDARD_ROOT = "1.2.840.10008."
# Of these the code stream may say itself what its colours are.
JPEG_SYNTAXES = (JPEGBaseline8Bit, JPEGExtended12Bit)
# Of these, damage is told from what libjpeg only warns of.
HUFFMAN_SYNTAXES = (*JPEG_SYNTAXES, JPEGLosslessP14, JPEGLosslessSV1)
JFIF, ADOBE, START_OF_SCAN = 0xE0, 0xEE, 0xDA
# What a decoder needs to know of a file; nothing else of it is shown to GDCM.
PIXEL_TAGS = (
    "Rows",
    "Columns",
    "NumberOfFrames",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PlanarConfiguration",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PixelData",
)


def read_dataset(file: Path, pixels: bool = True, limit: int | None = None) -> Dataset:
    """`open_dicom`, of which every error is a DataError."""
    try:
        return open_dicom(file, pixels, limit)
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"{file}: expected a DICOM file, found a damaged one or another format ({error}); copy it again."
        ) from error


def frame_item(header: Dataset, frame: int, name: str) -> Dataset:
    """The functional group `name` of a frame of an enhanced object: its own, else the shared one, else none (empty)."""
    for groups, number in (("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0)):
        sequence = header.get(groups) or []
        if number < len(sequence) and sequence[number].get(name):
            return sequence[number][name][0]
    return Dataset()


def read_frames(file: Path) -> np.ndarray:
    """(frames, rows, columns, C) float32: the values of all frames of a file, colours as RGB of 0..255.

    Raises DataError for a transfer syntax that can't be decoded, or a header that contradicts itself.
    """
    dataset = read_dataset(file)
    frames = int(dataset.get("NumberOfFrames") or 1)
    samples = int(dataset.get("SamplesPerPixel") or 1)
    photometric = str(dataset.get("PhotometricInterpretation") or "MONOCHROME2")
    shape = frames, dataset.Rows, dataset.Columns
    is_native = dataset.file_meta.TransferSyntaxUID in NATIVE_SYNTAXES
    if samples >= 3 and dataset.get("PixelRepresentation"):
        raise DataError(f"{file}: expected colours from 0 up, found signed ones; export it as RGB of 8 bits.")
    if photometric == "YBR_FULL_422" and _is_of_full_length(dataset):
        # Some programs leave the tag as it was when they decompress.
        photometric = dataset.PhotometricInterpretation = "YBR_FULL"
    stored = dataset.pixel_array if is_native else _decoded(file, dataset)
    if photometric == "PALETTE COLOR":
        stored = apply_color_lut(_used_bits(file, stored, dataset, is_native), dataset)[..., :3]
        has_16_bits = stored.dtype == np.uint16 and not _is_padded_palette(dataset)
        return (stored / 257.0 if has_16_bits else stored).reshape(*shape, 3).astype(np.float32)
    if samples >= 3:
        bits = int(dataset.get("BitsStored") or 8)
        if int(dataset.BitsAllocated) > 8:
            stored = _used_bits(file, stored, dataset, is_native)
        if is_native and photometric != "RGB":
            if bits > 8:
                raise DataError(
                    f"{file}: expected colours of 8 bits or RGB, found {photometric} of {bits} bits; export it as RGB."
                )
            stored = convert_color_space(stored, photometric, "RGB")
        scale = 255.0 / (2**bits - 1) if bits > 8 else 1.0
        return stored.reshape(*shape, -1).astype(np.float32) * np.float32(scale)
    stored = stored.reshape(shape)
    values = np.empty((*shape, 1), np.float32)
    for frame in range(frames):
        kept = _used_bits(file, stored[frame], dataset, is_native)
        values[frame, ..., 0] = _grey_values(kept, dataset, frame)
        _darken(values[frame, ..., 0], _padding(kept, dataset))
    return values


def is_inverted(header: Dataset) -> bool:
    """Whether low values of a grey image are bright."""
    return header.get("PhotometricInterpretation") == "MONOCHROME1" or header.get("PresentationLUTShape") == "INVERSE"


def _is_of_full_length(dataset: Dataset) -> bool:
    """Whether uncompressed pixels have all values of each colour, none of them shared by two pixels."""
    is_plain = dataset.file_meta.TransferSyntaxUID in UNCOMPRESSED
    size = math.prod(frame_shape(dataset)) * int(dataset.SamplesPerPixel) * int(dataset.BitsAllocated) // 8
    return is_plain and len(dataset.get("PixelData") or b"") >= size


def upper_bits_warning(header: Dataset) -> str | None:
    """What is to be said of values that are stored in upper bits; None where they aren't."""
    bits, high = header.get("BitsStored"), header.get("HighBit")
    is_native = header.file_meta.TransferSyntaxUID in NATIVE_SYNTAXES
    if not bits or high is None or high < bits or not is_native:
        return None
    return (
        f"Its {bits} bits stored are read from bit {high} down, as its HighBit says; programs that ignore HighBit show "
        "other values."
    )


def _padding(stored: np.ndarray, dataset: Dataset) -> np.ndarray:
    """Which stored values are padding: one value, or all up to a limit."""
    if dataset.get("PixelPaddingValue") is None or "PixelData" not in dataset:
        return np.zeros(stored.shape, bool)
    bounds = [dataset.PixelPaddingValue, dataset.get("PixelPaddingRangeLimit", dataset.PixelPaddingValue)]
    if dataset.PixelRepresentation:
        # Some programs write the bits of a negative value as an unsigned one.
        full = 1 << int(dataset.BitsAllocated)
        bounds = [bound - full if bound >= full // 2 else bound for bound in bounds]
    return (stored >= min(bounds)) & (stored <= max(bounds))


def _darken(values: np.ndarray, padding: np.ndarray) -> None:
    """Give padding, in place, the lowest of the other values."""
    if padding.any() and not padding.all():
        values[padding] = values[~padding].min()


def _is_padded_palette(dataset: Dataset) -> bool:
    """Whether the entries of a palette are 8 bits in words of 16, as PS3.3 C.7.6.3.1.5 says that some programs do."""
    words = [
        np.frombuffer(dataset.get(f"{colour}PaletteColorLookupTableData") or b"", np.uint16)
        for colour in ("Red", "Green", "Blue")
    ]
    highest = max(int(entries.max(initial=0)) for entries in words)
    return all(entries.size for entries in words) and highest < 256


def _used_bits(file: Path, stored: np.ndarray, dataset: Dataset, is_native: bool) -> np.ndarray:
    """The values that the stored bits hold, whatever the bits beside them hold: overlays, or no sign.

    Decoders leave the values in the lowest bits; where they aren't compressed, HighBit says where they end.
    """
    if "PixelData" not in dataset:
        return stored  # floating point (PS3.3 C.7.6.24)
    allocated, bits = int(dataset.BitsAllocated), int(dataset.BitsStored)
    high = int(dataset.get("HighBit", bits - 1)) if is_native else bits - 1
    if not (0 < bits <= high + 1 <= allocated):
        raise DataError(
            f"{file}: expected BitsStored <= HighBit + 1 <= BitsAllocated, found {bits}, {high} + 1 and {allocated}; "
            "the header is damaged: export the image again."
        )
    values = np.asarray(stored).astype(np.int64)
    if bits == allocated:
        return values
    shift = high + 1 - bits
    lowest = -(1 << (bits - 1)) if dataset.PixelRepresentation else 0
    if shift and (values & ((1 << shift) - 1)).any() and lowest <= values.min() and values.max() < lowest + (1 << bits):
        raise DataError(
            f"{file}: expected values in the upper bits, as its HighBit {high} says of {bits} bits stored in "
            f"{allocated}, found them in the lower bits, where programs read them differently; set HighBit to "
            f"{bits - 1} if the values are right as they are, or export the image again."
        )
    values = (values >> shift) & ((1 << bits) - 1)
    if dataset.PixelRepresentation:
        values -= (values >> (bits - 1)) << bits
    return values


def _grey_values(stored: np.ndarray, dataset: Dataset, frame: int) -> np.ndarray:
    transformation = frame_item(dataset, frame, "PixelValueTransformationSequence") or dataset
    inverted = is_inverted(dataset)
    is_hounsfield = dataset.get("Modality") == "CT"
    if dataset.get("ModalityLUTSequence"):
        values = apply_modality_lut(stored, dataset)
        highest = 2.0 ** int(dataset.ModalityLUTSequence[0].LUTDescriptor[2]) - 1
        return highest - values if inverted else values
    if inverted and not is_hounsfield:
        # Lowest plus highest storable value: 2 ** bits - 1 unsigned, -1 signed.
        is_whole = "PixelData" in dataset and not dataset.PixelRepresentation
        stored = (2.0 ** int(dataset.BitsStored) - 1 if is_whole else -1.0) - stored
    slope = float(transformation.get("RescaleSlope") or 1.0)
    return stored * slope + float(transformation.get("RescaleIntercept") or 0.0)


def _decoded(file: Path, dataset: Dataset) -> np.ndarray:
    """Stored values of a compressed file, colours as RGB.

    GDCM knows every codec, but rescales, inverts and applies palettes in its own way; so it gets a copy without the
    tags that would make it do so.
    """
    syntax = UID(dataset.file_meta.TransferSyntaxUID)
    if syntax not in GDCM_SYNTAXES:
        name = syntax.name if syntax.startswith(STANDARD_ROOT) and syntax.name != syntax else "a private one"
        raise DataError(
            f"{file}: expected a transfer syntax of still images that the standard defines, found {name} ({syntax}); "
            "export the image as Explicit VR Little Endian, or convert it with the vendor's or archive's software."
        )
    if syntax in JPEG_2000_SYNTAXES:
        streams = generate_pixel_data_frame(dataset.PixelData, int(dataset.get("NumberOfFrames") or 1))
        if missing := sum(map(missing_tiles, streams)):
            raise DataError(
                f"{file}: expected all tiles of its JPEG 2000 pixels, found that {missing} are missing in whole or in "
                "part; copy or export it again."
            )
    meta = FileMetaDataset()
    # OpenJPEG tells High-Throughput JPEG 2000 by its code stream, and pydicom 2 can't write its UIDs.
    meta.TransferSyntaxUID = JPEG2000 if syntax in HTJ2K_SYNTAXES else syntax
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = dataset.get("SOPInstanceUID") or "1.2.3"
    bare = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    bare.is_little_endian, bare.is_implicit_VR = True, False
    bare.SOPClassUID, bare.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    for name in PIXEL_TAGS:
        if name in dataset:
            bare[name] = copy(dataset[name])
    if int(dataset.get("SamplesPerPixel") or 1) == 1:
        bare.PhotometricInterpretation = "MONOCHROME2"
    elif syntax in JPEG_SYNTAXES and (colours := _colours_of(dataset)):
        bare.PhotometricInterpretation = colours
    pixels = _decoded_copy(file, bare, dataset)
    if syntax in HUFFMAN_SYNTAXES:

        def decode(streams: list[bytes]) -> np.ndarray | None:
            bare.PixelData = encapsulate(streams)
            try:
                return _decoded_copy(file, bare, dataset)
            except DataError:
                return None

        streams = list(generate_pixel_data_frame(dataset.PixelData, len(pixels)))
        if len(streams) == len(pixels) and (fault := damage(streams, pixels, decode)):
            raise DataError(f"{file}: expected a readable image, found that {fault} (JPEG); copy or export it again.")
    return pixels


def _decoded_copy(file: Path, bare: FileDataset, dataset: Dataset) -> np.ndarray:
    """(frames, rows, columns, C) as GDCM decodes `bare`, the tags of pixels of a file."""
    with tempfile.TemporaryDirectory(prefix="sam2sgp-") as folder:
        path = Path(folder) / "pixels.dcm"
        bare.save_as(path, write_like_original=False)
        try:
            return decode_dicom(path, frame_shape(dataset), max(3, int(dataset.get("SamplesPerPixel") or 1)))
        except DataError as error:
            raise DataError(str(error).replace(str(path), str(file))) from error


def _colours_of(dataset: Dataset) -> str | None:
    """What a JPEG stream says of its colours, which rules over the tag as in image viewers; None where it says nothing.

    Adobe's marker tells RGB from YCbCr; JFIF allows no colours but YCbCr.
    """
    stream = next(generate_pixel_data_frame(dataset.PixelData, int(dataset.get("NumberOfFrames") or 1)), b"")
    place, found = 2, None
    while place + 4 <= len(stream) and stream[place] == 0xFF and stream[place + 1] != START_OF_SCAN:
        length = int.from_bytes(stream[place + 2 : place + 4], "big")
        content = stream[place + 4 : place + 2 + length]
        if stream[place + 1] == ADOBE and content.startswith(b"Adobe") and len(content) >= 12:
            return "YBR_FULL" if content[11] else "RGB"
        if stream[place + 1] == JFIF and content.startswith(b"JFIF"):
            found = "YBR_FULL"
        place += 2 + length
    return found
