"""The guard in front of a small app: sizes, origins, users, parameters, errors and bodies handed on whole."""

import asyncio
import errno
import html
import io
import json
from pathlib import Path

import pytest
from fastapi import APIRouter, FastAPI, Request, Response
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.testclient import TestClient

from lib.checks import Conflict
from lib.http.guard import CHUNK, MOST_FIELDS, MOST_FILES, RequestGuard, install, serve_only
from lib.serving.segmenter import Stopped
from lib.stores.archive import Unreachable
from lib.stores.audit import current_user
from sam2sgp.errors import DataError
from tests.helpers.parts import Given

STUDIES = "/srv/Röntgen & more/studies"
SENTENCE = f"{STUDIES}/labels/final/a b.png: expected a label, found {STUDIES}2/c.png; see {STUDIES}: {{}}"


def unreadable():
    raise DataError(SENTENCE)


FAULTS = {
    "breaks": KeyError("/secret/path"),
    "full": OSError(errno.ENOSPC, "No space left on device"),
    "unreachable": Unreachable("archive: expected an answer, found none; try again."),
}


def broken_off():
    yield b"the beginning"
    raise KeyError("/secret/path")


TOLD = {
    "error": unreadable,
    "object": lambda: JSONResponse({"warnings": [SENTENCE]}),
    "escaped object": lambda: Response(json.dumps({"warnings": [SENTENCE]}), media_type="application/json"),
    "page of errors": lambda: HTMLResponse(html.escape(SENTENCE)),
    "parts": lambda: Response(
        f"--b\r\n\r\n{json.dumps(SENTENCE)}\r\n--b--", media_type="multipart/form-data; boundary=b"
    ),
}


@pytest.fixture
def client(tmp_path):
    def make(**given) -> TestClient:
        open_to_all = Middleware(CORSMiddleware, allow_origins=["*"], allow_credentials=True)
        app = FastAPI(middleware=[open_to_all])

        @app.api_route("/{path:path}", methods=["GET", "PUT", "POST", "DELETE"])
        async def echo(request: Request, path: str):
            if path == "fails":
                raise Conflict("a: expected b, found c.")
            if path in FAULTS:
                raise FAULTS[path]
            if path == "breaks off":
                return StreamingResponse(broken_off())
            if path in TOLD:
                return TOLD[path]()
            if path == "page":
                return Response(headers={"content-security-policy": "default-src 'self'"})
            return {"size": len(await request.body()), "user": current_user.get()}

        install(app, Given(tmp_path, **given))
        return TestClient(app, base_url="http://server:8000")

    return make


def test_a_body_arrives_whole(client):
    for size in (0, 1, 1 << 19):
        content = {"files": {"file": ("a.png", bytes(size - 300 if size > 300 else size))}}
        answer = client().put("/session/", **content)
        assert answer.status_code == 200 and answer.json()["size"] == int(answer.request.headers["content-length"])


@pytest.mark.parametrize("path", TOLD)
def test_no_answer_tells_the_folders_of_the_server(client, path):
    answer = client(folders=(Path(STUDIES), Path("/srv"))).get(f"/{path}")
    text = html.unescape(answer.text.replace("\\u00f6", "ö"))
    # A folder that is none of the server's own, but for the one that it lies in.
    other = "Röntgen & more/studies2/c.png"
    assert f"labels/final/a b.png: expected a label, found {other}; see studies: {{}}" in text
    assert "/srv" not in text
    assert int(answer.headers["content-length"]) == len(answer.content)


def test_a_body_beyond_the_limit_is_refused_with_and_without_a_length(client):
    content = b"--b\r\n" + bytes(600 << 10)
    headers = {"content-type": "multipart/form-data; boundary=b"}
    for body in (content, iter([content[:1000], content[1000:]])):
        answer = client().put("/datastore/image", content=body, headers=headers)
        assert answer.status_code == 413 and "at most 0.5 MB" in answer.json()["detail"]


def test_other_origins_are_neither_invited_nor_let_in(client):
    evil = {"origin": "https://evil.example"}
    assert "access-control-allow-origin" not in client().get("/info/", headers=evil).headers
    assert client().post("/train/x", headers=evil).status_code == 403
    assert client().post("/train/x", headers={"origin": "null"}).status_code == 403
    assert client().post("/train/x", headers={"origin": "http://server:8000"}).status_code == 200
    friend = client(cors_origins=("https://viewer.example",))
    answer = friend.post("/train/x", headers={"origin": "https://viewer.example"})
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "https://viewer.example"
    refused = friend.get("/info/", headers=evil)
    assert refused.status_code == 403 and "access-control-allow-origin" not in refused.headers
    assert friend.post("/train/x", headers=evil).status_code == 403


@pytest.mark.parametrize("site", ["cross-site", "same-site", "unheard-of"])
def test_pictures_in_pages_of_other_sites_are_not_sent(client, site):
    """Whether one loads would tell which images there are; another port of this machine is another site too."""
    asked = {"sec-fetch-site": site, "sec-fetch-mode": "no-cors", "sec-fetch-dest": "image"}
    assert client().get("/sam2sgp/picture", headers=asked).status_code == 403
    assert client().get("/sam2sgp/", headers={**asked, "sec-fetch-mode": "navigate"}).status_code == 200
    for own in ("same-origin", "none"):
        assert client().get("/sam2sgp/picture", headers={**asked, "sec-fetch-site": own}).status_code == 200


def test_the_user_is_the_proxys_header_only_where_it_is_named(client):
    sent = {"x-forwarded-user": "anna"}
    assert client().get("/info/", headers=sent).json()["user"] == "anna"
    assert client(user_header=None).get("/info/", headers=sent).json()["user"] is None


def test_a_training_is_noted_with_its_user(client, tmp_path):
    client().post("/train/finetune", json={"max_epochs": 1}, headers={"x-forwarded-user": "anna"})
    (entry,) = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert (entry["action"], entry["user"]) == ("request training", "anna")


def test_a_training_that_cannot_be_noted_is_refused_before_it_begins(client, tmp_path):
    (tmp_path / "audit.jsonl").mkdir()
    answer = client().post("/train/finetune", json={"max_epochs": 1})
    assert answer.status_code == 507 and "audit log" in answer.json()["detail"]


@pytest.mark.parametrize(
    "body",
    [
        b'[["bundle_path", "/tmp/evil"]]',
        b'"bundle_path"',
        b'{"k": 1, "k": 2}',
        b'{"a": {"b": 1, "b": 2}}',
        b'{"k": NaN}',
        b'{"k": 1} {"k": 2}',
        b'{"k": ' + b"[" * 20 + b"]" * 20 + b"}",
        b"[" * 100_000,
        b'{"k": ' + b"9" * 5000 + b"}",
        b"\xff\xfe{}",
    ],
)
def test_a_body_is_a_json_object_with_each_name_once(client, body):
    answer = client().post("/train/finetune", content=body)
    assert answer.status_code == 400 and answer.json()["detail"].startswith("body: expected")
    assert client().post("/train/finetune", json={"device": "cpu", "k": [4]}).status_code == 200


@pytest.mark.parametrize(
    "kind",
    ["multipart/form-datax; boundary=b", "multipart/form-data, text/plain", "multipart/form-data-b", "text/plain"],
)
def test_only_a_form_of_files_may_be_as_large_as_an_upload(client, kind):
    """What is parsed in memory has a limit of its own, whatever its type begins like."""
    body = b"[" + b"[]," * (700 << 10) + b"1]"
    answer = client(max_upload_mb=8).post("/train/finetune", content=body, headers={"content-type": kind})
    assert answer.status_code == 413 and "at most 1 MB" in answer.json()["detail"]


def test_a_form_has_few_fields_and_not_too_many_files(client):
    many = client(max_upload_mb=8)
    fields = {f"f{number}": (None, "x") for number in range(MOST_FIELDS + 1)}
    files = [("files", (f"{number}.dcm", b"x")) for number in range(MOST_FILES + 1)]
    for content in (fields, files):
        answer = many.put("/session/", files=content)
        assert answer.status_code == 400 and "as a ZIP file" in answer.json()["detail"]
    assert many.put("/session/", files=files[1:]).status_code == 200


def test_others_are_answered_while_a_form_is_parsed():
    """Parsing is work on the event loop: a gigabyte of small parts would keep all others waiting."""
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def parse() -> int:
        ticking = asyncio.create_task(others())
        await asyncio.sleep(0)
        before = turns
        body = (
            b"".join(
                b'--b\r\nContent-Disposition: form-data; name="files"; filename="%d.dcm"\r\n\r\n' % n
                + bytes(CHUNK)
                + b"\r\n"
                for n in range(8)
            )
            + b"--b--\r\n"
        )
        scope = {
            "type": "http",
            "method": "PUT",
            "path": "/session/",
            "headers": [(b"content-type", b"multipart/form-data; boundary=b")],
        }
        await RequestGuard._check_form(RequestGuard.__new__(RequestGuard), scope, io.BytesIO(body))
        ticking.cancel()
        return turns - before

    assert asyncio.run(parse()) >= 8


def test_names_that_come_twice_are_refused(client):
    assert client().get("/datastore/image?image=a&image=b").status_code == 400
    twice = [("params", (None, "{}")), ("params", (None, '{"k": 1}'))]
    assert client().post("/infer/sam2sgp", files=twice).status_code == 400
    files = [("files", ("a.dcm", b"x")), ("files", ("b.dcm", b"x"))]
    assert client().put("/session/", files=files).status_code == 200


def test_no_answer_lets_a_browser_load_or_frame_it_elsewhere(client):
    for path in ("/info/", "/fails", "/breaks", "/datastore/%ff"):
        answer = client().get(path)
        assert answer.headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'", path
        assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["x-frame-options"] == "DENY"
    assert client().get("/page").headers["content-security-policy"] == "default-src 'self'"


def test_only_the_routes_of_the_app_and_their_description_are_served(client):
    app, own = client().app, APIRouter()
    own.add_api_route("/own", lambda: "own")
    serve_only(app, [own])
    served = TestClient(app, base_url="http://server:8000")
    assert served.get("/own").json() == "own" and list(served.get("/openapi.json").json()["paths"]) == ["/own"]
    for path in ("/info/", "/docs", "/redoc", "/anything"):
        assert served.get(path).status_code == 404


def test_installing_twice_guards_once(client, tmp_path):
    app = client().app
    install(app, Given(tmp_path, max_upload_mb=2.0))
    assert len(app.user_middleware) == 1
    client = TestClient(app, base_url="http://server:8000")
    assert client.put("/session/", files={"file": ("a.png", bytes(1 << 20))}).status_code == 200


def test_an_error_of_a_route_is_its_answer(client):
    answer = client().get("/fails")
    assert answer.status_code == 409 and answer.json() == {"detail": "a: expected b, found c."}


@pytest.mark.parametrize(("path", "status"), [("breaks", 500), ("full", 507), ("unreachable", 502)])
def test_a_fault_of_the_servers_own_is_answered_and_logged_once(client, caplog, path, status):
    # Which raises what goes on to the server, and would be logged there once more.
    answer = client().get(f"/{path}")
    assert answer.status_code == status and "secret" not in answer.text
    [record] = [record for record in caplog.records if record.levelname == "ERROR"]
    assert record.getMessage() == f"GET '/{path}': {answer.json()['detail']}"
    if path == "unreachable":
        assert not record.exc_info
    else:
        assert record.exc_info[1] is FAULTS[path]


def test_a_request_that_can_not_be_checked_is_logged_once(client, caplog, tmp_path):
    (tmp_path / "audit.jsonl").mkdir()
    assert client().post("/train/finetune", json={"max_epochs": 1}).status_code == 507
    assert [record.levelname for record in caplog.records if record.levelno >= 40] == ["ERROR"]


def test_that_a_segmentation_was_stopped_is_no_line_in_the_log(client, caplog, monkeypatch):
    monkeypatch.setitem(FAULTS, "stopped", Stopped("nobody waits for it."))
    assert client().get("/stopped").status_code == 503
    assert [record for record in caplog.records if record.levelno >= 40] == []


def test_after_the_beginning_of_an_answer_there_is_no_other(client, caplog):
    with pytest.raises(KeyError):
        client().get("/breaks off")
    assert [record for record in caplog.records if record.levelno >= 40] == []
