"""What is said to whoever watches the server, and that asking costs nothing."""

import errno
import os
import threading
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from lib.http import health
from lib.http.guard import install, serve_only
from lib.http.health import Health, checks_of, disk_problem
from tests.helpers.parts import Given


def asking(tmp_path, checks, **options) -> TestClient:
    app = FastAPI()
    serve_only(app, [Health(checks, **options).router()])
    install(app, Given(tmp_path))
    return TestClient(app, base_url="http://127.0.0.1:8000")


@pytest.fixture
def parts(tmp_path):
    """(segmenter, datastore, settings) of a folder."""
    settings = SimpleNamespace(is_remote=False, studies=str(tmp_path), state_dir=tmp_path)
    return SimpleNamespace(is_loaded=True), SimpleNamespace(), settings


def test_a_server_that_can_work_is_ready(tmp_path, parts):
    client = asking(tmp_path, checks_of(*parts))
    assert client.get("/sam2sgp/health/live").json() == {"status": "live"}
    answer = client.get("/sam2sgp/health/ready")
    assert answer.status_code == 200 and answer.headers["cache-control"] == "no-store"
    assert answer.json() == {"status": "ready", "checks": {"model": "ok", "studies": "ok", "disk": "ok"}}
    assert client.head("/sam2sgp/health/ready").status_code == client.head("/sam2sgp/health/live").status_code == 200


def test_each_reason_not_to_work_is_said_without_a_path(tmp_path, parts, monkeypatch):
    segmenter, datastore, settings = parts
    client = asking(tmp_path, checks_of(*parts))

    def found(name: str) -> str:
        answer = client.get("/sam2sgp/health/ready")
        assert answer.status_code == 503 and answer.json()["status"] == "not ready"
        assert str(tmp_path) not in answer.text
        assert client.get("/sam2sgp/health/live").status_code == 200
        return answer.json()["checks"][name]

    segmenter.is_loaded = False
    assert found("model") == "the network is not loaded"
    segmenter.is_loaded = True
    settings_gone = SimpleNamespace(is_remote=False, studies=str(tmp_path / "gone"), state_dir=tmp_path)
    client = asking(tmp_path, checks_of(segmenter, datastore, settings_gone))
    assert found("studies") == f"the folder can't be read: {os.strerror(errno.ENOENT)}"
    client = asking(tmp_path, checks_of(*parts))
    monkeypatch.setattr(health.os, "statvfs", lambda folder: SimpleNamespace(f_flag=0, f_bavail=3 << 10, f_frsize=1024))
    assert found("disk") == "3 MB free, expected 256"

    def fails():
        raise KeyError(str(tmp_path))

    client = asking(tmp_path, {"model": fails})
    assert found("model") == "can't be told: KeyError"


def test_an_archive_that_is_down_is_said_with_the_time(tmp_path):
    state = {"reachable": False, "since": "2026-01-02T03:04:05+00:00", "problem": "http://secret:8042 is down"}
    settings = SimpleNamespace(is_remote=True, studies="http://secret:8042", state_dir=tmp_path)
    datastore = SimpleNamespace(state=lambda: state)
    client = asking(tmp_path, checks_of(SimpleNamespace(is_loaded=True), datastore, settings))
    answer = client.get("/sam2sgp/health/ready")
    assert answer.status_code == 503 and "secret" not in answer.text
    assert answer.json()["checks"]["archive"].startswith("no usable answer since 2026-01-02 03:04:05 UTC")
    state.update(reachable=True, since=None)
    assert client.get("/sam2sgp/health/ready").json()["checks"] == {"model": "ok", "archive": "ok", "disk": "ok"}


def test_a_check_that_hangs_keeps_nobody_waiting_and_no_threads(tmp_path):
    release = threading.Event()
    looked = []

    def hangs():
        looked.append(1)
        release.wait(60)

    client = asking(tmp_path, {"model": lambda: None, "disk": hangs}, patience=0.05)
    before = threading.active_count()
    for _ in range(5):
        answer = client.get("/sam2sgp/health/ready")
        assert answer.status_code == 503
        assert answer.json()["checks"] == {"model": "ok", "disk": "no answer within 0.05 s"}
        assert client.get("/sam2sgp/health/live").status_code == 200
    assert len(looked) == 1 and threading.active_count() <= before + 2
    release.set()


def test_a_full_and_a_read_only_disk_are_told_apart(tmp_path, monkeypatch):
    assert disk_problem(tmp_path, 0) is None
    assert "MB free, expected" in disk_problem(tmp_path, 1 << 60)
    monkeypatch.setattr(
        health.os, "statvfs", lambda folder: SimpleNamespace(f_flag=os.ST_RDONLY, f_bavail=1, f_frsize=1)
    )
    assert disk_problem(tmp_path, 0) == "read-only"
