"""What one picture costs in a process that starts cold, by each command: nearly all of it are imports.

    python benchmarks/startup.py                    # the command and the run of the bundle behind it, three times each
    python benchmarks/startup.py --whole            # and the command with all of MONAI's optional packages

A phantom ultrasound picture is segmented with a support set of a few others and the embedded weights, as a user does
it. Counted are the seconds of the processor, children included, because other jobs may share the machine, those of the
clock, and the peak of memory. The commands take turns, after a first run of each, which reads the files from disk.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from sam2sgp.data.phantom import make_phantoms

BUNDLE = Path(__file__).resolve().parents[1] / "bundle"
COMMAND = [sys.executable, "-c", "from sam2sgp.cli import app; app()", "segment"]
WHOLE = [sys.executable, "-c", "import monai.bundle; from sam2sgp.cli import app; app()", "segment"]
RUN = [sys.executable, "-m", "monai.bundle", "run", "inferring", "--config_file", "configs/inference.json"]
QUIET = ["--progress", "False"]


def commands(folder: Path, whole: bool) -> dict[str, list[str]]:
    """Command lines by name, for one query; results go to `folder / "out"`."""
    data = make_phantoms(folder / "phantoms", 8, modalities=["us"], progress=False)
    support = data / "support" / "us"
    query = min(path for path in (data / "queries" / "us").rglob("*") if path.is_file())
    short = ["-s", support, "-q", query, "-o", folder / "out", "--no-resume", *QUIET]
    places = ["--support_dir", support, "--dataset_dir", query, "--output_dir", folder / "out", "--resume", "False"]
    found = {"sam2sgp segment": [*COMMAND, *short]}
    if whole:
        found["sam2sgp segment, with all optional packages"] = [*WHOLE, *short]
    found["python -m monai.bundle run inferring"] = [*RUN, *places, *QUIET]
    return {name: list(map(str, words)) for name, words in found.items()}


def measured(command: list[str], threads: int) -> tuple[float, float, float]:
    """Processor seconds, clock seconds and peak MiB of a process, its children included."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(BUNDLE)}
    started = time.perf_counter()
    with tempfile.TemporaryFile() as told:
        process = subprocess.Popen(command, cwd=BUNDLE, env=environment, stdout=told, stderr=told)
        _, status, usage = os.wait4(process.pid, 0)
        clock = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            told.seek(0)
            raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}.\n{told.read().decode()}")
    return usage.ru_utime + usage.ru_stime, clock, usage.ru_maxrss / 1024


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--runs", type=int, default=3)
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--whole", action="store_true", help="also with all of MONAI's optional packages")
    options = arguments.parse_args()
    print(f"\n{date.today()}, {platform.machine()}, {os.cpu_count()} cores, {options.threads} threads\n")
    print("| one picture, cold | processor time, s | median | clock, s | peak, MiB |\n| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        named = commands(Path(folder), options.whole)
        for command in named.values():
            measured(command, options.threads)
        turns = [[measured(command, options.threads) for command in named.values()] for _ in range(options.runs)]
    for name, taken in zip(named, zip(*turns, strict=True), strict=True):
        processor, clock, peak = zip(*taken, strict=True)
        each = ", ".join(f"{seconds:.2f}" for seconds in processor)
        medians = " | ".join(f"{statistics.median(values):.2f}" for values in (processor, clock))
        print(f"| `{name}` | {each} | {medians} | {max(peak):.0f} |")


if __name__ == "__main__":
    main()
