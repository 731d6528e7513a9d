"""What the slices of a volume tell each other: whole-volume Dice, HD95 and NSD, and what a slice costs.

    python benchmarks/volumes.py acdc=DIR hippocampus=DIR --support 4 --adapt 60 300 --dyn_unet 300
    python benchmarks/volumes.py --cost
    python benchmarks/volumes.py --memory
    python benchmarks/volumes.py --classes SUPPORT QUERIES

Accuracy: each data set goes through the bundle's evaluation with the same weights and support set: slice by slice, with
3D memory of neighbouring slices, with memory and the object gate, which keeps slices without a class empty, and with
only the largest part of classes that are one piece besides. The split is that of `pretrain.json`, so the embedded
weights never saw the test patients, and the support set is the training patients, or `--support` volumes of them. Every
slice of every test volume counts; `false slices` is the share of those without a class on which some of it is found.
With `--adapt`, all of these are followed by adaptation to the support set for so many seconds, and with `--dyn_unet` by
MONAI's DynUNet (3D, nnU-Net's network), trained from scratch on the same volumes for so many seconds. Differences are
paired over cases, with 95 % bootstrap intervals over patients. Without data sets it makes phantoms and uses those.

Cost (`--cost`): seconds of a slice in a volume over those of the same image as a 2D query of its own, and peak memory
of a process beyond its input, for volumes of 100 and 1000 slices.

Memory (`--memory`): peak memory of the command `inferring` itself, file to file, on a CT of so many slices of 512 px.
`tiny` has random weights in both: what they find differs from trained ones, what they take does not.

Classes (`--classes`): seconds of a slice on one core, and the mean Dice over the classes of each query's truth, where a
support set has many classes: with all of them searched for on every slice, and with the likely ones, as it is. Both
folders are labelled.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from datetime import date
from itertools import pairwise
from pathlib import Path
from unittest import mock

import nibabel as nib
import numpy as np
import torch
from _clock import count_processor_time
from _peers import train_volumes
from ignite.engine import Events
from monai.bundle import ConfigParser

from sam2sgp.data import load_datalist, read_image, read_label
from sam2sgp.data.phantom import make_phantoms
from sam2sgp.data.phantom_scenes import phantom_volume
from sam2sgp.evaluation import case_metrics
from sam2sgp.inferers import InferenceSettings, SupportSetInferer, VolumeMemory, second_pass
from sam2sgp.networks import SAM2SGP, load_weights, save_weights
from sam2sgp.support import SupportBank, SupportSampler, bank, catalogue

BUNDLE = Path(__file__).resolve().parents[1] / "bundle"
EVALUATE = ["configs/train.json", "configs/evaluate.json"]
METRICS = ("dice", "hd95", "nsd")
LENGTHS = (100, 1000)
BACKBONES = {"lite": 256, "tiny": 512}
DRAWS = 2000


@dataclass(frozen=True)
class Variant:
    """How many neighbouring slices guide a slice (0: slice by slice), whether the object gate is on, whether classes
    that are one piece keep only that, and adaptation."""

    frames: int
    gate: bool
    one_piece: bool = False
    adapt_seconds: float = 0.0

    def __str__(self) -> str:
        memory = f"{self.frames} neighbours" if self.frames else "slice by slice"
        gate, piece = ", object gate" * self.gate, ", one piece" * self.one_piece
        return memory + gate + piece + (f", adapted {self.adapt_seconds:g} s" if self.adapt_seconds else "")


@dataclass(frozen=True)
class DynUNet:
    """MONAI's DynUNet, trained on the support volumes for so many seconds."""

    seconds: float

    def __str__(self) -> str:
        return f"DynUNet, {self.seconds:g} s"


@dataclass
class Found:
    """Rows of `metrics.csv`; by class number, slices without the class, and those of them with some of it found."""

    rows: list[dict]
    seconds: float = 0.0
    slices: int = 0
    empty: Counter = field(default_factory=Counter)
    false: Counter = field(default_factory=Counter)

    @property
    def per_slice(self) -> float:
        return self.seconds / self.slices

    def add(self, case: dict) -> None:
        """Count a scored case in."""
        self.seconds += case["seconds"]
        self.slices += len(case["pred"])
        numbers = {value: number for number, value in enumerate(case["confidence"], 1)}
        self.add_slices(case["truth_index"], case["pred_index"], numbers)

    def add_slices(self, truth: torch.Tensor, prediction: torch.Tensor, numbers: dict[int, int]) -> None:
        """Count slices in. numbers: what stands in both maps (Z, H, W) for a class value."""
        for value, number in numbers.items():
            absent = ~(truth == number).flatten(1).any(1)
            self.empty[value] += int(absent.sum())
            self.false[value] += int((absent & (prediction == number).flatten(1).any(1)).sum())


def configured(folder: Path, variant: Variant, options: argparse.Namespace) -> ConfigParser:
    """The bundle's evaluation of the test section of a folder, guided by its training section."""
    parser = ConfigParser()
    parser.read_config([str(BUNDLE / name) for name in EVALUATE])
    with open(BUNDLE / "configs" / "pretrain.json") as file:
        split = json.load(file)["split"]
    run = options.output / folder.name / str(variant).replace(" ", "_").replace(",", "")
    settings = {
        "bundle_root": str(BUNDLE),
        "dataset_dir": str(folder),
        "output_dir": str(run),
        "model_file": options.model_file,
        "split": split,
        "three_d_memory": variant.frames > 0,
        "memory_frames": max(variant.frames, 1),
        "object_gate": variant.gate,
        "one_piece": variant.one_piece,
        "mirror": options.mirror,
        "adapt_seconds": variant.adapt_seconds,
        "report_figures": options.figures,
        "progress": False,
    }
    if options.cases:
        settings["validate::dataset::data"] = f"$sam2sgp.data.subset(@test_data, {options.cases}, @split_seed)"
    if options.support:
        settings["support_bank::data"] = f"$sam2sgp.data.subset(@train_data, {options.support}, @split_seed)"
    parser.update(settings)
    return parser


def evaluate(folder: Path, variant: Variant, options: argparse.Namespace) -> Found:
    parser = configured(folder, variant, options)
    evaluator = parser.get_parsed_content("validate::evaluator")
    load_weights(parser.get_parsed_content("network"), options.model_file)
    found = Found([])

    @evaluator.on(Events.ITERATION_COMPLETED)
    def add(engine) -> None:
        for case in engine.state.output:
            found.add(case)

    evaluator.run()
    found.rows = scored_rows(parser)
    return found


def scored_rows(parser: ConfigParser) -> list[dict]:
    """The rows of `metrics.csv` that are results; others name files that are not used."""
    return [row for row in parser.get_parsed_content("validate::handlers")[0].rows if "dice" in row]


def compare(folder: Path, peer: DynUNet, options: argparse.Namespace) -> Found:
    """A network trained from scratch on the volumes that guide ours, on the same test volumes."""
    parser = configured(folder, Variant(0, False), options)
    names = parser.get_parsed_content("support_bank").class_names
    read = [read_pair(case) for case in parser.get_parsed_content("support_bank::data")]
    volumes = [(image, label) for image, label, _ in read]
    segment, steps = train_volumes(volumes, max(names), peer.seconds, seed=0)
    print(f"{folder.name}: {steps} steps of DynUNet", file=sys.stderr)
    found = Found([])
    for case in parser.get_parsed_content("validate::dataset::data"):
        image, label, spacing = read_pair(case)
        started = time.perf_counter()
        prediction, truth = segment(image), label[0]
        found.seconds += time.perf_counter() - started
        found.slices += len(truth)
        found.rows += [{"case": case["name"], **row} for row in case_metrics(prediction, truth, names, spacing)]
        found.add_slices(truth, prediction, {value: value for value in names})
    return found


def read_pair(case: dict) -> tuple[torch.Tensor, torch.Tensor, tuple | None]:
    """Image (C, Z, H, W), class map (1, Z, H, W) int64, spacing."""
    image = read_image(case["image"])
    label = read_label(case["label"], image.geometry)
    return (
        torch.from_numpy(image.slices).transpose(0, 1),
        torch.from_numpy(label.astype(np.int64))[None],
        image.geometry.spacing,
    )


def difference(
    rows: list[dict], base: list[dict], metric: str, patient_of: dict[str, str]
) -> tuple[float, float, float]:
    """Mean paired difference over cases and classes, with a bootstrap interval over patients."""
    known = {(row["case"], row["class"]): row[metric] for row in base}
    by_patient = defaultdict(list)
    for row in rows:
        change = row[metric] - known[row["case"], row["class"]]
        if np.isfinite(change):
            by_patient[patient_of[row["case"]]].append(change)
    sums = np.array([(sum(values), len(values)) for values in by_patient.values()])
    rng = np.random.default_rng(0)
    draws = sums[rng.integers(len(sums), size=(DRAWS, len(sums)))].sum(1)
    low, high = np.percentile(draws[:, 0] / draws[:, 1], [2.5, 97.5])
    return sums[:, 0].sum() / sums[:, 1].sum(), low, high


def accuracy(folders: dict[str, Path], options: argparse.Namespace) -> None:
    print("| data | class | slices | Dice | HD95 | NSD at 2 mm | false slices | volumes | s per slice | ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    full = Variant(options.frames, True, True)
    steps = [Variant(0, False), Variant(options.frames, False), Variant(options.frames, True), full]
    further = [replace(full, adapt_seconds=seconds) for seconds in options.adapt]
    further += [DynUNet(seconds) for seconds in options.dyn_unet]
    pairs = [*pairwise(steps), *((full, other) for other in further)]
    changes = []
    for name, folder in folders.items():
        patient_of = {case["name"]: case["patient"] for case in load_datalist(folder)}
        results: dict[Variant | DynUNet, Found] = {}
        for variant in [*steps, *further]:
            run = compare if isinstance(variant, DynUNet) else evaluate
            found = results[variant] = run(folder, variant, options)
            for value in sorted({row["class"] for row in found.rows}):
                of_class = [row for row in found.rows if row["class"] == value]
                means = [np.nanmean([row[metric] for row in of_class]) for metric in METRICS]
                cells = [name, of_class[0]["class_name"], str(variant), f"{means[0]:.3f}", f"{means[1]:.1f}"]
                cells += [f"{means[2]:.3f}", f"{found.false[value]} of {found.empty[value]}", str(len(of_class))]
                cells += [f"{found.per_slice:.3f}", f"{found.per_slice / results[steps[0]].per_slice:.2f}"]
                print("|", " | ".join(cells), "|", flush=True)
        for before, after in pairs:
            parts = []
            for metric in METRICS:
                mean, low, high = difference(results[after].rows, results[before].rows, metric, patient_of)
                parts.append(f"{metric} {mean:+.3f} [{low:+.3f}, {high:+.3f}]")
            changes.append(f"{name}, {after} against {before}: {', '.join(parts)}")
    print("\n" + "\n".join(changes))


def timed(backbone: str, slices: int) -> dict[str, float]:
    """Seconds per slice as 2D queries and as a volume, and peak memory beyond the input, in a process of its own."""
    size = BACKBONES[backbone]
    torch.manual_seed(0)
    network = SAM2SGP(backbone, size).eval()
    rows = torch.arange(size)
    disc = ((rows[:, None] - size // 2) ** 2 + (rows - size // 2) ** 2 < (size // 5) ** 2).float()

    def case(number: int) -> dict:
        image = (disc + 0.1 * torch.rand(1, 1, size, size)).clamp(0, 1)
        label = disc[None].long()
        own = {"name": str(number), "patient": str(number), "group": "", "label": label, "label_full": label}
        geometry = argparse.Namespace(spacing=None)
        return {**own, "image": image, "image_full": image, "geometry": geometry}

    bank = SupportBank([case(number) for number in range(4)], lambda item: item, progress=False)
    volume = (disc + 0.1 * torch.rand(slices, 1, size, size)).clamp(0, 1)
    alone = SupportSetInferer(bank, InferenceSettings(SupportSampler(k=4), batch_size=1))
    queries = volume[:20]
    list(alone.chunks(queries[:2], network))
    started = time.perf_counter()
    list(alone.chunks(queries, network))
    single = (time.perf_counter() - started) / len(queries)
    together = SupportSetInferer(
        bank, InferenceSettings(SupportSampler(k=4), batch_size=8, volume_memory=VolumeMemory())
    )
    started = time.perf_counter()
    for _ in together.chunks(volume, network, volume=True):
        pass
    seconds = (time.perf_counter() - started) / slices
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"single": single, "slice": seconds, "mebibytes": (peak - volume.nbytes / 1024) / 1024}


def cost(options: argparse.Namespace) -> None:
    print("| backbone | px | slices | 2D query, s | slice, s | ratio | peak memory beyond the input, MiB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for backbone in options.backbones:
        for slices in options.lengths:
            child = [sys.executable, __file__, "--child", backbone, str(slices)]
            found = json.loads(
                subprocess.run(child, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
            )
            ratio = found["slice"] / found["single"]
            cells = [backbone, str(BACKBONES[backbone]), str(slices), f"{found['single']:.3f}", f"{found['slice']:.3f}"]
            print("|", " | ".join([*cells, f"{ratio:.2f}", f"{found['mebibytes']:.0f}"]), "|", flush=True)


def long_ct(folder: Path, slices: int) -> Path:
    """A folder with a CT of 512 px: a phantom's volume, over and over."""
    image, _, affine = phantom_volume("ct", np.random.default_rng(0), (512, 512), num_slices=20)
    folder.mkdir(parents=True, exist_ok=True)
    tiled = np.resize(image.transpose(2, 0, 1), (slices, *image.shape[:2])).transpose(1, 2, 0)
    nib.save(nib.Nifti1Image(tiled, affine), folder / f"ct_{slices}.nii.gz")
    return folder


def memory(options: argparse.Namespace) -> None:
    support = make_phantoms(options.output / "support", 4, modalities=["ct"], progress=False) / "support" / "ct"
    print("| backbone | slices of 512 px | s per slice | peak memory, MiB |")
    print("| --- | --- | --- | --- |")
    for backbone in options.backbones:
        configs = ["configs/inference.json", f"configs/backbones/{backbone}.json"]
        model_file = options.model_file
        if backbone != "lite":
            parser = ConfigParser()
            parser.read_config([str(BUNDLE / name) for name in configs])
            parser["bundle_root"] = str(BUNDLE)
            model_file = options.output / f"{backbone}_random.pt"
            save_weights(parser.get_parsed_content("network_def"), model_file)
        for slices in options.lengths:
            queries = long_ct(options.output / f"ct_{slices}", slices)
            command = [sys.executable, "-m", "monai.bundle", "run", "inferring", "--config_file", str(configs)]
            command += ["--support_dir", str(support), "--dataset_dir", str(queries), "--model_file", str(model_file)]
            command += ["--output_dir", str(options.output / f"{backbone}_{slices}"), "--progress", "False"]
            with open(options.output / f"{backbone}_{slices}.log", "w") as log:
                started = time.perf_counter()
                child = subprocess.Popen(command, cwd=BUNDLE, stdout=log, stderr=log)
                _, status, usage = os.wait4(child.pid, 0)
            if status:
                raise SystemExit(f"inferring failed, see {log.name}")
            seconds = (time.perf_counter() - started) / slices
            print(f"| {backbone} | {slices} | {seconds:.2f} | {usage.ru_maxrss / 1024:.0f} |", flush=True)


def searched(few: int, support: Path, queries: Path, options: argparse.Namespace) -> tuple[int, float, float]:
    """Classes found, seconds of a slice, and mean Dice, where all classes are searched for up to so many."""
    parser = ConfigParser()
    parser.read_config([str(BUNDLE / name) for name in EVALUATE])
    settings = {
        "bundle_root": str(BUNDLE),
        "dataset_dir": str(queries),
        "support_dir": str(support),
        "support_cache_dir": str(options.output / "bank"),
        "output_dir": str(options.output / f"classes_{few}"),
        "model_file": options.model_file,
        "validate::dataset::data": "$sam2sgp.data.load_datalist(@dataset_dir)",
        "resume": False,
        "report_figures": 0,
        "progress": False,
    }
    parser.update(settings)
    evaluator = parser.get_parsed_content("validate::evaluator")
    load_weights(parser.get_parsed_content("network"), options.model_file)
    found, names = Found([]), set()

    @evaluator.on(Events.ITERATION_COMPLETED)
    def add(engine) -> None:
        for case in engine.state.output:
            found.add(case)
            names.update(case["pred"].unique().tolist())

    with mock.patch.object(bank, "FEW_CLASSES", few), mock.patch.object(second_pass, "FEW_CLASSES", few):
        evaluator.run()
    dice = float(np.mean([row["dice"] for row in scored_rows(parser) if row["truth_size"] > 0]))
    return len(names - {0}), found.per_slice, dice


def classes(support: Path, queries: Path, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    searched(bank.FEW_CLASSES, support, queries, options)  # encodes the support set and its regions
    print("| classes searched for | found | s per slice | Dice |")
    print("| --- | --- | --- | --- |")
    for what, few in (("the likely ones", bank.FEW_CLASSES), ("all", catalogue.MAX_VALUE)):
        count, seconds, dice = searched(few, support, queries, options)
        print(f"| {what} | {count} | {seconds:.2f} | {dice:.3f} |", flush=True)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("datasets", nargs="*", help="name=folder")
    arguments.add_argument("--model_file", default=str(BUNDLE / "models" / "model.pt"))
    arguments.add_argument("--frames", type=int, default=2, help="neighbouring slices")
    arguments.add_argument("--support", type=int, default=0, help="support volumes at most; 0 for all")
    arguments.add_argument("--cases", type=int, default=0, help="test volumes of each set at most; 0 for all")
    arguments.add_argument("--adapt", type=float, nargs="*", default=[], metavar="SECONDS")
    arguments.add_argument("--mirror", action="store_true", help="segment each volume mirrored, too, and average")
    arguments.add_argument("--dyn_unet", type=float, nargs="*", default=[], metavar="SECONDS")
    arguments.add_argument("--cpu_time", action="store_true", help="count these seconds in processor time")
    arguments.add_argument("--threads", type=int, help="of torch; default: its own choice")
    arguments.add_argument("--figures", type=int, default=4, help="cases with pictures in each report")
    arguments.add_argument("--output", type=Path, default=Path("out/volumes"))
    arguments.add_argument("--cost", action="store_true", help="measure cost in place of accuracy")
    arguments.add_argument("--memory", action="store_true", help="measure the memory of whole runs")
    arguments.add_argument("--classes", type=Path, nargs=2, metavar=("SUPPORT", "QUERIES"))
    arguments.add_argument("--backbones", nargs="+", default=list(BACKBONES), choices=list(BACKBONES))
    arguments.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    arguments.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.child:
        print(json.dumps(timed(options.child[0], int(options.child[1]))))
        return
    print(f"\n{date.today()}, {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}\n", flush=True)
    options.output = options.output.resolve()
    if options.cpu_time:
        count_processor_time()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.cost:
        cost(options)
        return
    if options.memory:
        memory(options)
        return
    if options.classes:
        classes(*(folder.resolve() for folder in options.classes), options)
        return
    folders = {name: Path(folder).resolve() for name, folder in (entry.split("=", 1) for entry in options.datasets)}
    if not folders:
        folder = options.output / "phantoms"
        folders = {"phantoms": Path(make_phantoms(folder, 16, modalities=["ct", "mr"], progress=False))}
    accuracy(folders, options)


if __name__ == "__main__":
    main()
