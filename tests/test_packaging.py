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
    # setuptools' warnings are a page each, which would frighten whoever follows the guide.
    assert "!!" not in done.stdout + done.stderr, done.stdout + done.stderr
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


def stand_in(folder: Path, version: str, *needs: str) -> None:
    """A wheel called torch with nothing in it but what it needs."""
    info = f"torch-{version}.dist-info"
    about = "".join(f"{key}: {value}\n" for key, value in [("Metadata-Version", "2.1"), ("Name", "torch")])
    about += f"Version: {version}\n" + "".join(f"Requires-Dist: {need}\n" for need in needs)
    with zipfile.ZipFile(folder / f"torch-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{info}/METADATA", about)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


def test_pip_takes_the_build_for_the_cpu_where_an_index_has_one(tmp_path):
    """As the page on installing says: of PyPI's torch and that of PyTorch's own index, the latter counts as newer."""
    version = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    stand_in(tmp_path, version, "nvidia-cublas")
    stand_in(tmp_path, f"{version}+cpu")
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-index", "--quiet"]
    command += ["--find-links", tmp_path, "-c", ROOT / "constraints.txt", "--report", tmp_path / "report.json"]
    line = next(line for line in (ROOT / "requirements-core.txt").read_text().splitlines() if line.startswith("torch>"))
    # The settings of this machine's pip would name other places.
    env = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")} | {
        "PIP_CONFIG_FILE": "/dev/null"
    }
    subprocess.run([*map(str, command), line], env=env, check=True)
    planned = json.loads((tmp_path / "report.json").read_text())["install"]
    assert [entry["metadata"]["version"] for entry in planned] == [f"{version}+cpu"]
