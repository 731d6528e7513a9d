"""What a batch tells of itself, in one file that can be read at any time."""

import json

import pytest

from lib.tasks import batch_report
from lib.tasks.batch_report import BatchReport, last_report


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when they are set."""
    now = [100.0]
    monkeypatch.setattr(batch_report.time, "monotonic", lambda: now[0])
    return now


def test_the_time_left_is_that_of_the_images_so_far(tmp_path, clock):
    report = BatchReport(tmp_path / "batch.json", 10, 2)
    assert last_report(tmp_path / "batch.json")["seconds_left"] is None
    clock[0] += 6
    report.done()
    report.failed("b", "b: expected an image.")
    assert report.values["seconds_left"] == pytest.approx(3 * 8)
    report.left()
    told = report.values
    assert (told["total"], told["done"], told["failed"], told["skipped"]) == (9, 1, 1, 3)
    assert told["seconds_left"] == pytest.approx(3 * 7)
    report.end()
    told = last_report(tmp_path / "batch.json")
    assert (
        told["ended"]
        and told["seconds_left"] == 0
        and told["failures"] == [{"image": "b", "reason": "b: expected an image."}]
    )


def test_it_is_written_now_and_then_and_names_some_failures_only(tmp_path, clock, monkeypatch):
    monkeypatch.setattr(batch_report, "MOST_FAILURES", 3)
    path = tmp_path / "batch.json"
    report = BatchReport(path, 10, 0)
    for number in range(5):
        report.failed(f"i{number}", "why")
    assert last_report(path)["failed"] == 0
    clock[0] += batch_report.SECONDS_BETWEEN_WRITES
    report.done()
    told = last_report(path)
    assert told["failed"] == 5 and [entry["image"] for entry in told["failures"]] == ["i0", "i1", "i2"]


def test_a_full_disk_ends_no_batch(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    BatchReport(tmp_path / "file" / "batch.json", 1, 0).done()
    assert "batch.json: how the batch gets on can't be told" in caplog.text


@pytest.mark.parametrize("content", [None, "{", json.dumps([1])])
def test_without_a_report_there_is_nothing_to_tell(tmp_path, content):
    if content is not None:
        (tmp_path / "batch.json").write_text(content)
    assert last_report(tmp_path / "batch.json") == {}
