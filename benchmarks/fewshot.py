"""Dice and HD95 of SAM2-SGP with K labelled images, next to floors and to networks trained on the same images.

    python benchmarks/fewshot.py --data DIR --output out/fewshot

In: a folder of data folders, from which `_tasks.py` makes tasks, and the bundle's weights. Out: a line per task, method
and K in `<output>/results.jsonl`, then the tables as Markdown. A result that is there for the same settings is not
computed again, so an ended run goes on when called again; `--table` prints what there is.

Methods: `plain` and `adapt` (the bundle's `inferring`, as a user runs it, without and with `adapt_seconds`);
`basic_unet` trained from scratch on the K pairs for the same seconds; the floors `mean_mask` and `nearest_copy`;
`controls`, plain with wrong supports; `large`, DynUNet and SwinUNETR trained from scratch on 16, 64 and all pairs.
Where K exceeds what the config retrieves per query, `plain_all` retrieves all K.

Dice and HD95 are taken per query slice on its own grid. Where a prediction is empty, HD95 is the diagonal of the image.
Intervals are 95 % bootstrap intervals over the patients of each task.
"""

import argparse
import ast
import csv
import hashlib
import json
import math
import os
import platform
import shutil
import sys
import time
import zlib
from collections.abc import Iterable, Sequence
from datetime import date
from fnmatch import fnmatch
from pathlib import Path

import monai
import numpy as np
import torch
from _clock import count_processor_time
from _peers import PEERS, Map, mean_mask, nearest_copy, train
from _tasks import Task, add_task_arguments, make_tasks, patient_of, write_pairs
from monai.bundle import ConfigParser
from PIL import Image
from tqdm import tqdm

from sam2sgp.data import load_datalist, read_label
from sam2sgp.evaluation import case_metrics
from sam2sgp.networks import load_weights
from sam2sgp.transforms import to_three_channels

BUNDLE = Path(__file__).resolve().parents[1] / "bundle"
CONFIG = "configs/inference.json"
METHODS = ("plain", "adapt", "basic_unet", "mean_mask", "nearest_copy", "controls", "large")
SHOWN = ("plain", "plain_all", "adapt", "basic_unet", "mean_mask", "nearest_copy")
CONTROLS = ("inverted", "wrong_task", "shuffled")
OURS = ("plain", "plain_all", "adapt", *CONTROLS)
LARGE = ("dyn_unet", "swin_unetr")
LARGE_SIZES = (16, 64, None)
CONTROL_K = 16
COMPARED = (
    ("adapt", "basic_unet"),
    ("adapt", "plain"),
    ("plain", "basic_unet"),
    ("plain", "mean_mask"),
    ("plain", "nearest_copy"),
)
# The complement of the output under inverted supports is judged on objects of at least this share of the image.
LARGE_OBJECT = 0.05
DRAWS = 2000

Predictions = dict[str, np.ndarray]


def bundle_config(settings: dict) -> ConfigParser:
    """The bundle's inference config with overrides, as `python -m monai.bundle run` reads it."""
    parser = ConfigParser()
    parser.read_config(str(BUNDLE / CONFIG))
    parser.update({"bundle_root": str(BUNDLE), "progress": False, **settings})
    return parser


def dice(prediction: np.ndarray, truth: np.ndarray) -> float:
    """2|P∩T| / (|P| + |T|) of two bool masks, the second not empty."""
    return 2 * float((prediction & truth).sum()) / float(prediction.sum() + truth.sum())


def measure(prediction: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Dice, HD95 in pixels, and the share of the image that the object covers, of bool masks (H, W)."""
    row = case_metrics(prediction[None].astype(np.uint8), truth[None].astype(np.uint8), {1: "target"})[0]
    hd95 = math.hypot(*truth.shape) if math.isnan(row["hd95"]) else row["hd95"]
    return {"dice": row["dice"], "hd95": hd95, "share": float(truth.mean())}


class Results:
    """A file of JSON lines, one per result. A line that an end of the process has cut is passed over."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[tuple, dict] = {}
        for line in path.read_text().splitlines() if path.is_file() else []:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            # Of results for several settings, tables show the latest.
            self.records[record["task"], record["method"], record["k"]] = record

    def get(self, task: str, method: str, k: int | None) -> dict | None:
        return self.records.get((task, method, k))

    def add(self, record: dict) -> None:
        # A new line first ends what a cut write may have left.
        with open(self.path, "a") as file:
            file.write("\n" + json.dumps(record) + "\n")
        self.records[record["task"], record["method"], record["k"]] = record


class Bench:
    """Runs methods on tasks and records what it measures.

    Args:
        output: folder of results, predictions and support sets.
        tasks: all tasks, from which wrong supports are taken.
        seconds: of adaptation, and of training from scratch.
        seed: of every method.
        overrides: of the bundle's config, in every run of it.
    """

    def __init__(self, output: Path, tasks: Sequence[Task], seconds: float, seed: int, overrides: dict) -> None:
        self.output = output
        self.tasks = tasks
        self.seconds = seconds
        self.seed = seed
        self.overrides = overrides
        self.results = Results(output / "results.jsonl")
        config = bundle_config(overrides)
        self.retrieved = int(config.get_parsed_content("k"))
        self.can_adapt = "adapt_seconds" in config
        self.device = config.get_parsed_content("device")
        weights = Path(config.get_parsed_content("model_file"))
        self.weights = hashlib.sha256(weights.read_bytes()).hexdigest()[:12] if weights.is_file() else None

    def run(self, task: Task, method: str, k: int | None) -> None:
        """Measure a method with the first `k` support pairs (None: all), unless that is done."""
        settings = {"seed": self.seed, "queries": list(task.queries), "support": list(task.support[:k])}
        if method in OURS or method == "nearest_copy":
            settings |= {"weights": self.weights, "overrides": self.overrides}
        if method in PEERS or method == "adapt":
            settings |= {"seconds": self.seconds, "threads": torch.get_num_threads()}
        known = self.results.get(task.name, method, k)
        if known and known["settings"] == settings:
            return
        started = time.perf_counter()
        stems = task.support[:k]
        folder = self.output / "runs" / task.name / f"{method}_{k or 'all'}"
        if method in OURS:
            support = self._write_support(task, stems, method, folder / "support")
            predictions, facts = self._infer(task, support, folder, method, k)
        else:
            predictions, facts = self._compete(task, stems, method, folder)
        rows = []
        for stem in task.queries:
            truth = task.mask("queries", stem)
            rows.append({"query": stem, "patient": patient_of(stem), **measure(predictions[stem], truth)})
        if method == "inverted":
            support = self._write_support(task, stems, "plain", folder / "plain" / "support")
            plain, _ = self._infer(task, support, folder / "plain", "plain", k)
            for row in rows:
                prediction = predictions[row["query"]]
                row["complement"] = dice(~prediction, task.mask("queries", row["query"]))
                row["flipped"] = float((prediction != plain[row["query"]]).mean())
        record = {"task": task.name, "method": method, "k": k, "dataset": task.dataset, "seen": task.seen}
        facts |= {"wall_seconds": round(time.perf_counter() - started, 1), "date": str(date.today())}
        self.results.add({**record, "settings": settings, **facts, "rows": rows})
        mean = np.mean([row["dice"] for row in rows])
        tqdm.write(f"{task.name}, {method}, K = {k or 'all'}: Dice {mean:.3f} in {facts['wall_seconds']} s")

    def wrong_task(self, task: Task) -> Task | None:
        """A task of another data set and another target, the same in every run."""
        others = [t for t in self.tasks if t.dataset != task.dataset and t.target != task.target]
        return others[zlib.crc32(task.name.encode()) % len(others)] if others else None

    def _write_support(self, task: Task, stems: Sequence[str], method: str, folder: Path) -> Path:
        """The support set as a data folder: as it is, or spoilt as the control wants it."""
        source = self.wrong_task(task) if method == "wrong_task" else task
        stems = source.support[: len(stems)]
        masks = [source.mask("support", stem) for stem in stems]
        if method == "inverted":
            masks = [~mask for mask in masks]
        elif method == "shuffled":
            # A rotation of a random order: no image keeps its own mask.
            order = np.random.default_rng(self.seed).permutation(len(masks))
            shuffled = dict(zip(order.tolist(), np.roll(order, 1).tolist(), strict=True))
            masks = [_resize(masks[shuffled[i]], mask.shape) for i, mask in enumerate(masks)]
        return write_pairs(folder, [source.image("support", stem) for stem in stems], masks)

    def _infer(self, task: Task, support: Path, folder: Path, method: str, k: int | None) -> tuple[Predictions, dict]:
        """Run `inferring` of the bundle on the query images and read what it has written."""
        output = folder / "output"
        shutil.rmtree(output, ignore_errors=True)
        settings = {
            **self.overrides,
            "support_dir": str(support),
            "dataset_dir": str(task.folder / "queries" / "images"),
            "output_dir": str(output),
            "support_seed": self.seed,
            "report_figures": 0,
        }
        if method == "plain_all":
            settings["k"] = k
        if method == "adapt":
            # A folder of its own: an adapter of an earlier run, of other seconds, is not to be found.
            settings |= {"adapt_seconds": self.seconds, "adapt_seed": self.seed, "adapt_dir": str(output / "adapted")}
        monai.utils.set_determinism(self.seed)
        parser = bundle_config(settings)
        parser.get_parsed_content("inferring")
        with open(output / "summary.csv", newline="") as file:
            seconds = [float(row["seconds"]) for row in csv.DictReader(file)]
        predictions = {stem: read_label(output / f"{stem}.png")[0] > 0 for stem in task.queries}
        return predictions, {"seconds_per_query": float(np.median(seconds))}

    def _compete(self, task: Task, stems: Sequence[str], method: str, folder: Path) -> tuple[Predictions, dict]:
        """A floor or a network from scratch, on images prepared as the bundle prepares them."""
        support = self._write_support(task, stems, method, folder / "support")
        parser = bundle_config(
            {**self.overrides, "support_dir": str(support), "dataset_dir": str(task.folder / "queries" / "images")}
        )
        prepare = parser.get_parsed_content("support_preprocessing")
        cases = [prepare(case) for case in load_datalist(support)]
        images = torch.cat([to_three_channels(case["image"]) for case in cases]).to(self.device)
        masks = torch.cat([case["label"][:, None] for case in cases]).float().to(self.device)
        facts: dict = {}
        with torch.random.fork_rng():
            if method == "mean_mask":
                predict: Map = mean_mask(masks)
            elif method == "nearest_copy":
                network = parser.get_parsed_content("network").eval()
                load_weights(network, parser.get_parsed_content("model_file"))
                predict = nearest_copy(network, images, masks)
            else:
                predict, facts["steps"] = train(PEERS[method], images, masks, self.seconds, self.seed)
        predictions = {}
        for case in parser.get_parsed_content("dataset"):
            maps = predict(to_three_channels(case["image"]).to(self.device))
            predictions[case["name"]] = case["letterbox"].restore(maps)[0, 0].cpu().numpy() > 0
        return predictions, facts


def _resize(mask: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(mask).resize(shape[::-1], Image.Resampling.NEAREST))


def run_all(bench: Bench, tasks: Sequence[Task], methods: Sequence[str], sizes: Sequence[int]) -> None:
    """All methods on all tasks; what can't be run is named once."""
    if "adapt" in methods and not bench.can_adapt:
        print(f"adapt: left out, {CONFIG} has no `adapt_seconds`")
    if "controls" in methods and not all(bench.wrong_task(task) for task in tasks):
        print("wrong_task: left out for tasks without another data set and target")
    for task in tqdm(tasks, desc="Tasks", unit="task", disable=None):
        for method in methods:
            if method == "controls":
                bench.run(task, "plain", CONTROL_K)
                for control in CONTROLS:
                    if control != "wrong_task" or bench.wrong_task(task):
                        bench.run(task, control, CONTROL_K)
            elif method == "large":
                # With no more pairs than the size before, a size would be that one again.
                before = 0
                for size in LARGE_SIZES:
                    if len(task.support[:size]) > before:
                        for network in LARGE:
                            bench.run(task, network, size)
                    before = len(task.support[:size])
            elif method != "adapt" or bench.can_adapt:
                for k in sizes:
                    bench.run(task, method, k)
                    if method == "plain" and k > bench.retrieved:
                        bench.run(task, "plain_all", k)


# Tables


def bootstrap(record: dict, value: str = "dice", keep: float = 0.0) -> np.ndarray:
    """(DRAWS,) means of a task's queries, its patients drawn with replacement; the same patients for every method.

    Args:
        value: key of the rows.
        keep: leave out queries whose object covers a smaller share of the image.

    Raises:
        ValueError: no query is left.
    """
    rows = [row for row in record["rows"] if row["share"] >= keep]
    patients = sorted({row["patient"] for row in rows})
    if not patients:
        raise ValueError(f"{record['task']} has no object of {keep:.0%} of the image")
    sums = np.array([sum(row[value] for row in rows if row["patient"] == patient) for patient in patients])
    counts = np.array([sum(row["patient"] == patient for row in rows) for patient in patients])
    drawn = np.random.default_rng(zlib.crc32(record["task"].encode())).integers(
        len(patients), size=(DRAWS, len(patients))
    )
    return sums[drawn].sum(1) / counts[drawn].sum(1)


def mean_of(record: dict, value: str = "dice", keep: float = 0.0) -> float:
    """Mean over a record's queries; NaN if none is large enough."""
    values = [row[value] for row in record["rows"] if row["share"] >= keep]
    return float(np.mean(values)) if values else math.nan


def interval(draws: np.ndarray, sign: bool = False) -> str:
    """95 % interval as text; nothing where there was one patient to draw from."""
    if not np.ptp(draws):
        return ""
    return " [{}, {}]".format(*(f"{bound:{'+' if sign else ''}.3f}" for bound in np.percentile(draws, [2.5, 97.5])))


def cell(records: Iterable[dict | None], expected: int = 1) -> str:
    """Mean Dice over records with its interval; how many they are where some are missing."""
    found = [record for record in records if record]
    if not found:
        return ""
    text = f"{np.mean([mean_of(record) for record in found]):.3f}"
    text += interval(np.mean([bootstrap(record) for record in found], 0))
    return text if len(found) == expected else f"{text} ({len(found)} tasks)"


def line(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def header(*cells: str) -> list[str]:
    return [line(*cells), line(*["---"] * len(cells))]


def group_tasks(tasks: Sequence[Task]) -> dict[str, list[Task]]:
    """Tasks by the rows that average over them."""
    groups = {
        "seen kinds, new patients": [task for task in tasks if task.seen],
        "unseen sets": [task for task in tasks if not task.seen],
    }
    return {name: members for name, members in groups.items() if members}


def dice_table(results: Results, tasks: Sequence[Task], k: int) -> list[str]:
    """Dice and, behind it, HD95 of all methods at one K."""
    methods = [method for method in SHOWN if any(results.get(task.name, method, k) for task in tasks)]
    if not methods:
        return []
    dices, distances = header(f"Dice, K = {k}", *methods), header(f"HD95 in pixels, K = {k}", *methods)
    rows = [(task.name, [task]) for task in tasks]
    rows += [(f"**mean of {len(members)} {name}**", members) for name, members in group_tasks(tasks).items()]
    for name, members in rows:
        found = [[results.get(task.name, method, k) for task in members] for method in methods]
        if not any(map(any, found)):
            continue
        dices.append(line(name, *(cell(records, len(members)) for records in found)))
        lengths = [[mean_of(record, "hd95") for record in records if record] for records in found]
        distances.append(line(name, *(f"{np.mean(values):.1f}" if values else "" for values in lengths)))
    return [*dices, "", *distances, "", *difference_table(results, tasks, k)]


def difference_table(results: Results, tasks: Sequence[Task], k: int) -> list[str]:
    """Paired differences of methods, and on how many tasks the first is ahead."""
    lines = []
    groups = {**group_tasks(tasks), "all": list(tasks)}
    for first, second in COMPARED:
        cells = []
        for members in groups.values():
            pairs = [[results.get(task.name, method, k) for method in (first, second)] for task in members]
            pairs = [pair for pair in pairs if all(pair)]
            if not pairs:
                cells.append("")
                continue
            gains = [mean_of(a) - mean_of(b) for a, b in pairs]
            draws = np.mean([bootstrap(a) - bootstrap(b) for a, b in pairs], 0)
            wins = sum(gain > 0 for gain in gains)
            cells.append(f"{np.mean(gains):+.3f}{interval(draws, sign=True)}, ahead on {wins} of {len(gains)}")
        if any(cells):
            lines.append(line(f"{first} − {second}", *cells))
    return [*header(f"Dice difference, K = {k}", *groups), *lines, ""] if lines else []


def control_table(results: Results, tasks: Sequence[Task]) -> list[str]:
    """What wrong supports do: a network that reads its support set loses by them, and inverts under inverted masks."""
    names = ("plain", "wrong task", "shuffled", "inverted: complement", "pixels flipped")
    rows = {}
    for task in tasks:
        found = {name: results.get(task.name, name, CONTROL_K) for name in ("plain", *CONTROLS)}
        values = [mean_of(found[name]) if found[name] else math.nan for name in ("plain", "wrong_task", "shuffled")]
        if inverted := found["inverted"]:
            values += [mean_of(inverted, "complement", LARGE_OBJECT), mean_of(inverted, "flipped")]
        else:
            values += [math.nan, math.nan]
        if any(found[name] for name in CONTROLS):
            rows[task.name] = values
    if not rows:
        return []
    table = np.array(list(rows.values()))
    counted = ~np.isnan(table)
    sums = np.where(counted, table, 0).sum(0)
    means = np.divide(sums, counted.sum(0), out=np.full(len(names), math.nan), where=counted.any(0))
    lines = header(f"Dice under control, K = {CONTROL_K}", *names)
    for name, values in {**rows, f"**mean of {len(rows)} tasks**": means}.items():
        lines.append(line(name, *("" if math.isnan(value) else f"{value:.3f}" for value in values)))
    for column, name in ((1, "wrong task"), (2, "shuffled")):
        both = counted[:, 0] & counted[:, column]
        if both.any():
            loss = (table[both, 0] - table[both, column]).mean()
            lines += ["", f"Mean loss by {name} supports: {loss:.3f} over {both.sum()} tasks."]
    share = f"{LARGE_OBJECT:.0%} of the image"
    return [*lines, "", f"The complement is judged on queries whose object covers at least {share}.", ""]


def large_table(results: Results, tasks: Sequence[Task]) -> list[str]:
    """The paper's comparison: networks from scratch on 16, 64 and all pairs, next to adaptation on 16."""

    def at(task: Task, network: str, size: int | None) -> dict | None:
        """The record of the largest number of pairs up to `size` that was run for the task."""
        sizes = LARGE_SIZES[: LARGE_SIZES.index(size) + 1]
        return next((record for s in reversed(sizes) if (record := results.get(task.name, network, s))), None)

    columns = [(network, size) for network in LARGE for size in LARGE_SIZES]
    chosen = [task for task in tasks if any(at(task, *column) for column in columns)]
    if not chosen:
        return []
    titles = [f"{network}, {size or 'all'}" for network, size in columns]
    lines = header("Dice, trained from scratch", "pairs", "adapt, 16", *titles)
    rows = [(task.name, [task], len(task.support)) for task in chosen]
    rows += [(f"**mean of {len(m)} {name}**", m, "") for name, m in group_tasks(chosen).items()]
    for name, members, pairs in rows:
        found = [[results.get(task.name, "adapt", 16) for task in members]]
        found += [[at(task, *column) for task in members] for column in columns]
        lines.append(line(name, pairs, *(cell(records, len(members)) for records in found)))
    return [*lines, ""]


def machine() -> str:
    """Date, machine and command, for the head of a table."""
    where = f"{platform.platform()}, {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    return f"{date.today()}, {where}, torch {torch.__version__}\n`{command}`"


def tables(results: Results, tasks: Sequence[Task]) -> str:
    """Everything there is, as Markdown."""
    sizes = sorted({k for _, method, k in results.records if method in SHOWN})
    parts = [part for k in sizes for part in dice_table(results, tasks, k)]
    parts += [*control_table(results, tasks), *large_table(results, tasks)]
    times = [record["seconds_per_query"] for record in results.records.values() if record["method"] == "plain"]
    if times:
        parts.append(f"Seconds per query, plain: median {np.median(times):.3f}.")
    return "\n".join(["", machine(), "", *parts])


def add_bundle_arguments(arguments: argparse.ArgumentParser) -> None:
    """The options that say how the bundle is run."""
    arguments.add_argument("--output", type=Path, required=True)
    arguments.add_argument("--weights", type=Path, help="default: the bundle's own")
    arguments.add_argument("--tasks", nargs="*", default=["*"], help="names or patterns, such as 'acdc_*'")
    arguments.add_argument("--threads", type=int, help="of torch; default: its own choice")
    arguments.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of the bundle's config")


def bundle_overrides(options: argparse.Namespace) -> dict:
    """Overrides from `--weights` and `--set`, values as Python literals where they are such."""
    overrides = {"model_file": str(options.weights.resolve())} if options.weights else {}
    for entry in options.set:
        key, _, value = entry.partition("=")
        try:
            overrides[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            overrides[key] = value
    return overrides


def chosen_tasks(tasks: Sequence[Task], patterns: Sequence[str]) -> list[Task]:
    return [task for task in tasks if any(fnmatch(task.name, pattern) for pattern in patterns)]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_task_arguments(arguments)
    add_bundle_arguments(arguments)
    arguments.add_argument("--k", type=int, nargs="*", default=[1, 4, 16], help="sizes of the support set")
    arguments.add_argument("--retrieve_k", type=int, help="items retrieved per query; default: the config's k")
    arguments.add_argument("--seconds", type=float, default=60.0, help="of adaptation and of training from scratch")
    arguments.add_argument("--cpu_time", action="store_true", help="count these seconds in processor time")
    arguments.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    arguments.add_argument("--table", action="store_true", help="only print what there is")
    options = arguments.parse_args()
    output = options.output.resolve()
    if options.threads:
        torch.set_num_threads(options.threads)
    overrides = bundle_overrides(options)
    if options.retrieve_k:
        overrides["k"] = options.retrieve_k
    tasks = make_tasks(options.data, output / "tasks", options.queries, options.held_out, options.seed)
    chosen = chosen_tasks(tasks, options.tasks)
    if options.cpu_time:
        count_processor_time()
    bench = Bench(output, tasks, options.seconds, options.seed, overrides)
    if not options.table:
        run_all(bench, chosen, options.methods, options.k)
    print(tables(bench.results, chosen))


if __name__ == "__main__":
    main()
