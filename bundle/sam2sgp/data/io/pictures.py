"""Reading PNG, JPEG, TIFF and BMP pictures, as images and as class maps."""

import re
from pathlib import Path

import numpy as np
from PIL import Image

from sam2sgp.data.io.decoding import decode_picture
from sam2sgp.data.io.geometry import Grid
from sam2sgp.errors import DataError


def read_picture(path: Path, label: bool, limit: int | None = None) -> Grid:
    picture = decode_picture(path, label, limit=limit)
    image = picture.image
    if picture.pages > 1:
        raise DataError(
            f"{path}: expected one picture, found {picture.pages} pages; store each page as a picture, or the "
            "stack as a NIfTI volume."
        )
    is_jpeg = image.format in ("JPEG", "MPO")
    array = _picture_label(path, image, picture.stored_as) if label else _picture_image(image)
    is_8_bit = array.dtype == np.uint8
    channels = 1 if array.ndim == 2 else array.shape[2]
    return Grid(
        array.reshape(*array.shape[:2], 1, channels),
        array.shape[:2],
        np.eye(4),
        is_picture=True,
        is_rgb=channels == 3,
        is_8_bit=is_8_bit,
        is_jpeg=is_jpeg,
    )


def _picture_image(image: Image.Image) -> np.ndarray:
    if image.mode in ("LA", "La"):
        return np.asarray(image.getchannel(0))
    if image.mode in ("1", "L", "F") or image.mode.startswith("I"):
        return _grey(image)
    if image.mode in ("P", "PA"):
        # By way of RGBA, because Pillow warns of palettes with transparency otherwise.
        image = image.convert("RGBA")
    return np.asarray(image.convert("RGB"))


def _picture_label(path: Path, image: Image.Image, stored_as: str) -> np.ndarray:
    if image.mode in ("1", "P", "F") or image.mode.startswith("I"):
        return _grey(image)
    if ";16" in stored_as:
        raise DataError(
            f"{path}: expected a class map, found colours or transparency of 16 bits; store it as grey, 8 or 16 bits."
        )
    if image.mode in ("L", "LA", "La", "PA"):
        values = np.asarray(image.getchannel(0))
        # Pillow stretches grey values of 2 and 4 bits to 0..255.
        low_depth = re.match(r"L;([24])", stored_as)
        return values // (255 // (2 ** int(low_depth[1]) - 1)) if low_depth else values
    colours = np.asarray(image.convert("RGB"))
    if (colours != colours[..., :1]).any():
        raise DataError(
            f"{path}: expected a class map, found a colour picture; store class values as grey or palette indices."
        )
    return colours[..., 0]


def _grey(image: Image.Image) -> np.ndarray:
    """Pixels of a one-channel picture as stored, where Pillow alone gets TIFF's rarer codings wrong."""
    array = np.asarray(image)
    if image.format == "TIFF":
        bits, photometric = image.tag_v2.get(258, (1,))[0], image.tag_v2.get(262)
        if array.dtype == np.int32 and bits == 32 and image.tag_v2.get(339, (1,))[0] == 1:
            array = array.view(np.uint32)
        if array.dtype.kind == "u" and bits == 16 and photometric == 0:
            array = 65535 - array
    return array
