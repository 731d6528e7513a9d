"""What a query costs, stage by stage: time and peak memory over backbones, sizes, N, K and C, and the budgets.

    python benchmarks/latency.py                          # every budget, met or missed, and lite with other K and C
    python benchmarks/latency.py --budgets encoder_512    # one of them, with the cases that it needs
    python benchmarks/latency.py --backbones lite tiny small --sizes 256 512 1024 --n 4 256 --k 4 --c 1 8 --plot out.png

N support images, K of them used per query, C classes. Each case runs in a process of its own, with a bank on disk that
is warm: everything is encoded, as when a server has been running. A query is a new image each time; the figures are
medians over the queries. Stages: `load` (a PNG from disk to the network's grid), `encode` (the image encoder),
`retrieve` (similarities and choice), `read` (memory of the chosen items), `attention` (memory attention), `prior`
(support prior and regression), `pseudo-mask` (the first decoder), `PMA` (the second one), `refinement`, `restore` (back
to the image's own grid and class map), `second pass` (an object of each class, of 0.4 of the image's side, is segmented
again, with an encoder pass of its own). `query` is all but the first and the last.

`authors` is the design of the paper's code, from our own parts: support images and masks are encoded again for every
query, all N of them guide it, memory is not pooled, and nothing is kept.

`requests` asks the MONAI Label app's segmenter three times for the same picture: first; with half of K, for which it is
read and encoded already; and for one of the classes only, which is in the first result. Crops of the second pass are
encoded again where another K finds the object elsewhere: next to the times stand the images that were encoded.

Next to the times stands what the machine can do: the multiplications and additions of the encoder, and in a table of
their own those of each stage that has any, counted by PyTorch, over the rate of a large matrix product of the same
threads; and the bytes of weights and support memory that a query reads,
over the rate of a large copy.

`--cpu_time` counts the processor's seconds instead of the clock's, for a machine that other jobs share; with one thread
the two are the same on an idle one. Lite at 256 px has the embedded weights, all else random ones: a time does not
depend on them.
"""

import argparse
import itertools
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
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from monai.transforms import Compose
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from sam2sgp.inferers import InferenceSettings, SupportSetInferer
from sam2sgp.networks import SAM2SGP, load_weights
from sam2sgp.support import SupportBank, SupportSampler, TensorStore
from sam2sgp.transforms import (
    FitToSquared,
    Letterbox,
    LoadCased,
    ScaleIntensityByModalityd,
    label_map,
    to_three_channels,
)

REPO = Path(__file__).resolve().parents[1]
APP = REPO / "apps" / "sam2sgp"
WEIGHTS = REPO / "bundle" / "models" / "model.pt"
EMBEDDED = "lite", 256
OURS, AUTHORS, REQUESTS = "ours", "authors", "requests"
STAGES = ("load", "encode", "retrieve", "read", "attention", "prior", "pseudo-mask", "PMA", "refinement", "restore")
# Of them those with matrix products and convolutions.
COMPUTING = ("encode", "attention", "prior", "pseudo-mask", "PMA", "refinement")
OPERATIONS = "operations of "
SECOND = "second pass"
# Of `requests`, after the first, which is the query; and how many images each of them encodes.
ANOTHER_K, OTHER_CLASSES = "with another K", "for other classes"
ENCODED = "encoded by "
BANK, GRID = "bank", "grid"
MATRIX = 2048
COPY_BYTES = 2**28
# Memory of support items held between queries, as by default.
CACHE_MB = 64
REPEATS = 5
# Share of the image's side that the object measures.
OBJECT = 0.4
# Side of an image before it was fitted to the network, over the network's.
OWN_SIDE = 1.5
# Items of the banks that are built and interrupted.
BANKS = (64, 256)


@dataclass(frozen=True)
class Case:
    """What is measured in a process of its own."""

    backbone: str
    size: int
    n: int
    k: int = 4
    c: int = 1
    design: str = OURS

    def __str__(self) -> str:
        return f"{self.backbone}, {self.size} px, N = {self.n}, K = {self.k}, C = {self.c}, {self.design}"


@dataclass(frozen=True)
class Budget:
    """A figure: `of` the first case `over` one of the second; without a second, only the first case's in `unit`."""

    what: str
    limit: str
    upper: Case
    lower: Case | None = None
    of: str = "query"
    over: str = "query"
    unit: float = 1.0

    def value(self, results: "Results") -> float:
        return results[self.upper][self.of] / (results[self.lower][self.over] if self.lower else self.unit)

    def is_met(self, value: float) -> bool:
        """Whether such a value keeps the limit."""
        sign, limit = self.limit.split()
        return value <= float(limit) if sign == "<=" else value >= float(limit)


Results = dict[Case, dict[str, float]]


def _against_the_authors(size: int, n: int, limit: str) -> Budget:
    what = f"tiny, {size} px: the authors' design over ours, N = {n}"
    return Budget(what, limit, Case("tiny", size, n, n, design=AUTHORS), Case("tiny", size, n))


def _over_encoder(backbone: str, size: int, limit: str) -> Budget:
    case = Case(backbone, size, 4)
    return Budget(f"{backbone}, {size} px: query over its encoder pass, K = 4, C = 1", limit, case, case, over="encode")


def _eight_classes(backbone: str, size: int, limit: str) -> Budget:
    one, eight = Case(backbone, size, 4), Case(backbone, size, 4, c=8)
    return Budget(f"{backbone}, {size} px: eight classes over one", limit, eight, one)


def _flat(n: int) -> Budget:
    return Budget(f"lite, 256 px: query at N = {n} over N = 4", "<= 1.05", Case("lite", 256, n), Case("lite", 256, 4))


def _requests(again: str, classes: int) -> Budget:
    case = Case("lite", 256, 16, 8, classes, REQUESTS)
    return Budget(f"lite, 256 px: second request {again} over the first, C = {classes}", "<= 0.5", case, case, of=again)


MEMORY_CASE = Case("tiny", 1024, 32)
BUDGETS = {
    "flat_256": _flat(256),
    "flat_1024": _flat(1024),
    "encoder_512": _over_encoder("tiny", 512, "<= 1.4"),
    "encoder_1024": _over_encoder("tiny", 1024, "<= 1.7"),
    "classes_512": _eight_classes("tiny", 512, "<= 3"),
    "classes_lite": _eight_classes("lite", 256, "<= 2.5"),
    "authors_512_4": _against_the_authors(512, 4, ">= 3"),
    "authors_512_32": _against_the_authors(512, 32, ">= 20"),
    "authors_1024_4": _against_the_authors(1024, 4, ">= 3"),
    "authors_1024_32": _against_the_authors(1024, 32, ">= 20"),
    "memory": Budget("tiny, 1024 px, N = 32: peak memory, GB", "<= 2.5", MEMORY_CASE, of="peak", unit=1e9 / 2**20),
    "lite": Budget("lite, 256 px: query on one core, s", "<= 0.10", Case("lite", 256, 4)),
    "another_k": _requests(ANOTHER_K, 1),
    "another_k_3": _requests(ANOTHER_K, 3),
    "other_classes_3": _requests(OTHER_CLASSES, 3),
}
# The default network with fewer and more support items and classes.
GRID_CASES = [Case("lite", 256, 16, k, c) for k in (4, 8, 16) for c in (1, 3, 8)]


def counter() -> FlopCounterMode:
    """Counts multiplications and additions; PyTorch itself doesn't count those of its fused attention on a CPU."""
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    mapping = {
        fused: lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value),
        fused_backward: lambda grad, query, key, value, *_, **__: sdpa_backward_flop_count(grad, query, key, value),
    }
    return FlopCounterMode(display=False, custom_mapping=mapping)


class Stopwatch:
    """Seconds spent in watched methods, by stage; where it `counts`, their operations."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.seconds: dict[str, float] = defaultdict(float)
        self.counts = False

    def watch(self, owner: Any, name: str, stage: str) -> None:
        """From now on count the time of `owner.name`."""
        method = getattr(owner, name)

        def timed(*args, **kwargs):
            if self.counts:
                with counter() as counted:
                    result = method(*args, **kwargs)
                self.seconds[stage] += counted.get_total_flops()
                return result
            started = self.clock()
            try:
                return method(*args, **kwargs)
            finally:
                self.seconds[stage] += self.clock() - started

        setattr(owner, name, timed)

    def take(self) -> dict[str, float]:
        """The seconds so far; begins again."""
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
    """What preprocessing makes of a support pair; made when it is asked for, so that N of them take no memory."""
    torch.manual_seed(number)
    image, label = labelled_image(size, classes)
    own = {"name": str(number), "patient": str(number), "group": "", "label": label, "label_full": label}
    return {**own, "image": image, "image_full": image, "geometry": argparse.Namespace(spacing=None)}


def support_bank(n: int, size: int, classes: int, folder: str) -> SupportBank:
    cases = [{"name": str(number), "patient": str(number), "group": "", "label": str(number)} for number in range(n)]
    return SupportBank(
        cases,
        lambda case: support_case(int(case["name"]), size, classes),
        progress=False,
        store=TensorStore(folder, CACHE_MB),
    )


def build(backbone: str, size: int, memory_pool: int | None = None) -> SAM2SGP:
    torch.manual_seed(0)
    network = SAM2SGP(backbone, size, memory_pool=memory_pool)
    if (backbone, size) == EMBEDDED:
        load_weights(network, WEIGHTS)
    return network.eval()


def own_grid(size: int, classes: int) -> tuple[Letterbox, Tensor, Tensor]:
    """How an image of its own size fits the network; logits (1, C, H, W) of discs there, each class's a pixel beside
    the last one's, so that each has a region of its own; and the image."""
    own = int(OWN_SIDE * size)
    found = torch.stack([10 * disc(own).roll(number, 1) - 5 for number in range(classes)])[None]
    return Letterbox.of((own, own), size), found, labelled_image(own, classes)[0]


def ours(network: SAM2SGP, case: Case, folder: str, clock: Callable) -> tuple[Callable, dict[str, float]]:
    """A function that segments one image and gives the seconds of its stages; what building the bank took, and the
    operations of the stages."""
    size = network.image_size
    started = clock()
    bank = support_bank(case.n, size, case.c, f"{folder}/bank")
    with torch.no_grad():
        bank.encode(network)
    built = {"build": (clock() - started) / case.n}
    inferer = SupportSetInferer(bank, InferenceSettings(SupportSampler(k=case.k), region_below=0.7, object_gate=False))
    watch = Stopwatch(clock)
    watch.watch(network, "encode", "encode")
    watch.watch(bank, "retrieve", "retrieve")
    watch.watch(bank, "select", "read")
    watch.watch(network, "_condition", "attention")
    watch.watch(network, "_support_maps", "prior")
    watch.watch(network.pmg_decoder, "forward", "pseudo-mask")
    watch.watch(network, "guide", "PMA")
    watch.watch(network.refinement, "forward", "refinement")
    letterbox, found, full = own_grid(size, case.c)
    path = Path(folder, "query.png")
    load = Compose([LoadCased("image"), ScaleIntensityByModalityd("image"), FitToSquared("image", size=size)])

    def query() -> dict[str, float]:
        save(labelled_image(full.shape[-1], 1)[0][0, 0], path)
        watch.take()
        begun = clock()
        image = load({"image": str(path), "group": ""})["image"][:, :1]
        started = clock()
        (chunk,) = inferer.chunks(image, network)
        segmented = clock()
        label_map(letterbox.restore(chunk.output.logits))
        ended = clock()
        seconds = {"load": started - begun, "query": ended - started, "restore": ended - segmented, **watch.take()}
        started = clock()
        inferer.at_own_pixels(found, full, network)
        return {**seconds, SECOND: clock() - started}

    watch.counts = True
    list(inferer.chunks(labelled_image(size, 1)[0], network))
    operations = {OPERATIONS + stage: count for stage, count in watch.take().items() if stage in COMPUTING}
    watch.counts = False
    return query, built | operations


def authors(network: SAM2SGP, case: Case, clock: Callable) -> Callable:
    """Support images and masks go through the network with every query, and all of them guide it."""
    size = network.image_size
    cases = [support_case(number, size, case.c) for number in range(case.n)]
    images = to_three_channels(torch.cat([entry["image"] for entry in cases]))
    labels = torch.cat([entry["label"] for entry in cases])
    masks = torch.stack([labels == value for value in range(1, case.c + 1)], 1).float()
    letterbox = own_grid(size, 1)[0]

    def query() -> dict[str, float]:
        image = labelled_image(size, case.c)[0]
        started = clock()
        logits = network(to_three_channels(image), images, masks)
        label_map(letterbox.restore(logits))
        return {"query": clock() - started}

    return query


def server_segmenter(case: Case, folder: Path) -> Any:
    """The app's segmenter with `case.n` approved pictures in a folder."""
    sys.path.insert(0, str(APP))
    from lib.serving.approved_cases import LabelledCases
    from lib.serving.published_weights import Weights
    from lib.serving.segmenter import ServerSegmenter
    from lib.settings import Settings
    from lib.stores.opening import open_datastore

    labels = folder / "studies" / "labels" / "final"
    labels.mkdir(parents=True)
    for number in range(case.n):
        torch.manual_seed(number)
        image, label = labelled_image(int(OWN_SIDE * case.size), case.c)
        save(image[0, 0], folder / "studies" / f"{number}.png")
        Image.fromarray(label[0].byte().numpy()).save(labels / f"{number}.png")
    conf = {"state_dir": str(folder / "state"), "image_size": str(case.size), "k": str(case.k)}
    settings = Settings.from_conf(APP, str(folder / "studies"), conf)
    weights = Weights(settings.state_dir / "weights", settings.start_weights)
    return ServerSegmenter(settings, weights, LabelledCases(open_datastore(settings), settings))


def requests(case: Case, folder: str, clock: Callable) -> Callable:
    """A function that asks for a new picture three times, and gives seconds and images encoded of each."""
    segmenter = server_segmenter(case, Path(folder))
    from lib.serving.options import Options

    half, one = Options(k=case.k // 2), Options(classes=("class_1",))
    path = Path(folder, "query.png")
    network, encoded = segmenter.network, []
    encode = network.encode
    network.encode = lambda image: encoded.append(len(image)) or encode(image)

    def query() -> dict[str, float]:
        save(labelled_image(int(OWN_SIDE * case.size), 1)[0][0, 0], path)
        found = {}
        for name, options in (("query", Options()), (ANOTHER_K, half), (OTHER_CLASSES, one)):
            encoded.clear()
            started = clock()
            segmenter.segment(path, options)
            found |= {name: clock() - started, ENCODED + name: sum(encoded)}
        return found

    return query


def save(image: Tensor, path: Path) -> None:
    """Write an image (H, W) in [0, 1] as PNG."""
    Image.fromarray((255 * image).byte().numpy()).save(path)


def machine_limits(network: SAM2SGP, case: Case, clock: Callable) -> dict[str, float]:
    """Operations of an encoder pass and bytes that a query reads; the seconds of both at the machine's own rates."""
    image = torch.rand(1, 3, network.image_size, network.image_size)
    with counter() as counted:
        features = network.encode(image)
    memory = network.encode_support(features, torch.zeros(1, case.c, *image.shape[-2:]))
    support = sum(value.nbytes for value in vars(memory).values() if value is not None) * case.k
    read = support + sum(parameter.nbytes for parameter in network.parameters())
    left, right = torch.rand(2, MATRIX, MATRIX)
    source = torch.zeros(COPY_BYTES // 4)
    target = torch.empty_like(source)
    product, copy = (
        min(timed(work, clock) for _ in range(REPEATS)) for work in (lambda: left @ right, lambda: target.copy_(source))
    )
    operations = counted.get_total_flops()
    rate = 2 * MATRIX**3 / product
    return {
        "operations": operations,
        "rate": rate,
        "floor": operations / rate,
        "read_floor": read * copy / (2 * COPY_BYTES),
    }


def timed(work: Callable, clock: Callable) -> float:
    started = clock()
    work()
    return clock() - started


@torch.inference_mode()
def measure(case: Case, queries: int, memory_pool: int | None = None, cpu_time: bool = False) -> dict[str, float]:
    """Medians in seconds by stage, `peak` in MiB and the machine's limits; for a process of its own."""
    clock = time.process_time if cpu_time else time.perf_counter
    network = build(case.backbone, case.size, 1 if case.design == AUTHORS else memory_pool)
    with tempfile.TemporaryDirectory() as folder:
        if case.design == OURS:
            query, built = ours(network, case, folder, clock)
        elif case.design == REQUESTS:
            query, built = requests(case, folder, clock), {}
        else:
            query, built = authors(network, case, clock), {}
        if queries > 1:
            query()
        taken = [query() for _ in range(queries)]
    medians = {stage: statistics.median(entry.get(stage, 0.0) for entry in taken) for stage in taken[0]}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {**medians, **built, "peak": peak, **machine_limits(network, case, clock)}


@torch.no_grad()
def build_banks(clock: Callable) -> None:
    """Print what banks cost per item, and the encoder passes of one whose building is interrupted half-way."""
    print("| items | s per item | encoder passes, in one go | interrupted at the half, and resumed |")
    print("| --- | --- | --- | --- |")
    for n in BANKS:
        with tempfile.TemporaryDirectory() as folder:
            passes, seconds = [], 0.0
            for limits in ((n,), (n // 2, n)):
                network = build(*EMBEDDED)
                encode, done = network.encode, [0]
                for limit in limits:

                    def counted(image: Tensor, encode=encode, done=done, limit=limit):
                        if done[0] == limit:
                            raise KeyboardInterrupt
                        done[0] += len(image)
                        return encode(image)

                    network.encode = counted
                    started = clock()
                    try:
                        support_bank(n, network.image_size, 1, f"{folder}/{len(limits)}").encode(network)
                    except KeyboardInterrupt:
                        continue
                    seconds = seconds or clock() - started
                passes.append(done[0])
        print(f"| {n} | {seconds / n:.4f} | {passes[0]} | {passes[1]} |", flush=True)


def in_a_process(case: Case, options: argparse.Namespace) -> dict[str, float]:
    # The authors' design takes minutes a query.
    queries = 1 if case.design == AUTHORS and case.n > 4 else options.queries
    settings = json.dumps([asdict(case), queries, options.memory_pool, options.cpu_time])
    child = [sys.executable, __file__, "--child", settings, "--threads", str(options.threads)]
    return json.loads(subprocess.run(child, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def table(results: Results) -> None:
    stages = ["query", *STAGES, SECOND]
    print("| backbone | px | N | K | C | design | " + " | ".join(f"{stage}, ms" for stage in stages), end="")
    print(" | encoder's operations, G | their floor, ms | reading floor, ms | bank, ms per item | peak, MiB |")
    print("|" + " --- |" * (11 + len(stages)))
    for case, found in results.items():
        cells = [f"{1000 * found[stage]:.1f}" if stage in found else "" for stage in stages]
        cells += [f"{found['operations'] / 1e9:.1f}", *(f"{1000 * found[key]:.1f}" for key in ("floor", "read_floor"))]
        cells.append(f"{1000 * found['build']:.1f}" if "build" in found else "")
        print("|", " | ".join([*map(str, astuple(case)), *cells, f"{found['peak']:.0f}"]), "|")


def floors(results: Results) -> None:
    """Print what each stage takes and what its operations would take at the machine's rate."""
    print("\n| backbone | px | N | K | C | " + " | ".join(f"{stage}, G: ms (at least)" for stage in COMPUTING), end="")
    print(" | together, ms (at least) |\n|" + " --- |" * (6 + len(COMPUTING)))
    for case, found in results.items():
        if case.design != OURS:
            continue
        operations = [found[OPERATIONS + stage] for stage in COMPUTING]
        taken = [1000 * found[stage] for stage in COMPUTING]
        least = [1000 * count / found["rate"] for count in operations]
        cells = [
            f"{count / 1e9:.2f}: {ms:.1f} ({floor:.1f})"
            for count, ms, floor in zip(operations, taken, least, strict=True)
        ]
        cells.append(f"{sum(taken):.1f} ({sum(least):.1f})")
        print("|", " | ".join([*map(str, astuple(case)[:5]), *cells]), "|")


def requests_table(results: Results) -> None:
    """Print what is waited for the first time and again, each with the images that were encoded meanwhile."""
    names = ("query", ANOTHER_K, OTHER_CLASSES)
    print("\n| backbone | px | N | K | C | first, ms (encoded) | another K | over first | other classes | over first |")
    print("|" + " --- |" * 10)
    for case, found in results.items():
        first, *again = (f"{1000 * found[name]:.1f} ({found[ENCODED + name]:.0f})" for name in names)
        ratios = [f"{found[name] / found['query']:.2f}" for name in names[1:]]
        cells = [cell for pair in zip(again, ratios, strict=True) for cell in pair]
        print("|", " | ".join([*map(str, astuple(case)[:5]), first, *cells]), "|")


def plot(results: Results, path: Path) -> None:
    """Bars of the stages, a row per case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 0.5 * len(results) + 1.5), layout="constrained")
    names = [str(case) for case in results]
    left = [0.0] * len(results)
    for stage in STAGES:
        values = [1000 * found.get(stage, 0.0) for found in results.values()]
        axes.barh(names, values, left=left, label=stage)
        left = [a + b for a, b in zip(left, values, strict=True)]
    whole = [1000 * found["query"] if "encode" not in found else 0.0 for found in results.values()]
    axes.barh(names, whole, left=left, color="0.6", label="all (authors)")
    axes.invert_yaxis()
    axes.set_xscale("symlog", linthresh=10)
    axes.set_xlabel("ms per query")
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=150)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--budgets", nargs="*", choices=[*BUDGETS, GRID, BANK], help="only these; none: all")
    arguments.add_argument("--backbones", nargs="+", help="instead of budgets: all combinations of these")
    arguments.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024])
    arguments.add_argument("--n", type=int, nargs="+", default=[4])
    arguments.add_argument("--k", type=int, nargs="+", default=[4])
    arguments.add_argument("--c", type=int, nargs="+", default=[1])
    arguments.add_argument("--designs", nargs="+", default=[OURS], choices=[OURS, AUTHORS])
    arguments.add_argument("--memory_pool", type=int, help="of our design; none: the backbone's own")
    arguments.add_argument("--queries", type=int, default=7, help="timed queries of each case")
    arguments.add_argument("--cpu_time", action="store_true")
    arguments.add_argument("--plot", type=Path, help="where to draw the stages")
    arguments.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments.add_argument("--child", help=argparse.SUPPRESS)
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    if options.child:
        case, *settings = json.loads(options.child)
        print(json.dumps(measure(Case(**case), *settings)))
        return
    chosen = [] if options.backbones else options.budgets or [*BUDGETS, GRID, BANK]
    budgets = [BUDGETS[name] for name in chosen if name in BUDGETS]
    cases = dict.fromkeys(case for budget in budgets for case in (budget.lower, budget.upper) if case is not None)
    cases |= dict.fromkeys(GRID_CASES if GRID in chosen else [])
    for backbone, size, n, k, c, design in itertools.product(
        options.backbones or [], options.sizes, options.n, options.k, options.c, options.designs
    ):
        if k <= n:
            cases[Case(backbone, size, n, n if design == AUTHORS else k, c, design)] = None
    print(f"\n{date.today()}, {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}", end="")
    print(f", {options.threads} threads, {'processor' if options.cpu_time else 'clock'} time\n", flush=True)
    results: Results = {}
    for case in cases:
        results[case] = in_a_process(case, options)
        print(f"{case}: {results[case]['query']:.3f} s", file=sys.stderr, flush=True)
    stages = {case: found for case, found in results.items() if case.design != REQUESTS}
    if stages:
        table(stages)
        floors(stages)
    if len(stages) < len(results):
        requests_table({case: found for case, found in results.items() if case.design == REQUESTS})
    if budgets:
        print("\n| what | measured | budget | |\n| --- | --- | --- | --- |")
    for budget in budgets:
        value = budget.value(results)
        verdict = "met" if budget.is_met(value) else "**missed**"
        print(f"| {budget.what} | {value:.3f} | {budget.limit} | {verdict} |")
    if BANK in chosen:
        print()
        build_banks(time.process_time if options.cpu_time else time.perf_counter)
    if options.plot:
        plot(stages, options.plot)


if __name__ == "__main__":
    main()
