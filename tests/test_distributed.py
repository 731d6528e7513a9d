"""Several processes: what they make together is what one makes, also when one of them is killed."""

import csv
import json
import os
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from sam2sgp.networks import SAM2SGP, save_weights
from tests.support.pairs import write_set
from tests.torchrun import TORCHRUN, bundle_command, finish, start

FAST = {"image_size": 64, "k": 2, "slices_per_class": 1, "region_below": 0.5, "report_figures": 3}
EVALUATION = {"image_size": 64, "num_workers": 0, "region_below": 0, "three_d_memory": False, "report_figures": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "model.pt"
    save_weights(SAM2SGP("nano", 64), path)
    return path


def table(path: Path) -> list[dict]:
    """Rows of a CSV file without what differs from run to run."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row.pop("seconds")
        if row.get("output"):
            row["output"] = Path(row["output"]).name
    return rows


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".png", ".gz")}


def records(output: Path) -> dict[str, dict]:
    found = (json.loads(path.read_text()) for path in (output / "records").glob("*.json"))
    return {name: record for record in found for name in record.get("files", {})}


def queries(folder: Path) -> Path:
    """Eight pictures, of which two have one stem, a volume, and a file that is no image."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for number in range(6):
        Image.fromarray(rng.integers(0, 256, (40, 50 + number, 3), dtype=np.uint8)).save(folder / f"q{number}.png")
    for name in ("twin.jpg", "twin.png"):
        Image.fromarray(rng.integers(0, 256, (30, 34), dtype=np.uint8)).save(folder / name)
    volume = nib.Nifti1Image(rng.normal(size=(30, 34, 4)).astype(np.float32), np.diag([1.0, 1.0, 5.0, 1.0]))
    nib.save(volume, folder / "volume.nii.gz")
    (folder / "broken.nii.gz").write_bytes(b"this is no image")
    return folder


@pytest.mark.slow
def test_a_killed_process_costs_nothing_but_its_case_and_the_results_are_those_of_one(phantoms, model, tmp_path):
    folder = queries(tmp_path / "queries")
    settings = {"support_dir": phantoms / "support" / "rgb", "dataset_dir": folder, "model_file": model, **FAST}
    alone = bundle_command("inferring", "inference.json", output_dir=tmp_path / "one", **settings)
    process = start([sys.executable, *alone])
    output, _ = process.communicate()
    assert process.returncode == 1 and "1 of 10 images failed, first broken" in output

    # Whoever reads this query stops there.
    stuck, two = folder / "q2.png", tmp_path / "two"
    stuck.rename(tmp_path / "q2.png")
    os.mkfifo(stuck)
    both = [
        *TORCHRUN,
        *bundle_command("inferring", "inference.json", "multi_gpu_inference.json", output_dir=two, **settings),
    ]
    process = start(both)
    reached = {"q0.png", "q1.png", "q3.png", "q5.png", "twin.png.png"}
    while records(two).keys() != reached:
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.05)
    # What a process leaves that is killed while it writes.
    (two / ".q2.png.abcd_123").mkdir()
    (two / ".q2.png.abcd_123" / "q2.png").write_bytes(b"half")
    (victim,) = (child for child in psutil.Process(process.pid).children() if child.environ()["RANK"] == "1")
    victim.kill()
    process.communicate()
    assert process.returncode != 0
    first = {name: record["run"] for name, record in records(two).items()}
    assert first.keys() == reached and not (two / "report.html").exists()

    stuck.unlink()
    (tmp_path / "q2.png").rename(stuck)
    process = start(both)
    output, _ = process.communicate()
    assert process.returncode == 1 and "1 of 10 images failed, first broken" in output, output[-3000:]
    assert "5 of 10 images are done already" in output
    again = {name: record["run"] for name, record in records(two).items()}
    assert {name: again[name] for name in first} == first
    assert len({again[name] for name in again.keys() - first.keys()}) == 1
    assert content(two) == content(tmp_path / "one") and len(content(two)) == 9
    assert table(two / "summary.csv") == table(tmp_path / "one" / "summary.csv")
    assert len(table(two / "summary.csv")) == 1 + 9 * 3
    assert not list(two.glob(".*"))
    pages = [(path / "report.html").read_text() for path in (two, tmp_path / "one")]
    assert pages[0].count("data:image/") == pages[1].count("data:image/") > 0


@pytest.mark.slow
def test_two_processes_measure_what_one_does(phantoms, model, tmp_path):
    settings = {"dataset_dir": phantoms, "model_file": model, **EVALUATION}
    finish(
        [
            sys.executable,
            *bundle_command("evaluating", "train.json", "evaluate.json", output_dir=tmp_path / "one", **settings),
        ]
    )
    configs = ("train.json", "evaluate.json", "multi_gpu_evaluate.json")
    finish([*TORCHRUN, *bundle_command("evaluating", *configs, output_dir=tmp_path / "two", **settings)])
    one, two = (tmp_path / name / "evaluation" for name in ("one", "two"))
    assert table(two / "metrics.csv") == table(one / "metrics.csv") != []
    assert (two / "metrics_summary.csv").read_bytes() == (one / "metrics_summary.csv").read_bytes()
    shown = [[line for line in (path / "report.html").read_text().splitlines() if "<h3" in line] for path in (one, two)]
    assert shown[0] == shown[1] != []


def test_two_processes_read_and_encode_each_support_item_once(tmp_path):
    folder = write_set(tmp_path / "set", 5)
    finish([*TORCHRUN, "-m", "tests.support.sharing", str(folder), str(tmp_path / "cache"), str(tmp_path)])
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert sorted(process["read"] for process in found) == [2, 3]
    assert sorted(process["encoded"] for process in found) == [2, 3]
    assert found[0]["embedding"] == found[1]["embedding"] and len(found[0]["embedding"]) == 5
