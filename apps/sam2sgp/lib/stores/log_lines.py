"""Lines that were appended to a log of JSON since it was looked at last.

In: a file as `lib.stores.audit` writes it. Out: its entries, each once, in order. Only what is new is read. A file in
the place of another one, as after a restore, is read from its beginning.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sam2sgp.files import BYTES_AT_A_TIME


class LogLines:
    """Reads one log; for one thread at a time.

    Args:
        path: of the log, which need not be there.
        take: called with each new entry.
        forget: called when the log begins again, before entries of it are taken.
    """

    def __init__(self, path: Path, take: Callable[[dict[str, Any]], None], forget: Callable[[], None]) -> None:
        self._path = path
        self._take = take
        self._forget = forget
        self._number: int | None = None
        # Up to where whole lines were read.
        self._offset = 0

    def look(self) -> None:
        """Take what is new. A log that can't be read has nothing new."""
        try:
            file = os.open(self._path, os.O_RDONLY)
        except OSError:
            return
        try:
            found = os.fstat(file)
            if found.st_ino != self._number or found.st_size < self._offset:
                self._number, self._offset = found.st_ino, 0
                self._forget()
            rest = b""
            while self._offset + len(rest) < found.st_size:
                chunk = os.pread(file, BYTES_AT_A_TIME, self._offset + len(rest))
                if not chunk:
                    break
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    self._take_line(line)
                    self._offset += len(line) + 1
        except OSError:
            return
        finally:
            os.close(file)

    def _take_line(self, line: bytes) -> None:
        try:
            entry = json.loads(line)
        except ValueError:
            # A process was killed in the middle of it.
            return
        if isinstance(entry, dict):
            self._take(entry)
