"""NIfTI files, opened by nibabel once their fixed header has been judged: one file, no surprises in size.

The header has 348 or 540 bytes of numbers and can't refer to anything. Extensions behind it are skipped, not parsed.
Pairs of `.hdr` and `.img` are refused, as are Analyze files, which say nothing about left and right.
"""

import io
import math
import os
import zlib
from pathlib import Path
from typing import IO

import nibabel as nib
from nibabel.arrayproxy import ArrayProxy

from sam2sgp.data.io.limits import check_memory, check_present, check_ratio
from sam2sgp.data.io.raw import LONGEST_REST, inflated
from sam2sgp.errors import DataError

MAGICS = {348: (nib.Nifti1Image, 344, b"n+1\0"), 540: (nib.Nifti2Image, 4, b"n+2\0\r\n\x1a\n")}
HEADER_BYTES = 540
# Extensions hold text and DICOM headers.
LARGEST_OFFSET = 64 << 20


def open_nifti(
    path: Path, label: bool = False, name: object = None, limit: int | None = None
) -> nib.Nifti1Image | nib.Nifti2Image:
    """A file whose voxels are all there, as nibabel's image; compressed ones are unpacked in memory.

    Args:
        path: ends in .nii.gz or .nii.
        label: a class map, which may have shrunk more than an image can.
        name: what to call it in errors; its path by default.
        limit: bytes that it may take as float32; see `sam2sgp.data.io.limits`.

    Raises:
        DataError: another content, voxels that are missing, damaged or too many.
    """
    name = name or path
    if path.name.lower().endswith(".gz"):
        return _from_gzip(path, label, name, limit)
    with open(path, "rb") as file:
        kind, header = read_header(file.read(HEADER_BYTES), name)
    check_memory(name, header.get_data_shape(), _values(header), limit)
    check_present(name, _data_bytes(header), os.path.getsize(path) - header.get_data_offset())
    return kind(ArrayProxy(str(path), header), header.get_best_affine(), header)


def read_header(content: bytes, name: object) -> tuple[type, nib.Nifti1Header]:
    """nibabel's class of image, and the header at the beginning of a file. Raises DataError for another content."""
    for order in ("little", "big"):
        kind, where, magic = MAGICS.get(int.from_bytes(content[:4], order), (None, 0, b""))
        if kind is not None and content[where : where + len(magic)] == magic:
            break
    else:
        raise DataError(f"{name}: expected a NIfTI file, found another content; export it as NIfTI in one file.")
    size = int.from_bytes(content[:4], order)
    if len(content) < size:
        raise DataError(f"{name}: expected a header of {size} bytes, found {len(content)}; copy or export it again.")
    try:
        header = kind.header_class(content[:size])
        shape, offset = header.get_data_shape(), header.get_data_offset()
        header.get_data_dtype(), header.get_best_affine()
    except Exception as error:
        # nibabel raises types of its own, and numpy's, for values that make no sense.
        raise DataError(f"{name}: expected a header of NIfTI, found a damaged one ({error}); export it again.") from error
    if not 1 <= len(shape) <= 7 or min(shape) < 0 or not size <= offset <= LARGEST_OFFSET:
        raise DataError(
            f"{name}: expected sizes above zero and voxels behind the header, found {shape} at byte {offset}; export it "
            "again."
        )
    return kind, header


def _from_gzip(path: Path, label: bool, name: object, limit: int | None) -> nib.Nifti1Image | nib.Nifti2Image:
    content = io.BytesIO()
    try:
        with open(path, "rb") as file:
            kind, header = _unpack(file, content, os.path.getsize(path), label, name, limit)
    except (zlib.error, EOFError) as error:
        raise DataError(f"{name}: expected a whole gzip file, found it damaged ({error}); send it again.") from error
    check_present(name, _data_bytes(header), content.tell() - header.get_data_offset())
    return kind(ArrayProxy(content, header), header.get_best_affine(), header)


def _unpack(
    file: IO[bytes], content: IO[bytes], packed: int, label: bool, name: object, limit: int | None
) -> tuple[type, nib.Nifti1Header]:
    """Write a gzip file's content up to the end of the voxels; gzip's own sum is checked at its very end."""
    opened, most = None, HEADER_BYTES
    seen = 0
    for data in inflated(file):
        if opened is None:
            # The first piece is far longer than a header, unless the file is.
            opened = kind, header = read_header(data[:HEADER_BYTES], name)
            check_memory(name, header.get_data_shape(), _values(header), limit)
            if not label:
                check_ratio(name, _data_bytes(header), packed)
            most = header.get_data_offset() + _data_bytes(header)
        content.write(data[: max(most - seen, 0)])
        seen += len(data)
        if seen > most + LONGEST_REST:
            raise DataError(f"{name}: expected {most} bytes as its header says, found more; export it again.")
    if opened is None:
        raise EOFError("nothing in it")
    return opened


def _values(header: nib.Nifti1Header) -> int:
    """Per voxel; colours are three or four."""
    return max(len(header.get_data_dtype().names or ()), 1)


def _data_bytes(header: nib.Nifti1Header) -> int:
    return math.prod(header.get_data_shape()) * header.get_data_dtype().itemsize
