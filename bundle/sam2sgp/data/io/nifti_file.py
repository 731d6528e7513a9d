"""NIfTI files, opened by nibabel once their fixed header has been judged: one file, no surprises in size.

The header has 348 or 540 bytes of numbers and can't refer to anything. Extensions behind it are skipped, not parsed.
Pairs of `.hdr` and `.img` are refused, as are Analyze files, which say nothing about left and right.
"""

import io
import math
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import nibabel as nib
import numpy as np
from nibabel.arrayproxy import ArrayProxy

from sam2sgp.data.io.limits import check_memory, check_present, check_ratio
from sam2sgp.data.io.raw import LONGEST_REST, inflated
from sam2sgp.errors import DataError, FormatError

# By the header's size: its class, and where its magic is.
KINDS = {348: (nib.Nifti1Header, 344, b"n+1\0"), 540: (nib.Nifti2Header, 4, b"n+2\0\r\n\x1a\n")}
ORDERS: tuple[Literal["little", "big"], ...] = ("little", "big")
HEADER_BYTES = 540
GZIP_MAGIC = b"\x1f\x8b"
# Extensions hold text and DICOM headers.
LARGEST_OFFSET = 64 << 20


def open_nifti(path: Path, label: bool = False, limit: int | None = None) -> nib.Nifti1Image | nib.Nifti2Image:
    """A file whose voxels are all there, as nibabel's image; compressed ones are unpacked in memory.

    Args:
        path: of any name; whether it is compressed is told by its content.
        label: a class map, which may have shrunk more than an image can.
        limit: bytes that it may take as float32; see `sam2sgp.data.io.limits`.

    Raises:
        DataError: another content, voxels that are missing, damaged or too many.
    """
    header = nifti_header(path, label, limit)
    kind = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    content: str | io.BytesIO = str(path)
    if _is_gzip(path):
        content = unpacked = io.BytesIO()
        unpacked.writelines(_unpacked(path, header))
    elif str(path).lower().endswith(".gz"):
        # nibabel goes by the name.
        content = io.BytesIO(path.read_bytes())
    return kind(ArrayProxy(content, header), header.get_best_affine(), header)


def stored_voxel_sizes(path: Path) -> np.ndarray:
    """Sizes (3,) of a voxel as a file that `open_nifti` opens states them in pixdim.

    nibabel reads 1 where they are 0, and leaves out their sign.
    """
    content = _head(path)
    kind = KINDS[next(size for size in KINDS if size in (int.from_bytes(content[:4], order) for order in ORDERS))][0]
    return kind(content[: kind.sizeof_hdr], check=False)["pixdim"][1:4]


def nifti_header(path: Path, label: bool = False, limit: int | None = None) -> nib.Nifti1Header | nib.Nifti2Header:
    """A file's header, once what it promises is judged. Arguments and errors are those of `open_nifti`."""
    size = os.path.getsize(path)
    header = _parsed(_head(path), path)
    # Colours are three or four values.
    check_memory(path, header.get_data_shape(), max(len(header.get_data_dtype().names or ()), 1), limit)
    if not _is_gzip(path):
        check_present(path, _data_bytes(header), size - header.get_data_offset())
    elif not label:
        check_ratio(path, _data_bytes(header), size)
    return header


def _head(path: Path) -> bytes:
    """The first bytes of a file, unpacked, in which its header is."""
    with open(path, "rb") as file, _reading_gzip(path):
        if not _is_gzip(path):
            return file.read(HEADER_BYTES)
        content = b""
        # The members of a gzip file may be shorter than the header.
        for data in inflated(file):
            content += data
            if len(content) >= HEADER_BYTES:
                break
    return content[:HEADER_BYTES]


def _parsed(content: bytes, name: object) -> nib.Nifti1Header | nib.Nifti2Header:
    """The header at the beginning of a file. Raises FormatError for another content."""
    size = next((size for size in KINDS if size in (int.from_bytes(content[:4], order) for order in ORDERS)), None)
    if size is None or len(content) < size:
        raise FormatError(f"{name}: expected a NIfTI file, found another content; export it as NIfTI in one file.")
    kind, where, magic = KINDS[size]
    if content[where : where + len(magic)] != magic:
        raise FormatError(f"{name}: expected header and voxels in one NIfTI file, found another kind; export it again.")
    try:
        header = kind(content[:size])
        shape, offset = header.get_data_shape(), header.get_data_offset()
        header.get_data_dtype(), header.get_best_affine()
    except Exception as error:
        # nibabel raises types of its own, and numpy's, for values that make no sense.
        raise FormatError(
            f"{name}: expected a header of NIfTI, found a damaged one ({error}); copy or export it again."
        ) from error
    if not 1 <= int(header["dim"][0]) <= 7 or min(shape) < 0 or not size <= offset <= LARGEST_OFFSET:
        raise FormatError(
            f"{name}: expected sizes above zero and voxels behind the header, found {shape} at byte {offset}; export "
            "it again."
        )
    return header


def check_nifti(path: Path, label: bool = False, limit: int | None = None) -> None:
    """Judge a file whole, keeping nothing of it. Arguments and errors are those of `open_nifti`."""
    header = nifti_header(path, label, limit)
    if _is_gzip(path):
        for _ in _unpacked(path, header):
            pass


def _unpacked(path: Path, header: nib.Nifti1Header) -> Iterator[bytes]:
    """A gzip file's content up to the end of the voxels; its sum is checked at its very end."""
    most, seen = header.get_data_offset() + _data_bytes(header), 0
    with open(path, "rb") as file, _reading_gzip(path):
        for data in inflated(file):
            yield data[: max(most - seen, 0)]
            seen += len(data)
            if seen > most + LONGEST_REST:
                raise DataError(f"{path}: expected {most} bytes as its header says, found more; export it again.")
    check_present(path, _data_bytes(header), seen - header.get_data_offset())


@contextmanager
def _reading_gzip(name: object) -> Iterator[None]:
    try:
        yield
    except EOFError as error:
        raise DataError(f"{name}: expected a whole gzip file, found that {error}; send it again.") from error
    except zlib.error as error:
        raise FormatError(
            f"{name}: expected a whole gzip file, found another content ({error}); send it again."
        ) from error


def _is_gzip(path: Path) -> bool:
    """Whether a file is compressed, whatever its name says: files are renamed."""
    with open(path, "rb") as file:
        return file.read(len(GZIP_MAGIC)) == GZIP_MAGIC


def _data_bytes(header: nib.Nifti1Header) -> int:
    return math.prod(header.get_data_shape()) * header.get_data_dtype().itemsize
