"""Backup and restore: nothing is lost, a partial backup is never taken for a whole one, and a kill does no harm."""

import json
import os
import re
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lib.admin import backup_file
from lib.admin.backup import backup
from lib.admin.backup_file import checked
from lib.admin.restore import restore
from lib.checks import NotFound
from lib.layout import FILE as LAYOUT_FILE
from lib.layout import LAYOUT, OF_STATE, OF_STUDIES, bring_up_to_date, layout_of
from lib.stores.audit import Audit
from lib.stores.opening import open_datastore
from sam2sgp.errors import ConfigError
from tests.app.conftest import APP
from tests.helpers.sites import content, dying, label


def test_the_number_of_the_layout_goes_along_and_a_newer_one_is_not_saved(site, other):
    bring_up_to_date(site.state, OF_STATE)
    bring_up_to_date(site.studies, OF_STUDIES)
    restore(other.words(site.save()), APP)
    assert layout_of(other.state) == layout_of(other.studies) == LAYOUT
    (site.studies / LAYOUT_FILE).write_text(json.dumps({"layout": LAYOUT + 1}))
    with pytest.raises(ConfigError, match="of a newer version"):
        site.save("newer.tar")
    assert not (site.folder / "newer.tar").exists()


def test_a_backup_is_for_its_owner_only_and_takes_the_place_of_the_one_before(site):
    file = site.save()
    first = checked(file)
    assert file.stat().st_mode & 0o777 == 0o600
    open_datastore(site.settings).approve("b", "original")
    assert "studies/labels/final/b.png" in checked(site.save()).files.keys() - first.files.keys()
    assert [path.name for path in site.folder.iterdir() if "backup" in path.name] == ["backup.tar"]


def test_what_is_meant_has_to_be_there(site, tmp_path):
    words = ["--studies", str(site.studies), "--output", str(tmp_path / "x.tar")]
    with pytest.raises(ConfigError, match="expected the state folder of the server, found no .*nowhere"):
        backup([*words, "--state-dir", str(tmp_path / "nowhere")], APP)
    with pytest.raises(ConfigError, match="expected a file outside of what is saved"):
        backup(site.words("--output", site.studies / "x.tar"), APP)
    with pytest.raises(ConfigError, match="found none; give --studies"):
        backup(["--output", str(tmp_path / "x.tar")], APP)
    assert not (tmp_path / "x.tar").exists()


def test_root_does_not_make_files_that_the_server_can_not_write_to(site, monkeypatch):
    if os.geteuid() == 0:
        os.chown(site.state, 54321, -1)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    before = content(site.studies, site.state)
    with pytest.raises(ConfigError, match="expected to be run by the folder's user, found root.*run it as user "):
        site.save()
    assert content(site.studies, site.state) == before


def test_labels_are_saved_while_nobody_decides_about_their_image(site):
    """A label that is being changed is saved as it was before or after, with what is known about just that one."""
    store = open_datastore(site.settings)
    ending = threading.Event()
    values = {"1": 1, "2": 2}

    def keep_changing() -> None:
        number = 0
        while not ending.is_set():
            number += 1
            user = str(number % 2 + 1)
            label(site.folder / "y.png", values[user])
            store.save_label("a", str(site.folder / "y.png"), "final", {"user": user})

    thread = threading.Thread(target=keep_changing)
    thread.start()
    try:
        for number in range(12):
            with tarfile.open(site.save(f"{number}.tar")) as archive:
                index = json.load(archive.extractfile("studies/datastore_v2.json"))
                with archive.extractfile("studies/labels/final/a.png") as file:
                    value = int(np.asarray(Image.open(file))[0, 0])
            user = index["objects"]["a"]["labels"]["final"]["info"]["user"]
            assert values.get(user, 1) == value, number
    finally:
        ending.set()
        thread.join()


def test_as_many_files_are_told_to_be_saved_as_to_be_restored(site, other, capsys):
    file = site.save()
    restore(other.words(file), APP)
    told = capsys.readouterr().out
    numbers = re.findall(rf"^{re.escape(str(file))}: (\d+) files", told, re.MULTILINE)
    assert len(numbers) == 2 and numbers[0] == numbers[1], told


def test_a_line_of_the_audit_log_without_its_end_is_left_out(site, other):
    Audit(site.settings.audit_file).write("approve", image="z")
    with open(site.settings.audit_file, "a") as file:
        file.write('{"time": "2026')
    restore(other.words(site.save()), APP)
    lines = (other.state / "audit.jsonl").read_text().splitlines()
    assert [json.loads(line)["action"] for line in lines][-2:] == ["approve", "restore"]


def test_a_backup_that_is_killed_leaves_no_file_that_could_be_taken_for_one(site):
    file = site.folder / "backup.tar"
    at = 0
    while dying(site.save, at := at + 1, (backup_file.BackupWriter, "_write"), (os, "fsync"), (os, "replace")):
        assert not file.exists(), at
    assert at > 8 and checked(file).files
    # What the killed ones left goes.
    assert [path.name for path in site.folder.glob(".*")] == []


def test_earlier_states_of_labels_go_along_and_later_ones_do_not_stay(site, other):
    store = open_datastore(site.settings)
    store.approve("b", "original")
    store.save_label("b", str(label(site.folder / "x.png", 1)), "original", {"model": "sam2sgp"})
    store.approve("b", "original")
    [version] = store.history.versions("b")
    file = site.save()
    restore(other.words(file), APP)
    new = open_datastore(other.settings)
    assert new.history.versions("b") == [version]
    path, info = new.history.get("b", version["version"])
    assert int(np.asarray(Image.open(path))[0, 0]) == 2 and info["model"] == "sam2sgp"
    # What came after the backup is no part of what is restored.
    new.history.keep("c", "final", path, {})
    restore(other.words(file, "--overwrite"), APP)
    assert new.history.versions("b") == [version] and new.history.versions("c") == []


def test_of_an_archive_predictions_and_removals_are_saved(tmp_path):
    def settings(name: str) -> tuple[Path, list[str]]:
        state = tmp_path / name
        return state, ["--studies", "http://archive.example/dicom-web", "--state-dir", str(state)]

    state, words = settings("state")
    kept = f"history/{'0' * 32}/{1:019}-final"
    files = ("labels/original/1.2.nii.gz", "labels/original/1.2.json", "removed/1.2.json", "classes.json")
    files += (f"{kept}.nii.gz", f"{kept}.json")
    for name in (*files, "labels/final/1.2.nii.gz", "images/1.2/0.dcm"):
        path = state / "archive" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    backup([*words, "--output", str(tmp_path / "backup.tar")], APP)
    new, words = settings("new")
    restore([str(tmp_path / "backup.tar"), *words], APP)
    restored = {str(path.relative_to(new / "archive")) for path in (new / "archive").rglob("*") if path.is_file()}
    assert restored == set(files)
    with pytest.raises(ConfigError, match="expected those of a server on an archive"):
        restore([str(tmp_path / "backup.tar"), "--studies", str(tmp_path), "--state-dir", str(tmp_path / "x")], APP)


def test_a_disk_that_is_full_leaves_all_as_it_was(site, other, monkeypatch):
    file = site.save()

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(backup_file.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        restore(other.words(file), APP)
    assert not other.studies.exists() and not other.state.exists()
    file.unlink()
    with pytest.raises(OSError, match="No space left"):
        site.save()
    assert not file.exists()


def test_an_image_that_goes_meanwhile_is_no_fault(site, monkeypatch):
    store = open_datastore(site.settings)

    def gone(self, image_id):
        if image_id == "b":
            raise NotFound("image b: gone")
        return known(self, image_id)

    known = type(store).get_image_uri
    monkeypatch.setattr(type(store), "get_image_uri", gone)
    assert "studies/labels/original/b.png" not in checked(site.save()).files
