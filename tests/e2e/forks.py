"""Processes that start in a second or two: forks of one that has imported the libraries.

Of the processor time that a server takes to start, nine tenths are the import of torch, MONAI and what these import. A
process for all tests of a session imports them once, and forks for each server. The fork has a session, environment,
folder and output of its own, and runs the app's and MONAI Label's own modules from the beginning, as
`python -m monailabel.main` does. `tests/e2e/test_service.py` starts a server by the real command.

    test ─ command, folder, environment, log as a line of JSON ─→ python -m tests.e2e.forks ─ process id ─→ test

Concurrency: one request at a time, from one thread.
"""

import atexit
import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from tests.helpers.lean import lean_path

REPO = Path(__file__).parents[2]
# All that the app imports and that reads no setting of the app or of MONAI Label.
LIBRARIES = (
    "monai",
    "monai.apps",
    "monai.bundle",
    "monai.engines",
    "monai.handlers",
    "monai.networks.nets",
    "ignite.handlers",
    "peft",
    "timm",
    "torchvision",
    "transformers",
    "highdicom",
    "pydicom",
    "pynetdicom",
    "dicomweb_client",
    "SimpleITK",
    "itk",
    "skimage.measure",
    "scipy.ndimage",
    "scipy.optimize",
    "hydra",
    "omegaconf",
    "fastapi",
    "uvicorn",
    "prometheus_client",
    "httpx",
    "jwt",
    "passlib.context",
    "pydantic.v1",
    "pydantic_settings",
    "pydicom_seg",
    "requests_toolbelt",
    "schedule",
    "scipy.cluster.vq",
    "typer",
    "watchdog.observers",
)


class Fork:
    """A process that is nobody's child here, with as much of `subprocess.Popen` as tests use.

    Args:
        pid: its id.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        try:
            self._handle: int | None = os.pidfd_open(pid)
        except ProcessLookupError:
            self._handle = None

    def poll(self) -> int | None:
        """None while it runs, 0 afterwards, whatever it ended with."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        """Return 0 when it has ended. Raises subprocess.TimeoutExpired after `timeout` seconds."""
        if self._handle is not None:
            if not select.select([self._handle], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
            os.close(self._handle)
            self._handle = None
        return 0


def forked(command: list[str], folder: Path, environment: dict[str, str], log: Path) -> Fork:
    """Start `python -m <module> <words>` by a fork. Its output is added to a file."""
    python, option, *words = command
    assert (python, option) == (sys.executable, "-m"), command
    request = {"words": words, "folder": str(folder), "environment": environment, "log": str(log)}
    parent = _parent()
    assert parent.stdin is not None and parent.stdout is not None
    parent.stdin.write(json.dumps(request) + "\n")
    parent.stdin.flush()
    answer = parent.stdout.readline()
    assert answer, "the process that forks has ended"
    return Fork(int(answer))


@cache
def _parent() -> subprocess.Popen:
    # Threads don't live on in a fork, nor does what a GPU's driver has begun when it is asked whether there is one.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.e2e.forks"],
        cwd=REPO,
        env={**environment, "PYTHONPATH": lean_path()},
        start_new_session=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(process.communicate)
    return process


def main() -> None:
    """Fork for each request until the input ends; returns in each fork, and at the end."""
    for name in LIBRARIES:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, _collect)
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _become(json.loads(line))
            return
        print(pid, flush=True)


def _collect(*_: Any) -> None:
    """Wait for the forks that have ended, so that none stays and their processor time counts."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _become(request: dict[str, Any]) -> None:
    """Turn this process into the one that is asked for, and run its module."""
    os.setsid()
    output = os.open(request["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    for descriptor in (sys.stdout.fileno(), sys.stderr.fileno()):
        os.dup2(output, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), sys.stdin.fileno())
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    tempfile.tempdir = None
    own = os.environ["PYTHONPATH"].split(os.pathsep)
    sys.path[:] = [request["folder"], *own, *(entry for entry in sys.path if entry not in (*own, str(REPO)))]
    module, *sys.argv[1:] = request["words"]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
