"""Tasks in processes of their own: how the request gets there, and that each task ends and lets the next one run."""

import json
import os
import sys
import time

import psutil
import pytest

from lib.processes import is_running
from lib.tasks import background
from lib.tasks.background import BackgroundTasks, Busy

# Tells what reached it, then does as the request says.
PROCESS = """
import json, os, sys, time
text = sys.stdin.read()
request = json.loads(text)
seen = {"path": os.environ["PYTHONPATH"], "waiting": os.environ.get("OMP_WAIT_POLICY")}
print(json.dumps({"length": len(text), "arguments": sys.argv[1:], **seen}), flush=True)
time.sleep(request.get("seconds", 0))
sys.exit(request.get("code", 0))
"""


@pytest.fixture
def tasks(tmp_path):
    return BackgroundTasks(tmp_path, command=[sys.executable, "-S", "-c", PROCESS])


def wait(tasks, method="scoring", states=("DONE", "ERROR", "STOPPED")) -> dict:
    end = time.monotonic() + 30
    while (task := tasks.all(method)[-1])["status"] not in states:
        assert time.monotonic() < end, task
        time.sleep(0.01)
    return task


def test_a_long_request_arrives_whole_and_nothing_of_it_by_the_command_line_or_the_environment(tasks, tmp_path):
    request = {"method": "scores", "bundle_path": "/tmp/evil", "text": "x" * 300_000}
    tasks.start("scoring", request)
    task = wait(tasks)
    seen = json.loads(task["details"][0])
    assert task["status"] == "DONE" and seen["length"] == len(json.dumps(request))
    assert seen["arguments"] == ["scoring"] and "/tmp/evil" not in seen["path"]
    known = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    assert seen["path"].split(os.pathsep) == [str(tmp_path), *known]


@pytest.mark.parametrize(("own", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_its_threads_wait_asleep_unless_the_user_wants_them_awake(tasks, monkeypatch, own, expected):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if own:
        monkeypatch.setenv("OMP_WAIT_POLICY", own)
    tasks.start("train", {})
    assert json.loads(wait(tasks, "train")["details"][0])["waiting"] == expected


@pytest.mark.parametrize(
    "start",
    [
        pytest.param(lambda *a, **k: (_ for _ in ()).throw(OSError(7, "Argument list too long")), id="too long"),
        pytest.param(lambda *a, **k: (_ for _ in ()).throw(MemoryError()), id="no memory"),
    ],
)
def test_a_task_that_cannot_start_ends_with_an_error_and_the_next_one_runs(tasks, monkeypatch, start):
    with monkeypatch.context() as patched:
        patched.setattr(background.subprocess, "Popen", start)
        tasks.start("scoring", {})
        task = wait(tasks)
    assert task["status"] == "ERROR" and task["end_ts"]
    assert "expected to start a process, found" in task["details"][-1]
    tasks.start("scoring", {})
    assert wait(tasks)["status"] == "DONE"


def test_the_newest_tasks_process_is_known_by_its_mark(tasks):
    assert tasks.mark("train") == {}
    tasks.start("train", {"seconds": 60})
    wait(tasks, "train", ["RUNNING"])
    mark = tasks.mark("train")
    assert is_running(mark) and mark["pid"] in [child.pid for child in psutil.Process().children()]
    tasks.start("train", {}, enqueue=True)
    assert tasks.mark("train") == {}
    tasks.stop("train")
    wait(tasks, "train")
    assert tasks.mark("train") != mark and not is_running(mark)


def test_a_process_that_fails_ends_with_an_error(tasks):
    tasks.start("train", {"code": 3})
    assert wait(tasks, "train")["status"] == "ERROR"
    assert tasks.running("train") is None and tasks.waiting("train") == 0


def test_one_runs_at_a_time_few_wait_and_other_methods_are_not_held_up(tasks):
    tasks.start("train", {"seconds": 60})
    with pytest.raises(Busy, match="expected none that runs"):
        tasks.start("train", {})
    wait(tasks, "train", ["RUNNING"])
    for _ in range(background.MOST_WAITING):
        tasks.start("train", {}, enqueue=True)
    with pytest.raises(Busy, match="that wait"):
        tasks.start("train", {}, enqueue=True)
    tasks.start("scoring", {})
    assert wait(tasks)["status"] == "DONE"
    assert tasks.running("train") and tasks.stop("train")["status"] == "STOPPED"
    assert wait(tasks, "train")["status"] == "DONE"
    states = [task["status"] for task in tasks.all("train")]
    assert states == ["STOPPED"] + ["DONE"] * background.MOST_WAITING
    assert tasks.stop("train") is None


def test_what_follows_a_task_is_called_and_its_failure_stops_nothing(tmp_path):
    seen = []

    def ended(method, status):
        seen.append((method, status))
        raise RuntimeError("of what follows")

    tasks = BackgroundTasks(tmp_path, ended, [sys.executable, "-S", "-c", PROCESS])
    for code in (0, 1):
        tasks.start("batch_infer", {"code": code})
        wait(tasks, "batch_infer")
        end = time.monotonic() + 30
        while len(seen) <= code and time.monotonic() < end:
            time.sleep(0.01)
    assert seen == [("batch_infer", "DONE"), ("batch_infer", "ERROR")]
