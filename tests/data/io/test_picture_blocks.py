"""Pictures of too many chunks, segments or tags: refused before they are decoded, and all others decoded."""

import struct
import zlib

import pytest
from PIL import Image, PngImagePlugin

from sam2sgp.data.io import decoding, picture_blocks
from sam2sgp.data.io.picture_blocks import check_blocks
from sam2sgp.errors import FormatError
from tests.helpers.uploads import COLOUR, GREY, picture, sound_files

PNG, JPEG, TIFF = (picture(GREY, kind) for kind in ("PNG", "JPEG", "TIFF"))
HEAD, TAIL = 33, 12


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_pages(number: int) -> bytes:
    """A TIFF whose directory comes so many times, one after the other."""
    content = bytearray(TIFF)
    (start,) = struct.unpack_from("<I", content, 4)
    (tags,) = struct.unpack_from("<H", content, start)
    place = start + 2 + 12 * tags
    directory = bytes(content[start:place])
    for _ in range(number):
        struct.pack_into("<I", content, place, len(content))
        place = len(content) + len(directory)
        content += directory + bytes(4)
    return bytes(content)


def with_tag(kind: int, values: int, tags: int = 1) -> bytes:
    directory = struct.pack("<H", tags) + struct.pack("<HHII", 1000, kind, values, 0) * tags
    return b"II*\0" + struct.pack("<I", 8) + directory + bytes(4)


FAULTS = {
    "texts": (PNG[:HEAD] + chunk(b"tEXt", b"a\0b") * 11_000 + PNG[HEAD:], "chunks"),
    "texts at the end": (PNG[:-TAIL] + chunk(b"tEXt", b"a\0b") * 11_000 + PNG[-TAIL:], "chunks"),
    "pixels in crumbs": (PNG[:HEAD] + chunk(b"IDAT", b"") * 11_000 + PNG[HEAD:], "chunks"),
    "long text": (PNG[:HEAD] + chunk(b"tEXt", b"a\0" + bytes(17 << 20)) + PNG[HEAD:], "16 MB"),
    "comments": (JPEG[:2] + b"\xff\xfe\0\x04ab" * 11_000 + JPEG[2:], "segments"),
    "profiles": (JPEG[:2] + (b"\xff\xe2\xff\xff" + bytes(65533)) * 260 + JPEG[2:], "16 MB"),
    "scans": (JPEG[:-2] + b"\xff\xda\0\x08\1\1\0\0\x3f\0" * 200 + JPEG[-2:], "scans"),
    "directories": (with_pages(1000), "directories"),
    "tags": (with_tag(3, 1, 1001), "tags"),
    "values": (with_tag(4, 1 << 18), "values"),
    "values that overlap": (with_tag(1, 1 << 20, 20), "16 MB"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_picture_of_too_many_blocks_reaches_no_decoder(tmp_path, monkeypatch, name):
    content, found = FAULTS[name]
    path = tmp_path / "a.png"
    path.write_bytes(content)
    monkeypatch.setattr(decoding, "_decoding", lambda path: pytest.fail("decoded"))
    with pytest.raises(FormatError, match=found) as told:
        decoding.decode_picture(path)
    assert "a.png: expected a picture" in str(told.value)


def test_pictures_as_programs_write_them_are_let_through(tmp_path):
    path = tmp_path / "a"
    notes = PngImagePlugin.PngInfo()
    for number in range(200):
        notes.add_text(f"key {number}", "text")
    big = Image.effect_noise((1200, 1200), 80)
    for name, options in {"PNG": {"pnginfo": notes}, "JPEG": {"progressive": True, "comment": "c" * 9000}}.items():
        big.save(path, name, **options)
        check_blocks(path)
    Image.fromarray(COLOUR).save(path, "TIFF", compression="tiff_lzw", description="d" * 100_000)
    check_blocks(path)
    for content in [*sound_files().values(), b"", PNG[:40], JPEG[:5], TIFF[:6], b"II+\0\x08"]:
        path.write_bytes(content)
        check_blocks(path)


def test_more_blocks_are_allowed_in_a_larger_file(tmp_path, monkeypatch):
    monkeypatch.setattr(picture_blocks, "MOST_BLOCKS", 4)
    path = tmp_path / "a.png"
    for size, is_refused in ((100, True), (2000, False)):
        path.write_bytes(PNG[:HEAD] + chunk(b"IDAT", bytes(size)) * 20 + PNG[HEAD:])
        if is_refused:
            with pytest.raises(FormatError):
                check_blocks(path)
        else:
            check_blocks(path)
