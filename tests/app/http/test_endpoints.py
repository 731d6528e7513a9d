"""The app's routes over HTTP, in front of parts that note what reached them."""

import io
import json
import os
import zipfile
from pathlib import Path

import pytest
from monailabel.config import settings as server_settings
from monailabel.endpoints.user.auth import RBAC

from lib.http.access import NEEDED
from lib.http.endpoints import routes
from lib.http.logs import log_routes
from lib.http.loop import loop_routes
from lib.http.metrics import metrics_routes
from lib.http.page import SupportPage
from lib.http.review import ReviewPage
from lib.http.task_endpoints import task_routes
from lib.http.viewers import viewer_routes
from lib.roles import Role
from lib.stores.dicomweb import DicomWebDatastore
from sam2sgp.transforms import ScaleIntensityByModalityd
from tests.helpers.parts import TASK_PATHS, assert_refused

EVIL = "/tmp/evil"
# In each of them MONAI Label finds its option `bundle_path`, a folder that joins the search path of a process.
SHAPES = [
    {"bundle_path": EVIL},
    [["bundle_path", EVIL]],
    [[["bundle_path", EVIL]]],
    {"finetune": [["bundle_path", EVIL]]},
    {"finetune": {"bundle_path": EVIL}},
    {"finetune": [[["bundle_path", EVIL]]]},
    {"scores": [["bundle_path", EVIL]]},
    {"scores": {"bundle_path": EVIL}},
    {"sam2sgp": [["bundle_path", EVIL]]},
    {"params": {"bundle_path": EVIL}},
    {"request": {"model": {"bundle_path": EVIL}}},
    {"model": "finetune", "bundle_path": EVIL},
    {"Bundle_Path": EVIL},
    ["bundle_path", EVIL],
    "bundle_path",
    7,
    True,
]


def roles(route) -> set[str]:
    return {depends.call.roles for depends in route.dependant.dependencies if isinstance(depends.call, RBAC)}


def test_every_route_asks_for_the_role_of_monai_labels_login_that_the_table_has_for_it(app, tmp_path):
    archive = DicomWebDatastore("http://127.0.0.1:9/dicom-web", tmp_path / "archive", 1 << 20)
    app.datastore = lambda: archive
    page = SupportPage(archive, None, None, sorted, dict)
    review = ReviewPage(archive, None, sorted, tmp_path / "audit.jsonl", ScaleIntensityByModalityd())
    made = [routes(app), task_routes(app, app.tasks), viewer_routes(app), log_routes(Path("server.log"))]
    made += [page.router(), review.router()]
    made += [metrics_routes(None), loop_routes(None, None, None, tmp_path / "batch.json")]
    found = {
        f"{'GET' if method == 'HEAD' else method} {route.path}": roles(route)
        for router in made
        for route in router.routes
        for method in route.methods
    }
    # All that the table has, but for MONAI Label's login itself, what FastAPI answers and what needs nobody's.
    missing = NEEDED.keys() - found.keys()
    assert missing == {"GET /openapi.json", *(place for place, role in NEEDED.items() if role is None)}
    user, annotator, admin = (
        server_settings.MONAI_LABEL_AUTH_ROLE_USER,
        server_settings.MONAI_LABEL_AUTH_ROLE_ANNOTATOR,
        server_settings.MONAI_LABEL_AUTH_ROLE_ADMIN,
    )
    asked = {
        Role.reader: {user},
        Role.annotator: {user, annotator},
        Role.approver: {user, annotator},
        Role.admin: {user, admin},
    }
    assert found == {place: asked[NEEDED[place]] for place in found}


@pytest.mark.parametrize("path", TASK_PATHS)
def test_no_shape_of_a_request_brings_a_folder_to_a_task(client, app, path):
    for body in SHAPES:
        assert_refused(client.post(path, json=body))
        # The same as text, and as a form.
        text = json.dumps(body)
        assert client.post(path, content=text, headers={"content-type": "text/plain"}).status_code >= 400, body
        assert client.post(path, data={"params": text, "bundle_path": EVIL}).status_code >= 400, body
    assert client.post(path, content='{"device": "cpu", "device": {"bundle_path": "/tmp/evil"}}').status_code == 400
    assert client.post(path, params={"bundle_path": EVIL}).status_code >= 400
    assert app.tasks.started == []


def test_no_shape_of_a_request_brings_a_foreign_option_to_a_segmentation(client, app):
    for body in SHAPES:
        text = json.dumps(body)
        for form in ({"params": text}, {"wsi": text}, {"params": "{}", "request": text}):
            assert_refused(client.post("/infer/sam2sgp", params={"image": "a"}, data=form))
        assert_refused(client.post("/activelearning/random", json=body))
    assert_refused(client.post("/infer/sam2sgp", params={"image": "a"}, data={"bundle_path": EVIL}))
    assert_refused(client.post("/infer/sam2sgp", params={"image": "a"}, files={"params": ("p.png", b"{}")}))
    assert_refused(client.post("/infer/sam2sgp", params={"image": "a", "bundle_path": EVIL}))
    assert app.asked == []


def test_a_path_of_a_client_stays_text_and_only_the_servers_own_are_paths(client, app, tmp_path):
    assert_refused(client.post("/infer/x", params={"image": "/etc/passwd"}))
    client.post("/infer/x", params={"image": "a"})
    picture = (app.studies / "a.png").read_bytes()
    client.post("/infer/x", files={"file": ("mine.png", picture)})
    session = client.put("/session/", files={"files": ("mine.png", picture)}).json()["session_id"]
    client.post("/infer/x", params={"image": "a", "session_id": session})
    assert [type(request["image"]).__name__ for request in app.asked] == ["str", "PosixPath", "PosixPath"]


def test_a_result_is_sent_and_neither_it_nor_the_upload_is_kept(client, app, tmp_path):
    files = {"file": ("mine.png", (app.studies / "a.png").read_bytes())}
    answer = client.post("/infer/x", params={"output": "image"}, data={"params": '{"k": 3}'}, files=files)
    assert answer.headers["content-type"] == "image/png" and answer.content.startswith(b"\x89PNG")
    assert client.post("/infer/x?image=a", params={"output": "json"}).json() == {"label_names": {"disc": 1}}
    both = client.post("/infer/x", params={"image": "a"})
    assert both.headers["content-type"].startswith("multipart/form-data") and b"label_names" in both.content
    upload, *_ = (request["image"] for request in app.asked)
    assert [request.get("k") for request in app.asked] == [3, None, None]
    assert upload.name == "image.png" and app.asked[2]["image"] == "a"
    assert not (tmp_path / "made.png").exists() and not Path(upload).exists()


def test_a_submitted_label_is_of_the_user_that_the_proxy_names(client, app):
    files = {"label": ("label.png", (app.studies / "a.png").read_bytes())}
    for user in ("ann", "ben"):
        headers = {"X-Forwarded-User": user}
        assert client.put("/datastore/label?image=a&tag=draft", files=files, headers=headers).status_code == 200
    assert app.datastore().get_label_info("a", "draft")["user"] == "ben"
    assert [(entry["tag"], entry["user"]) for entry in app.datastore().history.versions("a")] == [("draft", "ann")]


def test_no_answer_tells_where_something_is_on_the_server(client, app, tmp_path):
    picture = (app.studies / "a.png").read_bytes()
    assert client.put("/datastore/label?image=a", files={"label": ("C:\\me\\l.png", picture)}).status_code == 200
    client.put("/datastore/?image=b", files={"file": ("/home/me/b.png", picture)})
    session = client.put("/session/", files={"files": ("mine.png", picture)}, data={"client_id": "x"}).json()
    answers = [
        session,
        client.get(f"/session/{session['session_id']}").json(),
        client.get("/datastore/?output=all").json(),
        client.get("/datastore/?output=train").json(),
        client.get("/datastore/image/info?image=a").json(),
        client.get("/datastore/label/info?label=a&tag=final").json(),
        client.get("/datastore/image?image=nobody").json(),
        client.get("/openapi.json").json(),
    ]
    assert str(tmp_path) not in json.dumps(answers)
    assert session["session_info"]["image"] == "mine.png"
    assert answers[3] == [{"image": "a.png", "label": "labels/final/a.png"}]
    # What Slicer needs to load it: the name with its suffix, and the file.
    assert answers[4]["name"] == "a.png" and client.get("/datastore/image?image=a").content == picture


def test_notes_may_not_pass_for_what_the_server_knows(client):
    for name in ("path", "id", "ts", "name"):
        assert_refused(client.put("/datastore/image/info?image=a", data={"info": json.dumps({name: "x"})}))
    deep = "[" * 200 + "]" * 200
    assert_refused(client.put("/datastore/image/info?image=a", data={"info": f'{{"x": {deep}}}'}))
    assert client.put("/datastore/image/info?image=a", data={"info": '{"ward": "7"}'}).status_code == 200
    assert client.get("/datastore/image/info?image=a").json()["ward"] == "7"


def test_what_monai_label_would_answer_beyond_the_apps_routes_is_not_there(client):
    for asked in (
        "POST /reload",
        "GET /docs",
        "GET /static/ohif/index.html",
        "GET /logs/gpu",
        "PUT /model/sam2sgp",
        "GET /model/sam2sgp",
        "POST /infer/wsi/sam2sgp",
        "POST /infer/wsi_v2/sam2sgp",
        "PUT /datastore/updatelabelinfo?label=a&tag=final",
        "DELETE /datastore/?id=a",
        "GET /proxy/dicom/studies",
        "POST /proxy/dicom/studies",
        "PATCH /info/",
    ):
        method, path = asked.split()
        assert client.request(method, path).status_code in (404, 405), asked


def test_a_file_is_sent_whole_and_from_its_folder_whatever_comes_to_its_place(client, app, tmp_path, monkeypatch):
    expected = (app.studies / "a.png").read_bytes()
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"secret")
    found = app.datastore().get_image_uri
    swapped = {"removed": lambda path: None, "a link out": lambda path: path.symlink_to(secret), "a pipe": os.mkfifo}
    for what, make in swapped.items():

        def swap(image_id, make=make):
            """Between the look-up and the answer."""
            path = found(image_id)
            os.unlink(path)
            make(Path(path))
            return path

        monkeypatch.setattr(app.datastore(), "get_image_uri", swap)
        answer = client.get("/datastore/image?image=a")
        assert answer.status_code == 404 and b"secret" not in answer.content, what
        monkeypatch.setattr(app.datastore(), "get_image_uri", found)
        (app.studies / "a.png").unlink(missing_ok=True)
        (app.studies / "a.png").write_bytes(expected)
    answer = client.get("/datastore/image?image=a")
    assert answer.content == expected and answer.headers["content-length"] == str(len(expected))
    assert client.head("/datastore/image?image=a").headers["content-length"] == str(len(expected))
    part = client.get("/datastore/image?image=a", headers={"Range": "bytes=0-3"})
    assert part.content == expected[:4]


def test_an_archive_of_the_data_set_holds_files_of_the_folder_only(client, app, tmp_path, monkeypatch):
    label = app.studies / "labels" / "final" / "a.png"
    label.parent.mkdir(parents=True, exist_ok=True)
    label.write_bytes((app.studies / "a.png").read_bytes())
    (tmp_path / "secret.png").write_bytes(b"secret")
    found = app.datastore().datalist

    answer = client.get("/datastore/dataset")
    assert answer.status_code == 200 and zipfile.ZipFile(io.BytesIO(answer.content)).testzip() is None
    for make in (lambda path: path.symlink_to(tmp_path / "secret.png"), os.mkfifo):

        def swap(make=make):
            """Between the list and the archive."""
            pairs = found()
            label.unlink(missing_ok=True)
            make(label)
            return pairs

        monkeypatch.setattr(app.datastore(), "datalist", swap)
        answer = client.get("/datastore/dataset")
        assert answer.status_code == 507 and b"secret" not in answer.content
        label.unlink()
        label.write_bytes((app.studies / "a.png").read_bytes())
