"""Damage to JPEG streams that decoders pass over is told, in pictures and in DICOM."""

import io
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK
from PIL import Image
from pydicom.encaps import encapsulate, generate_pixel_data_frame
from pydicom.uid import JPEGBaseline8Bit

from sam2sgp.data.io import read_image
from sam2sgp.errors import DataError
from tests.helpers.dicom_files import write_dicom

RNG = np.random.default_rng(0)
ROWS, COLUMNS = np.mgrid[:96, :112]
GREY = (90 + 60 * np.sin(ROWS / 9) * np.cos(COLUMNS / 7) + RNG.normal(0, 6, ROWS.shape)).astype(np.uint8)
COLOUR = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], -1)
KINDS = {
    "baseline": {},
    "optimised": {"optimize": True},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_rows": 2},
    "full colours": {"subsampling": 0, "quality": 95},
}


def stream(pixels: np.ndarray, **settings) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG", **settings)
    return content.getvalue()


def scan(content: bytes) -> tuple[int, int]:
    """Start and end of the longest stretch of pixel data."""
    marks = [found.end() for found in re.finditer(rb"\xff[\x01-\xfe]", content)]
    start = max(range(len(marks) - 1), key=lambda index: marks[index + 1] - marks[index])
    return marks[start] + 12, marks[start + 1] - 2


def cut(content: bytes) -> bytes:
    start, end = scan(content)
    return content[: (start + end) // 2] + content[end:]


def emptied(content: bytes) -> bytes:
    start, end = scan(content)
    middle = (start + end) // 2
    return content[:middle] + bytes(end - middle) + content[end:]


def prolonged(content: bytes) -> bytes:
    """As if damaged bits had been taken for fewer pixels than there are."""
    start, end = scan(content)
    return content[:end] + content[start : start + 100].replace(b"\xff", b"\0") + content[end:]


def without_steps(content: bytes) -> bytes:
    place = content.index(b"\xff\xdb") + 5
    return content[:place] + bytes(8) + content[place + 8 :]


def without_symbols(content: bytes) -> bytes:
    place = content.index(b"\xff\xc4") + 21
    return content[:place] + bytes(12) + content[place + 12 :]


DAMAGES = [
    (cut, "its pixel data end before its last pixel"),
    (emptied, "its pixel data (end before|go on behind) its last pixel"),
    (prolonged, "its pixel data go on behind its last pixel"),
    (without_steps, "its quantisation table has a step of 0"),
    (without_symbols, "its Huffman table has a symbol twice"),
]


def encapsulated(path: Path, content: bytes) -> Path:
    write_dicom(path, GREY, "US")
    dataset = pydicom.dcmread(path)
    dataset.PixelData = encapsulate([content])
    dataset["PixelData"].is_undefined_length = True
    dataset.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    dataset.save_as(path)
    return path


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize(
    "pixels", [GREY, COLOUR, COLOUR[:33, :47], np.full_like(GREY, 7), (GREY > 120) * np.uint8(255)]
)
def test_sound_pictures_are_read_as_pillow_decodes_them(tmp_path, settings, pixels):
    (tmp_path / "a.jpg").write_bytes(stream(pixels, **settings))
    found = read_image(tmp_path / "a.jpg").slices[0]
    expected = np.asarray(Image.open(tmp_path / "a.jpg"), float)
    assert np.array_equal(found, expected.transpose(2, 0, 1) if pixels.ndim == 3 else expected[None])


@pytest.mark.parametrize(("damage", "told"), DAMAGES, ids=[damage.__name__ for damage, _ in DAMAGES])
def test_damage_that_pillow_passes_over_is_told(tmp_path, damage: Callable[[bytes], bytes], told: str):
    content = damage(stream(COLOUR))
    (tmp_path / "a.jpg").write_bytes(content)
    assert np.asarray(Image.open(io.BytesIO(content))).shape == COLOUR.shape
    with pytest.raises(DataError, match=f"a.jpg: expected a readable image, found that ({told}).*; copy or export"):
        read_image(tmp_path / "a.jpg")


@pytest.mark.parametrize(("damage", "told"), DAMAGES, ids=[damage.__name__ for damage, _ in DAMAGES])
def test_damage_that_gdcm_passes_over_is_told(tmp_path, damage: Callable[[bytes], bytes], told: str):
    sound = encapsulated(tmp_path / "sound.dcm", stream(GREY))
    assert np.array_equal(
        read_image(sound).slices[0], SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(sound))).astype(float)
    )
    with pytest.raises(DataError, match=f"a.dcm: expected a readable image, found that ({told}).*; copy or export"):
        read_image(encapsulated(tmp_path / "a.dcm", damage(stream(GREY))))


def test_what_phones_write_around_a_picture_is_no_damage(tmp_path):
    picture = Image.fromarray(COLOUR)
    picture.save(tmp_path / "thumbnail.jpg", exif=b"Exif\0\0" + stream(COLOUR[::4, ::4]))
    picture.save(tmp_path / "two.jpg", "MPO", save_all=True, append_images=[Image.fromarray(COLOUR[::-1])])
    (tmp_path / "behind.jpg").write_bytes(stream(COLOUR) + bytes(100) + stream(GREY))
    (tmp_path / "filled.jpg").write_bytes(stream(COLOUR)[:-2] + b"\xff\xff\xff\xd9")
    expected = np.asarray(Image.open(io.BytesIO(stream(COLOUR))), float).transpose(2, 0, 1)
    for path in sorted(tmp_path.iterdir()):
        assert np.array_equal(read_image(path).slices[0], expected)


@pytest.mark.skipif(shutil.which("dcmcjpeg") is None, reason="needs dcmtk to compress without loss")
def test_lossless_jpeg_that_is_cut_is_told(tmp_path):
    values = (GREY.astype(np.uint16) * 13)[:64]
    source = write_dicom(tmp_path / "source.dcm", values, "MR", BitsStored=12, HighBit=11)
    path = tmp_path / "a.dcm"
    subprocess.run(["dcmcjpeg", source, path], check=True)
    assert np.array_equal(read_image(path).slices[0, 0], values)
    dataset = pydicom.dcmread(path)
    (content,) = generate_pixel_data_frame(dataset.PixelData, 1)
    dataset.PixelData = encapsulate([cut(content)])
    dataset.save_as(path)
    with pytest.raises(DataError, match="a.dcm: .*its pixel data end before its last pixel"):
        read_image(path)
