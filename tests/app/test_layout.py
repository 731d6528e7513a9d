"""Files of older versions are upgraded with a copy kept, and those of newer ones are left alone."""

import json
from pathlib import Path

import pytest

from lib.layout import FILE, LAYOUT, OF_STATE, OF_STUDIES, bring_up_to_date, layout_of
from sam2sgp.errors import ConfigError


@pytest.fixture
def state(tmp_path) -> Path:
    """Of a version that wrote no number."""
    folder = tmp_path / "state"
    (folder / "weights").mkdir(parents=True)
    (folder / "audit.jsonl").write_text("a line\n")
    (folder / "weights" / "active.json").write_text('{"version": "1"}')
    (folder / "audit.jsonl").chmod(0o640)
    return folder


def test_a_folder_without_a_number_is_upgraded_and_its_files_are_closed_to_others(state):
    bring_up_to_date(state, OF_STATE)
    assert layout_of(state) == LAYOUT
    assert (state / "audit.jsonl").stat().st_mode & 0o777 == 0o600
    assert (state / ".before-layout-1" / "audit.jsonl").read_text() == "a line\n"
    assert (state / ".before-layout-1" / "weights" / "active.json").is_file()
    (state / "audit.jsonl").write_text("another\n")
    bring_up_to_date(state, OF_STATE)
    assert (state / ".before-layout-1" / "audit.jsonl").read_text() == "a line\n"


def test_a_studies_folder_gets_its_number_and_nothing_else(state):
    before = {path: path.stat().st_mode for path in state.rglob("*") if path.is_file()}
    bring_up_to_date(state, OF_STUDIES)
    assert layout_of(state) == LAYOUT
    after = {path: path.stat().st_mode for path in state.rglob("*") if path.is_file()}
    assert after.keys() - before.keys() == {state / FILE} and {path: after[path] for path in before} == before


def test_each_step_is_done_once_in_order_and_again_if_it_was_interrupted(state):
    done = []

    def step(number: int, fails: bool = False):
        def upgrade(folder: Path) -> None:
            done.append(number)
            (folder / "audit.jsonl").write_text(f"of layout {number + 1}\n")
            if fails:
                raise OSError(28, "No space left on device")

        return upgrade

    with pytest.raises(ConfigError, match="expected to upgrade its files to layout 2, found No space left"):
        bring_up_to_date(state, {0: step(0), 1: step(1, fails=True), 2: step(2)}, 3)
    assert layout_of(state) == 1
    bring_up_to_date(state, {0: step(0), 1: step(1), 2: step(2)}, 3)
    assert done == [0, 1, 1, 2] and layout_of(state) == 3
    kept = [(state / f".before-layout-{number}" / "audit.jsonl").read_text() for number in (1, 2, 3)]
    # As it was before the first attempt, not after half of it.
    assert kept == ["a line\n", "of layout 1\n", "of layout 2\n"]


def test_a_newer_layout_is_refused_and_nothing_is_touched(state):
    (state / FILE).write_text(json.dumps({"layout": LAYOUT + 1}))
    before = {path: path.stat().st_mtime_ns for path in state.rglob("*")}
    with pytest.raises(ConfigError, match=f"layout {LAYOUT} or older, found layout {LAYOUT + 1} of a newer version"):
        bring_up_to_date(state, OF_STATE)
    assert {path: path.stat().st_mtime_ns for path in state.rglob("*")} == before


@pytest.mark.parametrize("text", ["", "[]", '{"layout": "1"}', '{"layout": -1}', '{"layout": true}', "{}"])
def test_a_number_that_cannot_be_read_is_no_reason_to_guess(state, text):
    (state / FILE).write_text(text)
    with pytest.raises(ConfigError, match="expected the number of a layout, found another content"):
        bring_up_to_date(state, OF_STATE)


def test_a_folder_that_cannot_be_written_to_is_served_all_the_same(state, monkeypatch, caplog):
    def read_only(*arguments, **options):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("lib.layout.write_text", read_only)
    bring_up_to_date(state, OF_STATE)
    assert "expected to note its layout, found Read-only file system" in caplog.text
