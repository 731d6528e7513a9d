"""Decoding in processes of their own: the same pixels, and no harm from files that crash, hang or grow."""

import gzip
import io
import os
import threading
import time
import zlib

import numpy as np
import pydicom
import pytest
from PIL import Image, ImageOps
from pydicom.encaps import encapsulate, generate_pixel_data_frame

from sam2sgp.data.io import decoding, read_image
from sam2sgp.errors import DataError, FormatError, TooLargeError
from tests.helpers.uploads import COLOUR, GREY, dicom_by_gdcm, png, sound_files

PICTURES = {name: content for name, content in sound_files().items() if name.endswith((".png", ".jpg", ".tif", ".bmp"))}


def process():
    with decoding._pool.take() as decoder:
        return decoder.process


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_as_pillow_decodes_it_here(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(PICTURES[name])
    found = decoding.decode_picture(path)
    with Image.open(path) as expected:
        expected.load()
        assert found.image.mode == expected.mode and found.image.format == expected.format
        assert found.image.tobytes() == expected.tobytes() and found.image.getpalette() == expected.getpalette()
        assert np.array_equal(np.asarray(found.image.convert("RGB")), np.asarray(expected.convert("RGB")))


def test_orientation_and_transparency_come_along(tmp_path):
    exif = Image.Exif()
    exif[decoding.ORIENTATION] = 6
    Image.fromarray(COLOUR).save(tmp_path / "a.png", exif=exif)
    turned = ImageOps.exif_transpose(decoding.decode_picture(tmp_path / "a.png").image)
    assert np.array_equal(np.asarray(turned), np.rot90(COLOUR, -1))
    Image.fromarray(GREY // 64).convert("P").save(tmp_path / "b.png", transparency=2)
    assert decoding.decode_picture(tmp_path / "b.png").image.info["transparency"] == 2


def test_decoded_dicom_has_the_values_that_were_encoded(tmp_path):
    for compressor in ("JPEG", "JPEG2000"):
        (tmp_path / "a.dcm").write_bytes(dicom_by_gdcm(compressor))
        assert np.array_equal(read_image(tmp_path / "a.dcm").slices[0, 0], GREY.astype(float) * 3)


def test_one_process_serves_many_files_and_a_forked_child_starts_its_own(tmp_path):
    Image.fromarray(GREY).save(tmp_path / "a.png")
    first = process()
    assert np.array_equal(read_image(tmp_path / "a.png").slices[0, 0], GREY) and process() is first
    child = os.fork()
    if child == 0:
        ok = process() is not first and np.array_equal(read_image(tmp_path / "a.png").slices[0, 0], GREY)
        os._exit(0 if ok else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert read_image(tmp_path / "a.png").geometry.native_shape == GREY.shape and process() is first


@pytest.fixture
def endless(tmp_path):
    """A file whose end never comes, so that decoding it lasts as long as it may."""
    os.mkfifo(tmp_path / "endless.png")
    return tmp_path / "endless.png"


def test_a_decoder_that_hangs_is_ended_and_the_next_file_read(endless, tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "SECONDS", 0.1)
    hanging = process()
    with pytest.raises(DataError, match=r"endless\.png: .* takes too long"):
        decoding.decode_picture(endless)
    assert hanging.poll() is not None
    monkeypatch.undo()
    Image.fromarray(GREY).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").geometry.native_shape == GREY.shape


def test_a_decoder_that_crashes_costs_its_file_only(endless, tmp_path):
    crashing = process()
    before = decoding.restarts()
    threading.Timer(0.1, crashing.kill).start()
    with pytest.raises(DataError, match=r"endless\.png: .* crashes"):
        decoding.decode_picture(endless)
    Image.fromarray(GREY).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").geometry.native_shape == GREY.shape
    assert decoding.restarts() == before + 1, "told to whoever watches the server"


def test_a_decoder_that_was_killed_while_idle_is_replaced(tmp_path):
    idle = process()
    idle.kill()
    idle.wait()
    Image.fromarray(GREY).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").geometry.native_shape == GREY.shape


def test_a_bomb_is_refused_by_its_header(tmp_path):
    (tmp_path / "a.png").write_bytes(png(20_000, 20_000, zlib.compress(bytes(1000))))
    started = time.monotonic()
    with pytest.raises(DataError, match="which no image does"):
        decoding.decode_picture(tmp_path / "a.png")
    with pytest.raises(TooLargeError, match="20000x20000 voxels"):
        decoding.decode_picture(tmp_path / "a.png", label=True, limit=1 << 30)
    assert time.monotonic() - started < 5


def test_a_decoder_gets_the_memory_that_the_header_promises(tmp_path, monkeypatch):
    Image.fromarray(np.zeros((4000, 4000, 3), np.uint8)).save(tmp_path / "a.png")
    monkeypatch.setattr(decoding, "SPARE_MEMORY", 1 << 20)
    monkeypatch.setattr(decoding, "COPIES", 0)
    with pytest.raises(DataError, match="fails|crashes"):
        decoding.decode_picture(tmp_path / "a.png", label=True)


def test_an_error_does_not_tell_where_a_library_is_in_memory_or_was_built(tmp_path):
    dataset = pydicom.dcmread(io.BytesIO(sound_files()["lossless_jpeg.dcm"]))
    [frame] = generate_pixel_data_frame(dataset.PixelData, 1)
    dataset.PixelData = encapsulate([frame[: len(frame) // 4 * 2]])
    dataset.save_as(tmp_path / "cut.dcm")
    with pytest.raises(DataError, match="GDCMImageIO: Failed") as refused:
        read_image(tmp_path / "cut.dcm")
    told = str(refused.value).replace(str(tmp_path), "")
    assert "0x" not in told and ".cxx" not in told and "/tmp" not in told


def test_only_the_formats_asked_for_are_tried(tmp_path):
    for content in (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", b"GIF89a" + bytes(99), gzip.compress(b"x")):
        (tmp_path / "a.png").write_bytes(content)
        with pytest.raises(FormatError, match="another content"):
            decoding.decode_picture(tmp_path / "a.png")
