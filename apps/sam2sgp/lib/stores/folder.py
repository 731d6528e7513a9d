"""Images and labels of a folder, in MONAI Label's own layout, from which no request leads out.

In: image ids, label tags and uploaded files, as clients send them. Out: paths inside the folder, or an error of one
sentence with its HTTP status. The files are the truth: `datastore_v2.json` only holds what is known about them and is
rebuilt when it is damaged or gone, from the files and from a copy in the work folder. A label is checked against its
image before it is approved (tag `final`).

Several threads and processes may use one folder at once. A label is changed while its image is held
(`lib.stores.decisions`), because it takes a while to check it. Then new content is copied to the disk and the audit log
is written. The change itself is made under the folder's lock, which threads get in the order in which they came: the
index is written, and then one file is put in place, renamed or deleted, which makes the change. So a change that fails
leaves everything as it was, a reader sees the old file or the new one, and a process killed at any moment leaves no
half file. Which entries of the index hold until then stands in a file of its own (`_Journal`), so an old file never
goes with what is known about a new one. Readers never wait for a change: they look at the folders' times, and read them
again only when these changed.
"""

import errno
import json
import logging
import os
import shutil
import tempfile
import threading
import time
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from filelock import FileLock, Timeout
from monailabel.datastore.local import DataModel, ImageLabelModel, LocalDatastore, LocalDatastoreModel
from monailabel.interfaces.datastore import Datastore

from lib.checks import (
    BadLabel,
    Conflict,
    NotFound,
    RequestError,
    StorageError,
    check_id,
    check_tag,
    image_limit,
    suffix_of,
)
from lib.server_paths import open_plain, read_plain
from lib.stores.audit import Audit, content_hash, open_hash
from lib.stores.decisions import FINAL, POLL, Decisions, FairLock, ImageLocks, state_of
from lib.stores.dicomweb import DicomWebDatastore
from lib.stores.door import admitted, label_limit
from lib.stores.naming import agreed, declared, renumber
from lib.stores.records import ImageRecord, LabelRecord, Record, checked, readable
from sam2sgp.data.classes import check_label_values, class_names
from sam2sgp.data.io import SUFFIXES, dicom_files, output_suffix, read_image, read_label, write_label
from sam2sgp.data.tree import DESCRIPTIONS, file_not_used, is_hidden
from sam2sgp.errors import DataError
from sam2sgp.files import replacing, write_text

logger = logging.getLogger(__name__)

LABELS = "labels"
# A folder changed less than this many seconds ago may change again without a new time: it is read again.
COARSEST_CLOCK = 0.1
# What lies among the images and is none of them.
OWN_FILES = {LABELS, "datastore_v2.json", *DESCRIPTIONS}
# Saves take well below a second; a lock held for longer belongs to a process that hangs.
LOCK_TIMEOUT = 30.0
# What a killed process left of a save, in seconds; younger ones may belong to a process at work.
LEFTOVER_AGE = 3600.0
# Hidden, next to the index: the entries from before a change that may not have been made.
JOURNAL = ".datastore_v2.unfinished.json"
# Bytes; of an index of 100,000 images with all that may be known about a few.
LARGEST_INDEX = 256 << 20
# Of links, pipes, sockets and devices.
NO_FILE = (errno.EINVAL, errno.ELOOP, errno.ENXIO, errno.ENODEV)
# Damaged indexes that are kept, and sentences about bad entries that are told.
MOST_SET_ASIDE = 1000
PROBLEMS_TOLD = 20


class FolderGone(RequestError):
    """The studies folder can't be read for now."""

    status = 503


class _Renumbered(Exception):
    """Labels that were approved meanwhile have other values for the names of a label."""


def _again_if_renumbered(approve: Callable[..., Any]) -> Callable[..., Any]:
    """Check the label once more, as often as others are approved first: two new names must not get one value."""

    @wraps(approve)
    def again(*arguments: Any) -> Any:
        while True:
            with suppress(_Renumbered):
                return approve(*arguments)

    return again


@dataclass(frozen=True)
class _CheckedLabel:
    """A label that fits its image: its file, the values in it, and what is known about it."""

    file: str
    values: tuple[int, ...]
    info: dict[str, Any]


class ConfinedDatastore(Decisions, LocalDatastore):
    """A folder of images with their labels in `labels/<tag>/`, confined to that folder.

    Links that lead out of the folder are not followed, names that could are refused, and files that a listing of the
    folder doesn't show do not exist for it. Of two images with the same stem only one is offered, with a warning.

    Args:
        datastore_path: the folder; made if missing.
        work_folder: where archives for download, a copy of the index and the images' locks are put.
        max_unpacked: how many bytes the voxels of an uploaded file may take as float32.
        audit: where approvals and removals are noted; None for nowhere.

    Attributes:
        left_out: sentences on what lies among the images and is not offered as one.

    Raises:
        StorageError: the folder can't be read, or lacks subfolders that can't be made.
    """

    def __init__(self, datastore_path: str, work_folder: Path, max_unpacked: int, audit: Audit | None = None):
        self._root = os.path.realpath(datastore_path)
        self._work_folder = Path(work_folder)
        self._max_unpacked = max_unpacked
        self._audit = audit
        self._image_locks = ImageLocks(self._work_folder / "locks")
        # Other folders may have had the same work folder before.
        self._index_copy = self._work_folder / f"index-{crc32(self._root.encode()):08x}.json"
        self._journal = _Journal(Path(self._root))
        self._reading, self._writing = threading.RLock(), FairLock()
        # Entries of the index as they were read last, with what was made of them.
        self._parsed: dict[str, tuple[Any, ImageLabelModel, list[str]]] = {}
        self._problems: list[str] = []
        self._seen: tuple | None = None
        self._tags: tuple[str, ...] = ()
        self._warned: set[str] = set()
        self.left_out: list[str] = []
        self._tag_counts: tuple[dict, dict[str, int]] | None = None
        labels = os.path.realpath(os.path.join(self._root, LABELS))
        if os.path.commonpath([labels, self._root]) != self._root:
            raise StorageError(
                f"{self._root}: expected labels in this folder, found that {LABELS} is a link out of it."
            )
        try:
            super().__init__(self._root, extensions=[f"*{suffix}" for suffix in SUFFIXES], labels_dir=LABELS)
            self._remove_leftovers()
        except OSError as error:
            raise _storage_error(self._root, "to open the studies folder", error) from error

    # What is there

    def name(self) -> str:
        return self._model().name

    def description(self) -> str:
        return self._model().description

    def set_name(self, name: str) -> None:
        with self._changing() as change:
            change.header["name"] = str(name)

    def set_description(self, description: str) -> None:
        with self._changing() as change:
            change.header["description"] = str(description)

    def list_images(self) -> list[str]:
        return list(self._objects())

    def get_labeled_images(self, label_tag: str | None = None, labels: list[str] | None = None) -> list[str]:
        """Ids of the images with an approved label."""
        return [image_id for image_id, entry in self._objects().items() if FINAL in entry.labels]

    def get_unlabeled_images(self, label_tag: str | None = None, labels: list[str] | None = None) -> list[str]:
        """Ids of the images without an approved label; one with an empty approved label has a label."""
        return [image_id for image_id, entry in self._objects().items() if FINAL not in entry.labels]

    def status(self) -> dict[str, Any]:
        """Numbers of images and labels; with `problems`, sentences on bad entries of the index, where there are any."""
        objects = self._objects()
        if self._tag_counts is None or self._tag_counts[0] is not objects:
            self._tag_counts = objects, dict(Counter(tag for entry in objects.values() for tag in entry.labels))
        tags = self._tag_counts[1]
        found = {"total": len(objects), "completed": tags.get(FINAL, 0), "label_tags": dict(tags)}
        problems = self._problems
        return {**found, "problems": problems[:PROBLEMS_TOLD]} if problems else found

    def json(self) -> dict[str, Any]:
        return self._model().model_dump(exclude={"base_path"})

    def datalist(self, full_path: bool = True) -> list[dict[str, Any]]:
        """[{"image": path, "label": path}] of the approved labels; paths relative to the folder if not `full_path`."""
        pairs = []
        for image_id, entry in self._objects().items():
            if FINAL in entry.labels:
                image = self._inside(self._datastore.image_path(), image_id + entry.image.ext)
                label = self._inside(self._datastore.label_path(FINAL), image_id + entry.labels[FINAL].ext)
                pairs.append({"image": image, "label": label})
        if full_path:
            return pairs
        return [{key: os.path.relpath(path, self._root) for key, path in pair.items()} for pair in pairs]

    def get_image_uri(self, image_id: str) -> str:
        """The image's path. Raises NotFound for an unknown id, RequestError for one that can't be an id."""
        return self._inside(self._datastore.image_path(), image_id + self._entry(image_id).image.ext)

    def get_image_info(self, image_id: str) -> dict[str, Any]:
        return {**self._entry(image_id).image.info, "path": self.get_image_uri(image_id)}

    def get_label_uri(self, label_id: str, label_tag: str) -> str:
        """The label's path, or "" if there is no such label. Raises RequestError for an invalid id or tag."""
        label = self._label(label_id, label_tag)
        return self._inside(self._datastore.label_path(check_tag(label_tag)), label_id + label.ext) if label else ""

    def get_label_info(self, label_id: str, label_tag: str) -> dict[str, Any]:
        label = self._label(label_id, label_tag)
        return dict(label.info) if label else {}

    def get_labels_by_image_id(self, image_id: str) -> dict[str, str]:
        entry = self._objects().get(check_id(image_id))
        return dict.fromkeys(entry.labels, image_id) if entry else {}

    def tags(self) -> dict[str, list[str]]:
        """The tags of each image's labels, by the image's id."""
        return {image_id: list(entry.labels) for image_id, entry in self._objects().items()}

    def get_dataset_archive(self, limit_cases: int | None) -> str:
        """The path of a ZIP file with the approved pairs; the next call replaces it. Raises NotFound without pairs."""
        pairs = self.datalist()[: max(limit_cases, 1) if limit_cases else None]
        if not pairs:
            raise NotFound("data set: expected approved labels to put in an archive, found none; approve some first.")
        archive = self._work_folder / "dataset.zip"
        try:
            with replacing(archive) as part, zipfile.ZipFile(part, "w") as file:
                for pair in pairs:
                    for key, path in pair.items():
                        name = f"{key}/{os.path.basename(path)}"
                        with open_plain(path, self._root) as source, file.open(name, "w", force_zip64=True) as member:
                            shutil.copyfileobj(source, member)
                file.writestr("metadata.json", self._model().model_dump_json(exclude={"base_path"}, fallback=str))
        except OSError as error:
            raise _storage_error("data set", "to write an archive", error) from error
        return str(archive)

    def declared_names(self) -> dict[int, str]:
        """Class names by value, as the folder's own files declare them.

        Raises DataError: they can't be understood, or links lead out of the folder.
        """
        for name in DESCRIPTIONS:
            self._inside(self._root, name)
        return class_names(self._root)

    def refresh(self) -> None:
        """Read the folders again, whatever their times say."""
        self._seen = None
        self._model()

    # What changes

    def add_image(self, image_id: str, image_filename: str, image_info: dict[str, Any]) -> str:
        """Copy an image into the folder.

        Args:
            image_id: its id; None or "" for the file's stem.
            image_filename: of a readable image of a supported kind.
            image_info: what is to be known about it.

        Raises:
            RequestError: an invalid id, a file of another kind or too large, another image under this id, a full disk,
                a record that can't be stored.
            DataError: the image can't be read.
        """
        suffix = suffix_of(image_filename)
        image_id = check_id(image_id or os.path.basename(image_filename)[: -len(suffix)])
        suffix = _suffix_for(image_id, suffix)
        with admitted(image_filename, self._max_unpacked, image_id + suffix) as content:
            return self._add_image(image_id, str(content), image_id + suffix, image_info)

    def _add_image(self, image_id: str, image_filename: str, name: str, image_info: dict[str, Any]) -> str:
        suffix = name[len(image_id) :]
        info = _without_stamp(checked(ImageRecord, image_info, f"image {image_id}"))
        with _naming(image_filename, name):
            read_image(image_filename)
        target = self._writable(self._datastore.image_path()) / name
        _check_looks(image_id, self._objects())
        sha256 = content_hash(image_filename)
        with self.deciding(image_id), _copied(image_filename, target) as part, ExitStack() as stack:
            if image_id not in self._objects():
                self._note("add image", image=image_id, sha256=sha256)
            change = stack.enter_context(self._changing())
            _check_looks(image_id, change.objects)
            entry = change.objects.get(image_id)
            if entry:
                there = self._inside(self._datastore.image_path(), image_id + entry.image.ext)
                if entry.image.ext != suffix or content_hash(there) != sha256:
                    raise Conflict(
                        f"{name}: expected a new image id, found {os.path.basename(there)} under this id with another "
                        "content; choose another id, or remove that image first."
                    )
                return image_id
            change.move(part, target)
            image = DataModel(info={**info, **_first_info(name)}, ext=suffix)
            change.objects[image_id] = ImageLabelModel(image=image)
        return image_id

    def remove_image(self, image_id: str) -> None:
        """Delete an image and all its labels. Raises NotFound for an unknown id."""
        with _storing(), self.deciding(check_id(image_id)), ExitStack() as stack:
            for tag in self._entry(image_id).labels:
                self._note_removal(image_id, tag)
            self._note("remove image", image=image_id, sha256=content_hash(self.get_image_uri(image_id)))
            change = stack.enter_context(self._changing(needs_index=False))
            entry = change.objects.get(image_id)
            if entry is None:
                raise _no_image(image_id)
            for tag, label in entry.labels.items():
                self._take_label(change, image_id, tag, label)
            change.delete(self._writable(self._datastore.image_path()) / (image_id + entry.image.ext))
            del change.objects[image_id]

    def save_label(self, image_id: str, label_filename: str, label_tag: str, label_info: dict[str, Any]) -> str:
        """Copy a label into the folder, in place of an earlier one of the same image and tag.

        Args:
            image_id: of its image.
            label_filename: of a file of a supported kind.
            label_tag: `final` approves the label: it is then checked against its image first.
            label_info: what is to be known about it; its `label_info` may declare classes by `idx` and `name`.

        Returns:
            The label's id, which is its image's.

        Raises:
            RequestError: an invalid id or tag, an unknown image, a file of another kind or too large, a full disk, a
                record that can't be stored.
            BadLabel: a label to approve that can't be read, has another size than its image or undeclared values.
        """
        tag = check_tag(label_tag)
        # An unknown image comes before what may be wrong with the label.
        limit = label_limit(self.get_image_uri(image_id), self._max_unpacked)
        name = image_id + _suffix_for(image_id, suffix_of(label_filename))
        info = _without_stamp(checked(LabelRecord, label_info, f"label of {image_id}"))
        with admitted(label_filename, limit, name, label=True) as content, self.deciding(image_id):
            return self._save_label(image_id, str(content), name, tag, info)

    @_again_if_renumbered
    def _save_label(self, image_id: str, label_filename: str, name: str, tag: str, info: dict[str, Any]) -> str:
        if tag != FINAL:
            return self._put_label(image_id, label_filename, tag, name, info)
        with tempfile.TemporaryDirectory() as scratch:
            label = self._checked_label(self.get_image_uri(image_id), label_filename, name, info, Path(scratch))
            name = image_id + _suffix_for(image_id, suffix_of(label.file))
            return self._put_label(image_id, label.file, tag, name, label.info, label.values)

    def _put_label(
        self,
        image_id: str,
        label_filename: str,
        tag: str,
        name: str,
        info: dict[str, Any],
        values: tuple[int, ...] = (),
    ) -> str:
        """Put a label in place; `values`: of one to approve. Raises _Renumbered."""
        suffix = name[len(image_id) :]
        target = self._writable(self._datastore.label_path(tag)) / name
        with _copied(label_filename, target) as part, ExitStack() as stack:
            if tag == FINAL:
                self._note("approve", image=image_id, tag=tag, sha256=content_hash(part))
            change = stack.enter_context(self._changing())
            entry = change.objects.get(image_id)
            if entry is None:
                raise _no_image(image_id)
            if tag == FINAL:
                self._check_values(values, info, change.objects)
            change.move(part, target)
            label = DataModel(info={**info, **_first_info(name)}, ext=suffix)
            change.objects[image_id] = ImageLabelModel(image=entry.image, labels={**entry.labels, tag: label})
            # Of files of several kinds the newest counts, so a process killed before this has replaced the label too.
            self._leave_only(change, image_id, tag, suffix)
        return image_id

    def remove_label(self, label_id: str, label_tag: str) -> None:
        """Delete one label. Raises NotFound where there is none."""
        tag = check_tag(label_tag)
        with self.deciding(check_id(label_id, "label id")):
            self._remove_label(label_id, tag)

    def _remove_label(self, label_id: str, tag: str) -> None:
        self._note_removal(label_id, tag)
        with self._changing(needs_index=False) as change:
            entry, label = _labelled(change.objects, label_id, tag)
            self._take_label(change, label_id, tag, label)
            labels = {other: kept for other, kept in entry.labels.items() if other != tag}
            change.objects[label_id] = ImageLabelModel(image=entry.image, labels=labels)

    def _note_removal(self, image_id: str, tag: str) -> None:
        """Note that a label goes. Raises NotFound where there is none."""
        _labelled(self._objects(), image_id, tag)
        with _storing():
            sha256 = content_hash(self.get_label_uri(image_id, tag))
        self._note("remove label", image=image_id, tag=tag, sha256=sha256)

    def _take_label(self, change: "_Change", image_id: str, tag: str, label: DataModel) -> None:
        """Delete a label that was noted as removed."""
        folder = self._datastore.label_path(tag)
        # An older label of another kind would come to light.
        for suffix in sorted(self._files(folder).get(image_id, {}), key=label.ext.__eq__):
            change.delete(self._writable(folder) / (image_id + suffix))

    @_again_if_renumbered
    def _change_tag(self, image_id: str, old: str, new: str) -> None:
        """Rename a label from the folder of one tag to that of another, in place of what is there."""
        path = self.get_label_uri(image_id, old)
        state, values = state_of(path), ()
        if new == FINAL:
            with tempfile.TemporaryDirectory() as scratch:
                info = self.get_label_info(image_id, old)
                label = self._checked_label(self.get_image_uri(image_id), path, Path(path).name, info, Path(scratch))
                values = label.values
                if label.file != path:
                    # The same label, with the values that other labels have for its names.
                    name = image_id + _suffix_for(image_id, suffix_of(label.file))
                    self._put_label(image_id, label.file, old, name, _without_stamp(label.info))
                    path = self.get_label_uri(image_id, old)
                    state = state_of(path)
        action, noted = ("approve", new) if new == FINAL else ("remove label", old)
        self._note(action, image=image_id, tag=noted, sha256=content_hash(path))
        folder, other = (self._datastore.label_path(tag) for tag in (old, new))
        with self._changing() as change:
            entry, label = _labelled(change.objects, image_id, old)
            name = image_id + label.ext
            # Servers of other state folders, and people who copy files, hold no lock.
            if state is None or state_of(self._inside(folder, name)) != state:
                raise Conflict(f"{image_id}: expected the label that was checked, found a newer one; look at it again.")
            if new == FINAL:
                self._check_values(values, label.info, change.objects)
            change.move(self._writable(folder) / name, self._writable(other) / name)
            for place in (old, new):
                self._leave_only(change, image_id, place, label.ext)
            moved = DataModel(info={**label.info, **_first_info(name)}, ext=label.ext)
            # The entry of the old tag is left out once its file is gone, not before.
            change.objects[image_id] = ImageLabelModel(image=entry.image, labels={**entry.labels, new: moved})

    def _leave_only(self, change: "_Change", image_id: str, tag: str, suffix: str) -> None:
        """Once the change is made, delete an image's labels of other kinds."""
        folder = self._datastore.label_path(tag)
        for other in self._files(folder).get(image_id, {}):
            if other != suffix:
                change.tidy(self._writable(folder) / (image_id + other))

    def update_image_info(self, image_id: str, info: dict[str, Any]) -> None:
        """Add to what is known about an image.

        That an image was offered (`strategy`) is not kept here, because the index of all images would be written for
        it: `lib.activelearning.strategies` keeps offers in a file of their own.

        Raises:
            NotFound: an unknown id.
            BadRecord: it can't be stored.
        """
        info = checked(ImageRecord, info, f"image {image_id}")
        info.pop("strategy", None)
        if not info:
            self._entry(check_id(image_id))
            return
        with self._changing() as change:
            entry = change.objects.get(check_id(image_id))
            if entry is None:
                raise _no_image(image_id)
            known = checked(ImageRecord, {**entry.image.info, **info}, f"image {image_id}")
            image = DataModel(info=known, ext=entry.image.ext)
            change.objects[image_id] = ImageLabelModel(image=image, labels=entry.labels)

    def update_label_info(self, label_id: str, label_tag: str, info: dict[str, Any]) -> None:
        """Add to what is known about a label. Raises NotFound where there is none, BadRecord if it can't be stored."""
        tag = check_tag(label_tag)
        info = checked(LabelRecord, info, f"label of {label_id}")
        with self.deciding(check_id(label_id, "label id")), self._changing() as change:
            entry, label = _labelled(change.objects, label_id, tag)
            known = checked(LabelRecord, {**label.info, **info}, f"label of {label_id}")
            changed = DataModel(info=known, ext=label.ext)
            change.objects[label_id] = ImageLabelModel(image=entry.image, labels={**entry.labels, tag: changed})

    # Files

    def _inside(self, folder: str, name: str) -> str:
        """The real path of a file; RequestError if links lead it out of the datastore."""
        path = os.path.realpath(os.path.join(folder, name))
        if os.path.commonpath([path, self._root]) != self._root or path == self._root:
            raise RequestError(
                f"{name}: expected a file in the datastore, found a link that leads out; put a copy there."
            )
        return path

    def _writable(self, folder: str) -> Path:
        """A folder of the datastore, made if missing; RequestError if links lead it out of the datastore."""
        self._check_there()
        path = Path(self._inside(folder, ".")) if os.path.realpath(folder) != self._root else Path(self._root)
        with _storing():
            path.mkdir(parents=True, exist_ok=True)
        return path

    def _note(self, action: str, **details: object) -> None:
        """Write a line to the audit log: before the change, as a line too many is better than one too few, and before
        the folder's lock is taken, so that nobody waits for the disk on its account.
        """
        if self._audit:
            self._audit.write(action, **details)

    def _checked_label(
        self, image: str, label: str, name: str, info: Mapping[str, Any], scratch: Path
    ) -> "_CheckedLabel":
        """A label to approve, with the values that other labels have for its names: where these differ from its own, in
        a file in `scratch`.

        Raises BadLabel.
        """
        try:
            with _naming(label, name):
                geometry = read_image(image).geometry
                labels = read_label(label, geometry)
                names = self.declared_names()
                sent = declared(info)
                known = self._known_names(names, self._objects())
                changes, agreed_on = agreed(np.unique(labels).tolist(), sent, known)
                if changes:
                    labels = renumber(labels, changes)
                if agreed_on != sent:
                    entries = [{"name": text, "idx": value} for value, text in sorted(agreed_on.items())]
                    info = {**info, "label_info": entries}
                values = tuple(np.unique(labels).tolist())
                if names:
                    check_label_values(label, values, {**names, **agreed_on})
                if changes:
                    path = scratch / f"label{output_suffix(geometry)}"
                    write_label(path, labels, geometry)
                    label = str(path)
                return _CheckedLabel(label, values, dict(info))
        except DataError as error:
            raise BadLabel(str(error)) from error

    def _check_values(
        self, values: tuple[int, ...], info: Mapping[str, Any], objects: Mapping[str, ImageLabelModel]
    ) -> None:
        """Raise _Renumbered where labels that have come since a label was checked give its names other values."""
        sent = declared(info)
        if agreed(values, sent, self._known_names(self.declared_names(), objects)) != ({}, sent):
            raise _Renumbered

    def _known_names(self, names: Mapping[int, str], objects: Mapping[str, ImageLabelModel]) -> dict[str, int]:
        """Values of the class names of the folder, and of approved labels."""
        known = {text: value for value, text in names.items()}
        for entry in objects.values():
            if FINAL in entry.labels:
                for value, text in declared(entry.labels[FINAL].info).items():
                    known.setdefault(text, value)
        return known

    def _remove_leftovers(self) -> None:
        folders = [
            self._root,
            *(entry.path for entry in _entries(self._datastore.label_path(None)) if _is(entry.is_dir)),
        ]
        for folder in folders:
            for entry in _entries(folder):
                hidden = entry.name.startswith(".") and any(f"{suffix}." in entry.name for suffix in SUFFIXES)
                if hidden and entry.is_dir(follow_symlinks=False):
                    if time.time() - entry.stat(follow_symlinks=False).st_mtime > LEFTOVER_AGE:
                        shutil.rmtree(entry.path, ignore_errors=True)

    # The index

    def _model(self) -> LocalDatastoreModel:
        """What is there now; never changed in place."""
        if self._times() != self._seen:
            with self._reading:
                if self._times() != self._seen:
                    self._read()
        return self._datastore

    def _objects(self) -> dict[str, ImageLabelModel]:
        return self._model().objects

    def _entry(self, image_id: str) -> ImageLabelModel:
        entry = self._objects().get(check_id(image_id))
        if entry is None:
            raise _no_image(image_id)
        return entry

    def _label(self, label_id: str, label_tag: str) -> DataModel | None:
        tag = check_tag(label_tag)
        entry = self._objects().get(check_id(label_id, "label id"))
        return entry.labels.get(tag) if entry else None

    @contextmanager
    def _changing(self, needs_index: bool = True) -> Iterator["_Change"]:
        """A change of entries and files, which the block prepares and which is made when it ends without an error.

        Args:
            needs_index: whether the change is one only if the index can be written; files that are deleted are gone
                whatever the index says.
        """
        self._check_there()
        with _storing(), self._writing, FileLock(self._lock_file, timeout=LOCK_TIMEOUT, poll_interval=POLL):
            with self._reading:
                self._read()
                before = self._datastore
            if self._journal.exists():
                # Left by a process that was killed; what `_read` made of it is right.
                self._write_index(before)
                self._journal.close()
            change = _Change(dict(before.objects))
            try:
                yield change
                after = before.model_copy(update={**change.header, "objects": change.objects})
                if needs_index:
                    # Entries of files that are not there mean nothing: only those that are replaced are to be kept.
                    if change.moved and _replaces(before.objects, after.objects):
                        self._journal.open(before.objects, after.objects, *change.moved)
                    self._write_index(after)
                try:
                    change.make()
                except BaseException:
                    if needs_index:
                        self._write_index(before)
                        self._journal.close()
                    raise
                if not needs_index:
                    self._try_to_write_index(after)
                self._journal.close()
            finally:
                # Whatever was made of the files is found by reading them again.
                self._seen = None

    def _write_index(self, model: LocalDatastoreModel) -> None:
        text = model.model_dump_json(exclude={"base_path"}, fallback=str)
        if len(text.encode("utf-8", "backslashreplace")) > LARGEST_INDEX:
            # It could not be read again, and would be set aside as damaged.
            raise StorageError(
                f"index: expected at most {LARGEST_INDEX >> 20} MB to be known about images and labels, found more; "
                "remove labels or long notes, or serve fewer images from a folder."
            )
        write_text(self._datastore_config_path, text)
        try:
            write_text(self._index_copy, text, durable=False)
        except OSError as error:
            self._warn(
                f"{self._index_copy.name}: expected to keep a copy of the index, found {error.strerror or error}."
            )

    def _try_to_write_index(self, model: LocalDatastoreModel) -> None:
        try:
            self._write_index(model)
        except (OSError, StorageError) as error:
            logger.warning("The index still lists what was deleted, because it can't be written: %s", error)

    def _times(self) -> tuple | None:
        """Of the index and the folders: these change with every file made, removed or replaced."""
        base = self._datastore.label_path(None)
        tags = [self._datastore.label_path(tag) for tag in self._tags]
        times = []
        for path in (self._datastore_config_path, self._datastore.image_path(), base, *tags):
            try:
                stat = os.stat(path)
            except OSError:
                times.append(None)
            else:
                times.append((stat.st_mtime_ns, stat.st_ino))
        return tuple(times)

    def _read(self) -> None:
        """Read index and folders, and set what is known by what is there. For one thread at a time."""
        started = time.time()
        folder, labels = self._datastore.image_path(), self._datastore.label_path(None)
        self._check_there()
        entries = _entries(folder)
        of_labels = _entries(labels) if os.path.isdir(labels) else []
        tags = [entry.name for entry in of_labels if _is(entry.is_dir) and self._is_tag(labels, entry.name)]
        self._tags = tuple(sorted(tags))
        times = self._times()
        header, known = self._load()
        found: dict[str, dict[str, DataModel]] = {}
        for tag in self._tags:
            for image_id, files in self._files(self._datastore.label_path(tag)).items():
                suffix = _newest(files)
                entry = known.get(image_id)
                label = entry.labels.get(tag) if entry else None
                if label is None or label.ext != suffix:
                    label = DataModel(info=_first_info(image_id + suffix), ext=suffix)
                found.setdefault(image_id, {})[tag] = label
        objects = {}
        self._say_what_is_left_out(entries)
        for image_id, files in sorted(self._files(folder, entries).items()):
            entry = known.get(image_id)
            suffix = entry.image.ext if entry and entry.image.ext in files else _foremost(files)
            if len(files) > 1:
                names = ", ".join(sorted(file.name for file in files.values()))
                self._warn(
                    f"{names}: expected one image for each name, found {len(files)}; {image_id + suffix} is used and "
                    "the others are left out: rename them."
                )
            image = entry.image if entry and entry.image.ext == suffix else None
            image = image or DataModel(info=_first_info(image_id + suffix), ext=suffix)
            labels_found = found.get(image_id, {})
            if entry is None or entry.image is not image or entry.labels != labels_found:
                entry = ImageLabelModel(image=image, labels=labels_found)
            objects[image_id] = entry
        # Folders come from the caller: those that the index names could lie anywhere.
        self._datastore = self._datastore.model_copy(update={**header, "objects": objects})
        settled = all(time is None or time[0] < (started - COARSEST_CLOCK) * 1e9 for time in times)
        self._seen = times if settled else None

    def _is_tag(self, folder: str, name: str) -> bool:
        try:
            self._inside(folder, check_tag(name))
        except RequestError as error:
            self._warn(str(error))
            return False
        return True

    def _check_there(self) -> None:
        """Raise FolderGone where the studies folder can't be read: writing to it would make another one."""
        try:
            os.scandir(self._root).close()
        except OSError as error:
            raise FolderGone(
                "studies folder: expected the folder that the server was started with, found that it can't be read "
                f"({error.strerror or error}); nothing is done before it is back."
            ) from error

    def _files(self, folder: str, entries: list[os.DirEntry] | None = None) -> dict[str, dict[str, os.DirEntry]]:
        """The images or labels directly in a folder, which holds `entries`: {id: {suffix: file}}."""
        files: dict[str, dict[str, os.DirEntry]] = {}
        for entry in _entries(folder) if entries is None else entries:
            name = entry.name
            lower = name.lower()
            suffix = next((suffix for suffix in SUFFIXES if lower.endswith(suffix)), None)
            if suffix is None or name.startswith("."):
                continue
            try:
                image_id = check_id(name[: -len(suffix)])
                if entry.is_symlink():
                    self._inside(folder, name)
            except RequestError as error:
                self._warn(f"{error} The file is left out.")
                continue
            if _is(entry.is_file):
                files.setdefault(image_id, {})[name[-len(suffix) :]] = entry
        return files

    def _say_what_is_left_out(self, entries: list[os.DirEntry]) -> None:
        """Put on `left_out`, and in the log once, what lies among the images and is not offered as one."""
        self.left_out = []
        for entry in sorted(entries, key=lambda entry: entry.name):
            path = Path(entry.path)
            if entry.name in DESCRIPTIONS and not _is(entry.is_file):
                self.left_out.append(
                    f"{entry.name}: expected a file with the names of classes, found a folder, a pipe or a link to "
                    "nowhere; it is not used."
                )
                continue
            if is_hidden(path) or entry.name in OWN_FILES or entry.name.endswith((".lock", ".damaged")):
                continue
            if _is(partial(entry.is_dir, follow_symlinks=False)):
                what = "DICOM files" if dicom_files(path) else "files"
                self.left_out.append(
                    f"{entry.name}/: a folder of {what} is not an image here; convert a series to one NIfTI file, or "
                    "serve it from a DICOMweb archive."
                )
                continue
            has_suffix = any(entry.name.lower().endswith(suffix) for suffix in SUFFIXES)
            if not _is(partial(entry.is_file, follow_symlinks=has_suffix)):
                self.left_out.append(f"{entry.name}: a link, a pipe, a socket or a device, not a file.")
            elif not has_suffix:
                self.left_out.append(f"{entry.name}: {file_not_used(path)}.")
        # Names may hold any bytes, and go from here into the log and into answers.
        self.left_out = [sentence if sentence.isprintable() else ascii(sentence)[1:-1] for sentence in self.left_out]
        for sentence in self.left_out:
            self._warn(f"Not offered as an image: {sentence}")

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message)

    def _load(self) -> tuple[dict[str, str], dict[str, ImageLabelModel]]:
        """Name and description, and the entries, as the index has them.

        Of an entry that can't be used, only what is wrong is left out. An index that can't be read at all is set aside.
        Its copy in the work folder then stands in until the next change, also for one that is gone.
        """
        path = Path(self._datastore_config_path)
        try:
            content = _parsed_index(path)
        except (FileNotFoundError, ValueError) as error:
            if isinstance(error, ValueError):
                self._set_index_aside(path)
            try:
                content = _parsed_index(self._index_copy)
            except (OSError, ValueError):
                content = {"objects": {}}
        parsed = {}
        for image_id, raw in self._journal.applied(content["objects"]).items():
            known = self._parsed.get(image_id)
            parsed[image_id] = known if known and known[0] == raw else (raw, *_entry_of(image_id, raw))
        self._parsed = parsed
        for _, _, problems in parsed.values():
            for problem in problems:
                self._tell(problem)
        header = {key: content[key] for key in ("name", "description") if isinstance(content.get(key), str)}
        return header, {image_id: entry for image_id, (_, entry, _) in parsed.items()}

    def _set_index_aside(self, path: Path) -> None:
        """Keep a damaged index under a name that no other one has."""
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
        if problem not in self._problems:
            self._problems.append(problem)
            logger.warning(problem)

    def _init_from_datastore_file(self, throw_exception: bool = False) -> None:
        """Nothing: `_read` does it, once the folders are there."""

    def _reconcile_datastore(self) -> None:
        self.refresh()


class _Journal:
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
        """Of a file of the datastore, as `content_hash` gives it; None where there is none."""
        try:
            with open_plain(self._folder / name, self._folder) as file:
                return open_hash(file)
        except FileNotFoundError:
            return None


class _Change:
    """A change of the datastore: entries of the index, and files.

    One step makes it: a file is renamed, or the last of those to delete is deleted. The deletions before it are undone
    where it fails; what there is to tidy after it can fail without harm.

    Attributes:
        objects: the entries as they are to be. header: name and description, if these change. moved: the file that
            makes the change when it is renamed, and what it replaces; None if none is.
    """

    def __init__(self, objects: dict[str, ImageLabelModel]) -> None:
        self.objects = objects
        self.header: dict[str, str] = {}
        self.moved: tuple[Path, Path] | None = None
        self._deletions: list[Path] = []
        self._tidying: list[Path] = []

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
def _copied(source: str | Path, target: Path) -> Iterator[Path]:
    """A copy of a file next to `target`, on the disk, to be renamed in the block. Raises StorageError."""
    with _storing(), _hidden_folder(target) as folder:
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
        with _copied(source, target) as part:
            os.replace(part, target)
        source.unlink()
    _sync_folder(target.parent)
    # A hidden folder goes anyway.
    if not source.parent.name.startswith("."):
        _sync_folder(source.parent)


def open_datastore(settings) -> Datastore:
    """The confined datastore of `settings.studies`: a folder, or a DICOMweb archive by its address.

    Raises:
        StorageError: the folder can't be opened.
    """
    audit = Audit(settings.state_dir / "audit.jsonl")
    limit = image_limit(settings)
    if settings.is_remote:
        return DicomWebDatastore(
            settings.studies,
            settings.state_dir / "archive",
            limit,
            audit,
            settings.dicomweb_filter,
            settings.dicomweb_expiry,
            settings.dicomweb_cache_gb,
            settings.dicomweb_cache_days,
            settings.dicomweb_timeout,
        )
    return ConfinedDatastore(settings.studies, settings.state_dir, limit, audit)


def _suffix_for(image_id: str, suffix: str) -> str:
    """The suffix with which a file of an image is found again: `x.seg` and `.nrrd` would be another image's, `x`."""
    return suffix_of(image_id + suffix)


def _entries(folder: str) -> list[os.DirEntry]:
    with os.scandir(folder) as entries:
        return list(entries)


def _is(kind: Callable[[], bool]) -> bool:
    """What an entry of a folder is; nothing, for one that can't be looked at, such as a link to itself."""
    try:
        return kind()
    except OSError:
        return False


def _newest(files: dict[str, os.DirEntry]) -> str:
    """The suffix of the file that was written last."""
    return max(files, key=lambda suffix: files[suffix].stat().st_mtime_ns) if len(files) > 1 else next(iter(files))


def _foremost(files: dict[str, os.DirEntry]) -> str:
    """The suffix that comes first among the supported ones: volumes before pictures."""
    return min(files, key=lambda suffix: SUFFIXES.index(suffix.lower()))


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


def _check_looks(image_id: str, known: Iterable[str]) -> None:
    """Raise Conflict where people, or a disk that knows no case, would take an id for another one.

    Such as one whose accents are letters of their own. Letters of other alphabets that look alike are not told apart.
    """
    look = _look(image_id)
    twin = next((other for other in known if other != image_id and _look(other) == look), None)
    if twin is not None:
        raise Conflict(
            f"image {ascii(image_id)}: expected an id that doesn't look like another, found {ascii(twin)}; choose "
            "another id."
        )


def _look(image_id: str) -> str:
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", image_id).casefold())


def _replaces(before: Mapping[str, ImageLabelModel], after: Mapping[str, ImageLabelModel]) -> bool:
    """Whether anything that is known about an image or a label is lost or changed."""

    def kept(image_id: str, entry: ImageLabelModel) -> bool:
        new = after.get(image_id)
        if new is entry:
            return True
        if new is None or new.image != entry.image:
            return False
        return all(new.labels.get(tag) == label for tag, label in entry.labels.items())

    return not all(kept(image_id, entry) for image_id, entry in before.items())


def _without_stamp(info: dict[str, Any]) -> dict[str, Any]:
    """Without what the datastore itself says of a file."""
    return {key: value for key, value in info.items() if key not in ("ts", "name")}


def _sync_folder(folder: Path) -> None:
    """Have it on the disk which files are in a folder."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _first_info(name: str) -> dict[str, Any]:
    return {"ts": int(time.time()), "name": name}


@contextmanager
def _storing() -> Iterator[None]:
    """Errors of a change as sentences."""
    try:
        yield
    except Timeout as error:
        raise StorageError(
            f"datastore: expected to lock it within {LOCK_TIMEOUT:.0f} s, found another process at work on it; try "
            "again, or end that process."
        ) from error
    except OSError as error:
        raise _storage_error("datastore", "to save the change", error) from error


@contextmanager
def _naming(path: str, name: str) -> Iterator[None]:
    """Errors that name a temporary path name the file as the client knows it."""
    try:
        yield
    except DataError as error:
        raise DataError(str(error).replace(str(path), name)) from error


def _labelled(objects: dict[str, ImageLabelModel], label_id: str, tag: str) -> tuple[ImageLabelModel, DataModel]:
    """The entry that a label belongs to, and the label. Raises NotFound where there is none."""
    entry = objects.get(check_id(label_id, "label id"))
    label = entry.labels.get(tag) if entry else None
    if label is None:
        raise NotFound(f"label {label_id}: expected a label with tag {tag}, found none; look at the list.")
    return entry, label


def _no_image(image_id: str) -> NotFound:
    return NotFound(f"image {image_id}: expected an image of the datastore, found none; take an id from the list.")


def _storage_error(what: str, purpose: str, error: OSError) -> StorageError:
    return StorageError(
        f"{what}: expected {purpose}, found {error.strerror or error}; nothing that was there is lost: free some space "
        "or correct the folder's permissions, then try again."
    )
