"""Train and evaluate lite on labelled folders and print Dice, HD95 and NSD on unseen patients next to trivial floors.

    python benchmarks/real_data.py wbc=DIR hippocampus=DIR --epochs 12 --output out/real_data

Each data set goes through the commands a user types (training, then evaluating, in processes of their own). A training
that is already finished in the output folder is not repeated. The floors are measured on the same cases with the same
support set in the same run: the mean of the support masks, thresholded where it is best on the support set itself, and
the mask of the most similar support item copied.

Without data sets it makes phantoms and uses those.
"""

import argparse
import csv
import os
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path

import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.metrics import compute_dice
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

BUNDLE = Path(__file__).parents[1] / "bundle"
TRAIN = ["configs/train.json"]
EVALUATE = ["configs/train.json", "configs/evaluate.json"]
THRESHOLDS = np.arange(0.1, 0.95, 0.1)


def bundle(run_id: str, configs: list[str], *settings: str) -> None:
    """Run an id of the bundle's configs in a process of its own."""
    subprocess.run(
        [sys.executable, "-m", "monai.bundle", "run", run_id, "--config_file", str(configs), *settings],
        cwd=BUNDLE,
        check=True,
    )


def training_minutes(run: Path) -> float:
    """From the first step to the last, validations included, as TensorBoard recorded it."""
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    losses = events.Scalars("train_loss")
    return (losses[-1].wall_time - losses[0].wall_time) / 60


def floors(settings: dict) -> dict[str, tuple[float, float]]:
    """Mean Dice per class of the thresholded mean mask and of the nearest copy, per case as in the evaluation."""
    parser = ConfigParser()
    parser.read_config([str(BUNDLE / name) for name in EVALUATE])
    parser.update({**settings, "bundle_root": str(BUNDLE), "k": 1})
    os.chdir(BUNDLE)
    bank = parser.get_parsed_content("support_bank")
    network = parser.get_parsed_content("network").eval()
    from sam2sgp.networks import load_weights

    load_weights(network, parser.get_parsed_content("model_file"))
    inferer = parser.get_parsed_content("validate::inferer")
    masks = bank.masks(bank.items)
    means = [masks[bank.holds[:, c], c].mean(0) for c in range(len(bank.class_values))]
    levels = []
    for c, mean in enumerate(means):
        own = masks[bank.holds[:, c], c][:, None]
        scores = [float(compute_dice((mean > t).expand_as(own).float(), own).nanmean()) for t in THRESHOLDS]
        levels.append(THRESHOLDS[int(np.argmax(scores))])
    found: dict[str, list] = {name: [] for name in bank.class_names.values()}
    for case in parser.get_parsed_content("validate::dataset"):
        copies = torch.zeros(len(case["image"]), len(means), *case["image"].shape[-2:])
        for chunk in inferer.chunks(case["image"], network, case["patient"], case["group"]):
            for entry in chunk.retrieved:
                c = bank.class_values.index(entry.value)
                copies[chunk.start : chunk.start + len(entry.index), c] = masks[entry.index[:, 0], c]
        letterbox = case["letterbox"]
        nearest = letterbox.restore(copies) > 0.5
        # A byte equals a value 256 higher in PyTorch.
        label = case["label"].int()
        for c, (value, name) in enumerate(bank.class_names.items()):
            truth = (label == value)[None, None].float()
            constant = letterbox.restore((means[c] - levels[c] + 0.5)[None, None])[0, 0] > 0.5
            constant = constant.expand(len(case["label"]), -1, -1)
            if truth.any():
                pair = (constant[None, None].float(), nearest[:, c][None, None].float())
                found[name].append([float(compute_dice(mask, truth)) for mask in pair])
    return {name: tuple(np.mean(values, 0)) for name, values in found.items()}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("datasets", nargs="*", help="name=folder")
    arguments.add_argument("--epochs", type=int, default=12, help="of 50 steps")
    arguments.add_argument("--output", default="out/real_data")
    options = arguments.parse_args()
    output = Path(options.output).resolve()
    datasets = dict(entry.split("=", 1) for entry in options.datasets)
    if not datasets:
        from sam2sgp.data.phantom import make_phantoms

        datasets = {"phantoms": str(make_phantoms(output / "phantoms" / "set"))}
    lines = []
    for name, folder in datasets.items():
        run = output / name
        shared = ["--dataset_dir", str(Path(folder).resolve()), "--output_dir", str(run)]
        schedule = ["--max_epochs", str(options.epochs), "--val_interval", "3"]
        bundle("training", TRAIN, *shared, *schedule)
        bundle("evaluating", EVALUATE, *shared)
        floor = floors({"dataset_dir": str(Path(folder).resolve()), "output_dir": str(run), "progress": False})
        with open(run / "evaluation" / "metrics_summary.csv", newline="") as file:
            for row in csv.DictReader(file):
                if row["class"]:
                    lines.append((name, row, floor[row["class_name"]], training_minutes(run)))
    print(f"\n{date.today()}, {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    print("| data | class | Dice | HD95 | NSD | cases | mean mask | nearest copy | training, min |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, row, (constant, nearest), minutes in lines:
        values = [f"{float(row[key]):.2f}" if row[key] else "" for key in ("hd95_mean", "nsd_mean")]
        dice = f"{float(row['dice_mean']):.3f} ± {float(row['dice_std']):.3f}"
        cells = [name, row["class_name"], dice, f"{values[0]} {row['unit']}", values[1], row["dice_n"]]
        print("|", " | ".join([*cells, f"{constant:.3f}", f"{nearest:.3f}", f"{minutes:.1f}"]), "|")


if __name__ == "__main__":
    main()
