"""The administrator's guide, command by command: what would change the system is done by stand-ins that note it."""

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from lib.http.metrics import Metrics
from lib.roles import Role
from lib.settings import Settings
from lib.stores.audit import Audit
from lib.stores.tokens import Tokens
from manage import main
from sam2sgp import cli
from tests.helpers.doc_commands import blocks
from tests.helpers.parts import datastore, segmenter

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "administration.md"
PAGE = GUIDE.read_text()
BLOCKS = blocks(GUIDE)
# Each notes its words, then does what stands here.
STAND_INS = {
    "useradd": "",
    "userdel": "",
    "sam2sgp": "",
    "chown": "",
    "systemctl": "",
    "apt-get": "",
    "nginx": "",
    "tar": "",
    "curl": "",
    "openssl": "",
    "pip": "",
    "python": "",
    "htpasswd": 'for word; do case "$word" in /*) touch "$word";; esac; done',
    "runuser": 'shift 3; exec "$@"',
    "install": 'if [ "$2" = -o ]; then shift 3; set -- -d "$@"; fi; exec /usr/bin/install "$@"',
    "python3.11": 'mkdir -p "$3/bin"; for name in pip python sam2sgp; do cp "$STAND_INS/$name" "$3/bin"; done',
}


class Machine:
    """A system below a folder, on which the guide's commands are run."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.log = root / "log"
        self.done: list[int] = []
        programs = root / "stand-ins"
        for folder in (programs, root / "etc/systemd/system", root / "etc/nginx", root / "var/lib"):
            folder.mkdir(parents=True)
        for name, does in STAND_INS.items():
            path = programs / name
            path.write_text(f'#!/bin/sh\necho {name} "$@" >> {self.log}\n{does}\n')
            path.chmod(0o755)
        self.env = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "STAND_INS": str(programs)}

    def mapped(self, text: str) -> str:
        """With this machine's paths."""
        return re.sub(r"(?<![\w.])/(opt|etc|srv|var)/", rf"{self.root}/\1/", text)

    def run(self, word: str) -> None:
        """Run the block with a word in it, of which there is one, and what it has `sam2sgp` do."""
        [block] = [block for block in BLOCKS if word in block]
        before = self.log.read_text() if self.log.exists() else ""
        done = subprocess.run(
            ["sh", "-ec", self.mapped(block)], cwd=ROOT, env=self.env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        for line in self.log.read_text()[len(before) :].splitlines():
            if line.startswith("sam2sgp "):
                # In this process, because a new one takes seconds to start.
                with patch.object(cli.os, "execv", lambda name, command: self.done.append(main(*command[2:]))):
                    ended = CliRunner().invoke(cli.app, shlex.split(line)[1:])
                assert ended.exit_code == 0 and self.done[-1] == 0, ended.output


def test_the_guide_is_followed_word_for_word(tmp_path):
    machine = Machine(tmp_path)
    machine.run("useradd")
    settings = tmp_path / "etc/sam2sgp/settings.toml"
    settings.write_text(machine.mapped(settings.read_text()))
    assert (tmp_path / "etc/systemd/system/sam2sgp.service").is_file()
    machine.run("enable --now")
    assert (tmp_path / "srv/sam2sgp/studies").stat().st_mode & 0o777 == 0o750
    machine.run("apt-get install nginx")
    machine.run("openssl")
    machine.run("htpasswd")
    machine.run("ohif.conf")
    assert (tmp_path / "srv/ohif/app-config.js").is_file() and (tmp_path / "etc/nginx/sam2sgp.d/ohif.conf").is_file()
    assert (tmp_path / "etc/nginx/sam2sgp.htpasswd").stat().st_mode & 0o777 == 0o640

    # What a server makes.
    studies, state = tmp_path / "srv/sam2sgp/studies", tmp_path / "var/lib/sam2sgp/state"
    (studies / "labels/final").mkdir(parents=True)
    for path in (studies / "a.png", studies / "labels/final/a.png"):
        Image.fromarray(np.ones((8, 8), np.uint8)).save(path)
    Audit(state / "audit.jsonl").write("approve", image="a")
    machine.run("today.tar\n")
    shutil.rmtree(studies / "labels")
    machine.run("--overwrite")
    assert (studies / "labels/final/a.png").is_file() and (studies / "a.png").is_file()
    machine.run("--role annotator")
    assert Tokens(state).all() == ()
    lines = [json.loads(line) for line in (state / "audit.jsonl").read_text().splitlines()]
    assert [line["action"] for line in lines][-2:] == ["make token", "revoke token"]
    machine.run("backups/tried")
    assert (tmp_path / "srv/sam2sgp/backups/tried/labels/final/a.png").is_file()
    machine.run("before-upgrade")
    assert (tmp_path / "srv/sam2sgp/backups/before-upgrade.tar").is_file()
    machine.run("userdel")
    assert not (tmp_path / "opt/sam2sgp").exists() and (studies / "labels/final/a.png").is_file()

    done = machine.log.read_text()
    for line in ("systemctl enable --now sam2sgp", "apt-get install nginx apache2-utils logrotate", "nginx -t"):
        assert f"\n{line}\n" in done, line
    assert re.search("curl --silent --fail .+ http://127.0.0.1:8000/sam2sgp/health/ready\n", done)
    assert f"\nchown -R root: {tmp_path}/srv/sam2sgp {tmp_path}/var/lib/sam2sgp\nuserdel sam2sgp\n" in done
    # A wheel is made before it is installed.
    assert re.search("pip install build\npython -m build\npip install -c constraints.txt dist/sam2sgp-", done)
    # Every block of the page was run.
    assert len(BLOCKS) == 12 and machine.done == [0] * 7


def test_the_unit_and_the_settings_agree_with_the_guide():
    unit = (ROOT / "apps/sam2sgp/deploy/sam2sgp.service").read_text()
    start = "ExecStart=/opt/sam2sgp/bin/sam2sgp serve --settings /etc/sam2sgp/settings.toml"
    for line in (start, "User=sam2sgp", "MemoryMax=16G", "StateDirectory=sam2sgp"):
        assert f"\n{line}\n" in unit
    settings = (ROOT / "apps/sam2sgp/deploy/settings.toml").read_text()
    assert 'studies = "/srv/sam2sgp/studies"' in settings and 'state_dir = "/var/lib/sam2sgp/state"' in settings
    assert "/srv/sam2sgp/studies" in PAGE and "/var/lib/sam2sgp/state/logs/server.log" in PAGE


def test_the_nightly_backup_of_the_guide_is_the_one_that_is_run():
    minute, hour, *days, user, command = re.search(r"^    (\d.+ sam2sgp .+)$", PAGE, re.MULTILINE)[1].split(None, 6)
    assert (minute, hour, days, user) == ("15", "2", ["*"] * 3, "sam2sgp")
    # cron takes % for the end of a line.
    assert "%" not in command and f"runuser -u sam2sgp -- {command.replace('nightly', 'today')}\n" in PAGE


def test_nginx_reads_its_passwords_as_the_user_whom_the_guide_gives_them_to():
    group = re.search(r"^chown root:(\S+) /etc/nginx/sam2sgp.htpasswd$", PAGE, re.MULTILINE)[1]
    configuration = (ROOT / "apps/sam2sgp/deploy/nginx.conf").read_text()
    assert re.findall(r"^user (\S+);$", configuration, re.MULTILINE) == [group]
    assert "auth_basic_user_file /etc/nginx/sam2sgp.htpasswd;" in configuration
    assert "include /etc/nginx/sam2sgp.d/*.conf;" in configuration and "/etc/nginx/sam2sgp.d/ohif.conf" in PAGE


def test_the_roles_of_the_guide_are_settings_that_the_file_takes(tmp_path):
    [example] = blocks(GUIDE, "toml")
    path = tmp_path / "settings.toml"
    path.write_text((ROOT / "apps/sam2sgp/deploy/settings.toml").read_text() + example)
    made = Settings.from_conf(ROOT / "apps/sam2sgp", "studies", {"settings": path}, starts=True)
    assert made.users == {"anna": Role.admin, "ben": Role.approver, "slicer-7": Role.annotator}
    assert made.default_role is Role.reader and made.user_header == "X-Remote-User"
    # The same stands there as a comment.
    assert example in (ROOT / "apps/sam2sgp/deploy/settings.toml").read_text().replace("# ", "")
    assert re.findall(r"^\| `(\w+)` \| ", PAGE.partition("## Who may do what")[2], re.MULTILINE)[:4] == [
        role.name for role in Role
    ]


@pytest.fixture
def names(tmp_path) -> set[str]:
    """Of the metrics of a server on an archive, as samples have them."""
    archive = datastore()
    archive.pairs_at_hand, archive.state = dict, lambda: {"reachable": True}
    made = Metrics(segmenter(), archive, None, {"state": tmp_path})
    text = made.text().decode()
    found = {name for name, kind in re.findall(r"^# TYPE (\w+) (\w+)$", text, re.MULTILINE)}
    return {name for name in found if name.startswith("sam2sgp_") and not name.endswith("_created")}


def test_the_metrics_of_the_guide_are_those_that_there_are(names):
    told = {name for name in re.findall(r"`(sam2sgp_[a-z_]+)`", PAGE)}
    assert told - {"sam2sgp_tasks_running", "sam2sgp_tasks_waiting"} == names
