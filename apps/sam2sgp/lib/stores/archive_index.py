"""What a DICOMweb archive lists: its image series and the approved labels (DICOM Segmentation objects, SEG) of them.

In: an `Archive`. Out: `Lists`, and since when and why they are not up to date.

The lists are brought up to date in a thread of their own. Whoever asks for them waits a moment for that at most, and
then gets those of before: an archive that is slow, silent or answers nonsense makes them old, and stops nobody. After a
round that failed the next one begins with the first question some seconds later.

An entry that isn't what DICOM says costs that entry, and one line in the log.
"""

import logging
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from pydicom import Dataset
from pydicom.uid import SegmentationStorage

from lib.checks import RequestError, check_uid
from lib.refresher import Refresher
from lib.stores.archive import RETRY, Archive, Unreachable

logger = logging.getLogger(__name__)

# What holds pixels that can be segmented; an archive holds reports and the like as well.
MODALITIES = ("CT", "MR", "PT", "NM", "US", "CR", "DX", "MG", "XA", "RF", "XC", "ES", "OP", "DM")
INFO = {
    "Modality": "00080060",
    "PatientID": "00100020",
    "StudyInstanceUID": "0020000D",
    "StudyDate": "00080020",
    "StudyTime": "00080030",
    "SeriesDescription": "0008103E",
}
SERIES_UID, INSTANCES = "0020000E", "00201209"
FIELDS = (
    "PatientID",
    "StudyInstanceUID",
    "StudyDate",
    "StudyTime",
    "SeriesDescription",
    "NumberOfSeriesRelatedInstances",
)
LONGEST_VALUE = 1024
# Seconds for which a question waits for lists that are being asked for.
PATIENCE = 0.5
# Lists are asked for in one part of as many of the time at most, but at least every minute.
SHARE_OF_TIME, LONGEST_REST = 20, 60.0
MOST_COMPLAINTS = 1000


@dataclass(frozen=True)
class Series:
    """An image series as the archive lists it."""

    uid: str
    study: str
    instances: int
    info: dict[str, str]


@dataclass(frozen=True)
class SegInstance:
    """An approved label in the archive: one SEG instance.

    `when` orders those of one series: digits of the date and time of its content, which many programs give in whole
    seconds, then of its creation and of its series, and at last its UID, so that there always is one latest.
    """

    uid: str
    series: str
    study: str
    image: str
    when: tuple[str, ...]


@dataclass(frozen=True)
class Lists:
    """Series by their UIDs, in order, and the approved labels of each."""

    images: Mapping[str, Series] = field(default_factory=dict)
    labels: Mapping[str, tuple[SegInstance, ...]] = field(default_factory=dict)


class ArchiveIndex:
    """The lists of an archive.

    Args:
        archive: is asked.
        wanted: attributes that a series must match to be listed, by keyword.
        expiry: seconds for which lists are kept; 0 to ask at every question.
        patience: seconds that a question waits for lists that are being asked for.
        retry: seconds after a failure until the archive is asked again.

    Attributes:
        problem, since: why and from when on the lists are not up to date; None if they are.
        listed: whether the archive has ever given its lists.
    """

    def __init__(
        self,
        archive: Archive,
        wanted: Mapping[str, Any] | None = None,
        expiry: float = 10.0,
        patience: float = PATIENCE,
        retry: float = RETRY,
    ) -> None:
        self._archive = archive
        self._wanted = dict(wanted or {})
        self._expiry = expiry
        self._patience = patience
        self._retry = retry
        self._lists = Lists()
        self._until = 0.0
        # Lists that were asked for before this time are too old.
        self._expired = 0.0
        self._lock = threading.Lock()
        self._round = Refresher(self._refresh, "archive-lists")
        # By the UID of a SEG series and its number of instances, whose content never changes; () for no approved label.
        self._known: dict[tuple[str, int], tuple[SegInstance, ...]] = {}
        # Stored here, and when: a list that was asked for before lacks them.
        self._stored: dict[SegInstance, float] = {}
        self._complaints: set[str] = set()
        self.problem: str | None = None
        self.since: datetime | None = None
        self.listed = False

    def lists(self, wait: float | None = None) -> Lists:
        """The lists, as new as can be had in `wait` seconds (`patience` by default)."""
        now = time.monotonic()
        if now >= self._until:
            self._round.run(self._patience if wait is None else wait, max(now - self._expiry, self._expired))
        return self._lists

    def expire(self) -> None:
        """The next question asks the archive."""
        self._until, self._expired = 0.0, time.monotonic()

    def add(self, segmentation: SegInstance) -> None:
        """Take in an approved label that has just been stored."""
        with self._lock:
            self._stored[segmentation] = time.monotonic()
            self._lists = _with(self._lists, [segmentation])

    def _refresh(self) -> None:
        started = time.monotonic()
        try:
            lists = self._ask()
        except Exception as error:
            text = str(error) if isinstance(error, RequestError) else f"archive: expected its lists, found {error!r}."
            with self._lock:
                if self.problem is None:
                    self.since = datetime.now(UTC)
                    unforeseen = not isinstance(error, RequestError)
                    logger.warning("The archive's lists are not up to date: %s", text, exc_info=unforeseen)
                self.problem = text
                self._until = time.monotonic() + self._retry
            return
        with self._lock:
            # What came to the archive while it was making the lists may lack in them.
            self._stored = {entry: when for entry, when in self._stored.items() if when >= started}
            self._lists = _with(lists, self._stored)
            if self.problem is not None or not self.listed:
                logger.info("The archive lists %d series", len(lists.images))
            self.problem, self.since, self.listed = None, None, True
            now = time.monotonic()
            rest = min(SHARE_OF_TIME * (now - started), LONGEST_REST)
            self._until = now + (max(self._expiry, rest) if self._expiry else 0.0)

    def _ask(self) -> Lists:
        found = self._archive.search_series(self._wanted, FIELDS)
        # A filter is for images.
        segmentations = self._archive.search_series({"Modality": "SEG"}, FIELDS)
        images = {}
        for entry in found:
            series = self._read(_series, entry)
            if series and series.info.get("Modality") in MODALITIES:
                images[series.uid] = series
        known: dict[tuple[str, int], tuple[SegInstance, ...]] = {}
        labels: dict[str, list[SegInstance]] = {}
        for entry in segmentations:
            series = self._read(_series, entry)
            if series is None:
                continue
            key = series.uid, series.instances
            examined = self._known[key] if key in self._known else self._examine(series)
            if examined is not None:
                known[key] = examined
            for segmentation in examined or ():
                if segmentation.image in images:
                    labels.setdefault(segmentation.image, []).append(segmentation)
        self._known = known
        return Lists(dict(sorted(images.items())), {image: tuple(entries) for image, entries in labels.items()})

    def _examine(self, series: Series) -> tuple[SegInstance, ...] | None:
        """The approved labels in a SEG series; None if the archive can't tell now."""
        try:
            entries = self._archive.metadata(series.study, series.uid)
        except Unreachable:
            raise
        except RequestError as error:
            self._complain(series.uid, f"The segmentations of series {series.uid} are left out: {error}")
            return None
        found = (self._read(lambda entry: approved(_dataset(entry)), entry) for entry in entries)
        return tuple(entry for entry in found if entry)

    def _read(self, read: Callable[[Any], Any], entry: Any) -> Any:
        """What `read` makes of an entry; None, with a line in the log, for one that isn't what DICOM says."""
        try:
            return read(entry)
        except Exception as error:
            # pydicom raises types of all kinds.
            shown = ascii(entry)[:200]
            self._complain(shown, f"An entry of the archive's lists is left out ({ascii(str(error))[:200]}): {shown}")
            return None

    def _complain(self, key: str, text: str) -> None:
        """Write a line to the log, once for each `key`."""
        if key not in self._complaints and len(self._complaints) < MOST_COMPLAINTS:
            self._complaints.add(key)
            logger.warning("%s", text)


def approved(segmentation: Dataset) -> SegInstance | None:
    """What a SEG's header says, if a person has approved it. Raises RequestError for one with invalid UIDs."""
    segments = segmentation.get("SegmentSequence") or []
    references = segmentation.get("ReferencedSeriesSequence") or []
    if segmentation.get("SOPClassUID") != SegmentationStorage or not references:
        return None
    if not segments or all(segment.get("SegmentAlgorithmType") == "AUTOMATIC" for segment in segments):
        return None
    names = ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID")
    uid, series, study = (check_uid(str(segmentation.get(name)), name) for name in names)
    image = check_uid(str(references[0].get("SeriesInstanceUID")), "referenced series")
    when = (_moment(segmentation, name) for name in ("Content", "InstanceCreation", "Series"))
    return SegInstance(uid, series, study, image, (*when, uid))


def _moment(segmentation: Dataset, name: str) -> str:
    """The digits of a date and a time, in the order of time as text; spaces for a date that is missing."""
    date, time = (re.sub(r"\D", "", str(segmentation.get(f"{name}{part}") or "")) for part in ("Date", "Time"))
    return f"{date:8}{time}"


def _dataset(entry: Any) -> Dataset:
    return Dataset.from_json(entry, bulk_data_uri_handler=lambda uri: None)


def _series(entry: Any) -> Series:
    """From an archive's list. Raises for one that lacks what is needed or has invalid UIDs, which become file names."""
    info = {name: text for name, tag in INFO.items() if (text := _value(entry, tag))}
    uid = check_uid(_value(entry, SERIES_UID), "SeriesInstanceUID")
    study = check_uid(info.get("StudyInstanceUID", ""), "StudyInstanceUID")
    return Series(uid, study, max(int(float(_value(entry, INSTANCES) or 0)), 0), info)


def _value(entry: Any, tag: str) -> str:
    """The first value of a DICOM JSON attribute as text, "" for none. Raises RequestError for one that is no text."""
    values = entry[tag].get("Value") if tag in entry else None
    value = values[0] if values else None
    if value is None:
        return ""
    if not isinstance(value, str | int | float) or len(str(value)) > LONGEST_VALUE:
        raise RequestError(f"{tag}: expected a short text or a number, found another value.")
    return str(value).strip()


def _with(lists: Lists, segmentations: Any) -> Lists:
    labels = dict(lists.labels)
    for entry in segmentations:
        if entry.image in lists.images and entry not in labels.get(entry.image, ()):
            labels[entry.image] = (*labels.get(entry.image, ()), entry)
    return Lists(lists.images, labels)
