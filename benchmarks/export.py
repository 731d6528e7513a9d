"""Exported graphs against PyTorch on the CPU: time by stage and of a whole query, and Dice between their label maps.

    python benchmarks/export.py                                  # the times
    python benchmarks/export.py --data DIR --queries 6           # and the label maps, on the data folders in DIR
    python benchmarks/export.py --cases lite:256:1 --threads 1

A case is backbone:pixels:classes; K = 4. Its network is exported to the output folder, where an earlier run has not
done that, and then each query, always a new image, is segmented by PyTorch and by each runtime in turn, so that all
suffer the same from whatever else the machine does; the figures are medians. Stages: `encode` (the image encoder),
`segment` (memory attention, prior, decoders, refinement, and the regression's solution in PyTorch), `query` (all from
the image at the network's size to the class map at its own), `second pass` (an object is segmented again in a region,
with an encoder pass of its own). `ready` is the time until the graphs are read. Nano has the embedded weights, the
others random ones: a time does not depend on them.

`--cpu_time` counts the processor's seconds instead of the clock's, for a machine that other jobs share; with one thread
both mean the same.

`int8` are the graphs with the weights of linear layers as 8-bit integers and activations quantised while running
(`quantize_dynamic` of ONNX Runtime), by ONNX Runtime. With `--data`, the embedded network segments the query slices of
the tasks of `_tasks.py`, each with 16 support pairs, through the bundle's inference config with nothing but `runtime`
and `graphs_dir` changed. Dice is between a runtime's masks and PyTorch's, over all pixels of a task's queries.
"""

import argparse
import hashlib
import json
import logging
import shutil
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _tasks import Task, add_task_arguments, make_tasks, write_pairs
from fewshot import bundle_config, chosen_tasks, dice, machine
from latency import OWN_SIDE, WEIGHTS, build, labelled_image, support_case
from tqdm import tqdm

from sam2sgp.data import read_label
from sam2sgp.errors import WeightsError
from sam2sgp.inferers import InferenceSettings, SupportSetInferer
from sam2sgp.networks import SAM2SGP
from sam2sgp.runtime import RUNTIMES, GraphRuntime, export_graphs
from sam2sgp.runtime.export import MANIFEST, checked_files
from sam2sgp.support import SupportBank, SupportSampler
from sam2sgp.transforms import Letterbox, label_map

CASES = ("lite:256:1", "lite:256:8", "tiny:512:1")
EAGER, INT8 = "eager", "int8"
STAGES = ("encode", "segment", "query", "second pass")
ITEMS, K = 8, 4
SUPPORT_PAIRS = 16


def exported(network: SAM2SGP, folder: Path) -> Path:
    """The folder with a network's graphs, made if need be."""
    try:
        checked_files(network, folder)
    except WeightsError:
        export_graphs(network, folder)
    return folder


def quantised(folder: Path) -> Path:
    """A folder next to `folder` with its graphs in 8 bits, made again."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # It advises, with every graph, on a preparation that concerns static quantisation.
    logging.getLogger().setLevel(logging.ERROR)
    target = folder.with_name(f"{folder.name}.{INT8}")
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    manifest = json.loads((folder / MANIFEST).read_text())
    for name in manifest["sha256"]:
        quantize_dynamic(folder / name, target / name, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul"])
        manifest["sha256"][name] = hashlib.sha256((target / name).read_bytes()).hexdigest()
    (target / MANIFEST).write_text(json.dumps(manifest))
    return target


def count_time(owner: Any, name: str, seconds: dict[str, float], clock: Callable[[], float]) -> None:
    """From now on add the time of the method `owner.name` to `seconds`."""
    method = getattr(owner, name)

    def timed(*args):
        started = clock()
        try:
            return method(*args)
        finally:
            seconds[name] += clock() - started

    setattr(owner, name, timed)


def runtimes(folder: Path, names: Sequence[str]) -> dict[str, GraphRuntime | None]:
    """What runs a network, by name; None is PyTorch."""
    found: dict[str, GraphRuntime | None] = {}
    for name in names:
        graphs = quantised(folder) if name == INT8 else folder
        found[name] = None if name == EAGER else GraphRuntime("onnxruntime" if name == INT8 else name, graphs)
    return found


@torch.inference_mode()
def times(
    case: str, names: Sequence[str], output: Path, queries: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, dict[str, float]]:
    """Median milliseconds by stage of each runtime, and those until its graphs are `ready`."""
    backbone, size, classes = case.split(":")
    size, classes = int(size), int(classes)
    network = build(backbone, size)
    with torch.inference_mode(False):
        folder = exported(network, output / f"{backbone}_{size}.graphs")
    cases = [support_case(number, size, classes) for number in range(ITEMS)]
    own = int(OWN_SIDE * size)
    letterbox = Letterbox.of((own, own), size)
    taken: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in names}
    parts = {}
    for name, runtime in runtimes(folder, names).items():
        # PyTorch's is a network of its own, since the others' graphs leave some of their work to the one they hold.
        own_network = build(backbone, size) if runtime is None else network
        started = clock()
        runs = own_network if runtime is None else runtime(network)
        taken[name]["ready"].append(1000 * (clock() - started))
        bank = SupportBank(cases, lambda case: case, progress=False)
        sampler = SupportSampler(k=K)
        inferer = SupportSetInferer(
            bank, InferenceSettings(sampler, 1, region_below=0.7, object_gate=False), runtime=runtime
        )
        watched: dict[str, float] = defaultdict(float)
        for stage in ("encode", "segment"):
            count_time(runs, stage, watched, clock)
        parts[name] = own_network, inferer, watched
    for number in range(queries + 1):
        image, label = labelled_image(size, classes)
        full = labelled_image(own, classes)[0]
        found = torch.stack([10.0 * (label[0] == value) - 5 for value in range(1, classes + 1)])[None]
        found = torch.nn.functional.interpolate(found, size=(own, own))
        for name, (own_network, inferer, watched) in parts.items():
            watched.clear()
            started = clock()
            (chunk,) = inferer.chunks(image, own_network)
            label_map(letterbox.restore(chunk.output.logits))
            seconds = {"query": clock() - started, **watched}
            started = clock()
            inferer.second_pass(found, full, own_network)
            seconds["second pass"] = clock() - started
            if number:
                # The first query encodes the bank and its regions.
                for stage in STAGES:
                    taken[name][stage].append(1000 * seconds[stage])
    return {name: {stage: statistics.median(values) for stage, values in of.items()} for name, of in taken.items()}


def masks(task: Task, support: Path, settings: dict, output: Path) -> np.ndarray:
    """All pixels of a task's queries, bool, as the bundle segments them."""
    shutil.rmtree(output, ignore_errors=True)
    paths = {"support_dir": support, "dataset_dir": task.folder / "queries" / "images", "output_dir": output}
    parser = bundle_config({**settings, **{key: str(path) for key, path in paths.items()}, "report_figures": 0})
    parser.get_parsed_content("inferring")
    return np.concatenate([(read_label(output / f"{stem}.png")[0] > 0).ravel() for stem in task.queries])


def agreement(
    tasks: Sequence[Task], names: Sequence[str], folder: Path, output: Path, overrides: dict
) -> dict[str, dict[str, float]]:
    """Dice with PyTorch's masks by task and runtime, and of each runtime with the truth."""
    graphs = {name: quantised(folder) if name == INT8 else folder for name in names}
    rows: dict[str, dict[str, float]] = {}
    for task in tqdm(tasks, desc="Label maps", unit="task"):
        stems = task.support[:SUPPORT_PAIRS]
        images = [task.image("support", stem) for stem in stems]
        support = write_pairs(output / "support", images, [task.mask("support", stem) for stem in stems])
        truth = np.concatenate([task.mask("queries", stem).ravel() for stem in task.queries])
        rows[task.name] = {}
        plain = None
        for name in names:
            runtime = {EAGER: EAGER, INT8: "onnxruntime"}.get(name, name)
            settings = {**overrides, "runtime": runtime, "graphs_dir": str(graphs[name])}
            found = masks(task, support, settings, output / "masks")
            plain = found if name == EAGER else plain
            rows[task.name][name] = dice(found, plain) if plain.any() or found.any() else 1.0
            rows[task.name][f"{name} truth"] = dice(found, truth)
    return rows


def time_table(results: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    heads = [f"{stage}, ms (over)" for stage in STAGES]
    lines = ["| case | runtime | " + " | ".join(heads) + " | ready, s |", "|" + " --- |" * (len(STAGES) + 3)]
    for case, of in results.items():
        for name, found in of.items():
            cells = [f"{found[stage]:.1f} ({of[EAGER][stage] / found[stage]:.2f}×)" for stage in STAGES]
            lines.append("| " + " | ".join([case, name, *cells, f"{found['ready'] / 1000:.1f}"]) + " |")
    return lines


def agreement_table(rows: dict[str, dict[str, float]], names: Sequence[str]) -> list[str]:
    lines = ["| Dice with eager | mean over tasks | least | its task | mean Dice with the truth |", "|" + " --- |" * 5]
    for name in names:
        values = {task: row[name] for task, row in rows.items()}
        worst = min(values, key=values.__getitem__)
        truth = np.mean([row[f"{name} truth"] for row in rows.values()])
        least = f"{values[worst]:.5f} | {worst}" if name != EAGER else "1 | "
        lines.append(f"| {name} | {np.mean(list(values.values())):.5f} | {least} | {truth:.4f} |")
    return lines


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_task_arguments(arguments, required=False)
    arguments.set_defaults(queries=6)
    arguments.add_argument("--cases", nargs="*", default=list(CASES), help="backbone:pixels:classes")
    arguments.add_argument("--runtimes", nargs="+", default=[*RUNTIMES, INT8], choices=[*RUNTIMES, INT8])
    arguments.add_argument("--repeats", type=int, default=9, help="timed queries of each case")
    arguments.add_argument("--tasks", nargs="*", default=["*"], help="names or patterns, such as 'acdc_*'")
    arguments.add_argument("--output", type=Path, default=Path("out/export"))
    arguments.add_argument("--cpu_time", action="store_true", help="processor instead of clock time, see above")
    arguments.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    names = [EAGER, *options.runtimes]
    output = options.output.resolve()
    clock = time.process_time if options.cpu_time else time.perf_counter
    results = {}
    for case in tqdm(options.cases, desc="Times", unit="case"):
        results[case] = times(case, names, output, options.repeats, clock)
    print(f"\n{machine()}, {'processor' if options.cpu_time else 'clock'} time\n")
    if results:
        print("\n".join(time_table(results)))
    if options.data:
        folder = exported(build("lite", 256), output / "lite_256.graphs")
        tasks = make_tasks(options.data, output / "tasks", options.queries, options.held_out, options.seed)
        rows = agreement(chosen_tasks(tasks, options.tasks), names, folder, output, {})
        print("\n".join(["", f"{len(rows)} tasks, {WEIGHTS.name}", "", *agreement_table(rows, names)]))


if __name__ == "__main__":
    main()
