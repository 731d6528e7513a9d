"""What the program of a decoding process tells of a file."""

import re
import struct

import numpy as np
import pytest
import tifffile
from PIL import Image

from sam2sgp.data.io import read_image, read_label
from sam2sgp.errors import DataError

RNG = np.random.default_rng(0)


def test_many_page_tiff_is_refused(tmp_path):
    pages = [Image.new("L", (4, 4), value) for value in (1, 2)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    for read in (read_image, read_label):
        with pytest.raises(DataError, match="2 pages"):
            read(tmp_path / "a.tif")


def test_an_animated_png_is_refused(tmp_path):
    pages = [Image.new("L", (4, 4), value) for value in (1, 2)]
    pages[0].save(tmp_path / "a.png", save_all=True, append_images=pages[1:])
    for read in (read_image, read_label):
        with pytest.raises(DataError, match="2 pages"):
            read(tmp_path / "a.png")


def test_a_tiff_that_lacks_strips_is_refused(tmp_path):
    path = tmp_path / "a.tif"
    Image.fromarray(np.full((16, 20), 2, np.uint8)).save(path)
    # The header promises 4000 rows more than it lists strips for.
    content = path.read_bytes()
    height = re.escape(struct.pack("<H", 257)) + rb"(\x03|\x04)\x00\x01\x00\x00\x00"
    place = re.search(height, content).start()
    path.write_bytes(content[:place] + struct.pack("<HHII", 257, 4, 1, 4016) + content[place + 12 :])
    for read in (read_image, read_label):
        with pytest.raises(DataError, match="only 320 of its 4016 x 20 pixels are stored"):
            read(path)


def test_a_stack_that_only_imagej_tells_is_a_stack(tmp_path):
    values = RNG.integers(0, 999, (5, 6, 7)).astype(np.uint16)
    path = tmp_path / "a.tif"
    description = "ImageJ=1.53t\nimages=5\nslices=5\nloop=false\n"
    tifffile.imwrite(path, values[0], description=description, metadata=None)
    # One page of a stack may have the description of all.
    assert np.array_equal(read_image(path).slices[0, 0], values[0])
    # Beyond 4 GB, ImageJ writes the header of the first picture only, and all pixels in a row.
    with open(path, "ab") as file:
        file.write(values[1:].tobytes())
    assert np.array_equal(tifffile.imread(path), values)
    with pytest.raises(DataError, match="a.tif: expected one picture, found 5 pages"):
        read_image(path)


@pytest.mark.parametrize("read", [read_image, read_label])
def test_a_stack_of_which_tifffile_wrote_one_header_is_a_stack(tmp_path, read):
    values = RNG.integers(0, 9, (5, 6, 7)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="minisblack", truncate=True)
    assert np.array_equal(tifffile.imread(tmp_path / "a.tif"), values)
    with pytest.raises(DataError, match="a.tif: expected one picture, found 5 pages"):
        read(tmp_path / "a.tif")
    tifffile.imwrite(tmp_path / "b.tif", values[0], photometric="minisblack", truncate=True)
    assert np.array_equal(read_image(tmp_path / "b.tif").slices[0, 0], values[0])
    colours = RNG.integers(0, 9, (6, 7, 3)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "c.tif", colours, photometric="rgb", truncate=True)
    assert np.array_equal(read_image(tmp_path / "c.tif").slices[0], np.moveaxis(colours, 2, 0))
