"""How good predictions are as labels come: measured once, in the background, behind everybody else."""

import json
import shutil
import threading
import time
from collections.abc import Iterable
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import lib.activelearning.progress as module
from lib.activelearning.progress import Progress
from lib.serving.options import Options
from lib.stores.archive import ArchiveError
from lib.stores.audit import Audit
from lib.stores.decisions import state_of
from lib.stores.records import of_prediction
from lib.stores.trail import Trail
from sam2sgp.data import read_image, read_label, write_label
from sam2sgp.evaluation import dice_of_values
from sam2sgp.inferers import SupportSetInferer
from sam2sgp.networks import save_weights

PICTURES = [f"us_00{patient}_{number}" for patient in range(4) for number in range(2)]


@pytest.fixture
def made(studio):
    """A studio of eight pictures of four patients, of which three are approved."""
    return studio(PICTURES, PICTURES[:6:2])


@pytest.fixture
def progress(made):
    return of(made)


def of(made) -> Progress:
    segmenter = made.segmenter()
    state = made.folder / "state"
    return Progress(segmenter.cases.datastore, segmenter, state / "progress.jsonl", Trail(state / "audit.jsonl"))


def lines(made, action: str) -> list[dict]:
    path = made.folder / "state" / "progress.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [entry for entry in found if entry["action"] == action]


class Annotator:
    """Somebody who decides about predictions of a class in a quadrant of the image."""

    def __init__(self, made, progress: Progress) -> None:
        self.made, self.datastore = made, progress.datastore

    def labels(self, name: str, rows: int, value: int = 1) -> str:
        """A file with the upper rows labelled."""
        geometry = read_image(self.made.image(name)).geometry
        labels = np.zeros(geometry.shape, np.uint8)
        labels[:, :rows] = value
        path = self.made.folder / f"{name}-{rows}-{value}.png"
        write_label(path, labels, geometry)
        return str(path)

    def predict(self, name: str, rows: int, names: Iterable[tuple[str, int]] = (("disc", 1),), value: int = 1) -> None:
        params = {"support": {}, "label_names": dict(names), "confidence": {"disc": 0.9}, "weights": "embedded"}
        record = of_prediction("sam2sgp", params)
        self.datastore.save_label(name, self.labels(name, rows, value), "original", record)

    def correct(self, name: str, rows: int, tag: str = "original", save_as: str = "final", value: int = 1) -> None:
        corrected = {"voxels": 9, "from": tag}
        info = {"model": "sam2sgp", "label_info": [{"idx": value, "name": "disc"}], "corrected": corrected}
        seen = {save_as: self.datastore.state_of_label(name, save_as)}
        self.datastore.correct(
            name, self.labels(name, rows, value), save_as, info, state_of(self.made.image(name)), seen
        )


def test_predictions_are_compared_once_with_what_was_approved_in_their_place(made, progress, monkeypatch):
    annotator = Annotator(made, progress)
    for name, rows in zip(PICTURES[1:6:2], (32, 20, 32), strict=True):
        annotator.predict(name, rows)
    progress.datastore.approve(PICTURES[1], "original")
    progress.compare()
    annotator.correct(PICTURES[3], 40)
    # A draft in between; what was shown at first counts.
    annotator.correct(PICTURES[5], 30, save_as="draft")
    progress.datastore.approve(PICTURES[5], "draft")
    progress.compare()
    found = {line["image"]: line for line in lines(made, "shown")}
    assert found.keys() == {PICTURES[1], PICTURES[3], PICTURES[5]}
    assert found[PICTURES[1]]["unchanged"] and found[PICTURES[1]]["dice"] == 1.0
    assert found[PICTURES[3]]["dice"] == pytest.approx(2 * 20 / 60) == found[PICTURES[3]]["classes"]["disc"]
    assert found[PICTURES[5]]["dice"] == pytest.approx(2 * 30 / 62) and not found[PICTURES[5]]["unchanged"]
    told = progress.told()
    assert [point["dice"] for point in told["shown"]] == pytest.approx([1.0, 2 * 20 / 60, 2 * 30 / 62])
    assert told["labels"] == 6 and told["unchanged"] == {"all": 1, "of": 3, "latest": 1, "of_latest": 3}
    assert told["adaptation"] is None
    assert told["verdict"] == "few" and told["enough"].startswith("Too few labels to say: 3 of at least 10")

    # Nothing is measured again: not by what comes later, nor by the next server.
    monkeypatch.setattr(module, "dice_of", lambda *_: pytest.fail("measured again"))
    # Times of labels are whole seconds.
    time.sleep(1.1 - time.time() % 1)
    annotator.predict(PICTURES[3], 5)
    progress.datastore.remove(PICTURES[5])
    progress.compare()
    assert len(progress.told()["shown"]) == 2
    progress.datastore.approve(PICTURES[5], "removed")
    for again in (progress, of(made)):
        again.compare()
        assert again.told()["shown"] == told["shown"]


def test_a_prediction_that_was_approved_and_corrected_after_all_counts_as_it_was(made, progress):
    annotator = Annotator(made, progress)
    annotator.predict(PICTURES[1], 32)
    progress.datastore.approve(PICTURES[1], "original")
    progress.compare()
    annotator.correct(PICTURES[1], 16, tag="final")
    progress.compare()
    assert [line["dice"] for line in lines(made, "shown")] == pytest.approx([1.0, 2 * 16 / 48])
    assert [point["dice"] for point in progress.told()["shown"]] == pytest.approx([2 * 16 / 48])


def test_classes_go_by_their_names_and_later_predictions_and_labels_by_hand_are_not_compared(made, progress):
    annotator = Annotator(made, progress)
    # The label has another value for the name than the prediction had, and a class that the model didn't know.
    annotator.predict(PICTURES[1], 32, names=[("disc", 2), ("ring", 1)], value=2)
    annotator.correct(PICTURES[1], 32, value=1)
    progress.datastore.save_label(PICTURES[3], annotator.labels(PICTURES[3], 9), "final", {})
    progress.compare()
    (line,) = lines(made, "shown")
    assert line["classes"] == {"disc": 1.0}
    # The one by hand, and those copied into the folder.
    made.label(PICTURES[1]).unlink()
    progress.datastore.refresh()
    assert progress.told()["shown"] == []


def test_a_label_is_compared_with_predictions_of_its_own_image_only(made, progress):
    annotator, datastore = Annotator(made, progress), progress.datastore
    name, other = PICTURES[1], PICTURES[3]
    annotator.predict(name, 32)
    datastore.approve(name, "original")
    annotator.predict(other, 10)
    progress.compare()
    # The same label of another image that comes under the same id, once it is there as an upload, once by hand.
    (line,) = lines(made, "shown")
    file = annotator.labels(name, 32)
    datastore.remove_image(name)
    datastore.add_image(name, str(made.known[PICTURES[7]]["image"]), {})
    annotator.predict(name, 16)
    datastore.save_label(name, file, "final", {"label_info": [{"idx": 1, "name": "disc"}]})
    shutil.copy(made.known[PICTURES[7]]["image"], made.image(other))
    datastore.save_label(other, annotator.labels(other, 10), "final", {"label_info": [{"idx": 1, "name": "disc"}]})
    progress.compare()
    before, after = lines(made, "shown")
    assert before == line and (after["image"], after["dice"]) == (name, pytest.approx(2 * 16 / 48))
    assert [point["dice"] for point in progress.told()["shown"]] == [after["dice"]]


def test_a_label_that_its_archive_does_not_give_now_is_compared_later(made, progress, monkeypatch):
    annotator = Annotator(made, progress)
    annotator.predict(PICTURES[1], 32)
    progress.datastore.approve(PICTURES[1], "original")
    with monkeypatch.context() as patched:
        patched.setattr(module, "pair_of", Mock(side_effect=ArchiveError("archive: no answer")))
        progress.compare()
    assert progress.told()["shown"] == []
    progress.compare()
    assert [point["dice"] for point in progress.told()["shown"]] == [1.0]


def test_a_prediction_that_was_renumbered_when_it_was_approved_is_counted_by_its_class(made, progress):
    annotator = Annotator(made, progress)
    annotator.predict(PICTURES[3], 20)
    progress.datastore.approve(PICTURES[3], "original")
    annotator.predict(PICTURES[1], 32, names=[("disc", 5), ("ring", 1)], value=5)
    progress.datastore.approve(PICTURES[1], "original")
    assert np.unique(read_label(made.label(PICTURES[1]))).tolist() == [0, 1]
    progress.compare()
    assert [line["classes"] for line in lines(made, "shown")] == 2 * [{"disc": 1.0}]


def test_an_image_that_memory_is_too_small_for_keeps_no_other_from_being_measured(made, progress, monkeypatch, caplog):
    real = module.dice_left_out

    def dice(segmenter, case, step):
        if case["name"] == PICTURES[2]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(segmenter, case, step)

    monkeypatch.setattr(module, "dice_left_out", dice)
    assert progress.leave_out()
    (point,) = lines(made, "left out")
    assert (point["images"], point["failed"]) == (2, 1) and f"Not measured: image {PICTURES[2]}" in caplog.text


def test_images_left_out_are_measured_as_the_support_set_grows(made, progress, tmp_path):
    assert progress.work()
    (point,) = lines(made, "left out")
    assert (point["labels"], point["images"], point["failed"], point["weights"]) == (3, 3, 0, "embedded")
    assert 0 <= point["low"] <= point["dice"] <= point["high"] <= 1 and len(point["sha256"]) == 64
    # As a request for the image would be answered, which its own patient's labels don't guide.
    segmenter = progress.segmenter
    dice = []
    for name in PICTURES[:6:2]:
        found = segmenter.segment(made.image(name), Options(), name)
        of_classes = dice_of_values(found["pred"].numpy(), read_label(made.label(name)), found["support"])
        dice.append(np.mean(list(of_classes.values())))
    assert point["dice"] == pytest.approx(np.mean(dice))
    assert progress.work() and of(made).work() and len(lines(made, "left out")) == 1
    made.approve(PICTURES[7])
    progress.datastore.refresh()
    assert progress.work()
    assert [entry["labels"] for entry in lines(made, "left out")] == [3, 4]
    assert [entry["labels"] for entry in progress.told()["left_out"]] == [3, 4]
    # Other weights begin a figure of their own.
    with torch.no_grad():
        for parameter in segmenter.network.parameters():
            parameter.mul_(1.01)
    save_weights(segmenter.network, tmp_path / "other.pt")
    segmenter.weights.publish(tmp_path / "other.pt", {})
    segmenter.take_in()
    segmenter.wait()
    assert progress.work()
    *_, before, after = lines(made, "left out")
    assert before["labels"] == after["labels"] and before["sha256"] != after["sha256"]


@pytest.mark.parametrize(("before", "grown"), [(1, 2), (10, 11), (20, 22), (25, 28), (100, 110), (100, 90)])
def test_a_figure_is_due_with_a_tenth_more_labels(before, grown):
    step = 1 if grown > before else -1
    assert module._has_grown(before, grown) and not module._has_grown(before, grown - step)


def test_whoever_wants_the_network_gets_it_before_the_next_image(made, progress, monkeypatch):
    annotator = Annotator(made, progress)
    measured, served = [], threading.Event()
    real = module.dice_left_out

    def dice(segmenter, case, step):
        if not measured:
            measured.append("begins")
            annotator.predict(PICTURES[1], 32)
            progress.datastore.approve(PICTURES[1], "original")
            progress.wake()
            request = threading.Thread(target=serve)
            request.start()
            while not segmenter.lock.is_wanted:
                pass
        else:
            measured.append("served" if served.is_set() else "not served")
        return real(segmenter, case, step)

    def serve():
        with progress.segmenter.lock:
            served.set()

    monkeypatch.setattr(module, "dice_left_out", dice)
    # With a label more it is another figure, which is begun when that label was compared with its prediction.
    assert not progress.work() and served.is_set() and len(lines(made, "shown")) == 1
    assert progress.work() and measured == ["begins", *4 * ["served"]]
    assert [entry["images"] for entry in lines(made, "left out")] == [4]


def test_labels_are_looked_through_once_for_each_time_that_some_came(made, progress, monkeypatch):
    looked = Mock(side_effect=progress.compare)
    progress.compare = looked
    real = module.dice_left_out
    measured = []

    def dice(segmenter, case, step):
        if not measured:
            progress.wake()
        measured.append(case["name"])
        return real(segmenter, case, step)

    monkeypatch.setattr(module, "dice_left_out", dice)
    assert progress.work()
    # When it began, and before the second of the three images.
    assert len(measured) == 3 and looked.call_count == 2


def test_the_server_that_ends_waits_for_nothing_and_the_next_request_has_nothing_to_learn(made, progress, monkeypatch):
    segmenter = progress.segmenter
    real = module.dice_left_out

    def dice(segmenter, case, step):
        segmenter.ending.set()
        return real(segmenter, case, step)

    with monkeypatch.context() as patched:
        patched.setattr(module, "dice_left_out", dice)
        assert not progress.work() and lines(made, "left out") == []
    # While it learns, too.
    made.approve(PICTURES[7])
    progress.datastore.refresh()
    assert not progress.work()
    segmenter.ending.clear()
    assert segmenter.catch_up()
    monkeypatch.setattr(SupportSetInferer, "_judge", lambda *_: pytest.fail("a request had to learn"))
    segmenter.segment(made.image(PICTURES[1]))


def test_a_label_that_cannot_be_used_and_a_single_patient_spoil_nothing(made, progress, caplog):
    made.label(PICTURES[0]).write_bytes(b"no label")
    shutil.copy(made.known[PICTURES[3]]["label"], made.label(PICTURES[3]))
    progress.datastore.refresh()
    assert progress.work()
    (point,) = lines(made, "left out")
    assert point["labels"] == 3
    for name in PICTURES[:4:2]:
        made.label(name).unlink(missing_ok=True)
    made.label(PICTURES[3]).unlink()
    progress.datastore.refresh()
    assert progress.work() and len(lines(made, "left out")) == 1


def test_the_thread_measures_when_it_is_woken(made, progress):
    Audit(made.folder / "state" / "audit.jsonl").write("approve", image=PICTURES[0], tag="final")
    done = threading.Event()
    real = progress.leave_out

    def leave_out():
        found = real()
        done.set()
        return found

    progress.leave_out = leave_out
    thread = progress.start()
    assert done.wait(60)
    assert len(lines(made, "left out")) == 1
    progress.segmenter.ending.set()
    progress.wake()
    thread.join(60)
    assert not thread.is_alive()
