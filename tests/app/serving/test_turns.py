"""Whose turn it is: requests first, work in the background last, among threads and among processes."""

import subprocess
import sys
import threading

from lib.serving.turns import Requests, WorkLock
from tests.app.conftest import APP


def test_work_in_the_background_sees_that_somebody_waits_and_gets_the_lock_afterwards():
    lock, order = WorkLock(), []
    entered, seen = threading.Event(), threading.Event()

    def background() -> None:
        with lock.last():
            order.append("begins")
            entered.set()
            while not lock.is_wanted:
                pass
            seen.set()
        with lock.last():
            order.append("goes on")

    def request() -> None:
        with lock:
            # Whoever holds it may take it again.
            with lock:
                order.append("request")

    thread = threading.Thread(target=background)
    thread.start()
    assert entered.wait(30) and not lock.is_wanted and not lock.acquire(blocking=False)
    other = threading.Thread(target=request)
    other.start()
    assert seen.wait(30)
    other.join(30)
    thread.join(30)
    assert order == ["begins", "request", "goes on"] and not lock.is_wanted


# Waits until no request is worked on, and says when.
PROCESS = """
import pathlib, sys
from lib.serving.turns import Requests
requests = Requests(pathlib.Path(sys.argv[1]))
print("asks", flush=True)
requests.wait()
print("goes on", flush=True)
"""


def test_a_batch_waits_for_the_requests_of_other_processes(tmp_path):
    path = tmp_path / "locks" / "requests"
    requests = Requests(path)
    requests.wait()
    with requests.at_work(), requests.at_work():
        process = subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(path)], env={"PYTHONPATH": str(APP)}, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "asks\n"
        try:
            process.wait(0.3)
            raise AssertionError("it didn't wait")
        except subprocess.TimeoutExpired:
            pass
    assert process.communicate(timeout=30)[0] == "goes on\n" and process.returncode == 0


def test_without_a_file_nobody_waits(tmp_path):
    (tmp_path / "locks").write_text("no folder")
    requests = Requests(tmp_path / "locks" / "requests")
    with requests.at_work():
        requests.wait()
