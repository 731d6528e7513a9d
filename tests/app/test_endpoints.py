"""Routes of the app's own ask for a login where MONAI Label's do, and say what is wrong with an upload."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fastapi import FastAPI
from monailabel.config import settings as server_settings
from monailabel.endpoints.user.auth import RBAC
from PIL import Image
from starlette.testclient import TestClient

from lib.dicomweb import DicomWebDatastore
from lib.endpoints import routes
from lib.page import SupportPage


@pytest.fixture
def app(tmp_path):
    """An app whose segmentations are a picture, and that keeps the requests it got."""
    asked = []

    def infer(request):
        made = tmp_path / "made.png"
        Image.fromarray(np.eye(8, dtype=np.uint8)).save(made)
        asked.append(request)
        return {"file": str(made), "params": {"label_names": {"disc": 1}}}

    datastore = DicomWebDatastore("http://127.0.0.1:9/dicom-web", tmp_path / "archive", 1 << 20)
    settings = SimpleNamespace(max_upload_mb=1.0)
    return SimpleNamespace(infer=infer, asked=asked, settings=settings, datastore=lambda: datastore, sessions=dict)


def roles(route) -> set[str]:
    return {depends.call.roles for depends in route.dependant.dependencies if isinstance(depends.call, RBAC)}


def test_every_route_asks_for_the_login_that_monai_label_is_set_up_for(app):
    page = SupportPage(app.datastore(), None, None, sorted, dict)
    found = {route.path: roles(route) for route in [*routes(app).routes, *page.router().routes]}
    assert {"/infer/{model}", "/datastore/image", "/proxy/dicom/{path:path}", "/sam2sgp/"} <= set(found)
    user, annotator = server_settings.MONAI_LABEL_AUTH_ROLE_USER, server_settings.MONAI_LABEL_AUTH_ROLE_ANNOTATOR
    assert all(user in asked for asked in found.values())
    assert all(annotator in found[f"/sam2sgp/{name}"] for name in ("approve", "reject", "remove", "restore"))


def test_a_result_is_sent_and_neither_it_nor_the_upload_is_kept(app, tmp_path):
    server = FastAPI()
    server.include_router(routes(app))
    client = TestClient(server)
    Image.new("L", (8, 8)).save(tmp_path / "mine.png")
    files = {"file": ("mine.png", (tmp_path / "mine.png").read_bytes())}
    answer = client.post("/infer/x", params={"output": "image"}, data={"params": '{"k": 3}'}, files=files)
    assert answer.headers["content-type"] == "image/png" and answer.content.startswith(b"\x89PNG")
    assert client.post("/infer/x", params={"output": "json"}).json() == {"label_names": {"disc": 1}}
    both = client.post("/infer/x", params={"image": "a"})
    assert both.headers["content-type"].startswith("multipart/form-data") and b"label_names" in both.content
    upload, *_ = (request["image"] for request in app.asked)
    assert [request.get("k") for request in app.asked] == [3, None, None]
    assert upload.endswith("image.png") and app.asked[2]["image"] == "a"
    assert not (tmp_path / "made.png").exists() and not Path(upload).exists()
