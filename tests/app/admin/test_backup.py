"""Backup and restore: nothing is lost, a partial backup is never taken for a whole one, and a kill does no harm."""

import hashlib
import json
import os
import shutil
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lib.admin import backup_file
from lib.admin import restore as restoring
from lib.admin.backup import backup
from lib.admin.backup_file import checked
from lib.admin.restore import restore
from lib.checks import NotFound
from lib.layout import FILE as LAYOUT_FILE
from lib.layout import LAYOUT, OF_STATE, OF_STUDIES, bring_up_to_date, layout_of
from lib.serving.published_weights import Weights
from lib.settings import Settings
from lib.state_folder import RESTORE, UNFINISHED, alone, hold
from lib.stores.audit import Audit
from lib.stores.folder_index import JOURNAL
from lib.stores.opening import open_datastore
from sam2sgp.errors import ConfigError, DataError
from tests.app.conftest import APP

IMAGES = ("a", "b", "c")


def label(path: Path, value: int) -> Path:
    Image.fromarray(np.full((8, 8), value, np.uint8)).save(path)
    return path


class Site:
    """A studies folder with labels and the state folder of its server."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.studies, self.state = folder / "my studies", folder / "state"
        self.studies.mkdir(parents=True)
        self.settings = Settings.from_conf(APP, str(self.studies), {"state_dir": str(self.state)})

    def fill(self) -> "Site":
        for number, name in enumerate(IMAGES):
            Image.fromarray(np.full((8, 8, 3), 40 * number, np.uint8)).save(self.studies / f"{name}.png")
        (self.studies / "labels.json").write_text('{"1": "disc", "2": "ring"}')
        store = open_datastore(self.settings)
        store.save_label("a", str(label(self.folder / "x.png", 1)), "final", {"user": "Ünal"})
        store.save_label("b", str(label(self.folder / "x.png", 2)), "original", {"model": "sam2sgp"})
        store.update_image_info("c", {"note": "ä"})
        weights = Weights(self.state / "weights", self.settings.start_weights)
        weights.publish(label(self.folder / "model.pt.png", 9), {"dice": 0.5})
        Audit(self.settings.progress_file).write("shown", image="a", dice=0.9)
        return self

    def words(self, *more: object) -> list[str]:
        return [*map(str, more), "--studies", str(self.studies), "--state-dir", str(self.state)]

    def save(self, name: str = "backup.tar", *more: str) -> Path:
        backup(self.words("--output", self.folder / name, *more), APP)
        return self.folder / name


@pytest.fixture
def site(tmp_path) -> Site:
    return Site(tmp_path / "one").fill()


@pytest.fixture
def other(tmp_path) -> Site:
    """An empty one to restore to."""
    made = Site(tmp_path / "other")
    made.studies.rmdir()
    return made


def ignored(path: Path) -> bool:
    parts = ("lock", "before-restore", RESTORE, "audit.jsonl")
    return any(part in str(path) for part in parts)


def content(*folders: Path) -> dict[str, str]:
    """Hash of every file by its path, but for locks, the audit log, and what a restore prepares and keeps."""
    return {
        f"{folder.name}/{path.relative_to(folder)}": hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not ignored(path.relative_to(folder))
    }


def objects(site: Site) -> dict:
    return open_datastore(site.settings).json()["objects"]


def test_a_restored_folder_is_as_the_one_that_was_saved(site, other):
    known = objects(site)
    restore(other.words(site.save("backup.tar", "--images")), APP)
    assert objects(other) == known and known["a"]["labels"]["final"]["info"]["user"] == "Ünal"
    assert content(other.studies).keys() == content(site.studies).keys() - {f"my studies/{JOURNAL}"}
    for name in ("a.png", "labels/final/a.png", "labels/original/b.png", "labels.json"):
        assert (other.studies / name).read_bytes() == (site.studies / name).read_bytes()
    weights = Weights(other.state / "weights", other.settings.start_weights)
    assert weights.active().name == "1" and weights.active().metrics == {"dice": 0.5}
    assert other.settings.progress_file.read_bytes() == site.settings.progress_file.read_bytes()
    lines = [json.loads(line) for line in (other.state / "audit.jsonl").read_text().splitlines()]
    assert [line["action"] for line in lines] == ["approve", "restore"] and lines[1]["backup"] == "backup.tar"
    assert not list(other.folder.rglob(RESTORE)) and other.state.stat().st_mode & 0o777 == 0o700
    # It is one that can be worked with.
    open_datastore(other.settings).approve("b", "original")


def test_without_images_these_stay_where_they_are_or_are_asked_for(site, other, capsys):
    file = site.save()
    assert not [name for name in checked(file).files if name.endswith("a.png") and "labels" not in name]
    restore(other.words(file), APP)
    assert "3 images of the backup are not in" in capsys.readouterr().out
    assert objects(other) == {}
    for name in IMAGES:
        shutil.copy(site.studies / f"{name}.png", other.studies)
    assert objects(other) == objects(site)


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


def test_a_line_of_the_audit_log_without_its_end_is_left_out(site, other):
    Audit(site.settings.audit_file).write("approve", image="z")
    with open(site.settings.audit_file, "a") as file:
        file.write('{"time": "2026')
    restore(other.words(site.save()), APP)
    lines = (other.state / "audit.jsonl").read_text().splitlines()
    assert [json.loads(line)["action"] for line in lines][-2:] == ["approve", "restore"]


def dying(work: Callable[[], None], at: int, *places: tuple[object, str]) -> bool:
    """Do something in a process that is killed at the n-th call of one of these functions. Whether it was."""
    child = os.fork()
    if not child:
        calls = 0

        def counted(function: Callable) -> Callable:
            def call(*arguments, **options):
                nonlocal calls
                calls += 1
                if calls == at:
                    os._exit(9)
                return function(*arguments, **options)

            return call

        try:
            for owner, name in places:
                setattr(owner, name, counted(getattr(owner, name)))
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


def test_a_backup_that_is_killed_leaves_no_file_that_could_be_taken_for_one(site):
    file = site.folder / "backup.tar"
    at = 0
    while dying(site.save, at := at + 1, (backup_file.BackupWriter, "_write"), (os, "fsync"), (os, "replace")):
        assert not file.exists(), at
    assert at > 8 and checked(file).files
    # What the killed ones left goes.
    assert [path.name for path in site.folder.glob(".*")] == []


def test_a_backup_that_was_cut_or_changed_anywhere_is_refused(site, other, tmp_path):
    whole = site.save().read_bytes()
    file = tmp_path / "cut.tar"
    for size in [*range(0, len(whole) - 10240, 512), *range(1, len(whole) - 10240, 4999)]:
        file.write_bytes(whole[:size])
        with pytest.raises(DataError, match="expected a whole backup, found"):
            checked(file)
    for place in range(100, len(whole) - 10240, 1009):
        changed = bytearray(whole)
        changed[place] ^= 1
        file.write_bytes(changed)
        with tarfile.open(site.folder / "backup.tar") as archive:
            members = {member.name: (member.offset_data, member.size) for member in archive}
        inside = any(start <= place < start + size for start, size in members.values())
        if inside:
            with pytest.raises(DataError):
                restore(other.words(file), APP)
    assert not other.studies.exists() and not other.state.exists()


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


@pytest.mark.parametrize("name", ["state/app/torch.py", "state/archive/labels/x.json", "studies/more/x", "studies/.x"])
def test_a_whole_backup_with_files_that_none_has_is_refused(other, tmp_path, name):
    file = tmp_path / "evil.tar"
    with backup_file.writing(file, "folder") as writer:
        writer.add_bytes(name, b"import os")
    with pytest.raises(DataError, match="which none has; take another one"):
        restore(other.words(file), APP)
    assert not other.studies.exists() and not other.state.exists()


@pytest.mark.parametrize("name", ["../evil", "/evil", "studies/../../evil", "elsewhere/x", "studies"])
def test_a_member_that_leads_elsewhere_is_refused(other, tmp_path, name):
    file = tmp_path / "evil.tar"
    with tarfile.open(file, "w") as archive:
        archive.addfile(tarfile.TarInfo(name))
    with pytest.raises(DataError, match="which no backup has"):
        restore(other.words(file), APP)
    link = tarfile.TarInfo("studies/link")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc"
    with tarfile.open(file, "w") as archive:
        archive.addfile(link)
    with pytest.raises(DataError, match="which no backup has"):
        restore(other.words(file), APP)


def test_a_newer_format_is_refused_with_what_to_do(site, tmp_path, monkeypatch):
    monkeypatch.setattr(backup_file, "FORMAT", 2)
    file = site.save()
    monkeypatch.undo()
    with pytest.raises(DataError, match="format 1 or older, found 2; restore it by the version that made it"):
        checked(file)


def test_nothing_is_restored_over_something_unless_told_and_then_it_is_kept(site, other, capsys):
    file = site.save()
    other.studies.mkdir()
    for name in IMAGES:
        shutil.copy(site.studies / f"{name}.png", other.studies)
    store = open_datastore(other.settings)
    store.save_label("c", str(label(other.folder / "x.png", 1)), "final", {})
    before = content(other.studies, other.state)
    with pytest.raises(DataError, match="expected an empty folder to restore to, found .*, or give --overwrite"):
        restore(other.words(file), APP)
    assert content(other.studies, other.state) == before
    (other.studies / JOURNAL).write_text("{}")
    restore(other.words(file, "--overwrite"), APP)
    assert objects(other) == objects(site) and "c" in objects(other) and objects(other)["c"]["labels"] == {}
    assert not (other.studies / JOURNAL).exists()
    [kept] = [Path(line.rpartition("is ")[2]) for line in capsys.readouterr().out.splitlines() if "/labels was" in line]
    assert (kept / "final" / "c.png").is_file()


@pytest.mark.parametrize(
    "is_empty, place, stride, ends_seen",
    [
        (True, (restoring, "_rename"), 2, {"finished by the next"}),
        (False, (restoring, "_rename"), 1, {"finished by the next"}),
        (False, (os, "fsync"), 7, {"finished by the next", "as it was"}),
    ],
)
def test_a_restore_that_is_killed_leaves_all_as_it_was_or_is_finished_by_the_next(
    site, other, is_empty, place, stride, ends_seen
):
    file = site.save()
    if not is_empty:
        other.studies.mkdir()
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(other.studies / "c.png")
        open_datastore(other.settings).save_label("c", str(label(other.folder / "x.png", 1)), "final", {})
    start = other.folder.with_name("start")
    shutil.copytree(other.folder, start)
    before = content(other.studies, other.state)
    words = other.words(file, *([] if is_empty else ["--overwrite"]))
    restore(words, APP)
    after = content(other.studies, other.state)

    def begin_again() -> None:
        shutil.rmtree(other.folder)
        shutil.copytree(start, other.folder)

    begin_again()
    ends, at = set(), 1
    while dying(lambda: restore(words, APP), at, place):
        if (other.state / UNFINISHED).exists():
            with pytest.raises(ConfigError, match="a restore was interrupted in the middle; run the same"):
                hold(other.state)
            restore(words, APP)
            ends.add("finished by the next")
        left = content(other.studies, other.state)
        if left == before:
            ends.add("as it was")
        else:
            assert left == after, at
        hold(other.state)
        begin_again()
        at += stride
    assert ends == ends_seen and at > 5
    assert content(other.studies, other.state) == after != before


def test_a_restore_and_a_server_keep_out_of_each_others_way(site, other):
    file = site.save()
    other.state.mkdir()
    with alone(other.state), pytest.raises(ConfigError, match="found a restore at work on it"):
        hold(other.state)
    child = os.fork()
    if not child:
        hold(other.state)
        os.kill(os.getpid(), 19)
        os._exit(0)
    os.waitpid(child, os.WUNTRACED)
    try:
        with pytest.raises(ConfigError, match="expected no server to use it, found one; stop it first"):
            restore(other.words(file), APP)
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
    restore(other.words(file), APP)


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
