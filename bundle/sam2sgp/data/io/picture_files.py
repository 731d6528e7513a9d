"""Reading PNG, JPEG, TIFF and BMP pictures, as images and as class maps."""

import os
import re
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from sam2sgp.data.io.decoding import decode_picture
from sam2sgp.data.io.geometry import Grid
from sam2sgp.data.io.picture_blocks import PNG
from sam2sgp.errors import DataError

# By EXIF orientation: the stored axis (0 rows, 1 columns) that runs along (row, column) as displayed, and whether
# (row, column) run against it.
TURNS = {
    1: ((0, 1), (False, False)),
    2: ((0, 1), (False, True)),
    3: ((0, 1), (True, True)),
    4: ((0, 1), (True, False)),
    5: ((1, 0), (False, False)),
    6: ((1, 0), (False, True)),
    7: ((1, 0), (True, True)),
    8: ((1, 0), (True, False)),
}
# Pillow holds no colours of 16 bits.
UPPER_BITS = "Of its values of 16 bits the upper 8 are read, as colours and transparency are; store grey without these."
# It may be transparency, which some programs don't name, or a stain.
FOURTH_CHANNEL = (
    "Its fourth channel, which the TIFF says nothing about, is not read: store the channel to segment as a picture of "
    "its own if it is one."
)
# Of TIFF: values of SampleFormat; of Predictor, and the compressions with which libtiff undoes others (LZW, Deflate,
# LZMA, Zstandard); of PhotometricInterpretation.
UNSIGNED, SIGNED = 1, 2
NO_PREDICTOR, PREDICTED = 1, (5, 8, 32946, 34925, 50000)
WHITE_IS_ZERO, BLACK_IS_ZERO = 0, 1
# Of PlanarConfiguration: each colour by itself. Of Compression: fax, in which white is zero by nature.
SEPARATE, FAX = 2, (2, 3, 4)
# Of ExtraSamples: neither of the two kinds of transparency.
UNSPECIFIED = 0
BLACK, WHITE = (0, 0, 0), (255, 255, 255)
# Before the pixels of a PNG file.
MOST_CHUNKS = 100
# Palette greys below this are class values, and above it shades that show them.
LARGEST_GREY_CLASS = 32


def read_picture(path: Path, label: bool, limit: int | None = None) -> Grid:
    """A picture's pixels as stored, and how an EXIF tag turns them for display."""
    picture = decode_picture(path, label, limit=limit)
    image = picture.image
    if picture.pages > 1:
        raise DataError(
            f"{path}: expected one picture, found {picture.pages} pages; store each page as a picture, or the "
            "stack as a NIfTI volume."
        )
    if image.format == "TIFF":
        _check_tiff(path, image, label)
    axes, flips = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1), TURNS[1])
    is_jpeg = image.format in ("JPEG", "MPO")
    array = _picture_label(path, image, picture.stored_as) if label else _picture_image(image, picture.stored_as)
    is_8_bit = array.dtype == np.uint8
    channels = 1 if array.ndim == 2 else array.shape[2]
    warnings = [UPPER_BITS] if is_8_bit and ";16" in picture.stored_as else []
    if image.format == "TIFF" and _extra_samples(image) == (UNSPECIFIED,):
        warnings.append(FOURTH_CHANNEL)
    return Grid(
        array.reshape(*array.shape[:2], 1, channels),
        array.shape[:2],
        np.eye(4),
        is_picture=True,
        is_rgb=channels == 3,
        is_8_bit=is_8_bit,
        is_jpeg=is_jpeg,
        axes=axes,
        flips=flips,
        warnings=warnings,
    )


def _check_tiff(path: Path, image: Image.Image, label: bool) -> None:
    """Raise DataError for a TIFF whose tags programs understand differently, so that it would be read wrong."""
    extra = _extra_samples(image)
    is_grey = image.tag_v2.get(262) in (WHITE_IS_ZERO, BLACK_IS_ZERO)
    if len(extra) > 1 or (is_grey and UNSPECIFIED in extra):
        raise DataError(
            f"{path}: expected grey values or colours, found {len(extra)} further "
            + ("channels" if len(extra) > 1 else "channel")
            + "; store the channel to segment as a picture of its own."
        )
    bits = image.tag_v2.get(258, (1,))
    if image.tag_v2.get(284) == SEPARATE and len(image.getbands()) > 1 and max(bits) > 8:
        # Pillow takes the bytes of one value for those of two pixels.
        raise DataError(
            f"{path}: expected colours of 16 bits pixel by pixel, found each colour by itself (PlanarConfiguration 2); "
            "store the TIFF with interleaved colours, or with 8 bits."
        )
    is_fax = image.mode == "1" and image.tag_v2.get(259, 1) in FAX
    if label and image.tag_v2.get(262) == WHITE_IS_ZERO and not is_fax:
        raise DataError(
            f"{path}: expected class values of which 0 is shown black, found a TIFF in which it is white (an inverting "
            "lookup table, in ImageJ; tifffile stores masks of bool so), of which programs take different pixels for "
            "the object; store it with 8 bits and black as zero."
        )
    compression = image.tag_v2.get(259, 1)
    if image.tag_v2.get(317, NO_PREDICTOR) != NO_PREDICTOR and compression not in PREDICTED:
        raise DataError(
            f"{path}: expected a predictor with LZW, Deflate or Zstandard only, found one with compression "
            f"{compression}, which few programs undo; store the TIFF without a predictor."
        )
    if image.tag_v2.get(262) == WHITE_IS_ZERO and (
        image.mode == "F" or image.tag_v2.get(339, (UNSIGNED,))[0] != UNSIGNED
    ):
        raise DataError(
            f"{path}: expected whole numbers from 0 up where white is zero, found others, of which black is not known; "
            "store the TIFF with black as zero."
        )


def _extra_samples(image: Image.Image) -> tuple[int, ...]:
    """Kinds of a TIFF's channels besides grey or colours."""
    extra = image.tag_v2.get(338, ())
    return extra if isinstance(extra, tuple) else (extra,)


def _picture_image(image: Image.Image, stored_as: str) -> np.ndarray:
    # Pillow makes RGBA of grey values of 16 bits with transparency.
    if image.mode in ("LA", "La") or stored_as.startswith("LA;16"):
        return np.asarray(image.getchannel(0))
    if image.mode in ("1", "L", "F") or image.mode.startswith("I"):
        return _grey(image)
    if image.mode in ("P", "PA"):
        # By way of RGBA, because Pillow warns of palettes with transparency otherwise.
        image = image.convert("RGBA")
    return np.asarray(image.convert("RGB"))


def _picture_label(path: Path, image: Image.Image, stored_as: str) -> np.ndarray:
    if image.mode == "P":
        return _palette_label(path, image)
    if image.mode in ("1", "F") or image.mode.startswith("I"):
        return _grey(image)
    if ";16" in stored_as:
        raise DataError(
            f"{path}: expected a class map, found colours or transparency of 16 bits; store it as grey, 8 or 16 bits."
        )
    if image.mode == "L":
        values = _grey(image)
        # Pillow stretches grey values of 2 and 4 bits to 0..255.
        low_depth = re.match(r"L;([24])", stored_as)
        return values // (255 // (2 ** int(low_depth[1]) - 1)) if low_depth else values
    if image.mode in ("RGB", "CMYK", "YCbCr"):
        colours = np.asarray(image.convert("RGB"))
        if (colours != colours[..., :1]).any():
            raise _coloured(path)
        return colours[..., 0]
    return _label_with_alpha(path, np.asarray(image.convert("RGBA")))


def _label_with_alpha(path: Path, pixels: np.ndarray) -> np.ndarray:
    """Class values of (H, W, 4): the greys, or where they say nothing, what is opaque."""
    colours, alpha = pixels[..., :3], pixels[..., 3]
    is_grey = not (colours != colours[..., :1]).any()
    grey = colours[..., 0]
    if (alpha == alpha.flat[0]).all() and is_grey:
        return grey
    is_mask = np.isin(alpha, (0, 255)).all() and alpha.min() < alpha.max()
    says_nothing = len(np.unique(colours[alpha > 0], axis=0)) == 1 and (
        not is_grey or grey.min() == grey.max() or not grey[alpha > 0].any()
    )
    if is_mask and says_nothing:
        return alpha
    # What is transparent must then be background by its grey value, too.
    if is_mask and is_grey and not grey[alpha == 0].any():
        return grey
    if not is_grey:
        raise _coloured(path)
    raise DataError(
        f"{path}: expected a class map in grey values or in transparency, found both and that they differ; store the "
        "class values as grey, without transparency."
    )


def png_palette(path: Path) -> list[tuple[int, int, int]]:
    """Colours of a PNG file's palette by index; [] for one without a palette, and for other files."""
    with open(path, "rb") as file:
        if file.read(len(PNG)) != PNG:
            return []
        # A palette comes before the pixels.
        for _ in range(MOST_CHUNKS):
            length, kind = int.from_bytes(file.read(4), "big"), file.read(4)
            if kind == b"PLTE":
                colours = file.read(min(length, 768))
                return [(colours[i], colours[i + 1], colours[i + 2]) for i in range(0, len(colours) - 2, 3)]
            if kind in (b"", b"IDAT"):
                break
            file.seek(length + 4, os.SEEK_CUR)
    return []


def _palette_label(path: Path, image: Image.Image) -> np.ndarray:
    """Class values of a palette picture: its indices; of one in black and white the colours, white being 255.

    Raises DataError where colours and indices contradict each other.
    """
    index = np.asarray(image)
    flat = image.getpalette("RGB") or []
    palette = [tuple(flat[start : start + 3]) for start in range(0, len(flat), 3)]
    used = [int(value) for value in np.unique(index)]
    if used[-1] >= len(palette):
        return index
    colours = {value: palette[value] for value in used}
    if len(used) > 1 and len(set(colours.values())) == 1:
        return _label_with_alpha(path, np.asarray(image.convert("RGBA")))
    if WHITE in palette and set(palette) <= {BLACK, WHITE}:
        return np.where(np.isin(index, [value for value in used if palette[value] == WHITE]), 255, 0).astype(np.uint8)
    if 0 in used and palette[0] != BLACK and BLACK in colours.values():
        raise DataError(
            f"{path}: expected a palette whose index 0, the background, is black, found {palette[0]} for it and black "
            "for another index; store the class values as grey."
        )
    greys = all(len(set(colour)) == 1 for colour in colours.values())
    if greys and any(value != colour[0] < LARGEST_GREY_CLASS for value, colour in colours.items() if colour != BLACK):
        raise DataError(
            f"{path}: expected a palette whose indices are the class values, found that its greys are other ones "
            f"({', '.join(f'{value}: {colour[0]}' for value, colour in colours.items())}); store the class values as "
            "grey."
        )
    return index


def _coloured(path: Path) -> DataError:
    return DataError(
        f"{path}: expected a class map, found a colour picture; store class values as grey or palette indices."
    )


def _grey(image: Image.Image) -> np.ndarray:
    """Pixels of a one-channel picture as stored, where Pillow by itself gets TIFF's rarer codings wrong."""
    array = np.asarray(image)
    if image.format == "TIFF":
        bits, photometric = image.tag_v2.get(258, (1,))[0], image.tag_v2.get(262)
        sample_format = image.tag_v2.get(339, (UNSIGNED,))[0]
        if array.dtype == np.int32 and bits == 32 and sample_format == UNSIGNED:
            array = array.view(np.uint32)
        if array.dtype == np.uint8 and bits == 8 and sample_format == SIGNED:
            array = array.view(np.int8)
        if array.dtype.kind == "u" and bits == 16 and photometric == 0:
            array = 65535 - array
    return array
