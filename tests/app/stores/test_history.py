"""Earlier states of labels: the last ones of each kind, whole, and gone with their image."""

import pytest

from lib.checks import NotFound
from lib.stores import history as module
from lib.stores.history import History


@pytest.fixture
def history(tmp_path) -> History:
    return History(tmp_path / "history")


@pytest.fixture
def keep(history, tmp_path):
    """Keep a label of some content."""

    def kept(content: str, tag: str = "draft", image: str = "A", **info) -> None:
        path = tmp_path / "label.nii.gz"
        path.write_text(content)
        history.keep(image, tag, path, info)

    return kept


def contents(history: History, image: str = "A") -> list[str]:
    return [history.get(image, found["version"])[0].read_text() for found in history.versions(image)]


def test_states_come_back_newest_first_with_what_was_known(history, keep):
    keep("one", user="ann")
    keep("two", "final", user="ben")
    keep("three", image="B")
    first, second = history.versions("A")
    assert (first["tag"], first["user"], second["tag"], second["user"]) == ("final", "ben", "draft", "ann")
    assert first["time"] > second["time"] and contents(history) == ["two", "one"]
    path, info = history.get("A", second["version"])
    assert path.name.endswith(".nii.gz") and info == {"user": "ann"}
    assert contents(history, "B") == ["three"]


def test_a_state_that_is_kept_already_is_not_kept_once_more(history, keep):
    keep("one", user="ann")
    keep("one", user="ann")
    keep("one", "final", user="ann")
    keep("one", user="ben")
    assert [found["tag"] for found in history.versions("A")] == ["draft", "final", "draft"]


def test_no_number_of_drafts_drives_out_what_was_approved(history, keep, monkeypatch):
    monkeypatch.setattr(module, "MOST_KEPT", 3)
    keep("approved", "final")
    for number in range(6):
        keep(f"draft {number}")
    assert contents(history) == ["draft 5", "draft 4", "draft 3", "approved"]


def test_large_states_leave_room_for_the_last_one_only(history, keep, monkeypatch):
    monkeypatch.setattr(module, "MOST_BYTES", 250)
    for letter in "abc":
        keep(letter * 100)
    # With its notes a state takes more than 100 bytes.
    assert [content[0] for content in contents(history)] == ["c", "b"]
    keep("d" * 1000)
    assert [content[0] for content in contents(history)] == ["d"]


def test_only_versions_of_the_list_are_found(history, keep):
    keep("one")
    [found] = history.versions("A")
    for version in ("../../secret", "", found["version"] + "x", "0" * 19 + "-draft"):
        with pytest.raises(NotFound):
            history.get("A", version)
    with pytest.raises(NotFound):
        history.get("B", found["version"])


def test_an_image_that_is_gone_leaves_nothing(history, keep):
    keep("one")
    keep("two", image="B")
    history.forget("A")
    assert history.versions("A") == [] and len(list(history.files())) == 1
    history.forget("never seen")


def test_a_disk_that_is_full_costs_a_warning(history, keep, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.shutil, "copyfile", full)
    keep("one")
    assert history.versions("A") == [] and "can't be kept" in caplog.text
