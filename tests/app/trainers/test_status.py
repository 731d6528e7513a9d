"""Whether a training that says it runs does."""

import json
import os
import subprocess
import sys

import psutil
import pytest

from lib.processes import mark_of
from lib.trainers.status import RUNNING, STOPPED, Status


@pytest.fixture
def status(tmp_path):
    def of(process: psutil.Process) -> dict:
        path = tmp_path / "status.json"
        told = {"state": RUNNING, "message": "", "epoch": 1, "max_epochs": 4}
        path.write_text(json.dumps({**told, **mark_of(process.pid)}))
        return Status(path).read()

    return of


def test_a_training_runs_as_long_as_its_process_does(status):
    assert status(psutil.Process(os.getpid()))["state"] == RUNNING


def test_a_process_that_has_ended_and_that_nobody_has_collected_trains_no_more(status):
    """As in a container whose first process collects no children of others."""
    child = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    try:
        # Its output ends with it.
        child.stdout.read()
        process = psutil.Process(child.pid)
        while process.status() != psutil.STATUS_ZOMBIE:
            pass
        found = status(process)
    finally:
        child.communicate()
    assert found["state"] == STOPPED and "after 1 of 4 epochs" in found["message"]
