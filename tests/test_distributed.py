"""Several processes: what they make together is what one makes, also when one of them is killed."""

import csv
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import psutil
import pytest
from PIL import Image

from sam2sgp import distributed
from sam2sgp.data import load_queries
from tests.helpers.bundle_runs import BUNDLE, computing_with_one_thread, random_weights, run
from tests.helpers.pairs import write_set
from tests.helpers.torchrun import TORCHRUN, bundle_command, finish, start

EXAMPLES = BUNDLE.parent / "docs" / "slurm"
FAST = {"image_size": 64, "k": 2, "region_below": 0.5, "report_figures": 3}
EVALUATION = {"image_size": 64, "num_workers": 0, "region_below": 0, "report_figures": 2, "split": [0.4, 0.0, 0.6]}


@pytest.fixture(autouse=True)
def one_thread():
    """As in the processes: with more threads, results differ in their last bits."""
    with computing_with_one_thread():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return random_weights(tmp_path_factory.mktemp("model") / "model.pt")


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
def test_processes_of_a_machine_have_numbers_of_their_own_whatever_became_of_local_rank(monkeypatch):
    """Under Slurm, ignite sets LOCAL_RANK to 0 in all processes that one torchrun starts."""
    monkeypatch.setattr(distributed, "is_active", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "0")
    places = []
    # A machine with two processes, then one with three.
    for rank, count in [(0, 2), (1, 2), (2, 3), (3, 3), (4, 3)]:
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(count))
        places.append(distributed.place_on_machine())
    assert sorted(places[:2]) == [(0, 2), (1, 2)] and sorted(places[2:]) == [(0, 3), (1, 3), (2, 3)]


def test_a_killed_process_costs_nothing_but_its_case_and_the_results_are_those_of_one(model, tmp_path):
    folder, support = queries(tmp_path / "queries"), write_set(tmp_path / "support", 3)
    settings = {"support_dir": str(support), "dataset_dir": str(folder), "model_file": str(model), **FAST}
    with pytest.raises(SystemExit, match="1 of 10 images failed, first broken"):
        run("inferring", "inference.json", output_dir=str(tmp_path / "one"), progress=False, **settings)

    # Whoever reads this query stops there. In a folder a pipe is no image, so the images are told by a list.
    settings["queries"] = [dict(case) for case in load_queries(folder, [])]
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
    assert len(table(two / "summary.csv")) == 1 + 9 * 2
    assert not list(two.glob(".*"))
    pages = [(path / "report.html").read_text() for path in (two, tmp_path / "one")]
    assert pages[0].count("data:image/") == pages[1].count("data:image/") > 0


@pytest.mark.slow
def test_two_processes_measure_what_one_does(model, tmp_path):
    data = write_set(tmp_path / "set", 6)
    settings = {"dataset_dir": str(data), "model_file": str(model), **EVALUATION}
    run("evaluating", "train.json", "evaluate.json", output_dir=str(tmp_path / "one"), progress=False, **settings)
    configs = ("train.json", "evaluate.json", "multi_gpu_evaluate.json")
    finish([*TORCHRUN, *bundle_command("evaluating", *configs, output_dir=tmp_path / "two", **settings)])
    one, two = (tmp_path / name / "evaluation" for name in ("one", "two"))
    assert table(two / "metrics.csv") == table(one / "metrics.csv") != []
    assert (two / "metrics_summary.csv").read_bytes() == (one / "metrics_summary.csv").read_bytes()
    shown = [[line for line in (path / "report.html").read_text().splitlines() if "<h3" in line] for path in (one, two)]
    assert shown[0] == shown[1] != []


@pytest.mark.slow
def test_two_processes_read_and_encode_each_support_item_once_and_adapt_once(tmp_path):
    folder = write_set(tmp_path / "set", 5)
    finish([*TORCHRUN, "-m", "tests.helpers.sharing", str(folder), str(tmp_path / "cache"), str(tmp_path)])
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert sorted(process["read"] for process in found) == [2, 3]
    assert sorted(process["encoded"] for process in found) == [2, 3]
    assert found[0]["embedding"] == found[1]["embedding"] and len(found[0]["embedding"]) == 5
    assert [process["adapted"] for process in found] == [1, 0]
    assert {**found[0]["adaptation"], "files": {}} == {**found[1]["adaptation"], "files": {}}


SRUN = """#!/bin/bash
# Two machines: what srun is given, twice at once.
while [[ $1 == --* ]]; do shift; done
"$@" & first=$!
"$@" & second=$!
wait $first && wait $second
"""


@pytest.mark.slow
def test_the_slurm_example_segments_an_archive_on_two_machines(model, tmp_path):
    """Slurm's commands are stood in for; `torchrun` is started twice and finds itself as on two machines."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", "#!/bin/sh\necho 127.0.0.1\necho 127.0.0.2\n")):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    support = write_set(tmp_path / "support", 3)
    variables = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "VENV": sys.prefix,
        "BUNDLE": BUNDLE,
        "PORT": port,
        "SUPPORT": support,
        "QUERIES": support / "images",
        "OUTPUT": tmp_path / "out",
        "ARGS": f"--model_file {model} --image_size 64 --region_below 0 --report_figures 0 --segment_labelled True",
        "TMPDIR": tmp_path,
        **{"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": 2, "SLURM_JOB_ID": 7, "SLURM_SUBMIT_DIR": tmp_path},
        **{"OMP_NUM_THREADS": 1, "CUDA_VISIBLE_DEVICES": "", "PROCESSES": 1},
    }
    done = subprocess.run(
        ["bash", str(EXAMPLES / "inference.sbatch")],
        env={**os.environ, **{name: str(value) for name, value in variables.items()}},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert {row["case"] for row in table(tmp_path / "out" / "summary.csv")} == {"case0", "case1", "case2"}
    made = records(tmp_path / "out")
    assert len(made) == 3 and len({record["run"] for record in made.values()}) == 1
    # The images of the support set stay on no machine.
    assert not list(tmp_path.glob("sam2sgp-*"))
