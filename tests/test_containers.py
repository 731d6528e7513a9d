"""Dockerfile and compose file: linted, and what they do is done here, as far as that goes without Docker."""

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from io import BytesIO
from pathlib import Path
from string import Template

import compose_spec
import pytest
from dockerfile_parse import DockerfileParser
from typer.testing import CliRunner

from lib.admin.start import HOST as LISTENS
from lib.admin.start import PORT, arguments
from sam2sgp import cli
from tests.e2e.orthanc import PLUGINS
from tests.e2e.programs import free_port, listens, program, running

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "apps" / "sam2sgp" / "deploy"
HOST = "sam2sgp.example.org"


def test_the_dockerfile_has_no_fault_that_hadolint_knows():
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def stages() -> list[list[tuple[str, str]]]:
    """(instruction, value) of each stage of the Dockerfile."""
    found: list[list[tuple[str, str]]] = []
    for step in DockerfileParser(fileobj=BytesIO((ROOT / "Dockerfile").read_bytes())).structure:
        if step["instruction"] == "FROM":
            found.append([])
        if step["instruction"] != "COMMENT":
            found[-1].append((step["instruction"], step["value"]))
    return found


def sent() -> list[Path]:
    """What .dockerignore lets through, as far as the first names go."""
    names = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    return [path for name in names for path in ROOT.glob(name)]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The virtual environment that the first stage makes.

    Every step runs as it is written, but below a folder of its own, and with the packages of this environment at hand:
    pip installs what is not there in the tested version, and has no index to get it from.
    """
    root = tmp_path_factory.mktemp("image")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {"PATH": path, "HOME": str(root), "PIP_NO_INDEX": "1"}
    here = root
    for instruction, value in stages()[0]:
        value = value.replace("/opt/", f"{root}/opt/").replace("/src", f"{root}/src")
        if instruction in ("ARG", "ENV"):
            pairs = [pair.partition("=") for pair in value.split()]
            env |= {name: Template(given).substitute(env) for name, _, given in pairs}
        elif instruction == "WORKDIR":
            here = Path(value)
            here.mkdir()
        elif instruction == "COPY":
            *sources, target = value.split()
            assert target in (".", "./")
            for source in sent() if sources == ["."] else [ROOT / name for name in sources]:
                if source.is_dir():
                    shutil.copytree(source, here / source.name, ignore=shutil.ignore_patterns("__pycache__", "logs"))
                else:
                    shutil.copyfile(source, here / source.name)
        elif instruction == "RUN":
            done = subprocess.run(["sh", "-ec", value], cwd=here, env=env, capture_output=True, text=True, check=False)
            assert done.returncode == 0, value + done.stdout[-2000:] + done.stderr[-2000:]
            site = next((root / "opt").rglob("site-packages"))
            if "venv" in value:
                # Older than the tested ones, and first in the way.
                for name in ("setuptools", "pkg_resources", "_distutils_hack"):
                    for old in site.glob(f"{name}*"):
                        shutil.rmtree(old)
                known = [folder for folder in sys.path if folder.endswith("site-packages")]
                (site / "known.pth").write_text("\n".join(known))
        else:
            assert instruction == "FROM"
    return root / "opt" / "sam2sgp"


@pytest.mark.slow
def test_the_steps_of_the_image_install_the_command_with_weights_and_app(built):
    package = next(built.rglob("site-packages")) / "sam2sgp"
    weights = "models/model.pt"
    assert (package / "_bundle" / weights).read_bytes() == (ROOT / "bundle" / weights).read_bytes()
    assert (package / "_app" / "main.py").is_file()
    assert str(built) in (built / "bin" / "sam2sgp").read_text()


def test_the_image_starts_the_server_as_a_user_without_rights(monkeypatch):
    last = dict(stages()[-1])
    assert last["USER"] == "1000" and "XDG_DATA_HOME=/data" in last["ENV"] and json.loads(last["VOLUME"]) == ["/data"]
    seen: list[str] = []
    monkeypatch.setattr(cli.os, "execv", lambda name, command: seen.extend(command))
    assert json.loads(last["ENTRYPOINT"]) == ["sam2sgp"]
    assert CliRunner().invoke(cli.app, json.loads(last["CMD"])).exit_code == 0
    started = arguments(seen[3:])
    assert (started.studies, started.host, started.port or PORT) == ("/studies", "0.0.0.0", 8000)
    assert f"http://127.0.0.1:{PORT}/sam2sgp/health/live" in last["HEALTHCHECK"]


@pytest.fixture
def composed(monkeypatch) -> dict:
    """The compose file as its specification's own parser reads it, with its variable filled in."""
    text = (ROOT / "compose.yaml").read_text()
    filled = re.sub(r"\$\{SAM2SGP_HOST:\?[^}]*\}", HOST, text)
    assert filled != text and "$" not in filled
    return compose_spec.PyCompose.from_yaml(filled).to_dict()


def test_the_compose_file_fits_its_specification_and_names_what_there_is(composed):
    services = composed["services"]
    assert set(services) == {"app", "nginx", "orthanc"}
    text = (ROOT / "compose.yaml").read_text()
    assert {name for service in services.values() for name in service.get("depends_on", ())} <= set(services)
    mounted = re.findall(r"^ +- (\./[^:]+):", text, re.MULTILINE)
    assert [name for name in mounted if not name.startswith("./secrets/") and not (ROOT / name).is_file()] == []
    named = re.findall(r"^ +- ([a-z]+):/\w", text, re.MULTILINE)
    assert named and set(named) == set(composed["volumes"])
    with pytest.raises(ValueError, match="restrat"):
        compose_spec.PyCompose.from_yaml(text.replace("restart:", "restrat:"))


def test_nginx_reaches_the_app_where_the_compose_file_has_it_listen(composed, monkeypatch):
    services = composed["services"]
    assert services["nginx"]["network_mode"] == "service:app"
    seen: list[str] = []
    monkeypatch.setattr(cli.os, "execv", lambda name, command: seen.extend(command))
    assert CliRunner().invoke(cli.app, services["app"]["command"]).exit_code == 0
    started = arguments(seen[3:])
    address = f"{started.host or LISTENS}:{started.port or PORT}"
    assert f"proxy_pass http://{address};" in (DEPLOY / "nginx.conf").read_text()
    conf = dict(started.conf)
    assert conf["hosts"] == HOST and conf["user_header"] == "X-Remote-User"
    archive = re.fullmatch(r"http://orthanc:(\d+)(/.+)", started.studies)
    settings = json.loads((DEPLOY / "orthanc.json").read_text())
    assert archive and (int(archive[1]), f"{archive[2]}/") == (settings["HttpPort"], settings["DicomWeb"]["Root"])
    assert f"{settings['DicomPort']}:{settings['DicomPort']}" in (ROOT / "compose.yaml").read_text()


def test_the_secrets_are_made_as_the_page_says(tmp_path):
    page = (ROOT / "docs" / "containers.md").read_text()
    block = next(block for block in re.findall(r"```\n(.+?)```", page, re.DOTALL) if "openssl" in block)
    # Where the page has openssl ask for the password.
    script = block.replace("openssl", program("openssl", "openssl")).replace("passwd -apr1", "passwd -apr1 secret")
    subprocess.run(["sh", "-ec", script], cwd=tmp_path, check=True, capture_output=True)
    mounted = re.findall(r"^ +- \./(secrets/[^:]+):", (ROOT / "compose.yaml").read_text(), re.MULTILINE)
    assert len(mounted) == 3 and all((tmp_path / name).stat().st_size for name in mounted)
    assert (tmp_path / "secrets/sam2sgp.htpasswd").read_text().startswith("reader:$apr1$")


def test_orthanc_starts_with_its_file_and_answers_dicomweb(tmp_path):
    settings = json.loads((DEPLOY / "orthanc.json").read_text())
    port = free_port()
    settings |= {name: str(tmp_path / "db") for name in ("StorageDirectory", "IndexDirectory")}
    settings |= {"Plugins": [PLUGINS], "HttpPort": port, "DicomPort": free_port()}
    (tmp_path / "orthanc.json").write_text(json.dumps(settings))
    command = [program("Orthanc", "orthanc orthanc-dicomweb"), str(tmp_path / "orthanc.json")]
    with running(command, tmp_path / "orthanc.log", lambda: listens(port)):
        address = f"http://127.0.0.1:{port}{settings['DicomWeb']['Root']}studies"
        with urllib.request.urlopen(address, timeout=20) as answer:
            assert answer.status == 200 and json.loads(answer.read() or "[]") == []
