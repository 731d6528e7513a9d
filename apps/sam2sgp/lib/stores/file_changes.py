"""Changes of a datastore's files, each made by one step: it is made, or everything is as it was.

In: files to put in place, to rename or to delete. Out: the changed folder, or an error of one sentence with its HTTP
status. New content is on the disk before it is renamed into place.
"""

import errno
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import Timeout
from monailabel.datastore.local import ImageLabelModel

from lib.checks import StorageError
from sam2sgp.errors import DataError
from sam2sgp.files import sync_folder

logger = logging.getLogger(__name__)

# Saves take well below a second; a lock held for longer belongs to a process that hangs.
LOCK_TIMEOUT = 30.0


class Change:
    """A change of the datastore: entries of the index, and files.

    One step makes it: a file is renamed, or the last of those to delete is deleted. The deletions before it are undone
    where it fails; what there is to tidy after it can fail without harm.

    Attributes:
        objects: the entries as they are to be. header: name and description, if these change. moved: the file that
            makes the change when it is renamed, and what it replaces; None if none is. notes: lines of the audit log,
            an action and its details each.
    """

    def __init__(self, objects: dict[str, ImageLabelModel]) -> None:
        self.objects = objects
        self.header: dict[str, str] = {}
        self.moved: tuple[Path, Path] | None = None
        self.notes: list[tuple[str, dict[str, object]]] = []
        self._deletions: list[Path] = []
        self._tidying: list[Path] = []

    def note(self, action: str, **details: object) -> None:
        """Have a line written to the audit log."""
        self.notes.append((action, details))

    def move(self, source: Path, target: Path) -> None:
        """Rename a file, in place of `target`."""
        self.moved = source, target

    def delete(self, path: Path) -> None:
        """Delete a file, not what it links to."""
        self._deletions.append(path)

    def tidy(self, path: Path) -> None:
        """Delete a file after the change is made."""
        self._tidying.append(path)

    def make(self) -> None:
        """Do it. Raises OSError with everything as it was."""
        if self.moved:
            _rename(*self.moved)
        elif self._deletions:
            self._delete()
        for path in self._tidying:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                logger.warning("%s: can't be deleted, a newer file counts: %s", path.name, error)

    def _delete(self) -> None:
        *others, last = self._deletions
        with ExitStack() as hidden:
            moved: list[tuple[Path, Path]] = []
            try:
                for path in others:
                    place = hidden.enter_context(_hidden_folder(path)) / path.name
                    os.replace(path, place)
                    moved.append((place, path))
                # By itself it needs no space on the disk.
                last.unlink(missing_ok=True)
            except BaseException:
                for place, path in moved:
                    os.replace(place, path)
                raise


@contextmanager
def _hidden_folder(path: Path) -> Iterator[Path]:
    """A folder next to a file, which goes with the block or, after a kill, with the leftovers."""
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        yield Path(folder)


@contextmanager
def copied(source: str | Path, target: Path) -> Iterator[Path]:
    """A copy of a file next to `target`, on the disk, to be renamed in the block. Raises StorageError."""
    with storing(), _hidden_folder(target) as folder:
        part = folder / target.name
        try:
            shutil.copyfile(source, part)
        except FileNotFoundError as error:
            if os.path.exists(source):
                raise
            raise DataError(
                f"{target.name}: expected the file to save, found that it has gone; load it again."
            ) from error
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        yield part


def _rename(source: Path, target: Path) -> None:
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        # The folder of a tag may lie on a disk of its own.
        with copied(source, target) as part:
            os.replace(part, target)
        source.unlink()
    sync_folder(target.parent)
    # A hidden folder goes anyway.
    if not source.parent.name.startswith("."):
        sync_folder(source.parent)


@contextmanager
def storing(purpose: str = "to save the change") -> Iterator[None]:
    """Errors of the disk as sentences about the datastore. Raises StorageError."""
    try:
        yield
    except Timeout as error:
        raise StorageError(
            f"datastore: expected to lock it within {LOCK_TIMEOUT:.0f} s, found another process at work on it; try "
            "again, or end that process."
        ) from error
    except OSError as error:
        raise storage_error("datastore", purpose, error) from error


def storage_error(what: str, purpose: str, error: OSError) -> StorageError:
    """An error of the disk as a sentence about `what`; `purpose` says what was to be done."""
    return StorageError(
        f"{what}: expected {purpose}, found {error.strerror or error}; nothing that was there is lost: free some space "
        "or correct the folder's permissions, then try again."
    )
