"""Restore: all as it was saved, nothing over something, and a kill does no harm."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lib.admin import restore as restoring
from lib.admin.backup_file import checked
from lib.admin.restore import restore
from lib.serving.published_weights import Weights
from lib.state_folder import RESTORE, UNFINISHED, exclusive, hold
from lib.stores.folder_index import JOURNAL
from lib.stores.opening import open_datastore
from sam2sgp.errors import ConfigError, DataError
from tests.app.conftest import APP
from tests.helpers.sites import IMAGES, content, dying, label, objects


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
    with exclusive(other.state), pytest.raises(ConfigError, match="found a restore at work on it"):
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
