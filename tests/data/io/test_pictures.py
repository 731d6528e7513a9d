"""Reading PNG, JPEG, TIFF and BMP, as images and as class maps."""

import zlib

import numpy as np
import pytest
from PIL import Image

from sam2sgp.data.io import (
    read_image,
    read_label,
)
from sam2sgp.errors import DataError

RNG = np.random.default_rng(0)


def test_pictures_keep_rows_columns_and_values(tmp_path):
    colours = RNG.integers(0, 255, (6, 7, 3)).astype(np.uint8)
    for name in ("a.png", "a.tif", "a.bmp"):
        Image.fromarray(colours).save(tmp_path / name)
        image = read_image(tmp_path / name)
        assert image.is_rgb and np.array_equal(image.slices[0], colours.transpose(2, 0, 1))
        assert image.geometry.spacing is None and image.geometry.native_shape == (6, 7)
        Image.fromarray(colours[..., 0]).save(tmp_path / name)
        image = read_image(tmp_path / name)
        assert not image.is_rgb and np.array_equal(image.slices[0, 0], colours[..., 0])


def test_alpha_is_dropped_without_darkening(tmp_path):
    pixels = RNG.integers(0, 255, (6, 7, 4)).astype(np.uint8)
    Image.fromarray(pixels, "RGBA").save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png").slices[0], pixels[..., :3].transpose(2, 0, 1))
    Image.fromarray(pixels[..., :2], "LA").save(tmp_path / "b.png")
    assert np.array_equal(read_image(tmp_path / "b.png").slices[0, 0], pixels[..., 0])


def test_palette_picture_is_colour_as_image_and_index_as_label(tmp_path):
    index = RNG.integers(0, 3, (6, 7)).astype(np.uint8)
    picture = Image.fromarray(index, "P")
    picture.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    picture.info["transparency"] = b"\x00\xff"
    picture.save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert image.is_rgb and np.array_equal(image.slices[0, 2], 30 * (index + 1))
    assert np.array_equal(read_label(tmp_path / "a.png", image.geometry)[0], index)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bit_picture_keeps_its_values(tmp_path, name):
    values = (np.arange(42).reshape(6, 7) * 1560).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / name)
    assert np.array_equal(read_image(tmp_path / name).slices[0, 0], values)
    assert np.array_equal(read_label(tmp_path / name)[0], values)


def test_sixteen_bit_tiff_whose_zero_is_white_is_inverted(tmp_path):
    values = (np.arange(42).reshape(6, 7) * 1560).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.tif", tiffinfo={262: 0})
    assert np.array_equal(read_image(tmp_path / "a.tif").slices[0, 0], 65535 - values.astype(int))


def test_low_depth_and_one_bit_pictures_hold_their_class_values(tmp_path):
    # Two-bit grey PNG, which Pillow reads but doesn't write.
    png = bytes.fromhex("89504e470d0a1a0a") + b"".join(
        _chunk(kind, data)
        for kind, data in (
            (b"IHDR", bytes([0, 0, 0, 4, 0, 0, 0, 1, 2, 0, 0, 0, 0])),
            (b"IDAT", zlib.compress(bytes([0, 0b00011011]))),
            (b"IEND", b""),
        )
    )
    (tmp_path / "a.png").write_bytes(png)
    assert read_label(tmp_path / "a.png").tolist() == [[[0, 1, 2, 3]]]
    mask = RNG.random((6, 7)) > 0.5
    Image.fromarray(mask).save(tmp_path / "b.png")
    assert np.array_equal(read_label(tmp_path / "b.png")[0], mask)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def test_many_page_tiff_is_refused(tmp_path):
    pages = [Image.new("L", (4, 4), value) for value in (1, 2)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(DataError, match="2 pages"):
        read_image(tmp_path / "a.tif")
