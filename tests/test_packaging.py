"""What a wheel made from a source distribution holds, and that it runs where there is no clone."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.helpers.package_index import package_indexes

ROOT = Path(__file__).parents[1]
# What a build reads; a build in the clone would leave its folders there.
SOURCES = ("bundle", "apps", "setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "constraints.txt")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel, built from the sdist as `python -m build` does it."""
    folder = tmp_path_factory.mktemp("build")
    for name in (*SOURCES, *(path.name for path in ROOT.glob("requirements*.txt"))):
        source, target = ROOT / name, folder / "clone" / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "logs", "model"))
        else:
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(source, target)
    command = [sys.executable, "-m", "build", "--no-isolation", "--skip-dependency-check", "--outdir", str(folder)]
    done = subprocess.run([*command, str(folder / "clone")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory) -> Path:
    """The wheel's content as pip unpacks it."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def tracked(*folders: str) -> set[str]:
    """Files of the clone as git knows them, where it is one."""
    listed = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(listed.stdout.split())


def test_a_wheel_holds_the_whole_bundle_and_app_and_nothing_of_the_tests(site):
    held = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    renamed = {"bundle/sam2sgp/": "sam2sgp/", "bundle/": "sam2sgp/_bundle/", "apps/sam2sgp/": "sam2sgp/_app/"}
    expected = set()
    for name in tracked("bundle", "apps"):
        start = next(start for start in renamed if name.startswith(start))
        expected.add(renamed[start] + name.removeprefix(start))
    assert expected - held == set()
    assert not [name for name in held - expected if not name.split("/")[0].endswith(".dist-info")]
    assert (site / "sam2sgp/_bundle/LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def run_installed(site: Path, folder: Path, *words: object) -> str:
    command = [sys.executable, "-c", "from sam2sgp.cli import app; app()", *map(str, words)]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_an_installed_wheel_segments_with_its_own_configs_and_weights(site, phantoms, tmp_path):
    shutil.copytree(phantoms / "support" / "rgb", tmp_path / "labelled")
    query = sorted((phantoms / "queries" / "rgb").rglob("*.png"))[0]
    words = ["-s", "labelled", "-q", query, "-o", "out", "--support_max_items", 6]
    assert "Done in" in run_installed(site, tmp_path, "segment", *words)
    with (tmp_path / "out/summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    # Weights that know nothing find no phantoms with this confidence.
    found = [float(row["mean_confidence"]) for row in rows if row["mean_confidence"]]
    assert found and sum(found) / len(found) > 0.8


def test_the_installed_app_knows_its_bundle(site, tmp_path):
    program = (
        "import json, sys; sys.path.insert(0, sys.argv[1])\n"
        "from sam2sgp.places import APP\n"
        "sys.path.insert(0, str(APP))\n"
        "from lib.settings import Settings\n"
        "settings = Settings.from_conf(APP, sys.argv[2])\n"
        "print(json.dumps([str(APP), str(settings.bundle_root)]))\n"
    )
    command = [sys.executable, "-c", program, str(site), str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    app, bundle = json.loads(done.stdout.splitlines()[-1])
    assert Path(app) == site / "sam2sgp/_app" and Path(bundle) == site / "sam2sgp/_bundle"


def requirements(name: str) -> list[str]:
    """What an installed distribution needs here without extras, as names."""
    found = map(Requirement, metadata.requires(name) or [])
    return [entry.name for entry in found if entry.marker is None or entry.marker.evaluate({"extra": ""})]


def test_nothing_but_torch_brings_cuda(site):
    declared = Path(next(site.glob("sam2sgp-*.dist-info")), "METADATA").read_text()
    waiting = [Requirement(line).name for line in re.findall(r"^Requires-Dist: ([^;\n]+)$", declared, re.MULTILINE)]
    needed: set[str] = set()
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name not in needed:
            needed.add(name)
            waiting += [] if name == "torch" else requirements(name)
    assert "torch" in needed and "transformers" in needed
    assert [name for name in needed if re.match("nvidia|cuda|triton|cupy", name)] == []


@pytest.mark.parametrize("is_for_cpu", [True, False])
def test_pip_takes_no_cuda_by_the_command_of_the_page_on_installing(wheel, tmp_path, is_for_cpu):
    """As it is written there, but against indexes on this machine; without its option CUDA comes, so it is that."""
    page = (ROOT / "docs" / "install.md").read_text()
    [line] = re.findall(
        r"^pip install (--extra-index-url https://download\.pytorch\.org/whl/cpu .+)$", page, re.MULTILINE
    )
    option, address, file = line.split()
    assert file == f"dist/{wheel.name}"
    with package_indexes() as host:
        words = [option, f"{host}/cpu/simple"] if is_for_cpu else []
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--dry-run",
            "--ignore-installed",
            "--quiet",
            "--no-cache-dir",
        ]
        command += [*words, str(wheel), "--report", str(tmp_path / "report.json")]
        # The settings of this machine's pip would name other places.
        env = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
        env |= {"PIP_CONFIG_FILE": "/dev/null", "PIP_INDEX_URL": f"{host}/pypi/simple"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if not is_for_cpu:
        assert "built with a torch that brings CUDA" in done.stderr
        return
    assert done.returncode == 0, done.stderr[-2000:]
    planned = json.loads((tmp_path / "report.json").read_text())["install"]
    versions = {entry["metadata"]["name"].lower(): entry["metadata"]["version"] for entry in planned}
    assert versions["torch"].endswith("+cpu") and versions["torchvision"].endswith("+cpu") and "sam2" in versions
    assert len(versions) > 50 and [name for name in versions if re.match("nvidia|cuda|triton|cupy", name)] == []
