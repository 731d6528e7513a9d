"""Damage to a JPEG stream (ITU T.81) that its decoders pass over: libjpeg, in Pillow and in GDCM, only counts warnings.

In: streams, what a decoder made of them, and the decoder. Out: what is wrong, or None. Three things can be known:

- a table that no encoder writes: a quantisation step of 0, a Huffman table with one symbol twice;
- pixel data that end early: noise behind them, which a decoder that is done skips, changes the pixels;
- pixel data that go on, because damaged bits were taken for other pixels: noise in place of the last bytes changes
  nothing, though noise further ahead does.

What can't be known: bits that were exchanged for others of the same number of pixels, other steps in place of a
quantisation table's, and anything in streams with arithmetic coding, whose encoders leave zeros at their ends out.
"""

import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np

TABLE_OF_STEPS, TABLE_OF_CODES, START_OF_SCAN, END_OF_IMAGE = 0xDB, 0xC4, 0xDA, 0xD9
RESTARTS = range(0xD0, 0xD8)
# Frames of arithmetic coding.
ARITHMETIC = (0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)
# Behind pixel data, with the bytes that may fill the place before it; 0xFF00 is a value among them.
MARKER = re.compile(rb"\xff+([\x01-\xfe])")
# Bytes at the end of pixel data that an encoder may have filled up, and how many there must be to judge by noise.
FILLING, LEAST_BYTES = 16, 128
# Bits without order, none of them a marker.
NOISE = bytes((37 * number * number + 11 * number + 90) % 255 for number in range(64))

Decode = Callable[[list[bytes]], np.ndarray | None]


def damage(streams: Sequence[bytes], pixels: np.ndarray, decode: Decode) -> str | None:
    """What is damaged in the streams of an image's frames; None where nothing is known to be.

    Args:
        streams: one for each frame.
        pixels: (frames, ...) what a decoder made of them.
        decode: the same decoder for other streams; it gives None for what it refuses.
    """
    data = []
    for stream in streams:
        parts = list(_parts(stream))
        for marker, start, end in parts:
            if marker in ARITHMETIC:
                return None
            if fault := _table_fault(marker, stream[start:end]):
                return fault
        data.append([(start, end) for marker, start, end in parts if marker is None])
    if not all(data):
        return None
    ends = [[(end, end) for _, end in places] for places in data]
    if _changed(streams, ends, pixels, decode).any():
        return "its pixel data end before its last pixel"
    last = [places[-1] for places in data]
    if min(end - start for start, end in last) < LEAST_BYTES:
        return None
    tails = [[(end - FILLING, end)] for _, end in last]
    unread = ~_changed(streams, tails, pixels, decode)
    if unread.any():
        halves = [[((start + end) // 2, end)] for start, end in last]
        if (unread & _changed(streams, halves, pixels, decode)).any():
            return "its pixel data go on behind its last pixel"
    return None


def _parts(stream: bytes) -> Iterator[tuple[int | None, int, int]]:
    """Marker, start and end of each segment's content, and None, start and end of pixel data between markers."""
    place, is_data = 2, False
    while found := MARKER.search(stream, place):
        marker = found[1][0]
        if is_data:
            yield None, place, found.start()
        place = found.end()
        if marker == END_OF_IMAGE:
            return
        is_data = marker in RESTARTS
        if not is_data:
            end = place + max(2, int.from_bytes(stream[place : place + 2], "big"))
            yield marker, place + 2, end
            place, is_data = end, marker == START_OF_SCAN


def _table_fault(marker: int | None, content: bytes) -> str | None:
    if marker == TABLE_OF_STEPS:
        while content:
            # 64 steps of one or two bytes (T.81 B.2.4.1).
            width = 1 + (content[0] >> 4 > 0)
            steps = np.frombuffer(content[1 : 1 + 64 * width].ljust(64 * width, b"\0"), f">u{width}")
            if not steps.all():
                return "its quantisation table has a step of 0"
            content = content[1 + 64 * width :]
    elif marker == TABLE_OF_CODES:
        while content:
            # How many codes of 1 to 16 bits there are, and their symbols (T.81 B.2.4.2).
            count = sum(content[1:17])
            symbols = content[17 : 17 + count]
            if len(set(symbols)) < count:
                return "its Huffman table has a symbol twice"
            content = content[17 + count :]
    return None


def _changed(
    streams: Sequence[bytes], places: Sequence[Sequence[tuple[int, int]]], pixels: np.ndarray, decode: Decode
) -> np.ndarray:
    """(frames,) whether noise in places of the streams, each of a start and an end, makes other pixels of them."""
    noisy = []
    for stream, spans in zip(streams, places, strict=True):
        pieces, done = [], 0
        for start, end in spans:
            pieces += [stream[done:start], NOISE]
            done = end
        noisy.append(b"".join([*pieces, stream[done:]]))
    found = decode(noisy)
    if found is None or found.shape != pixels.shape:
        return np.ones(len(streams), bool)
    return np.array([not np.array_equal(*pair) for pair in zip(found, pixels, strict=True)])
