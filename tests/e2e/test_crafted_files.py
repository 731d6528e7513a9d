"""Crafted files sent to a real server, and put where it finds them: each is refused or read for what it is.

A canary lies beside everything; no answer may hold its bytes. No file may cost a gigabyte or ten seconds, and the
server answers afterwards. The same files come from an archive, as the instances of its series.
"""

import gzip
import io
import json
import time
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import requests
from pydicom import dcmread
from pydicom.uid import JPEG2000Lossless, JPEGBaseline8Bit, JPEGLSLossless, RLELossless

from tests.e2e.server import Server, serving
from tests.helpers.archives import fake_archive, series_entry
from tests.helpers.itk_files import META_REFUSED, NRRD_REFUSED
from tests.helpers.uploads import (
    GREY,
    VOLUME,
    crashing_dicom,
    dicom,
    metaimage,
    nifti,
    nrrd,
    picture,
    png,
    sound_files,
    tarred,
    with_dims,
    zipped,
)

CANARY = b"the canary sings"
MOST_MB, MOST_SECONDS = 1024, 10.0
TIMEOUT = 60
HDF5 = b"\x89HDF\r\n\x1a\n"
HUGE = "40000 40000 40000"


def with_bytes(content: bytes, at: int, new: bytes) -> bytes:
    return content[:at] + new + content[at + len(new) :]


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def rle_bomb() -> bytes:
    dataset = dcmread(io.BytesIO(dicom(syntax=RLELossless)))
    dataset.Rows = dataset.Columns = 50_000
    target = io.BytesIO()
    dataset.save_as(target, write_like_original=False)
    return target.getvalue()


ZEROS = bytes(1 << 28)
# A level of compression: a 230th is left of zeros.
FAST = 1
BOMB = gzip.compress(with_dims(512, 512, 512) + ZEROS, FAST)
HEADERS = {
    f"{name}.{'nrrd' if text.startswith('NRRD') else 'mha'}": text.encode()
    + b"\n" * text.startswith("NRRD")
    + bytes(120)
    for name, text in (*NRRD_REFUSED.items(), *META_REFUSED.items())
}
CRAFTED = HEADERS | {
    "thousand channels.mha": metaimage("100 100 100", more="ElementNumberOfChannels = 1000\n"),
    "thousand channels packed.mha": metaimage(
        "500 500 40", True, "ElementNumberOfChannels = 1000\n", data=zlib.compress(b"")
    ),
    "huge.mha": metaimage(HUGE),
    "huge.nrrd": nrrd(HUGE),
    "huge packed.nrrd": nrrd(HUGE, "gzip", data=gzip.compress(bytes(1000))),
    "bomb.nrrd": nrrd("512 512 512", "gzip", data=gzip.compress(ZEROS, FAST)),
    "bomb.mha": metaimage("512 512 512", True, data=zlib.compress(ZEROS, FAST)),
    "short.nrrd": nrrd(data=VOLUME.tobytes()[:-1]),
    "short.mha": metaimage(data=VOLUME.tobytes()[:-1]),
    "HDF5 in NRRD.nrrd": nrrd().ljust(2048, b"\0") + HDF5 + bytes(4096),
    "HDF5 in MetaImage.mha": metaimage().ljust(4096, b"\0") + HDF5 + bytes(4096),
    "HDF5 in NIfTI.nii": with_bytes(nifti(), 512, HDF5),
    "HDF5 first.nrrd": HDF5 + bytes(4096),
    "HDF5 first.nii": HDF5 + bytes(4096),
    "HDF5 far.nrrd": nrrd().ljust(1 << 16, b"\0") + HDF5 + bytes(4096),
    "DICOM in NIfTI.nii": with_bytes(nifti(), 128, b"DICM"),
    "Analyze.nii": with_bytes(nifti(), 344, b"\0\0\0\0"),
    "pair.nii": with_bytes(nifti(), 344, b"ni1\0"),
    "offset.nii": with_bytes(nifti(), 108, np.float32(3e9).tobytes()),
    "offset nan.nii": with_bytes(nifti(), 108, np.float32("nan").tobytes()),
    "offset negative.nii": with_bytes(nifti(), 108, np.float32(-352).tobytes()),
    "type.nii": with_bytes(nifti(), 70, b"\xff\x7f"),
    "huge.nii": with_dims(32767, 32767, 32767),
    "negative.nii": with_dims(-5, 12, 3),
    "no dimensions.nii": with_dims(),
    "huge.nii.gz": gzip.compress(with_dims(32767, 32767, 32767)),
    "large.nii.gz": gzip.compress(with_dims(2000, 2000, 400)),
    "bomb.nii.gz": BOMB,
    "longer.nii.gz": gzip.compress(nifti() + bytes(64 << 20), FAST),
    "cut.nii.gz": cut(gzip.compress(nifti())),
    "cut.nii": cut(nifti()),
    "members.nii.gz": gzip.compress(b"") * 100_000,
    "bomb.png": png(30_000, 30_000, zlib.compress(bytes(1000))),
    "whole bomb.png": png(16_000, 16_000, zlib.compress(bytes(16_001 * 16_000), FAST)),
    "cut.png": cut(picture(GREY, "PNG")),
    "bomb.tif": with_bytes(picture(GREY, "TIFF"), 18, np.uint32(60_000).tobytes()),
    "cut.tif": cut(picture(GREY, "TIFF", compression="tiff_lzw")),
    "cut.jpg": cut(picture(GREY, "JPEG")),
    "cut.bmp": cut(picture(GREY, "BMP")),
    "postscript.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n",
    "JPEG.png": picture(GREY, "JPEG"),
    "GIF.jpg": b"GIF89a" + bytes(200),
    "RLE bomb.dcm": rle_bomb(),
    "JPEG bomb.dcm": dicom(GREY, JPEGBaseline8Bit, "JPEG", Rows=50_000, Columns=50_000),
    "JPEG 2000 bomb.dcm": dicom(GREY, JPEG2000Lossless, "JPEG2000", Rows=50_000, Columns=50_000),
    "JPEG-LS bomb.dcm": dicom(GREY, JPEGLSLossless, "JPEG-LS", Rows=50_000, Columns=50_000),
    "JPEG-LS that crashes.dcm": crashing_dicom(),
    "JPEG of another size.dcm": dicom(GREY, JPEGBaseline8Bit, "JPEG", Rows=300, Columns=200),
    "cut JPEG 2000.dcm": cut(dicom(GREY, JPEG2000Lossless, "JPEG2000")),
    "frames.dcm": dicom(GREY, NumberOfFrames=2_000_000),
    "frames negative.dcm": dicom(GREY, NumberOfFrames=-5),
    "rows.dcm": dicom(GREY, Rows=65535, Columns=65535),
    "short.dcm": dicom(GREY, PixelData=GREY.tobytes()[:-10]),
    "samples.dcm": dicom(GREY, SamplesPerPixel=60_000),
    "no pixels.dcm": dicom(GREY, Rows=None, Columns=None, PixelData=None),
    "script.dcm": b"#!/bin/sh\n" + bytes(400),
}
ARCHIVES = {
    "script.zip": zipped(("sitecustomize.py", b"import os")),
    "nested.zip": zipped(("a.zip", zipped(("a.nii", nifti())))),
    "bad image.zip": zipped(("a.nrrd", nrrd(more="data file: canary"))),
    "bomb.zip": zipped(("a.nii.gz", BOMB)),
    "bad.tar.gz": tarred(("a.mha", metaimage(file="canary", data=b""))),
}


class Watched:
    """A server whose memory and answers are looked at after each request."""

    def __init__(self, server: Server):
        self.server = server
        self.own = psutil.Process(server.process.pid)
        self.start = self.memory()

    def memory(self) -> int:
        """The most that the server and its decoders ever had, in MB."""
        total = 0
        for process in [self.own, *self.own.children(recursive=True)]:
            text = Path(f"/proc/{process.pid}/status").read_text()
            total += int(text.partition("VmHWM:")[2].split()[0]) >> 10
        return total

    def send(self, method: str, path: str, **options) -> requests.Response:
        started = time.monotonic()
        answer = requests.request(method, self.server.url + path, timeout=TIMEOUT, **options)
        assert time.monotonic() - started < MOST_SECONDS
        assert CANARY not in answer.content and b"root:" not in answer.content
        return answer


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("crafted")
    (folder / "tmp").mkdir()
    for place in (folder, folder / "tmp"):
        (place / "canary").write_bytes(CANARY * 500)
    studies = folder / "studies"
    studies.mkdir()
    (studies / "A.nii.gz").write_bytes(gzip.compress(nifti()))
    (studies / "labels" / "final").mkdir(parents=True)
    label = gzip.compress(nifti((VOLUME > 200).astype(np.uint8)))
    (studies / "labels" / "final" / "A.nii.gz").write_bytes(label)
    # Found there, not sent.
    (studies / "found.png").write_bytes(CRAFTED["bomb.png"])
    (studies / "found2.mha").write_bytes(CRAFTED["thousand channels.mha"])
    conf = {"image_size": "64", "support_max_items": "2"}
    server = Server(folder, studies, conf)
    try:
        environment = {"TMPDIR": str(folder / "tmp"), "MONAI_LABEL_AUTO_UPDATE_SCORING": "false"}
        yield Watched(server.start(environment))
    finally:
        server.stop()


def suffix(name: str) -> str:
    return name[name.index(".") :]


def test_each_crafted_file_is_refused_in_one_sentence_by_every_way_in(watched):
    assert len(CRAFTED) + len(ARCHIVES) >= 80
    wrong = {}
    for name, content in CRAFTED.items():
        file = (f"x{suffix(name)}", content)
        ways = {"image": ("PUT", "/datastore/image", {"image": "new"}, {"file": file})}
        # Headers are parsed in one place, whichever way they come.
        if name not in HEADERS:
            ways["session"] = "PUT", "/session/", {}, {"files": file}
            ways["infer"] = "POST", "/infer/sam2sgp", {"output": "image"}, {"file": file}
            ways["label"] = "PUT", "/datastore/label", {"image": "A", "tag": "final"}, {"label": file}
        answers = {
            way: watched.send(method, path, params=params, files=sent)
            for way, (method, path, params, sent) in ways.items()
        }
        held = answers.get("session")
        if held is not None and held.ok and name.endswith(".dcm"):
            # A session may hold a file whose compressed pixels are only looked at when it is segmented.
            params = {"session_id": answers.pop("session").json()["session_id"], "output": "image"}
            answers["session, segmented"] = watched.send("POST", "/infer/sam2sgp", params=params)
        for way, answer in answers.items():
            if not 400 <= answer.status_code < 500:
                wrong[name, way] = answer.status_code, answer.text[:200]
            elif not answer.ok and not answer.json()["detail"].isprintable():
                wrong[name, way] = answer.text
    assert not wrong, "\n".join(f"{case}: {found}" for case, found in wrong.items())
    for name, content in ARCHIVES.items():
        answer = watched.send("PUT", "/session/", params={"uncompress": "true"}, files={"files": (name, content)})
        assert 400 <= answer.status_code < 500, name
    assert watched.memory() - watched.start < MOST_MB
    assert watched.own.is_running() and watched.send("GET", "/info/").ok
    listed = json.loads(watched.send("GET", "/datastore/", params={"output": "all"}).text)["objects"]
    assert set(listed) == {"A", "found", "found2"} and set(listed["A"]["labels"]) == {"final"}


def test_files_found_in_the_folder_are_judged_like_those_sent(watched):
    for name in ("found", "found2"):
        answer = watched.send(
            "POST", "/infer/sam2sgp", params={"image": name, "output": "image"}, data={"params": "{}"}
        )
        assert answer.status_code == 422 and "expected" in answer.json()["detail"]
    assert watched.memory() - watched.start < MOST_MB


def test_sound_files_of_every_kind_still_come_in(watched):
    for name, content in sound_files().items():
        is_archive = name.endswith((".zip", ".tar.gz"))
        params = {"uncompress": "true"} if is_archive else {}
        answer = watched.send("PUT", "/session/", params=params, files={"files": (name, content)})
        assert answer.ok, f"{name}: {answer.text}"


@pytest.fixture(scope="module")
def archived(tmp_path_factory):
    """A server on an archive that answers as a test says."""
    folder = tmp_path_factory.mktemp("archived")
    (folder / "tmp").mkdir()
    (folder / "tmp" / "canary").write_bytes(CANARY * 500)
    conf = {"image_size": "64", "dicomweb_expiry": "0"}
    with fake_archive() as archive:
        archive.foreign = True
        environment = {"TMPDIR": str(folder / "tmp"), "MONAI_LABEL_AUTO_UPDATE_SCORING": "false"}
        with serving(folder, archive.address, conf, environment) as server:
            yield Watched(server), archive


def uid_of(content: bytes) -> str:
    """The series that a file says it is of, or that it is sent as."""
    with suppress(Exception):
        return str(dcmread(io.BytesIO(content), stop_before_pixels=True).SeriesInstanceUID)
    return "1.2.3"


def test_instances_of_an_archive_are_judged_like_files_of_clients(archived):
    """Also those that are no DICOM at all."""
    watched, archive = archived
    wrong = {}
    for name in CRAFTED.keys() - HEADERS.keys():
        content = CRAFTED[name]
        uid = uid_of(content)
        archive.series, archive.files = [series_entry(uid, modality="US", instances=1)], [content]
        ways = [("GET", "/datastore/image", {"image": uid})]
        if name.endswith(".dcm"):
            ways.append(("POST", "/infer/sam2sgp", {"image": uid}))
        for method, path, params in ways:
            answer = watched.send(method, path, params=params)
            if answer.status_code not in (*range(400, 500), 502) or not answer.json()["detail"].isprintable():
                wrong[name, path] = answer.status_code, answer.text[:200]
    assert not wrong, "\n".join(f"{case}: {found}" for case, found in wrong.items())
    assert watched.memory() - watched.start < MOST_MB
    assert watched.own.is_running() and watched.send("GET", "/info/").ok
