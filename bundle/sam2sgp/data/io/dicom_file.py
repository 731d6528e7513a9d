"""DICOM files, opened by pydicom once it is known that they can't unpack to more than they should."""

import math
import os
from pathlib import Path

import pydicom
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from sam2sgp.data.io.formats import has_dicom_elements, has_dicom_magic
from sam2sgp.data.io.limits import check_memory, check_present, check_ratio
from sam2sgp.errors import DataError, FormatError

UNCOMPRESSED = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian)
# Where the file meta header of a file ends, at the latest.
LONGEST_META = 4096
PIXEL_TAGS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")


def open_dicom(path: Path, pixels: bool = False, limit: int | None = None) -> pydicom.Dataset:
    """A file's header, or with `pixels` all of it, still compressed.

    The preamble of 128 bytes and the file meta header may lack; a transfer syntax is stated in any case.

    Args:
        path: of the file.
        pixels: whether to read the pixels too.
        limit: bytes that it may take as float32; see `sam2sgp.data.io.limits`.

    Raises:
        FormatError: it is deflated as a whole.
        DataError: its pixels are missing in part, or too many.
        Exception: pydicom's of many kinds for another content.
    """
    bare = not has_dicom_magic(path)
    if bare and not has_dicom_elements(path):
        raise FormatError(
            f"{path}: expected a DICOM file, found neither the letters DICM nor the first tags of one; copy it again."
        )
    with open(path, "rb") as file:
        meta = file.read(LONGEST_META)
    if DeflatedExplicitVRLittleEndian.encode() in meta:
        # It would be unpacked whole, whatever it unpacks to.
        raise FormatError(
            f"{path}: expected DICOM that isn't deflated as a whole; store it in another transfer syntax."
        )
    dataset = pydicom.dcmread(path, stop_before_pixels=not pixels, force=bare)
    if "TransferSyntaxUID" not in dataset.file_meta:
        little = ImplicitVRLittleEndian if dataset.is_implicit_VR else ExplicitVRLittleEndian
        dataset.file_meta.TransferSyntaxUID = little if dataset.is_little_endian else ExplicitVRBigEndian
    if "Rows" in dataset:
        stored = sum(len(dataset.get(name) or b"") for name in PIXEL_TAGS) if pixels else os.path.getsize(path)
        _check_pixels(dataset, stored, path, limit)
    return dataset


def frame_shape(dataset: pydicom.Dataset) -> tuple[int, int, int]:
    """(frames, rows, columns) of a file."""
    return int(dataset.get("NumberOfFrames") or 1), int(dataset.Rows or 0), int(dataset.get("Columns") or 0)


def samples_of(dataset: pydicom.Dataset) -> int:
    """Values per pixel once palettes are applied."""
    is_palette = dataset.get("PhotometricInterpretation") == "PALETTE COLOR"
    return 3 if is_palette else int(dataset.get("SamplesPerPixel") or 1)


def _check_pixels(dataset: pydicom.Dataset, stored: int, path: Path, limit: int | None) -> None:
    shape, samples = frame_shape(dataset), int(dataset.get("SamplesPerPixel") or 1)
    if min(*shape, samples) < 1:
        raise DataError(
            f"{path}: expected frames, rows, columns and samples, found {shape} and {samples}; export it again."
        )
    check_memory(path, shape, samples_of(dataset), limit)
    promised = math.prod(shape) * samples * int(dataset.get("BitsAllocated") or 8) // 8
    if dataset.file_meta.TransferSyntaxUID not in UNCOMPRESSED:
        check_ratio(path, promised, stored)
    elif str(dataset.get("PhotometricInterpretation")).startswith("YBR_FULL_422"):
        check_present(path, promised * 2 // 3, stored)
    else:
        check_present(path, promised, stored)
