"""The batch of what has no label: what it leaves alone, how it goes on after a kill, and what it tells meanwhile."""

import json
import os
import threading
from types import SimpleNamespace

import pytest
from PIL import Image

from lib.checks import RequestError
from lib.http.loop import state_of_batch
from lib.processes import mark_of
from lib.serving.segmenter import NOTHING_APPROVED, NoSupport
from lib.serving.turns import Requests
from lib.stores.audit import Audit
from lib.stores.folder import ConfinedDatastore
from lib.tasks.batch import BatchInference
from lib.tasks.batch_report import last_report
from sam2sgp.errors import DataError

ASKED = {"model": "sam2sgp", "images": "unannotated"}
NAMES = [f"image_{number}" for number in range(8)]


class Site:
    """A studies folder of eight pictures, and a batch on it whose network finds nothing."""

    def __init__(self, folder) -> None:
        self.folder = folder
        self.studies = folder / "studies"
        self.studies.mkdir()
        for name in NAMES:
            Image.new("L", (8, 8)).save(self.studies / f"{name}.png")
        self.datastore = ConfinedDatastore(str(self.studies), folder / "state", 1 << 24, Audit(folder / "audit.jsonl"))
        model = folder / "model.pt"
        model.write_bytes(b"weights")
        os.utime(model, (1, 1))
        self.version = SimpleNamespace(name="embedded", path=model)
        self.requests = Requests(folder / "locks")
        self.report = folder / "batch.json"
        self.asked: list[str] = []
        self.fails: dict[str, BaseException] = {}
        self.before = lambda image: None

    def save(self, name: str, tag: str, weights: str | None = None) -> None:
        path = self.folder / "label.png"
        Image.new("L", (8, 8)).save(path)
        info = {"model": "sam2sgp", "params": {"weights": weights}} if weights else {}
        self.datastore.save_label(name, str(path), tag, info)

    def infer(self, request, datastore) -> dict:
        name = request["image"]
        self.asked.append(name)
        self.before(name)
        if name in self.fails:
            raise self.fails[name]
        self.save(name, request["label_tag"], self.version.name)
        return {"label": name, "tag": request["label_tag"], "params": {"confidence": {}, "warnings": []}}

    def run(self, **request) -> dict:
        weights = SimpleNamespace(active=lambda: self.version)
        return BatchInference(weights, self.requests, self.report)({**ASKED, **request}, self.datastore, self.infer)


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path)


def test_what_people_made_and_predictions_of_these_weights_stay_as_they_are(site):
    for name, tag, weights in (
        ("image_0", "final", None),
        ("image_1", "draft", None),
        ("image_2", "removed", None),
        ("image_3", "reviewer", None),
        # Put there by somebody.
        ("image_4", "original", None),
        ("image_5", "original", "embedded"),
        ("image_6", "original", "00003"),
    ):
        site.save(name, tag, weights)
    files = {path: path.read_bytes() for path in site.studies.glob("labels/*/*")}
    before = site.datastore.tags()
    assert list(site.run()) == site.asked == ["image_6", "image_7"]
    assert site.datastore.tags() == {**before, "image_7": ["original"]}
    assert all(path.read_bytes() == content for path, content in files.items() if "image_6" not in path.name)
    told = last_report(site.report)
    assert (told["total"], told["done"], told["skipped"], told["failed"]) == (2, 2, 6, 0) and told["ended"]
    # Other weights, or a newer file of the same name as an upgrade brings it.
    site.version = SimpleNamespace(name="00004", path=site.version.path)
    assert list(site.run()) == ["image_5", "image_6", "image_7"]
    assert list(site.run()) == []
    os.utime(site.version.path, (4e9, 4e9))
    assert list(site.run()) == ["image_5", "image_6", "image_7"]


def test_a_batch_that_was_killed_goes_on_where_it_was(site):
    site.fails = {"image_1": DataError("image_1: expected an image."), "image_4": KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        site.run()
    told = last_report(site.report)
    assert not told["ended"] and told["total"] == 8
    site.asked, site.fails = [], {"image_1": DataError("image_1: expected an image.")}
    results = site.run()
    # What failed is tried again, what was done is not.
    assert site.asked == ["image_1", "image_4", "image_5", "image_6", "image_7"]
    assert results["image_1"] == {"error": "image_1: expected an image."}
    told = last_report(site.report)
    assert (told["total"], told["done"], told["failed"], told["skipped"]) == (5, 4, 1, 3)
    assert told["failures"] == [{"image": "image_1", "reason": "image_1: expected an image."}]
    assert told["ended"] and told["seconds_left"] == 0


def test_what_gets_a_label_meanwhile_is_left_alone(site):
    site.before = lambda image: image == "image_2" and site.save("image_5", "draft")
    site.run()
    assert "image_5" not in site.asked and site.datastore.tags()["image_5"] == ["draft"]
    told = last_report(site.report)
    assert (told["total"], told["done"], told["skipped"]) == (7, 7, 1)


def test_a_request_goes_before_the_next_image(site):
    begun = threading.Event()
    site.before = lambda image: begun.set()
    with site.requests.at_work():
        thread = threading.Thread(target=site.run, kwargs={"max_batch_size": 1})
        thread.start()
        assert not begun.wait(0.3)
    thread.join(30)
    assert begun.is_set() and site.asked == ["image_0"]


def test_where_nothing_is_approved_the_batch_ends_with_one_sentence(site):
    site.fails = {"image_0": NoSupport(NOTHING_APPROVED)}
    with pytest.raises(NoSupport, match="label an image by hand"):
        site.run()
    assert site.asked == ["image_0"]


def test_no_batch_approves(site):
    with pytest.raises(RequestError, match="found 'final', which approves labels"):
        site.run(label_tag="final")
    assert site.asked == []


def test_the_page_is_told_what_became_of_the_batch(site):
    # Of the task's process: the one that writes here, and another one that has got its number.
    mine = mark_of()
    other = {**mine, "pid_started": mine["pid_started"] - 9}

    def state(status: str | None, mark: dict | None = None, *details: str) -> dict:
        known = {"status": status, "details": details}
        tasks = SimpleNamespace(all=lambda method: [known] if status else [], mark=lambda method: mark or {})
        return state_of_batch(tasks, site.report)

    assert state(None) == {"state": "none"} and state("SUBMITTED") == {"state": "starting"}
    site.fails = {"image_3": KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        site.run()
    # The server was ended, or the task was.
    assert state(None)["state"] == state("STOPPED", mine)["state"] == "stopped"
    assert state("RUNNING", mine)["state"] == "running" and state("RUNNING", mine)["total"] == 8
    assert not state("RUNNING", mine).keys() & mine.keys()
    # What is there is still of the batch before.
    assert state("SUBMITTED") == state("RUNNING", other) == {"state": "starting"}
    assert state("STOPPED", other) == {"state": "stopped"}
    # One that couldn't write its report, or the end of it.
    assert state("DONE", other) == state("DONE", mine) == {"state": "done"}
    line = f"[2026-11-29] [7] [MainThread] [ERROR] (__main__:39) - batch_infer: {NOTHING_APPROVED}"
    assert state("ERROR", mine, line)["reason"] == NOTHING_APPROVED
    assert state("ERROR", mine, "3 of 8: image_2")["reason"].startswith("Its process was ended")
    site.fails = {}
    site.run()
    assert state("DONE", mine)["total"] == state(None)["total"] == 5
    assert state("DONE", mine)["state"] == state(None)["state"] == "done"
    site.report.write_text(json.dumps([1]))
    assert state(None) == {"state": "none"}
