"""Where the state lies, and that one in the code's folder is brought there."""

import errno
import os

import pytest

from lib.settings import Settings
from lib.state_folder import at_its_place, default_folder, make_private
from tests.app.conftest import APP


@pytest.fixture
def place(tmp_path, monkeypatch):
    """(app's folder, studies, folder of data) of a user."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    (tmp_path / "app").mkdir()
    (tmp_path / "studies").mkdir()
    return tmp_path / "app", str(tmp_path / "studies"), tmp_path / "data"


def test_a_state_in_the_codes_folder_is_used_and_moved_by_the_next_start(place):
    app, studies, data = place
    new = default_folder(app, studies)
    assert data in new.parents
    for old_app in (app, data / "sam2sgp" / "app"):
        old = old_app / "model" / "state" / new.name
        old.mkdir(parents=True)
        (old / "audit.jsonl").write_text("line")
        assert default_folder(app, studies) == old, "also by a task of a server that could not move it"
        assert at_its_place(old, app, studies) == new and not old.exists()
        assert (new / "audit.jsonl").read_text() == "line"
        assert default_folder(app, studies) == at_its_place(new, app, studies) == new
        (new / "audit.jsonl").unlink()
        new.rmdir()


def test_a_state_that_cannot_be_moved_or_has_a_successor_stays_as_it_is(place, monkeypatch, caplog):
    app, studies, _ = place
    new = default_folder(app, studies)
    old = app / "model" / "state" / new.name
    old.mkdir(parents=True)

    def other_disk(source, target):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "rename", other_disk)
    assert at_its_place(old, app, studies) == old and "found another disk; it stays" in caplog.text
    new.mkdir(parents=True)
    (new / "audit.jsonl").touch()
    monkeypatch.undo()
    monkeypatch.setenv("XDG_DATA_HOME", str(new.parents[2]))
    assert default_folder(app, studies) == new and old.is_dir()


def test_a_state_that_was_chosen_is_never_moved(place, tmp_path):
    app, studies, _ = place
    chosen = app / "model" / "state" / "mine"
    chosen.mkdir(parents=True)
    made = Settings.from_conf(APP, studies, {"state_dir": str(chosen)})
    assert made.in_place().state_dir == chosen


def test_nobody_else_may_look_into_it(tmp_path, caplog):
    (tmp_path / "state").mkdir(mode=0o755)
    for name in ("state", "new/state"):
        make_private(tmp_path / name)
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o700
    (tmp_path / "file").touch()
    make_private(tmp_path / "file" / "state")
    assert "expected to keep other users out" in caplog.text
