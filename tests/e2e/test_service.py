"""The server as an administrator runs it: by a settings file, watched, saved while it serves, and stopped."""

import ast
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests

from lib.http.metrics import DECISIONS
from manage import main
from sam2sgp.data import load_datalist
from sam2sgp.data.phantom import make_phantoms
from tests.e2e.programs import program
from tests.e2e.server import Server, started
from tests.helpers.parts import values

APPROVED, WAITING = "us_000_0", "us_001_0"


DEPLOY = Path(__file__).parents[2] / "apps" / "sam2sgp" / "deploy"
COMMAND = [sys.executable, "-c", "from sam2sgp.cli import app; app()"]


def unit(key: str) -> str:
    """A line of the systemd unit, without its key."""
    return re.search(rf"^{key}=(.+)$", (DEPLOY / "sam2sgp.service").read_text(), re.MULTILINE)[1]


class Service(Server):
    """A server that the unit's command line starts with the example's settings, but for where its folders are."""

    # A process of its own from its first line, which other tests spare.
    launch = staticmethod(started)

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, folder / "my studies")
        self.state = folder / "my state"
        self.settings = folder / "etc" / "settings.toml"

    def command(self, port: int) -> list[str]:
        self.settings.parent.mkdir(exist_ok=True)
        text = (DEPLOY / "settings.toml").read_text()
        for old, new in (
            ("/srv/sam2sgp/studies", "../my studies"),
            ("/var/lib/sam2sgp/state", str(self.state)),
            ("8000", str(port)),
        ):
            assert text.count(f" = {old}" if old.isdecimal() else f'"{old}"') == 1
            text = text.replace(old, new)
        self.settings.write_text(f"{text}image_size = 64\nct_window = [-100, 300]\n")
        program, *words = shlex.split(unit("ExecStart"))
        assert program == "/opt/sam2sgp/bin/sam2sgp"
        return [*COMMAND, *(word.replace("/etc/sam2sgp", str(self.settings.parent)) for word in words)]


@pytest.fixture(scope="module")
def known(tmp_path_factory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("phantoms")
    make_phantoms(folder, 4, size=(64, 64), num_slices=6, modalities=("us",), progress=False)
    return {case["name"]: case for case in load_datalist(folder)}


@pytest.fixture(scope="module")
def server(tmp_path_factory, known):
    folder = tmp_path_factory.mktemp("service")
    made = Service(folder)
    (made.studies / "labels" / "final").mkdir(parents=True)
    for name in (APPROVED, WAITING):
        shutil.copy(known[name]["image"], made.studies)
    shutil.copy(known[APPROVED]["label"], made.studies / "labels" / "final")
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
    told = dict(ast.literal_eval(conf))
    assert told["ct_window"] == [-100, 300] and told["hosts"] == ["sam2sgp.example.org"]
    assert told["state_dir"] == str(server.state) and told["user_header"] == "X-Remote-User"
    repository = Path(__file__).parents[2] / "apps" / "sam2sgp"
    made = {name for name in files(server.app) if name.split("/")[0] in ("logs", "model", "bin")}
    assert made == set() and files(server.app) <= files(repository)
    assert server.state.stat().st_mode & 0o777 == 0o700
    assert {"app", "logs"} <= {path.name for path in server.state.iterdir()}
    assert f"Session Path: {server.state / 'sessions'}" in server.log.read_text()
    assert (server.state / "logs" / "server.log").stat().st_mode & 0o777 == 0o600


def test_it_says_that_it_lives_and_is_ready(server):
    assert requests.get(f"{server.url}/sam2sgp/health/live", timeout=60).json() == {"status": "live"}
    answer = requests.get(f"{server.url}/sam2sgp/health/ready", timeout=60)
    assert answer.status_code == 200 and set(answer.json()["checks"].values()) == {"ok"}


def test_what_is_done_is_counted(server):
    def told() -> dict[str, float]:
        return values(requests.get(f"{server.url}/sam2sgp/metrics", timeout=60).text)

    for method, path in DECISIONS:
        assert requests.request(method, server.url + path, timeout=60).status_code == 422, path
    before = told()
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


def test_it_is_saved_while_it_serves_and_restored_elsewhere(server, tmp_path, capsys):
    file = tmp_path / "backup.tar"
    assert main("backup", "--settings", str(server.settings), "--output", str(file)) == 0
    assert main("restore", str(file), "--settings", str(server.settings), "--overwrite") == 1
    assert "expected no server to use it, found one; stop it first" in capsys.readouterr().err
    new, state = tmp_path / "new", tmp_path / "state"
    assert main("restore", str(file), "--studies", str(new), "--state-dir", str(state)) == 0
    assert "2 images of the backup are not in" in capsys.readouterr().out
    labels = {name for name in files(server.studies / "labels") if name.endswith(".png")}
    assert {name for name in files(new / "labels") if name.endswith(".png")} == labels and len(labels) == 2
    actions = [json.loads(line)["action"] for line in (state / "audit.jsonl").read_text().splitlines()]
    assert "approve" in actions and actions[-1] == "restore"


def test_told_to_stop_it_ends_within_seconds(server):
    started = time.monotonic()
    os.kill(server.process.pid, signal.SIGTERM)
    server.process.wait(30)
    assert time.monotonic() - started < 15
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{server.url}/sam2sgp/health/live", timeout=5)


@pytest.fixture
def written(tmp_path) -> Path:
    """The unit, with a program that is there."""
    path = tmp_path / "sam2sgp.service"
    path.write_text((DEPLOY / "sam2sgp.service").read_text().replace("/opt/sam2sgp/bin/sam2sgp", "/bin/true"))
    return path


def test_systemd_finds_no_fault_in_the_unit(written):
    command = [program("systemd-analyze", "systemd"), "verify", str(written)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    written.write_text(written.read_text().replace("ProtectSystem=strict", "ProtectSystem=stict"))
    assert "stict" in subprocess.run(command, capture_output=True, text=True, check=False).stderr


def test_the_unit_leaves_the_service_few_rights(written):
    command = [program("systemd-analyze", "systemd"), "security", "--offline=true", "--threshold=15", str(written)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert unit("ReadWritePaths") == "-/srv/sam2sgp/studies" and unit("StateDirectory") == "sam2sgp"
