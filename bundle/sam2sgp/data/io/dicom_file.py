"""DICOM files, opened by pydicom so that they can't unpack, or be understood, to more than they should.

pydicom makes objects of some hundred bytes of elements and items that take eight bytes in a file, unpacks a deflated
file whole, and counts on nothing of it being large. So it gets the file through `_Reads`, which counts.
"""

import math
import os
import struct
import time
from itertools import pairwise
from pathlib import Path
from typing import IO

import pydicom
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import RawDataElement
from pydicom.encaps import generate_pixel_data_frame
from pydicom.uid import (
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

from sam2sgp.data.io.formats import has_dicom_elements, has_dicom_magic
from sam2sgp.data.io.limits import check_memory, check_present, check_ratio
from sam2sgp.errors import DataError, FormatError

UNCOMPRESSED = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian)
# pydicom reads two or three times for an element, once for an item: for an enhanced object of a thousand frames
# 100,000 times, in a second or two of work. Large pieces are values, and take their own time.
MOST_READS, MOST_SECONDS = 500_000, 6.0
LARGE_READ, BYTES_PER_SECOND = 1 << 10, 100 << 20
# Of values that are only understood when they are asked for, and of sequences among these.
LONGEST_TEXT = 1 << 20
LONGEST_SEQUENCE, MOST_ITEMS = 32 << 20, 400_000
ITEM_TAGS = (b"\xfe\xff\x00\xe0", b"\xff\xfe\xe0\x00")
TEXTS = ("AE", "AS", "AT", "CS", "DA", "DS", "DT", "IS", "LO", "PN", "SH", "TM", "UC", "UI", "UR")
# A run of two bytes unpacks to so many; what little runs can become is not looked at.
RLE_HEADER, LONGEST_RUN, NO_RUN, FEW_RUNS = 64, 64, 128, 32 << 20
PIXEL_TAGS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")


def open_dicom(path: Path, pixels: bool = False, limit: int | None = None) -> pydicom.Dataset:
    """A file's header, or with `pixels` all of it, still compressed.

    The preamble of 128 bytes and the file meta header may lack; a transfer syntax is stated in any case.

    Args:
        path: of the file.
        pixels: whether to read the pixels too.
        limit: bytes that it may take as float32; see `sam2sgp.data.io.limits`.

    Raises:
        FormatError: it is deflated as a whole, or its header has more elements than any image's.
        DataError: its pixels are missing in part, or too many.
        Exception: pydicom's of many kinds for another content.
    """
    bare = not has_dicom_magic(path)
    if bare and not has_dicom_elements(path):
        raise FormatError(
            f"{path}: expected a DICOM file, found neither the letters DICM nor the first tags of one; copy it again."
        )
    with open(path, "rb") as file:
        reads = _Reads(file, path)
        try:
            dataset = pydicom.dcmread(reads, stop_before_pixels=not pixels, force=bare)
        except Exception:
            # pydicom makes errors of its own of those that come while it reads.
            if reads.refusal:
                raise reads.refusal from None
            raise
    _check_values(dataset, path)
    if "TransferSyntaxUID" not in dataset.file_meta:
        little = ImplicitVRLittleEndian if dataset.is_implicit_VR else ExplicitVRLittleEndian
        dataset.file_meta.TransferSyntaxUID = little if dataset.is_little_endian else ExplicitVRBigEndian
    if "Rows" in dataset:
        stored = sum(len(dataset.get(name) or b"") for name in PIXEL_TAGS) if pixels else os.path.getsize(path)
        _check_pixels(dataset, stored, path, limit)
        if pixels and dataset.file_meta.TransferSyntaxUID == RLELossless and "PixelData" in dataset:
            _check_runs(dataset, path)
    return dataset


class _Reads:
    """A file as pydicom reads it: piece by piece, and not too many of them.

    Attributes:
        refusal: why it is not read any further; None while it is.
    """

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self._file, self._path = file, path
        self._left, self._end = MOST_READS, time.thread_time() + MOST_SECONDS
        self.name = str(path)
        self.seek, self.tell, self.close = file.seek, file.tell, file.close
        self.refusal: FormatError | None = None

    def read(self, size: int = -1) -> bytes:
        self._left -= size < LARGE_READ
        if size < 0:
            # All that is left, to be unpacked whole, whatever it unpacks to.
            self.refusal = FormatError(
                f"{self._path}: expected DICOM that isn't deflated as a whole; store it in another transfer syntax."
            )
        elif self._left < 0 or time.thread_time() > self._end:
            self.refusal = _too_many(self._path)
        if self.refusal:
            raise self.refusal
        data = self._file.read(size)
        if len(data) >= LARGE_READ:
            self._end += len(data) / BYTES_PER_SECOND
        return data


def _check_values(dataset: pydicom.Dataset, path: Path) -> None:
    """Refuse values that become far larger once they are understood. Pixels and private values aren't looked at."""
    for element in dataset.values():
        value = element.value
        if not isinstance(element, RawDataElement) or element.tag.is_private or len(value or b"") <= LONGEST_TEXT:
            continue
        try:
            kind = element.VR if element.VR not in (None, "UN") else dictionary_VR(element.tag)
        except KeyError:
            continue
        items = sum(value.count(tag) for tag in ITEM_TAGS) if kind == "SQ" else 0
        if kind in TEXTS or items > MOST_ITEMS or (kind == "SQ" and len(value) > LONGEST_SEQUENCE):
            raise _too_many(path)


def _check_runs(dataset: pydicom.Dataset, path: Path) -> None:
    """Refuse run lengths (PS3.5 G) that unpack to far more than their planes of bytes: pydicom unpacks all of them."""
    frames, rows, columns = frame_shape(dataset)
    plane = rows * columns
    for frame in generate_pixel_data_frame(dataset.PixelData, frames):
        count, *starts = struct.unpack("<16L", frame[:RLE_HEADER].ljust(RLE_HEADER, b"\0"))
        for start, end in pairwise([*starts[: min(count, len(starts))], len(frame)]):
            runs = memoryview(frame)[start:end]
            if len(runs) * LONGEST_RUN > FEW_RUNS + plane and _unpacked_runs(runs, 2 * plane) > 2 * plane:
                raise DataError(
                    f"{path}: expected planes of {plane} bytes, found run lengths of {len(runs)} bytes that unpack to "
                    "more; export it again."
                )


def _unpacked_runs(runs: memoryview, enough: int) -> int:
    """Bytes that run lengths unpack to, counted no further than to `enough`, and one more for too many runs."""
    size = place = steps = 0
    while place < len(runs) and size <= enough:
        code = runs[place]
        steps += 1
        if steps > enough:
            return enough + 1
        if code > NO_RUN:
            size, place = size + 257 - code, place + 2
        else:
            size, place = (size + code + 1, place + code + 2) if code < NO_RUN else (size, place + 1)
    return size


def _too_many(path: Path) -> FormatError:
    return FormatError(
        f"{path}: expected the header of a DICOM image, found one of more elements than any has; export it again."
    )


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
