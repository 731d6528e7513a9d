"""A log for each server, which nobody else may read, and which clients can't fill."""

import logging
from logging.handlers import RotatingFileHandler

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from lib.http import logs
from lib.http.guard import install
from lib.http.logs import PrivateLog, Seldom, keep_logs, log_routes
from tests.helpers.parts import Given


@pytest.fixture
def shared(tmp_path):
    """MONAI Label's log of an app, at the root logger and at one of a task's."""
    (tmp_path / "app" / "logs").mkdir(parents=True)
    path = tmp_path / "app" / "logs" / "app.log"
    handler = RotatingFileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    owners = [logging.getLogger(), logging.getLogger("task_of_a_test")]
    named = [logging.getLogger(name) for name in (*logs.BUSY_LOGGERS, *logs.CHATTY_LOGGERS)]
    before = [(logger, list(logger.filters), logger.level) for logger in named]
    for owner in owners:
        owner.addHandler(handler)
    yield path
    for owner in owners:
        for entry in list(owner.handlers):
            if isinstance(entry, PrivateLog):
                owner.removeHandler(entry)
                entry.close()
    for logger, filters, level in before:
        logger.filters[:] = filters
        logger.setLevel(level)


def test_each_server_writes_a_log_of_its_own_that_only_its_user_reads(shared, tmp_path):
    path = keep_logs(tmp_path / "state" / "logs", tmp_path / "app")
    logging.getLogger("lib.anything").error("hers")
    task = logging.getLogger("task_of_a_test")
    task.propagate = False
    task.error("its task's")
    task.propagate = True
    assert path == tmp_path / "state" / "logs" / "server.log"
    assert path.read_text() == "ERROR hers\nERROR its task's\n"
    assert path.stat().st_mode & 0o777 == 0o600
    assert shared.read_text() == "" and shared.stat().st_mode & 0o077 == 0


def test_a_log_is_rotated_and_stays_private(tmp_path):
    (tmp_path / "server.log").touch(0o644)
    log = PrivateLog(tmp_path / "server.log", maxBytes=1000, backupCount=2)
    for number in range(200):
        log.emit(logging.LogRecord("x", logging.INFO, "x.py", 1, f"{number:099}", (), None))
    log.close()
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["server.log", "server.log.1", "server.log.2"]
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}
    assert all(path.stat().st_size <= 1000 for path in tmp_path.iterdir())


def test_what_one_place_writes_again_and_again_is_written_seldom():
    now = [0.0]
    rule = Seldom(lines=3, seconds=60.0, clock=lambda: now[0])

    def written(line: int = 1) -> str | None:
        record = logging.LogRecord("asyncio", logging.ERROR, "events.py", line, "no file for %s", ("a client",), None)
        return record.getMessage() if rule.filter(record) else None

    assert [written() for _ in range(1000)] == ["no file for a client"] * 3 + [None] * 997
    assert written(line=2) == "no file for a client"
    now[0] = 61.0
    assert written() == "no file for a client (and 997 more like this before)"
    assert written() == "no file for a client"


@pytest.mark.parametrize("client, status", [("127.0.0.1", 200), ("::1", 200), ("10.0.0.7", 403), ("name", 403)])
def test_the_log_is_shown_on_this_machine_only_and_as_text(tmp_path, client, status):
    path = tmp_path / "server.log"
    path.write_text("".join(f"line {number}\n" for number in range(1000)))
    app = FastAPI()
    app.include_router(log_routes(path))
    install(app, Given(tmp_path))
    asking = TestClient(app, base_url="http://server:8000", client=(client, 1))
    answer = asking.get("/logs/", params={"lines": 2, "html": "false", "text": "true"})
    assert answer.status_code == status
    if status == 200:
        assert answer.text == "line 998\nline 999\n"
        assert answer.headers["content-type"].startswith("text/plain")
        assert asking.get("/logs/", params={"lines": 10**9}).status_code == 422


def test_a_log_that_cannot_be_written_does_not_end_the_start(tmp_path, caplog):
    (tmp_path / "state").write_text("a file where the folder should be")
    path = keep_logs(tmp_path / "state" / "logs", tmp_path / "app")
    assert not path.exists() and "goes to the console only" in caplog.text
