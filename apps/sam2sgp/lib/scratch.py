"""A folder for the server's temporary files, of which nothing stays behind.

MONAI Label and the libraries put uploads, results and copies into the system's folder for temporary files, where those
of a server that was killed would lie for ever. Here each server has a folder of its own in there, which only its user
may read; those of servers that were stopped or killed go at the next start of one with the same state.
"""

import fcntl
import hashlib
import logging
import os
import shutil
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

LOCK = ".lock"


def own_temporary_folder(state_dir: Path) -> Path:
    """Make this process, and those that it starts, put their temporary files into a folder of its own."""
    root = Path(tempfile.gettempdir())
    prefix = f"sam2sgp.{hashlib.sha256(str(state_dir).encode()).hexdigest()[:12]}."
    for left in root.glob(f"{prefix}*"):
        _delete_left(left)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=root))
    # Held for as long as this process lives, however it ends; uvicorn ends it by the signal that it got.
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    tempfile.tempdir = str(folder)
    os.environ["TMPDIR"] = str(folder)
    return folder


def _delete_left(folder: Path) -> None:
    """Delete a folder of this user's whose server has ended."""
    try:
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():
            return
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        # Another server's that is about to begin, or already gone.
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
        logger.info("Temporary files of a server that was stopped are deleted: %s", folder.name)
    except BlockingIOError:
        return
    finally:
        os.close(lock)
