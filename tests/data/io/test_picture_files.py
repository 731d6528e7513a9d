"""Reading PNG, JPEG, TIFF and BMP, as images and as class maps."""

import struct
import zlib

import nibabel as nib
import numpy as np
import pytest
import tifffile
from PIL import ExifTags, Image, ImageOps

from sam2sgp.data.io import is_binary_255, read_image, read_label, write_label, write_map
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


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif"])
def test_picture_is_turned_as_viewers_turn_it_and_so_is_its_result(tmp_path, name, orientation):
    colours = RNG.integers(0, 255, (16, 24, 3)).astype(np.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(colours).save(tmp_path / name, exif=exif, **({"quality": 95} if name == "a.jpg" else {}))
    with Image.open(tmp_path / name) as picture:
        expected = np.asarray(ImageOps.exif_transpose(picture))
    image = read_image(tmp_path / name)
    assert np.array_equal(image.slices[0].transpose(1, 2, 0), expected)
    mask = (expected[..., :1] > 99).astype(np.uint8)[None, ..., 0]
    write_label(tmp_path / "mask.png", mask, image.geometry)
    with Image.open(tmp_path / "mask.png") as picture:
        assert np.array_equal(np.asarray(picture), mask[0])
    assert np.array_equal(read_label(tmp_path / "mask.png", image.geometry), mask)
    write_map(tmp_path / "map.tif", mask.astype(np.float32), image.geometry)
    assert np.array_equal(tifffile.imread(tmp_path / "map.tif"), mask[0])
    # ITK and MONAI show, and label, the pixels as stored.
    native = image.geometry.to_native(mask)
    nib.save(nib.Nifti1Image(native.T[..., None], np.eye(4)), tmp_path / "mask.nii.gz")
    assert np.array_equal(read_label(tmp_path / "mask.nii.gz", image.geometry), mask)


def test_a_label_is_turned_by_its_own_tag_and_one_as_stored_is_refused(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    mask = (RNG.random((16, 24)) > 0.5).astype(np.uint8)
    for name in ("image.png", "label.png"):
        Image.fromarray(mask).save(tmp_path / name, exif=exif)
    geometry = read_image(tmp_path / "image.png").geometry
    assert np.array_equal(read_label(tmp_path / "label.png", geometry)[0], np.rot90(mask, -1))
    Image.fromarray(mask).save(tmp_path / "stored.png")
    with pytest.raises(DataError, match="stored.png.*24x16 .*16x24.*EXIF tag"):
        read_label(tmp_path / "stored.png", geometry)


def palette_picture(index: np.ndarray, colours: list[int], **options) -> Image.Image:
    picture = Image.fromarray(index.astype(np.uint8), "P")
    picture.putpalette(colours)
    picture.info.update(options)
    return picture


def test_white_is_the_object_in_black_and_white_palettes(tmp_path):
    mask = RNG.random((6, 7)) > 0.5
    for colours, index in (([255] * 3 + [0] * 3, ~mask), ([0] * 3 + [255] * 3, mask)):
        palette_picture(index, colours).save(tmp_path / "a.png")
        assert np.array_equal(read_label(tmp_path / "a.png")[0], mask)
        assert is_binary_255(tmp_path / "a.png")
        palette_picture(np.full((6, 7), index[mask][0]), colours).save(tmp_path / "a.png")
        assert read_label(tmp_path / "a.png").all()


def test_palettes_whose_colours_contradict_the_indices_are_refused(tmp_path):
    index = RNG.integers(0, 3, (6, 7))
    palette_picture(index, [9, 9, 9, 200, 0, 0, 0, 0, 0]).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="a.png.*index 0, the background, is black"):
        read_label(tmp_path / "a.png")
    # A class map of 0, 3 and 7 as programs that make pictures smaller store it.
    palette_picture(index, [0, 0, 0, 3, 3, 3, 7, 7, 7]).save(tmp_path / "b.png")
    with pytest.raises(DataError, match="b.png.*its greys are other ones"):
        read_label(tmp_path / "b.png")
    palette_picture(index, [0, 0, 0, 128, 128, 128, 255, 255, 255]).save(tmp_path / "c.png")
    assert np.array_equal(read_label(tmp_path / "c.png")[0], index)


def test_what_is_opaque_is_the_object_where_colours_say_nothing(tmp_path):
    mask = RNG.random((6, 7)) > 0.5
    pixels = np.full((6, 7, 4), 255, np.uint8)
    pixels[..., 3] = 255 * mask
    red = pixels * np.array([1, 0, 0, 1], np.uint8)
    black = pixels * np.array([0, 0, 0, 1], np.uint8)
    for name, stored in (("white", pixels), ("red", red), ("black", black)):
        Image.fromarray(stored).save(tmp_path / f"{name}.png")
        assert np.array_equal(read_label(tmp_path / f"{name}.png")[0], mask), name
    palette_picture(mask, [255] * 6, transparency=b"\x00\xff").save(tmp_path / "palette.png")
    assert np.array_equal(read_label(tmp_path / "palette.png")[0], mask)


def test_class_values_count_where_transparency_agrees_and_else_the_label_is_refused(tmp_path):
    values = RNG.integers(0, 3, (6, 7)).astype(np.uint8)
    Image.fromarray(np.stack([values, (255 * (values > 0)).astype(np.uint8)], -1), "LA").save(tmp_path / "a.png")
    assert np.array_equal(read_label(tmp_path / "a.png")[0], values)
    other = (255 * (RNG.random((6, 7)) > 0.5)).astype(np.uint8)
    Image.fromarray(np.stack([values, other], -1), "LA").save(tmp_path / "b.png")
    with pytest.raises(DataError, match="b.png.*both and that they differ"):
        read_label(tmp_path / "b.png")
    Image.fromarray(RNG.integers(0, 255, (6, 7, 4)).astype(np.uint8)).save(tmp_path / "c.png")
    with pytest.raises(DataError, match="c.png.*colour picture"):
        read_label(tmp_path / "c.png")


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_mask_of_16_bits_is_class_1(tmp_path, name):
    mask = RNG.random((6, 7)) > 0.5
    Image.fromarray((mask * 65535).astype(np.uint16)).save(tmp_path / name)
    label = read_label(tmp_path / name)
    assert np.array_equal(label[0], mask) and label.dtype == np.uint8


def test_a_png_whose_check_sums_fail_is_refused(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray((9000 * RNG.integers(0, 3, (16, 20))).astype(np.uint16)).save(path)
    sound, expected = path.read_bytes(), read_image(path).slices
    pixels = sound.index(b"IDAT") + 4
    read = 0
    for place in range(pixels, len(sound) - 16):
        path.write_bytes(sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :])
        with pytest.raises(DataError, match="a.png"):
            read_image(path)
        read += 1
    path.write_bytes(sound)
    assert read > 50 and np.array_equal(read_image(path).slices, expected)


@pytest.mark.parametrize(("colour_type", "channels"), [(4, 1), (2, 3), (6, 3)])
def test_colours_and_transparency_of_16_bits_are_read_by_their_upper_bits_and_said(tmp_path, colour_type, channels):
    stored = RNG.integers(0, 65536, (6, 7, {2: 3, 4: 2, 6: 4}[colour_type])).astype(np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in stored)
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", 7, 6, 16, colour_type, 0, 0, 0),
        b"IDAT": zlib.compress(rows),
        b"IEND": b"",
    }
    written = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks.items()
    )
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + written)
    image = read_image(tmp_path / "a.png")
    assert image.is_rgb == (channels == 3) and "the upper 8 are read" in image.warnings[0]
    assert np.array_equal(image.slices[0].transpose(1, 2, 0), stored[..., :channels] >> 8)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_uncompressed_grey_tiffs_are_turned_too(tmp_path, dtype, orientation):
    """Pillow scrambles their pixels where it may map the file to memory."""
    values = RNG.integers(0, 255, (16, 24)).astype(dtype)
    tifffile.imwrite(tmp_path / "a.tif", values, extratags=[(274, "H", 1, orientation, True)])
    stored = tifffile.imread(tmp_path / "a.tif")
    turned = {1: stored, 2: stored[:, ::-1], 3: stored[::-1, ::-1], 4: stored[::-1], 5: stored.T}
    turned |= {6: np.rot90(stored, -1), 7: stored[::-1, ::-1].T, 8: np.rot90(stored)}
    assert np.array_equal(read_image(tmp_path / "a.tif").slices[0, 0], turned[orientation])


@pytest.mark.parametrize("order", ["<", ">"])
def test_signed_bytes_of_a_tiff_keep_their_sign(tmp_path, order):
    values = RNG.integers(-128, 128, (6, 7)).astype(np.int8)
    tifffile.imwrite(tmp_path / "a.tif", values, byteorder=order)
    assert np.array_equal(read_image(tmp_path / "a.tif").slices[0, 0], tifffile.imread(tmp_path / "a.tif"))
    with pytest.raises(DataError, match="class values from 0"):
        read_label(tmp_path / "a.tif")


@pytest.mark.parametrize("dtype", [np.uint64, np.float16, np.float64])
def test_a_tiff_of_other_pixels_is_told_as_such(tmp_path, dtype):
    tifffile.imwrite(tmp_path / "a.tif", np.ones((6, 7), dtype))
    with pytest.raises(DataError, match="a.tif: expected a TIFF of 8 or 16 bits or float32.*convert it"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("dtype, photometric", [(np.float32, 0), (np.int16, 0)])
def test_a_tiff_whose_black_is_not_known_is_refused(tmp_path, dtype, photometric):
    tifffile.imwrite(tmp_path / "a.tif", np.ones((6, 7), dtype), photometric=photometric)
    with pytest.raises(DataError, match="a.tif: expected"):
        read_image(tmp_path / "a.tif")


def test_a_predictor_is_undone_or_refused(tmp_path):
    values = RNG.integers(0, 255, (6, 7)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", values, compression="zlib", predictor=True)
    assert np.array_equal(read_image(tmp_path / "a.tif").slices[0, 0], values)
    # With compression 1, programs differ on whether it is undone.
    Image.fromarray(values).save(tmp_path / "b.tif", tiffinfo={317: 2})
    with pytest.raises(DataError, match="b.tif: expected a predictor with LZW"):
        read_image(tmp_path / "b.tif")


def test_further_channels_of_a_tiff_are_refused_or_said(tmp_path):
    values = RNG.integers(0, 255, (6, 7, 5)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", values[..., :2], photometric="minisblack", planarconfig="contig")
    tifffile.imwrite(tmp_path / "b.tif", values, photometric="rgb", extrasamples=["unspecified"] * 2)
    for name, found in (("a.tif", "1 further channel;"), ("b.tif", "2 further channels;")):
        with pytest.raises(DataError, match=f"{name}: expected grey values or colours, found {found}"):
            read_image(tmp_path / name)
    for kind, warned in (("unassalpha", False), ("unspecified", True)):
        tifffile.imwrite(tmp_path / "c.tif", values[..., :4], photometric="rgb", extrasamples=[kind])
        image = read_image(tmp_path / "c.tif")
        assert np.array_equal(image.slices[0], values[..., :3].transpose(2, 0, 1))
        assert bool(image.warnings) == warned and all("fourth channel" in text for text in image.warnings)


@pytest.mark.parametrize("white", [1, 255])
def test_a_mask_with_an_inverting_lookup_table_is_refused(tmp_path, white):
    mask = RNG.random((6, 7)) > 0.5
    tifffile.imwrite(tmp_path / "a.tif", (mask * white).astype(np.uint8), photometric="miniswhite")
    with pytest.raises(DataError, match="a.tif: expected .*inverting lookup table"):
        read_label(tmp_path / "a.tif")
    # As images they are what is displayed, and pictures of one bit have no other reading.
    assert np.array_equal(read_image(tmp_path / "a.tif").slices[0, 0], 255 - white * mask.astype(int))
    Image.fromarray(mask).save(tmp_path / "b.tif", compression="group4")
    assert np.array_equal(read_label(tmp_path / "b.tif")[0], mask)


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_a_mask_of_bool_by_tifffile_is_refused(tmp_path, compression):
    """It is stored with 0 as white, as no mask of 8 bits is: its object would be the background."""
    mask = RNG.random((6, 7)) > 0.5
    tifffile.imwrite(tmp_path / "a.tif", mask, compression=compression)
    with pytest.raises(DataError, match="a.tif: expected .*tifffile stores masks of bool so"):
        read_label(tmp_path / "a.tif")


def test_colours_of_16_bits_that_lie_by_themselves_are_refused(tmp_path):
    """Pillow takes the two bytes of a value for two pixels."""
    colours = RNG.integers(0, 256, (3, 16, 32)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", colours, photometric="rgb", planarconfig="separate")
    assert np.array_equal(read_image(tmp_path / "a.tif").slices[0], colours)
    tifffile.imwrite(tmp_path / "b.tif", colours * np.uint16(257), photometric="rgb", planarconfig="separate")
    with pytest.raises(DataError, match="b.tif: expected colours of 16 bits pixel by pixel"):
        read_image(tmp_path / "b.tif")


def test_blocks_of_voxels_in_one_page_are_told_as_several(tmp_path):
    volume = RNG.integers(0, 256, (16, 32, 32)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", volume, volumetric=True, tile=(16, 16, 16), photometric="minisblack")
    with pytest.raises(DataError, match="a.tif: expected one picture, found 16 pages"):
        read_image(tmp_path / "a.tif")
