"""Commands start without the packages that MONAI takes in where they are installed and no run of ours uses."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import monai.bundle
import pytest

from sam2sgp import cli, startup
from sam2sgp.places import APP
from tests.helpers.bundle_runs import random_weights

# A command, and then what is known of its process.
PROGRAM = """
import gc, json, sys
from sam2sgp.cli import app
from sam2sgp.startup import UNUSED
ELSEWHERE = {"peft", "highdicom", "skimage.segmentation.slic_superpixels"}
try:
    app(prog_name="sam2sgp")
except SystemExit as end:
    code = end.code
from monai.handlers import mlflow_handler
from monai.utils import OptionalImportError
loaded = sorted((UNUSED | ELSEWHERE) & set(sys.modules))
try:
    refused = mlflow_handler.mlflow.__name__
except OptionalImportError as error:
    refused = str(error)
import matplotlib
print(json.dumps([code, loaded, refused, matplotlib.__name__, gc.isenabled(), gc.get_freeze_count()]))
"""


def test_a_segmentation_loads_none_of_them_and_afterwards_they_are_there(phantoms, tmp_path):
    weights = random_weights(tmp_path / "random.pt")
    query = min((phantoms / "queries" / "us").glob("*.png"))
    words = ["segment", "-s", phantoms / "support" / "us", "-q", query, "-o", tmp_path / "out", "-w", weights]
    small = ["--image_size", 64, "--region_below", 0, "--object_gate", False, "--progress", False]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, [*words, *small])],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    code, loaded, refused, plots, collects, frozen = json.loads(done.stdout.splitlines()[-1])
    assert (code, loaded, plots) == (0, [], "matplotlib")
    assert "mlflow is left out of this command" in refused
    assert collects and frozen > 100_000
    assert (tmp_path / "out" / query.name).is_file()


def test_a_command_about_a_server_loads_none_of_them(tmp_path):
    (tmp_path / "state").mkdir()
    program = "import sys; from manage import main; from sam2sgp.startup import UNUSED; end = main(*sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", f"{program}; print(end, sorted(UNUSED & set(sys.modules)))", "tokens"]
        + ["--studies", str(tmp_path), "--state-dir", str(tmp_path / "state")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{APP}:{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "No tokens.\n0 []\n"


def test_all_of_them_are_installed_where_the_tests_run():
    assert [name for name in sorted(startup.UNUSED) if find_spec(name) is None] == []


@pytest.mark.parametrize(
    ("words", "whole"), [(["--tracking", "mlflow"], True), (["--args_file", "a.json"], True), ([], False)]
)
def test_a_tracked_training_gets_them(tmp_path, monkeypatch, words, whole):
    seen = []
    monkeypatch.setattr(cli, "import_monai", lambda whole: seen.append(whole))
    monkeypatch.setattr(monai.bundle, "run", lambda **_: None)
    cli._run("training", ["train.json"], cli._more(words))
    assert seen == [whole]


def test_nothing_is_hidden_from_a_process_that_has_monai():
    before = sys.meta_path[:]
    startup.import_monai()
    assert sys.meta_path == before
    with startup._absent(frozenset({"tabnanny"})):
        assert sys.meta_path[1:] == before
        with pytest.raises(ModuleNotFoundError, match="tabnanny is left out"):
            find_spec("tabnanny")
    assert sys.meta_path == before
