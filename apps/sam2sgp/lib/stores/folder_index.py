"""The index of a folder of images, `datastore_v2.json`: what is known about each image and label.

In: the file, as this or another program wrote it, or as a kill left it. Out: entries that can be used, and sentences on
what can't. A copy in the work folder stands in for a damaged one; the `Journal` has the entries from before a change
that was not made.
"""

import errno
import json
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from zlib import crc32

from monailabel.datastore.local import DataModel, ImageLabelModel, LocalDatastoreModel

from lib.checks import StorageError
from lib.server_paths import open_plain, read_plain
from lib.stores.audit import content_hash, open_hash
from lib.stores.records import ImageRecord, LabelRecord, Record, readable
from sam2sgp.files import write_text

logger = logging.getLogger(__name__)

INDEX = "datastore_v2.json"
# Hidden, next to the index: the entries from before a change that may not have been made.
JOURNAL = ".datastore_v2.unfinished.json"
# Bytes; of an index of 100,000 images with all that may be known about a few.
LARGEST_INDEX = 256 << 20
# Errors of opening links, pipes, sockets and devices.
NO_FILE = (errno.EINVAL, errno.ELOOP, errno.ENXIO, errno.ENODEV)
# Damaged indexes that are kept.
MOST_SET_ASIDE = 1000


class FolderIndex:
    """The file with what is known about images and labels. For one thread at a time, but for `copy`.

    Args:
        folder: of the datastore.
        work_folder: where the copy is kept.
        warn: is told what goes wrong with the copy.

    Attributes:
        journal: of the change at work.
        problems: sentences on what could not be used, until the next start.
    """

    def __init__(self, folder: Path, work_folder: Path, warn: Callable[[str], None]) -> None:
        self._path = folder / INDEX
        # Other folders may have had the same work folder before.
        self._copy_path = work_folder / f"index-{crc32(str(folder).encode()):08x}.json"
        self._warn = warn
        self.journal = Journal(folder)
        self.problems: list[str] = []
        # Entries as they were read last, with what was made of them.
        self._parsed: dict[str, tuple[Any, ImageLabelModel, list[str]]] = {}
        # What tells the file that was read last from others, and what `load` made of it.
        self._loaded: tuple[tuple[int, ...] | None, Any] = None, None
        # The newest text of the file, where it is not copied yet.
        self._to_copy: deque[str] = deque(maxlen=1)
        self._copying = threading.Lock()

    def forget(self) -> None:
        """Read the file at the next `load`, whatever its time says."""
        self._loaded = None, None

    def load(self) -> tuple[dict[str, str], dict[str, ImageLabelModel]]:
        """Name and description, and the entries, as the index has them.

        Only what is wrong with an entry is left out. An index that can't be read at all is set aside.
        Its copy in the work folder then stands in until the next change, also for one that is gone.
        """
        identity = None if self.journal.exists() else _identity(self._path)
        if identity is not None and identity == self._loaded[0]:
            return self._loaded[1]
        try:
            content = _parsed_index(self._path)
        except (FileNotFoundError, ValueError) as error:
            identity = None
            if isinstance(error, ValueError):
                self._set_aside()
            try:
                content = _parsed_index(self._copy_path)
            except (OSError, ValueError):
                content = {"objects": {}}
        parsed = {}
        for image_id, raw in self.journal.applied(content["objects"]).items():
            known = self._parsed.get(image_id)
            parsed[image_id] = known if known and known[0] == raw else (raw, *_entry_of(image_id, raw))
        self._parsed = parsed
        for _, _, problems in parsed.values():
            for problem in problems:
                self._tell(problem)
        header = {key: content[key] for key in ("name", "description") if isinstance(content.get(key), str)}
        found = header, {image_id: entry for image_id, (_, entry, _) in parsed.items()}
        self._loaded = identity, found
        return found

    def write(self, model: LocalDatastoreModel) -> None:
        """Replace the file in one step. Raises OSError, StorageError where it would be too large."""
        text = model.model_dump_json(exclude={"base_path"}, fallback=str)
        if len(text.encode("utf-8", "backslashreplace")) > LARGEST_INDEX:
            # It could not be read again, and would be set aside as damaged.
            raise StorageError(
                f"index: expected at most {LARGEST_INDEX >> 20} MB to be known about images and labels, found more; "
                "remove labels or long notes, or serve fewer images from a folder."
            )
        write_text(self._path, text)
        self._to_copy.append(text)

    def copy(self) -> None:
        """Copy what was written last. Of several threads, the first copies the newest for all."""
        with self._copying, suppress(IndexError):
            text = self._to_copy.pop()
            try:
                write_text(self._copy_path, text, durable=False)
            except OSError as error:
                name = self._copy_path.name
                self._warn(f"{name}: expected to keep a copy of the index, found {error.strerror or error}.")

    def try_to_write(self, model: LocalDatastoreModel) -> None:
        """The same for files that were deleted: entries of files that are not there mean nothing."""
        try:
            self.write(model)
        except (OSError, StorageError) as error:
            logger.warning("The index still lists what was deleted, because it can't be written: %s", error)

    def _set_aside(self) -> None:
        """Keep a damaged index under a name that no other one has."""
        path = self._path
        names = [f"{path.name}.damaged", *(f"{path.name}.damaged-{n}" for n in range(2, MOST_SET_ASIDE + 1))]
        for name in names:
            aside = path.with_name(name)
            if aside.exists():
                continue
            try:
                os.rename(path, aside)
            except OSError:
                break
            self._tell(f"{path.name}: expected an index, found it damaged; kept as {name} and rebuilt from the files.")
            return
        self._tell(f"{path.name}: expected an index, found it damaged; rebuilt from the files.")

    def _tell(self, problem: str) -> None:
        """Log a problem of the index and keep it for `status`, until the next start."""
        if problem not in self.problems:
            self.problems.append(problem)
            logger.warning(problem)


class Journal:
    """What the index is to say if a file is not put in place: the process may be killed after it wrote the index.

    Whether it was is told by the file's content, which is the same for a copy of the folder and across disks.

    Args:
        folder: of the datastore.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / JOURNAL

    def exists(self) -> bool:
        return self._path.exists()

    def open(
        self, before: Mapping[str, ImageLabelModel], after: Mapping[str, ImageLabelModel], source: Path, target: Path
    ) -> None:
        """Note the entries that change, to hold until `target` has the content of `source`."""
        changed = [image_id for image_id, entry in after.items() if before.get(image_id) is not entry]
        entries = {
            image_id: before[image_id].model_dump(mode="json", fallback=str) if image_id in before else None
            for image_id in changed
        }
        file = os.path.relpath(target, self._folder)
        write_text(self._path, json.dumps({"file": file, "sha256": content_hash(source), "entries": entries}))

    def close(self) -> None:
        """The index and the files agree."""
        try:
            self._path.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("%s: can't be deleted: %s", JOURNAL, error)

    def applied(self, objects: dict[str, Any]) -> dict[str, Any]:
        """The entries of an index, with those from before a change that was not made."""
        try:
            noted = json.loads(read_plain(self._path, LARGEST_INDEX))
            # The file may be the first of its kind: without it the change was not made.
            if self._hash_of(noted["file"]) == noted["sha256"]:
                return objects
            entries = dict(noted["entries"])
        except FileNotFoundError:
            return objects
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            logger.warning("%s: expected what an unfinished change began with, found %r; left aside", JOURNAL, error)
            return objects
        kept = {image_id: entry for image_id, entry in objects.items() if image_id not in entries}
        return kept | {image_id: entry for image_id, entry in entries.items() if entry is not None}

    def _hash_of(self, name: str) -> str | None:
        """The hash of a file of the datastore, as `content_hash` gives it; None where there is none."""
        try:
            with open_plain(self._folder / name, self._folder) as file:
                return open_hash(file)
        except FileNotFoundError:
            return None


def _identity(path: Path) -> tuple[int, ...] | None:
    """What tells a file from those that come to its place; None where there is none."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def _parsed_index(path: Path) -> dict[str, Any]:
    """The content of an index file. Raises FileNotFoundError if there is nothing, ValueError if it is no index."""
    try:
        content = json.loads(read_plain(path, LARGEST_INDEX))
    except RecursionError as error:
        raise ValueError("too deep") from error
    except OSError as error:
        if error.errno in NO_FILE:
            raise ValueError("no file") from error
        # It may be whole, and there for the next question.
        raise
    if not isinstance(content, dict) or not isinstance(content.get("objects"), dict):
        raise ValueError("not an index")
    return content


def _entry_of(image_id: str, raw: Any) -> tuple[ImageLabelModel, list[str]]:
    """What can be used of an entry of the index, and sentences on what can't."""
    problems: list[str] = []

    def part(kind: type[Record], value: Any, what: str) -> DataModel:
        value = value if isinstance(value, dict) else {}
        info, faults = readable(kind, value.get("info", {}))
        problems.extend(f"{what}: {fault}; this is left out." for fault in faults)
        suffix = value.get("ext")
        return DataModel(info=info, ext=suffix if isinstance(suffix, str) else "")

    raw = raw if isinstance(raw, dict) else {}
    labels = raw.get("labels")
    labels = labels if isinstance(labels, dict) else {}
    image = part(ImageRecord, raw.get("image"), f"index, image {image_id}")
    made = {tag: part(LabelRecord, label, f"index, label {tag} of {image_id}") for tag, label in labels.items()}
    return ImageLabelModel(image=image, labels=made), problems


def replaces(before: Mapping[str, ImageLabelModel], after: Mapping[str, ImageLabelModel]) -> bool:
    """Whether anything that is known about an image or a label is lost or changed."""

    def kept(image_id: str, entry: ImageLabelModel) -> bool:
        new = after.get(image_id)
        if new is entry:
            return True
        if new is None or new.image != entry.image:
            return False
        return all(new.labels.get(tag) == label for tag, label in entry.labels.items())

    return not all(kept(image_id, entry) for image_id, entry in before.items())
