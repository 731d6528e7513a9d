"""Where the app's own files lie unless the operator says so, and who may read them.

    $XDG_DATA_HOME/sam2sgp/state/<studies>/      by default in ~/.local/share
    <app>/model/state/<studies>/                 before; moved at the next start of a server

It is data, not cache: trained weights, the audit log, and of an archive the predictions. `<studies>` is a hash of the
folder's path or of the archive's address, so that the states of two never mix.
"""

import errno
import fcntl
import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sam2sgp.errors import ConfigError
from sam2sgp.places import is_address

logger = logging.getLogger(__name__)

PRIVATE = 0o700
LOCK = "server.lock"
# In a state folder: where a restore prepares its files, and what says that it is putting them in place.
RESTORE = ".sam2sgp-restore"
UNFINISHED = f"{RESTORE}/switch.json"


def default_folder(app_dir: Path, studies: str) -> Path:
    """The state folder of these studies: the old one as long as there is only that."""
    new = _present(studies)
    # A home that may not be looked into holds none.
    return next((old for old in _former(app_dir, studies) if os.path.isdir(old) and not os.path.exists(new)), new)


def at_its_place(folder: Path, app_dir: Path, studies: str) -> Path:
    """The state folder, moved to where it lies by default if it is the old one; as it is where that can't be done."""
    if folder not in _former(app_dir, studies):
        return folder
    new = _present(studies)
    try:
        new.parent.mkdir(parents=True, exist_ok=True)
        # Not onto one that somebody else has just made.
        os.rename(folder, new)
    except OSError as error:
        if not folder.is_dir():
            return new
        reason = "another disk" if error.errno == errno.EXDEV else error.strerror
        logger.warning(
            "%s: expected to move the state to %s, found %s; it stays: move it yourself", folder, new, reason
        )
        return folder
    logger.info("The state was moved out of the code, from %s to %s", folder, new)
    return new


def make_private(folder: Path) -> None:
    """Make a folder if it is missing, and keep everybody but its user out."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=PRIVATE)
        if folder.stat().st_mode & 0o777 != PRIVATE:
            folder.chmod(PRIVATE)
    except OSError as error:
        # A server whose disk is read-only answers what it can.
        logger.warning("%s: expected to keep other users out of it, found %s; do it", folder, error.strerror)


def hold(folder: Path) -> None:
    """Mark a state folder as in use by this process, for as long as it lives and however it ends.

    Raises:
        ConfigError: a restore is at work on it, or was interrupted while it put files in place.
    """
    if (folder / UNFINISHED).exists():
        raise ConfigError(
            f"{folder}: expected a whole state, found that a restore was interrupted in the middle; run the same "
            "`sam2sgp restore` again: it finishes what was begun."
        )
    try:
        file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        logger.warning("%s: can't be marked as in use: %s", folder, error.strerror)
        return
    try:
        # Several servers may share a state; the file is closed with the process.
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        raise ConfigError(f"{folder}: expected to use it, found a restore at work on it; wait for its end.") from None


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """A block in which no server uses a state folder. Raises ConfigError where one does."""
    file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{folder}: expected no server to use it, found one; stop it first.") from None
        yield
    finally:
        os.close(file)


def _data_home() -> Path:
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "sam2sgp"


def _present(studies: str) -> Path:
    return _data_home() / "state" / _name(studies)


def _former(app_dir: Path, studies: str) -> tuple[Path, ...]:
    """In the app's folder, which for an installed wheel was a copy."""
    return tuple(app / "model" / "state" / _name(studies) for app in (app_dir, _data_home() / "app"))


def _name(studies: str) -> str:
    name = studies.rstrip("/")
    if not is_address(name):
        name = str(Path(name).resolve())
    return hashlib.sha256(name.encode()).hexdigest()[:16]
