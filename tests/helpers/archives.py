"""An archive in a thread that answers as a test wants it to: well, slowly, with nonsense, or not at all."""

import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pydicom

from tests.helpers.dicom_files import write_series

BOUNDARY = "part"
MULTIPART = f'multipart/related; type="application/dicom"; boundary={BOUNDARY}'


def series_entry(uid: str, study: str = "1.2", modality: str = "CT", instances: int = 2) -> dict:
    """A series as QIDO lists it."""
    values = {
        "00080060": modality,
        "0020000D": study,
        "0020000E": uid,
        "00100020": f"patient {uid}",
        "00201209": instances,
    }
    return {tag: {"vr": "UI", "Value": [value]} for tag, value in values.items()}


def series_files(folder: Path) -> list[bytes]:
    """Two slices of a series."""
    written = write_series(folder, np.zeros((2, 8, 8), np.int16), StudyInstanceUID="1.2", FrameOfReferenceUID="1.2.9")
    return [path.read_bytes() for path in sorted(written.iterdir())]


def multipart(files: list[bytes]) -> bytes:
    parts = (f"\r\n--{BOUNDARY}\r\nContent-Type: application/dicom\r\n\r\n".encode() + file for file in files)
    return b"".join(parts) + f"\r\n--{BOUNDARY}--\r\n".encode()


def of_series(file: bytes, uid: str) -> bytes:
    """A file as one of a series; what isn't DICOM stays as it is."""
    try:
        dataset = pydicom.dcmread(io.BytesIO(file))
    except Exception:
        return file
    dataset.SeriesInstanceUID = uid
    target = io.BytesIO()
    dataset.save_as(target)
    return target.getvalue()


class FakeArchive:
    """What it holds, and how it behaves.

    Attributes:
        address: what `--studies` gets.
        series: QIDO entries, of images and SEGs. files: of every series, which each becomes its own when it is asked
            for. foreign: whether the files are sent as they are, whatever series they are of.
        stored: bodies that were stored. told: the answer to that. keeps: whether it gives them back as objects of
            series of their own.
        asked: the paths that were asked for, with their queries.
        behave: called with the handler before each answer; True if it has answered itself.
        let_go: set at the end, for behaviours that wait.
    """

    def __init__(self, port: int) -> None:
        self.address = f"http://127.0.0.1:{port}/dicom-web"
        self.series: list = []
        self.files: list[bytes] = []
        self.foreign = False
        self.stored: list[bytes] = []
        self.told = b"{}"
        self.keeps = False
        self.kept: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.behave: Callable[[Handler], bool | None] = lambda handler: False
        self.let_go = threading.Event()

    def keep(self, body: bytes) -> None:
        """List what was stored."""
        content = body.partition(b"\r\n\r\n")[2].rpartition(b"\r\n--")[0]
        header = pydicom.dcmread(io.BytesIO(content), stop_before_pixels=True)
        self.kept[str(header.SeriesInstanceUID)] = content
        self.series.append(series_entry(str(header.SeriesInstanceUID), str(header.StudyInstanceUID), "SEG", 1))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    archive: FakeArchive

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        self.archive.asked.append(self.path)
        if self.archive.behave(self):
            return
        if parts.path.endswith("/dicom-web/series"):
            self.lists()
        elif (uid := parts.path.split("/")[5]) in self.archive.kept:
            content = self.archive.kept[uid]
            if parts.path.endswith("/metadata"):
                header = pydicom.dcmread(io.BytesIO(content), stop_before_pixels=True)
                self.answer(json.dumps([header.to_json_dict()]).encode())
            else:
                self.answer(multipart([content]), MULTIPART)
        elif "/instances/" in parts.path or parts.path.count("/") == 5:
            files = self.archive.files
            if not self.archive.foreign and "/instances/" not in parts.path:
                files = [of_series(file, uid) for file in files]
            self.answer(multipart(files), MULTIPART)
        else:
            self.answer(b"", status=404)

    def do_POST(self) -> None:
        self.archive.asked.append(self.path)
        if not self.archive.behave(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            self.archive.stored.append(body)
            if self.archive.keeps:
                self.archive.keep(body)
            self.answer(self.archive.told)

    def lists(self) -> None:
        is_seg = self.query.get("Modality") == "SEG"
        found = [
            entry
            for entry in self.archive.series
            if (isinstance(entry, dict) and entry.get("00080060", {}).get("Value") == ["SEG"]) == is_seg
        ]
        self.answer(json.dumps(found[int(self.query.get("offset", 0)) :]).encode())

    def answer(self, content: bytes, kind: str = "application/dicom+json", status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"content-type": kind, "content-length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def silent(self) -> bool:
        """Take the request and never answer."""
        self.archive.let_go.wait(30)
        self.close_connection = True
        return True

    def log_message(self, *arguments) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request, client_address) -> None:
        """Nothing: clients that give up are what is tested."""


@contextmanager
def fake_archive() -> Iterator[FakeArchive]:
    """An archive without any series, for the length of the block."""
    handler = type("OwnHandler", (Handler,), {})
    server = _Server(("127.0.0.1", 0), handler)
    handler.archive = FakeArchive(server.server_port)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield handler.archive
    finally:
        handler.archive.let_go.set()
        server.shutdown()
        server.server_close()
