"""What one image may take in memory, judged from its header before anything is allocated.

A header is a promise: so many voxels of so many bytes. Two things are asked of it.

* It fits in memory: as float32, as which every image ends up, it takes at most `default_memory()`, or what the caller
  allows.
* The file can keep it. Uncompressed voxels must all be there. Compressed ones must not be a bomb: beyond
  `SMALL_ENOUGH` an image that unpacks to more than `LARGEST_RATIO` times its size isn't one. Scanners' images shrink
  by 2 to 10, masked ones by up to 30. Class maps do shrink by hundreds, so labels are exempt; a label is bounded by its
  image instead, wherever the image is known.
"""

import math
import os
from collections.abc import Sequence

from sam2sgp.errors import DataError, TooLargeError

# An image as float32 may take this part of the machine's memory: reading holds it up to three times for a moment.
SHARE_OF_MEMORY = 1 / 4
BYTES_IN_MEMORY = 4
SMALL_ENOUGH = 64 << 20
LARGEST_RATIO = 100


def default_memory() -> int:
    """Bytes that one image may take as float32 on this machine."""
    return int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * SHARE_OF_MEMORY)


def check_memory(path: object, shape: Sequence[int], channels: int = 1, limit: int | None = None) -> None:
    """Refuse an image that takes more than `limit` bytes (default `default_memory()`) as float32.

    Args:
        path: of the file, for the error.
        shape: of its grid, without channels.
        channels: values per voxel.

    Raises:
        TooLargeError: it takes more.
    """
    needed, limit = math.prod(shape) * channels * BYTES_IN_MEMORY, default_memory() if limit is None else limit
    if needed > limit:
        raise TooLargeError(
            f"{path}: expected an image of at most {limit >> 20} MB in memory, found {_text(shape)} voxels of "
            f"{channels} channels, which take {needed >> 20} MB; crop or resample it."
        )


def check_present(path: object, promised: int, found: int) -> None:
    """Refuse uncompressed voxels of which some are missing: `promised` and `found` in bytes."""
    if found < promised:
        raise DataError(
            f"{path}: expected {promised} bytes of voxels as its header says, found {found}; copy or export it again."
        )


def check_ratio(path: object, unpacked: int, packed: int) -> None:
    """Refuse an image that unpacks to suspiciously many bytes; not for labels (see the module)."""
    if unpacked > SMALL_ENOUGH and unpacked > LARGEST_RATIO * packed:
        raise DataError(
            f"{path}: expected an image, found {packed >> 10} kB that claim to unpack to {unpacked >> 20} MB, which no "
            "image does; store it uncompressed if it is one."
        )


def _text(shape: Sequence[int]) -> str:
    return "x".join(str(length) for length in shape)
