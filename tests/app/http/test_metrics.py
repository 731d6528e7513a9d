"""What Prometheus may know: right numbers, in its own format, and no more series than there are routes."""

import logging
import threading
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from lib.checks import NotFound
from lib.http import metrics as module
from lib.http.guard import install, serve_only
from lib.http.metrics import Metrics, measure, metrics_routes
from tests.helpers.parts import Given, datastore, segmenter, values


@pytest.fixture
def served(tmp_path):
    """(client, metrics) of a server with a few routes."""
    app = FastAPI()
    made = Metrics(segmenter(), datastore(), folders={"state": tmp_path})
    routes = metrics_routes(made)

    @routes.get("/datastore/image")
    def image(image: str) -> dict:
        if image == "absent":
            raise NotFound("image: expected one of the list.")
        if image == "bug":
            raise RuntimeError("a fault of ours")
        return {}

    @routes.post("/infer/{model}")
    def infer(model: str) -> dict:
        return {}

    @routes.post("/sam2sgp/approve")
    def approve(fail: bool = False) -> dict:
        if fail:
            raise NotFound("label: expected one.")
        return {}

    serve_only(app, [routes])
    install(app, Given(tmp_path))
    measure(app, made)
    client = TestClient(app, base_url="http://127.0.0.1:8000", raise_server_exceptions=False)
    return client, made


def told(client) -> dict[str, float]:
    answer = client.get("/sam2sgp/metrics")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain; version=")
    return values(answer.text)


def test_requests_are_counted_by_route_and_status_whatever_their_addresses(served):
    client, _ = served
    for number in range(20):
        client.get("/datastore/image", params={"image": f"image-{number}"})
        client.post(f"/infer/model-{number}")
        client.get(f"/nowhere/{number}")
    client.get("/datastore/image", params={"image": "absent"})
    assert client.get("/datastore/image", params={"image": "bug"}).status_code == 500
    client.request("BREW", "/datastore/image")
    client.get("/datastore/image", params={"image": "a"}, headers={"host": "evil.example"})
    found = told(client)
    name = "sam2sgp_http_requests_total{method=GET}{route=/datastore/image}"
    assert (
        found[name + "{status=200}"] == 20 and found[name + "{status=404}"] == 1 and found[name + "{status=500}"] == 1
    )
    assert found["sam2sgp_http_requests_total{method=POST}{route=/infer/{model}}{status=200}"] == 20
    assert found["sam2sgp_http_requests_total{method=GET}{route=none}{status=404}"] == 20
    assert found["sam2sgp_http_requests_total{method=GET}{route=none}{status=403}"] == 1
    assert found["sam2sgp_http_request_duration_seconds_count{method=GET}{route=/datastore/image}"] == 22
    assert [key for key in found if "method=other" in key and "requests_total" in key]
    assert not [key for key in found if "image-" in key or "model-" in key or "nowhere" in key]
    again = told(client)
    assert again.keys() - found.keys() == {key for key in again if "/sam2sgp/metrics" in key}


def test_decisions_count_when_they_were_carried_out(served):
    client, _ = served
    for fail in (False, False, True):
        client.post("/sam2sgp/approve", params={"fail": fail})
    found = told(client)
    assert found["sam2sgp_decisions_total{action=approve}"] == 2
    assert found["sam2sgp_decisions_total{action=reject}"] == found["sam2sgp_decisions_total{action=submit}"] == 0


def test_segmentations_are_counted_while_they_wait_and_when_they_are_done(served):
    client, made = served
    made._segmenter.is_at_work = True
    entered, release = threading.Barrier(4), threading.Event()

    def work(fail: bool) -> None:
        try:
            with made.segmenting() as done:
                entered.wait(20)
                release.wait(20)
                if fail:
                    raise NotFound("classes: expected some.")
                done({"latencies": {"support": 0.5, "pre": 0.25, "infer": 2.0, "write": 0.25, "total": 9.0}})
        except NotFound:
            pass

    threads = [threading.Thread(target=work, args=(fail,)) for fail in (False, False, True)]
    for thread in threads:
        thread.start()
    entered.wait(20)
    found = told(client)
    assert found["sam2sgp_segmenter_busy"] == 1 and found["sam2sgp_segmentations_waiting"] == 2
    release.set()
    for thread in threads:
        thread.join()
    made._segmenter.is_at_work = False
    found = told(client)
    assert found["sam2sgp_segmenter_busy"] == 0 and found["sam2sgp_segmentations_waiting"] == 0
    assert found["sam2sgp_segmentations_total{outcome=done}"] == 2
    assert found["sam2sgp_segmentations_total{outcome=refused}"] == 1
    assert found["sam2sgp_segmentation_duration_seconds_sum"] == 6.0, "without waiting"


def test_trainings_are_counted_by_what_came_of_them(served):
    client, made = served
    made.task_ended("train", "DONE", "published")
    made.task_ended("train", "DONE", "kept")
    made.task_ended("train", "STOPPED", "running")
    made.task_ended("train", "ERROR", "published")
    made.task_ended("scoring", "DONE")
    found = told(client)
    outcomes = {key[len("sam2sgp_trainings_total{outcome=") : -1]: found[key] for key in found if "trainings_to" in key}
    assert outcomes == {"published": 1, "kept": 1, "stopped": 1, "failed": 1, "rolled_back": 0}
    assert found["sam2sgp_tasks_total{kind=train}{status=done}"] == 2
    assert found["sam2sgp_tasks_total{kind=scoring}{status=done}"] == 1


def test_what_is_there_is_looked_at_when_it_is_asked_for(served, monkeypatch, tmp_path):
    client, made = served
    monkeypatch.setattr(module.decoding, "restarts", lambda: 7)
    made._tasks = SimpleNamespace(running=lambda kind: {} if kind == "train" else None, waiting=lambda kind: 2)
    found = told(client)
    assert found["sam2sgp_support_items"] == 3 and found["sam2sgp_support_cases"] == 2
    assert found["sam2sgp_support_errors"] == 1 and found["sam2sgp_images"] == 4
    assert found["sam2sgp_approved_images"] == 1 and found["sam2sgp_decoder_restarts_total"] == 7
    assert found["sam2sgp_tasks_running{kind=train}"] == 1 and found["sam2sgp_tasks_running{kind=scoring}"] == 0
    assert found["sam2sgp_tasks_waiting{kind=train}"] == 2 and found["sam2sgp_disk_free_bytes{folder=state}"] > 0
    assert found["process_resident_memory_bytes"] > 0 and "sam2sgp_archive_up" not in found
    made._datastore.pairs_at_hand, made._datastore.state = dict, lambda: {"reachable": False}
    assert told(client)["sam2sgp_archive_up"] == 0


def test_a_part_that_cannot_be_read_costs_only_itself(served):
    client, made = served

    def gone():
        raise OSError("gone")

    made._datastore.list_images = gone
    found = told(client)
    assert "sam2sgp_images" not in found and found["sam2sgp_support_items"] == 3


def test_trouble_in_the_log_is_counted(served):
    client, made = served
    logger = logging.getLogger("of a test")
    handler = made.logged()
    logger.addHandler(handler)
    logger.warning("one")
    logger.error("two")
    logger.info("none")
    logger.removeHandler(handler)
    found = told(client)
    assert found["sam2sgp_log_messages_total{level=warning}"] == found["sam2sgp_log_messages_total{level=error}"] == 1
