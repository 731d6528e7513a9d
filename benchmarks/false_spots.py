"""How much is found where there is nothing: images without the target, of each kind of image.

    python benchmarks/false_spots.py --data DIR --output out/false_spots [--weights FILE ...]

In: a folder of data folders, from which `_tasks.py` makes tasks, and phantoms. Of each query image the largest square
window without the target is the image without it ("window"); a query image of another data set is one that has nothing
to do with the support set ("foreign"); phantoms that lack a class are "phantom". For comparison, the query images
themselves ("target"). With `--negatives`, so many windows of further support images, whose labels are empty, are in the
support set besides, as a user would add pictures without the target. Out: per kind of image the share of images in
which anything is found, the share of the image that it covers, and what the bundle says of it: the mean confidence, the
share of images that are unlike the support set and of those in which the target may be absent. For comparison, Dice on
phantoms that hold the class and on the query images.
"""

import argparse
import csv
import shutil
import zlib
from collections import defaultdict
from itertools import islice
from pathlib import Path

import numpy as np
from _tasks import Task, add_task_arguments, make_tasks, write_pairs
from fewshot import bundle_config, dice, line
from PIL import Image
from scipy.ndimage import distance_transform_cdt

from sam2sgp.data import class_names, load_datalist, read_label
from sam2sgp.data.phantom import make_phantoms
from sam2sgp.transforms import LoadCased

# A window smaller than this share of the image's shorter side shows too little of it.
LEAST_WINDOW = 0.35


def window_beside(mask: np.ndarray) -> tuple[slice, slice] | None:
    """The largest square without the target in a mask (H, W) bool; None where all are too small."""
    padded = np.pad(~mask, 1)
    reach = distance_transform_cdt(padded, "chessboard")[1:-1, 1:-1]
    row, column = np.unravel_index(int(reach.argmax()), reach.shape)
    reach = int(reach[row, column])
    if 2 * reach - 1 < LEAST_WINDOW * min(mask.shape):
        return None
    return slice(row - reach + 1, row + reach), slice(column - reach + 1, column + reach)


def infer(support: Path, queries: Path, output: Path, settings: dict) -> dict[str, tuple[np.ndarray, dict]]:
    """Label maps (Z, H, W) and rows of the summary by query."""
    shutil.rmtree(output, ignore_errors=True)
    places = {"support_dir": str(support), "dataset_dir": str(queries), "output_dir": str(output), "report_figures": 0}
    bundle_config({**settings, **places}).get_parsed_content("inferring")
    found = {}
    with open(output / "summary.csv", newline="") as file:
        for row in csv.DictReader(file):
            name = row["case"]
            path = next(path for path in output.iterdir() if path.name in (f"{name}.png", f"{name}.nii.gz"))
            found.setdefault(name, (read_label(path), []))[1].append(row)
    return found


Judged = tuple[bool, float, float, bool, bool]


def judge(found: dict[str, tuple[np.ndarray, list[dict]]]) -> list[Judged]:
    """Per image: anything found, its share of the image, confidence where found, unlike the supports, doubted."""
    rows = []
    for label, said in found.values():
        share = float((label > 0).mean())
        confidence = [float(row["mean_confidence"]) for row in said if row["mean_confidence"]]
        mean = float(np.mean(confidence)) if confidence else np.nan
        told = (any(row[column] == "True" for row in said) for column in ("unlike_support", "maybe_absent"))
        rows.append((share > 0, share, mean, *told))
    return rows


def cut_window(task: Task, side: str, stem: str, folder: Path) -> Path | None:
    """The window without the target of a task's picture, as a file in `folder`; None where it would be too small."""
    place = window_beside(task.mask(side, stem))
    if place is None:
        return None
    path = folder / f"{stem}.png"
    Image.fromarray(np.asarray(Image.open(task.image(side, stem)))[place]).save(path)
    return path


def support_folder(task: Task, k: int, negatives: int, folder: Path) -> Path:
    """A folder of k support pairs and windows with empty labels of so many others, or of as many as there are."""
    windows = folder / "windows"
    shutil.rmtree(windows, ignore_errors=True)
    windows.mkdir(parents=True)
    images = [task.image("support", stem) for stem in task.support[:k]]
    masks = [task.mask("support", stem) for stem in task.support[:k]]
    cut = (cut_window(task, "support", stem, windows) for stem in task.support[k:])
    empty = list(islice((path for path in cut if path), negatives))
    masks += [np.zeros(Image.open(path).size[::-1], bool) for path in empty]
    return write_pairs(folder / "support", images + empty, masks)


def task_rows(
    task: Task, tasks: list[Task], k: int, negatives: int, output: Path, settings: dict
) -> tuple[dict[str, list[Judged]], list[float]]:
    """Images of one task without the target, and with it; Dice of these."""
    folder = output / task.name
    support = support_folder(task, k, negatives, folder)
    dices = []
    others = [other for other in tasks if other.dataset != task.dataset]
    other = others[zlib.crc32(task.name.encode()) % len(others)]
    rows = {}
    for kind in ("window", "foreign", "target"):
        queries = folder / kind
        shutil.rmtree(queries, ignore_errors=True)
        queries.mkdir(parents=True)
        if kind in ("foreign", "target"):
            shown = other if kind == "foreign" else task
            for stem in shown.queries:
                shutil.copyfile(shown.image("queries", stem), queries / f"{stem}.png")
        else:
            for stem in task.queries:
                cut_window(task, "queries", stem, queries)
        if any(queries.iterdir()):
            found = infer(support, queries, folder / f"{kind}_found", settings)
            rows[kind] = judge(found)
            if kind == "target":
                dices = [dice(label[0] > 0, task.mask("queries", stem)) for stem, (label, _) in found.items()]
    return rows, dices


def phantom_rows(output: Path, settings: dict) -> tuple[list, list[float]]:
    """Phantoms: what is found of a class that an image lacks, and Dice of those that it holds."""
    root = output / "phantoms"
    if not root.is_dir():
        make_phantoms(root, patients_per_modality=16, seed=3, progress=False)
    truths = {case["name"]: LoadCased()(case)["label"].numpy() for case in load_datalist(root)}
    absent, dices = [], []
    for look in ("ct", "mr", "us", "rgb"):
        found = infer(root / "support" / look, root / "queries" / look, output / "found" / look, settings)
        for name, (label, _) in found.items():
            truth = truths.get(name)
            if truth is None:
                continue
            for value in class_names(root):
                for mask, plane in zip(label == value, truth == value, strict=True):
                    if plane.any():
                        dices.append(dice(mask, plane))
                    else:
                        absent.append((bool(mask.any()), float(mask.mean()), np.nan, False, False))
    return absent, dices


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_task_arguments(arguments)
    arguments.add_argument("--output", type=Path, required=True)
    arguments.add_argument("--weights", nargs="+", default=[None], help="files to compare; the bundle's without")
    arguments.add_argument("--k", type=int, default=8, help="support pairs")
    arguments.add_argument("--negatives", type=int, default=0, help="windows with empty labels in the support set")
    options = arguments.parse_args()
    tasks = make_tasks(options.data, options.output / "tasks", options.queries, options.held_out, options.seed)
    marks = ("unlike", "may be absent", "either")
    print(line("weights", "images", "number", "with a find", "found share", "confidence", *marks))
    print(line(*["---"] * 9))
    for weights in options.weights:
        settings = {"model_file": str(Path(weights).resolve())} if weights else {}
        name = Path(weights).stem if weights else "the bundle's"
        folder = options.output / name
        rows = defaultdict(list)
        rows["phantom"], dices = phantom_rows(folder, settings)
        task_dices = []
        for task in tasks:
            own, own_dices = task_rows(task, tasks, options.k, options.negatives, folder, settings)
            for kind, judged in own.items():
                rows[f"{kind}, {'seen kind' if task.seen else 'unseen'}"] += judged
            task_dices += own_dices
        for kind, judged in rows.items():
            any_found, share, confidence, unlike, doubted = zip(*judged, strict=True)
            with np.errstate(all="ignore"):
                mean = np.nanmean(confidence) if not np.isnan(confidence).all() else np.nan
            values = (f"{np.mean(any_found):.3f}", f"{np.mean(share):.4f}", f"{mean:.3f}")
            told = (f"{np.mean(m):.3f}" for m in (unlike, doubted, np.logical_or(unlike, doubted)))
            print(line(name, kind, len(judged), *values, *told), flush=True)
        for kind, values in (("phantom", dices), ("target", task_dices)):
            print(line(name, f"{kind}, Dice {np.mean(values):.3f}", len(values), *[""] * 6), flush=True)


if __name__ == "__main__":
    main()
