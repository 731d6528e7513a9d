"""What a datastore of an archive keeps in its work folder of labels and class names.

    labels/<tag>/<series>.nii.gz, .json    a label, and what is known about it
    removed/<series>.json                  UIDs of the SEGs of a series that are not used any more
    facts/<series>.json                    what is known about a series, besides what the archive says
    classes.json                           values of class names that came without one

Any number of threads and processes may use one folder.
"""

import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from lib.stores.decisions import FINAL
from lib.stores.file_changes import storing
from lib.stores.naming import declared
from lib.stores.records import ImageRecord, LabelRecord, readable
from lib.stores.series_cache import SUFFIX
from sam2sgp.data import Geometry, write_label
from sam2sgp.files import replacing, write_text

logger = logging.getLogger(__name__)

# Its name on disks: another one would be another layout.
SERIES_NOTES = "facts"


class KeptLabels:
    """Labels, notes and class names of an archive's series.

    Args:
        folder: of all that is kept.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.RLock()

    # Labels

    def path(self, image_id: str, tag: str) -> Path:
        """Where a label is, or would be."""
        return self._folder / "labels" / tag / f"{image_id}{SUFFIX}"

    def tags(self, image_id: str) -> list[str]:
        """Tags of a series' labels but `final`, of which the archive decides."""
        folders = self._folder / "labels"
        found = sorted(entry for entry in folders.iterdir() if entry.is_dir()) if folders.is_dir() else []
        return [tag.name for tag in found if tag.name != FINAL and (tag / f"{image_id}{SUFFIX}").exists()]

    def write(self, path: Path, labels: np.ndarray, geometry: Geometry, info: dict[str, Any]) -> None:
        """Write a label and what is known about it; of two at once the one does not get the notes of the other."""
        with self._lock:
            write_label(path, labels, geometry)
            self.note(path, info)

    def note(self, path: Path, info: dict[str, Any]) -> None:
        """Write what is known about a label."""
        write_text(_notes_of(path), json.dumps(info, default=str))

    def record(self, path: Path) -> dict[str, Any]:
        """What is known about a label, as far as it can be used; what can't is said in the log."""
        known, faults = readable(LabelRecord, _read_json(_notes_of(path)))
        for fault in faults:
            logger.warning("label of series %s: %s; this is left out.", path.name.removesuffix(SUFFIX), fault)
        return known

    def segmentation(self, path: Path) -> str | None:
        """UID of the SEG whose label is here; None if there is none, or no label."""
        known, _ = readable(LabelRecord, _read_json(_notes_of(path)))
        return known.get("segmentation") if path.exists() else None

    def delete(self, path: Path) -> None:
        """Delete a label. Raises OSError where that fails; its notes may stay."""
        path.unlink(missing_ok=True)
        _discard(_notes_of(path))

    def discard(self, path: Path) -> None:
        """Delete a label that is only a copy; it may stay, too."""
        _discard(path)
        _discard(_notes_of(path))

    def files(self, path: Path) -> dict[Path, bytes]:
        """The content of a label's files, as far as there are any."""
        return {file: file.read_bytes() for file in (path, _notes_of(path)) if file.exists()}

    def restore(self, path: Path, files: dict[Path, bytes]) -> None:
        """Have a label's files as they were."""
        for file in (path, _notes_of(path)):
            if file in files:
                with replacing(file) as part:
                    part.write_bytes(files[file])
            else:
                file.unlink(missing_ok=True)

    # Segmentations that are not used any more

    def removed(self, image_id: str) -> set[str]:
        """UIDs of the SEGs of a series that are not used any more."""
        path = self._removals(image_id)
        return set(_read_json(path)) if path.exists() else set()

    def remove(self, image_id: str, uids: set[str]) -> None:
        """Use these SEGs of a series no longer."""
        write_text(self._removals(image_id), json.dumps(sorted(uids | self.removed(image_id))))

    def _removals(self, image_id: str) -> Path:
        return self._folder / "removed" / f"{image_id}.json"

    # Series

    def series_record(self, image_id: str) -> dict[str, Any]:
        """What is known about a series, as far as it can be used."""
        return readable(ImageRecord, _read_json(self._notes_of_series(image_id)))[0]

    def note_series(self, image_id: str, info: dict[str, Any]) -> None:
        """Write what is known about a series."""
        write_text(self._notes_of_series(image_id), json.dumps(info))

    def _notes_of_series(self, image_id: str) -> Path:
        return self._folder / SERIES_NOTES / f"{image_id}.json"

    # Names of classes

    @contextmanager
    def numbering(self) -> Iterator[dict[str, int]]:
        """Values of all known class names, for one thread of one process at a time; names that the block adds are kept.

        Raises StorageError.
        """
        path = self._folder / "classes.json"
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._lock, storing("to number a class"), FileLock(self._folder / "classes.lock"):
            known = self._known_names()
            before = dict(known)
            yield known
            if added := {text: value for text, value in known.items() if text not in before}:
                write_text(path, json.dumps({**_read_json(path), **added}))

    def value_of(self, name: str) -> int:
        """The value of a class by its name, for segments that don't say theirs; kept once it is given."""
        with self.numbering() as known:
            spelt = {text.casefold(): text for text in known}
            name = name if name in known else spelt.get(name.casefold(), name)
            return known.setdefault(name, max(known.values(), default=0) + 1)

    def _known_names(self) -> dict[str, int]:
        """Values of class names: those given to names without one, and those of the labels here."""
        known = {str(text): int(value) for text, value in _read_json(self._folder / "classes.json").items()}
        for notes in sorted((self._folder / "labels").glob("*/*.json")):
            for value, text in declared(readable(LabelRecord, _read_json(notes))[0]).items():
                known.setdefault(text, value)
        return known


def _notes_of(label: Path) -> Path:
    return label.with_name(label.name.removesuffix(SUFFIX) + ".json")


def _discard(path: Path) -> None:
    """Delete a file that nobody needs any more."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s: can't be deleted: %s", path.name, error)


def _read_json(path: Path) -> Any:
    """The content of a JSON file; {} if there is none or it is damaged."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError):
        logger.warning("%s: expected JSON, found it damaged; it is left aside.", path.name)
        return {}
