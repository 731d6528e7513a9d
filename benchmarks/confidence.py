"""What the report's marks are worth: Dice of the images that each of them marks, and how many failures it finds.

    python benchmarks/fewshot.py --data DIR --output out/fewshot --methods plain
    python benchmarks/confidence.py --output out/fewshot

In: what `fewshot.py` has left in its output folder, the Dice of each query and the `summary.csv` of each run. Out, as
Markdown: per mark the share of queries that have it, the mean Dice of these and of all others, the share of failures
(Dice below 0.5) that it finds, and the share of the marked that are failures. Marks: a mean confidence below several
limits, one of which is the report's; `unlike_support`; `maybe_absent`; and any that the report sets.

Queries count once for each task that they are in. All of them hold the target: what is marked where there is none,
`false_spots.py` measures.
"""

import argparse
import csv
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from fewshot import Results, header, line, machine
from scipy.stats import spearmanr

from sam2sgp.evaluation.confidence import LOW_CONFIDENCE

FAILURE = 0.5
LIMITS = (0.7, 0.75, 0.8, 0.85, 0.9, 0.95)


@dataclass(frozen=True)
class Query:
    """One segmented image: its Dice, and what `summary.csv` says of it; confidence is NaN where nothing was found."""

    dice: float
    seen: bool
    confidence: float
    unlike: bool
    absent: bool


def queries(output: Path, method: str, k: int) -> list[Query]:
    """All queries of a method's runs with K support pairs."""
    found = []
    for (task, ran, size), record in Results(output / "results.jsonl").records.items():
        summary = output / "runs" / task / f"{method}_{k}" / "output" / "summary.csv"
        if (ran, size) != (method, k) or not summary.is_file():
            continue
        with open(summary, newline="") as file:
            of = {row["case"]: row for row in csv.DictReader(file)}
        for row in record["rows"]:
            said = of[row["query"]]
            confidence = float(said["mean_confidence"] or math.nan)
            flags = (said[name] == "True" for name in ("unlike_support", "maybe_absent"))
            found.append(Query(row["dice"], record["seen"], confidence, *flags))
    return found


def unsure(limit: float) -> Callable[[Query], bool]:
    """Whether a query's confidence is below a limit, or nothing was found."""
    return lambda query: not query.confidence >= limit


def table(found: list[Query]) -> list[str]:
    """One row per mark."""
    marks = {f"confidence below {limit}": unsure(limit) for limit in LIMITS}
    marks["unlike the support set"] = lambda query: query.unlike
    marks["may be absent"] = lambda query: query.absent
    low = unsure(LOW_CONFIDENCE)
    marks[f"any of the report's (confidence {LOW_CONFIDENCE})"] = lambda q: low(q) or q.unlike or q.absent
    lines = header("mark", "marked", "Dice, marked", "Dice, others", "failures found", "failures among marked")
    dice = np.array([query.dice for query in found])
    failed = dice < FAILURE
    for name, marked in marks.items():
        has = np.array([marked(query) for query in found])
        cells = [has.mean(), *(_mean(part) for part in (dice[has], dice[~has], has[failed], failed[has]))]
        lines.append(line(name, *(f"{cell:.2f}" for cell in cells)))
    return lines


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--output", type=Path, required=True, help="output folder of fewshot.py")
    arguments.add_argument("--method", default="plain", choices=("plain", "adapt"))
    arguments.add_argument("--k", type=int, default=16)
    options = arguments.parse_args()
    every = queries(options.output, options.method, options.k)
    print(f"\n{machine()}")
    for name, seen in (("kinds trained on, new patients", True), ("sets left out", False)):
        found = [query for query in every if query.seen == seen]
        if found:
            known = [query for query in found if not math.isnan(query.confidence)]
            order = spearmanr([query.confidence for query in known], [query.dice for query in known]).statistic
            print(f"\n{name}: {len(found)} queries, rank correlation of confidence and Dice {order:.2f}\n")
            print("\n".join(table(found)))


if __name__ == "__main__":
    main()
