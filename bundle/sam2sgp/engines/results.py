"""What a run of `QueryEvaluator` leaves for people: CSV files and `report.html`.

Each finished case goes on record (`sam2sgp.engines.records`) with its rows and, for some, what is needed to draw it;
tables and report are made from the records. So a run that was interrupted goes on with the cases that are missing, and
several processes share the cases: each takes every n-th of those, and rank 0 waits for the records of the others. The
processes talk to each other only before the first case; a slow one holds up nobody until the end.
"""

import logging
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from uuid import uuid4

import numpy as np
import torch
from ignite.engine import Engine, Events
from tqdm import tqdm

from sam2sgp import distributed
from sam2sgp.data.folders import Skipped
from sam2sgp.data.io import read_image
from sam2sgp.drawing import draw_overlay, spread_slices, to_display
from sam2sgp.engines.evaluator import QueryEvents
from sam2sgp.engines.records import CaseRecords, settings_of_run
from sam2sgp.errors import ConfigError
from sam2sgp.evaluation import METRICS, case_metrics, class_sizes, summarise, write_csv
from sam2sgp.files import remove_parts
from sam2sgp.report.colour_tables import write_colour_tables
from sam2sgp.report.facts import facts_of_run
from sam2sgp.report.html import CaseFigure, Report, SupportThumb, write_report
from sam2sgp.report.slices import frames, frames_per_case, sides_of, slice_position
from sam2sgp.support.bank import SupportBank
from sam2sgp.support.content import digest_of
from sam2sgp.support.familiarity import is_unlike
from sam2sgp.transforms import OutputNames, ScaleIntensityByModalityd
from sam2sgp.transforms.scaling import CT, Scaling, scale_intensity

logger = logging.getLogger(__name__)

# The last ones of both tables below.
LAST_COLUMNS = ("mean_confidence", "support_items", "seconds", "scaling", "warnings")
# Those that a table has also where no case has a result.
COLUMNS = (
    "case",
    "source",
    "output",
    "class",
    "class_name",
    "voxels",
    "size",
    "size_unit",
    *LAST_COLUMNS,
)
SCORED_COLUMNS = (
    "case",
    "source",
    "class",
    "class_name",
    *METRICS,
    "unit",
    "truth_voxels",
    "predicted_voxels",
    "truth_size",
    "predicted_size",
    "size_unit",
    *LAST_COLUMNS,
)
# Between two writings of the table during a run.
TABLE_SECONDS = 10.0


class ResultWriter:
    """Handler that writes the results of an evaluation or inference.

    Scored against labels: `metrics.csv` (a row per case and class), `metrics_summary.csv` and a report of the worst and
    best cases. Else: `summary.csv` and a report of the first queries. A failed case is a row with its error; the next
    run tries it again.

    Args:
        output_dir: where the files go, seen by all processes of a run.
        bank: the support bank that guided the run.
        title: of the report.
        facts: {name: value} of the run, shown in the report.
        scored: whether the cases are labelled and measured.
        max_figures: cases shown with pictures.
        nsd_tolerance: of the surface Dice, in mm (pixels where the spacing is unknown).
        progress: show a bar.
        names: of the files that are written for a case.
        resume: leave cases alone whose results are whole and would be the same.
        max_wait: seconds that rank 0 waits at the end for the next result of another process.
        scale_intensity: how the report's pictures are scaled; None: as by default.
        skipped: files that were found and are not used, see `sam2sgp.data.load_datalist`.

    Attributes:
        results: {number of a case: its record}; in rank 0 at the end those of all cases.

    Raises:
        ConfigError: `resume` is no bool; or, as a run starts, its processes differ in images, support set, weights or
            settings.
        DataError: a record or table can't be written; another process has no result in time.
    """

    def __init__(
        self,
        output_dir: str,
        bank: SupportBank,
        title: str,
        facts: dict[str, str] | None = None,
        scored: bool = False,
        max_figures: int = 12,
        nsd_tolerance: float = 2.0,
        progress: bool = True,
        names: OutputNames | None = None,
        resume: bool = True,
        max_wait: float = 6 * 3600.0,
        scale_intensity: ScaleIntensityByModalityd | None = None,
        skipped: Sequence[Skipped] = (),
    ) -> None:
        if not isinstance(resume, bool):
            raise ConfigError(f"resume is {resume!r}: expected True or False, with a capital letter on a command line.")
        self.output_dir = Path(output_dir)
        self.bank = bank
        self.title = title
        self.facts = facts or {}
        self.max_figures = max_figures
        self.nsd_tolerance = nsd_tolerance
        self.progress = progress
        self.scored = scored
        self.names = names
        self.resume = resume
        self.max_wait = max_wait
        self.scale_intensity = scale_intensity or ScaleIntensityByModalityd()
        self.skipped = list(skipped)
        self.records = CaseRecords(output_dir, scored)
        self.results: dict[int, dict] = {}
        self.cases: list[dict] = []
        self.bar: tqdm | None = None
        # Numbers of the cases to be done in this run, by all processes.
        self._due: list[int] = []
        # Of scored cases of this process that may be shown, see `_ranking`.
        self._ranked: list[tuple[bool, float, int]] = []
        self._written = 0.0
        # Scalings and what is missing, each told once.
        self._told: set[str] = set()

    @property
    def rows(self) -> list[dict]:
        """The rows of the table so far, in the order of the cases; at last the files that are not used."""
        rows = [row for number in sorted(self.results) for row in self._rows_of(number)]
        return rows + [{"case": file.path.name, "source": str(file.path), "skipped": file.why} for file in self.skipped]

    @property
    def errors(self) -> list[dict]:
        """The rows of the cases that failed."""
        return [row for row in self.rows if "error" in row]

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(QueryEvents.RUN_PREPARED, self._choose)
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(QueryEvents.SLICES_DONE, self._show_share)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._add)
        engine.add_event_handler(Events.COMPLETED, self._complete)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._fail)

    def finish(self) -> None:
        """End the process with exit code 1 if a case failed; the message says how many and where they are listed.

        Of several processes, rank 0 does so for all.
        """
        errors = self.errors
        if errors and not distributed.rank():
            raise SystemExit(
                f"error: {len(errors)} of {len(errors) + self._count()} images failed, first "
                f"{errors[0]['case']}: {errors[0]['error']} All are listed in {self._table()}."
            )

    def _choose(self, engine: Engine) -> None:
        """Choose the cases of this process among those that are not done yet."""
        dataset, inferer = engine.data_loader.dataset, engine.inferer
        self.cases = dataset.data
        with engine.mode(engine.network):
            inferer.adapt(engine.network)
        self.records.settings = settings_of_run(engine, self.scored, self.nsd_tolerance)
        rank, count = distributed.rank(), distributed.world_size()
        own = range(rank, len(self.cases), count)
        whole = [number for number in own if self._is_whole(number)] if self.resume else []
        work = digest_of(self.records.settings, [case["name"] for case in self.cases])
        shared = distributed.gather((work, uuid4().hex, whole))
        if len({work for work, _, _ in shared}) > 1:
            raise ConfigError(
                "The processes of this run differ: expected the same images, support set, weights and settings in all; "
                "give all machines the same files and options, and with `adapt_seconds` an `adapt_dir` that all see."
            )
        self.records.run = shared[0][1]
        done = {number for _, _, numbers in shared for number in numbers}
        self._due = [number for number in range(len(self.cases)) if number not in done]
        dataset.chosen = self._due[rank::count]
        dataset.stamp = self.records.stamp
        self.results = {} if rank else {number: self.records.load(self.cases[number]) for number in done}
        drawn = [number for number in whole if self.scored and self.records.has_figure(self.cases[number])]
        self._ranked = [_ranking(number, self.records.load(self.cases[number])) for number in drawn]
        if done and not rank:
            logger.info("%d of %d images are done already, in %s.", len(done), len(self.cases), self.output_dir)
        self._write_table()
        if self._due and count > 1:
            with engine.mode(engine.network):
                inferer.encode(engine.network)

    def _is_whole(self, number: int) -> bool:
        case = self.cases[number]
        record = self.records.find(case)
        if record is None:
            return False
        if not self.scored and number < self.max_figures and not self.records.has_figure(case):
            return False
        # Another query may have got the name that was this one's.
        taken = self.names and self.names.taken
        return not taken or all(taken.get(self.output_dir / name) == case["image"] for name in record["files"])

    def _rows_of(self, number: int) -> list[dict]:
        """The rows of a case; names and paths are the present ones, which may not be those of the record."""
        case, record = self.cases[number], self.results[number]
        known = {"case": case["name"], "source": str(case["image"])}
        if "error" in record:
            return [{**known, "error": record["error"]}]
        if "output" in record:
            known["output"] = str(self.output_dir / record["output"])
        return [known | row for row in record["rows"]]

    def _start(self, engine: Engine) -> None:
        self.bar = tqdm(
            desc="Segmenting", total=engine.state.epoch_length, unit="image", disable=not self.progress, leave=True
        )

    def _show_share(self, engine: Engine) -> None:
        case = engine.state.batch[0]
        if self.bar is not None and len(case["image"]) > 1:
            self.bar.set_postfix_str(f"{case['name']}: {engine.share_done:.0%}")

    def _add(self, engine: Engine) -> None:
        number = engine.state.batch[0]["number"]
        if engine.state.output:
            self._add_case(engine.state.output[0])
        else:
            self.records.save_error(self.cases[number], engine.state.batch[0]["error"])
            self.results[number] = {"error": engine.state.batch[0]["error"]}
        self.bar.set_postfix_str("", refresh=False)
        self.bar.update()
        if time.monotonic() - self._written > TABLE_SECONDS:
            self._write_table()

    def _fail(self, engine: Engine, error: BaseException) -> None:
        """Whatever ends the run, the rows so far stay."""
        self.bar.close()
        self._write_table()
        raise error

    def _write_table(self) -> None:
        if not distributed.rank():
            write_csv(self._table(), self.rows, SCORED_COLUMNS if self.scored else COLUMNS)
        self._written = time.monotonic()

    def _complete(self, engine: Engine) -> None:
        if self.bar is not None:
            self.bar.close()
        if distributed.rank():
            return
        missing = [number for number in self._due if number not in self.results]
        if missing:
            logger.info("Waiting for the other processes: %d images.", len(missing))
        for number in missing:
            self.results[number] = self.records.wait(self.cases[number], self.max_wait)
        self._write_table()
        rows, errors = self.rows, self.errors
        unlike = {row["case"] for row in rows if row.get("unlike_support")}
        if unlike:
            logger.warning(
                "%d of %d images are unlike every image of the support set, so check them first (`unlike_support` in "
                "%s); label images like them.",
                len(unlike),
                self._count(),
                self._table(),
            )
        summary = []
        if self.scored:
            summary = summarise([row for row in rows if "dice" in row])
            write_csv(self.output_dir / "metrics_summary.csv", summary)
            for row in summary:
                logger.info(
                    "%s: Dice %.3f, IoU %.3f, HD95 %.2f, NSD %.3f (%d cases)",
                    row["class_name"],
                    *(row[f"{metric}_mean"] for metric in METRICS),
                    row["dice_n"],
                )
        if not self.scored:
            write_colour_tables(self.output_dir, self.bank.class_names)
        path = self.output_dir / "report.html"
        shown = self._shown()
        used = {entry["id"] for number, _ in shown for entry in self.results[number]["shown"]["support"]}
        write_report(
            path,
            Report(
                title=self.title,
                subtitle=f"Images: {self._count()}, classes: {len(self.bank.class_names)}, supports: {len(self.bank)}",
                meta=facts_of_run(self.facts),
                classes=self.bank.class_names,
                summary_rows=summary,
                case_rows=[row for row in rows if "skipped" not in row],
                figures=self._figures(shown),
                support={identifier: self._thumb(identifier) for identifier in used},
                errors=errors,
                warnings=list({row["case"]: row for row in rows if row.get("warnings")}.values()),
                skipped=[row for row in rows if "skipped" in row],
            ),
        )
        # All cases are done, so nobody is writing any more.
        remove_parts(self.output_dir, {name for record in self.results.values() for name in record.get("files", {})})
        logger.info("Results: %s, report: %s", self._table(), path)

    def _table(self) -> Path:
        return self.output_dir / ("metrics.csv" if self.scored else "summary.csv")

    def _count(self) -> int:
        return sum("error" not in record for record in self.results.values())

    def _add_case(self, case: dict) -> None:
        names, spacing, scaling = self.bank.class_names, case["geometry"].spacing, case["scaling"]
        self._tell(case["name"], scaling, case["warnings"])
        pred = case["pred"].numpy()
        if self.scored:
            measured = case_metrics(pred, case["label"].numpy(), names, spacing, self.nsd_tolerance)
        else:
            measured = class_sizes(pred, names, spacing)
        rows = [
            {
                **row,
                "mean_confidence": case["confidence"][row["class"]],
                "support_items": self._support_used(case, row["class"]),
                "unlike_support": is_unlike(case["support_distance"]),
                "seconds": round(case["seconds"], 3),
                "scaling": str(scaling),
                "warnings": " ".join(case["warnings"]),
            }
            for row in measured
        ]
        number, record, arrays = case["number"], {"rows": rows}, None
        if self.scored:
            dice = [row["dice"] for row in rows if not math.isnan(row["dice"])]
            record["score"] = float(np.mean(dice)) if dice else None
        if "pred_path" in case:
            record["output"] = str(Path(case["pred_path"]).relative_to(self.output_dir))
        if self._is_shown(number, record):
            record["shown"], arrays = self._show(case)
        files = case.get("written", ())
        self.results[number] = self.records.save(self.cases[number], case["stamp"], record, files, arrays)

    def _tell(self, name: str, scaling: Scaling, warnings: Sequence[str]) -> None:
        if str(scaling) not in self._told:
            logger.info("%s and images like it, scaling: %s.", name, scaling)
            self._told.add(str(scaling))
        for sentence in warnings:
            logger.warning("%s: %s", name, sentence)

    def _support_used(self, case: dict, value: int) -> str:
        """Items that guided the slices on which the class was found (all, if none), the most used first."""
        if value not in case["support"]:
            return ""
        index = case["support"][value][0]
        found = (case["pred"] == value).flatten(1).any(1)
        counts = Counter((index[found] if found.any() else index).flatten().tolist())
        return "; ".join(self.bank.items[item].id for item, _ in counts.most_common(index.shape[1]))

    def _is_shown(self, number: int, record: dict) -> bool:
        """Whether a case may be in the report: the first ones, or of scored ones the worst and the best so far."""
        if not self.scored or not self.max_figures:
            return number < self.max_figures
        self._ranked = sorted([*self._ranked, _ranking(number, record)])
        if len(self._ranked) <= self.max_figures:
            return True
        dropped = self._ranked.pop((self.max_figures + 1) // 2)[-1]
        self.records.drop_figure(self.cases[dropped])
        return dropped != number

    def _show(self, case: dict) -> tuple[dict, dict[str, np.ndarray]]:
        """What it takes to draw a case, as JSON types and arrays: the slices that are shown, on the case's own grid."""
        pred, truth = case["pred"].numpy(), case["label"].numpy() if self.scored else None
        count = frames_per_case(min(len(self.cases), self.max_figures))
        slices = [int(number) for number in spread_slices(pred, truth, count)]
        main, fit, values = case["main"], case["fit"], [0, *self.bank.class_values]
        pseudo = fit.restore_label(case["pseudo"][None])[0].long().numpy()
        boxes = zip(self.bank.class_values, case["box"][main], strict=True)
        support = [
            {"id": self.bank.items[item].id, "class_name": self.bank.class_names[value], "similarity": similarity}
            for value, (index, similarities) in case["support"].items()
            for item, similarity in zip(index[main].tolist(), similarities[main].tolist(), strict=True)
        ]
        kept = [main, *slices]
        shown = {
            "scaling": asdict(case["scaling"]),
            "slice_axis": case["geometry"].slice_axis,
            "main": main,
            "slices": slices,
            "boxes": [[value, list(fit.restore_box(box.tolist()))] for value, box in boxes if box[0] >= 0],
            "support": support,
        }
        arrays = {"pred": pred[kept], "pseudo": np.asarray(values)[pseudo]}
        return shown, arrays if truth is None else {**arrays, "truth": truth[kept]}

    def _shown(self) -> list[tuple[int, dict[str, np.ndarray]]]:
        """Numbers and arrays of the cases in the report: the first ones, or the worst and the best, the worst first."""
        numbers = [number for number in sorted(self.results) if "shown" in self.results[number]]
        if self.scored:
            numbers = [number for number in numbers if self.records.has_figure(self.cases[number])]
            numbers = [number for *_, number in sorted(_ranking(number, self.results[number]) for number in numbers)]
            best = self.max_figures // 2
            if len(numbers) > self.max_figures:
                numbers = numbers[: self.max_figures - best] + numbers[len(numbers) - best :]
        found = [(n, self.records.figure(self.cases[n], self.results[n])) for n in numbers[: self.max_figures]]
        return [(number, arrays) for number, arrays in found if arrays is not None]

    def _figures(self, shown: list[tuple[int, dict[str, np.ndarray]]]) -> list[CaseFigure]:
        worst = (len(shown) + 1) // 2
        figures = []
        bar = tqdm(shown, desc="Drawing", unit="image", disable=not self.progress)
        for place, (number, arrays) in enumerate(bar):
            section = "Queries"
            if self.scored:
                section = "Worst cases" if place < worst else "Best cases"
            figures.append(self._figure(number, arrays, section))
        best = [figure for figure in figures if figure.section == "Best cases"]
        return [figure for figure in figures if figure.section != "Best cases"] + best[::-1]

    def _figure(self, number: int, arrays: dict[str, np.ndarray], section: str) -> CaseFigure:
        case, shown = self.cases[number], self.results[number]["shown"]
        image = read_image(case["image"], shown["slice_axis"])
        slices = torch.from_numpy(image.slices)
        total, kept = len(slices), [shown["main"], *shown["slices"]]
        scaling = Scaling.of_dict(shown["scaling"])
        settings = self.scale_intensity.ct_window, self.scale_intensity.percentiles
        # A window needs no other slices, and a long CT is gigabytes.
        if scaling.kind == CT:
            slices = scale_intensity(slices[kept], scaling, *settings)
        else:
            slices = scale_intensity(slices, scaling, *settings)[kept]
        picture = to_display(slices[0])
        truth = arrays["truth"][0] if "truth" in arrays else None
        panels = [("Query", picture)]
        if truth is not None:
            panels.append(("Truth", draw_overlay(picture, truth)))
        boxes = {value: tuple(box) for value, box in shown["boxes"]}
        panels.append(("Pseudo-mask and box", draw_overlay(picture, arrays["pseudo"], box=boxes)))
        panels.append(("Segmentation", draw_overlay(picture, arrays["pred"][0], truth=truth)))
        return CaseFigure(
            name=case["name"],
            caption=slice_position(image.geometry, shown["main"]),
            panels=panels,
            metrics=[{key: row[key] for key in row if key in SHOWN_COLUMNS} for row in self._rows_of(number)],
            support=shown["support"],
            frames=frames(image.geometry, shown["slices"], slices[1:], arrays) if total > 1 else [],
            section=section,
            sides=sides_of(image.geometry),
            width_mm=image.geometry.spacing and image.geometry.spacing[2] * image.geometry.shape[2],
        )

    def _thumb(self, identifier: str) -> SupportThumb:
        item = next(item for item in self.bank.items if item.id == identifier)
        return SupportThumb(identifier, draw_overlay(to_display(item.image.float()), item.label.numpy()), identifier)


def _ranking(number: int, record: dict) -> tuple[bool, float, int]:
    """By which scored cases are ordered: the worst first, those without a score last."""
    score = record["score"]
    return score is None, score or 0.0, number


SHOWN_COLUMNS = {
    "class",
    "class_name",
    *METRICS,
    "unit",
    "size",
    "predicted_size",
    "truth_size",
    "size_unit",
    "mean_confidence",
}
