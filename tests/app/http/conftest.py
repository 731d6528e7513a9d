"""The app's routes in front of parts that note what reached them."""

from types import SimpleNamespace

import numpy as np
import pytest
from fastapi import FastAPI
from PIL import Image
from starlette.testclient import TestClient

from lib.checks import NotFound
from lib.http.endpoints import routes
from lib.http.guard import install, serve_only
from lib.http.task_endpoints import task_routes
from lib.http.viewers import viewer_routes
from lib.stores.folder import ConfinedDatastore
from lib.stores.sessions import ConfinedSessions
from tests.helpers.parts import Given, Recorder


@pytest.fixture
def app(tmp_path):
    """An app whose segmentations are a picture, and that keeps the requests it got."""
    asked = []

    def infer(request):
        made = tmp_path / "made.png"
        Image.fromarray(np.eye(8, dtype=np.uint8)).save(made)
        asked.append(request)
        return {"file": str(made), "params": {"label_names": {"disc": 1}}}

    def next_sample(request):
        if request["strategy"] != "random":
            raise NotFound("strategy: expected one of random, found another.")
        asked.append(request)
        return {"id": "a"}

    studies = tmp_path / "studies"
    studies.mkdir()
    Image.new("L", (8, 8)).save(studies / "a.png")
    datastore = ConfinedDatastore(str(studies), tmp_path / "work", 1 << 20)
    sessions = ConfinedSessions(str(tmp_path / "sessions"), 3600, 1 << 20)
    return SimpleNamespace(
        infer=infer,
        next_sample=next_sample,
        asked=asked,
        settings=SimpleNamespace(
            max_upload_mb=1.0, max_image_mb=8.0, is_remote=False, studies=str(studies), state_dir=tmp_path / "work"
        ),
        datastore=lambda: datastore,
        sessions=lambda: sessions,
        info=lambda: {"trainers": {"finetune": {}, "adapt": {}}, "scoring": {"scores": {}}, "models": {"sam2sgp": {}}},
        on_save_label=lambda image, label: {"warnings": []},
        studies=studies,
        tasks=Recorder(),
    )


@pytest.fixture
def client(app, tmp_path):
    server = FastAPI()
    install(server, Given(tmp_path))
    serve_only(server, [routes(app), task_routes(app, app.tasks), viewer_routes(app)])
    return TestClient(server, base_url="http://server:8000")
