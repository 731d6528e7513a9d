"""Copies of an archive's series on this machine's disk, of which those that nobody needs are deleted again.

    <folder>/images/<series>/          the series' files
    <folder>/files/<series>.nii.gz     the same as one file, made where a client asked for it
    <folder>/used/<series>             an empty file, whose time tells when the series was last asked for

A copy goes when nobody asked for it for `max_age`; beyond `max_bytes` those go first that were asked for longest ago.
What is kept, whatever its age and size: what was handed out lately, because somebody may be reading it, and what the
caller names, which is what can't be had again or would be fetched again at once.

Any number of threads and processes may share a folder. Looking up a copy and taking it away are under a lock file, so
that nobody is handed a copy that goes; a copy is taken away in one step and deleted afterwards.
"""

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

logger = logging.getLogger(__name__)

# Who was handed a copy may read it for this many seconds.
IN_USE = 3600.0
# What a killed process left behind is deleted after as many seconds.
LEFTOVER_AGE = 3600.0
HIDDEN = "."
SUFFIX = ".nii.gz"


class SeriesCache:
    """The copies in a folder.

    Args:
        folder: may hold other things besides.
        max_bytes: that all copies may take together.
        max_age: seconds after which a copy goes that nobody asked for.
    """

    def __init__(self, folder: Path, max_bytes: float, max_age: float) -> None:
        self.images = folder / "images"
        self.files = folder / "files"
        self._used = folder / "used"
        self._lock_file = folder / "cache.lock"
        self._max_bytes = max_bytes
        self._max_age = max_age
        # By series, of the copy of this time.
        self._sizes: dict[str, tuple[float, int]] = {}

    def folder_of(self, uid: str) -> Path:
        """Where a series' files are, or come to be."""
        return self.images / uid

    def file_of(self, uid: str) -> Path:
        """Where a series is as one file, or comes to be."""
        return self.files / f"{uid}{SUFFIX}"

    def find(self, uid: str, instances: int) -> Path | None:
        """The folder of a series' files, which stays for now; None if there is none.

        Args:
            uid: the series.
            instances: how many files there should be, 0 if that isn't known.
        """
        folder = self.folder_of(uid)
        with self._locked():
            # A series that was still on its way to the archive has grown since.
            if not folder.is_dir() or (instances and len(os.listdir(folder)) != instances):
                return None
            self._use(uid)
        return folder

    @contextmanager
    def adding(self, uid: str) -> Iterator[Path]:
        """An empty folder; what is in it when the block ends without an error becomes the series' copy."""
        folder = self.folder_of(uid)
        self.images.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{HIDDEN}series.", dir=self.images) as scratch:
            part = Path(scratch, "series")
            part.mkdir()
            yield part
            with self._locked():
                if folder.exists():
                    os.replace(folder, Path(scratch, "old"))
                os.replace(part, folder)
                self._use(uid)

    def clear(self, keep: Collection[str], known: Collection[str]) -> list[str]:
        """Delete what nobody needs.

        Args:
            keep: series whose copies stay.
            known: series that can be fetched again; copies of all others stay too.

        Returns:
            The series whose copies were deleted.
        """
        now = time.time()
        copies = sorted((self._last_use(uid), uid, self._size(uid)) for uid in _names(self.images))
        left = sum(size for *_, size in copies)
        gone = []
        for used, uid, size in copies:
            if now - used <= self._max_age and left <= self._max_bytes:
                break
            if uid in known and uid not in keep and self._take_away(uid, now):
                left -= size
                gone.append(uid)
        for path in (*_hidden(self.images), *_hidden(self.files)):
            if now - _time(path) > LEFTOVER_AGE:
                shutil.rmtree(path, ignore_errors=True)
        if gone:
            logger.info("The copies of %d series are deleted; the archive has them", len(gone))
        return gone

    def _take_away(self, uid: str, now: float) -> bool:
        """Delete a copy unless it was asked for lately."""
        with tempfile.TemporaryDirectory(prefix=f"{HIDDEN}gone.", dir=self.images) as scratch:
            with self._locked():
                if now - self._last_use(uid) < IN_USE or not self.folder_of(uid).is_dir():
                    return False
                os.replace(self.folder_of(uid), Path(scratch, "series"))
                self.file_of(uid).unlink(missing_ok=True)
                (self._used / uid).unlink(missing_ok=True)
        return True

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self._lock_file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self._lock_file):
            yield

    def _use(self, uid: str) -> None:
        self._used.mkdir(exist_ok=True)
        (self._used / uid).touch()

    def _last_use(self, uid: str) -> float:
        return max(_time(self._used / uid), _time(self.folder_of(uid)))

    def _size(self, uid: str) -> int:
        """Bytes of a copy. Its files are counted once, because they don't change."""
        folder = self.folder_of(uid)
        made = _time(folder)
        if self._sizes.get(uid, (None, 0))[0] != made:
            self._sizes[uid] = made, sum(file.stat().st_size for file in folder.iterdir()) if made else 0
        file = self.file_of(uid)
        return self._sizes[uid][1] + (file.stat().st_size if file.exists() else 0)


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _names(folder: Path) -> list[str]:
    return [path.name for path in _entries(folder) if not path.name.startswith(HIDDEN)]


def _hidden(folder: Path) -> list[Path]:
    return [path for path in _entries(folder) if path.name.startswith(HIDDEN)]


def _time(path: Path) -> float:
    """When a file was changed, in seconds; 0 if there is none."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
