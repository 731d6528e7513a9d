"""Full and read-only disks, damaged files and seed pairs that come and go, over HTTP: nothing lost, nothing stale."""

import json
import shutil
from pathlib import Path

import pytest
import requests

from sam2sgp.data import load_datalist
from sam2sgp.data.phantom import make_phantoms
from tests.e2e.disks import disk
from tests.e2e.server import Server

APPROVED = ["us_000_0", "us_001_0", "us_002_0", "us_003_0"]
FRESH, QUERY, SEED = "us_000_1", "us_001_1", "us_002_1"
SMALL = {"image_size": "64", "three_d_memory": "false", "region_below": "0"}
TRAINING = {"max_epochs": 1, "episodes_per_epoch": 1}


@pytest.fixture(scope="module")
def known(tmp_path_factory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("storage") / "phantoms"
    make_phantoms(folder, 4, size=(64, 64), num_slices=6, modalities=("us",), progress=False)
    return {case["name"]: case for case in load_datalist(folder)}


@pytest.fixture(scope="module")
def server(tmp_path_factory, known):
    """A server with its studies, its state and its temporary files on small disks of their own."""
    folder = tmp_path_factory.mktemp("server")
    with disk(folder / "studies", 2) as studies, disk(folder / "state", 8) as state, disk(folder / "tmp", 2) as tmp:
        (studies.folder / "labels" / "final").mkdir(parents=True)
        for name in [*APPROVED, FRESH, QUERY]:
            shutil.copy(known[name]["image"], studies.folder)
        for name in APPROVED:
            shutil.copy(known[name]["label"], studies.folder / "labels" / "final")
        add_seed(folder / "seeds", known, SEED)
        running = Server(folder, studies.folder, {**SMALL, "support_dir": str(folder / "seeds")})
        running.disks = {"studies": studies, "state": state, "tmp": tmp}
        try:
            yield start(running)
        finally:
            running.stop()


def start(server: Server) -> Server:
    return server.start({"MONAI_LABEL_AUTO_UPDATE_SCORING": "false", "TMPDIR": str(server.folder / "tmp")})


def add_seed(folder: Path, known, name: str) -> None:
    for kind in ("image", "label"):
        (folder / f"{kind}s").mkdir(parents=True, exist_ok=True)
        shutil.copy(known[name][kind], folder / f"{kind}s")


def put(server, known, name: str, of: str) -> requests.Response:
    """Approve the label of one image for another."""
    with open(known[of]["label"], "rb") as file:
        url = f"{server.url}/datastore/label?image={name}&tag=final"
        return requests.put(url, files={"label": (f"{of}.png", file)}, timeout=60)


def post(server, path: str, **body) -> requests.Response:
    return requests.post(f"{server.url}{path}", json=body, timeout=120)


def infer(server, **params) -> requests.Response:
    url = f"{server.url}/infer/sam2sgp?image={QUERY}&output=json"
    return requests.post(url, data={"params": json.dumps(params)}, timeout=60)


def all_used(answer: requests.Response) -> set[str]:
    assert answer.ok, answer.text
    return {item["image"] for items in answer.json()["support"].values() for item in items}


def used(answer: requests.Response) -> set[str]:
    """The images of the datastore that guided an answer; the seed pair always does."""
    assert f"seeds/{SEED}" in all_used(answer)
    return {name for name in all_used(answer) if not name.startswith("seeds/")}


def assert_refused(answer: requests.Response, *words: str) -> None:
    """It is answered with 507 and one sentence that says what to do, and gives no path of the server away."""
    assert answer.status_code == 507, (answer.status_code, answer.text)
    detail = answer.json()["detail"]
    assert "\n" not in detail and "/tmp" not in detail, detail
    assert all(word in detail for word in words), detail


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_labels_are(server, labels: dict[str, bytes]) -> None:
    assert content(server.studies / "labels" / "final") == labels
    assert used(infer(server)) == {name.removesuffix(".png") for name in labels}


def test_a_full_studies_disk_takes_no_label_and_loses_none(server, known):
    labels = content(server.studies / "labels" / "final")
    with server.disks["studies"].full():
        assert_refused(put(server, known, "us_000_0", "us_001_0"), "datastore", "space")
        assert_refused(put(server, known, FRESH, FRESH), "datastore", "space")
        assert_refused(infer(server, save_label=True), "space")
        assert_refused(infer(server, save_label=True, label_tag="final"), "space")
        with open(known["us_003_1"]["image"], "rb") as file:
            answer = requests.put(f"{server.url}/datastore/image?image=new", files={"file": ("new.png", file)})
        assert_refused(answer, "datastore", "space")
        assert_labels_are(server, labels)
    known_now = requests.get(f"{server.url}/datastore/?output=all").json()["objects"]
    assert known_now.keys() == {*APPROVED, FRESH, QUERY}
    assert put(server, known, FRESH, FRESH).ok
    assert used(infer(server)) == {*APPROVED, FRESH}
    assert requests.delete(f"{server.url}/datastore/label?id={FRESH}&tag=final").ok
    assert_labels_are(server, labels)


def test_with_a_full_state_disk_requests_are_answered_from_memory_and_nothing_half_is_left(server, known):
    labels = content(server.studies / "labels" / "final")
    before = infer(server).json()
    assert post(server, "/activelearning/hybrid").ok
    with server.disks["state"].full():
        shutil.copy(known[FRESH]["label"], server.studies / "labels" / "final")
        assert used(infer(server)) == {*APPROVED, FRESH}, "a new item is encoded, and held in memory"
        (server.studies / "labels" / "final" / f"{FRESH}.png").unlink()
        assert infer(server).json()["confidence"] == before["confidence"]
        assert_refused(post(server, "/activelearning/hybrid"), "scores.sqlite", "delete the file")
        assert post(server, "/scoring/scores").ok
        answer = post(server, "/train/finetune", **TRAINING)
        failed = server.finished("/scoring/")
        assert failed["status"] == "ERROR" and "scores.sqlite" in failed["details"][-1], failed
        # There may be room for the line in the audit log that comes first.
        assert "space" in (server.finished("/train/")["details"][-1] if answer.ok else answer.json()["detail"])
        stats = requests.get(f"{server.url}/info/").json()["train_stats"]["finetune"]
        assert stats["weights"]["version"] == "embedded" and stats.get("state") != "running"
    assert_labels_are(server, labels)
    assert post(server, "/scoring/scores").ok
    assert '"executed": 7' in server.finished("/scoring/")["details"][-1]
    assert post(server, "/activelearning/hybrid").ok


def test_a_full_disk_for_temporary_files_is_told(server, known):
    labels = content(server.studies / "labels" / "final")
    with server.disks["tmp"].full():
        assert_refused(put(server, known, FRESH, FRESH), "nothing was changed")
        for extension in (".png", ".nii.gz", ".nrrd"):
            assert_refused(infer(server, result_extension=extension), "nothing was changed", "space")
    assert_labels_are(server, labels)


def test_a_damaged_state_is_made_anew_while_the_server_runs(server):
    before = infer(server).json()
    for path in server.state.rglob("*.sqlite*"):
        path.write_bytes(b"no database at all, " * 500)
    for path in server.state.rglob("*.safetensors"):
        path.write_bytes(b"no tensors")
    assert post(server, "/activelearning/hybrid").ok
    after = infer(server)
    assert used(after) == set(APPROVED) and after.json()["confidence"] == before["confidence"]
    assert requests.get(f"{server.url}/sam2sgp/").ok


def test_seed_pairs_that_come_and_go_are_followed_by_the_next_request(server, known):
    seeds = server.folder / "seeds"
    everything = {*APPROVED, f"seeds/{SEED}"}
    assert all_used(infer(server, k=16)) == everything
    add_seed(seeds, known, "us_003_1")
    assert all_used(infer(server, k=16)) == {*everything, "seeds/us_003_1"}
    for path in seeds.rglob("us_003_1.png"):
        path.unlink()
    assert requests.get(f"{server.url}/info/").json()["support"]["items"] == len(everything)
    assert all_used(infer(server, k=16)) == everything
    label = seeds / "labels" / f"{SEED}.png"
    content = label.read_bytes()
    label.unlink()
    answer = infer(server)
    assert all_used(answer) == set(APPROVED)
    assert any("support_dir is not used" in warning for warning in answer.json()["warnings"])
    label.write_bytes(content)
    assert all_used(infer(server, k=16)) == everything


@pytest.mark.slow
def test_read_only_disks_are_told_when_something_is_written_and_serve_all_else(server, known):
    labels = content(server.studies / "labels" / "final")
    with server.disks["studies"].read_only():
        assert_refused(put(server, known, FRESH, FRESH), "datastore", "permissions")
        assert_labels_are(server, labels)
    server.stop()
    with server.disks["state"].read_only():
        start(server)
        # Nobody could tell later who approved it.
        assert_refused(put(server, known, FRESH, FRESH), "audit log", "permissions")
        assert_labels_are(server, labels)
        server.stop()
    with server.disks["studies"].read_only(), server.disks["state"].read_only():
        # Also from the start.
        start(server)
        assert_labels_are(server, labels)
        assert_refused(put(server, known, FRESH, FRESH), "datastore", "permissions")
        assert_refused(post(server, "/activelearning/hybrid"), "scores.sqlite", "permissions")
        assert_refused(post(server, "/train/finetune", **TRAINING), "state folder", "permissions")
        assert_refused(post(server, "/train/finetune", action="roll_back"), "state folder")
    assert put(server, known, FRESH, FRESH).ok
    assert used(infer(server)) == {*APPROVED, FRESH}
