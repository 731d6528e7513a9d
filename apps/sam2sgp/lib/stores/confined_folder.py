"""Which files of a folder are images or labels, and that no path leads out of it.

In: names, as clients send them and as the folder holds them. Out: paths inside the folder, files by image id, and
sentences on what lies there and is not offered as an image.
"""

import logging
import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from lib.checks import RequestError, check_id, check_tag
from lib.stores.file_changes import storing
from lib.stores.folder_index import INDEX
from sam2sgp.data.io import SUFFIXES, dicom_files
from sam2sgp.data.tree import DESCRIPTIONS, file_not_used, is_hidden

logger = logging.getLogger(__name__)

LABELS = "labels"
# What lies among the images and is none of them.
OWN_FILES = {LABELS, INDEX, *DESCRIPTIONS}
# What a killed process left of a save, in seconds; younger ones may belong to a process at work.
LEFTOVER_AGE = 3600.0


class FolderGone(RequestError):
    """The studies folder can't be read for now."""

    status = 503


class ConfinedFolder:
    """A folder and its subfolders of labels, of which links that lead out are not followed.

    Args:
        root: its real path.

    Attributes:
        left_out: sentences on what lies among the images and is not offered as one, as of the last `look_at`.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self.left_out: list[str] = []
        self._warned: set[str] = set()

    def inside(self, folder: str, name: str) -> str:
        """The real path of a file; RequestError if links lead it out of the datastore."""
        path = os.path.realpath(os.path.join(folder, name))
        if os.path.commonpath([path, self.root]) != self.root or path == self.root:
            raise RequestError(
                f"{name}: expected a file in the datastore, found a link that leads out; put a copy there."
            )
        return path

    def writable(self, folder: str) -> Path:
        """A folder of the datastore, made if missing; RequestError if links lead it out of the datastore."""
        self.check_there()
        path = Path(self.inside(folder, ".")) if os.path.realpath(folder) != self.root else Path(self.root)
        with storing():
            path.mkdir(parents=True, exist_ok=True)
        return path

    def check_there(self) -> None:
        """Raise FolderGone where the studies folder can't be read: writing to it would make another one."""
        try:
            os.scandir(self.root).close()
        except OSError as error:
            raise FolderGone(
                "studies folder: expected the folder that the server was started with, found that it can't be read "
                f"({error.strerror or error}); nothing is done before it is back."
            ) from error

    def files(self, folder: str, entries: list[os.DirEntry] | None = None) -> dict[str, dict[str, os.DirEntry]]:
        """The images or labels directly in a folder, which holds `entries`: {id: {suffix: file}}."""
        files: dict[str, dict[str, os.DirEntry]] = {}
        for entry in entries_of(folder) if entries is None else entries:
            name = entry.name
            lower = name.lower()
            suffix = next((suffix for suffix in SUFFIXES if lower.endswith(suffix)), None)
            if suffix is None or name.startswith("."):
                continue
            try:
                image_id = check_id(name[: -len(suffix)])
                if entry.is_symlink():
                    self.inside(folder, name)
            except RequestError as error:
                self.warn(f"{error} The file is left out.")
                continue
            if _is(entry.is_file):
                files.setdefault(image_id, {})[name[-len(suffix) :]] = entry
        return files

    def look_at(self, entries: list[os.DirEntry]) -> None:
        """Put on `left_out`, and in the log once, what lies among the images and is not offered as one."""
        left_out = []
        for entry in sorted(entries, key=lambda entry: entry.name):
            path = Path(entry.path)
            if entry.name in DESCRIPTIONS and not _is(entry.is_file):
                left_out.append(
                    f"{entry.name}: expected a file with the names of classes, found a folder, a pipe or a link to "
                    "nowhere; it is not used."
                )
                continue
            if is_hidden(path) or entry.name in OWN_FILES or entry.name.endswith((".lock", ".damaged")):
                continue
            if _is(partial(entry.is_dir, follow_symlinks=False)):
                what = "DICOM files" if dicom_files(path) else "files"
                left_out.append(
                    f"{entry.name}/: a folder of {what} is not an image here; convert a series to one NIfTI file, or "
                    "serve it from a DICOMweb archive."
                )
                continue
            has_suffix = any(entry.name.lower().endswith(suffix) for suffix in SUFFIXES)
            if not _is(partial(entry.is_file, follow_symlinks=has_suffix)):
                left_out.append(f"{entry.name}: a link, a pipe, a socket or a device, not a file.")
            elif not has_suffix:
                left_out.append(f"{entry.name}: {file_not_used(path)}.")
        # Names may hold any bytes, and go from here into the log and into answers.
        self.left_out = [sentence if sentence.isprintable() else ascii(sentence)[1:-1] for sentence in left_out]
        for sentence in self.left_out:
            self.warn(f"Not offered as an image: {sentence}")

    def warn(self, message: str) -> None:
        """Log a message, each once."""
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message)

    def tags(self, labels: str) -> tuple[str, ...]:
        """The tags that have a folder in that of the labels, sorted."""
        entries = entries_of(labels) if os.path.isdir(labels) else []
        return tuple(sorted(entry.name for entry in entries if _is(entry.is_dir) and self._is_tag(labels, entry.name)))

    def _is_tag(self, folder: str, name: str) -> bool:
        try:
            self.inside(folder, check_tag(name))
        except RequestError as error:
            self.warn(str(error))
            return False
        return True

    def remove_leftovers(self, labels: str) -> None:
        """Delete what killed processes left of saves, here and in the folders of tags in that of the labels."""
        folders = [self.root, *(entry.path for entry in entries_of(labels) if _is(entry.is_dir))]
        for folder in folders:
            for entry in entries_of(folder):
                hidden = entry.name.startswith(".") and any(f"{suffix}." in entry.name for suffix in SUFFIXES)
                if hidden and entry.is_dir(follow_symlinks=False):
                    if time.time() - entry.stat(follow_symlinks=False).st_mtime > LEFTOVER_AGE:
                        shutil.rmtree(entry.path, ignore_errors=True)


def entries_of(folder: str) -> list[os.DirEntry]:
    """What is directly in a folder."""
    with os.scandir(folder) as entries:
        return list(entries)


def _is(kind: Callable[[], bool]) -> bool:
    """What an entry of a folder is; nothing, for one that can't be looked at, such as a link to itself."""
    try:
        return kind()
    except OSError:
        return False


def newest(files: dict[str, os.DirEntry]) -> str:
    """The suffix of the file that was written last."""
    return max(files, key=lambda suffix: files[suffix].stat().st_mtime_ns) if len(files) > 1 else next(iter(files))


def foremost(files: dict[str, os.DirEntry]) -> str:
    """The suffix that comes first among the supported ones: volumes before pictures."""
    return min(files, key=lambda suffix: SUFFIXES.index(suffix.lower()))
