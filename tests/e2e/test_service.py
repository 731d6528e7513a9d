"""The server as an administrator runs it: by a settings file, watched, saved while it serves, and stopped."""

import ast
import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import requests

from lib.http.metrics import DECISIONS
from sam2sgp.data import load_datalist
from sam2sgp.data.phantom import make_phantoms
from tests.app.http.test_metrics import values
from tests.e2e.server import Server

APPROVED, WAITING = "us_000_0", "us_001_0"


class Service(Server):
    """A server that `sam2sgp serve --settings` starts."""

    def command(self, port: int) -> list[str]:
        settings = self.folder / "my settings.toml"
        values = {"studies": str(self.studies), "port": port, "state_dir": "my state", "image_size": 64}
        lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
        settings.write_text("\n".join([*lines, "ct_window = [-100, 300]"]))
        return [sys.executable, str(self.app / "manage.py"), "serve", "--settings", str(settings)]


@pytest.fixture(scope="module")
def known(tmp_path_factory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("phantoms")
    make_phantoms(folder, 4, size=(64, 64), num_slices=6, modalities=("us",), progress=False)
    return {case["name"]: case for case in load_datalist(folder)}


@pytest.fixture(scope="module")
def server(tmp_path_factory, known):
    folder = tmp_path_factory.mktemp("service")
    studies = folder / "my studies"
    (studies / "labels" / "final").mkdir(parents=True)
    for name in (APPROVED, WAITING):
        shutil.copy(known[name]["image"], studies)
    shutil.copy(known[APPROVED]["label"], studies / "labels" / "final")
    made = Service(folder, studies)
    made.state = folder / "my state"
    try:
        yield made.start({"MONAI_LABEL_AUTO_UPDATE_SCORING": "false", "MONAI_LABEL_SESSION_PATH": ""})
    finally:
        made.stop()


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if "__pycache__" not in path.parts}


def test_the_settings_file_counts_and_the_codes_folder_stays_as_it_is(server):
    info = requests.get(f"{server.url}/info/", timeout=60).json()
    assert info["datastore"]["total"] == 2 and info["datastore"]["completed"] == 1
    [conf] = re.findall(r"USING:: conf = (.+)", server.log.read_text())
    assert dict(ast.literal_eval(conf)) == {"state_dir": str(server.state), "image_size": 64, "ct_window": [-100, 300]}
    repository = Path(__file__).parents[2] / "apps" / "sam2sgp"
    made = {name for name in files(server.app) if name.split("/")[0] in ("logs", "model", "bin")}
    assert made == set() and files(server.app) <= files(repository)
    assert server.state.stat().st_mode & 0o777 == 0o700
    assert {"app", "logs", "sessions"} <= {path.name for path in server.state.iterdir()}
    assert (server.state / "logs" / "server.log").stat().st_mode & 0o777 == 0o600


def test_it_says_that_it_lives_and_is_ready(server):
    assert requests.get(f"{server.url}/sam2sgp/health/live", timeout=60).json() == {"status": "live"}
    answer = requests.get(f"{server.url}/sam2sgp/health/ready", timeout=60)
    assert answer.status_code == 200 and set(answer.json()["checks"].values()) == {"ok"}


def test_what_is_done_is_counted(server):
    def told() -> dict[str, float]:
        return values(requests.get(f"{server.url}/sam2sgp/metrics", timeout=60).text)

    before = told()
    paths = requests.get(f"{server.url}/openapi.json", timeout=60).json()["paths"]
    assert {path for _, path in DECISIONS} <= paths.keys() and "/infer/{model}" in paths
    answer = requests.post(
        f"{server.url}/infer/sam2sgp?image={WAITING}&output=json",
        data={"params": json.dumps({"save_label": True})},
        timeout=120,
    )
    assert answer.status_code == 200, answer.text
    decision = {"image": WAITING, "label_tag": "original"}
    assert requests.post(f"{server.url}/sam2sgp/approve", json=decision, timeout=60).ok
    assert requests.post(f"{server.url}/sam2sgp/approve", json=decision, timeout=60).status_code == 422
    after = told()
    gained = {name: after[name] - before.get(name, 0) for name in after if after[name] != before.get(name, 0)}
    assert gained["sam2sgp_segmentations_total{outcome=done}"] == 1
    assert 0 < gained["sam2sgp_segmentation_duration_seconds_sum"] < 60
    assert gained["sam2sgp_decisions_total{action=approve}"] == 1 and gained["sam2sgp_approved_images"] == 1
    approve = "sam2sgp_http_requests_total{method=POST}{route=/sam2sgp/approve}"
    assert gained[f"{approve}{{status=200}}"] == gained[f"{approve}{{status=422}}"] == 1
    assert after["sam2sgp_segmentations_waiting"] == 0 and after["sam2sgp_images"] == 2


def test_told_to_stop_it_ends_within_seconds(server):
    started = time.monotonic()
    os.kill(server.process.pid, signal.SIGTERM)
    server.process.wait(30)
    assert time.monotonic() - started < 15
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{server.url}/sam2sgp/health/live", timeout=5)
