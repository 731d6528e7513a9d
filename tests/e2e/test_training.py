"""Fine-tuning over HTTP: followed, killed with its server, gone on with, stopped, published, and undone.

Meanwhile requests get the answers that they got before, until other weights serve with tokens of their own.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
import requests
from monailabel.client import MONAILabelClient

from sam2sgp.data import load_datalist
from sam2sgp.data.phantom import make_phantoms
from tests.e2e.server import serving
from tests.helpers.spoilt import save_spoilt_weights

REQUEST = {"max_epochs": 2, "episodes_per_epoch": 12, "learning_rate": 3e-3}
SMALL = {"image_size": "64", "three_d_memory": "false", "region_below": "0", "k": "8"}
QUERY, FRESH = "us_005_0", "us_004_0"
# Seconds: a training comes after all else that a machine has to do.
PATIENCE = 600.0


@pytest.fixture(scope="module")
def studies(tmp_path_factory) -> Path:
    """A picture of each of six patients, with approved labels, and two more without."""
    root = tmp_path_factory.mktemp("training")
    phantoms = make_phantoms(root / "set", 6, size=(64, 64), num_slices=6, modalities=("us",), progress=False)
    folder = root / "studies"
    (folder / "labels" / "final").mkdir(parents=True)
    cases = load_datalist(phantoms)
    for case in {case["patient"]: case for case in cases}.values():
        shutil.copy(case["image"], folder)
        shutil.copy(case["label"], folder / "labels" / "final" / Path(case["image"]).name)
    for case in cases:
        if case["name"] in (QUERY, FRESH):
            shutil.copy(case["image"], folder)
            shutil.copy(case["label"], root / f"{case['name']}.png")
    return folder


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory) -> Path:
    return save_spoilt_weights(tmp_path_factory.mktemp("spoilt") / "model.pt")


def content(folder: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*.png")}


def post(server, request: dict) -> requests.Response:
    return requests.post(f"{server.url}/train/finetune", params={"enqueue": True}, json=request, timeout=120)


def get(server, path: str) -> dict:
    response = requests.get(server.url + path, timeout=60)
    response.raise_for_status()
    return response.json()


def stats(server) -> dict:
    return get(server, "/info/")["train_stats"]["finetune"]


def wait_for(server, condition) -> dict:
    limit = time.monotonic() + PATIENCE
    while not condition(found := stats(server)):
        assert time.monotonic() < limit and found.get("state") != "failed", (found, get(server, "/train/"))
        time.sleep(0.2)
    return found


def segment(server, folder: Path) -> tuple[str, set[str], bytes]:
    """The weights that an answer names, the images that guided it, and the result, of one request."""
    folder.mkdir(exist_ok=True)
    label, params = MONAILabelClient(server.url, str(folder)).infer("sam2sgp", QUERY, {"result_extension": ".png"})
    guides = {item["image"] for items in params["support"].values() for item in items}
    return params["weights"], guides, Path(label).read_bytes()


def wait_for_weights(server, folder: Path, name: str, until_then: tuple) -> tuple:
    """The first answer with other weights; all before it are as they were until then."""
    limit = time.monotonic() + PATIENCE
    while (found := segment(server, folder))[0] != name:
        assert found == until_then and time.monotonic() < limit
        # Tokens are made between requests.
        time.sleep(0.2)
    return found


def wait_until_gone(pid: int) -> None:
    limit = time.monotonic() + 30
    # Where nobody collects the children of a killed process, a zombie is left.
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < limit, f"process {pid} goes on without its server"
        time.sleep(0.2)


@pytest.mark.slow
def test_training_survives_the_kill_of_its_server_is_stopped_and_its_weights_are_used_and_undone(
    studies, spoilt, tmp_path
):
    labels, answers = content(studies), tmp_path / "answers"
    approved = {path.stem for path in (studies / "labels" / "final").iterdir()}
    conf, unscored = {**SMALL, "model_file": str(spoilt)}, {"MONAI_LABEL_AUTO_UPDATE_SCORING": "false"}
    with serving(tmp_path, studies, conf, unscored) as server:
        before = segment(server, answers)
        assert before[:2] == ("embedded", approved)
        assert "state" not in stats(server)
        assert get(server, "/info/")["trainers"]["finetune"]["config"]["action"] == ["train", "roll_back"]

        assert post(server, REQUEST).ok
        # It has read its labels.
        wait_for(server, lambda found: "epoch" in found)
        # Requests meanwhile: the same answer, and a label approved now counts now.
        assert segment(server, answers) == before
        with open(studies.parent / f"{FRESH}.png", "rb") as file:
            url = f"{server.url}/datastore/label?image={FRESH}&tag=final"
            assert requests.put(url, files={"label": file}, timeout=60).ok
        assert segment(server, answers)[1] == {*approved, FRESH}
        assert requests.delete(f"{server.url}/datastore/label?id={FRESH}&tag=final", timeout=60).ok
        assert segment(server, answers) == before
        running = wait_for(server, lambda found: found["epoch"] >= 1)
        assert running["state"] == "running" and 0 < running["best_metric"] <= 1 and running["loss"] > 0
        training = json.loads((server.state / "training" / "status.json").read_text())["pid"]
        os.kill(server.process.pid, signal.SIGKILL)
        wait_until_gone(training)
        server.stop()
        assert content(studies) == labels

        server.start(unscored)
        stopped = stats(server)
        assert re.search("after [123] of 4 epochs", stopped["message"]) and stopped["weights"]["version"] == "embedded"
        assert post(server, REQUEST).ok
        wait_for(server, lambda found: found["state"] == "running" and "goes on" in found.get("message", ""))
        assert requests.delete(f"{server.url}/train/", timeout=60).json()["status"] == "STOPPED"
        stopped = wait_for(server, lambda found: found["state"] == "stopped")
        assert stopped["weights"]["version"] == "embedded"

        # To the end: the new weights serve as soon as their tokens are made, and the old ones until then.
        assert post(server, REQUEST).ok
        found = wait_for(server, lambda found: found["state"] in ("published", "kept"))
        assert found["state"] == "published", found
        assert found["weights"]["version"] == "1" and found["weights"]["metrics"]["dice"] == found["new_metric"]
        page = requests.get(f"{server.url}/sam2sgp/", timeout=60).text
        # A curve for each half, of two epochs.
        assert [curve.count(",") for curve in re.findall('<polyline points="(.*?)"', page)] == [2, 2]
        after = wait_for_weights(server, answers, "1", before)
        assert after[1] == approved and after[2] != before[2] and segment(server, answers) == after
        assert get(server, "/info/")["support"]["rebuilding"] is None

        assert post(server, {"action": "roll_back"}).ok
        assert server.finished("/train/")["status"] == "DONE" and stats(server)["state"] == "rolled_back"
        assert wait_for_weights(server, answers, "embedded", after) == before
        assert stats(server)["weights"]["version"] == "embedded"
        written = [json.loads(line) for line in (server.state / "audit.jsonl").read_text().splitlines()]
        assert [line["resumed"] for line in written if "resumed" in line] == [False, True, True]
        assert sum(line["action"] == "roll_back" for line in written) == 1
    assert content(studies) == labels
