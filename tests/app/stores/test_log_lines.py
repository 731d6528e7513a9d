"""Lines of a log are taken once, when they are whole."""

import os

import pytest

from lib.stores import log_lines
from lib.stores.audit import Audit
from lib.stores.trail import MOST_EVENTS, Trail
from tests.helpers.log_files import line


def test_of_a_long_log_only_what_is_new_is_read(tmp_path, bytes_read):
    path = tmp_path / "audit.jsonl"
    path.write_text("".join(line(number, image=f"image_{number % 1000}") for number in range(100_000)))
    trail = Trail(path)
    assert len(trail.events_of("image_7")) == MOST_EVENTS
    assert sum(bytes_read) == path.stat().st_size
    bytes_read.clear()
    assert trail.events_of("image_8") and trail.work().labels == 99_999 and sum(bytes_read) == 0
    Audit(path).write("correct", image="image_7", tag="draft")
    newest = trail.events_of("image_7")[0]
    assert newest["action"] == "correct" and newest["tag"] == "draft" and newest["user"] is None
    assert sum(bytes_read) < 200


@pytest.fixture
def bytes_read(monkeypatch):
    """How many were read in each call of `os.pread`."""
    read = []
    real = os.pread

    def counted(*arguments):
        found = real(*arguments)
        read.append(len(found))
        return found

    monkeypatch.setattr(log_lines.os, "pread", counted)
    return read
