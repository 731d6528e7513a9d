"""What the audit log tells, however long it is and whatever becomes of its file."""

import pytest

from lib.stores.trail import Trail
from tests.helpers.log_files import line


def test_lines_that_are_not_whole_are_read_when_they_are_and_spoilt_ones_are_left_out(tmp_path):
    path = tmp_path / "audit.jsonl"
    trail = Trail(path)
    assert trail.events_of("A") == []
    whole = line(0)
    path.write_text(whole + line(1)[:20])
    assert len(trail.events_of("A")) == 1
    path.write_text(whole + line(1)[:20] + "\n" + "[]\n" + line(2, "correct"))
    assert [event["action"] for event in trail.events_of("A")] == ["correct", "approve"]


def test_another_log_in_its_place_is_read_from_its_beginning(tmp_path):
    path, other = tmp_path / "audit.jsonl", tmp_path / "other.jsonl"
    path.write_text(line(0) + line(1))
    trail = Trail(path)
    assert trail.work().labels == 1 and len(trail.events_of("A")) == 2
    other.write_text(line(5, "correct") + line(6, image="B") + line(7, image="C"))
    other.replace(path)
    assert [event["action"] for event in trail.events_of("A")] == ["correct"] and trail.work().labels == 2
    path.write_text(line(5, image="D"))
    assert trail.events_of("A") == [] and trail.work().labels == 0


def test_labels_per_hour_leave_out_pauses_and_count_each_user_alone(tmp_path):
    path = tmp_path / "audit.jsonl"
    trail = Trail(path)
    assert trail.work().per_hour is None and trail.work().latest is None
    path.write_text(
        "".join(
            [
                line(0),
                # Half a minute, of which ten seconds went into a draft.
                line(10, "correct", image="B"),
                line(30, image="B"),
                # Somebody else in between, whose first decision tells nothing.
                line(40, user="ben", image="C"),
                line(60, image="D"),
                # A pause: its label's time is not known.
                line(60 + 601, image="E"),
                line(60 + 601 + 60, image="F"),
                line(60 + 601 + 70, "train"),
                # A rejected prediction is work, too.
                line(60 + 601 + 90, "remove label", image="G", tag="original"),
                line(60 + 601 + 120, image="H"),
            ]
        )
    )
    work = trail.work()
    assert work.labels == 4 and work.hours * 3600 == pytest.approx(30 + 30 + 60 + 60)
    assert work.per_hour == pytest.approx(4 * 3600 / 180) == work.latest
