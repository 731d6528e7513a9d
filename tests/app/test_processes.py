"""A process is told from others by its number and by when it began, whatever the clock says."""

import os

import psutil

from lib.processes import is_running, mark_in, mark_of


def test_a_mark_is_the_same_when_somebody_sets_the_clock(monkeypatch):
    mark, booted = mark_of(), psutil.boot_time()
    assert mark["pid"] == os.getpid() and is_running(mark)
    monkeypatch.setattr(psutil._psplatform, "boot_time", lambda: booted + 3600)
    assert psutil.boot_time() == booted + 3600
    assert mark_of() == mark and is_running(mark)


def test_another_process_with_the_number_is_not_the_one():
    mark = mark_of()
    assert not is_running({**mark, "pid_started": mark["pid_started"] - 1})
    assert mark_of(1) != mark and mark_of(1 << 22) == {} and not is_running({}) and not is_running({"pid": None})
    assert mark_in({"state": "running", **mark}) == mark and mark_in({"state": "running"}) == {}
