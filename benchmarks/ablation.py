"""What each part of the method contributes: every switch off, retrieval at random, fewer and more support items.

    python benchmarks/ablation.py --data DIR --output out/ablation          # on trained weights
    python benchmarks/ablation.py --train 600 --output out/ablation        # each variant trained from scratch

First mode, in: tasks as of `fewshot.py` and the bundle's weights. The switches are those that the inference config
holds (booleans of `pmg` and `pma` and at its top level). A switch that decides what parameters a network has can't be
turned in the config of trained weights, which load strictly; there the loaded network's part is silenced. Out, per
variant: Dice over all queries, those of small and those of thin objects, each next to the full method with 95 %
bootstrap intervals over patients, and the time of a query over the full method's.

Second mode: the bundle's `training` and `evaluating` with each switch of the training config turned, on one data set
(phantoms by default): Dice and HD95 of its test section. It says whether a part pays in training.
"""

import argparse
import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import monai
import numpy as np
import torch
from _tasks import Task, add_task_arguments, make_tasks, patient_of, write_pairs
from fewshot import (
    BUNDLE,
    add_bundle_arguments,
    bootstrap,
    bundle_config,
    bundle_overrides,
    chosen_tasks,
    dice,
    header,
    interval,
    line,
    machine,
    mean_of,
)
from ignite.engine import Events
from monai.bundle import ConfigParser
from real_data import EVALUATE, TRAIN, bundle
from scipy.ndimage import distance_transform_edt
from torch import Tensor, nn
from tqdm import tqdm

from sam2sgp.data.phantom import make_phantoms
from sam2sgp.networks import SAM2SGP, load_weights

FULL = "full"
SECTIONS = ("pmg", "pma")
# Booleans of the configs that are no part of the method.
NOT_THE_METHOD = ("progress", "freeze_encoder", "resume")
SIZES = (1, 4, 8, 16)
SMALL_OBJECT = 0.03
# Largest distance to the outline over the square root of the area: 0.56 for a disc, 0.29 for an ellipse of axes 4:1.
THIN_OBJECT = 0.2


@dataclass(frozen=True)
class Variant:
    """A departure from the full method: overrides of the config, and parts to silence once the weights are loaded."""

    name: str
    settings: dict = field(default_factory=dict)
    silenced: tuple[str, ...] = ()


def switches(parser: ConfigParser) -> dict[str, bool]:
    """The config's switches with their values, such as {"pmg::prior": True, "refinement": True}."""
    config = parser.config
    found = {f"{section}::{key}": value for section in SECTIONS for key, value in config[section].items()}
    found |= {key: value for key, value in config.items() if key not in NOT_THE_METHOD}
    return {key: value for key, value in found.items() if isinstance(value, bool)}


def silence(network: SAM2SGP, switch: str) -> bool:
    """Take away what the part behind a switch adds to a loaded network; False if the network has no such part.

    Without the prior there is nothing that the parts fed by it (regression, refinement) could add, so they go too.
    """
    key = switch.split("::")[-1]
    if key == "pma":
        network.pma_decoder.register_forward_hook(_add_nothing)
    elif key == "prior":
        network.prior = None
    elif key == "attention":
        nn.init.zeros_(network.pma_decoder.strength)
    elif hasattr(network, f"uses_{key}"):
        setattr(network, f"uses_{key}", False)
    elif isinstance(part := getattr(network, key, None), nn.Module):
        part.register_forward_hook(_add_nothing)
    else:
        return False
    return True


def _add_nothing(module: nn.Module, inputs: tuple, output: Tensor | tuple) -> Tensor | tuple:
    """Forward hook: zeros in place of what is added; of a decoder its scores stay."""
    return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)


def trained_variants(parser: ConfigParser) -> list[Variant]:
    """Every switch that is on turned off, one at a time; retrieval; and K."""
    on = [key for key, value in switches(parser).items() if value]
    variants = [Variant(FULL), *(Variant(f"without {key}", silenced=(key,)) for key in on)]
    if any(key.startswith("pma::") for key in on):
        variants.append(Variant("without pma", silenced=("pma",)))
    other = "random" if parser["retrieval"] == "similarity" else "similarity"
    variants.append(Variant(f"retrieval {other}", {"retrieval": other}))
    return variants + [Variant(f"k = {k}", {"k": k}) for k in SIZES if k != parser["k"]]


def segment(task: Task, support: Path, variant: Variant, overrides: dict) -> dict:
    """Run the variant on the task's queries: {"task", "rows"}, a row with Dice, share, thin and seconds per query."""
    settings = {"support_dir": str(support), "dataset_dir": str(task.folder / "queries" / "images")}
    # Nothing is written: results are read from the evaluator's output.
    quiet = {"postprocessing": None, "handlers": []}
    parser = bundle_config({**overrides, **variant.settings, **settings, **quiet})
    monai.utils.set_determinism(parser["support_seed"])
    network = parser.get_parsed_content("network")
    load_weights(network, parser.get_parsed_content("model_file"))
    for switch in variant.silenced:
        if not silence(network, switch):
            # No part of the network, so the config can turn it.
            parser[switch] = False
    evaluator = parser.get_parsed_content("evaluator")
    evaluator.network = network
    rows = []

    @evaluator.on(Events.ITERATION_COMPLETED)
    def measure(engine) -> None:
        for case in engine.state.output:
            truth = task.mask("queries", case["name"])
            thin = distance_transform_edt(np.pad(truth, 1)).max() / np.sqrt(truth.sum()) < THIN_OBJECT
            rows.append(
                {
                    "patient": patient_of(case["name"]),
                    "dice": dice(case["pred"][0].numpy() > 0, truth),
                    "share": float(truth.mean()),
                    "thin": bool(thin),
                    "seconds": case["seconds"],
                }
            )

    evaluator.run()
    return {"task": task.name, "rows": rows}


GROUPS: dict[str, Callable[[dict], bool]] = {
    "all": lambda row: True,
    f"small (< {SMALL_OBJECT:.0%} of the image)": lambda row: row["share"] < SMALL_OBJECT,
    "thin": lambda row: row["thin"],
}


def compare(records: Sequence[dict], full: Sequence[dict], belongs: Callable[[dict], bool]) -> str:
    """Mean over tasks of the Dice of a group of queries, and its difference to the full method's."""
    pairs = []
    for record, reference in zip(records, full, strict=True):
        pair = [{**r, "rows": [row for row in r["rows"] if belongs(row)]} for r in (record, reference)]
        if pair[0]["rows"]:
            pairs.append(pair)
    if not pairs:
        return ""
    text = f"{np.mean([mean_of(own) for own, _ in pairs]):.3f}"
    if records is full:
        return f"{text} ({len(pairs)} tasks)"
    gain = np.mean([mean_of(own) - mean_of(other) for own, other in pairs])
    draws = np.mean([bootstrap(own) - bootstrap(other) for own, other in pairs], 0)
    return f"{text}, {gain:+.3f}{interval(draws, sign=True)}"


def ablate_trained(tasks: Sequence[Task], output: Path, count: int, overrides: dict) -> str:
    """The table of the first mode, with `count` support pairs per task."""
    variants = trained_variants(bundle_config(overrides))
    found: dict[str, list[dict]] = {variant.name: [] for variant in variants}
    for task in tqdm(tasks, desc="Tasks", unit="task", disable=None):
        stems = task.support[:count]
        images, masks = zip(*((task.image("support", s), task.mask("support", s)) for s in stems), strict=True)
        support = write_pairs(output / "support" / task.name, images, masks)
        for variant in variants:
            found[variant.name].append(segment(task, support, variant, overrides))
    full = found[FULL]
    seconds = {
        name: np.array([np.median([row["seconds"] for row in record["rows"]]) for record in records])
        for name, records in found.items()
    }
    lines = header("variant", *(f"Dice, {name}" for name in GROUPS), "time of a query")
    for name, records in found.items():
        cells = [compare(records, full, belongs) for belongs in GROUPS.values()]
        time = f"{seconds[name].mean():.3f} s" if name == FULL else f"{np.median(seconds[name] / seconds[FULL]):.2f}"
        lines.append(line(name, *cells, time))
    return "\n".join(["", machine(), "", f"{len(tasks)} tasks, {count} support pairs each.", "", *lines])


def training_variants() -> list[Variant]:
    """The training config as it is, with every switch turned one at a time, and without PMA."""
    parser = ConfigParser()
    parser.read_config(str(BUNDLE / TRAIN[0]))
    known = switches(parser)
    variants = [Variant(FULL)]
    variants += [Variant(f"{'without' if on else 'with'} {key}", {key: not on}) for key, on in known.items()]
    parts = {key: False for key in known if key.startswith("pma::")}
    return [*variants, Variant("without pma", parts)]


def ablate_training(steps: int, dataset: Path | None, output: Path, overrides: dict) -> str:
    """The table of the second mode: each variant is trained for `steps` steps, unless it is trained already."""
    root = dataset or make_phantoms(output / "phantoms" / "set")
    parser = ConfigParser()
    parser.read_config(str(BUNDLE / TRAIN[0]))
    per_step = int(overrides.get("episodes_per_step", parser["episodes_per_step"]))
    lines = header("variant", "Dice", "cases and classes", "HD95")
    for variant in training_variants():
        run = output / "training" / variant.name.replace("::", "_").replace(" ", "_")
        settings = {
            "dataset_dir": str(root.resolve()),
            "output_dir": str(run),
            "max_epochs": 1,
            "val_interval": 1,
            "episodes_per_epoch": steps * per_step,
            **overrides,
            **variant.settings,
        }
        arguments = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
        bundle("training", TRAIN, *arguments)
        bundle("evaluating", EVALUATE, *arguments)
        with open(run / "evaluation" / "metrics_summary.csv", newline="") as file:
            total = next(row for row in csv.DictReader(file) if not row["class"])
        hd95 = f"{float(total['hd95_mean']):.1f} {total['unit']}" if total["hd95_mean"] else ""
        lines.append(line(variant.name, f"{float(total['dice_mean']):.3f}", total["dice_n"], hd95))
    return "\n".join(["", machine(), "", f"{steps} steps each, {root.name}.", "", *lines])


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_task_arguments(arguments, required=False)
    add_bundle_arguments(arguments)
    arguments.add_argument("--support", type=int, default=max(SIZES), help="support pairs per task")
    arguments.add_argument("--train", type=int, metavar="STEPS", help="train each variant for so many steps instead")
    arguments.add_argument("--dataset", type=Path, help="data folder to train on; default: phantoms")
    options = arguments.parse_args()
    output = options.output.resolve()
    if options.threads:
        torch.set_num_threads(options.threads)
    overrides = bundle_overrides(options)
    if options.train:
        print(ablate_training(options.train, options.dataset, output, overrides))
        return
    if options.data is None:
        arguments.error("expected --data DIR, a folder of data folders, or --train STEPS")
    tasks = make_tasks(options.data, output / "tasks", options.queries, options.held_out, options.seed)
    print(ablate_trained(chosen_tasks(tasks, options.tasks), output, options.support, overrides))


if __name__ == "__main__":
    main()
