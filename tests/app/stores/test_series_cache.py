"""Copies of series: the oldest go, and never those that somebody needs."""

import os
import threading
import time
from pathlib import Path

import pytest

from lib.stores import series_cache
from lib.stores.series_cache import SeriesCache

DAY = 86400.0
SIZE = 1000
UIDS = ("1.1", "1.2", "1.3", "1.4")


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "archive"


def filled(folder: Path, max_bytes: float = 1e9, max_age: float = 365 * DAY) -> SeriesCache:
    """Copies that were asked for 4, 3, 2 and 1 days ago."""
    cache = SeriesCache(folder, max_bytes, max_age)
    for uid in UIDS:
        with cache.adding(uid) as part:
            (part / "a.dcm").write_bytes(bytes(SIZE))
    for days, uid in zip((4, 3, 2, 1), UIDS, strict=True):
        asked_for(cache, uid, days)
    return cache


def asked_for(cache: SeriesCache, uid: str, days: float) -> None:
    when = time.time() - days * DAY
    for path in (cache.images / uid, cache.images.parent / "used" / uid):
        os.utime(path, (when, when))


def there(cache: SeriesCache) -> set[str]:
    return {path.name for path in cache.images.iterdir()}


def test_what_nobody_asked_for_in_time_goes_together_with_its_file(folder):
    cache = filled(folder, max_age=2.5 * DAY)
    for uid in ("1.1", "1.4"):
        cache.file_of(uid).parent.mkdir(exist_ok=True)
        cache.file_of(uid).write_bytes(b"x")
    assert cache.clear(keep=set(), known=set(UIDS)) == ["1.1", "1.2"]
    assert there(cache) == {"1.3", "1.4"}
    assert not cache.file_of("1.1").exists() and cache.file_of("1.4").exists()
    assert cache.clear(keep=set(), known=set(UIDS)) == []


def test_beyond_the_size_those_go_first_that_were_asked_for_longest_ago(folder):
    cache = filled(folder, max_bytes=2.5 * SIZE)
    assert cache.find("1.1", 1) == cache.images / "1.1"
    assert cache.clear(keep=set(), known=set(UIDS)) == ["1.2", "1.3"]
    assert there(cache) == {"1.1", "1.4"}


def test_files_made_of_series_count(folder):
    cache = filled(folder, max_bytes=4.5 * SIZE)
    cache.file_of("1.4").parent.mkdir()
    cache.file_of("1.4").write_bytes(bytes(SIZE))
    assert cache.clear(keep=set(), known=set(UIDS)) == ["1.1"]


def test_what_is_kept_what_the_archive_lacks_and_what_is_in_use_stays(folder):
    cache = filled(folder, max_bytes=0)
    asked_for(cache, "1.3", days=0)
    assert cache.clear(keep={"1.1"}, known={"1.1", "1.3", "1.4"}) == ["1.4"]
    assert there(cache) == {"1.1", "1.2", "1.3"}


def test_a_copy_that_is_not_whole_is_not_handed_out(folder):
    cache = filled(folder)
    assert cache.find("1.1", 2) is None and cache.find("1.1", 1) and cache.find("1.1", 0)
    assert cache.find("1.9", 0) is None


def test_a_copy_that_was_interrupted_is_none_and_its_rest_is_deleted(folder):
    cache = filled(folder)
    with pytest.raises(OSError), cache.adding("1.5") as part:
        (part / "a.dcm").write_bytes(b"x")
        raise OSError("no space")
    assert there(cache) == set(UIDS)
    for name, age in ((".series.killed", 1.0), (".series.at_work", 0.0)):
        (cache.images / name).mkdir()
        when = time.time() - age * DAY
        os.utime(cache.images / name, (when, when))
    cache.clear(keep=set(), known=set())
    assert there(cache) == {*UIDS, ".series.at_work"}


def test_nobody_is_handed_a_copy_that_goes(folder, monkeypatch):
    monkeypatch.setattr(series_cache, "IN_USE", 0.5)
    cache = filled(folder, max_bytes=0)
    lost = []

    def read() -> None:
        other = SeriesCache(folder, 0, 0)
        for _ in range(100):
            for uid in UIDS:
                found = other.find(uid, 1)
                if found and len((found / "a.dcm").read_bytes()) != SIZE:
                    lost.append(uid)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    gone = [uid for _ in range(20) for uid in cache.clear(keep=set(), known=set(UIDS))]
    for reader in readers:
        reader.join()
    assert lost == [] and len(gone) == len(set(gone))
