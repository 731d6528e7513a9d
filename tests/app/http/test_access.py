"""Who may do what over the app's routes: by users of the proxy, by tokens, and with a second pair of eyes."""

import asyncio
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fastapi import APIRouter, FastAPI
from monailabel.config import settings as server_settings
from monailabel.interfaces.app import MONAILabelApp
from PIL import Image
from starlette.testclient import TestClient

import lib.http.metrics
import main
from lib.http.access import NEEDED, SECOND_PAIR, needed_for, told
from lib.http.endpoints import routes
from lib.http.guard import install, serve_only
from lib.http.page import SupportPage
from lib.http.review import ReviewPage
from lib.http.task_endpoints import task_routes
from lib.roles import Role
from lib.stores.audit import Audit, current_user
from lib.stores.dicomweb import DicomWebDatastore
from lib.stores.folder import ConfinedDatastore
from lib.stores.sessions import ConfinedSessions
from lib.stores.tokens import Tokens
from sam2sgp.data import read_label
from sam2sgp.transforms import SupportScaling
from tests.helpers.pages import SCALE, case, correction
from tests.helpers.parts import Given, Recorder

USERS = {"rea": Role.reader, "ann": Role.annotator, "ben": Role.approver, "ada": Role.admin}
HEADER = "X-Remote-User"


# The table


def routes_of_the_app(tmp_path, monkeypatch, datastore) -> set[str]:
    """What the app answers when MONAI Label has started it, with its login on: "METHOD path" of each route."""
    served: list[APIRouter] = []
    monkeypatch.setitem(sys.modules, "monailabel.app", SimpleNamespace(app=FastAPI()))
    monkeypatch.setattr(main, "serve_only", lambda server, routers: served.extend(routers))
    for module, name in (
        (main, "install"),
        (main, "end_soon"),
        (main, "limit_connections"),
        (main.sys, "setswitchinterval"),
        (lib.http.metrics, "measure"),
        (MONAILabelApp, "on_init_complete"),
    ):
        monkeypatch.setattr(module, name, lambda *arguments: None)
    monkeypatch.setattr(main, "Progress", lambda *arguments: SimpleNamespace(start=lambda: None))
    monkeypatch.setattr(server_settings, "MONAI_LABEL_AUTH_ENABLE", True)
    monkeypatch.setattr(main.logging.getLogger(), "addHandler", lambda handler: None)
    app = object.__new__(main.Sam2SgpApp)
    app._datastore = datastore
    app.app_dir, app.log_file = str(tmp_path), tmp_path / "server.log"
    is_remote = isinstance(datastore, DicomWebDatastore)
    app.settings = SimpleNamespace(
        max_upload_mb=1.0,
        max_image_mb=8.0,
        max_connections=9,
        max_connections_per_address=9,
        is_remote=is_remote,
        studies=str(tmp_path),
        state_dir=tmp_path / "state",
        audit_file=tmp_path / "audit.jsonl",
        progress_file=tmp_path / "progress.jsonl",
        value=lambda key: SCALE,
    )
    nothing = SimpleNamespace(ending=None, refresh=lambda: None, stats=dict, underway=None)
    app.segmenter, app.cases, app.usage = nothing, SimpleNamespace(prepare=lambda seconds: None), None
    app._trainers = {main.FINE_TUNING: nothing}

    async def start() -> None:
        app.on_init_complete()

    asyncio.run(start())
    found = {(method, route.path) for router in served for route in router.routes for method in route.methods}
    # What `serve_only` leaves of MONAI Label's own.
    found.add(("GET", FastAPI().openapi_url))
    return {f"{'GET' if method == 'HEAD' else method} {path}" for method, path in found}


def test_the_table_holds_every_route_of_the_app_and_no_other(tmp_path, monkeypatch):
    (tmp_path / "studies").mkdir()
    folder = ConfinedDatastore(str(tmp_path / "studies"), tmp_path / "work", 1 << 20)
    archive = DicomWebDatastore("http://127.0.0.1:9/dicom-web", tmp_path / "archive", 1 << 20)
    of_folder, of_archive = (routes_of_the_app(tmp_path, monkeypatch, store) for store in (folder, archive))
    assert "POST /sam2sgp/review/correct" in of_folder and "POST /auth/token" in of_folder
    assert "GET /proxy/dicom/{path:path}" in of_archive - of_folder
    assert of_folder | of_archive == NEEDED.keys()


def test_a_route_that_is_not_in_the_table_needs_an_admin_and_of_several_the_highest_counts():
    assert needed_for("GET", "/model/sam2sgp") is Role.admin and needed_for("PATCH", "/info/") is Role.admin
    assert needed_for("HEAD", "/datastore/image") is Role.reader and needed_for("GET", "/sam2sgp/health/live") is None
    # These are sent on to the address with the slash, or without it.
    assert needed_for("GET", "/sam2sgp") is Role.reader and needed_for("POST", "/train") is Role.admin
    assert needed_for("POST", "/train/finetune") is Role.admin and needed_for("POST", "/train/x/y") is Role.admin
    assert needed_for("POST", "/sam2sgp/approve\n") is Role.admin


# Roles over the routes


class Site:
    """The app's routes in front of a folder, with two pictures that have predictions."""

    def __init__(self, folder: Path, **given) -> None:
        studies = folder / "studies"
        (studies / "labels" / "original").mkdir(parents=True)
        for name in ("a", "b"):
            Image.new("L", (8, 6), 9).save(studies / f"{name}.png")
            Image.fromarray(np.eye(6, 8, dtype=np.uint8)).save(studies / "labels" / "original" / f"{name}.png")
        self.state = folder / "state"
        self.audit = Audit(self.state / "audit.jsonl")
        self.store = ConfinedDatastore(str(studies), self.state, 1 << 24, self.audit)
        self.infers: list[dict] = []
        self.tokens = Tokens(self.state)
        self.server = FastAPI()
        self.whoami = APIRouter()
        self.whoami.add_api_route("/info/", lambda: {"user": current_user.get()})
        install(self.server, Given(self.state, user_header=HEADER, **{"users": USERS, **given}))
        sessions = ConfinedSessions(str(folder / "sessions"), 3600, 1 << 20)

        def infer(request):
            self.infers.append(request)
            made = folder / "made.png"
            Image.new("L", (8, 6)).save(made)
            return {"file": str(made), "params": {"label_names": {}}}

        app = SimpleNamespace(
            infer=infer,
            next_sample=lambda request: {},
            settings=SimpleNamespace(
                max_upload_mb=1.0, max_image_mb=8.0, is_remote=False, studies=str(studies), state_dir=self.state
            ),
            datastore=lambda: self.store,
            sessions=lambda: sessions,
            info=lambda: {"trainers": {"finetune": {}}, "scoring": {"scores": {}}, "models": {"sam2sgp": {}}},
            on_save_label=lambda image, label: {"warnings": []},
        )
        state = SimpleNamespace(
            class_names={1: "liver"},
            segmentable={},
            adaptation=None,
            items=[],
            images={},
            cases=set(),
            errors=[],
            warnings=[],
            weights=None,
            scaling=SupportScaling(),
        )
        cases = SimpleNamespace(declared=dict)
        segmenter = SimpleNamespace(keep_up=lambda **_: True, state=lambda: state, cases=cases)
        usage = SimpleNamespace(counts=dict)
        review = ReviewPage(self.store, segmenter, sorted, self.audit.path, SCALE)
        page = SupportPage(self.store, segmenter, usage, sorted, dict)
        made = [self.whoami, routes(app), task_routes(app, Recorder()), page.router(), review.router()]
        serve_only(self.server, made)

    def client(self, user: str | None = None, **headers: str) -> TestClient:
        named = {HEADER: user} if user else {}
        return TestClient(self.server, base_url="http://server:8000", headers={**named, **headers})


@pytest.fixture
def site(tmp_path):
    return lambda **given: Site(tmp_path, **given)


def picture(value: int = 0) -> bytes:
    made = io.BytesIO()
    Image.new("L", (8, 6), value).save(made, "PNG")
    return made.getvalue()


def label(client, **query):
    files = {"label": ("label.png", picture(1))}
    return client.put("/datastore/label", params={"image": "a", **query}, files=files)


def infer(client, **params):
    return client.post("/infer/sam2sgp", params={"image": "a", "output": "json"}, data={"params": json.dumps(params)})


def decide(client, action: str, tag: str, image: str = "a"):
    return client.post(f"/sam2sgp/{action}", json={"image": image, "label_tag": tag})


def versions(client, image: str) -> list[dict]:
    return client.get("/sam2sgp/review/history", params={"image": image}).json()["versions"]


def paint(client, save_as: str, image: str = "a", value: int = 1):
    return client.post(
        "/sam2sgp/review/correct", json=correction(case(client, image), [{"slice": 0, "runs": [9, 2, value]}], save_as)
    )


BORDERS = {
    Role.reader: [
        ("info", lambda client: client.get("/info/")),
        ("list", lambda client: client.get("/datastore/")),
        ("an image", lambda client: client.get("/datastore/image", params={"image": "a"})),
        ("the queue", lambda client: client.get("/sam2sgp/review/queue")),
        ("a case", lambda client: client.get("/sam2sgp/review/case", params={"image": "a"})),
        ("the support page", lambda client: client.get("/sam2sgp/")),
        ("a segmentation", infer),
    ],
    Role.annotator: [
        ("a draft", lambda client: paint(client, "draft")),
        ("a prediction", lambda client: infer(client, save_label=True)),
        ("a label", lambda client: label(client, tag="original")),
        ("an upload", lambda client: client.put("/datastore/image", files={"file": ("new.png", picture())})),
        ("a session", lambda client: client.put("/session/", files={"files": ("new.png", picture())})),
        ("the next image", lambda client: client.post("/activelearning/random")),
    ],
    Role.approver: [
        ("approve", lambda client: decide(client, "approve", "original")),
        ("remove", lambda client: decide(client, "remove", "final")),
        ("restore", lambda client: decide(client, "restore", "removed")),
        ("reject", lambda client: decide(client, "reject", "original", "b")),
        ("a final label", lambda client: label(client, tag="final")),
        ("a removed label", lambda client: label(client, tag="removed")),
        ("a final prediction", lambda client: infer(client, save_label=True, label_tag="final")),
        # On a disk that knows no case it would be in the folder of the approved ones.
        ("a label called final", lambda client: label(client, tag="Final")),
        ("a final correction", lambda client: paint(client, "final")),
    ],
    Role.admin: [
        ("train", lambda client: client.post("/train/finetune")),
        ("score", lambda client: client.post("/scoring/scores")),
        ("batch", lambda client: client.post("/batch/infer/sam2sgp")),
        ("stop", lambda client: client.delete("/train/")),
        ("note", lambda client: client.put("/datastore/image/info", params={"image": "a"}, data={"info": "{}"})),
        ("delete a label", lambda client: client.delete("/datastore/label", params={"id": "a", "tag": "final"})),
        ("delete an image", lambda client: client.delete("/datastore/image", params={"id": "b"})),
    ],
}


def test_each_role_may_what_it_is_for_and_the_one_below_may_not(site):
    made = site()
    audit = made.audit.path
    for role, asked in BORDERS.items():
        users = [next(user for user, its in USERS.items() if its is below) for below in Role if below < role]
        below = [(None, made.client()), ("eve", made.client("eve")), *((user, made.client(user)) for user in users)]
        for what, ask in asked:
            before = made.store.tags(), made.store.records(), audit.read_bytes() if audit.exists() else b""
            for user, client in below:
                if what.endswith("correction") or what == "a draft":
                    # Who may not look can't know what to correct.
                    body = correction(case(made.client("rea"), "a"), [{"slice": 0, "runs": [9, 2, 1]}])
                    body["save_as"] = "final" if what.endswith("correction") else "draft"
                    answer = client.post("/sam2sgp/review/correct", json=body)
                else:
                    answer = ask(client)
                detail = answer.json()["detail"]
                assert answer.status_code == (403 if user else 401), (what, user, answer.text)
                assert "\n" not in detail, detail
                if USERS.get(user) == role - 1:
                    assert f"expected {role.name}" in detail, detail
                if user:
                    found = USERS[user].name if user in USERS else "none"
                    assert f"found {found} of '{user}'" in detail and "administrator of this server gives" in detail
                else:
                    assert "found no user; come through the reverse proxy, or with a token" in detail
            after = made.store.tags(), made.store.records(), audit.read_bytes() if audit.exists() else b""
            assert after == before, what
            answer = ask(made.client(next(user for user, its in USERS.items() if its is role)))
            assert answer.status_code == 200, (what, answer.text)


def test_nothing_of_a_request_is_read_before_its_role_is_known(site):
    def endless():
        yield b"{"
        raise AssertionError("the body was asked for")

    client = site().client("ann")
    answer = client.post("/sam2sgp/approve", content=endless(), headers={"content-length": "9"})
    assert answer.status_code == 403


def test_a_label_without_a_tag_is_final_or_what_the_client_may_save(site):
    made = site()
    answer = label(made.client("ann"))
    assert answer.status_code == 200 and "an approver has to approve it" in answer.json()["notice"]
    assert set(made.store.get_labels_by_image_id("a")) == {"original", "draft"}
    assert made.store.get_label_info("a", "draft")["user"] == "ann"
    assert label(made.client("ann"), tag="final").status_code == 403
    answer = label(made.client("ben"))
    assert "notice" not in answer.json() and "final" in made.store.get_labels_by_image_id("a")


def test_who_is_not_in_the_table_has_the_default_role_or_none_and_nobody_never_has_it(site):
    made = site(default_role=Role.annotator)
    assert label(made.client("eve"), tag="original").status_code == 200
    assert decide(made.client("eve"), "approve", "original").status_code == 403
    for client in (made.client(), made.client(**{HEADER: ""})):
        answer = client.get("/info/")
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
    assert made.client().get("/sam2sgp/health/live").status_code == 404


def test_a_header_that_comes_twice_is_believed_by_nobody(site):
    made = site()
    headers = [(HEADER, "ada"), (HEADER, "rea")]
    for sent in (headers, headers[::-1]):
        answer = made.client().get("/info/", headers=sent)
        assert answer.status_code == 403 and "expected it once" in answer.json()["detail"]
    for wrong in ("Ada", "ada,rea", "ada ada", "rea; ada"):
        assert made.client(wrong).get("/info/").status_code == 403


def test_names_of_other_alphabets_are_those_of_the_settings(site):
    made = site(users={"jürgen": Role.reader})
    client = TestClient(made.server, base_url="http://server:8000", headers={HEADER.encode(): "jürgen".encode()})
    assert client.get("/info/").json() == {"user": "jürgen"}


def test_without_roles_everybody_may_everything_and_the_log_says_so(site, caplog):
    caplog.set_level("INFO", "lib.http.guard")
    made = site(users=None)
    said = [record.message for record in caplog.records if record.name == "lib.http.guard"]
    assert said == [told(Given(made.state))]
    assert "everybody who reaches this server may do everything" in caplog.text
    for client in (made.client(), made.client("eve")):
        assert decide(client, "approve", "original").status_code == 200
        assert decide(client, "remove", "final").status_code == 200
        assert label(client, tag="original").status_code == 200
    assert client.post("/train/finetune").status_code == 200
    line = told(Given(made.state, users=USERS, default_role=Role.reader))
    assert "1 admin, 1 approver, 1 annotator, 1 reader; everybody else is reader" in line


# Tokens


def by(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def test_a_token_says_who_asks_and_nothing_else_does(site):
    made = site()
    text = made.tokens.add("nightly", Role.annotator)
    client = made.client("ada", **by(text))
    assert client.get("/info/").json() == {"user": "nightly"}
    assert decide(client, "approve", "original").status_code == 403
    assert paint(client, "draft").status_code == 200
    assert made.store.get_label_info("a", "draft")["user"] == "nightly"
    assert '"user": "nightly"' in made.audit.path.read_text()
    # As is, though the server runs.
    made.tokens.revoke("nightly")
    answer = client.get("/info/")
    assert answer.status_code == 401 and "found an unknown or revoked one" in answer.json()["detail"]


@pytest.mark.parametrize("users", [USERS, None])
def test_a_token_that_is_none_lets_nobody_in_whatever_else_comes_with_it(site, users):
    made = site(users=users)
    over = made.tokens.add("over", Role.admin, days=-1)
    good = made.tokens.add("good", Role.reader)
    wrong = [f"Bearer {over}", f"Bearer {good}x", f"Bearer {good[:-1]}", "Bearer", "bearer x", "BEARER  x", "Bearer é"]
    for sent in wrong:
        client = made.client("ada", Authorization=sent.encode("latin-1"))
        for path in ("/info/", "/sam2sgp/review/queue"):
            answer = client.get(path)
            assert answer.status_code == 401 and answer.json()["detail"].startswith("token: "), sent
    assert "whose time is over" in made.client(**by(over)).get("/info/").json()["detail"]
    # It restricts a script also where people are not.
    assert made.client(**by(good)).get("/info/").status_code == 200
    assert decide(made.client(**by(good)), "approve", "original").status_code == 403
    # A password is not for the app.
    assert made.client("ada", Authorization="Basic YTpi").get("/info/").status_code == 200


def test_tokens_that_can_not_be_read_let_nobody_in_and_leave_the_others_alone(site):
    made = site()
    text = made.tokens.add("nightly", Role.admin)
    (made.state / "tokens.json").write_text('[{"name": "nightly"}]')
    answer = made.client("ada", **by(text)).get("/info/")
    assert answer.status_code == 503 and "damaged or unreadable" in answer.json()["detail"]
    assert made.client("ada").get("/info/").status_code == 200


# What the pages offer


def test_the_pages_say_what_their_user_may_not_do(site):
    made = site()
    told_to = {user: made.client(user).get("/sam2sgp/review/queue").json()["not_offered"] for user in USERS}
    assert set(told_to["rea"]) == {
        "segment",
        "draft",
        "bring_back",
        "batch",
        "adapt",
        "approve",
        "reject",
        "remove",
        "restore",
    }
    assert set(told_to["ann"]) == {"batch", "adapt", "approve", "reject", "remove", "restore"}
    assert "needs the role approver; yours is annotator" in told_to["ann"]["approve"]
    assert set(told_to["ben"]) == {"batch", "adapt"} and told_to["ada"] == {}
    assert made.client("rea").get("/sam2sgp/").text.count("disabled title=") == 5
    assert made.client("ben").get("/sam2sgp/").text.count("disabled title=") == 1
    assert "disabled" not in made.client("ada").get("/sam2sgp/").text


# The second pair of eyes


def test_nobody_approves_what_he_changed_himself(site):
    made = site()
    made.store.approve_own = False
    ben, ada = made.client("ben"), made.client("ada")
    answer = paint(ben, "final")
    assert answer.status_code == 200
    assert answer.json()["label_tag"] == "draft" and answer.json()["notice"] == SECOND_PAIR
    assert set(made.store.get_labels_by_image_id("a")) == {"original", "draft"}
    drawn = read_label(made.store.get_label_uri("a", "draft"))
    assert drawn.reshape(-1)[9:11].tolist() == [1, 1]
    refused = decide(ben, "approve", "draft")
    assert refused.status_code == 403 and "somebody else than its author" in refused.json()["detail"]
    # Going on with it is no way around.
    assert paint(ben, "final").json()["label_tag"] == "draft"
    assert decide(ada, "approve", "draft").status_code == 200
    assert np.array_equal(read_label(made.store.get_label_uri("a", "final")), drawn)
    # Neither is removing it and having it restored, or submitting it from a viewer.
    assert decide(ben, "remove", "final").status_code == 200 and decide(ben, "restore", "removed").status_code == 403
    assert decide(ada, "restore", "removed").status_code == 200
    answer = label(ben, image="b")
    assert answer.json()["notice"] == SECOND_PAIR
    assert set(made.store.get_labels_by_image_id("b")) == {"original", "draft"}
    assert label(ben, image="b", tag="other").status_code == 200
    for tag in ("draft", "other"):
        assert decide(ben, "approve", tag, "b").status_code == 403
    # Nor is a note, which leaves a label its author.
    note = {"params": {"label": "b", "tag": "draft"}, "data": {"info": '{"note": "x"}'}}
    assert ada.put("/datastore/label/info", **note).status_code == 200
    assert decide(ben, "approve", "draft", "b").status_code == 403
    assert paint(ada, "draft", "b").status_code == 200
    # Nor is having somebody bring back what one made, who is its author no more than before.
    shown = case(ada, "b")
    version = next(entry["version"] for entry in versions(ada, "b") if entry["tag"] == "draft")
    body = {"image": "b", "image_seen": shown["image_seen"], "version": version, "replaces": shown["labels"]["draft"]}
    assert ada.post("/sam2sgp/review/bring_back", json=body).status_code == 200
    assert decide(ben, "approve", "draft", "b").status_code == 403
    # A prediction that nobody changed is anybody's.
    assert decide(ben, "approve", "original", "b").status_code == 200


def test_a_draft_that_came_meanwhile_is_not_replaced_by_what_was_to_be_approved(site):
    made = site()
    made.store.approve_own = False
    ben = made.client("ben")
    body = correction(case(ben, "a"), [{"slice": 0, "runs": [0, 2, 1]}], "final")
    assert paint(made.client("ann"), "draft").status_code == 200
    before = Path(made.store.get_label_uri("a", "draft")).read_bytes()
    answer = ben.post("/sam2sgp/review/correct", json=body)
    assert answer.status_code == 409 and "found another one" in answer.json()["detail"]
    assert Path(made.store.get_label_uri("a", "draft")).read_bytes() == before


def test_where_approvals_are_ones_own_affair_nothing_changes(site):
    ben = site().client("ben")
    answer = paint(ben, "final")
    assert answer.json()["label_tag"] == "final" and "notice" not in answer.json()
