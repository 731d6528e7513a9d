"""The audit log: one JSON line for each approval, removal, training and publication, appended and never rewritten.

In: an action and its details. Out: a line with the time (UTC), the user and the details. Several processes and threads
may write to one file at once: each line is a single append under a lock of the file, and on the disk when `write`
returns.
"""

import fcntl
import hashlib
import json
import os
from contextvars import ContextVar
from datetime import UTC, datetime
from io import BufferedReader
from pathlib import Path

from lib.checks import StorageError

# Who sent the request that is being answered, as the reverse proxy says; None without a proxy.
current_user: ContextVar[str | None] = ContextVar("current_user", default=None)


class Audit:
    """Appends to one file, which is made with its folder when first written to.

    Args:
        path: of the file, one JSON object a line.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def write(self, action: str, **details: object) -> None:
        """Append one line: `time`, `user` (None if unknown), `action` and the details.

        Args:
            action: what was done: "approve", "remove", "train", "publish", …
            details: JSON values, or anything with a text.

        Raises:
            StorageError: the line can't be written.
        """
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        entry = {"time": now, "user": current_user.get(), "action": action, **details}
        line = json.dumps(entry, default=str).encode("ascii") + b"\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                # Another process may be in the middle of its line.
                fcntl.flock(file, fcntl.LOCK_EX)
                # A process that was killed, or a disk that was full, may have left a line without its end.
                size = os.fstat(file).st_size
                if size and os.pread(file, 1, size - 1) != b"\n":
                    line = b"\n" + line
                if os.write(file, line) != len(line):
                    raise OSError("the disk is full")
                os.fsync(file)
            finally:
                os.close(file)
        except OSError as error:
            raise StorageError(
                f"{self.path.name}: expected to append to the audit log, found {error.strerror or error}; free some "
                "space or correct the permissions of the state folder."
            ) from error


def content_hash(path: str | Path) -> str:
    """SHA-256 of a file, as `sha256:` and 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return open_hash(file)


def open_hash(file: BufferedReader) -> str:
    """`content_hash` of a file that is open."""
    return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
