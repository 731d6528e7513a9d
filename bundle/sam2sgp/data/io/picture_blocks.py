"""The blocks that a picture file is made of, counted before its decoder sees any.

Decoders make objects of each chunk of a PNG, segment of a JPEG, and directory or value of a TIFF, in Python and one by
one: half a million of some bytes each, in a file of 8 MB, keep one busy for ten seconds. So their headers are walked
here, no further than to the limits. What is damaged is left to the decoder, which says so.
"""

import os
import re
import stat
import struct
from pathlib import Path
from typing import IO

from sam2sgp.errors import FormatError

# A few dozen are common, and of pixels one for each 8 kB.
MOST_BLOCKS, BYTES_PER_BLOCK = 10_000, 2048
# Of all that is no pixels: texts, colour profiles, thumbnails.
MOST_BYTES = 16 << 20
# Passes of a progressive JPEG over all of its pixels, of which encoders make about ten.
MOST_SCANS, BYTES_PER_SCAN = 100, 1 << 14
# Of TIFF: values of one tag, as many as an image may have strips.
MOST_DIRECTORIES, MOST_TAGS, MOST_VALUES = 1000, 1000, 1 << 17
PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
TIFF = {b"II*\0": ("<", False), b"MM\0*": (">", False), b"II+\0": ("<", True), b"MM\0+": (">", True)}
PIXELS, END = (b"IDAT", b"fdAT"), b"IEND"
START_OF_SCAN = 0xDA
MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
WINDOW = 1 << 20
# By TIFF type, bytes of a value; texts and unknown bytes are taken as a whole.
SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}


def check_blocks(path: str | os.PathLike) -> None:
    """Refuse a PNG, JPEG or TIFF of more blocks than any picture has; files of other content are not looked at.

    Raises:
        FormatError: it has more of them, or they hold more besides pixels.
    """
    # A pipe without a writer would keep its reader waiting; what is no plain file is left to the decoder's process.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return
        start = file.read(len(PNG))
        if start == PNG:
            fault = _of_png(file)
        elif start.startswith(JPEG):
            fault = _of_jpeg(file)
        elif start[:4] in TIFF:
            fault = _of_tiff(file, *TIFF[start[:4]])
        else:
            return
    if fault:
        raise FormatError(f"{Path(path)}: expected a picture, found {fault}, which no picture has; export it again.")


def _of_png(file: IO[bytes]) -> str | None:
    most, size = _limits(file)
    place, blocks, held = len(PNG), 0, 0
    while place + 8 <= size:
        file.seek(place)
        length, kind = struct.unpack(">I4s", file.read(8))
        blocks += 1
        held += 0 if kind in PIXELS else length
        if blocks > most:
            return f"more than {most} chunks"
        if held > MOST_BYTES:
            return f"more than {MOST_BYTES >> 20} MB besides pixels"
        if kind == END:
            break
        place += length + 12
    return None


def _of_jpeg(file: IO[bytes]) -> str | None:
    most, size = _limits(file)
    place, held = len(JPEG), 0
    while place + 4 <= size:
        file.seek(place)
        code, length = struct.unpack(">HH", file.read(4))
        if code < 0xFF00 or code & 0xFF == START_OF_SCAN:
            break
        held += length
        if held > MOST_BYTES:
            return f"more than {MOST_BYTES >> 20} MB besides pixels"
        place += 2 + max(length, 2)
    most_scans = MOST_SCANS + size // BYTES_PER_SCAN
    blocks = scans = 0
    file.seek(0)
    while data := file.read(WINDOW):
        for found in MARKER.finditer(data):
            blocks += 1
            scans += found[0][1] == START_OF_SCAN
            if blocks > most:
                return f"more than {most} segments"
        if scans > most_scans:
            return f"more than {most_scans} scans"
    return None


def _of_tiff(file: IO[bytes], order: str, is_big: bool) -> str | None:
    offset, count, width = (f"{order}Q", f"{order}Q", 20) if is_big else (f"{order}I", f"{order}H", 12)
    _, size = _limits(file)
    file.seek(8 if is_big else 4)
    held = 0
    try:
        for _ in range(MOST_DIRECTORIES):
            place = _number(file, offset)
            if not 0 < place < size:
                return None
            file.seek(place)
            tags = _number(file, count)
            if tags > MOST_TAGS:
                return f"a directory of more than {MOST_TAGS} tags"
            entries = file.read(tags * width)
            for start in range(0, len(entries) - width + 1, width):
                _, kind, values = struct.unpack_from(f"{order}HHQ" if is_big else f"{order}HHI", entries, start)
                length = SIZES.get(kind, 1)
                held += values * length
                if length > 1 and values > MOST_VALUES:
                    return f"a tag of more than {MOST_VALUES} values"
                if held > MOST_BYTES:
                    return f"more than {MOST_BYTES >> 20} MB besides pixels"
    except struct.error:
        return None
    return f"more than {MOST_DIRECTORIES} directories"


def _limits(file: IO[bytes]) -> tuple[int, int]:
    """How many blocks a file may have, and its size."""
    size = os.fstat(file.fileno()).st_size
    return MOST_BLOCKS + size // BYTES_PER_BLOCK, size


def _number(file: IO[bytes], kind: str) -> int:
    (number,) = struct.unpack(kind, file.read(struct.calcsize(kind)))
    return number
