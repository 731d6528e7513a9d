"""Does adaptation ever harm? Many small support sets, biased ones too, with and without it.

    python benchmarks/adaptation_safety.py --data DIR --output out/safety

In: a folder of data folders, and the bundle's weights. Out: a row per draw in `<output>/draws.csv`, then tables as
Markdown. A draw that is there for the same settings is not computed again, so an ended run goes on when called again;
`--minutes` ends it in time, `--table` prints what there is. With `--cpu_time` the time that adaptation may take is that
of the processor, so that a machine with other work to do gives the same result.

A draw is K labelled cases of one set as support, and other patients of it as queries, segmented by the bundle's
`inferring` as a user runs it. Draws are of these kinds:

    random   any cases
    patient  cases of as few patients as there are
    kind     cases whose names begin alike, such as benign_1, benign_2, …, where a set has several such beginnings
    look     the cases that look most like one of them

Each draw is also run with names that say nothing (`hidden`), as many users' do. What counts is the mean Dice over
queries and classes.
"""

import argparse
import csv
import hashlib
import json
import re
import shutil
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path

import monai
import numpy as np
import torch
import torch.nn.functional as F
from _clock import count_processor_time
from _tasks import HELD_OUT, PRETRAINING_SPLIT, TARGETS, UNUSABLE
from fewshot import bundle_config, bundle_overrides

from sam2sgp.data import class_names, load_datalist, read_image, read_label
from sam2sgp.data.io import image_stem
from sam2sgp.evaluation import case_metrics
from sam2sgp.files import write_text

SIZES = (4, 8, 10, 16)
BIASES = ("random", "patient", "kind", "look")
NAMING = ("told", "hidden")
# A draw that loses more than this counts as harmed.
HARM = 0.02
THUMBNAIL = 32
QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)


@dataclass(frozen=True)
class Draw:
    """One support set: the set's name, K, how it was drawn, the number of the draw, and whether names are hidden."""

    dataset: str
    k: int
    bias: str
    number: int
    hidden: bool


@dataclass(frozen=True)
class Row:
    """What a draw came to. settings: a hash of what else decides it. choices: the share of the correctors by class."""

    dataset: str
    k: int
    bias: str
    number: int
    hidden: bool
    settings: str
    queries: int
    groups: int
    plain: float
    adapted: float
    choices: str
    seconds: float

    @property
    def gain(self) -> float:
        return self.adapted - self.plain


class Collection:
    """The cases of a set that may be drawn: of a set that pre-training has used, those of its test section."""

    def __init__(self, root: Path, held_out: Sequence[str]) -> None:
        self.root = root
        seen = root.name in TARGETS and root.name not in held_out
        self.cases = load_datalist(root, "test", **PRETRAINING_SPLIT) if seen else load_datalist(root)
        self._looks: torch.Tensor | None = None

    @property
    def looks(self) -> torch.Tensor:
        """(N, D) standardised thumbnails of the cases' middle slices."""
        if self._looks is None:
            found = []
            for case in self.cases:
                slices = torch.from_numpy(read_image(case["image"]).slices)
                middle = slices[len(slices) // 2].float().mean(0)[None, None]
                found.append(F.interpolate(middle, size=(THUMBNAIL,) * 2, mode="bilinear", antialias=True).flatten())
            looks = torch.stack(found)
            self._looks = F.normalize(looks - looks.mean(1, keepdim=True), dim=1)
        return self._looks

    def draw(self, draw: Draw, queries: int) -> tuple[list[dict], list[dict]] | None:
        """Support and queries, of other patients; None where the set has no such draw."""
        rng = np.random.default_rng([zlib.crc32(f"{draw.dataset} {draw.bias}".encode()), draw.k, draw.number])
        order = rng.permutation(len(self.cases)).tolist()
        if draw.bias == "patient":
            counts = Counter(case["patient"] for case in self.cases)
            place = {patient: number for number, patient in enumerate(rng.permutation(sorted(counts)).tolist())}
            order.sort(key=lambda number: place[self.cases[number]["patient"]])
            if max(counts.values()) < 2:
                return None
        elif draw.bias == "kind":
            kinds = Counter(kind_of(case["name"]) for case in self.cases)
            usable = sorted(kind for kind, count in kinds.items() if count >= draw.k)
            if len(kinds) < 2 or not usable:
                return None
            kind = usable[draw.number % len(usable)]
            order.sort(key=lambda number: kind_of(self.cases[number]["name"]) != kind)
        elif draw.bias == "look":
            likeness = self.looks @ self.looks[order[0]]
            order.sort(key=lambda number: -float(likeness[number]))
        support = [self.cases[number] for number in order[: draw.k]]
        patients = {case["patient"] for case in support}
        others = [self.cases[number] for number in order if self.cases[number]["patient"] not in patients]
        if len(support) < draw.k or not others:
            return None
        return support, [others[number] for number in rng.permutation(len(others))[:queries]]


def kind_of(name: str) -> str:
    """A name without its last number."""
    return re.sub(r"\d+\D*$", "", name)


class Bench:
    """Runs draws and records them.

    Args:
        output: folder of `draws.csv` and of the last draw's files.
        queries: of a draw, at most.
        overrides: of the bundle's config in every run.
        adaptation: further ones with adaptation.
        cpu_time: the seconds of adaptation are the processor's.
    """

    def __init__(self, output: Path, queries: int, overrides: dict, adaptation: dict, cpu_time: bool = False) -> None:
        self.output, self.queries = output, queries
        self.overrides, self.adaptation = overrides, adaptation
        self.path = output / "draws.csv"
        weights = Path(bundle_config(overrides).get_parsed_content("model_file")).read_bytes()
        if cpu_time:
            count_processor_time()
        decides = [queries, overrides, adaptation, cpu_time, hashlib.sha256(weights).hexdigest()]
        self.settings = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]
        self.rows = read_rows(self.path)
        self.done = {(row.settings, *astuple(row)[:5]) for row in self.rows}

    def run(self, draw: Draw, collection: Collection) -> None:
        """Measure a draw, unless that is done or there is no such draw."""
        chosen = None if (self.settings, *astuple(draw)) in self.done else collection.draw(draw, self.queries)
        if chosen is None:
            return
        support, queries = chosen
        folder = self.output / "draw"
        shutil.rmtree(folder, ignore_errors=True)
        _write(folder / "support", support, draw.hidden, collection.root)
        _write(folder / "queries", queries, False, collection.root)
        started = time.perf_counter()
        plain, _ = self._infer(folder, "plain", queries, {})
        adapted, record = self._infer(folder, "adapted", queries, self.adaptation)
        choices = {name: choice["share"] for name, choice in record.get("choices", {}).items()}
        row = Row(
            **asdict(draw),
            settings=self.settings,
            queries=len(queries),
            groups=len(set(record.get("groups", {}).get("owner", ()))),
            plain=round(plain, 4),
            adapted=round(adapted, 4),
            choices=json.dumps(choices or record.get("kept", "")),
            seconds=round(time.perf_counter() - started, 1),
        )
        self.rows.append(row)
        self._append(row)
        hidden = ", names hidden" if draw.hidden else ""
        print(
            f"{draw.dataset}, K = {draw.k}, {draw.bias} {draw.number}{hidden}: {plain:.3f} -> {adapted:.3f} "
            f"({row.choices}, {row.groups} groups, {row.seconds:.0f} s)",
            flush=True,
        )

    def _infer(self, folder: Path, name: str, queries: list[dict], more: dict) -> tuple[float, dict]:
        """Mean Dice over queries and classes, and the adaptation's record."""
        output = folder / name
        settings = {
            **self.overrides,
            **more,
            "support_dir": str(folder / "support"),
            "dataset_dir": str(folder / "queries" / "images"),
            "output_dir": str(output),
            "report_figures": 0,
        }
        monai.utils.set_determinism(0)
        parser = bundle_config(settings)
        parser.get_parsed_content("inferring")
        names = parser.get_parsed_content("support_bank").class_names
        with open(output / "summary.csv", newline="") as file:
            written = {row["case"]: row["output"] for row in csv.DictReader(file)}
        found = []
        for number, case in enumerate(queries):
            prediction, truth = read_label(written[_name(number)]), read_label(case["label"])
            rows = case_metrics(np.asarray(prediction), np.asarray(truth), names)
            dice = [row["dice"] for row in rows if not np.isnan(row["dice"])]
            found += [np.mean(dice)] if dice else []
        records = list((output / "adaptation").glob("*/adaptation.json"))
        return float(np.mean(found)), json.loads(records[0].read_text()) if records else {}

    def _append(self, row: Row) -> None:
        new = not self.path.is_file()
        with open(self.path, "a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow([field.name for field in fields(Row)])
            writer.writerow(astuple(row))


def _name(number: int) -> str:
    return f"query{number:03d}x"


def _write(folder: Path, cases: list[dict], hidden: bool, root: Path) -> None:
    """A data folder of links to cases; queries are numbered, hidden names say nothing."""
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True)
    for number, case in enumerate(cases):
        name = case["name"] if folder.name == "support" else _name(number)
        if hidden:
            name = (
                hashlib.sha256(case["name"].encode()).hexdigest()[:10].translate(str.maketrans("0123456789", "g" * 10))
            )
        for part in ("image", "label"):
            path = Path(case[part])
            ending = path.name[len(image_stem(path)) :]
            (folder / f"{part}s" / (name + ending)).symlink_to(path.resolve())
    write_text(folder / "labels.json", json.dumps({str(value): name for value, name in class_names(root).items()}))


def read_rows(path: Path) -> list[Row]:
    """The rows of a file; one that an end of the process has cut is passed over."""
    rows = []
    if path.is_file():
        with open(path, newline="") as file:
            for values in csv.DictReader(file):
                try:
                    rows.append(Row(**{f.name: _parse(f.type, values[f.name]) for f in fields(Row)}))
                except (KeyError, TypeError, ValueError):
                    continue
    return rows


def _parse(kind: type, text: str) -> object:
    return text == "True" if kind is bool else kind(text)


def draws(
    names: Sequence[str], sizes: Sequence[int], biases: Sequence[str], count: int, naming: Sequence[str] = NAMING
) -> Iterator[Draw]:
    """All draws, so ordered that any first part of them is spread over sets, sizes and kinds."""
    for number in range(count):
        for k in sizes:
            for bias in biases:
                for name in names:
                    for way in naming:
                        yield Draw(name, k, bias, number, way == "hidden")


def table(rows: Sequence[Row]) -> str:
    """Gains by kind of draw, and of all."""
    lines = [
        "| draws | number | plain | adapted | mean gain | worst | 10 % | median | 90 % | best | lose more than .02 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    parts: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        for part in (f"K = {row.k}", row.bias, "names hidden" if row.hidden else "names as they are", "all"):
            parts[part].append(row)
    order = [
        *(f"K = {k}" for k in sorted({row.k for row in rows})),
        *BIASES,
        "names as they are",
        "names hidden",
        "all",
    ]
    for part in order:
        if own := parts.get(part):
            gains = np.array([row.gain for row in own])
            plain, adapted = (np.mean([getattr(row, name) for row in own]) for name in ("plain", "adapted"))
            spread = " | ".join(f"{value:+.3f}" for value in np.quantile(gains, QUANTILES))
            harmed = f"{np.mean(gains < -HARM):.0%}"
            lines.append(
                f"| {part} | {len(own)} | {plain:.3f} | {adapted:.3f} | {gains.mean():+.3f} | {spread} | {harmed} |"
            )
    return "\n".join(lines)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--data", type=Path, required=True, help="folder of data folders")
    arguments.add_argument("--output", type=Path, required=True)
    arguments.add_argument("--sets", nargs="*", help="names of data folders; all without")
    arguments.add_argument("--k", nargs="*", type=int, default=list(SIZES))
    arguments.add_argument("--biases", nargs="*", default=list(BIASES), choices=BIASES)
    arguments.add_argument("--names", nargs="*", default=list(NAMING), choices=NAMING, help="as they are, or hidden")
    arguments.add_argument("--draws", type=int, default=4, help="of each set, K and bias")
    arguments.add_argument("--queries", type=int, default=20, help="of a draw, at most")
    arguments.add_argument("--seconds", type=float, default=60.0, help="of adaptation")
    arguments.add_argument("--cpu_time", action="store_true", help="count these seconds in processor time")
    arguments.add_argument("--steps", type=int, help="of adaptation, in place of seconds")
    arguments.add_argument("--held_out", nargs="*", default=list(HELD_OUT), help="sets pre-training has not used")
    arguments.add_argument("--weights", type=Path, help="default: the bundle's own")
    arguments.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of the bundle's config")
    arguments.add_argument("--minutes", type=float, help="start no draw after this time")
    arguments.add_argument("--table", action="store_true", help="print the table of what there is")
    options = arguments.parse_args()
    if options.table:
        print(table(read_rows(options.output / "draws.csv")))
        return
    limit = {"adapt_seconds": options.seconds} if options.steps is None else {"adapt_steps": options.steps}
    options.output.mkdir(parents=True, exist_ok=True)
    bench = Bench(options.output, options.queries, bundle_overrides(options), limit, options.cpu_time)
    names = options.sets or sorted(p.name for p in options.data.iterdir() if p.is_dir() and p.name not in UNUSABLE)
    collections = {name: Collection(options.data / name, options.held_out) for name in names}
    started = time.monotonic()
    for draw in draws(names, options.k, options.biases, options.draws, options.names):
        if options.minutes is not None and time.monotonic() - started > 60 * options.minutes:
            print("Out of time; the same call goes on from here.")
            break
        bench.run(draw, collections[draw.dataset])
    print(table([row for row in bench.rows if row.settings == bench.settings]))


if __name__ == "__main__":
    main()
