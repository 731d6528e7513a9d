"""Training, scoring and batch inference: each runs in a process of its own, which the server follows.

In: a method and a request whose options were checked. Out: tasks as MONAI Label's clients know them, dicts with `id`,
`status` ("SUBMITTED", "RUNNING", then "DONE", "ERROR" or "STOPPED"), `request`, `start_ts`, `end_ts` and `details`, the
last lines of the process. MONAI Label's own way is not used: it puts the request on the command line, where a long one
ends the task before it begins, and a folder that a request names on the path of the process.

    server ─ request as JSON on the standard input ─→ lib.tasks.worker ─ output, line by line ─→ server

Nothing of a request gets into a command line or an environment variable. Of each method one task runs at a time, the
others wait; whatever happens to one, the next one is started.

Concurrency: all methods may be called from several threads. A thread per method follows its tasks.
"""

import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from queue import Queue
from typing import Any

import psutil

from lib.checks import RequestError
from lib.priority import ASLEEP
from lib.processes import mark_of

logger = logging.getLogger(__name__)

METHODS = ("train", "scoring", "batch_infer")
SUBMITTED, RUNNING, DONE, ERROR, STOPPED = "SUBMITTED", "RUNNING", "DONE", "ERROR", "STOPPED"
MOST_WAITING = 8
# Ended ones, of each method.
TASKS_KEPT = 50
LINES_KEPT = 20
LONGEST_LINE = 1 << 14
TIME = "%Y-%m-%d %H:%M:%S"


class Busy(RequestError):
    """A task of the kind runs already, or too many wait."""

    status = 429


@dataclass
class _Task:
    method: str
    request: Mapping[str, Any]
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    status: str = SUBMITTED
    start_ts: str = field(default_factory=lambda: datetime.now().strftime(TIME))
    end_ts: str | None = None
    details: deque[str] = field(default_factory=lambda: deque(maxlen=LINES_KEPT))
    process: subprocess.Popen | None = None
    mark: Mapping[str, Any] = field(default_factory=dict)

    def told(self) -> dict[str, Any]:
        """As clients know it."""
        known = {"id": self.id, "status": self.status, "request": dict(self.request), "start_ts": self.start_ts}
        return {**known, "details": list(self.details), **({"end_ts": self.end_ts} if self.end_ts else {})}


class BackgroundTasks:
    """Starts, follows and stops tasks.

    Args:
        app_dir: the app's folder, from which the processes are started.
        ended: called with the method and the status of each task that has ended, in the thread that followed it.
        command: what is started, to which the method is added; by default `lib.tasks.worker`.
    """

    def __init__(
        self,
        app_dir: Path,
        ended: Callable[[str, str], None] = lambda method, status: None,
        command: Sequence[str] = (sys.executable, "-P", "-m", "lib.tasks.worker"),
    ) -> None:
        self._app_dir = app_dir
        self._ended = ended
        self._command = list(command)
        self._lock = threading.RLock()
        self._tasks: dict[str, list[_Task]] = {method: [] for method in METHODS}
        self._queues: dict[str, Queue[_Task]] = {method: Queue() for method in METHODS}
        for method in METHODS:
            threading.Thread(target=self._follow, args=(method,), daemon=True, name=f"sam2sgp-{method}").start()

    def start(self, method: str, request: Mapping[str, Any], enqueue: bool = False) -> dict[str, Any]:
        """Start a task, or have it wait for its turn.

        Args:
            method: of the app, which is called with the request.
            request: JSON values.
            enqueue: whether it may wait while another one runs.

        Raises:
            Busy: another one runs or waits and this one may not wait, or too many wait.
        """
        with self._lock:
            waiting, running = self.waiting(method), self.running(method)
            if (waiting or running) and not enqueue:
                raise Busy(f"{method}: expected none that runs, found one; wait until it has ended, or stop it.")
            if waiting >= MOST_WAITING:
                raise Busy(f"{method}: expected at most {MOST_WAITING} that wait, found as many; try again later.")
            task = _Task(method, request)
            ended = [entry for entry in self._tasks[method] if entry.end_ts]
            for old in ended[:-TASKS_KEPT]:
                self._tasks[method].remove(old)
            self._tasks[method].append(task)
            self._queues[method].put(task)
            return task.told()

    def all(self, method: str) -> list[dict[str, Any]]:
        """The tasks of a method, the newest last."""
        with self._lock:
            return [task.told() for task in self._tasks[method]]

    def mark(self, method: str) -> dict[str, Any]:
        """What tells the process of the newest task, see `lib.processes`; {} before it has one."""
        with self._lock:
            return dict(self._tasks[method][-1].mark) if self._tasks[method] else {}

    def running(self, method: str) -> dict[str, Any] | None:
        """The one that runs, or None."""
        return next((task for task in self.all(method) if task["status"] == RUNNING), None)

    def waiting(self, method: str) -> int:
        """How many wait for their turn."""
        return sum(task["status"] == SUBMITTED for task in self.all(method))

    def stop(self, method: str) -> dict[str, Any] | None:
        """End the task that runs, with all processes that it started; the task, or None if none runs."""
        with self._lock:
            task = next((task for task in self._tasks[method] if task.status == RUNNING), None)
            if task is None:
                return None
            self._end(task, STOPPED)
            logger.info("%s: stopped", method)
            _kill(task.process)
            return task.told()

    def _follow(self, method: str) -> None:
        """Run the tasks of a method, one after the other, as long as the server lives."""
        while True:
            task = self._queues[method].get()
            try:
                self._run(task)
            except Exception as error:
                # The client is told, and the next task is not held up.
                logger.exception("%s: the task could not be run", method)
                reason = getattr(error, "strerror", None) or type(error).__name__
                task.details.append(
                    f"{method}: expected to start a process, found {reason}; free some memory or space, then try again."
                )
                self._end(task, ERROR)
                _kill(task.process)
            try:
                self._ended(method, task.status)
            except Exception:
                logger.exception("%s: what follows its end failed", method)

    def _run(self, task: _Task) -> None:
        output = logging.getLogger(f"task_{task.method}")
        # A pipe holds 64 KB only, and the process reads it when it is ready.
        with tempfile.TemporaryFile() as given:
            given.write(json.dumps(task.request).encode())
            given.seek(0)
            process = task.process = subprocess.Popen(
                [*self._command, task.method],
                stdin=given,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                encoding="utf-8",
                errors="replace",
                env={**ASLEEP, **os.environ, "PYTHONPATH": os.pathsep.join(_search_path(self._app_dir))},
            )
        task.mark = mark_of(process.pid)
        assert process.stdout is not None, "it is a pipe"
        with process.stdout as lines:
            task.status = RUNNING
            logger.info("%s: task %s runs as process %d", task.method, task.id, process.pid)
            for line in iter(lambda: lines.readline(LONGEST_LINE), ""):
                if line := line.rstrip():
                    output.info("%s", line)
                    task.details.append(line)
        code = process.wait()
        logger.info("%s: task %s ended with %d", task.method, task.id, code)
        self._end(task, DONE if code == 0 else ERROR)

    def _end(self, task: _Task, status: str) -> None:
        """Note how a task ended, unless it was stopped before."""
        with self._lock:
            if task.end_ts is None:
                task.status, task.end_ts = status, datetime.now().strftime(TIME)


def _search_path(app_dir: Path) -> list[str]:
    """Where the process looks for modules: in the app's folder, then where the server does."""
    known = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    return [str(app_dir), *(entry for entry in known if entry != str(app_dir))]


def _kill(process: subprocess.Popen | None) -> None:
    if process is None:
        return
    try:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    except psutil.NoSuchProcess:
        return
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
