"""Fine-tuning over HTTP: followed, killed with its server, gone on with, stopped, and undone."""

import hashlib
import json
import os
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
import requests

from lib.weights import Weights
from sam2sgp.data import load_datalist
from sam2sgp.data.phantom import make_phantoms
from tests.e2e.server import serving

REQUEST = {"max_epochs": 2, "episodes_per_epoch": 4, "learning_rate": 1e-3}
SMALL = {"image_size": "64", "three_d_memory": "false", "region_below": "0", "k": "2"}


@pytest.fixture(scope="module")
def studies(tmp_path_factory) -> Path:
    """A picture of each of six patients, all with approved labels."""
    root = tmp_path_factory.mktemp("training")
    phantoms = make_phantoms(root / "set", 6, size=(64, 64), num_slices=6, modalities=("us",), progress=False)
    folder = root / "studies"
    (folder / "labels" / "final").mkdir(parents=True)
    for case in {case["patient"]: case for case in load_datalist(phantoms)}.values():
        shutil.copy(case["image"], folder)
        shutil.copy(case["label"], folder / "labels" / "final" / Path(case["image"]).name)
    return folder


def content(folder: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*.png")}


def post(server, request: dict, sync: bool = False) -> requests.Response:
    return requests.post(
        f"{server.url}/train/finetune", params={"run_sync": sync, "enqueue": sync}, json=request, timeout=120
    )


def get(server, path: str) -> dict:
    response = requests.get(server.url + path, timeout=60)
    response.raise_for_status()
    return response.json()


def stats(server) -> dict:
    return get(server, "/info/")["train_stats"]["finetune"]


def wait_for(server, condition) -> dict:
    limit = time.monotonic() + 150
    while not condition(found := stats(server)):
        assert time.monotonic() < limit and found.get("state") != "failed", (found, get(server, "/train/"))
        time.sleep(0.2)
    return found


def wait_until_gone(pid: int) -> None:
    limit = time.monotonic() + 30
    # Where nobody collects the children of a killed process, a zombie is left.
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < limit, f"process {pid} goes on without its server"
        time.sleep(0.2)


def test_training_survives_the_kill_of_its_server_is_stopped_and_weights_are_undone(studies, tmp_path):
    labels = content(studies)
    with serving(tmp_path, studies, SMALL) as server:
        assert "state" not in stats(server)
        assert get(server, "/info/")["trainers"]["finetune"]["config"]["action"] == ["train", "roll_back"]
        refused = post(server, {"action": "roll_back"}, sync=True)
        assert refused.status_code == 409 and "none before" in refused.json()["detail"]

        assert post(server, REQUEST).ok
        running = wait_for(server, lambda found: found.get("epoch") == 1)
        assert running["state"] == "running" and 0 < running["best_metric"] <= 1 and running["loss"] > 0
        training = json.loads((server.state / "training" / "status.json").read_text())["pid"]
        os.kill(server.process.pid, signal.SIGKILL)
        wait_until_gone(training)
        server.stop()
        assert content(studies) == labels

        server.start()
        stopped = stats(server)
        assert "after 1 of 2 epochs" in stopped["message"] and stopped["weights"]["version"] == "embedded"
        assert post(server, REQUEST).ok
        wait_for(server, lambda found: found["state"] == "running" and "goes on" in found["message"])
        assert requests.delete(f"{server.url}/train/", timeout=60).json()["status"] == "STOPPED"
        stopped = wait_for(server, lambda found: found["state"] == "stopped")
        assert stopped["weights"]["version"] == "embedded"

        weights = Weights(server.state / "weights", server.folder / "bundle" / "models" / "model.pt")
        weights.publish(weights.start, {"dice": 0.5})
        assert stats(server)["weights"]["metrics"] == {"dice": 0.5}
        assert post(server, {"action": "roll_back"}, sync=True).json()["state"] == "rolled_back"
        assert stats(server)["weights"]["version"] == "embedded"
        written = [json.loads(line) for line in (server.state / "audit.jsonl").read_text().splitlines()]
        assert [line["resumed"] for line in written if "resumed" in line] == [False, True]
        assert sum(line["action"] == "roll_back" for line in written) == 1
    assert content(studies) == labels
