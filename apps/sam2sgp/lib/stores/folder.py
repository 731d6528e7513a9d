"""Images and labels of a folder, in MONAI Label's own layout, from which no request leads out.

In: image ids, label tags and uploaded files, as clients send them. Out: paths inside the folder, or an error of one
sentence with its HTTP status. The files are the truth: `datastore_v2.json` only holds what is known about them and is
rebuilt when it is damaged or gone, from the files and from a copy in the work folder. A label is checked against its
image before it is approved (tag `final`).

Several threads and processes may use one folder at once. A label is changed while its image is held
(`lib.stores.decisions`), because it takes a while to check it. Then new content is copied to the disk. The change
itself is made under the folder's lock, which threads get in the order in which they came: the index and the audit log
are written, and then one file is put in place, renamed or deleted, which makes the change. So a change that fails
leaves everything as it was, a reader sees the old file or the new one, and a process killed at any moment leaves no
half file. Which entries of the index hold until then stands in a file of its own (`Journal`), so an old file never goes
with what is known about a new one. A change that is refused, or finds no space, is not in the audit log, and none that
is made is missing there. Readers never wait for a change: they look at the folders' times, and read them again only
when these changed; of those that wait for that, one reads for all.

    ConfinedFolder   which files are there, and that no path leads out
    FolderIndex      what is known about them
    Change           what becomes of both
"""

import os
import shutil
import tempfile
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock
from monailabel.datastore.local import DataModel, ImageLabelModel, LocalDatastore, LocalDatastoreModel

from lib.checks import (
    Conflict,
    NotFound,
    StorageError,
    check_id,
    check_looks,
    check_tag,
    supported_suffix,
)
from lib.server_paths import open_plain
from lib.stores.audit import Audit, content_hash
from lib.stores.confined_folder import LABELS, ConfinedFolder, entries_of, foremost, newest
from lib.stores.decisions import FINAL, POLL, Decisions, FairLock, ImageLocks, state_of
from lib.stores.door import admitted, label_limit
from lib.stores.file_changes import LOCK_TIMEOUT, Change, copied, storage_error, storing
from lib.stores.folder_index import FolderIndex, replaces
from lib.stores.history import FOLDER as HISTORY
from lib.stores.history import History
from lib.stores.image_identity import KEY as MADE_OF
from lib.stores.image_identity import claim
from lib.stores.label_checks import CheckedLabel, again_if_renumbered, check_values, checked_label, naming_file
from lib.stores.records import ImageRecord, LabelRecord, checked
from sam2sgp.data.classes import class_names
from sam2sgp.data.io import SUFFIXES, read_image
from sam2sgp.data.tree import DESCRIPTIONS
from sam2sgp.files import TRUSTED_AGE, replacing

# A folder changed less than this many seconds ago may change again without a new time: it is read again. File systems
# that keep whole seconds, as those of USB disks do, may keep only every other one: there `TRUSTED_AGE` counts.
CLOCK = 0.1
# Sentences about bad entries of the index that `status` tells.
PROBLEMS_TOLD = 20


class ConfinedDatastore(Decisions, LocalDatastore):
    """A folder of images with their labels in `labels/<tag>/`, confined to that folder.

    Links that lead out of the folder are not followed, names that could are refused, and files that a listing of the
    folder doesn't show do not exist for it. Of two images with the same stem only one is offered, with a warning.

    Args:
        datastore_path: the folder; made if missing.
        work_folder: where ZIP files for download, a copy of the index and the images' locks are put.
        max_unpacked: how many bytes the voxels of an uploaded file may take as float32.
        audit: where approvals and removals are noted; None for nowhere.

    Raises:
        StorageError: the folder can't be read, or lacks subfolders that can't be made.
    """

    _datastore: LocalDatastoreModel

    def __init__(self, datastore_path: str, work_folder: Path, max_unpacked: int, audit: Audit | None = None):
        self._root = os.path.realpath(datastore_path)
        self._work_folder = Path(work_folder)
        self._max_unpacked = max_unpacked
        self._audit = audit
        self._image_locks = ImageLocks(self._work_folder / "locks")
        self.history = History(self._work_folder / HISTORY)
        self._folder = ConfinedFolder(self._root)
        self._index = FolderIndex(Path(self._root), self._work_folder, self._folder.warn)
        self._reading, self._writing = threading.RLock(), FairLock()
        self._seen: tuple | None = None
        # When the last reading began.
        self._read_at = float("-inf")
        self._tags: tuple[str, ...] = ()
        self._tag_counts: tuple[dict, dict[str, int]] | None = None
        labels = os.path.realpath(os.path.join(self._root, LABELS))
        if os.path.commonpath([labels, self._root]) != self._root:
            raise StorageError(
                f"{self._root}: expected labels in this folder, found that {LABELS} is a link out of it."
            )
        try:
            super().__init__(self._root, extensions=[f"*{suffix}" for suffix in SUFFIXES], labels_dir=LABELS)
            self._folder.remove_leftovers(self._datastore.label_path(None))
        except OSError as error:
            raise storage_error(self._root, "to open the studies folder", error) from error

    # What is there

    @property
    def left_out(self) -> list[str]:
        """Sentences on what lies among the images and is not offered as one."""
        return self._folder.left_out

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
        problems = self._index.problems
        return {**found, "problems": problems[:PROBLEMS_TOLD]} if problems else found

    def json(self) -> dict[str, Any]:
        return self._model().model_dump(exclude={"base_path"})

    def datalist(self, full_path: bool = True) -> list[dict[str, Any]]:
        """[{"image": path, "label": path}] of the approved labels; paths relative to the folder if not `full_path`."""
        pairs = []
        for image_id, entry in self._objects().items():
            if FINAL in entry.labels:
                image = self._folder.inside(self._datastore.image_path(), image_id + entry.image.ext)
                label = self._folder.inside(self._datastore.label_path(FINAL), image_id + entry.labels[FINAL].ext)
                pairs.append({"image": image, "label": label})
        if full_path:
            return pairs
        return [{key: os.path.relpath(path, self._root) for key, path in pair.items()} for pair in pairs]

    def get_image_uri(self, image_id: str) -> str:
        """The image's path. Raises NotFound for an unknown id, RequestError for one that can't be an id."""
        return self._folder.inside(self._datastore.image_path(), image_id + self._entry(image_id).image.ext)

    def get_image_info(self, image_id: str) -> dict[str, Any]:
        return {**self._entry(image_id).image.info, "path": self.get_image_uri(image_id)}

    def get_label_uri(self, label_id: str, label_tag: str) -> str:
        """The label's path, or "" if there is no such label. Raises RequestError for an invalid id or tag."""
        label = self._label(label_id, label_tag)
        return (
            self._folder.inside(self._datastore.label_path(check_tag(label_tag)), label_id + label.ext) if label else ""
        )

    def get_label_info(self, label_id: str, label_tag: str) -> dict[str, Any]:
        label = self._label(label_id, label_tag)
        return dict(label.info) if label else {}

    def get_labels_by_image_id(self, image_id: str) -> dict[str, str]:
        entry = self._objects().get(check_id(image_id))
        return dict.fromkeys(entry.labels, image_id) if entry else {}

    def tags(self) -> dict[str, list[str]]:
        """The tags of each image's labels, by the image's id."""
        return {image_id: list(entry.labels) for image_id, entry in self._objects().items()}

    def records(self) -> dict[str, dict[str, dict[str, Any]]]:
        """What is known about each image's labels, by the image's id and the label's tag; not to be changed."""
        return {
            image_id: {tag: label.info for tag, label in entry.labels.items()}
            for image_id, entry in self._objects().items()
        }

    def get_dataset_archive(self, limit_cases: int | None) -> str:
        """The path of a ZIP file with the approved pairs; the next call replaces it. Raises NotFound without pairs."""
        pairs = self.datalist()[: max(limit_cases, 1) if limit_cases else None]
        if not pairs:
            raise NotFound("data set: expected approved labels to put in a ZIP file, found none; approve some first.")
        packed = self._work_folder / "dataset.zip"
        try:
            with replacing(packed) as part, zipfile.ZipFile(part, "w") as file:
                for pair in pairs:
                    for key, path in pair.items():
                        name = f"{key}/{os.path.basename(path)}"
                        with open_plain(path, self._root) as source, file.open(name, "w", force_zip64=True) as member:
                            shutil.copyfileobj(source, member)
                file.writestr("metadata.json", self._model().model_dump_json(exclude={"base_path"}, fallback=str))
        except OSError as error:
            raise storage_error("data set", "to write a ZIP file", error) from error
        return str(packed)

    def declared_names(self) -> dict[int, str]:
        """Class names by value, as the folder's own files declare them.

        Raises DataError: they can't be understood, or links lead out of the folder.
        """
        for name in DESCRIPTIONS:
            self._folder.inside(self._root, name)
        return class_names(self._root)

    def refresh(self) -> None:
        """Read the folders again, whatever their times say."""
        self._seen = None
        self._index.forget()
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
        suffix = supported_suffix(image_filename)
        image_id = check_id(image_id or os.path.basename(image_filename)[: -len(suffix)])
        suffix = _suffix_for(image_id, suffix)
        with admitted(image_filename, self._max_unpacked, image_id + suffix) as content:
            return self._add_image(image_id, str(content), image_id + suffix, image_info)

    def _add_image(self, image_id: str, image_filename: str, name: str, image_info: dict[str, Any]) -> str:
        suffix = name[len(image_id) :]
        info = _without_stamp(checked(ImageRecord, image_info, f"image {image_id}"))
        with naming_file(image_filename, name):
            read_image(image_filename)
        target = self._folder.writable(self._datastore.image_path()) / name
        check_looks(image_id, self._objects())
        sha256 = content_hash(image_filename)
        with self.deciding(image_id), copied(image_filename, target) as part, ExitStack() as stack:
            change = stack.enter_context(self._changing())
            check_looks(image_id, change.objects)
            entry = change.objects.get(image_id)
            if entry:
                there = self._folder.inside(self._datastore.image_path(), image_id + entry.image.ext)
                if entry.image.ext != suffix or content_hash(there) != sha256:
                    raise Conflict(
                        f"{name}: expected a new image id, found {os.path.basename(there)} under this id with another "
                        "content; choose another id, or remove that image first."
                    )
                return image_id
            change.note("add image", image=image_id, sha256=sha256)
            change.move(part, target)
            image = DataModel(info={**info, **_first_info(name)}, ext=suffix)
            change.objects[image_id] = ImageLabelModel(image=image)
        return image_id

    def remove_image(self, image_id: str) -> None:
        """Delete an image and all its labels. Raises NotFound for an unknown id."""
        with storing(), self.deciding(check_id(image_id)), ExitStack() as stack:
            image_hash = content_hash(self.get_image_uri(image_id))
            hashes = {tag: self._label_hash(image_id, tag) for tag in self._entry(image_id).labels}
            change = stack.enter_context(self._changing(needs_index=False))
            entry = change.objects.get(image_id)
            if entry is None:
                raise _no_image(image_id)
            for tag, label in entry.labels.items():
                self._take_label(change, image_id, tag, label, hashes.get(tag))
            change.note("remove image", image=image_id, sha256=image_hash)
            change.delete(self._folder.writable(self._datastore.image_path()) / (image_id + entry.image.ext))
            del change.objects[image_id]
        self.history.forget(image_id)

    def save_label(
        self, image_id: str, label_filename: str, label_tag: str, label_info: dict[str, Any], seen: str = ""
    ) -> str:
        """Copy a label into the folder, in place of an earlier one of the same image and tag.

        Args:
            image_id: of its image.
            label_filename: of a file of a supported kind.
            label_tag: `final` approves the label: it is then checked against its image first.
            label_info: what is to be known about it; its `label_info` may declare classes by `idx` and `name`.
            seen: `state_of` the image that the label was made of; "" for whatever is there.

        Returns:
            The label's id, which is its image's.

        Raises:
            RequestError: an invalid id or tag, an unknown image, a file of another kind or too large, a full disk, a
                record that can't be stored.
            Conflict: the image is another one than was seen.
            BadLabel: a label to approve that can't be read, has another size than its image or undeclared values.
        """
        tag = check_tag(label_tag)
        # An unknown image comes before what may be wrong with the label.
        limit = label_limit(self.get_image_uri(image_id), self._max_unpacked)
        name = image_id + _suffix_for(image_id, supported_suffix(label_filename))
        info = _without_stamp(checked(LabelRecord, label_info, f"label of {image_id}"))
        with admitted(label_filename, limit, name, label=True) as content, self.deciding(image_id):
            self._check_image(image_id, seen)
            self._keep_replaced(image_id, tag)
            return self._save_label(image_id, str(content), name, tag, info)

    @again_if_renumbered
    def _save_label(
        self, image_id: str, label_filename: str, name: str, tag: str, info: dict[str, Any], action: str = ""
    ) -> str:
        if tag != FINAL:
            return self._put_label(image_id, label_filename, tag, name, info, action)
        with tempfile.TemporaryDirectory() as scratch:
            label = self._checked_label(image_id, label_filename, name, info, Path(scratch))
            name = image_id + _suffix_for(image_id, supported_suffix(label.file))
            return self._put_label(image_id, label.file, tag, name, label.info, "approve", label.values)

    def _put_label(
        self,
        image_id: str,
        label_filename: str,
        tag: str,
        name: str,
        info: dict[str, Any],
        action: str = "",
        values: tuple[int, ...] = (),
    ) -> str:
        """Put a label in place; `action`: for the audit log; `values`: of one to approve, which may be _Renumbered."""
        suffix = name[len(image_id) :]
        target = self._folder.writable(self._datastore.label_path(tag)) / name
        with copied(label_filename, target) as part, ExitStack() as stack:
            sha256 = content_hash(part)
            made_of = claim(self.get_image_uri(image_id), sha256)
            change = stack.enter_context(self._changing())
            entry = change.objects.get(image_id)
            if entry is None:
                raise _no_image(image_id)
            if tag == FINAL:
                check_values(values, info, self.declared_names(), _infos(change.objects))
            if action:
                change.note(action, image=image_id, tag=tag, sha256=sha256)
            change.move(part, target)
            label = DataModel(info={**info, **made_of, **_first_info(name)}, ext=suffix)
            change.objects[image_id] = ImageLabelModel(image=entry.image, labels={**entry.labels, tag: label})
            # The newest of several kinds counts, so a process that is killed before this has replaced the label too.
            self._leave_only(change, image_id, tag, suffix)
        return image_id

    def remove_label(self, label_id: str, label_tag: str) -> None:
        """Delete one label. Raises NotFound where there is none."""
        tag = check_tag(label_tag)
        with self.deciding(check_id(label_id, "label id")):
            self._remove_label(label_id, tag)

    def _remove_label(self, label_id: str, tag: str) -> None:
        with storing():
            sha256 = self._label_hash(label_id, tag)
        with self._changing(needs_index=False) as change:
            entry, label = _labelled(change.objects, label_id, tag)
            self._take_label(change, label_id, tag, label, sha256)
            labels = {other: kept for other, kept in entry.labels.items() if other != tag}
            change.objects[label_id] = ImageLabelModel(image=entry.image, labels=labels)

    def _label_hash(self, image_id: str, tag: str) -> str:
        """The hash of a label's file, for the audit log. Raises NotFound where there is none."""
        _labelled(self._objects(), image_id, tag)
        return content_hash(self.get_label_uri(image_id, tag))

    def _take_label(self, change: Change, image_id: str, tag: str, label: DataModel, sha256: str | None) -> None:
        """Delete a label. `sha256`: of its file; None for one that came while others were looked at."""
        change.note("remove label", image=image_id, tag=tag, sha256=sha256)
        folder = self._datastore.label_path(tag)
        # The one that counts goes last: without it, an older label of another kind would come to light.
        others = [suffix for suffix in self._folder.files(folder).get(image_id, {}) if suffix != label.ext]
        for suffix in (*others, label.ext):
            change.delete(self._folder.writable(folder) / (image_id + suffix))

    @again_if_renumbered
    def _change_tag(self, image_id: str, old: str, new: str) -> None:
        """Rename a label from the folder of one tag to that of another, in place of what is there."""
        path = self.get_label_uri(image_id, old)
        state = state_of(path)
        values: tuple[int, ...] = ()
        if new == FINAL:
            with tempfile.TemporaryDirectory() as scratch:
                info = self.get_label_info(image_id, old)
                label = self._checked_label(image_id, path, Path(path).name, info, Path(scratch))
                values = label.values
                if label.file != path:
                    # The same label, with the values that other labels have for its names.
                    name = image_id + _suffix_for(image_id, supported_suffix(label.file))
                    self._put_label(image_id, label.file, old, name, _without_stamp(label.info))
                    path = self.get_label_uri(image_id, old)
                    state = state_of(path)
        action, noted = ("approve", new) if new == FINAL else ("remove label", old)
        sha256 = content_hash(path)
        folder, other = (self._datastore.label_path(tag) for tag in (old, new))
        with self._changing() as change:
            entry, label = _labelled(change.objects, image_id, old)
            name = image_id + label.ext
            # Servers of other state folders, and people who copy files, hold no lock.
            if state is None or state_of(self._folder.inside(folder, name)) != state:
                raise Conflict(f"{image_id}: expected the label that was checked, found a newer one; look at it again.")
            if new == FINAL:
                check_values(values, label.info, self.declared_names(), _infos(change.objects))
            change.note(action, image=image_id, tag=noted, sha256=sha256)
            change.move(self._folder.writable(folder) / name, self._folder.writable(other) / name)
            for place in (old, new):
                self._leave_only(change, image_id, place, label.ext)
            moved = DataModel(info={**label.info, **_first_info(name)}, ext=label.ext)
            # The entry of the old tag is left out once its file is gone, not before.
            change.objects[image_id] = ImageLabelModel(image=entry.image, labels={**entry.labels, new: moved})

    def _leave_only(self, change: Change, image_id: str, tag: str, suffix: str) -> None:
        """Once the change is made, delete an image's labels of other kinds."""
        folder = self._datastore.label_path(tag)
        for other in self._folder.files(folder).get(image_id, {}):
            if other != suffix:
                change.tidy(self._folder.writable(folder) / (image_id + other))

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
            info.pop(MADE_OF, None)
            known = checked(LabelRecord, {**label.info, **info}, f"label of {label_id}")
            changed = DataModel(info=known, ext=label.ext)
            change.objects[label_id] = ImageLabelModel(image=entry.image, labels={**entry.labels, tag: changed})

    def _checked_label(
        self, image_id: str, label: str, name: str, info: Mapping[str, Any], scratch: Path
    ) -> CheckedLabel:
        """A label to approve, see `lib.stores.label_checks`."""
        image, names = self.get_image_uri(image_id), self.declared_names
        return checked_label(image, label, name, info, names, _infos(self._objects()), scratch)

    # The index

    def _model(self) -> LocalDatastoreModel:
        """What is there now; never changed in place."""
        asked = time.monotonic()
        if self._times() != self._seen:
            with self._reading:
                # One of those that wait here reads for all.
                if self._read_at < asked and self._times() != self._seen:
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
    def _locked(self) -> Iterator[None]:
        """Hold the folder's lock for the block. The copy of the index is made afterwards, as nobody waits for it."""
        try:
            with storing(), self._writing, FileLock(self._lock_file, timeout=LOCK_TIMEOUT, poll_interval=POLL):
                yield
        finally:
            self._index.copy()

    @contextmanager
    def _changing(self, needs_index: bool = True) -> Iterator[Change]:
        """A change of entries and files, which the block prepares and which is made when it ends without an error.

        Args:
            needs_index: whether the change is one only if the index can be written; files that are deleted are gone
                whatever the index says.
        """
        self._folder.check_there()
        with self._locked():
            with self._reading:
                self._read()
                before = self._datastore
            if self._index.journal.exists():
                # Left by a process that was killed; what `_read` made of it is right.
                self._index.write(before)
                self._index.journal.close()
            change = Change(dict(before.objects))
            try:
                yield change
                after = before.model_copy(update={**change.header, "objects": change.objects})
                if needs_index:
                    # Entries of files that are not there mean nothing: only those that are replaced are to be kept.
                    if change.moved and replaces(before.objects, after.objects):
                        self._index.journal.open(before.objects, after.objects, *change.moved)
                    self._index.write(after)
                try:
                    # Before the change is made: a line too many is better than one too few.
                    for action, details in change.notes:
                        if self._audit:
                            self._audit.write(action, **details)
                    change.make()
                except BaseException:
                    if needs_index:
                        self._index.write(before)
                        self._index.journal.close()
                    raise
                if not needs_index:
                    self._index.try_to_write(after)
                self._index.journal.close()
            finally:
                # Whatever was made of the files is found by reading them again.
                self._seen = None

    def _times(self) -> tuple[tuple[int, int] | None, ...]:
        """Times of the index and the folders, which change with every file made, removed or replaced."""
        base = self._datastore.label_path(None)
        tags = [self._datastore.label_path(tag) for tag in self._tags]
        times: list[tuple[int, int] | None] = []
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
        started, read_at = time.time(), time.monotonic()
        folder, labels = self._datastore.image_path(), self._datastore.label_path(None)
        self._folder.check_there()
        entries = entries_of(folder)
        self._tags = self._folder.tags(labels)
        times = self._times()
        header, known = self._index.load()
        found: dict[str, dict[str, DataModel]] = {}
        for tag in self._tags:
            for image_id, files in self._folder.files(self._datastore.label_path(tag)).items():
                suffix = newest(files)
                entry = known.get(image_id)
                label = entry.labels.get(tag) if entry else None
                if label is None or label.ext != suffix:
                    label = DataModel(info=_first_info(image_id + suffix), ext=suffix)
                found.setdefault(image_id, {})[tag] = label
        objects = {}
        self._folder.look_at(entries)
        for image_id, files in sorted(self._folder.files(folder, entries).items()):
            entry = known.get(image_id)
            suffix = entry.image.ext if entry and entry.image.ext in files else foremost(files)
            if len(files) > 1:
                names = ", ".join(sorted(file.name for file in files.values()))
                self._folder.warn(
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
        settled = all(time is None or _is_settled(time[0], started) for time in times)
        self._seen = times if settled else None
        self._read_at = read_at

    def _init_from_datastore_file(self, throw_exception: bool = False) -> None:
        """Nothing: `_read` does it, once the folders are there."""

    def _reconcile_datastore(self) -> None:
        self.refresh()


def _is_settled(time_ns: int, now: float) -> bool:
    """Whether a folder that was changed at this time will have another one when it changes again."""
    clock = CLOCK if time_ns % 10**9 else TRUSTED_AGE / 1e9
    return time_ns < (now - clock) * 1e9


def _suffix_for(image_id: str, suffix: str) -> str:
    """The suffix with which a file of an image is found again: `x.seg` and `.nrrd` would be another image's, `x`."""
    return supported_suffix(image_id + suffix)


def _without_stamp(info: dict[str, Any]) -> dict[str, Any]:
    """Without what the datastore itself says of a file."""
    return {key: value for key, value in info.items() if key not in ("ts", "name")}


def _first_info(name: str) -> dict[str, Any]:
    return {"ts": int(time.time()), "name": name}


def _infos(objects: Mapping[str, ImageLabelModel]) -> Iterator[Mapping[str, Any]]:
    """What is known about the approved labels."""
    return (entry.labels[FINAL].info for entry in objects.values() if FINAL in entry.labels)


def _labelled(objects: dict[str, ImageLabelModel], label_id: str, tag: str) -> tuple[ImageLabelModel, DataModel]:
    """The entry that a label belongs to, and the label. Raises NotFound where there is none."""
    entry = objects.get(check_id(label_id, "label id"))
    label = entry.labels.get(tag) if entry else None
    if label is None:
        raise NotFound(f"label {label_id}: expected a label with tag {tag}, found none; look at the list.")
    return entry, label


def _no_image(image_id: str) -> NotFound:
    return NotFound(f"image {image_id}: expected an image of the datastore, found none; take an id from the list.")
