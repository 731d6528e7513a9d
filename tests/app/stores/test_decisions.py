"""Decisions about labels: one at a time for each image, whole or not at all, and never behind a segmentation."""

import errno
import json
import os
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

import lib.stores.file_changes
import lib.stores.folder
import lib.stores.folder_index
from lib.checks import Conflict, StorageError
from lib.http.page import SupportPage
from lib.serving.usage import Usage
from lib.stores.audit import Audit
from lib.stores.decisions import FINAL, REMOVED, Busy, Decisions, FairLock, ImageLocks, state_of
from lib.stores.folder import ConfinedDatastore
from sam2sgp.errors import DataError
from tests.helpers.decisions import final_states

SIZE = (8, 6, 3)
CLASSES = {"label_info": [{"name": "liver", "idx": 1}, {"name": "tumour", "idx": 2}]}


def label(path: Path, value: int = 1) -> Path:
    array = np.zeros(SIZE, np.uint8)
    array[2:5, 2:5] = value
    nib.save(nib.Nifti1Image(array, np.eye(4)), path)
    return path


@pytest.fixture
def opened(tmp_path):
    (tmp_path / "studies").mkdir()
    for name in "AB":
        nib.save(nib.Nifti1Image(np.zeros(SIZE, np.float32), np.eye(4)), tmp_path / "studies" / f"{name}.nii.gz")
    audit = Audit(tmp_path / "state" / "audit.jsonl")
    return lambda: ConfinedDatastore(str(tmp_path / "studies"), tmp_path / "state", 1 << 26, audit)


@pytest.fixture
def store(opened):
    return opened()


@pytest.fixture
def predicted(store, tmp_path):
    """A datastore with a prediction of one class for A."""
    store.save_label("A", str(label(tmp_path / "sent.nii.gz")), "original", {**CLASSES, "note": "seen"})
    return store


def tags(store) -> set[str]:
    """Of the labels of A, by the files and by the lists."""
    files = {path.parent.name for path in Path(store._root, "labels").glob("*/A.nii.gz")}
    assert files == set(store.get_labels_by_image_id("A"))
    return files


def test_each_decision_moves_the_label_with_what_is_known_about_it(predicted, opened):
    steps = [(predicted.approve, "original", FINAL), (predicted.remove, FINAL, REMOVED)]
    steps += [(predicted.approve, REMOVED, FINAL)]
    content = Path(predicted.get_label_uri("A", "original")).read_bytes()
    for decide, old, new in steps:
        decide("A", old)
        for store in (predicted, opened()):
            assert tags(store) == {new}
            assert Path(store.get_label_uri("A", new)).read_bytes() == content
            assert store.get_label_info("A", new)["note"] == "seen"
    assert lines(predicted) == [("approve", FINAL), ("remove label", FINAL), ("approve", FINAL)]


def test_rejecting_deletes_a_prediction_and_no_approved_label(predicted):
    predicted.reject("A", "original")
    assert tags(predicted) == set()
    with pytest.raises(DataError, match="found none; load the page again"):
        predicted.reject("A", "original")
    for tag in (FINAL, REMOVED):
        with pytest.raises(DataError, match="only a prediction can be rejected"):
            predicted.reject("A", tag)


def test_another_label_than_was_seen_is_not_decided_about(predicted, tmp_path):
    seen = state_of(predicted.get_label_uri("A", "original"))
    predicted.save_label("A", str(label(tmp_path / "newer.nii.gz", 2)), "original", CLASSES)
    for decide in (predicted.approve, predicted.reject, predicted.remove):
        with pytest.raises(Conflict, match="found a newer one"):
            decide("A", "original", seen)
    predicted.approve("A", "original", state_of(predicted.get_label_uri("A", "original")))
    assert tags(predicted) == {FINAL}


@pytest.mark.parametrize("tag", ["original", FINAL])
def test_a_label_of_another_image_than_there_is_now_is_not_saved(store, tmp_path, monkeypatch, tag):
    """The other image comes while the label is parsed, the last moment before its image is held."""
    sent, other = str(label(tmp_path / "sent.nii.gz")), tmp_path / "other.nii.gz"
    nib.save(nib.Nifti1Image(np.ones(SIZE, np.float32), np.eye(4)), other)
    seen = state_of(store.get_image_uri("A"))
    assert store.save_label("A", sent, tag, CLASSES, seen) == "A" and tags(store) == {tag}
    parse = lib.stores.folder.admitted

    def meanwhile(*arguments, **options):
        monkeypatch.setattr(lib.stores.folder, "admitted", parse)
        store.remove_image("A")
        store.add_image("A", str(other), {})
        return parse(*arguments, **options)

    monkeypatch.setattr(lib.stores.folder, "admitted", meanwhile)
    with pytest.raises(Conflict, match="found another one under its id"):
        store.save_label("A", sent, tag, CLASSES, seen)
    assert tags(store) == set()
    store.save_label("A", sent, tag, CLASSES, state_of(store.get_image_uri("A")))
    assert tags(store) == {tag}


def test_an_approved_prediction_takes_the_values_that_its_names_have(predicted, tmp_path):
    other = {"label_info": [{"name": "tumour", "idx": 1}]}
    predicted.save_label("B", str(label(tmp_path / "b.nii.gz", 2)), FINAL, CLASSES)
    predicted.save_label("A", str(label(tmp_path / "a.nii.gz", 1)), "original", other)
    predicted.approve("A", "original")
    assert tags(predicted) == {FINAL}
    assert set(np.unique(nib.load(predicted.get_label_uri("A", FINAL)).dataobj)) == {0, 2}
    assert predicted.get_label_info("A", FINAL)["label_info"] == [{"name": "tumour", "idx": 2}]


@pytest.mark.parametrize("decision", ["approve", "remove", "reject", "submit"])
@pytest.mark.parametrize("step", ["index", "file", "audit"])
def test_a_decision_that_fails_at_any_step_leaves_all_as_it_was(predicted, tmp_path, monkeypatch, decision, step):
    predicted.save_label("A", str(label(tmp_path / "approved.nii.gz", 2)), FINAL, {**CLASSES, "note": "before"})
    predicted.save_label("A", str(label(tmp_path / "gone.nii.gz", 2)), REMOVED, {**CLASSES, "note": "long ago"})
    newer = label(tmp_path / "newer.nii.gz", 1)
    root = Path(predicted._root)

    def all_there() -> dict:
        files = {str(path.relative_to(root)): path.read_bytes() for path in root.glob("labels/*/*") if path.is_file()}
        infos = {tag: predicted.get_label_info("A", tag) for tag in predicted.get_labels_by_image_id("A")}
        return {"files": files, "infos": infos, "hidden": sorted(root.glob("labels/*/.*"))}

    before = all_there()

    def fail(*_args, **_options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if step == "index":
            write = lib.stores.folder_index.write_text
            patch.setattr(
                lib.stores.folder_index,
                "write_text",
                lambda path, text: fail() if "v2" in str(path) else write(path, text),
            )
        elif step == "file":
            patch.setattr(lib.stores.file_changes, "_rename", fail)
            patch.setattr(Path, "unlink", fail)
        else:
            patch.setattr(Audit, "write", lambda *_a, **_o: (_ for _ in ()).throw(StorageError("full")))
        calls = {
            "approve": lambda: predicted.approve("A", "original"),
            "remove": lambda: predicted.remove("A"),
            "reject": lambda: predicted.reject("A", "original"),
            "submit": lambda: predicted.save_label("A", str(newer), FINAL, {**CLASSES, "note": "new"}),
        }
        if (decision, step) == ("reject", "index"):
            # What is deleted is gone whatever the index says.
            calls[decision]()
            assert set(predicted.get_labels_by_image_id("A")) == {FINAL, REMOVED}
            return
        with pytest.raises(StorageError):
            calls[decision]()
    predicted.refresh()
    assert all_there() == before


def lines(store) -> list[tuple[str, str]]:
    """What the audit log says: actions with the tags."""
    path = store._audit.path
    return [(line["action"], line["tag"]) for line in map(json.loads, path.read_text().splitlines())]


def corrected(store, file: Path, tag: str = "draft") -> None:
    """Save a label as the review page does."""
    seen = {tag: store.state_of_label("A", tag)}
    store.correct("A", str(file), tag, {**CLASSES, "user": "ann"}, state_of(store.get_image_uri("A")), seen)


def test_a_submitted_label_leaves_what_it_replaces_in_the_history_and_a_prediction_none(store, tmp_path):
    sent = [label(tmp_path / f"{value}.nii.gz", value) for value in (1, 2)]
    for tag in ("original", "draft", FINAL):
        for number, file in enumerate(sent):
            model = {"model": "sam2sgp"} if tag == "original" else {}
            store.save_label("A", str(file), tag, {**CLASSES, **model, "user": f"user {number}"})
    kept = store.history.versions("A")
    assert [(entry["tag"], entry["user"]) for entry in kept] == [(FINAL, "user 0"), ("draft", "user 0")]
    for entry in kept:
        file, info = store.history.get("A", entry["version"])
        assert file.read_bytes() == sent[0].read_bytes() and info["label_info"] == CLASSES["label_info"]
    # What somebody submitted where predictions are is none.
    for model in ({}, {"model": "sam2sgp"}):
        store.save_label("A", str(sent[0]), "original", {**CLASSES, **model, "user": "ann"})
    first, *others = store.history.versions("A")
    assert (first["tag"], first["user"]) == ("original", "ann") and others == kept
    # The same label once more drives nothing out.
    for _ in range(3):
        store.save_label("A", str(sent[1]), FINAL, {**CLASSES, "user": "user 1"})
    assert len(store.history.versions("A")) <= 5


def test_the_earlier_states_of_an_image_take_so_much_of_the_disk_and_no_more(store, tmp_path, monkeypatch):
    for file in (label(tmp_path / "a.nii.gz"), label(tmp_path / "b.nii.gz", 2)):
        store.save_label("A", str(file), FINAL, CLASSES)
    (approved,) = store.history.versions("A")
    monkeypatch.setattr("lib.stores.history.MOST_KEPT", 3)
    rng = np.random.default_rng(0)
    for number in range(6):
        file = tmp_path / f"{number}.nii.gz"
        nib.save(nib.Nifti1Image(rng.integers(0, 3, SIZE, np.uint8), np.eye(4)), file)
        store.save_label("A", str(file), "draft", CLASSES)
        if number == 1:
            one = sum(path.stat().st_size for path in (tmp_path / "state" / "history").glob("*/*-draft.*"))
    # No number of drafts drives out what was approved.
    assert [entry["tag"] for entry in store.history.versions("A")] == 3 * ["draft"] + [FINAL]
    monkeypatch.setattr("lib.stores.history.MOST_BYTES", 2.5 * one)
    store.save_label("A", str(tmp_path / "0.nii.gz"), "draft", CLASSES)
    assert [entry["tag"] for entry in store.history.versions("A")] == 2 * ["draft"] + [FINAL]
    monkeypatch.setattr("lib.stores.history.MOST_BYTES", 1)
    store.save_label("A", str(label(tmp_path / "last.nii.gz")), "draft", CLASSES)
    last, kept = store.history.versions("A")
    assert store.history.get("A", last["version"])[0].read_bytes() == (tmp_path / "0.nii.gz").read_bytes()
    assert kept == approved


@pytest.mark.parametrize("step", ["copy", "index"])
def test_the_audit_log_has_no_line_about_a_draft_that_could_not_be_saved(store, tmp_path, monkeypatch, step):
    corrected(store, label(tmp_path / "first.nii.gz"))
    assert lines(store) == [("correct", "draft")]

    def fail(*_arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if step == "copy":
            patch.setattr(lib.stores.file_changes.shutil, "copyfile", fail)
        else:
            patch.setattr(lib.stores.folder_index.FolderIndex, "write", fail)
        with pytest.raises(StorageError):
            corrected(store, label(tmp_path / "second.nii.gz", 2))
    assert lines(store) == [("correct", "draft")]
    with pytest.raises(Conflict):
        store.correct("A", str(tmp_path / "second.nii.gz"), "draft", CLASSES, "", {"draft": "another"})
    assert lines(store) == [("correct", "draft")]
    corrected(store, tmp_path / "second.nii.gz")
    assert lines(store) == [("correct", "draft")] * 2
    corrected(store, tmp_path / "second.nii.gz", FINAL)
    assert lines(store)[2:] == [("approve", FINAL)]


def test_of_decisions_at_once_those_that_were_answered_are_stored(opened, tmp_path):
    sent = [str(label(tmp_path / f"{value}.nii.gz", value)) for value in (1, 2)]
    choices = random.Random(3)
    stores = [opened(), opened()]
    with ThreadPoolExecutor(4) as pool:
        for turn in range(25):
            first = stores[turn % 2]
            for tag in first.get_labels_by_image_id("A"):
                first.remove_label("A", tag)
            first.save_label("A", sent[0], "original", CLASSES)
            before = {"original": Path(sent[0]).read_bytes()}
            names = [choices.choice(["approve", "reject", "remove", "submit"]) for _ in range(4)]

            def act(number: int, name: str) -> tuple[str, bytes | None] | None:
                store = stores[number % 2]
                try:
                    if name == "approve":
                        store.approve("A", "original")
                    elif name == "reject":
                        store.reject("A", "original")
                    elif name == "remove":
                        store.remove("A")
                    else:
                        store.save_label("A", sent[1], FINAL, CLASSES)
                except (DataError, FileNotFoundError):
                    return name, False
                return name, True

            answers = list(pool.map(act, range(4), names))
            found = {
                tag: Path(stores[1].get_label_uri("A", tag)).read_bytes()
                for tag in stores[1].get_labels_by_image_id("A")
            }
            assert found in final_states(before, answers, Path(sent[1]).read_bytes()), (turn, answers, sorted(found))
            assert tags(stores[0]) == set(found)


HOLDER = """
import sys
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_a_decision_waits_for_another_process_and_not_for_other_images(tmp_path, monkeypatch):
    locks = ImageLocks(tmp_path)
    with locks.hold("A"):
        pass
    (file,) = tmp_path.glob("*.lock")
    command = [sys.executable, "-c", HOLDER, str(file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with locks.hold("B"):
            pass
        monkeypatch.setattr("lib.stores.decisions.PATIENCE", 0.05)
        with pytest.raises(Busy) as caught, locks.hold("A"):
            pass
        assert caught.value.status == 503
        monkeypatch.undo()
        holder.stdin.write("\n")
        holder.stdin.flush()
        with locks.hold("A"):
            pass


def test_without_a_disk_for_its_locks_a_server_still_decides_one_by_one(tmp_path, caplog):
    (tmp_path / "locks").touch()
    locks, order = ImageLocks(tmp_path / "locks"), []

    def decide() -> None:
        with locks.hold("A"):
            order.append("second")

    with ThreadPoolExecutor(1) as pool:
        with locks.hold("A"):
            waiting = pool.submit(decide)
            order.append("first")
        waiting.result(60)
    assert order == ["first", "second"] and "aren't locked" in caplog.text


# Beside a segmentation

PICTURES = ["us_000_0", "us_001_0", "us_002_0", "us_003_0"]


def test_nothing_but_a_segmentation_waits_for_a_segmentation(studio, monkeypatch, tmp_path):
    made = studio([*PICTURES, "us_000_1", "us_001_1"], PICTURES[:2])
    made.approve("us_000_1", tag="original")
    segmenter = made.segmenter()
    segmenter.refresh()
    datastore = segmenter.cases.datastore
    page = SupportPage(
        datastore,
        segmenter,
        Usage(tmp_path / "usage.sqlite"),
        list,
        dict,
        lambda *_: joined.append(segmenter.keep_up()),
    )
    app, joined = FastAPI(), []
    app.include_router(page.router())
    client = TestClient(app)
    reached, release = threading.Event(), threading.Event()
    serving = segmenter._serving
    run = serving.segment

    def held(*arguments):
        reached.set()
        assert release.wait(60)
        return run(*arguments)

    monkeypatch.setattr(serving, "segment", held)
    content = segmenter.state().items[0].content
    with ThreadPoolExecutor(2) as pool:
        segmenting = pool.submit(segmenter.segment, made.image("us_003_0"))
        try:
            assert reached.wait(60)

            def others() -> None:
                # Each of these would wait for the release if it waited for the lock.
                datastore.save_label("us_002_0", made.known["us_002_0"]["label"], FINAL, {})
                page.saved("us_002_0", "us_002_0")
                shown = client.get("/sam2sgp/")
                assert shown.status_code == 200 and "1 approved label joins as soon as" in shown.text
                assert client.get("/sam2sgp/item", params={"content": content}).status_code == 200
                assert client.get("/sam2sgp/picture", params={"image": "us_001_1"}).status_code == 200
                decision = {"image": "us_000_1", "label_tag": "original"}
                assert client.post("/sam2sgp/approve", json=decision).status_code == 200
                removal = client.post("/sam2sgp/remove", json={"image": "us_001_0"})
                assert removal.status_code == 200 and removal.json() == {"image": "us_001_0", "label_tag": "removed"}
                assert "approved label of us_001_0" not in client.get("/sam2sgp/").text
                assert datastore.status()["completed"] == 3
                assert segmenter.status()["items"] == 2 and segmenter.class_names()

            pool.submit(others).result(60)
            assert not segmenting.done() and joined == [False] * 3
        finally:
            release.set()
        assert segmenting.result(60)["support_items"] == 2
    # The very next request has it all.
    assert segmenter.segment(made.image("us_001_1"))["support_items"] == 3
    assert segmenter.state().cases == {"us_000_0", "us_000_1", "us_002_0"}


def test_a_label_is_taken_in_once_nothing_is_segmented_without_any_request(studio):
    made = studio(PICTURES, PICTURES[:2])
    segmenter = made.segmenter()
    segmenter.refresh()
    with segmenter.lock:
        made.approve("us_002_0")
        with ThreadPoolExecutor(1) as pool:
            assert not pool.submit(segmenter.keep_up, 0).result(60)
    end = time.monotonic() + 60
    while segmenter.status()["items"] < 3 and time.monotonic() < end:
        time.sleep(0.01)
    assert segmenter.status()["items"] == 3 and segmenter.keep_up()


def test_datastores_of_both_kinds_decide_in_the_same_way():
    from lib.stores.dicomweb import DicomWebDatastore

    for kind in (ConfinedDatastore, DicomWebDatastore):
        assert issubclass(kind, Decisions) and kind.approve is Decisions.approve
        for step in ("_save_label", "_remove_label", "_change_tag"):
            assert step in vars(kind)


def test_a_fair_lock_is_given_in_the_order_in_which_it_was_asked_for():
    lock, order = FairLock(), []

    def ask(number: int) -> None:
        with lock:
            order.append(number)

    threads = []
    with lock:
        for number in range(20):
            threads.append(threading.Thread(target=ask, args=(number,)))
            threads[-1].start()
            while len(lock._waiting) <= number:
                time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert order == list(range(20))
    with pytest.raises(ZeroDivisionError), lock:
        1 / 0  # noqa: B018
    with lock:
        pass
