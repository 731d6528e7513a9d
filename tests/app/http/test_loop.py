"""How the loop gets on, over HTTP."""

import json
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from lib.http.guard import install, serve_only
from lib.http.loop import loop_routes, state_of_batch
from lib.serving.underway import Underway
from sam2sgp.errors import DataError
from tests.helpers.parts import Given

TOLD = {"total": 8, "done": 3, "failed": 0, "ended": False}
OWN = {"pid": 41, "pid_started": 9.5}
OTHER = {"pid": 42, "pid_started": 9.5}


def tasks(status: str | None, mark: dict | None = None, details: list[str] | None = None) -> SimpleNamespace:
    """One batch, whose process has this mark."""
    known = [{"status": status, "start_ts": "2026-01-01 00:00:00", "details": details or []}] if status else []
    return SimpleNamespace(all=lambda method: known if method == "batch_infer" else [], mark=lambda method: mark or {})


@pytest.fixture
def report(tmp_path):
    path = tmp_path / "batch.json"
    path.write_text(json.dumps(TOLD | OWN))
    return path


def test_a_batch_that_runs_tells_how_far_it_is_and_a_new_one_not_what_the_one_before_did(report):
    assert state_of_batch(tasks("RUNNING", OWN), report)["done"] == 3
    assert state_of_batch(tasks("RUNNING", OTHER), report) == {"state": "starting"}
    report.unlink()
    assert state_of_batch(tasks("SUBMITTED"), report) == {"state": "starting"}
    assert state_of_batch(tasks(None), report) == {"state": "none"}


@pytest.mark.parametrize(
    ("details", "reason"),
    [
        (["... batch_infer: a: expected b, found c."], "a: expected b, found c."),
        ([], "Its process was ended; the log says more."),
    ],
)
def test_a_batch_that_failed_gives_its_reason(report, details, reason):
    found = state_of_batch(tasks("ERROR", OWN, details), report)
    assert (found["state"], found["reason"], found["done"]) == ("failed", reason, 3)


def test_what_ended_is_done_and_what_was_left_can_go_on(report):
    assert state_of_batch(tasks(None), report)["state"] == "stopped"
    # A batch that is done, whose report could not be written to its end.
    assert state_of_batch(tasks("DONE", OWN), report) == {"state": "done"}
    report.write_text(json.dumps({**TOLD, **OWN, "ended": True}))
    assert state_of_batch(tasks(None), report)["state"] == "done"


def test_all_are_asked_over_http_and_an_error_is_one_sentence(report, tmp_path):
    told = {"images": 3}
    progress = SimpleNamespace(told=lambda: told or (_ for _ in ()).throw(DataError("a: expected b, found c.")))
    server = FastAPI()
    install(server, Given(tmp_path))
    underway = Underway()
    serve_only(server, [loop_routes(progress, underway, tasks("RUNNING", OWN), report)])
    client = TestClient(server, base_url="http://server:8000")
    assert client.get("/sam2sgp/review/progress").json() == {"images": 3}
    assert client.get("/sam2sgp/review/batch").json()["state"] == "running"
    with underway.segmenting("ct_1", 40) as advance:
        advance(10)
        asked = [client.get("/sam2sgp/review/segmenting", params={"image": name}).json() for name in ("ct_1", "ct_2")]
        assert asked == [{"done": 10, "total": 40}, {"done": 0, "total": 0}]
    told.clear()
    answer = client.get("/sam2sgp/review/progress")
    assert answer.status_code == 422 and answer.json() == {"detail": "a: expected b, found c."}
