"""What a query costs, stage by stage: time and peak memory over backbones, sizes, N, K and C, and the budgets.

    python benchmarks/latency.py                      # the budgets' cases, then the budgets
    python benchmarks/latency.py --backbones nano --sizes 128 --n 4 256 --k 4 --c 1 8 --threads 1

N support images, K of them used per query, C classes. Each case runs in a process of its own, with a bank on disk that
is warm: everything is encoded, as when a server has been running. A query is a new image each time; the figures are
medians over the queries. Stages: `encode` (the image encoder), `retrieve` (similarities and choice), `read` (memory of
the chosen items), `attention` (memory attention), `prior` (support prior and regression), `pseudo-mask` (the first
decoder), `PMA` (the second one), `refinement`, `restore` (back to the image's own grid and class map), `second pass`
(an object of 0.4 of the image's side is segmented again, with an encoder pass of its own). `query` is all but the last.

`authors` is the design of the paper's code, from our own parts: support images and masks are encoded anew for every
query, all N of them guide it, and nothing is kept. Next to the times stands what the machine can do: the encoder's
multiplications and additions, counted by PyTorch, over the rate of a large matrix product of the same threads.

Nano has the embedded weights, the others random ones: a time does not depend on them.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sam2sgp.inferers import SupportSetInferer
from sam2sgp.networks import SAM2SGP, load_weights
from sam2sgp.support import SupportBank, SupportSampler
from sam2sgp.transforms import Fit, label_map, to_three_channels

WEIGHTS = Path(__file__).resolve().parents[1] / "bundle" / "models" / "model.pt"
EMBEDDED = "nano", 128
OURS, AUTHORS = "ours", "authors"
STAGES = ("encode", "retrieve", "read", "attention", "prior", "pseudo-mask", "PMA", "refinement", "restore")
SECOND = "second pass"
# Backbone, size, N, K, C and design of the cases that the budgets need.
BUDGET_CASES = (
    ("nano", 128, 4, 4, 1, OURS),
    ("nano", 128, 256, 4, 1, OURS),
    ("nano", 128, 1024, 4, 1, OURS),
    ("nano", 128, 4, 4, 8, OURS),
    ("tiny", 512, 4, 4, 1, OURS),
    ("tiny", 512, 32, 4, 1, OURS),
    ("tiny", 512, 4, 4, 8, OURS),
    ("tiny", 512, 4, 4, 1, AUTHORS),
    ("tiny", 512, 32, 32, 1, AUTHORS),
    ("tiny", 1024, 4, 4, 1, OURS),
    ("tiny", 1024, 32, 4, 1, OURS),
)
MATRIX = 2048
REPEATS = 5
# Share of the image's side that the object measures.
OBJECT = 0.4
# Side of an image before it was fitted to the network, over the network's.
OWN_SIDE = 1.5


class Stopwatch:
    """Seconds spent in watched methods, by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def watch(self, owner: Any, name: str, stage: str) -> None:
        """From now on count the time of `owner.name`."""
        method = getattr(owner, name)

        def timed(*args, **kwargs):
            started = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self.seconds[stage] += time.perf_counter() - started

        setattr(owner, name, timed)

    def take(self) -> dict[str, float]:
        """The seconds so far; begins anew."""
        seconds, self.seconds = dict(self.seconds), defaultdict(float)
        return seconds


def disc(size: int) -> Tensor:
    """(size, size) in {0, 1}."""
    rows = torch.arange(size)
    distance = (rows[:, None] - size // 2) ** 2 + (rows - size // 2) ** 2
    return (distance < (OBJECT / 2 * size) ** 2).float()


def labelled_image(size: int, classes: int) -> tuple[Tensor, Tensor]:
    """A noisy image (1, 1, size, size) of a disc, and its class map (1, size, size): sectors of the disc."""
    mask = disc(size)
    image = (0.7 * mask + 0.3 * torch.rand(1, 1, size, size)).clamp(0, 1)
    columns = torch.arange(size) * 4 * classes // size % classes + 1
    return image, (mask * columns)[None].long()


def support_case(number: int, size: int, classes: int) -> dict:
    image, label = labelled_image(size, classes)
    own = {"name": str(number), "patient": str(number), "group": "", "label": label, "label_full": label}
    return {**own, "image": image, "image_full": image, "geometry": argparse.Namespace(spacing=None)}


def build(backbone: str, size: int) -> SAM2SGP:
    torch.manual_seed(0)
    network = SAM2SGP(backbone, size)
    if (backbone, size) == EMBEDDED:
        load_weights(network, WEIGHTS)
    return network.eval()


def ours(network: SAM2SGP, n: int, k: int, c: int, folder: str) -> tuple[Callable, dict[str, float]]:
    """A function that segments one image and gives the seconds of its stages, and what building the bank took."""
    size = network.image_size
    cases = [support_case(number, size, c) for number in range(n)]
    started = time.perf_counter()
    bank = SupportBank(cases, lambda case: case, progress=False, cache_dir=folder)
    with torch.no_grad():
        bank.encode(network)
    built = {"build": (time.perf_counter() - started) / n}
    inferer = SupportSetInferer(bank, SupportSampler(k=k), batch_size=1, region_below=0.7, object_gate=False)
    watch = Stopwatch()
    watch.watch(network, "encode", "encode")
    watch.watch(bank, "retrieve", "retrieve")
    watch.watch(bank, "select", "read")
    watch.watch(network, "_condition", "attention")
    watch.watch(network, "_support_maps", "prior")
    watch.watch(network.pmg_decoder, "forward", "pseudo-mask")
    watch.watch(network, "guide", "PMA")
    watch.watch(network.refinement, "forward", "refinement")
    own = int(OWN_SIDE * size)
    fit = Fit.of((own, own), size)
    found = (10 * disc(own) - 5).expand(1, c, own, own)
    full = labelled_image(own, c)[0]

    def query(image: Tensor) -> dict[str, float]:
        watch.take()
        started = time.perf_counter()
        (chunk,) = inferer.chunks(image, network)
        segmented = time.perf_counter()
        label_map(fit.restore(chunk.output.logits))
        seconds = {"query": time.perf_counter() - started, "restore": time.perf_counter() - segmented, **watch.take()}
        started = time.perf_counter()
        inferer.second_pass(found, full, network)
        return {**seconds, SECOND: time.perf_counter() - started}

    return query, built


def authors(network: SAM2SGP, n: int, c: int) -> Callable:
    """Support images and masks go through the network with every query, and all of them guide it."""
    size = network.image_size
    cases = [support_case(number, size, c) for number in range(n)]
    images = to_three_channels(torch.cat([case["image"] for case in cases]))
    labels = torch.cat([case["label"] for case in cases])
    masks = torch.stack([labels == value for value in range(1, c + 1)], 1).float()
    own = int(OWN_SIDE * size)
    fit = Fit.of((own, own), size)

    def query(image: Tensor) -> dict[str, float]:
        started = time.perf_counter()
        logits = network(to_three_channels(image), images, masks)
        label_map(fit.restore(logits))
        return {"query": time.perf_counter() - started}

    return query


def encoder_floor(network: SAM2SGP) -> dict[str, float]:
    """Operations of an encoder pass, and the seconds they take at the rate of a large matrix product."""
    image = torch.rand(1, 3, network.image_size, network.image_size)
    with FlopCounterMode(display=False) as counter:
        network.encode(image)
    left, right = torch.rand(2, MATRIX, MATRIX)
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - started)
    operations = counter.get_total_flops()
    return {"operations": operations, "floor": operations * min(seconds) / (2 * MATRIX**3)}


@torch.inference_mode()
def measure(backbone: str, size: int, n: int, k: int, c: int, design: str, queries: int) -> dict[str, float]:
    """Medians in seconds by stage, `peak` in MiB and the encoder's floor; for a process of its own."""
    network = build(backbone, size)
    floor = encoder_floor(network)
    with tempfile.TemporaryDirectory() as folder:
        if design == OURS:
            query, built = ours(network, n, k, c, folder)
        else:
            query, built = authors(network, n, c), {}
        query(labelled_image(size, c)[0])
        taken = [query(labelled_image(size, c)[0]) for _ in range(queries)]
    medians = {stage: statistics.median(entry.get(stage, 0.0) for entry in taken) for stage in taken[0]}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {**medians, **floor, **built, "peak": peak}


def in_a_process(case: Sequence, options: argparse.Namespace) -> dict[str, float]:
    settings = json.dumps([*case, options.queries])
    child = [sys.executable, __file__, "--child", settings, "--threads", str(options.threads)]
    return json.loads(subprocess.run(child, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def table(results: dict[tuple, dict[str, float]]) -> None:
    stages = ["query", *STAGES, SECOND]
    print("| backbone | px | N | K | C | design | " + " | ".join(f"{stage}, ms" for stage in stages), end="")
    print(" | encoder floor, ms | bank, ms per item | peak, MiB |")
    print("|" + " --- |" * (9 + len(stages)))
    for case, found in results.items():
        cells = [f"{1000 * found[stage]:.1f}" if stage in found else "" for stage in stages]
        cells += [f"{1000 * found['floor']:.1f}", f"{1000 * found['build']:.1f}" if "build" in found else ""]
        print("|", " | ".join([*map(str, case), *cells, f"{found['peak']:.0f}"]), "|")


def budgets(results: dict[tuple, dict[str, float]]) -> list[tuple[str, float, str]]:
    """What is budgeted, the figure, and the budget; those whose cases were measured."""
    rows = []

    def ratio(name: str, upper: tuple, lower: tuple, budget: str, of: str = "query", over: str = "query") -> None:
        if upper in results and lower in results:
            rows.append((name, results[upper][of] / results[lower][over], budget))

    nano, tiny, large = ("nano", 128), ("tiny", 512), ("tiny", 1024)
    for n in (256, 1024):
        ratio(f"nano: query at N = {n} over N = 4", (*nano, n, 4, 1, OURS), (*nano, 4, 4, 1, OURS), "<= 1.05")
    for shape, budget in ((nano, "none"), (tiny, "<= 1.4"), (large, "<= 1.7")):
        case = (*shape, 4, 4, 1, OURS)
        name = f"{shape[0]} at {shape[1]} px: query over its encoder pass, K = 4, C = 1"
        ratio(name, case, case, budget, over="encode")
    for shape in (nano, tiny):
        name = f"{shape[0]} at {shape[1]} px: eight classes over one"
        ratio(name, (*shape, 4, 4, 8, OURS), (*shape, 4, 4, 1, OURS), "<= 3")
    for shape in (tiny, large):
        for n, budget in ((4, ">= 3"), (32, ">= 20")):
            name = f"{shape[0]} at {shape[1]} px: the authors' design over ours at N = {n}"
            ratio(name, (*shape, n, n, 1, AUTHORS), (*shape, n, 4, 1, OURS), budget)
    case = (*large, 32, 4, 1, OURS)
    if case in results:
        rows.append(("tiny at 1024 px, N = 32: peak memory, GiB", results[case]["peak"] / 1024, "<= 2.5"))
    case = (*nano, 4, 4, 1, OURS)
    if case in results:
        rows.append(("nano at 128 px: query at K = 4, s", results[case]["query"], "<= 0.15 on one core"))
        whole = results[case]["query"] + results[case][SECOND]
        rows.append(("nano at 128 px: query at K = 4 with second pass, s", whole, "<= 0.15 on one core"))
    return rows


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--backbones", nargs="+", help="instead of the budgets' cases: all combinations of these")
    arguments.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024])
    arguments.add_argument("--n", type=int, nargs="+", default=[4])
    arguments.add_argument("--k", type=int, nargs="+", default=[4])
    arguments.add_argument("--c", type=int, nargs="+", default=[1])
    arguments.add_argument("--designs", nargs="+", default=[OURS], choices=[OURS, AUTHORS])
    arguments.add_argument("--queries", type=int, default=7, help="timed queries of each case")
    arguments.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments.add_argument("--child", help=argparse.SUPPRESS)
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    if options.child:
        print(json.dumps(measure(*json.loads(options.child))))
        return
    cases = list(BUDGET_CASES)
    if options.backbones:
        shapes = [(b, s) for b in options.backbones for s in options.sizes]
        loads = [(n, k, c) for n in options.n for k in options.k for c in options.c if k <= n]
        cases = [(*shape, *load, design) for shape in shapes for load in loads for design in options.designs]
    print(f"\n{date.today()}, {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}", end="")
    print(f", {options.threads} threads\n", flush=True)
    results = {}
    for case in cases:
        results[case] = in_a_process(case, options)
        print(f"{case}: {results[case]['query']:.3f} s", file=sys.stderr, flush=True)
    table(results)
    print("\n| what | measured | budget |\n| --- | --- | --- |")
    for name, value, budget in budgets(results):
        print(f"| {name} | {value:.3f} | {budget} |")


if __name__ == "__main__":
    main()
