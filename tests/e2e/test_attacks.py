"""Requests that try to get out of the datastore, sent to a real server: each is refused, and nothing anywhere changes.

One server for all. The whole temporary folder, inside and outside the datastore, is hashed before and after each
attack; afterwards the server still answers and the approved labels are as they were.
"""

import gzip
import hashlib
import io
import json
import os
import resource
import socket
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

import nibabel as nib
import numpy as np
import pytest
import requests

from tests.e2e.server import REPO, Server

SIZE = (16, 16, 3)
LIMIT_MB = 1
TIMEOUT = 120
# Seconds for an answer that waits for nothing, on a machine that is busy with other things.
QUICK = 3.0
HEAD = b"GET /info/ HTTP/1.1\r\nHost: localhost\r\nX-Letters: " + b"x" * 1000
# Written by the server while it runs, by design.
ITS_OWN = ("server.log", "logs", ".lock", "__pycache__", "support", "state", "model")


def nifti(array: np.ndarray) -> bytes:
    return gzip.compress(nib.Nifti1Image(array, np.eye(4)).to_bytes())


IMAGE = nifti(np.random.default_rng(0).normal(size=SIZE).astype(np.float32))
LABEL = nifti((np.indices(SIZE)[0] > 8).astype(np.uint8))
SECRET = nifti(np.full(SIZE, 77, np.float32))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attacked")
    studies = folder / "studies"
    (studies / "labels" / "final").mkdir(parents=True)
    for name in ("A", "B", "C"):
        (studies / f"{name}.nii.gz").write_bytes(IMAGE)
    for name in ("A", "B"):
        (studies / "labels" / "final" / f"{name}.nii.gz").write_bytes(LABEL)
    (folder / "secret.nii.gz").write_bytes(SECRET)
    (folder / "tmp").mkdir()
    (studies / "linked.nii.gz").symlink_to(folder / "secret.nii.gz")
    conf = {"max_upload_mb": str(LIMIT_MB), "image_size": "64", "support_max_items": "2"}
    with_tmp = {"TMPDIR": str(folder / "tmp"), "MONAI_LABEL_AUTO_UPDATE_SCORING": "false"}
    server = Server(folder, studies, conf)
    try:
        yield server.start(with_tmp)
    finally:
        server.stop()


def state(folder: Path) -> dict[str, str]:
    """Digests of all files."""
    found = {}
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in ITS_OWN]
        for name in names:
            path = os.path.join(parent, name)
            if name not in ITS_OWN and os.path.isfile(path):
                about = os.stat(path)
                found[path] = digest(path, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)
    return found


@cache
def digest(path: str, *_: int) -> str:
    """Of a file, read again when anything was written to it: that changes its times, and nobody can set the last."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def put_label(image: str = "A", tag: str = "final", name: str = "l.nii.gz", content: bytes = LABEL, **more):
    return dict(
        method="PUT",
        path="/datastore/label",
        params={"image": image, "tag": tag},
        files={"label": (name, content)},
        **more,
    )


def put_image(image: str = "new", name: str = "i.nii.gz", content: bytes = IMAGE, **more):
    return dict(method="PUT", path="/datastore/image", params={"image": image}, files={"file": (name, content)}, **more)


def infer(image: str = "", parameters: dict | None = None, **more):
    data = {"params": json.dumps(parameters or {})}
    return dict(method="POST", path="/infer/sam2sgp", params={"image": image, "output": "image"}, data=data, **more)


def get(path: str, **params):
    return dict(method="GET", path=path, params=params)


def delete(path: str, **params):
    return dict(method="DELETE", path=path, params=params)


def put_names(*entries: dict):
    """A label with class names."""
    return put_label("C", data={"params": json.dumps({"label_info": list(entries)})})


def form(content: bytes, kind: str = "multipart/form-data; boundary=b", image: str = "C"):
    """A label in a form as no well-behaved client writes it."""
    params, headers = {"image": image, "tag": "final"}, {"Content-Type": kind}
    return dict(method="PUT", path="/datastore/label", params=params, data=content, headers=headers)


def part(name: bytes) -> bytes:
    head = b'--b\r\nContent-Disposition: form-data; name="label"; filename="' + name + b'"\r\n\r\n'
    return head + LABEL + b"\r\n--b--\r\n"


def decide(action: str, headers: dict | None = None, **more):
    """A click on the support page."""
    decision = more or {"json": {"image": "A", "label_tag": "final"}}
    return dict(method="POST", path=f"/sam2sgp/{action}", headers=headers or {}, **decision)


def archive(name: str, content: bytes = b"x", kind: bytes | None = None) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w:gz") as packed:
        member = tarfile.TarInfo(name)
        member.size = 0 if kind else len(content)
        if kind:
            member.type, member.linkname = kind, "/etc/passwd"
        packed.addfile(member, io.BytesIO(content))
    return target.getvalue()


def zipped(name: str) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as packed:
        packed.writestr(name, "x")
    return target.getvalue()


def session(content: bytes, name: str = "a.tar.gz"):
    return dict(method="PUT", path="/session/", params={"uncompress": "true"}, files={"files": (name, content)})


OTHER_SIZE = nifti(np.zeros((4, 4, 4), np.uint8))
FRACTIONS = nifti(np.full(SIZE, 0.5, np.float32))
BOMB = gzip.compress(bytes(LIMIT_MB * 9 << 20))
PICKLE = b"\x80\x04\x95\x1e\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system\x93\x8c\x05touch\x85R."
NRRD = b"NRRD0004\ntype: uchar\ndimension: 3\nsizes: 4 4 4\nencoding: raw\ndata file: /etc/passwd\n\n"
EVIL = {"Origin": "https://evil.example"}
# What a browser adds by itself to what another site's page asks for: a picture, and a form.
CROSS_SITE = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"}
FORM_OF_ANOTHER = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
REBOUND = {"Host": "evil.example:8000", "Origin": "http://evil.example:8000"}

# Shapes in which MONAI Label's handlers find a folder that joins the search path of the process they start.
FOLDERS = {
    "an option": {"bundle_path": "/tmp"},
    "pairs": [["bundle_path", "/tmp"]],
    "pairs of a model": {"finetune": [["bundle_path", "/tmp"]]},
    "pairs of a method": {"scores": [["bundle_path", "/tmp"]]},
    "an object of a model": {"finetune": {"bundle_path": "/tmp"}},
    "an object of a method": {"scores": {"bundle_path": "/tmp"}},
    "nested pairs": {"finetune": [[["bundle_path", "/tmp"]]], "scores": [[["bundle_path", "/tmp"]]]},
}

ATTACKS = {
    "label id up": put_label("../../secret"),
    "label id absolute": put_label("/tmp/evil"),
    "label id backslash": put_label("..\\secret"),
    "label id NUL": put_label("A\0"),
    "label id newline": put_label("A\nB"),
    "label id long": put_label("A" * 5000),
    "label id dots": put_label(".."),
    "label id hidden": put_label(".lock"),
    "label id unknown": put_label("nobody"),
    "label of linked image": put_label("linked"),
    "tag up": put_label(tag="../.."),
    "tag up to another name": put_label(tag="../../../evil"),
    "tag absolute": put_label(tag="/tmp"),
    "tag NUL": put_label(tag="final\0"),
    "tag long": put_label(tag="t" * 300),
    "label name of another kind": put_label(name="l.py"),
    "label name long": put_label(name="l" * 400 + ".nii.gz"),
    "label that is a pickle": put_label(name="l.pkl", content=PICKLE),
    "label that is a pickle named otherwise": put_label(content=PICKLE),
    "label truncated": put_label(content=LABEL[:-30]),
    "label of another size": put_label(content=OTHER_SIZE),
    "label of fractions": put_label(content=FRACTIONS),
    "label that unpacks to too much": put_label(content=BOMB),
    "label with invalid JSON": put_label(data={"params": "{"}),
    "label with JSON too deep": put_label(data={"params": "[" * 100_000}),
    "image id up": put_image("../evil"),
    "image id absolute": put_image("/tmp/evil"),
    "image over another": put_image("A", content=SECRET),
    "image under another kind": put_image("A", name="i.nii", content=gzip.decompress(SECRET)),
    "image name of another kind": put_image(name="evil.so"),
    "image that is none": put_image(content=b"#!/bin/sh"),
    "image that reads elsewhere": put_image(name="i.nrrd", content=NRRD),
    "image of another content": put_image(name="i.png", content=IMAGE),
    "upload too large": put_image(content=bytes(2 << 20)),
    "get image up": get("/datastore/image", image="../secret"),
    "get image absolute": get("/datastore/image", image="/etc/passwd"),
    "get image linked": get("/datastore/image", image="linked"),
    "get label up": get("/datastore/label", label="../../secret", tag="final"),
    "get label tag up": get("/datastore/label", label="secret", tag="../.."),
    "get image info up": get("/datastore/image/info", image="../secret"),
    "get not UTF-8": get("/datastore/image?image=%ff%fe"),
    "delete image up": delete("/datastore/image", id="../secret"),
    "delete image absolute": delete("/datastore/image", id="/etc/passwd"),
    "delete label up": delete("/datastore/label", id="../../secret", tag="final"),
    "delete label tag up": delete("/datastore/label", id="secret", tag="../.."),
    "image info up": dict(method="PUT", path="/datastore/image/info", params={"image": "../A"}, data={"info": "{}"}),
    "image info no object": dict(
        method="PUT", path="/datastore/image/info", params={"image": "A"}, data={"info": "[]"}
    ),
    "infer absolute": infer("/etc/passwd"),
    "infer up": infer("../secret"),
    "infer unknown": infer("nobody"),
    "infer a file beside the server": infer("server.log"),
    "infer image in parameters": infer("A", {"image": "/etc/passwd"}),
    "infer tag up": infer("A", {"save_label": True, "label_tag": "../../x"}),
    "infer extension up": infer("A", {"result_extension": "/../../evil.nii.gz"}),
    "infer session in parameters": infer("A", {"session": {"path": "/etc"}}),
    "infer bomb": infer("A", files={"file": ("i.nii.gz", BOMB)}),
    "infer pickle": infer("A", files={"file": ("i.pt", PICKLE)}),
    "session id up": get("/session/%2e%2e", image="true"),
    "session delete up": delete("/session/%2e%2e"),
    "session id no id": delete("/session/studies"),
    "infer session up": dict(infer(), params={"session_id": "../studies"}),
    "archive up": session(archive("../../evil")),
    "archive absolute": session(archive("/tmp/evil")),
    "archive link": session(archive("a", kind=tarfile.SYMTYPE)),
    "archive device": session(archive("a", kind=tarfile.CHRTYPE)),
    "archive bomb": session(archive("a", bytes(LIMIT_MB * 9 << 20))),
    "archive zip up": session(zipped("../evil"), "a.zip"),
    "archive none": session(b"x" * 100),
    "model upload": dict(method="PUT", path="/model/sam2sgp", files={"file": ("m.pt", PICKLE)}),
    "model delete": delete("/model/sam2sgp"),
    "reload": dict(method="POST", path="/reload"),
    **{
        f"{path} with a folder as {shape}": dict(method="POST", path=path, json=body)
        for path in ("/train/", "/train/finetune", "/scoring/", "/scoring/scores", "/batch/infer/sam2sgp")
        for shape, body in FOLDERS.items()
    },
    "infer with a folder": infer("A", {"bundle_path": "/tmp"}),
    "infer with pairs": infer("A", [["bundle_path", "/tmp"], ["image", "/etc/passwd"]]),
    "infer with an option twice": dict(infer("A"), data={"params": '{"k": 1, "k": 2}'}),
    "infer with an option that is none": dict(infer("A"), data={"params": '{"k": NaN}'}),
    "infer with another field": dict(infer("A"), data={"params": "{}", "bundle_path": "/tmp"}),
    "infer with another query": dict(infer("A"), params={"image": "A", "bundle_path": "/tmp"}),
    "batch of paths": dict(method="POST", path="/batch/infer/sam2sgp", json={"images": ["/etc/passwd"]}),
    "batch of a way up": dict(method="POST", path="/batch/infer/sam2sgp", json={"images": ["A", "../secret"]}),
    "batch of a linked image": dict(method="POST", path="/batch/infer/sam2sgp", json={"images": ["linked"]}),
    "train while all wait": dict(method="POST", path="/train/finetune", params={"run_sync": "true"}),
    "score while all wait": dict(method="POST", path="/scoring/scores", params={"run_sync": "1"}),
    "batch while all wait": dict(method="POST", path="/batch/infer/sam2sgp", params={"run_sync": "yes"}),
    "unknown trainer": dict(method="POST", path="/train/other"),
    "unknown strategy": dict(method="POST", path="/activelearning/other", json={}),
    "next image with pairs": dict(method="POST", path="/activelearning/random", json=[["strategy", "random"]]),
    "image info that passes for a path": dict(
        method="PUT", path="/datastore/image/info", params={"image": "A"}, data={"info": '{"path": "/etc/passwd"}'}
    ),
    "label info that passes for the server's": dict(
        method="PUT", path="/datastore/label/info", params={"label": "A", "tag": "final"}, data={"info": '{"ts": "x"}'}
    ),
    "image info too deep": dict(
        method="PUT",
        path="/datastore/image/info",
        params={"image": "A"},
        data={"info": '{"a":' * 197 + "1" + "}" * 197},
    ),
    "another site's page about the addresses": get("/docs"),
    "GPU of the machine": get("/logs/gpu"),
    "train with an invalid device": dict(method="POST", path="/train/finetune", json={"device": "cuda:$(id)"}),
    "train from another site": dict(method="POST", path="/train/finetune", headers=EVIL),
    "upload from another site": put_label("C", headers=EVIL),
    "whole slide": dict(method="POST", path="/infer/wsi/sam2sgp", json={"params": {"image": "/etc/passwd"}}),
    "proxy up": get("/proxy/dicom/%2e%2e/%2e%2e/etc/passwd"),
    "proxy of a folder": get("/proxy/dicom/studies"),
    "path up": get("/static/%2e%2e/%2e%2e/main.py"),
    "wrong content type": form(LABEL, "text/plain"),
    "form without a boundary": form(b"--x", "multipart/form-data"),
    "form without an end": form(part(b"l.nii.gz")[:-9]),
    "form in another encoding": form(part(b"l.nii.gz"), "multipart/form-data; boundary=b; charset=utf-7"),
    "label name not UTF-8": form(part(b"l\xff\xfe.nii.gz")),
    "label name with a control character": form(part(b"l\x0b.nii.gz")),
    "class name long": put_names({"idx": 1, "name": "x" * 300}),
    "class name of control characters": put_names({"idx": 1, "name": "\x1b[2J\r\nliver"}),
    "class name that reads backwards": put_names({"idx": 1, "name": "\u202erevil"}),
    "class name no text": put_names({"idx": 1, "name": {"a": 1}}),
    "class value huge": put_names({"idx": 10**15, "name": "liver"}),
    "classes too many": put_names(*[{"idx": 1, "name": "liver"}] * 2000),
    "class names afterwards": dict(
        method="PUT",
        path="/datastore/label/info",
        params={"label": "A", "tag": "final"},
        data={"info": json.dumps({"label_info": [{"idx": 1, "name": "a\tb"}]})},
    ),
    "infer upload with an invalid option": infer("", {"k": 0}, files={"file": ("i.nii.gz", IMAGE)}),
    "infer upload cut short": infer("", files={"file": ("i.nii.gz", IMAGE[:-40])}),
    "infer upload without voxels": infer("", files={"file": ("i.nii", gzip.decompress(IMAGE)[:400])}),
    "infer as DICOM what is none": dict(infer("C"), params={"image": "C", "output": "dicom_seg"}),
    "infer into nowhere": dict(infer("C"), params={"image": "C", "output": "/tmp/evil"}),
    "infer an expired session": dict(infer("C"), params={"session_id": "12345678-1234-1234-1234-123456789abc"}),
    "read under another site's name": dict(get("/datastore/image", image="A"), headers={"Host": "evil.example"}),
    "decide under another site's name": decide("remove", REBOUND),
    "read from another site": dict(get("/datastore/image", image="A"), headers=EVIL),
    "picture in another site's page": dict(get("/sam2sgp/picture", image="A"), headers=CROSS_SITE),
    "decide from another site": decide("remove", EVIL),
    "decide from a page of no site": decide("remove", {"Origin": "null"}),
    "decide from another port": decide("remove", {"Host": "localhost", "Origin": "http://localhost:9999"}),
    "decide in another site's frame": decide("remove", FORM_OF_ANOTHER),
    "decide by a form": decide("remove", data={"image": "A", "label_tag": "final"}),
    "decide by plain text": decide(
        "remove", {"Content-Type": "text/plain"}, data=json.dumps({"image": "A", "label_tag": "final"})
    ),
    "decide upwards": decide("approve", json={"image": "../../secret", "label_tag": "original"}),
    "decide with a tag upwards": decide("remove", json={"image": "A", "label_tag": "../final"}),
    "page files upwards": get("/sam2sgp/assets/..%2f..%2fmain.py"),
}


def send(server, request: dict) -> requests.Response:
    request = dict(request)
    return requests.request(request.pop("method"), server.url + request.pop("path"), timeout=TIMEOUT, **request)


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused_and_nothing_changes(server, name):
    before = state(server.folder)
    try:
        answer = send(server, ATTACKS[name])
    except requests.ConnectionError:
        # The server may close an upload that is too large before its end.
        assert name == "upload too large"
    else:
        assert 400 <= answer.status_code < 500, answer.text
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert b"root:" not in answer.content and SECRET not in answer.content
        if "json" in answer.headers.get("content-type", ""):
            assert str(server.folder) not in answer.text
    assert state(server.folder) == before


MARK = "from pathlib import Path\nPath(__file__).with_name('ran').write_text('')\n"


@pytest.fixture(scope="module")
def module(server) -> Path:
    """The folder of a module that a client brings, where sessions are kept; in case that sessions take none."""
    told = send(server, dict(method="PUT", path="/session/", files={"files": ("sitecustomize.py", MARK)}))
    assert str(server.folder) not in told.text
    folder = server.folder / "sessions" / "own"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(MARK)
    return folder


@pytest.fixture(scope="module")
def batch(server, module) -> dict:
    """What is told of the inference of a file that can't be read, asked for by a long request."""
    broken = server.studies / "broken.nii.gz"
    broken.write_bytes(IMAGE[:-40])
    many = {"images": ["broken"] * 60_000, "max_batch_size": 1}
    try:
        answer = send(server, dict(method="POST", path="/batch/infer/sam2sgp", json=many))
        assert answer.ok and str(server.folder) not in answer.text
        return server.finished("/batch/infer")
    finally:
        broken.unlink()


def test_no_answer_tells_where_the_server_keeps_its_files(server, batch):
    """A file that can't be read is named by every answer that has to do with it, and by its name only."""
    broken = server.studies / "broken.nii.gz"
    broken.write_bytes(IMAGE[:-40])
    label = server.studies / "labels" / "final" / "broken.nii.gz"
    label.write_bytes(LABEL[:-40])
    asked = [
        get("/sam2sgp/picture", image="broken"),
        get("/sam2sgp/picture", image="broken", label_tag="final"),
        get("/sam2sgp/"),
        get("/info/"),
        get("/datastore/", output="all"),
        get("/datastore/image/info", image="broken"),
        infer("broken"),
        infer("C"),
        put_label("broken"),
        put_label("C"),
        delete("/datastore/label", id="C", tag="final"),
    ]
    try:
        answers = [send(server, request) for request in asked]
        assert answers[0].status_code == 422 and "broken.nii.gz" in answers[0].text
        assert "broken" in json.dumps(batch["details"])
        told = [json.dumps(batch), *(answer.text for answer in answers)]
    finally:
        broken.unlink()
        label.unlink()
    own = (str(server.folder), str(REPO), sys.prefix, tempfile.gettempdir())
    assert [text for text in told if any(folder in text for folder in own)] == []


def raw(server, content: bytes) -> bytes:
    parts = urlsplit(server.url)
    with socket.create_connection((parts.hostname, parts.port), timeout=TIMEOUT) as connection:
        try:
            connection.sendall(content)
            connection.shutdown(socket.SHUT_WR)
            return connection.recv(1 << 16)
        except OSError:
            return b""


def test_uploads_without_a_length_or_cut_short_are_refused(server):
    head = b"PUT /datastore/label?image=C HTTP/1.1\r\nHost: localhost\r\n"
    head += b"Content-Type: multipart/form-data; boundary=b\r\n"
    part = b'--b\r\nContent-Disposition: form-data; name="label"; filename="l.nii.gz"\r\n\r\n'
    before = state(server.folder)
    chunk = b"10000\r\n" + bytes(1 << 16) + b"\r\n"
    answer = raw(server, head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 32 + b"0\r\n\r\n")
    assert not answer or b" 413 " in answer.splitlines()[0]
    body = part + LABEL
    raw(server, head + b"Content-Length: %d\r\n\r\n" % (len(body) + 500) + body)
    raw(server, head + b"Content-Length: -5\r\n\r\n" + body)
    assert requests.get(f"{server.url}/info/", timeout=TIMEOUT).ok
    assert state(server.folder) == before


def to_secret(path: Path) -> None:
    path.symlink_to(path.parents[1] / "secret.nii.gz")


def detached(header: str, name: str = "odd.mhd", make=None):
    """A header in the folder, and what it names: a link out, or a pipe."""

    def write(studies: Path) -> None:
        (studies / name).write_text(header)
        (make or to_secret)(studies / "odd.raw")

    return write


def pair(make, magic: bytes = b"ni1\0", beside: str = "hdr"):
    def write(studies: Path) -> None:
        nib.save(nib.Nifti1Pair(np.zeros((4, 4, 4), np.int16), np.eye(4)), studies / "odd.img")
        content = (studies / "odd.hdr").read_bytes()
        (studies / "odd.hdr").write_bytes(content[:344] + magic + content[348:])
        (studies / f"odd.{beside}").unlink(missing_ok=True)
        make(studies / f"odd.{beside}")

    return write


MHD = "NDims = 3\nDimSize = 4 4 4\nElementType = MET_SHORT\nElementDataFile = {}\n"
NHDR = "NRRD0004\ntype: short\ndimension: 3\nsizes: 4 4 4\nendian: little\nencoding: raw\n{}\n\n"
# What somebody who may write to the folder puts there.
PUT_THERE = {
    "a link out": lambda studies: to_secret(studies / "odd.nii.gz"),
    "a link to a device": lambda studies: (studies / "odd.nii").symlink_to("/dev/zero"),
    "a pipe": lambda studies: os.mkfifo(studies / "odd.nii.gz"),
    "a pipe without a suffix": lambda studies: os.mkfifo(studies / "odd"),
    "a folder elsewhere": lambda studies: (studies / "odd").symlink_to(studies.parent),
    "a pipe as a label": lambda studies: os.mkfifo(studies / "labels" / "final" / "C.nii.gz"),
    "a link out as a label": lambda studies: (studies / "labels" / "final" / "C.nii.gz").symlink_to(
        studies.parent / "secret.nii.gz"
    ),
    "a pipe as the journal": lambda studies: os.mkfifo(studies / ".datastore_v2.unfinished.json"),
    "a pair with a link": pair(to_secret),
    "a pair with a pipe": pair(os.mkfifo),
    "a pair of SPM with a pipe": pair(os.mkfifo, bytes(4), "mat"),
    "MetaImage with a link": detached(MHD.format("odd.raw")),
    "MetaImage with a pipe": detached(MHD.format("odd.raw"), make=os.mkfifo),
    "MetaImage with a list": detached(MHD.format("LIST\nodd.raw")),
    "NRRD with a link": detached(NHDR.format("data file: odd.raw"), "odd.nhdr"),
    "NRRD with a way up": detached(NHDR.format("data file: ../secret.nii.gz"), "odd.nhdr"),
    "NRRD that skips backwards": detached(NHDR.format("byte skip: -1\ndata file: odd.raw"), "odd.nhdr"),
    "a name of no letters": lambda studies: open(os.fsencode(studies) + b"/odd\xff\n.txt", "wb").close(),
}
MOST_SECONDS = 10


@pytest.mark.parametrize("name", PUT_THERE)
def test_what_lies_in_the_folder_leads_nowhere_and_keeps_nobody_waiting(server, name):
    before = set(server.studies.rglob("*"))
    PUT_THERE[name](server.studies)
    asked = [
        get("/info/"),
        get("/datastore/", output="all"),
        get("/sam2sgp/"),
        get("/datastore/image", image="odd"),
        get("/datastore/label", label="C", tag="final"),
        get("/sam2sgp/picture", image="odd"),
        infer("odd"),
    ]
    try:
        for number, request in enumerate(asked):
            sent = dict(request)
            path = server.url + sent.pop("path")
            answer = requests.request(sent.pop("method"), path, timeout=MOST_SECONDS, **sent)
            assert answer.status_code < 500 and SECRET not in answer.content, (request, answer.text[:200])
            assert answer.ok or number > 2, (request, answer.text[:200])
            # A header alone is what lies in the folder; its voxels come from nowhere else.
            assert number < 5 or not answer.ok, (request, answer.text[:200])
    finally:
        for path in set(server.studies.rglob("*")) - before:
            if path.is_symlink() or not path.is_dir():
                path.unlink(missing_ok=True)


def test_an_index_that_is_a_pipe_is_set_aside(server):
    index = server.studies / "datastore_v2.json"
    index.unlink(missing_ok=True)
    os.mkfifo(index)
    listed = requests.get(f"{server.url}/datastore/", {"output": "all"}, timeout=MOST_SECONDS).json()["objects"]
    assert set(listed) == {"A", "B", "C"} and set(listed["A"]["labels"]) >= {"final"}
    for path in server.studies.glob("datastore_v2.json.damaged*"):
        path.unlink()


def test_conflicting_saves_at_once_leave_one_whole_label_each(server):
    labels = [nifti(((np.indices(SIZE)[0] > value) * 1).astype(np.uint8)) for value in range(3, 9)]
    audit = server.state / "audit.jsonl"
    before = len(audit.read_text().splitlines()) if audit.exists() else 0
    answers = []

    def save(content: bytes) -> None:
        answers.append(send(server, put_label("C", content=content)).status_code)

    threads = [threading.Thread(target=save, args=(content,)) for content in labels]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [200] * len(labels)
    saved = requests.get(f"{server.url}/datastore/label", {"label": "C", "tag": "final"}, timeout=TIMEOUT).content
    assert saved in labels
    noted = [json.loads(line) for line in audit.read_text().splitlines()[before:]]
    assert [entry["action"] for entry in noted if entry.get("image") == "C"] == ["approve"] * len(labels)


def test_decisions_at_once_leave_a_whole_label_or_none(server):
    at_once = [
        put_label("C"),
        delete("/datastore/label", id="C", tag="final"),
        decide("remove", json={"image": "C", "label_tag": "final"}),
        decide("restore", json={"image": "C", "label_tag": "removed"}),
    ]
    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(lambda request: send(server, request).status_code, at_once * 30))
    assert set(statuses) <= {200, 404, 422}, statuses
    for tag in ("final", "removed"):
        path = server.studies / "labels" / tag / "C.nii.gz"
        assert not path.exists() or path.read_bytes() == LABEL
    found = {path.name for path in (server.studies / "labels").rglob("*") if path.is_file()}
    assert found <= {"A.nii.gz", "B.nii.gz", "C.nii.gz"}
    assert send(server, put_label("C")).ok


def test_eleven_hundred_half_open_connections_lock_nobody_out(server):
    address = "127.0.0.1", urlsplit(server.url).port
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(before[0], 4096), before[1]), before[1]))
    over = threading.Event()
    with ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, before)
        connections = [stack.enter_context(socket.create_connection(address, TIMEOUT)) for _ in range(1100)]

        def drip() -> None:
            """Half of them send nothing, the others a head, letter by letter."""
            for letter in HEAD:
                for connection in connections[::2]:
                    # The server lets go of those that it has no place for.
                    with suppress(OSError):
                        connection.sendall(bytes([letter]))
                if over.wait(0.05):
                    return

        dripping = threading.Thread(target=drip)
        dripping.start()
        stack.callback(dripping.join)
        stack.callback(over.set)
        for path in ("/info/", "/datastore/?output=all", "/sam2sgp/") * 3:
            started = time.monotonic()
            assert requests.get(server.url + path, timeout=TIMEOUT).ok
            assert time.monotonic() - started < QUICK
    log = (server.state / "logs" / "server.log").read_text()
    assert 0 < log.count("Too many connections") < 20


def test_no_address_that_a_client_names_is_asked(server):
    with socket.create_server(("127.0.0.1", 0)) as trap:
        trap.settimeout(0.5)
        address = f"http://127.0.0.1:{trap.getsockname()[1]}/x.nii.gz"
        for request in (
            infer(address),
            infer("C", {"image": address}),
            infer("C", {"model_file": address, "support_dir": address, "k": 1}),
            put_image(address),
            put_label("C", data={"params": json.dumps({"url": address, "image": address})}),
            get("/datastore/image", image=address),
            get("/sam2sgp/picture", image=address),
            get(f"/proxy/dicom/wado/{address}"),
            dict(method="POST", path="/train/finetune", json={"dataset": address, "image": address}),
        ):
            assert send(server, request).status_code < 500, request
        with pytest.raises(TimeoutError):
            trap.accept()


def test_a_module_that_a_client_brings_is_never_run(server, module, batch):
    """Two requests ran any code before: a session with a module, whose folder becomes the search path of a process."""
    for path in ("/train/", "/train/finetune", "/scoring/", "/scoring/scores"):
        for body in (
            {"finetune": [["bundle_path", str(module)]]},
            {"scores": [["bundle_path", str(module)]]},
            [["bundle_path", str(module)]],
            {"bundle_path": str(module)},
        ):
            assert 400 <= send(server, dict(method="POST", path=path, json=body)).status_code < 500
    # The process did not find it, and the long request reached it.
    assert batch["status"] == "DONE", batch["details"]
    assert not list(server.folder.rglob("ran"))


def test_what_people_and_programs_are_told_holds_no_path_of_the_server(server):
    send(server, delete("/datastore/label", id="C", tag="final"))
    session = send(server, dict(method="PUT", path="/session/", files={"files": ("i.nii.gz", IMAGE)}))
    answers = [
        session,
        send(server, get(f"/session/{session.json()['session_id']}")),
        send(server, get("/datastore/", output="all")),
        send(server, get("/datastore/", output="train")),
        send(server, get("/datastore/image/info", image="A")),
        send(server, get("/datastore/label/info", label="A", tag="final")),
        send(server, dict(method="POST", path="/activelearning/random", json={"client_id": "x"})),
        send(server, get("/info/")),
        send(server, get("/openapi.json")),
    ]
    for answer in answers:
        assert answer.ok and str(server.folder) not in answer.text, answer.url
    sample = answers[6].json()
    assert (sample["id"], sample["name"]) == ("C", "C.nii.gz")


def test_afterwards_the_server_is_up_and_the_approved_labels_are_intact(server):
    status = requests.get(f"{server.url}/datastore/", timeout=TIMEOUT).json()
    assert status["total"] == 3 and status["completed"] >= 2
    for name in ("A", "B"):
        answer = requests.get(f"{server.url}/datastore/label", {"label": name, "tag": "final"}, timeout=TIMEOUT)
        assert answer.content == LABEL
    assert (server.folder / "secret.nii.gz").read_bytes() == SECRET
    answer = requests.get(f"{server.url}/info/", headers=EVIL, timeout=TIMEOUT)
    assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers
    assert answer.headers["x-content-type-options"] == "nosniff"
