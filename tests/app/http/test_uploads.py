"""Uploads that come too slowly or hold more than they seem to, looked at before they cost anything."""

import gzip
import socket
import struct
import threading
import time
import zipfile
import zlib

import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI, Request
from pydicom.dataset import FileMetaDataset
from pydicom.filewriter import write_file_meta_info
from pydicom.uid import DeflatedExplicitVRLittleEndian, generate_uid

from lib.checks import RequestError, TooLarge, UnsupportedFile, check_label_info, clean_class_name
from lib.http import guard
from lib.stores.door import ImageTooLarge
from lib.stores.folder import ConfinedDatastore
from lib.stores.sessions import ConfinedSessions
from tests.helpers.dicom_files import write_series
from tests.helpers.parts import Given
from tests.helpers.uploads import dicom, metaimage, nifti, with_dims

LIMIT = 1 << 20


@pytest.fixture
def sessions(tmp_path):
    return ConfinedSessions(str(tmp_path / "sessions"), 3600, LIMIT)


def deflated(path):
    """A DICOM file of a few kilobytes that unpacks to four times the limit."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.2", generate_uid()
    meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    pixels = struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OW", 0, 4 * LIMIT) + bytes(4 * LIMIT)
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    with open(path, "wb") as file:
        file.write(bytes(128) + b"DICM")
        write_file_meta_info(file, meta, enforce_standard=True)
        file.write(packer.compress(pixels) + packer.flush())
    return path


def test_a_slice_that_unpacks_to_too_much_is_refused_whatever_its_name(sessions, tmp_path):
    for name in ("slice1.dcm", "slice1", "IM.0001"):
        (tmp_path / "series").mkdir(exist_ok=True)
        upload = deflated(tmp_path / "series" / name)
        assert upload.stat().st_size < LIMIT / 50
        with pytest.raises(UnsupportedFile, match="deflated"):
            sessions.add_session(str(upload))
        assert not list((tmp_path / "sessions").glob("*/*"))


def test_a_directory_of_many_megabytes_is_not_taken_into_memory(sessions, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a", "x")
        archive.filelist *= 400_000
    with pytest.raises(TooLarge, match="short headers"):
        sessions.add_session(str(tmp_path / "a.zip"), uncompress=True)


def test_a_packed_folder_and_a_packed_file_are_found_in_their_archive(sessions, tmp_path):
    series = write_series(tmp_path / "ct", np.zeros((3, 8, 8), np.int16))
    for name, files in (("folder", sorted(series.iterdir())), ("file", sorted(series.iterdir())[:1])):
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            for file in files:
                archive.write(file, f"study/series/{file.name}")
        _, session = sessions.add_session(str(tmp_path / f"{name}.zip"), uncompress=True)
        assert session.image.endswith("/series" if name == "folder" else files[0].name)


@pytest.mark.parametrize(
    "entries",
    [
        [{"idx": 1, "name": "x" * 65}],
        [{"idx": 1, "name": "a\nb"}],
        [{"idx": 1, "name": "a\x1b[31m"}],
        [{"idx": 1, "name": "left\u202egnul"}],
        [{"idx": 1, "name": "lung\\left"}],
        [{"idx": 1, "name": " lung"}],
        [{"idx": 1, "name": ["lung"]}],
        [{"idx": 10**12, "name": "lung"}],
        [{"idx": 1, "name": "lung"}] * 1025,
    ],
)
def test_classes_that_no_file_or_archive_can_hold_are_refused(entries):
    with pytest.raises(RequestError, match="label_info: expected") as caught:
        check_label_info(entries)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 300


def test_classes_of_all_languages_and_what_html_holds_are_names():
    check_label_info([{"idx": 1, "name": 'Läsion <T3> & "rand"'}, {"idx": 2, "name": "肝臓"}, {"idx": 3}, "x"])
    check_label_info(None)
    check_label_info({"not": "a list"})


def test_names_of_other_programs_are_made_fit():
    assert clean_class_name("  a\\b\n\x00c" + "x" * 99) == "a/b  c" + "x" * 58
    assert clean_class_name("\n\t") == ""


@pytest.fixture
def slow_server(tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "PATIENCE", 0.3)
    app = FastAPI()

    @app.put("/session/")
    async def taken(request: Request):
        return {"size": len(await request.body())}

    guard.install(app, Given(tmp_path))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()
    server.should_exit = True
    thread.join()


@pytest.mark.parametrize("drip", [0, 20])
def test_a_body_that_stalls_or_drips_is_not_waited_for(slow_server, drip):
    with socket.create_connection(slow_server, timeout=20) as connection:
        head = b"PUT /session/ HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/plain\r\nContent-Length: 1000\r\n\r\n"
        connection.sendall(head)
        for _ in range(drip):
            connection.sendall(b" ")
            time.sleep(0.05)
        assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")


def test_a_body_that_pauses_for_a_moment_is_taken(slow_server):
    with socket.create_connection(slow_server, timeout=20) as connection:
        connection.sendall(b"PUT /session/ HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n\r\n{}")
        time.sleep(0.1)
        connection.sendall(b"  ")
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("tag", ["final", "original"])
def test_a_label_that_promises_far_more_than_its_image_is_refused_before_it_is_unpacked(tmp_path, tag):
    """Class maps may shrink by any factor, so only their image tells what is too much."""
    store = ConfinedDatastore(str(tmp_path / "studies"), tmp_path / "state", 1 << 31)
    (tmp_path / "studies" / "a.nii").write_bytes(nifti())
    (tmp_path / "studies" / "b.mha").write_bytes(metaimage())
    (tmp_path / "studies" / "c.dcm").write_bytes(dicom())
    (tmp_path / "l.nii.gz").write_bytes(gzip.compress(with_dims(500, 500, 500)))
    for image_id in "abc":
        with pytest.raises(ImageTooLarge, match="expected an image of at most 64 MB"):
            store.save_label(image_id, str(tmp_path / "l.nii.gz"), tag, {})
