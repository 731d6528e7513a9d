"""Dice on unseen images against the number of labelled images, for each strategy that chooses the next one to label.

    python benchmarks/active_learning.py wbc=DIR busi=DIR --output out/active_learning

A simulated annotator: of each data set, patients are divided into a pool and a test set, two images of the pool are
labelled, a strategy chooses further ones, and their true labels join the support set, with no training. The pool is
scored again whenever Dice is measured (`--labels`), as the app's background task does, and in between each choice takes
account of those before it. With `--finetune` the app's training also runs on the labels at each size, from the weights
at the start, and Dice is measured with the weights that it leaves in use: its own, or the old ones where its own are
not clearly better on labels that they were not trained on. It takes four patients.

Sets that pre-training may have used give only their test section, so the embedded weights saw no image of pool or
test. Every seed draws other first images (and, for `random`, others after them); the test set stays the same. Out: a
line per data set, strategy and seed in `<output>/results.jsonl`, the tables as Markdown, and `<output>/curves.png`. A
result that is there for the same settings is not computed again; `--table` prints what there is.

Without data sets it makes phantoms and uses those.
"""

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path

import matplotlib
import numpy as np
import torch
from _tasks import HELD_OUT, PRETRAINING_SPLIT
from fewshot import BUNDLE, bundle_config, bundle_overrides, machine
from monai.metrics import compute_dice
from tqdm import tqdm

sys.path.insert(0, str(BUNDLE.parent / "apps" / "sam2sgp"))

from lib.serving.published_weights import Weights
from lib.trainers.data import MIN_PATIENTS
from lib.trainers.finetune import FineTuning
from sam2sgp.active import STRATEGIES, choose, embed, examine
from sam2sgp.data import class_names, load_datalist
from sam2sgp.data.phantom import make_phantoms
from sam2sgp.inferers import CaseResult, CaseSegmenter
from sam2sgp.inferers.feature_cache import FeatureCache
from sam2sgp.networks import load_weights

ALL = ("random", *STRATEGIES)
MIB_OF_FEATURES = 2048


class Simulation:
    """A data set, its pool and test set, and the bundle's inference on them.

    Args:
        root: the data folder.
        seen: whether pre-training may have used it: only its test section serves then.
        test, pool: images, at most; no patient is in both.
        overrides: of the bundle's config.
    """

    def __init__(self, root: Path, seen: bool, test: int, pool: int, overrides: dict) -> None:
        cases = load_datalist(root, "test", **PRETRAINING_SPLIT) if seen else load_datalist(root)
        of_patient = defaultdict(list)
        for case in cases:
            of_patient[case["patient"]].append(case)
        order = np.random.default_rng(0).permutation(sorted(of_patient))
        self.test: list[dict] = []
        self.pool: list[dict] = []
        for number, patient in enumerate(order):
            side = self.test if len(self.test) < test and number < len(order) // 2 else self.pool
            side += of_patient[patient]
        self.test, self.pool = self.test[:test], self.pool[:pool]
        config = bundle_config({**overrides, "support_dir": str(root), "dataset_dir": str(root)})
        load = config.get_parsed_content("load_pair")
        found = {int(value) for case in cases for value in torch.unique(load(case)["label"]) if value}
        settings = {
            **overrides,
            "support_dir": str(root),
            "dataset_dir": str(root),
            "support_data": self.pool[:1],
            "class_names": {value: name for value, name in class_names(root, found).items() if value in found},
            "queries": self.test,
            "preprocessing": {
                "_target_": "Compose",
                "transforms": [
                    "@load_pair",
                    "@scale_intensity",
                    {"_target_": "sam2sgp.transforms.FitToSquared", "keys": "image", "size": "@image_size"},
                ],
            },
        }
        config = bundle_config(settings)
        self.network = config.get_parsed_content("network").eval()
        self.weights = Path(config.get_parsed_content("model_file"))
        load_weights(self.network, self.weights)
        self.overrides = overrides
        self.class_names = settings["class_names"]
        self.inferer = replace(config.get_parsed_content("inferer"), feature_cache=FeatureCache(MIB_OF_FEATURES))
        prepare = config.get_parsed_content("preprocessing")
        self.segmenter = CaseSegmenter(self.network, self.inferer, prepare, exclude_own_patient=False)
        self.prepared = [prepare(case) for case in tqdm(self.pool, desc="Reading the pool", disable=None)]
        self.embedding = torch.stack([embed(self.network, case["image"]) for case in self.prepared])

    def label(self, chosen: Sequence[int]) -> None:
        """Make these images of the pool the support set."""
        self.inferer.bank.reconcile([self.pool[number] for number in chosen])

    def dice(self) -> float:
        """Mean over the test images of the mean Dice of the classes that an image holds."""
        values: list[float] = []

        def measure(found: CaseResult) -> None:
            classes = len(self.inferer.bank.class_values) + 1
            pair = [
                torch.nn.functional.one_hot(index.long(), classes) for index in (found.pred_index, found.truth_index)
            ]
            predicted, truth = (index.movedim(-1, 0)[None].float() for index in pair)
            score = compute_dice(predicted, truth, include_background=False)
            if score.isfinite().any():
                values.append(float(score.nanmean()))

        self.inferer.reset()
        with torch.no_grad():
            for case in self.test:
                measure(self.segmenter.segment(self.segmenter.prepare(case)))
        return float(np.mean(values))

    def finetuned(self, chosen: Sequence[int]) -> tuple[float, dict] | None:
        """Dice with what the app's training on these images leaves in use, and what it found itself.

        None where they are of too few patients.
        """
        cases = [self.pool[number] for number in chosen]
        if len({case["patient"] for case in cases}) < MIN_PATIENTS:
            return None
        with tempfile.TemporaryDirectory() as folder:
            weights = Weights(Path(folder) / "weights", self.weights)
            task = FineTuning(
                BUNDLE, Path(folder), weights, lambda: (cases, []), lambda: self.class_names, self.overrides
            )
            stats = task({"device": "cpu"}, None)
            load_weights(self.network, weights.active().path)
            dice = self.dice()
        load_weights(self.network, self.weights)
        return dice, {name: stats[name] for name in ("state", "start_metric", "new_metric", "gain_error")}

    def next_images(self, strategy: str, labelled: list[int], count: int, rng: np.random.Generator) -> list[int]:
        """Images of the pool to label next."""
        free = [number for number in range(len(self.pool)) if number not in labelled]
        if strategy == "random":
            return rng.permutation(free)[:count].tolist()
        uncertainty = torch.full((len(free),), torch.nan)
        if strategy != "coverage":
            scores = [examine(self.inferer, self.network, self.prepared[number]) for number in free]
            uncertainty = torch.tensor([score.uncertainty for score in scores])
        order, _ = choose(strategy, self.embedding[free], self.embedding[labelled], uncertainty, count)
        return [free[place] for place in order.tolist()]

    def run(self, strategy: str, seed: int, sizes: Sequence[int], finetune: bool) -> dict:
        """Dice at each number of labels; with `finetune` also after training, where that is possible."""
        first = np.random.default_rng(seed).permutation(len(self.pool))
        labelled = first[: sizes[0]].tolist()
        rng = np.random.default_rng([seed, 1])
        curve, finetuned, trainings = {}, {}, {}
        for size in sizes:
            if size > len(labelled):
                labelled += self.next_images(strategy, labelled, size - len(labelled), rng)
            self.label(labelled)
            curve[size] = self.dice()
            if finetune and (found := self.finetuned(labelled)) is not None:
                finetuned[size], trainings[size] = found
        chosen = [self.pool[number]["name"] for number in labelled]
        return {"curve": curve, "finetuned": finetuned, "trainings": trainings, "chosen": chosen}


def read(path: Path) -> list[dict]:
    """Records; a line that an end of the process has cut is passed over."""
    records = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        for name in ("curve", "finetuned"):
            record[name] = {int(size): dice for size, dice in record[name].items()}
        records.append(record)
    return records


def labels_needed(curve: dict[int, float], target: float) -> float | None:
    """Number of labels at which a curve, linear in between, first reaches a Dice; None if it doesn't."""
    sizes = sorted(curve)
    if curve[sizes[0]] >= target:
        return float(sizes[0])
    for low, high in zip(sizes, sizes[1:], strict=False):
        if curve[high] >= target:
            return low + (high - low) * (target - curve[low]) / (curve[high] - curve[low])
    return None


def tables(records: list[dict]) -> str:
    """A table per data set: Dice at each number of labels, mean ± standard deviation over seeds."""
    lines = ["", machine(), ""]
    for data in dict.fromkeys(record["data"] for record in records):
        of_data = [record for record in records if record["data"] == data]
        sizes = sorted(of_data[0]["curve"])
        head = [f"{data}, Dice at labels", *map(str, sizes), "mean over random", "labels for random's last Dice"]
        lines += ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
        baseline = {record["seed"]: record["curve"] for record in of_data if record["strategy"] == "random"}
        for strategy in ALL:
            rows = [record for record in of_data if record["strategy"] == strategy]
            if not rows:
                continue
            cells = _cells([row["curve"] for row in rows], sizes)
            gains = [
                np.mean([row["curve"][size] - baseline[row["seed"]][size] for size in sizes[1:]])
                for row in rows
                if row["seed"] in baseline
            ]
            cells.append(f"{np.mean(gains):+.3f} ± {np.std(gains):.3f}" if gains and strategy != "random" else "")
            if baseline:
                curve = {size: float(np.mean([row["curve"][size] for row in rows])) for size in sizes}
                target = float(np.mean([values[sizes[-1]] for values in baseline.values()]))
                needed = labels_needed(curve, target)
                cells.append(f"more than {sizes[-1]}" if needed is None else f"{needed:.1f}")
            else:
                cells.append("")
            lines.append("| " + " | ".join([strategy, *cells]) + " |")
            if any(row["finetuned"] for row in rows):
                cells = _cells([row["finetuned"] for row in rows], sizes)
                lines.append("| " + " | ".join([f"{strategy}, fine-tuned", *cells, "", ""]) + " |")
        seeds = len({record["seed"] for record in of_data})
        facts = of_data[-1]["settings"]
        lines += ["", f"{facts['pool']} images in the pool, {facts['test']} in the test set, {seeds} seeds.", ""]
    return "\n".join(lines)


def _cells(curves: Sequence[dict[int, float]], sizes: Sequence[int]) -> list[str]:
    """Mean ± standard deviation at each size; "" where there is none."""
    columns = [[curve[size] for curve in curves if size in curve] for size in sizes]
    return [f"{np.mean(values):.3f} ± {np.std(values):.3f}" if values else "" for values in columns]


def plot(records: list[dict], path: Path) -> None:
    """Curves with bands of a standard deviation over seeds, one panel per data set; dashed: after fine-tuning."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(record["data"] for record in records))
    figure, axes = pyplot.subplots(1, len(names), figsize=(4.5 * len(names), 3.6), squeeze=False)
    for axis, data in zip(axes[0], names, strict=True):
        for strategy in ALL:
            rows = [row for row in records if (row["data"], row["strategy"]) == (data, strategy)]
            color = None
            for name, style, label in (("curve", "-", strategy), ("finetuned", "--", None)):
                # Sizes that all seeds have.
                sizes = sorted(set.intersection(*(set(row[name]) for row in rows))) if rows else []
                if sizes:
                    values = np.array([[row[name][size] for size in sizes] for row in rows])
                    mean, std = values.mean(0), values.std(0)
                    (line,) = axis.plot(sizes, mean, style, marker="o", label=label, color=color)
                    color = line.get_color()
                    axis.fill_between(sizes, mean - std, mean + std, color=color, alpha=0.12)
        sizes = sorted({size for row in records if row["data"] == data for size in row["curve"]})
        axis.set(title=data, xlabel="labelled images", ylabel="Dice on unseen images", xscale="log")
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.minorticks_off()
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("datasets", nargs="*", help="name=folder")
    arguments.add_argument("--output", type=Path, default=Path("out/active_learning"))
    arguments.add_argument("--labels", type=int, nargs="+", default=[2, 4, 8, 16], help="when Dice is measured")
    arguments.add_argument("--strategies", nargs="+", default=list(ALL), choices=ALL)
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--test", type=int, default=24, help="test images, at most")
    arguments.add_argument("--pool", type=int, default=60, help="images to choose from, at most")
    arguments.add_argument("--finetune", action="store_true", help="also measure after training on the labels")
    arguments.add_argument("--held_out", nargs="*", default=list(HELD_OUT), help="sets that pre-training has not used")
    arguments.add_argument("--weights", type=Path, help="default: the bundle's own")
    arguments.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of the bundle's config")
    arguments.add_argument("--threads", type=int, help="of torch; default: its own choice")
    arguments.add_argument("--table", action="store_true", help="only print what there is")
    options = arguments.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    folders = {name: Path(folder).resolve() for name, folder in (entry.split("=", 1) for entry in options.datasets)}
    held_out = set(options.held_out)
    if not folders:
        folder = Path(make_phantoms(output / "phantoms", 16, modalities=["us"], progress=False))
        folders, held_out = {"phantoms": folder}, {"phantoms"}
    overrides = bundle_overrides(options)
    results = output / "results.jsonl"
    sizes = sorted(options.labels)
    records = []
    for name, folder in folders.items():
        simulation = None
        for seed in range(options.seeds):
            for strategy in options.strategies:
                asked = {"labels": sizes, "limits": [options.test, options.pool], "overrides": overrides}
                asked |= {"finetune": options.finetune, "seen": name not in held_out}
                key = {"data": name, "strategy": strategy, "seed": seed}
                known = [r for r in read(results) if r["asked"] == asked and key.items() <= r.items()]
                if not known and not options.table:
                    simulation = simulation or Simulation(folder, asked["seen"], options.test, options.pool, overrides)
                    found = simulation.run(strategy, seed, sizes, options.finetune)
                    facts = {"pool": len(simulation.pool), "test": len(simulation.test)}
                    record = {**key, "asked": asked, "settings": facts, "date": str(date.today()), **found}
                    with open(results, "a") as file:
                        file.write("\n" + json.dumps(record) + "\n")
                    tqdm.write(f"{name}, {strategy}, seed {seed}: {found['curve']}")
                    known = [record]
                records += known[-1:]
    print(tables(records))
    if records:
        plot(records, output / "curves.png")


if __name__ == "__main__":
    main()
