"""Voxels that lie in a file as plain numbers, compressed or not, behind a text header: NRRD and MetaImage.

The header is parsed once, by `nrrd` or `metaimage` beside this module, into a `RawHeader`; the voxels are read from
where that says, and from nowhere else. No other library looks at the file, so none can understand it otherwise.
A header that leaves any doubt is refused: white space in odd places, a key that comes twice, voxels in other files by
list or pattern, skipped lines or bytes. `RawHeader.save` writes the same image with a header of our own making.

Functions may be called from several threads at once.
"""

import math
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from sam2sgp.data.io.limits import check_memory, check_present, check_ratio
from sam2sgp.errors import DataError
from sam2sgp.files import BYTES_AT_A_TIME

# Segmentations with a hundred segments, of which each takes ten lines, have headers of 100 kB.
LONGEST_HEADER = 1 << 20
# Short, because it is copied for each member of a gzip file; those of bgzip are short too.
PACKED_CHUNK = 1 << 16
MOST_MEMBERS = 200_000
GZIP_MAGIC = b"\x1f\x8b"
# What may follow the voxels: padding.
LONGEST_REST = 1 << 20


@dataclass(frozen=True, eq=False)
class RawHeader:
    """What a header says.

    Attributes:
        path: of the file.
        data_path: of the file with the voxels: the same one, or for a detached header one in the same folder.
        offset: where the voxels begin there.
        encoding: "raw", "zlib" or "gzip".
        dtype: of a value, with its byte order.
        shape: of the grid, the axis that varies fastest first.
        channels: values per voxel; None where the file has no axis for them.
        channel_axis: at which place among all axes the channels are.
        affine: (4, 4) float64, voxel -> world in mm, LPS.
        has_spacing: whether the header says how large a voxel is; 1 mm is taken where it doesn't.
        is_complex: pairs of real and imaginary parts.
        fields: what else the header says, as {key: value}: for NRRD its key/value pairs, such as the names of segments.
        canonical: the header in its only form, without the lines that say where the voxels are.
        last: those lines for voxels that follow in the same file; `%d` stands for their size as stored.
    """

    path: Path
    data_path: Path
    offset: int
    encoding: str
    dtype: np.dtype
    shape: tuple[int, ...]
    channels: int | None
    channel_axis: int
    affine: np.ndarray
    has_spacing: bool
    is_complex: bool
    fields: dict[str, str]
    canonical: bytes
    last: bytes

    @property
    def file_shape(self) -> tuple[int, ...]:
        """Of all axes as stored, the fastest first."""
        if self.channels is None:
            return self.shape
        return (*self.shape[: self.channel_axis], self.channels, *self.shape[self.channel_axis :])

    @property
    def data_bytes(self) -> int:
        """That the voxels take when unpacked."""
        return math.prod(self.file_shape) * self.dtype.itemsize

    def check(self, label: bool = False, limit: int | None = None) -> None:
        """See `sam2sgp.data.io.limits`. Raises DataError for a header that promises too much."""
        check_memory(self.path, self.shape, self.channels or 1, limit)
        found = os.path.getsize(self.data_path) - self.offset
        if self.encoding == "raw":
            check_present(self.path, self.data_bytes, found)
        elif not label:
            check_ratio(self.path, self.data_bytes, found)

    def read(self, label: bool = False, limit: int | None = None) -> np.ndarray:
        """The voxels: (*shape) or, with channels, (*shape, channels), as stored.

        Raises DataError where the voxels are not all there, damaged, or too many.
        """
        self.check(label=label, limit=limit)
        array = np.empty(self.file_shape, self.dtype, order="F")
        # Memory is only taken where something is written, so a promise that isn't kept costs nothing.
        target = array.reshape(-1, order="F").view(np.uint8).data
        filled = 0
        for data in self._unpacked():
            filled_after = min(filled + len(data), len(target))
            target[filled:filled_after] = data[: filled_after - filled]
            filled = filled_after
        return array if self.channels is None else np.moveaxis(array, self.channel_axis, -1)

    def save(self, path: str | os.PathLike) -> None:
        """Write the same image with the canonical header, and nothing behind its voxels.

        Raises DataError where the voxels are not all there, damaged, or too many.
        """
        for _ in self._unpacked():
            pass
        with open(path, "wb") as target, open(self.data_path, "rb") as source:
            source.seek(self.offset)
            if self.encoding == "raw":
                left = self.data_bytes
            else:
                for _ in inflated(source):
                    pass
                left = source.tell() - self.offset
                source.seek(self.offset)
            target.write(self.canonical + self.last.replace(b"%d", str(left).encode()))
            while data := source.read(min(BYTES_AT_A_TIME, left)):
                target.write(data)
                left -= len(data)

    def _unpacked(self) -> Iterator[bytes]:
        """The voxels, at most `BYTES_AT_A_TIME`; DataError at the end if they are too few or too many."""
        found = 0
        try:
            with open(self.data_path, "rb") as file:
                file.seek(self.offset)
                for data in _chunks(file, self.data_bytes) if self.encoding == "raw" else inflated(file):
                    found += len(data)
                    if found > self.data_bytes + LONGEST_REST:
                        raise DataError(
                            f"{self.path}: expected {self.data_bytes} bytes of voxels as its header says, found more; "
                            "export it again."
                        )
                    yield data
        except (zlib.error, EOFError, OSError) as error:
            raise DataError(
                f"{self.path}: expected voxels packed by {self.encoding}, found damaged ones ({error}); copy or export "
                "it again."
            ) from error
        check_present(self.path, self.data_bytes, found)


def inflated(file: IO[bytes]) -> Iterator[bytes]:
    """What is left of a file, unpacked, at most `BYTES_AT_A_TIME`: one zlib stream, or gzip members in a row.

    At the end the file stands behind what was unpacked. Raises zlib.error for other content, EOFError where the end is
    missing.
    """
    packed = file.read(PACKED_CHUNK)
    for _ in range(MOST_MEMBERS):
        # 32: zlib's header or gzip's.
        unpacker = zlib.decompressobj(zlib.MAX_WBITS + 32)
        while not unpacker.eof:
            packed = packed or file.read(PACKED_CHUNK)
            data = unpacker.decompress(packed, BYTES_AT_A_TIME)
            if not data and not packed:
                raise EOFError("its end is missing")
            packed = unpacker.unconsumed_tail
            if data:
                yield data
        packed = unpacker.unused_data or file.read(PACKED_CHUNK)
        if not packed.startswith(GZIP_MAGIC):
            file.seek(-len(packed), os.SEEK_CUR)
            return
    raise EOFError(f"more than {MOST_MEMBERS} members")


def _chunks(file: IO[bytes], size: int) -> Iterator[bytes]:
    while size and (data := file.read(min(BYTES_AT_A_TIME, size))):
        size -= len(data)
        yield data
