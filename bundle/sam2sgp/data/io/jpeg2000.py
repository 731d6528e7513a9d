"""The tiles of a JPEG 2000 code stream (ISO 15444-1 Annex A): decoders leave those that lack black, without a word."""

import struct
from collections import Counter

START = b"\xff\x4f\xff\x51"
TILE_PART = b"\xff\x90"
# Behind the marker of a tile part: its own length, the tile, the part's length, its number, how many there are.
PART = ">HHIBB"


def missing_tiles(stream: bytes) -> int:
    """How many tiles of a code stream lack, wholly or in part; 0 for what isn't one, which its decoder tells."""
    start = stream.find(START)
    if start < 0 or len(stream) < start + 42:
        return 0
    width, height, *_, tile_width, tile_height, tile_left, tile_upper = struct.unpack_from(">8I", stream, start + 8)
    if not tile_width or not tile_height:
        return 0
    tiles = -(-(width - tile_left) // tile_width) * -(-(height - tile_upper) // tile_height)
    place = stream.find(TILE_PART, start)
    found: Counter[int] = Counter()
    stated: dict[int, int] = {}
    while 0 <= place <= len(stream) - 12 and stream.startswith(TILE_PART, place):
        _, tile, length, _, parts = struct.unpack_from(PART, stream, place + 2)
        found[tile] += 1
        stated[tile] = max(parts, stated.get(tile, 0))
        # The last one may leave its length open.
        place = place + length if length else len(stream)
    return tiles - sum(tile < tiles and found[tile] >= stated[tile] for tile in found)
