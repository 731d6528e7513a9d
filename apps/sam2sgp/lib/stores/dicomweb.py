"""Images and labels of a DICOMweb archive: series in, approved labels back as DICOM Segmentation objects (SEG).

In: image ids, which are SeriesInstanceUIDs, label tags and uploaded label files. Out: a folder with a series' files, a
label as NIfTI on exactly its grid, or an error of one sentence with its HTTP status.

    archive ── QIDO: series and SEGs ── lists (`ArchiveIndex`)
            ── WADO: a series ── work folder/images/<series>/
            ── WADO: its latest SEG ── work folder/labels/final/<series>.nii.gz
            ── STOW: a label approved here, as a SEG that refers to the series' slices

The archive is the truth about approved labels (tag `final`): those of before a restart, of other servers and of other
programs count, the latest of a series wins, and one that is deleted there is gone. A segmentation that no person has
looked at, as its segments are called automatic, is no approved label. An approved label that is removed here stays in
the archive, whose records are not this program's to delete; it is only not used any more. Labels with other tags are
kept only in the work folder.

Only the request that needs a file that isn't here waits for the archive. Lists are those of before where the archive is
slow or silent; `prepare` fetches approved labels in the background, and `pairs_at_hand` gives those that have come.

Any number of threads and processes may use one work folder: every file and series is put in place in one step, and
what two of them put there at once is the same. Nothing in it is needed after a restart but removals and other tags.
"""

import json
import logging
import os
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from monailabel.config import settings as server_settings
from pydicom import dcmread

from lib.checks import (
    BadLabel,
    Forbidden,
    NotFound,
    StorageError,
    check_tag,
    check_uid,
    clean_class_name,
    supported_suffix,
)
from lib.refresher import Refresher
from lib.stores.archive import SILENCE, Archive, ArchiveBusy, ArchiveError, Unreachable
from lib.stores.archive_index import PATIENCE, ArchiveIndex, Lists, SegInstance, Series, approved
from lib.stores.audit import Audit, content_hash
from lib.stores.decisions import FINAL, Decisions, ImageLocks
from lib.stores.door import ImageTooLarge, admitted, check_instance, check_series, label_limit
from lib.stores.file_changes import storing
from lib.stores.history import FOLDER as HISTORY
from lib.stores.history import History
from lib.stores.image_identity import KEY as MADE_OF
from lib.stores.image_identity import claim
from lib.stores.kept_labels import KeptLabels
from lib.stores.naming import agreed, names_by_value, renumber, told
from lib.stores.records import ImageRecord, LabelRecord, checked
from lib.stores.series_cache import SUFFIX, SeriesCache
from sam2sgp.data import Geometry, read_dicom_seg, read_geometry, read_image, read_label, write_dicom_seg, write_map
from sam2sgp.errors import DataError
from sam2sgp.files import replacing

logger = logging.getLogger(__name__)

# Seconds after which old copies are looked for, where none came that might take their place.
CLEARED_EVERY = 3600.0
# Seconds for which a request for a series that isn't listed waits for newer lists.
NEEDED = 5.0
# A label that could not be fetched for a reason of its own is asked for again after as many seconds.
FETCHED_AGAIN = 60.0


@dataclass(frozen=True)
class _Label:
    """A label on its series' grid.

    Attributes:
        voxels: (Z, H, W) class values, 0 is background.
        geometry: of the series.
        names: of its classes, by value.
    """

    voxels: np.ndarray
    geometry: Geometry
    names: dict[int, str]


class DicomWebDatastore(Decisions):
    """The image series of a DICOMweb archive with their labels.

    MONAI Label's environment variables for user and password and for address prefixes (`MONAI_LABEL_DICOMWEB_USERNAME`
    and so on) are followed.

    Args:
        address: of the archive, such as `http://127.0.0.1:8042/dicom-web`.
        work_folder: for downloaded series, labels and what is known about them.
        max_unpacked: how many bytes the voxels of a series or an uploaded label may take as float32.
        audit: where approvals and removals are noted; None for nowhere.
        wanted: attributes that a series must match to be listed, by keyword.
        expiry: seconds for which lists are kept; 0 to ask at every question.
        cache_gb: GiB that downloaded series may take, but for those with an approved label and those in use.
        cache_days: days after which a downloaded series goes that nobody asked for, likewise.
        silence: seconds after which an archive that sends nothing is given up, see `Archive`.
        patience: seconds for which questions about lists wait for newer ones; by default a moment, or `silence` where
            `expiry` is 0.
    """

    def __init__(
        self,
        address: str,
        work_folder: Path,
        max_unpacked: int,
        audit: Audit | None = None,
        wanted: Mapping[str, Any] | None = None,
        expiry: float = 10.0,
        cache_gb: float = float("inf"),
        cache_days: float = float("inf"),
        silence: float = SILENCE,
        patience: float | None = None,
    ) -> None:
        self._address = address.rstrip("/")
        self._folder = Path(work_folder).resolve()
        self._cache = SeriesCache(self._folder, cache_gb * (1 << 30), cache_days * 86400)
        self._max_unpacked = max_unpacked
        self._audit = audit
        user, password = server_settings.MONAI_LABEL_DICOMWEB_USERNAME, server_settings.MONAI_LABEL_DICOMWEB_PASSWORD
        self._archive = Archive(
            self._address,
            (user, password) if user and password else None,
            {
                "qido": server_settings.MONAI_LABEL_QIDO_PREFIX,
                "wado": server_settings.MONAI_LABEL_WADO_PREFIX,
                "stow": server_settings.MONAI_LABEL_STOW_PREFIX,
            },
            silence,
            largest_series=max_unpacked,
        )
        if patience is None:
            patience = PATIENCE if expiry else silence
        self._index = ArchiveIndex(self._archive, wanted, expiry, patience)
        self._fetching = Refresher(self._fetch_missing, "archive-labels")
        self._clearing = Refresher(self._clear, "archive-cache")
        self._kept = KeptLabels(self._folder)
        self._image_locks = ImageLocks(self._folder / "locks")
        self.history = History(self._folder / HISTORY)
        self._cleared = float("-inf")
        self._unusable: set[str] = set()
        # By series: the UID of the SEG whose label is here, and when to ask again for one that could not be fetched.
        self._at_hand: dict[str, str] = {}
        self._later: dict[str, float] = {}

    # What is there

    def name(self) -> str:
        return self._address

    def set_name(self, name: str) -> None:
        raise Forbidden("datastore: expected no name for an archive, which has its address.")

    def description(self) -> str:
        return "Series of a DICOMweb archive"

    def set_description(self, description: str) -> None:
        raise Forbidden("datastore: expected no description for an archive.")

    def list_images(self) -> list[str]:
        return list(self._lists().images)

    def get_labeled_images(self, label_tag: str | None = None, labels: list[str] | None = None) -> list[str]:
        """Ids of the series with an approved label."""
        lists = self._lists()
        return [image_id for image_id in lists.images if self._latest(image_id, lists)]

    def get_unlabeled_images(self, label_tag: str | None = None, labels: list[str] | None = None) -> list[str]:
        """Ids of the series without an approved label."""
        lists = self._lists()
        return [image_id for image_id in lists.images if not self._latest(image_id, lists)]

    def status(self) -> dict[str, Any]:
        images = self.list_images()
        tags = Counter(tag for image_id in images for tag in self.get_labels_by_image_id(image_id))
        return {"total": len(images), "completed": tags.get(FINAL, 0), "label_tags": dict(tags)}

    def state(self) -> dict[str, Any]:
        """Whether the lists are up to date, since when and why not, and how many labels are still to be fetched."""
        since = self._index.since
        return {
            "reachable": self._index.problem is None,
            "since": since.isoformat(timespec="seconds") if since else None,
            "problem": self._index.problem,
            "labels_to_fetch": len(self._missing(self._lists())),
        }

    def json(self) -> dict[str, Any]:
        """In the form of MONAI Label's local datastore."""
        objects = {
            image_id: {
                "image": {"ext": "", "info": self._image_notes(series)},
                "labels": {
                    tag: {"ext": SUFFIX, "info": self.get_label_info(image_id, tag)}
                    for tag in self.get_labels_by_image_id(image_id)
                },
            }
            for image_id, series in self._lists().images.items()
        }
        return {"name": self.name(), "description": self.description(), "objects": objects}

    def datalist(self, full_path: bool = True) -> list[dict[str, Any]]:
        """[{"image": folder, "label": path}] of the approved labels; relative to the work folder if not `full_path`."""
        pairs = []
        for image_id in self.get_labeled_images():
            label = self.get_label_uri(image_id, FINAL)
            if label:
                pairs.append({"image": self.get_image_uri(image_id), "label": label})
        if full_path:
            return pairs
        return [{key: os.path.relpath(path, self._folder) for key, path in pair.items()} for pair in pairs]

    def get_image_uri(self, image_id: str) -> str:
        """The folder with the series' files, fetched if need be.

        Raises RequestError for an id that isn't a UID, NotFound for an unknown one, ArchiveError.
        """
        series = self._series(image_id)
        with storing("to keep a series"):
            found = self._cache.find(series.uid, series.instances)
        if found is None:
            self._fetch(series)
            self._clear()
        return str(self._cache.folder_of(series.uid))

    def get_image(self, image_id: str, params: Any = None) -> Any:
        raise NotFound("image: expected to be asked for its path; a series is no single file.")

    def get_image_info(self, image_id: str) -> dict[str, Any]:
        return self._image_notes(self._series(image_id))

    def image_file(self, image_id: str) -> Path:
        """A series as one file, for clients that don't speak DICOM: NIfTI, float32, on the series' own grid."""
        folder = Path(self.get_image_uri(image_id))
        path = self._cache.file_of(image_id)
        if not path.exists() or path.stat().st_mtime_ns < folder.stat().st_mtime_ns:
            image = read_image(folder)
            write_map(path, image.slices if image.is_rgb else image.slices[:, 0], image.geometry)
        return path

    def get_label_uri(self, label_id: str, label_tag: str) -> str:
        """The label's path, a NIfTI file on its series' grid, or "" if there is none that can be used.

        Raises RequestError for an invalid id or tag, ArchiveError.
        """
        check_uid(label_id, "label id")
        path = self._kept.path(label_id, check_tag(label_tag))
        if label_tag != FINAL:
            return str(path) if path.exists() else ""
        return str(path) if self._bring_label(label_id) else ""

    def get_label(self, label_id: str, label_tag: str, params: Any = None) -> Any:
        raise NotFound("label: expected to be asked for its path.")

    def get_label_info(self, label_id: str, label_tag: str) -> dict[str, Any]:
        """What was sent with the label, or is written in its SEG; {} if there is no such label."""
        check_uid(label_id, "label id")
        return self._kept.record(self._kept.path(label_id, check_tag(label_tag)))

    def get_labels_by_image_id(self, image_id: str) -> dict[str, str]:
        check_uid(image_id)
        tags = [FINAL] if self._latest(image_id, self._lists()) else []
        return dict.fromkeys(tags + self._kept.tags(image_id), image_id)

    def get_label_by_image_id(self, image_id: str, tag: str) -> str:
        return self.get_labels_by_image_id(image_id).get(check_tag(tag), "")

    def get_dataset_archive(self, limit_cases: int | None) -> str:
        """The path of a ZIP file with the approved pairs; the next call replaces it. Raises NotFound without pairs."""
        ids = self.get_labeled_images()[: max(limit_cases, 1) if limit_cases else None]
        pairs = [(self.image_file(image_id), self.get_label_uri(image_id, FINAL)) for image_id in ids]
        if not pairs:
            raise NotFound("data set: expected approved labels to put in a ZIP file, found none; approve some first.")
        packed = self._folder / "dataset.zip"
        with storing("to write a ZIP file"), replacing(packed) as part, zipfile.ZipFile(part, "w") as file:
            for image, label in pairs:
                if label:
                    file.write(image, f"image/{image.name}")
                    file.write(label, f"label/{image.name}")
            file.writestr("metadata.json", json.dumps(self.json(), default=str))
        return str(packed)

    def refresh(self) -> None:
        """Ask the archive for its lists now."""
        self._index.expire()
        self._lists()

    def prepare(self, wait: float = PATIENCE) -> None:
        """Look for approved labels in the archive, and fetch what is needed of them; that goes on in the background.

        Args:
            wait: seconds to wait for it at most.
        """
        end = time.monotonic() + wait
        if self._missing(self._index.lists(wait)) and self._archive.breaker.since is None:
            self._fetching.run(max(end - time.monotonic(), 0.0))

    def pairs_at_hand(self) -> dict[str, tuple[str, str]]:
        """Paths of image and label, by id, of the series with an approved label whose files have been fetched."""
        lists = self._lists()
        return {
            image_id: (str(self._cache.folder_of(image_id)), str(self._kept.path(image_id, FINAL)))
            for image_id, uid in list(self._at_hand.items())
            if (latest := self._latest(image_id, lists)) and latest.uid == uid
        }

    def is_at_hand(self, image_id: str) -> bool:
        """Whether a series needn't be fetched."""
        return self._cache.folder_of(check_uid(image_id)).is_dir()

    async def forward(self, path: str, query: str = "") -> tuple[httpx.Response, AsyncIterator[bytes]]:
        """The archive's answer to a viewer, see `Archive.forward`."""
        return await self._archive.forward(path, query)

    # What changes

    def add_image(self, image_id: str, image_filename: str, image_info: dict[str, Any]) -> str:
        """Nothing: images come into an archive from scanners. Raises Forbidden."""
        raise Forbidden(
            "image: expected the archive to get its images itself, found an upload; send it to the archive."
        )

    def remove_image(self, image_id: str) -> None:
        """Nothing: an archive's records are not deleted from here. Raises Forbidden."""
        raise Forbidden("image: expected the archive to keep its records, found a request to delete; delete it there.")

    def save_label(
        self, image_id: str, label_filename: str, label_tag: str, label_info: dict[str, Any], seen: str = ""
    ) -> str:
        """Keep a label of a series; with the tag `final` it is stored in the archive.

        Args:
            image_id: the series.
            label_filename: of a file of a supported kind, on the series' grid.
            label_tag: `final` approves the label.
            label_info: what is to be known about it; its `label_info` names classes by `idx` and `name`.
            seen: `state_of` the series' folder that the label was made of; "" for whatever is there.

        Returns:
            The label's id, which is its image's.

        Raises:
            RequestError: an invalid id or tag, an unknown series, a file of another kind or too large, a full disk.
            Conflict: the series has changed since.
            BadLabel: the label doesn't fit its series, or is empty, to be approved, and no class is known.
            ArchiveError: the archive doesn't take it; the label approved before stays.
        """
        tag = check_tag(label_tag)
        name = check_uid(image_id) + supported_suffix(label_filename)
        info = checked(LabelRecord, label_info, f"label of series {image_id}")
        limit = label_limit(self.get_image_uri(image_id), self._max_unpacked)
        with admitted(label_filename, limit, name, label=True) as content, self.deciding(image_id):
            self._check_image(image_id, seen)
            self._keep_replaced(image_id, tag)
            return self._save_label(image_id, str(content), name, tag, info)

    def _save_label(
        self, image_id: str, label_filename: str, name: str, tag: str, info: dict[str, Any], action: str = ""
    ) -> str:
        folder = self.get_image_uri(image_id)
        label = self._numbered(_read_sent(image_id, folder, label_filename, name, info), tag)
        record = {
            **claim(folder),
            **info,
            "label_info": [{"name": text, "idx": value} for value, text in label.names.items()],
            "ts": int(time.time()),
            "name": name,
            "SeriesInstanceUID": image_id,
        }
        if tag == FINAL:
            uid = self._approve(self._series(image_id), folder, label)
            self._keep_approved(image_id, label, {**record, "segmentation": uid})
        else:
            self._keep(image_id, tag, label, record, action)
        return image_id

    def _numbered(self, sent: _Label, tag: str) -> _Label:
        """A label with the values that other labels have for its names, and a name for each class.

        An empty label is about the classes that were looked for: those that were sent, or else all that are known.

        Args:
            sent: the label as it came; some of its classes may lack a name, and some names a class.
            tag: that the label gets. With `final`, its names keep their values from now on.
        """
        values = np.unique(sent.voxels[sent.voxels > 0]).tolist() or sorted(sent.names)
        with self._kept.numbering() as known:
            changes, names = agreed(values, sent.names, known)
            values = [changes.get(value, value) for value in values]
            if tag == FINAL:
                # Before the archive has the label, another one must not get its values for other names.
                for value in values:
                    if value in names:
                        known.setdefault(names[value], value)
            of_value = names_by_value(known)
        voxels = renumber(sent.voxels, changes) if changes else sent.voxels
        named = {value: names.get(value) or of_value.get(value) or f"class_{value}" for value in values}
        return _Label(voxels, sent.geometry, named or of_value)

    def _approve(self, series: Series, folder: str, label: _Label) -> str:
        """Store a label in the archive, and note that; the UID of the SEG that it is there."""
        if not label.names:
            raise BadLabel(
                f"label of series {series.uid}: expected the name of a class that was looked for, found an empty label "
                "and no class; send the names as label_info, or approve a label with a class first."
            )
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch, "label.dcm")
            write_dicom_seg(path, label.voxels, label.geometry, folder, label.names, approved=True, keep_empty=True)
            segmentation = dcmread(path, stop_before_pixels=True)
            self._archive.store(path)
            if self._audit:
                details = {"image": series.uid, "tag": FINAL, "segmentation": segmentation.SOPInstanceUID}
                self._audit.write("approve", **details, sha256=content_hash(path))
        if (listed := approved(segmentation)) is not None:
            self._index.add(listed)
        return str(segmentation.SOPInstanceUID)

    def _keep_approved(self, image_id: str, label: _Label, record: dict[str, Any]) -> None:
        """Keep a copy of a label that the archive has: without one, it is fetched from there when it is needed."""
        try:
            with storing("to save the label"):
                self._kept.write(self._kept.path(image_id, FINAL), label.voxels, label.geometry, record)
        except StorageError as error:
            logger.warning("%s", error)
        else:
            self._at_hand[image_id] = record["segmentation"]

    def _keep(self, image_id: str, tag: str, label: _Label, record: dict[str, Any], action: str) -> None:
        """Keep a label that isn't approved; with an `action` for the audit log only where that can be written."""
        path = self._kept.path(image_id, tag)
        before = self._kept.files(path) if action else {}
        with storing("to save the label"):
            self._kept.write(path, label.voxels, label.geometry, record)
        if action and self._audit:
            try:
                self._audit.write(action, image=image_id, tag=tag, sha256=content_hash(path))
            except StorageError:
                self._kept.restore(path, before)
                raise

    def _change_tag(self, image_id: str, old: str, new: str) -> None:
        """Save a label under another tag, then take it away under the old one.

        An approval is made by the archive, which takes the label or not; what is left of the prediction can fail to be
        deleted without harm. Any other change is undone where its second half fails.
        """
        path = self._kept.path(image_id, old)
        before = self._kept.files(self._kept.path(image_id, new)) if new != FINAL else {}
        record = _without_segmentation(self._kept.record(path))
        # It is of the series that it was made of, as far as that is known.
        self._save_label(image_id, str(path), path.name, new, {MADE_OF: {}, **record})
        try:
            self._remove_label(image_id, old)
        except (StorageError, OSError) as error:
            if new == FINAL:
                logger.warning("series %s: its prediction can't be deleted: %s", image_id, error)
                return
            self._kept.restore(self._kept.path(image_id, new), before)
            raise

    def remove_label(self, label_id: str, label_tag: str) -> None:
        """Delete one label; an approved one is not used any more, but stays in the archive. Raises NotFound."""
        tag = check_tag(label_tag)
        with self.deciding(check_uid(label_id, "label id")):
            self._remove_label(label_id, tag)

    def _remove_label(self, label_id: str, tag: str) -> None:
        path = self._kept.path(label_id, tag)
        if tag not in self.get_labels_by_image_id(label_id):
            raise NotFound(f"label {label_id}: expected a label with tag {tag}, found none; look at the list.")
        if self._audit:
            latest = self._latest(label_id, self._lists())
            details = {"segmentation": latest.uid} if tag == FINAL and latest else {}
            self._audit.write("remove label", image=label_id, tag=tag, **details)
        with storing("to remove the label"):
            if tag == FINAL:
                self._kept.remove(label_id, {entry.uid for entry in self._lists().labels.get(label_id, ())})
                # What is here is only a copy of what the archive has.
                self._kept.discard(path)
            else:
                self._kept.delete(path)

    def update_image_info(self, image_id: str, info: dict[str, Any]) -> None:
        """Add to what is known about a series; the archive isn't told. Raises NotFound for an unknown id."""
        self._series(image_id)
        info = checked(ImageRecord, info, f"series {image_id}")
        with self.deciding(image_id), storing("to save what is known about the image"):
            known = checked(ImageRecord, {**self._kept.series_record(image_id), **info}, f"series {image_id}")
            self._kept.note_series(image_id, known)

    def update_label_info(self, label_id: str, label_tag: str, info: dict[str, Any]) -> None:
        """Add to what is known about a label; the archive isn't told. Raises NotFound where there is none."""
        check_uid(label_id, "label id")
        path = self._kept.path(label_id, check_tag(label_tag))
        info = checked(LabelRecord, info, f"label of series {label_id}")
        info.pop(MADE_OF, None)
        with self.deciding(label_id), storing("to save what is known about the label"):
            if not path.exists():
                raise NotFound(
                    f"label {label_id}: expected a label with tag {label_tag}, found none; look at the list."
                )
            known = checked(LabelRecord, {**self._kept.record(path), **info}, f"label of series {label_id}")
            self._kept.note(path, known)

    # The archive

    def _lists(self) -> Lists:
        lists = self._index.lists()
        if self._index.listed and time.monotonic() - self._cleared > CLEARED_EVERY:
            self._cleared = time.monotonic()
            self._clearing.run(0.0)
        return lists

    def _series(self, image_id: str) -> Series:
        check_uid(image_id)
        series = self._lists().images.get(image_id) or self._index.lists(NEEDED).images.get(image_id)
        if series is None and (self._index.problem or not self._index.listed):
            raise ArchiveError(
                f"image {image_id}: expected it in the archive's lists, found that they are not up to date "
                f"({self._index.problem or 'the archive has not answered yet'}); try again in a moment."
            )
        if series is None:
            raise NotFound(f"image {image_id}: expected a series of the archive, found none; take an id from the list.")
        return series

    def _latest(self, image_id: str, lists: Lists) -> SegInstance | None:
        entries = lists.labels.get(image_id)
        if not entries:
            return None
        gone = self._unusable | self._kept.removed(image_id)
        return max((entry for entry in entries if entry.uid not in gone), key=lambda entry: entry.when, default=None)

    def _missing(self, lists: Lists) -> list[str]:
        """Series whose approved label is to be fetched."""
        now = time.monotonic()
        latest = ((image_id, self._latest(image_id, lists)) for image_id in lists.labels)
        return [
            image_id
            for image_id, entry in latest
            if entry and self._at_hand.get(image_id) != entry.uid and self._later.get(image_id, 0.0) <= now
        ]

    def _fetch_missing(self) -> None:
        """Fetch approved labels, and their series, until all are here or the archive does not answer."""
        for image_id in self._missing(self._lists()):
            try:
                self.get_image_uri(image_id)
                self._bring_label(image_id)
            except (Unreachable, ArchiveBusy):
                return
            except Exception as error:
                # Whatever one label does must not keep the others out.
                known = isinstance(error, DataError)
                logger.warning("series %s: its label can't be fetched: %s", image_id, error, exc_info=not known)
                self._later[image_id] = time.monotonic() + FETCHED_AGAIN

    def _bring_label(self, image_id: str) -> bool:
        """Bring the file of the latest label that can be used in line with the archive; whether there is one."""
        path = self._kept.path(image_id, FINAL)
        while latest := self._latest(image_id, self._lists()):
            try:
                self._fetch_label(latest, path)
                if self.is_at_hand(image_id):
                    self._at_hand[image_id] = latest.uid
                return True
            except (ArchiveError, ArchiveBusy):
                raise
            except DataError as error:
                # An older one of the same series may do; this one is not asked for again.
                logger.warning("series %s: its segmentation %s is left out: %s", image_id, latest.uid, error)
                self._unusable.add(latest.uid)
        return False

    def _fetch(self, series: Series) -> None:
        """Download a series; it is put in place whole.

        Raises ArchiveError where the archive sends fewer instances than it lists, among others.
        """
        with storing("to keep a series"), self._cache.adding(series.uid) as folder:
            files = self._archive.fetch_series(series.study, series.uid, folder)
            if not files:
                raise ArchiveError(f"series {series.uid}: expected files from the archive, found none.")
            what = f"an instance of series {series.uid}"
            uids = set()
            for file in files:
                uid = self._checked(file, what, self._max_unpacked, SeriesInstanceUID=series.uid)
                file.rename(folder / f"{uid}.dcm")
                uids.add(uid)
            if len(uids) < series.instances:
                raise ArchiveError(
                    f"series {series.uid}: expected the {series.instances} instances that the archive lists, found "
                    f"that it sends {len(uids)}; see whether all of the series is there, and try again."
                )
            check_series(folder, self._max_unpacked, f"series {series.uid}")

    def _checked(self, file: Path, what: str, limit: int, **asked: str) -> str:
        """The UID of an instance from the archive. `asked`: UIDs that it must have, by keyword.

        Raises ArchiveError for a file that can't be one or is another's, DataError for one that promises what it
        doesn't hold or more than `limit` bytes of voxels.
        """
        try:
            header = check_instance(file, limit)
            for name, uid in asked.items():
                if header.get(name) != uid:
                    raise ArchiveError(
                        f"archive: expected {what}, found one with {name} {ascii(str(header.get(name)))[:80]}; see its "
                        "log."
                    )
            return check_uid(str(header.SOPInstanceUID), "instance")
        except (OSError, ArchiveError):
            raise
        except Exception as error:
            if type(error) in (DataError, ImageTooLarge):
                raise
            # pydicom raises types of all kinds for what isn't DICOM.
            raise ArchiveError(f"archive: expected {what}, found another file ({error}); see its log.") from error

    def _clear(self) -> None:
        """Delete copies of series that nobody needs, if the archive has them still."""
        self._cleared = time.monotonic()
        lists = self._index.lists()
        if self._index.problem is None and self._index.listed:
            keep = {image_id for image_id in lists.images if self._latest(image_id, lists)}
            try:
                self._cache.clear(keep, set(lists.images))
            except OSError as error:
                # Which is no reason to refuse a request that got what it wanted.
                logger.warning("Copies of series can't be deleted: %s", error)

    def _fetch_label(self, segmentation: SegInstance, path: Path) -> None:
        """Bring the file of an approved label in line with the archive."""
        if self._kept.segmentation(path) == segmentation.uid:
            return
        folder = self.get_image_uri(segmentation.image)
        with tempfile.TemporaryDirectory() as scratch, storing("to keep a label"):
            file = self._archive.fetch_instance(
                segmentation.study, segmentation.series, segmentation.uid, Path(scratch)
            )
            what = f"segmentation {segmentation.uid}"
            self._checked(file, what, sys.maxsize, SOPInstanceUID=segmentation.uid)
            geometry = read_geometry(folder)
            labels, names = read_dicom_seg(
                file, geometry, folder, lambda text: self._kept.value_of(clean_class_name(text)), self._max_unpacked
            )
            names = {value: clean_class_name(text) or f"class_{value}" for value, text in names.items()}
            info = {
                "segmentation": segmentation.uid,
                "SeriesInstanceUID": segmentation.image,
                "label_info": [{"name": name, "idx": value} for value, name in sorted(names.items())],
                "ts": int(segmentation.when[0].strip()[:14] or 0),
                "name": path.name,
            }
            self._kept.write(path, labels, geometry, info)

    def _image_notes(self, series: Series) -> dict[str, Any]:
        return {**series.info, "SeriesInstanceUID": series.uid, **self._kept.series_record(series.uid)}


def _read_sent(image_id: str, folder: str, file: str, name: str, info: Mapping[str, Any]) -> _Label:
    """A label as it came, with the names that came with it.

    Args:
        image_id: of its series.
        folder: of the series' files.
        file: of the label.
        name: what the file is called in errors.
        info: what is known about the label.

    Raises:
        BadLabel: it can't be read, or doesn't fit its series.
    """
    try:
        geometry = read_geometry(folder)
        return _Label(read_label(file, geometry), geometry, told(file, info))
    except DataError as error:
        raise BadLabel(str(error).replace(str(file), name).replace(folder, f"series {image_id}")) from error


def _without_segmentation(info: dict[str, Any]) -> dict[str, Any]:
    """Without what tells which object of the archive a label is."""
    return {key: value for key, value in info.items() if key != "segmentation"}
