"""A real server process of the app on loopback, for tests.

The app and the bundle are used from a copy, because MONAI Label makes folders in the app's own folder.
"""

import compileall
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import requests

from tests.e2e.forks import Fork
from tests.e2e.programs import free_port
from tests.helpers.lean import lean_path

REPO = Path(__file__).parents[2]
START_SECONDS = 180
LINES_SHOWN = 60


def started(command: list[str], folder: Path, environment: dict[str, str], log: Path) -> subprocess.Popen:
    """Start a process with a session of its own. Its output is added to a file."""
    with open(log, "ab") as output:
        return subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=output, start_new_session=True
        )


class Server:
    """A server that runs.

    Attributes:
        url: its address. studies, state: its folders. log: the file with its output. process: its process.
    """

    # How its process is started. Tests fork it, see `tests.e2e.forks`; benchmarks don't.
    launch: Callable[[list[str], Path, dict[str, str], Path], subprocess.Popen | Fork] = staticmethod(started)

    def __init__(self, folder: Path, studies: Path | str, conf: dict[str, str] | None = None) -> None:
        self.folder = folder
        self.studies = studies
        self.state = folder / "state"
        self.log = folder / "server.log"
        self.conf = {"state_dir": str(self.state), **(conf or {})}
        self.app = copied_app(folder)
        self.url = ""
        self.process: subprocess.Popen | Fork | None = None

    def start(self, environment: dict[str, str] | None = None) -> "Server":
        """Start and wait until it answers. Raises RuntimeError with the end of its output if it doesn't."""
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        variables = {
            **os.environ,
            "PYTHONPATH": f"{self.folder / 'bundle'}:{lean_path()}",
            "OMP_NUM_THREADS": "1",
            "MONAI_LABEL_SESSION_PATH": str(self.folder / "sessions"),
            **(environment or {}),
        }
        self.process = self.launch(self.command(port), self.folder, variables, self.log)
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self.process.poll() is None:
            try:
                if requests.get(f"{self.url}/info/", timeout=10).ok:
                    return self
            except (requests.ConnectionError, requests.Timeout):
                time.sleep(0.2)
        self.stop()
        raise RuntimeError(f"The server did not start:\n{self.output()}")

    def command(self, port: int) -> list[str]:
        """What starts it."""
        command = [sys.executable, "-m", "monailabel.main", "start_server", "--app", str(self.app)]
        command += ["--studies", str(self.studies), "--host", "127.0.0.1", "--port", str(port)]
        return command + [word for key, value in self.conf.items() for word in ("--conf", key, value)]

    def output(self) -> str:
        """The last lines that it wrote."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-LINES_SHOWN:])

    def finished(self, path: str) -> dict:
        """The last task of a kind, such as `/train/`, when it has ended."""
        end = time.monotonic() + START_SECONDS
        while (task := requests.get(self.url + path, timeout=60).json())["status"] in ("SUBMITTED", "RUNNING"):
            if time.monotonic() > end:
                raise RuntimeError(f"The task did not end: {task}")
            time.sleep(0.2)
        return task

    def stop(self, how: int = signal.SIGTERM) -> None:
        """End it and all processes that it started."""
        if self.process is None:
            return
        for sent in (how, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, sent)
            except ProcessLookupError:
                break
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                continue
        self.process = None


def copied_app(folder: Path) -> Path:
    """The app and the bundle under a folder as they lie in the repository, with their bytecode."""
    skip = shutil.ignore_patterns("model", "logs", "bin", "eval")
    app = folder / "apps" / "sam2sgp"
    if not app.exists():
        for package in ("apps/sam2sgp", "bundle/sam2sgp"):
            compileall.compile_dir(REPO / package, quiet=2)
        shutil.copytree(REPO / "apps" / "sam2sgp", app, ignore=skip)
        shutil.copytree(REPO / "bundle", folder / "bundle", ignore=skip)
    return app


@contextmanager
def serving(
    folder: Path,
    studies: Path | str,
    conf: dict[str, str] | None = None,
    environment: dict[str, str] | None = None,
) -> Iterator[Server]:
    """A server for the length of the block."""
    server = Server(folder, studies, conf)
    try:
        yield server.start(environment)
    finally:
        server.stop()
