"""The archive's lists: kept while it fails, brought up to date in the background, without what is malformed."""

import logging
import threading
import time

import pytest
from pydicom import Dataset

from lib.stores.archive import Archive, ArchiveError, Unreachable
from lib.stores.archive_index import ArchiveIndex, SegInstance, approved
from tests.helpers.archives import series_entry

SOON = 10.0
SEG = "1.2.840.10008.5.1.4.1.1.66.4"


class Scripted(Archive):
    """Gives lists as told, or raises them."""

    def __init__(self) -> None:
        super().__init__("http://127.0.0.1:9")
        self.images: list | Exception = []
        self.segmentations: list = []
        self.headers: dict[str, list | Exception] = {}
        self.asked: list[str] = []
        self.open = threading.Event()
        self.open.set()

    def search_series(self, filters, fields):
        self.open.wait(SOON)
        self.asked.append(filters.get("Modality", "images"))
        if isinstance(self.images, Exception):
            raise self.images
        return self.segmentations if filters.get("Modality") == "SEG" else self.images

    def metadata(self, study, series):
        self.asked.append(series)
        if isinstance(self.headers[series], Exception):
            raise self.headers[series]
        return self.headers[series]


def seg_entry(uid: str) -> dict:
    return series_entry(uid, modality="SEG", instances=1)


def seg_header(uid: str, image: str, kind: str = "SEMIAUTOMATIC") -> dict:
    def tag(vr, *values):
        return {"vr": vr, "Value": list(values)}

    return {
        "00080016": tag("UI", SEG),
        "00080018": tag("UI", f"{uid}.1"),
        "0020000E": tag("UI", uid),
        "0020000D": tag("UI", "1.2"),
        "00080023": tag("DA", "20240501"),
        "00620002": tag("SQ", {"00620008": tag("CS", kind)}),
        "00081115": tag("SQ", {"0020000E": tag("UI", image)}),
    }


@pytest.fixture
def archive():
    return Scripted()


def index_of(archive, expiry=0.0, patience=SOON, retry=0.0) -> ArchiveIndex:
    return ArchiveIndex(archive, expiry=expiry, patience=patience, retry=retry)


MALFORMED = [
    17,
    None,
    "text",
    [],
    {},
    {"0020000E": "1.2"},
    {"0020000E": {"vr": "UI", "Value": ["../1.2"]}, "0020000D": {"vr": "UI", "Value": ["1.2"]}},
    {"0020000E": {"vr": "UI", "Value": {"a": 1}}, "0020000D": {"vr": "UI", "Value": ["1.2"]}},
    {**series_entry("1.66"), "00201209": {"vr": "IS", "Value": ["many"]}},
    {**series_entry("1.67"), "00100020": {"vr": "LO", "Value": [{"deep": ["x"]}]}},
    {**series_entry("1.68"), "00100020": {"vr": "LO", "Value": ["x" * 5000]}},
    {**series_entry("1.69"), "00080060": {"vr": "CS", "Value": 5}},
]


def test_a_malformed_entry_costs_that_entry_and_one_line(archive, caplog):
    archive.images = [series_entry("1.5"), *MALFORMED, series_entry("1.4"), series_entry("1.7", modality="SR")]
    index = index_of(archive)
    assert [list(index.lists().images) for _ in range(3)] == [["1.4", "1.5"]] * 3
    assert index.problem is None
    lines = [record.message for record in caplog.records if "is left out" in record.message]
    assert len(lines) == len(MALFORMED)
    assert all(len(line) < 600 for line in lines)


def test_a_malformed_segmentation_costs_that_segmentation(archive, caplog):
    archive.images = [series_entry("1.5")]
    archive.segmentations = [seg_entry(f"2.{n}") for n in range(6)]
    broken = {**seg_header("2.1", "1.5"), "00080018": {"vr": "UI", "Value": ["../x"]}}
    archive.headers = {
        "2.0": [seg_header("2.0", "1.5")],
        "2.1": [broken, 5],
        "2.2": ArchiveError("archive: expected what a segmentation refers to, found HTTP status 500."),
        "2.3": [seg_header("2.3", "1.5", "AUTOMATIC")],
        "2.4": [seg_header("2.4", "1.99")],
        "2.5": [],
    }
    index = index_of(archive)
    for _ in range(3):
        assert [entry.series for entry in index.lists().labels["1.5"]] == ["2.0"]
    # What is known is not asked for again, and what could not be told is.
    assert {uid: archive.asked.count(uid) for uid in archive.headers} == {
        **dict.fromkeys(archive.headers, 1),
        "2.2": 3,
    }
    assert len([record for record in caplog.records if "left out" in record.message]) == 3
    archive.headers["2.2"] = [seg_header("2.2", "1.5")]
    assert {entry.series for entry in index.lists().labels["1.5"]} == {"2.0", "2.2"}


@pytest.mark.parametrize("error", [Unreachable("archive: silent."), ArchiveError("archive: rubbish."), KeyError("x")])
def test_lists_of_before_serve_while_the_archive_fails(archive, error, caplog):
    archive.images = [series_entry("1.5")]
    index = index_of(archive)
    assert list(index.lists().images) == ["1.5"] and index.problem is None
    archive.images = error
    for _ in range(3):
        assert list(index.lists().images) == ["1.5"]
        assert index.since is not None and str(error).strip("'") in index.problem
    archive.images = [series_entry("1.6")]
    assert list(index.lists().images) == ["1.6"] and index.problem is None and index.since is None
    assert [record.levelno for record in caplog.records].count(logging.WARNING) == 1


def test_an_archive_that_never_answered_gives_empty_lists_and_the_reason(archive):
    archive.images = Unreachable("archive: silent.")
    index = index_of(archive)
    assert not index.lists().images and not index.listed and index.problem == "archive: silent."
    archive.images = [series_entry("1.5")]
    assert list(index.lists().images) == ["1.5"] and index.listed


def test_a_failure_is_not_followed_by_a_question_for_a_while(archive):
    archive.images = Unreachable("archive: silent.")
    index = index_of(archive, retry=1000.0)
    for _ in range(5):
        index.lists()
    assert archive.asked == ["images"]
    index.expire()
    index.lists()
    assert archive.asked == ["images"] * 2


def test_nobody_waits_longer_than_a_moment_for_a_slow_archive(archive):
    archive.images = [series_entry("1.5")]
    archive.open.clear()
    index = index_of(archive, patience=0.05)
    started = time.monotonic()
    assert [dict(index.lists().images) for _ in range(200)] == [{}] * 200
    assert time.monotonic() - started < 200 * 0.05 / 2
    archive.open.set()
    assert list(index.lists(SOON).images) == ["1.5"]


def test_slow_lists_are_asked_for_again_within_a_minute(archive, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("lib.stores.archive_index.time.monotonic", lambda: now[0])
    answer = archive.search_series

    def slow(filters, fields):
        now[0] += 120.0
        return answer(filters, fields)

    archive.search_series = slow
    index = index_of(archive, expiry=10.0)
    index.lists(1e6)
    asked = len(archive.asked)
    now[0] += 59.0
    index.lists(1e6)
    assert len(archive.asked) == asked
    now[0] += 2.0
    index.lists(1e6)
    assert len(archive.asked) == 2 * asked


def test_a_label_that_is_stored_while_lists_are_made_is_not_lost(archive):
    stored = SegInstance("2.9.1", "2.9", "1.2", "1.5", ("20240601", "2.9.1"))
    archive.images = [series_entry("1.5")]
    index = index_of(archive, expiry=1000.0)
    index.lists()
    archive.open.clear()
    index.expire()
    index.lists(0.0)
    index.add(stored)
    assert index.lists(0.0).labels == {"1.5": (stored,)}
    archive.open.set()
    # Made before it came, but of the next ones it would be a part.
    assert index.lists(SOON).labels == {"1.5": (stored,)}
    index.expire()
    assert index.lists(SOON).labels == {}


def test_what_comes_to_the_archive_before_a_question_is_in_the_answer(archive, monkeypatch):
    """Lists of now are not those that somebody else asked for a moment ago."""
    archive.images = [series_entry("1.5")]
    index, asked, answer = index_of(archive), threading.Event(), archive.search_series

    def late(filters, fields):
        found = answer(filters, fields)
        asked.set()
        time.sleep(0.2)
        return found

    monkeypatch.setattr(archive, "search_series", late)
    index.lists(0.0)
    assert asked.wait(SOON)
    archive.images = [series_entry("1.5"), series_entry("1.6")]
    assert list(index.lists().images) == ["1.5", "1.6"]


# From the earliest to the latest; times of 0.1 s and more apart, and others of whole seconds only.
STORED = [
    {"ContentTime": "235959"},
    {"ContentDate": "20240430", "ContentTime": "235959.9"},
    {"ContentDate": "20240501", "ContentTime": "0930"},
    {"ContentDate": "20240501", "ContentTime": "093000"},
    {"ContentDate": "20240501", "ContentTime": "093000.100000"},
    {"ContentDate": "20240501", "ContentTime": "093000.9"},
    {"ContentDate": "20240501", "ContentTime": "093001", "SeriesDate": "20240501", "SeriesTime": "093001.2"},
    {"ContentDate": "20240501", "ContentTime": "093001", "SeriesDate": "20240501", "SeriesTime": "093001.7"},
    {
        "ContentDate": "20240501",
        "ContentTime": "093001",
        "InstanceCreationDate": "20240501",
        "InstanceCreationTime": "093001.4",
    },
]


def test_of_two_segmentations_of_one_second_the_later_one_wins():
    """Whatever their UIDs are; of those that can't be told apart, always the same."""
    found = []
    for place, moments in enumerate(STORED):
        header = Dataset.from_json(seg_header(f"1.{9 - place}", "1.5"))
        del header.ContentDate
        header.update(moments)
        found.append(approved(header))
    assert sorted(reversed(found), key=lambda entry: entry.when) == found
    twins = [approved(Dataset.from_json(seg_header(uid, "1.5"))) for uid in ("1.8", "1.9")]
    assert max(twins, key=lambda entry: entry.when) == max(reversed(twins), key=lambda entry: entry.when)
