"""Few-shot tasks from a folder of data sets: what `fewshot.py` and `ablation.py` measure on.

    python benchmarks/_tasks.py --data DIR --output out/tasks

In: a folder whose subfolders are data folders. Out: one ordinary data folder per task and side,
`<output>/<task>/{support,queries}/{images,labels}`, with binary masks of the task's target, and `<output>/<set>.json`,
which lists the tasks of a set with their support pairs in order: the first K pairs are the support set of size K.

A set that pre-training may use gives only its test section (the split of `PRETRAINING_SPLIT`); sets held out of it,
and sets the table does not know, give all cases. Support and queries never share a patient. Slices are written at their
own resolution; the spacing is lost, so distances are in pixels.
"""

import argparse
import json
import re
import shutil
import zlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.random import Generator
from PIL import Image

from sam2sgp.data import class_names, complete_class_names, load_datalist
from sam2sgp.errors import DataError
from sam2sgp.files import write_text
from sam2sgp.transforms import LoadCased, ScaleIntensityByModalityd, to_three_channels
from sam2sgp.transforms.array import Letterbox

# The targets of the sets known here: name and the label values that make it up.
TARGETS: dict[str, dict[str, tuple[int, ...]]] = {
    "acdc": {
        "right ventricle": (1,),
        "myocardium": (2,),
        "left ventricle": (3,),
        "left ventricle and myocardium": (2, 3),
        "whole heart": (1, 2, 3),
    },
    "cxr_lungs": {"lungs": (1,)},
    "hippocampus": {"anterior": (1,), "posterior": (2,), "whole": (1, 2)},
    "kvasir_seg": {"polyp": (1,)},
    "sts_pet": {"tumour": (1,)},
    "wbc": {"cytoplasm": (1,), "nucleus": (2,), "whole cell": (1, 2)},
    "fundus_drive_vessels": {"vessels": (1,)},
    "sts_mr_t1": {"tumour": (1,)},
    "busi": {"lesion": (1,)},
    "hc18": {"fetal head": (1,)},
    "sts_ct": {"tumour": (1,)},
    "dental_teeth": {"front teeth": (1,), "premolars": (2,), "molars": (3,), "all teeth": (1, 2, 3)},
    "dsb_nuclei": {"nuclei": (1,)},
    "em_membranes": {"membranes": (1,)},
    "foot_ulcer": {"ulcer": (1,)},
    "usgra_nerves": {"first": (1,), "second": (2,)},
}
HELD_OUT = ("busi", "hc18", "sts_ct", "em_membranes", "foot_ulcer")
UNUSABLE = {"totalseg_example": "two of its three volumes are one person's, and its labels are a model's"}
PRETRAINING_SPLIT = {"split": (0.6, 0.1, 0.3), "seed": 0}

QUERIES = 24
# The largest K that is asked for everywhere; what lies beyond serves "all labelled images".
PAIRS = 64
POOL = 256
MAX_TARGETS = 6
# More patients than this add nothing to `QUERIES` and `POOL` but reading time.
MAX_PATIENTS = 150
# An object of fewer pixels than this at 128 px is no object for the network.
SIDE, MIN_PIXELS = 128, 16


@dataclass(frozen=True)
class Task:
    """One target of one data set.

    support: stems of the support pairs, the first K spread over patients. queries: stems of the query slices.
    """

    name: str
    dataset: str
    target: str
    seen: bool
    folder: Path
    support: tuple[str, ...]
    queries: tuple[str, ...]

    def image(self, side: str, stem: str) -> Path:
        """The picture of a stem; side is "support" or "queries"."""
        return self.folder / side / "images" / f"{stem}.png"

    def mask(self, side: str, stem: str) -> np.ndarray:
        """Its binary mask (H, W), bool."""
        return np.asarray(Image.open(self.folder / side / "labels" / f"{stem}.png")) > 0


@dataclass(frozen=True)
class _Slice:
    """A slice of a case, its patient, its name in the task's folders, and pixels at 128 px by label value."""

    case: int
    index: int
    patient: str
    stem: str
    pixels: dict[int, int]

    def area(self, values: Iterable[int]) -> int:
        return sum(self.pixels.get(value, 0) for value in values)


def patient_of(stem: str) -> str:
    """The patient in the stem of a task's picture."""
    return stem.split("_")[0]


def make_tasks(
    data: Path,
    output: Path,
    queries: int = QUERIES,
    held_out: Sequence[str] = HELD_OUT,
    seed: int = 0,
    pool: int = POOL,
) -> list[Task]:
    """Write the tasks of all data folders in `data`, or read them where an earlier call with these settings did.

    Args:
        queries: at most this many query slices per task.
        held_out: sets that pre-training has not used; all their cases serve.
        seed: of the choice of patients and slices.
        pool: at most this many support pairs per task.
    """
    tasks = []
    missing = sorted(set(TARGETS) - {path.name for path in data.iterdir()})
    if missing:
        print(f"Not in {data}, left out: {', '.join(missing)}")
    for root in sorted(path for path in data.iterdir() if path.is_dir()):
        if root.name in UNUSABLE:
            print(f"{root.name}: left out, because {UNUSABLE[root.name]}")
            continue
        seen = root.name in TARGETS and root.name not in held_out
        settings = {"data": str(root.resolve()), "queries": queries, "seen": seen, "seed": seed, "pool": pool}
        index = output / f"{root.name}.json"
        content = json.loads(index.read_text()) if index.is_file() else {}
        if content.get("settings") != settings:
            try:
                made = _make_set(root, output, queries, seen, seed, pool)
            except DataError as error:
                print(f"{root.name}: left out ({error})")
                continue
            listed = [{**asdict(task), "folder": task.folder.name} for task in made]
            content = {"settings": settings, "tasks": listed}
            write_text(index, json.dumps(content, indent=1))
        for entry in content["tasks"]:
            lists = {key: tuple(entry[key]) for key in ("support", "queries")}
            tasks.append(Task(**{**entry, **lists, "folder": output / entry["folder"]}))
    return tasks


def write_pairs(folder: Path, images: Sequence[Path], masks: Sequence[np.ndarray]) -> Path:
    """A data folder of pictures and masks (H, W) bool, in place of whatever is at `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True)
    for image, mask in zip(images, masks, strict=True):
        shutil.copyfile(image, folder / "images" / image.name)
        Image.fromarray(mask.astype(np.uint8) * 255).save(folder / "labels" / f"{image.stem}.png")
    return folder


def _make_set(root: Path, output: Path, queries: int, seen: bool, seed: int, pool: int) -> list[Task]:
    cases, spare = _cases(root, seen, seed)
    slices = _list_slices([*spare, *cases])
    support_side, query_side = _divide(slices, {case["patient"] for case in spare}, queries, seed)
    tasks = []
    for target, values in _targets(root, slices).items():
        name = f"{root.name}_{_slug(target)}"
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        holding = [entry for entry in slices if entry.area(values) >= MIN_PIXELS]
        sides = {}
        for side, patients, count, largest in (
            ("support", support_side, pool, True),
            ("queries", query_side, queries, False),
        ):
            usable = [entry for entry in holding if entry.patient in patients]
            sides[side] = _spread(usable, values, count, largest, rng)
        if not all(sides.values()):
            print(f"{name}: left out, expected the target in at least two patients")
            continue
        folder = output / name
        shutil.rmtree(folder, ignore_errors=True)
        for side, chosen in sides.items():
            _write_slices(folder / side, [*spare, *cases], chosen, values)
        stems = {side: tuple(entry.stem for entry in chosen) for side, chosen in sides.items()}
        tasks.append(Task(name, root.name, target, seen, folder, **stems))
    return tasks


def _cases(root: Path, seen: bool, seed: int) -> tuple[list[dict], list[dict]]:
    """Cases to draw from, and further ones only for the support side.

    Where the test section has one patient, the support comes from the validation section: it has selected weights, but
    no query is measured on it.
    """
    if seen:
        cases = load_datalist(root, "test", **PRETRAINING_SPLIT)
        few = len({case["patient"] for case in cases}) < 2
        return cases, load_datalist(root, "val", **PRETRAINING_SPLIT) if few else []
    cases = load_datalist(root)
    patients = np.random.default_rng(seed).permutation(sorted({case["patient"] for case in cases}))[:MAX_PATIENTS]
    return [case for case in cases if case["patient"] in set(patients)], []


def _list_slices(cases: list[dict]) -> list[_Slice]:
    numbers = {patient: number for number, patient in enumerate(sorted({case["patient"] for case in cases}))}
    volumes: dict[str, int] = defaultdict(int)
    slices = []
    for position, case in enumerate(cases):
        label = LoadCased()(case)["label"]
        small = Letterbox.of(tuple(label.shape[-2:]), SIDE).apply_label(label)
        patient, volume = case["patient"], volumes[case["patient"]]
        volumes[patient] += 1
        for index, plane in enumerate(small):
            values, counts = torch.unique(plane, return_counts=True)
            pixels = {value: count for value, count in zip(values.tolist(), counts.tolist(), strict=True) if value}
            # The form in which the default patient pattern finds the patient.
            stem = f"patient{numbers[patient]:03d}_v{volume}_s{index:03d}"
            if pixels:
                slices.append(_Slice(position, index, patient, stem, pixels))
    return slices


def _divide(slices: list[_Slice], spare: set[str], queries: int, seed: int) -> tuple[set[str], set[str]]:
    """Patients of the support and of the query side.

    Half of them are for queries, as far as there are queries to spread, unless the support would then be short of
    pairs: then a third.
    """
    patients = sorted({entry.patient for entry in slices})
    if spare:
        return spare & set(patients), set(patients) - spare
    order = np.random.default_rng([seed, len(patients)]).permutation(patients).tolist()
    count = min(queries, len(order) // 2)
    if sum(entry.patient in order[count:] for entry in slices) < PAIRS:
        count = min(count, max(1, len(order) // 3))
    return set(order[count:]), set(order[:count])


def _targets(root: Path, slices: list[_Slice]) -> dict[str, tuple[int, ...]]:
    """The set's targets by name: of the table, or the classes that most slices hold."""
    if root.name in TARGETS:
        return TARGETS[root.name]
    holding: dict[int, int] = defaultdict(int)
    for entry in slices:
        for value, pixels in entry.pixels.items():
            holding[value] += pixels >= MIN_PIXELS
    names = complete_class_names(class_names(root), holding)
    most = sorted((value for value in names if holding[value]), key=lambda value: (-holding[value], value))
    return {names[value]: (value,) for value in sorted(most[:MAX_TARGETS])}


def _spread(slices: list[_Slice], values: tuple[int, ...], count: int, largest: bool, rng: Generator) -> list[_Slice]:
    """At most `count` slices, one patient after the other.

    A patient's slices come in random order; with `largest`, every other patient starts with the largest one and the
    rest have it second, so that any first few hold large and random slices of different patients.
    """
    by_patient: dict[str, list[_Slice]] = defaultdict(list)
    for entry in slices:
        by_patient[entry.patient].append(entry)
    rows = []
    for position, patient in enumerate(rng.permutation(sorted(by_patient)).tolist() if by_patient else []):
        own = by_patient[patient]
        row = [own[i] for i in rng.permutation(len(own))]
        if largest:
            top = max(row, key=lambda entry: entry.area(values))
            row.remove(top)
            row.insert(position % 2, top)
        rows.append(row)
    rounds = max((len(row) for row in rows), default=0)
    return [row[i] for i in range(rounds) for row in rows if i < len(row)][:count]


def _write_slices(folder: Path, cases: list[dict], chosen: list[_Slice], values: tuple[int, ...]) -> None:
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True)
    by_case: dict[int, list[_Slice]] = defaultdict(list)
    for entry in chosen:
        by_case[entry.case].append(entry)
    load, scale = LoadCased(), ScaleIntensityByModalityd()
    for position, entries in by_case.items():
        raw = load(cases[position])
        # Of a volume the range is the whole volume's; a picture of 8 bits is stored as it is and scaled when read.
        stored = raw["geometry"].is_picture and float(raw["image"].min()) >= 0 and float(raw["image"].max()) <= 255
        image = raw["image"] / 255 if stored else scale(raw)["image"]
        for entry in entries:
            plane = image[entry.index]
            if len(plane) == 1:
                depth, kind = (255, np.uint8) if stored else (65535, np.uint16)
                pixels = (plane[0].numpy() * depth).round().astype(kind)
            else:
                pixels = (to_three_channels(plane).permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
            Image.fromarray(pixels).save(folder / "images" / f"{entry.stem}.png")
            mask = np.isin(raw["label"][entry.index].numpy(), values)
            Image.fromarray(mask.astype(np.uint8) * 255).save(folder / "labels" / f"{entry.stem}.png")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")


def add_task_arguments(arguments: argparse.ArgumentParser, required: bool = True) -> None:
    """The options that decide what the tasks are."""
    arguments.add_argument("--data", type=Path, required=required, help="folder of data folders")
    arguments.add_argument("--queries", type=int, default=QUERIES, help="query slices per task, at most")
    arguments.add_argument("--held_out", nargs="*", default=list(HELD_OUT), help="sets that pre-training has not used")
    arguments.add_argument("--seed", type=int, default=0)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_task_arguments(arguments)
    arguments.add_argument("--output", type=Path, required=True)
    options = arguments.parse_args()
    tasks = make_tasks(options.data, options.output, options.queries, options.held_out, options.seed)
    print("| task | | support pairs | of patients | queries | of patients |\n| --- | --- | --- | --- | --- | --- |")
    for task in tasks:
        sides = [
            str(n) for stems in (task.support, task.queries) for n in (len(stems), len(set(map(patient_of, stems))))
        ]
        print("|", " | ".join([task.name, "seen kind" if task.seen else "unseen", *sides]), "|")


if __name__ == "__main__":
    main()
