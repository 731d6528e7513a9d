"""Whose turn it is where there is one network: people's requests come first, work in the background last.

Within the server, `WorkLock` is the lock of the network: whoever works in the background takes it when nobody else
does, and looks every now and then whether somebody waits. Between processes, `Requests` tells a batch inference, which
has a network of its own but shares processor and GPU, that a request is being worked on.
"""

import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

POLL = 0.05


class WorkLock:
    """A reentrant lock of threads, as `threading.RLock`, that tells whether somebody waits for it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._counting = threading.Lock()
        self._waiting = 0

    @property
    def is_wanted(self) -> bool:
        """Whether a thread waits for it, other than by `last`."""
        return self._waiting > 0

    def acquire(self, blocking: bool = True) -> bool:
        """Take it, or with `blocking` False return False where another thread holds it."""
        if self._lock.acquire(blocking=False):
            return True
        if not blocking:
            return False
        with self._counting:
            self._waiting += 1
        try:
            return self._lock.acquire()
        finally:
            with self._counting:
                self._waiting -= 1

    def release(self) -> None:
        """Give it back."""
        self._lock.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_error: object) -> None:
        self.release()

    @contextmanager
    def last(self) -> Iterator[None]:
        """Hold it for the block, which begins when no other thread holds it or waits for it."""
        while self._waiting or not self._lock.acquire(blocking=False):
            time.sleep(POLL)
        try:
            yield
        finally:
            self._lock.release()


class Requests:
    """Whether requests are being worked on, as all processes of an app see it.

    Args:
        path: of a lock file; made when first needed. Where it can't be, nobody waits.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """A block that works on a request; any number may at once. A process that is killed works on none."""
        with self._locked(fcntl.LOCK_SH):
            yield

    def wait(self) -> None:
        """Return when no request is being worked on."""
        with self._locked(fcntl.LOCK_EX):
            pass

    @contextmanager
    def _locked(self, kind: int) -> Iterator[None]:
        file = None
        try:
            with suppress(OSError):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                fcntl.flock(file, kind)
            yield
        finally:
            if file is not None:
                os.close(file)
