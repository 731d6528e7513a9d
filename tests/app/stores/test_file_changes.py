"""Saves that a kill or a full disk ends: the folder is as before them or as after them."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lib.stores.folder
from lib.checks import StorageError
from lib.stores.folder_index import JOURNAL
from lib.stores.naming import declared
from tests.helpers.store_files import label, tree


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_takes_nothing_is_one_sentence_and_nothing_is_lost(store, studies, uploads, monkeypatch, number):
    store.save_label("A", str(label(uploads / "good.nii.gz")), "final", {})
    before = tree(studies)

    def fail(source, target):
        Path(target).write_bytes(Path(source).read_bytes()[:20])
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(shutil, "copyfile", fail)
    with pytest.raises(StorageError, match="nothing that was there is lost") as caught:
        store.save_label("A", str(label(uploads / "new.nii.gz", 2)), "final", {})
    assert caught.value.status == 507 and tree(studies) == before
    assert store.get_labeled_images() == ["A"]


# One process imports everything once. Each line is a job, JSON; the process that does it is killed after some time or
# some changes of files, and "killed" or "ended" is the answer.
NURSERY = """
import json, os, signal, sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from lib.stores.folder import ConfinedDatastore
from lib.stores.door import admitted
def killing(change, left):
    def changed(*arguments, **options):
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        left.pop()
        return change(*arguments, **options)
    return changed
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        store = ConfinedDatastore(job["studies"], Path(job["state"]), 1 << 26)
        if "changes" in job:
            # A kill is no power failure.
            os.fsync = lambda file: None
            left = [None] * job["changes"]
            os.replace, os.unlink = killing(os.replace, left), killing(os.unlink, left)
        for method, *arguments in job["calls"]:
            getattr(store, method)(*arguments)
            os.write(1, (arguments[0] + " ").encode())
        os._exit(0)
    if "seconds" in job:
        time.sleep(job["seconds"])
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    os.write(1, b"killed\\n" if status == signal.SIGKILL else b"ended\\n")
"""


@pytest.fixture(scope="module")
def nursery():
    app = Path(lib.stores.folder.__file__).parents[2]
    command = [sys.executable, "-c", NURSERY, str(app)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        yield process


@pytest.fixture
def doing(nursery, studies, tmp_path):
    """Have calls made in a process that is killed; the images of those that were done, and what became of it."""

    def do(calls: list, **when) -> list[str]:
        job = {"studies": str(studies), "state": str(tmp_path / "state"), "calls": calls, **when}
        nursery.stdin.write(f"{json.dumps(job)}\n")
        nursery.stdin.flush()
        return nursery.stdout.readline().split()

    return do


def test_a_kill_at_any_moment_of_saving_loses_no_approved_label(opened, doing, uploads):
    contents = [label(uploads / f"{value}.nii.gz", value).read_bytes() for value in range(1, 5)]
    moments, approved, kills = random.Random(7), set(), 0
    # On a busy machine a process may be killed before its first save.
    while kills < 8 or (approved != {"A", "B"} and kills < 100):
        images = "AB"[:: (-1) ** kills]
        calls = [
            ("save_label", image, str(uploads / f"{1 + turn % 4}.nii.gz"), "final", {"turn": turn})
            for turn in range(50)
            for image in images
        ]
        *done, _ = doing(calls, seconds=moments.uniform(0.0, 0.5))
        approved.update(done)
        kills += 1
        store = opened()
        assert approved <= set(store.get_labeled_images())
        for image in store.get_labeled_images():
            assert Path(store.get_label_uri(image, "final")).read_bytes() in contents
        assert store.list_images() == ["A", "B"]
    assert approved == {"A", "B"}


@pytest.mark.parametrize("decision", ["save_label", "approve"])
def test_whenever_it_is_killed_a_label_goes_with_what_is_known_about_it(
    decision, opened, doing, studies, uploads, monkeypatch
):
    monkeypatch.setattr(os, "fsync", lambda file: None)
    old, new = label(uploads / "old.nii.gz", 1), label(uploads / "new.nii.gz", 2)
    liver, spleen = ({"label_info": [{"idx": value, "name": name}]} for value, name in ((1, "liver"), (2, "spleen")))
    named = {old.read_bytes(): {1: "liver"}, new.read_bytes(): {2: "spleen"}}
    calls = {"save_label": ["A", str(new), "final", spleen], "approve": ["A", "original"]}

    def state() -> tuple[bytes, dict[int, str]]:
        store = opened()
        return Path(store.get_label_uri("A", "final")).read_bytes(), declared(store.get_label_info("A", "final"))

    seen, changes, outcome = set(), 0, "killed"
    while outcome == "killed":
        store = opened()
        store.save_label("A", str(old), "final", liver)
        store.save_label("A", str(new), "original", spleen)
        outcome = doing([[decision, *calls[decision]]], changes=changes)[-1]
        content, names = state()
        assert names == named[content], changes
        # Another change finishes or takes back what was begun.
        opened().update_image_info("B", {"note": changes})
        assert state() == (content, names), changes
        assert not (studies / JOURNAL).exists()
        seen.add(content)
        changes += 1
    assert changes > 5 and len(seen) == 2


def test_the_first_label_of_an_image_is_there_whole_or_not_at_all_whenever_it_is_killed(
    opened, doing, studies, uploads, monkeypatch
):
    """Also beside an older file of another kind, whose record stays with it."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
    new = label(uploads / "new.nii.gz", 2)
    spleen, liver = ({"label_info": [{"idx": value, "name": name}]} for value, name in ((2, "spleen"), (1, "liver")))
    changes, outcome, seen = 0, "killed", set()
    while outcome == "killed":
        store = opened()
        for tag in store.get_labels_by_image_id("A"):
            store.remove_label("A", tag)
        store.save_label("A", str(label(uploads / "old.nii", 1)), "other", liver)
        outcome = doing([["save_label", "A", str(new), "first", spleen]], changes=changes)[-1]
        doing([["save_label", "A", str(new), "other", spleen]], changes=changes)
        store = opened()
        found = {tag: declared(store.get_label_info("A", tag)) for tag in store.get_labels_by_image_id("A")}
        kinds = {tag: Path(store.get_label_uri("A", tag)).name for tag in found}
        assert found.get("first", {2: "spleen"}) == {2: "spleen"}, changes
        assert found["other"] == ({1: "liver"} if kinds["other"] == "A.nii" else {2: "spleen"}), changes
        seen.add("first" in found)
        changes += 1
    assert seen == {True, False}
