"""An archive segmented by two processes, one of which is killed in the middle: every case exactly once.

    python benchmarks/archive.py --output OUT

Phantom CT volumes of 8 slices of 64 px are made once, with a support set of other patients. Then, with the embedded
weights and through the bundle's own commands:

1. A part of the archive is segmented by one process, and the same part by two (`torchrun`).
2. The whole archive is segmented by two processes. When half of it is done, one of them is killed (SIGKILL), and
   `torchrun` ends the other. The same command is started again and does the rest.

Counted at the end, of the whole archive: cases without a label file or without their rows in `summary.csv` (missing),
cases with more rows than classes (twice), and results made before the kill that the second start made again. Seconds
are those of the commands, start-up included; cases per second are counted from the first result to the last. The
network sees 64 px, slice by slice without a second pass, because it is the processes that are measured here.
"""

import argparse
import csv
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections import Counter
from datetime import date
from pathlib import Path

import nibabel as nib
import numpy as np
import psutil
import torch
from tqdm import tqdm

from sam2sgp.data.phantom import make_phantoms
from sam2sgp.data.phantom_scenes import CLASS_NAMES, phantom_volume
from sam2sgp.files import replacing

BUNDLE = Path(__file__).resolve().parents[1] / "bundle"
SIDE, SLICES = 64, 8
SETTINGS = {"image_size": SIDE, "region_below": 0, "three_d_memory": False, "progress": False}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
CONFIGS = {1: ["inference.json"], 2: ["inference.json", "multi_gpu_inference.json"]}


def make_archive(folder: Path, count: int) -> tuple[Path, Path]:
    """Folders of the support set and of `count` queries; volumes that are there already stay."""
    support = make_phantoms(folder / "phantoms", 8, (SIDE, SIDE), SLICES, modalities=["ct"], progress=False)
    queries = folder / f"archive_{count}"
    queries.mkdir(parents=True, exist_ok=True)
    for number in tqdm(range(count), desc="Making the archive", unit="volume"):
        path = queries / f"volume_{number:06d}.nii.gz"
        if not path.exists():
            image, _, affine = phantom_volume("ct", np.random.default_rng([1, number]), (SIDE, SIDE), SLICES)
            with replacing(path) as part:
                nib.save(nib.Nifti1Image(image, affine), part)
    return support / "support" / "ct", queries


def command(processes: int, support: Path, queries: Path, output: Path) -> list[str]:
    configs = "[" + ",".join(f"'configs/{name}'" for name in CONFIGS[processes]) + "]"
    settings = {"support_dir": support, "dataset_dir": queries, "output_dir": output, **SETTINGS}
    words = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    start = TORCHRUN if processes > 1 else []
    return [sys.executable, *start, "-m", "monai.bundle", "run", "inferring", "--config_file", configs, *words]


def start(words: list[str], log: Path) -> subprocess.Popen:
    with open(log, "a") as file:
        return subprocess.Popen(words, cwd=BUNDLE, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"})


def records(output: Path) -> dict[str, tuple[str, float]]:
    """{label file: the run that made it and when}."""
    found = {}
    for path in (output / "records").glob("*.json"):
        record = json.loads(path.read_text())
        found[record["output"]] = record["run"], path.stat().st_mtime
    return found


def measured(name: str, seconds: float, made: dict[str, tuple[str, float]]) -> dict:
    times = sorted(moment for _, moment in made.values())
    rate = (len(times) - 1) / (times[-1] - times[0])
    return {"run": name, "cases": len(made), "seconds": f"{seconds:.0f}", "cases/s": f"{rate:.2f}"}


def run(name: str, processes: int, support: Path, queries: Path, output: Path) -> dict:
    """A whole run, from nothing."""
    shutil.rmtree(output, ignore_errors=True)
    began = time.monotonic()
    process = start(command(processes, support, queries, output), output.with_suffix(".log"))
    if process.wait():
        raise SystemExit(f"error: the run failed, see {output.with_suffix('.log')}.")
    return measured(name, time.monotonic() - began, records(output))


def run_with_kill(support: Path, queries: Path, output: Path, count: int) -> tuple[list[dict], dict[str, int]]:
    """The archive by two processes, one of which is killed when half of it is done; and again until the end."""
    shutil.rmtree(output, ignore_errors=True)
    words, log, began = command(2, support, queries, output), output.with_suffix(".log"), time.monotonic()
    process = start(words, log)
    while process.poll() is None and len(list((output / "records").glob("*.json"))) < count // 2:
        time.sleep(0.2)
    victims = [child for child in psutil.Process(process.pid).children() if child.environ().get("RANK") == "1"]
    for victim in victims:
        victim.kill()
    if not victims or not process.wait():
        raise SystemExit(f"error: there was nobody to kill, see {log}.")
    first = records(output)
    rows = [measured("archive, until the kill", time.monotonic() - began, first)]
    began = time.monotonic()
    if start(words, log).wait():
        raise SystemExit(f"error: the second start failed, see {log}.")
    last = records(output)
    made = {name: value for name, value in last.items() if first.get(name) != value}
    rows.append(measured("archive, started again", time.monotonic() - began, made))
    with open(output / "summary.csv", newline="") as file:
        lines = Counter(row["case"] for row in csv.DictReader(file))
    names = [path.name.removesuffix(".nii.gz") for path in queries.glob("volume_*.nii.gz")]
    return rows, {
        "cases": len(names),
        "done before the kill": len(first),
        "done after it": len(made),
        "made again though whole": sum(name in first for name in made),
        "missing": sum(not (lines[name] and (output / f"{name}.nii.gz").is_file()) for name in names),
        "twice": sum(lines[name] > len(CLASS_NAMES) for name in names),
        "cases in summary.csv": len(lines),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("out/archive"), help="folder for data and results")
    parser.add_argument("--cases", type=int, default=2000, help="volumes in the archive")
    parser.add_argument("--part", type=int, default=200, help="volumes for the comparison of one process with two")
    options = parser.parse_args()
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    support, queries = make_archive(output, options.cases)
    part = make_archive(output, options.part)[1]
    rows = [
        run("part, 1 process", 1, support, part, output / "one"),
        run("part, 2 processes", 2, support, part, output / "two"),
    ]
    more, counts = run_with_kill(support, queries, output / "whole", options.cases)
    rows += more
    print(f"\n{date.today()}, {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, lite\n")
    print("| " + " | ".join(rows[0]) + " |\n" + "| --- " * len(rows[0]) + "|")
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")
    print("\n| of the archive | |\n| --- | --- |")
    for name, value in counts.items():
        print(f"| {name} | {value:,} |")


if __name__ == "__main__":
    main()
