"""DICOM files, opened by pydicom once it is known that they can't unpack to more than they should."""

import os
from pathlib import Path

import pydicom
from pydicom.uid import DeflatedExplicitVRLittleEndian

from sam2sgp.data.io.limits import check_memory, check_present, check_ratio
from sam2sgp.errors import DataError


def open_dicom(path: Path, pixels: bool = False, name: object = None, limit: int | None = None) -> pydicom.Dataset:
    """A file's header, or with `pixels` all of it, still compressed.

    Args:
        path: of the file.
        pixels: whether to read the pixels too.
        name: what to call it in errors; its path by default.
        limit: bytes that it may take as float32; see `sam2sgp.data.io.limits`.

    Raises:
        DataError: its pixels are missing in part or too many, or it is deflated as a whole.
        Exception: pydicom's of many kinds for another content.
    """
    name = name or path
    meta = pydicom.filereader.read_file_meta_info(path)
    if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
        # It would be unpacked whole, whatever it unpacks to.
        raise DataError(f"{name}: expected DICOM that isn't deflated as a whole; store it in another transfer syntax.")
    dataset = pydicom.dcmread(path, stop_before_pixels=not pixels)
    if "Rows" in dataset:
        _check_pixels(dataset, len(dataset.get("PixelData") or b"") if pixels else os.path.getsize(path), name, limit)
    return dataset


def _check_pixels(dataset: pydicom.Dataset, stored: int, name: object, limit: int | None) -> None:
    frames, samples = (int(dataset.get(key) or 1) for key in ("NumberOfFrames", "SamplesPerPixel"))
    shape = frames, int(dataset.Rows or 0), int(dataset.get("Columns") or 0)
    if min(frames, samples) < 1:
        raise DataError(f"{name}: expected at least one frame and sample, found {frames} and {samples}; export it again.")
    check_memory(name, shape, 3 if dataset.get("PhotometricInterpretation") == "PALETTE COLOR" else samples, limit)
    promised = frames * shape[1] * shape[2] * samples * int(dataset.get("BitsAllocated") or 8) // 8
    if dataset.file_meta.TransferSyntaxUID.is_compressed:
        check_ratio(name, promised, stored)
    elif str(dataset.get("PhotometricInterpretation")).startswith("YBR_FULL_422"):
        check_present(name, promised * 2 // 3, stored)
    else:
        check_present(name, promised, stored)
