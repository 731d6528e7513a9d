"""What a run of `QueryEvaluator` leaves for people: CSV files and `report.html`.

Each finished case goes on record with its rows and, for some, what is needed to draw it; tables and report are made
from the records. Which cases are segmented at all, and how the run ends, is the `SegmentationJob`'s business.
"""

import logging
import math
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ignite.engine import Engine, Events

from sam2sgp import distributed
from sam2sgp.data.tree import Skipped
from sam2sgp.engines.evaluator import QueryEvents
from sam2sgp.engines.figures import CaseFigures
from sam2sgp.engines.job import SegmentationJob
from sam2sgp.evaluation import METRICS, case_metrics, class_sizes, summarise, write_csv
from sam2sgp.files import remove_parts
from sam2sgp.progress import Bar
from sam2sgp.report.colour_tables import write_colour_tables
from sam2sgp.report.html import Report, write_report
from sam2sgp.report.run_info import run_info_of
from sam2sgp.support.bank import SupportBank
from sam2sgp.support.familiarity import is_unlike
from sam2sgp.support.pieces import PIECE_PATIENTS
from sam2sgp.transforms import ScaleIntensityByModalityd
from sam2sgp.transforms.scaling import Scaling

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
# Seconds between two writings of the table during a run.
TABLE_SECONDS = 10.0


class ResultWriter:
    """Handler that writes the results of an evaluation or inference.

    Scored against labels: `metrics.csv` (a row per case and class), `metrics_summary.csv` and a report of the worst and
    best cases. Else: `summary.csv` and a report of the first queries. A failed case is a row with its error; the next
    run tries it again.

    Args:
        job: whose results are written; it is attached with the writer.
        bank: the support bank that guided the run.
        title: of the report.
        run_info: {name: value} of the run, shown in the report.
        max_figures: cases shown with pictures.
        nsd_tolerance: of the surface Dice, in mm (pixels where the spacing is unknown).
        progress: show a bar.
        scale_intensity: how the report's pictures are scaled; None: as by default.
        skipped: files that were found and are not used, see `sam2sgp.data.load_datalist`.

    Raises:
        DataError: a table can't be written.
    """

    def __init__(
        self,
        job: SegmentationJob,
        bank: SupportBank,
        title: str,
        run_info: dict[str, str] | None = None,
        max_figures: int = 12,
        nsd_tolerance: float = 2.0,
        progress: bool = True,
        scale_intensity: ScaleIntensityByModalityd | None = None,
        skipped: Sequence[Skipped] = (),
    ) -> None:
        self.job = job
        self.bank = bank
        self.title = title
        self.run_info = run_info or {}
        self.nsd_tolerance = nsd_tolerance
        self.progress = progress
        self.figures = CaseFigures(job, bank, max_figures, scale_intensity or ScaleIntensityByModalityd(), progress)
        self.skipped = list(skipped)
        # Nothing is shown before a run starts.
        self.bar = Bar(disable=True)
        self._written = 0.0
        # Scalings and what is missing, each told once.
        self._told: set[str] = set()

    @property
    def rows(self) -> list[dict]:
        """The rows of the table so far, in the order of the cases; at last the files that are not used."""
        rows = [row for number in sorted(self.job.results) for row in self._rows_of(number)]
        return rows + [{"case": file.path.name, "source": str(file.path), "skipped": file.why} for file in self.skipped]

    @property
    def errors(self) -> list[dict]:
        """The rows of the cases that failed."""
        return [row for row in self.rows if "error" in row]

    def attach(self, engine: Engine) -> None:
        self.job.attach(engine, 0 if self.job.scored else self.figures.most, (self.nsd_tolerance,))
        engine.add_event_handler(QueryEvents.RUN_PREPARED, self._prepare)
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(QueryEvents.SLICES_DONE, self._show_share)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._add)
        engine.add_event_handler(Events.COMPLETED, self._complete)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._fail)

    def _prepare(self, engine: Engine) -> None:
        """The table of what is done already, once the job has chosen its cases."""
        self.figures.begin()
        self._write_table()

    def _rows_of(self, number: int) -> list[dict]:
        """The rows of a case; names and paths are the present ones, which may not be those of the record."""
        case, record = self.job.cases[number], self.job.results[number]
        known = {"case": case["name"], "source": str(case["image"])}
        if "error" in record:
            return [{**known, "error": record["error"]}]
        if "output" in record:
            known["output"] = str(self.job.output_dir / record["output"])
        return [known | row for row in record["rows"]]

    def _start(self, engine: Engine) -> None:
        self.bar = Bar(
            desc="Segmenting", total=engine.state.epoch_length, unit="image", disable=not self.progress, leave=True
        )

    def _show_share(self, engine: Engine) -> None:
        case = engine.state.batch[0]
        if len(case["image"]) > 1:
            self.bar.set_postfix_str(f"{case['name']}: {engine.share_done:.0%}")

    def _add(self, engine: Engine) -> None:
        number = engine.state.batch[0]["number"]
        if engine.state.output:
            self._add_case(engine.state.output[0])
        else:
            self.job.add_error(number, engine.state.batch[0]["error"])
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
            write_csv(self.job.table, self.rows, SCORED_COLUMNS if self.job.scored else COLUMNS)
        self._written = time.monotonic()

    def _complete(self, engine: Engine) -> None:
        self.bar.close()
        if distributed.rank():
            return
        self.job.wait_for_others()
        self._write_table()
        rows, errors = self.rows, self.errors
        self._tell_doubts(rows)
        if self.job.scored and engine.exclude_own_patient and engine.inferer.settings.one_piece:
            self._tell_pieces()
        summary = self._summary(rows) if self.job.scored else []
        if not self.job.scored:
            write_colour_tables(self.job.output_dir, self.bank.class_names)
        path = self.job.output_dir / "report.html"
        shown = self.figures.chosen()
        write_report(
            path,
            Report(
                title=self.title,
                subtitle=f"Images: {self._count()}, classes: {len(self.bank.class_names)}, "
                f"support items: {len(self.bank)}",
                meta=run_info_of(self.run_info),
                classes=self.bank.class_names,
                summary_rows=summary,
                case_rows=[row for row in rows if "skipped" not in row],
                figures=self.figures.draw(shown),
                support=self.figures.support(shown),
                errors=errors,
                support_warnings=self.bank.warnings,
                warnings=list({row["case"]: row for row in rows if row.get("warnings")}.values()),
                skipped=[row for row in rows if "skipped" in row],
            ),
        )
        # All cases are done, so nobody is writing any more.
        written = {name for record in self.job.results.values() for name in record.get("files", {})}
        remove_parts(self.job.output_dir, written)
        if self.job.kept:
            logger.info("Results: %s, report: %s", self.job.table, path)

    def _tell_doubts(self, rows: list[dict]) -> None:
        """Warn of images whose results should be checked first."""
        doubted = [row for row in rows if row.get("maybe_absent")]
        if doubted:
            logger.warning(
                "In %d of %d images there is less sign of what was found than in any support image (%s), so it may not "
                "be there; check them first (%s).",
                len({row["case"] for row in doubted}),
                self._count(),
                ", ".join(sorted({row["class_name"] for row in doubted})),
                self._where("maybe_absent", doubted),
            )
        unlike = [row for row in rows if row.get("unlike_support")]
        if unlike:
            logger.warning(
                "%d of %d images are unlike every image of the support set, so check them first (%s); label images "
                "like them.",
                len({row["case"] for row in unlike}),
                self._count(),
                self._where("unlike_support", unlike),
            )

    def _where(self, column: str, rows: list[dict]) -> str:
        """Where the images of some rows are named: in a column of the table; here, if nobody can read the table."""
        return f"`{column}` in {self.job.table}" if self.job.kept else ", ".join(sorted({row["case"] for row in rows}))

    def _tell_pieces(self) -> None:
        """Warn of classes that `segment` keeps in one piece, but this run did not, without the own patient's labels.

        The reason is always that too few patients are left: fewer volumes can't show a class in more parts.
        """
        left_out = {(case.get("patient"), case.get("group")) for case in self.job.cases}
        with_all = {group: set(self.bank.one_piece(None, group)) for _, group in left_out}
        lost = {
            value for own, group in left_out for value in with_all[group].difference(self.bank.one_piece(own, group))
        }
        if lost:
            logger.warning(
                "Measured without keeping %s in one piece: without an image's own patient, volumes of fewer than %d "
                "patients are left to show that it is. An image of a new patient gets only its largest part.",
                ", ".join(self.bank.class_names[value] for value in sorted(lost)),
                PIECE_PATIENTS,
            )

    def _summary(self, rows: list[dict]) -> list[dict]:
        """Means of the scored cases by class, which are written and told."""
        summary = summarise([row for row in rows if "dice" in row])
        write_csv(self.job.output_dir / "metrics_summary.csv", summary)
        for row in summary:
            logger.info(
                "%s: Dice %.3f, IoU %.3f, HD95 %.2f %s, NSD %.3f (%d cases)",
                row["class_name"],
                *(row[f"{metric}_mean"] for metric in ("dice", "iou", "hd95")),
                row["unit"],
                row["nsd_mean"],
                row["dice_n"],
            )
        return summary

    def _count(self) -> int:
        return sum("error" not in record for record in self.job.results.values())

    def _add_case(self, case: dict) -> None:
        names, spacing, scaling = self.bank.class_names, case["geometry"].spacing, case["scaling"]
        self._tell(case["name"], scaling, case["warnings"])
        pred = case["pred"].numpy()
        if self.job.scored:
            measured = case_metrics(pred, case["label"].numpy(), names, spacing, self.nsd_tolerance)
        else:
            measured = class_sizes(pred, names, spacing)
        rows = [
            {
                **row,
                "mean_confidence": case["confidence"][row["class"]],
                "support_items": self._support_used(case, row["class"]),
                "unlike_support": is_unlike(case["support_distance"]),
                "maybe_absent": row["class"] in case["maybe_absent"],
                "seconds": round(case["seconds"], 3),
                "scaling": str(scaling),
                "warnings": " ".join(case["warnings"]),
            }
            for row in measured
        ]
        number, arrays = case["number"], None
        record: dict[str, object] = {"rows": rows}
        if self.job.scored:
            dice = [row["dice"] for row in rows if not math.isnan(row["dice"])]
            record["score"] = float(np.mean(dice)) if dice else None
        if "pred_path" in case:
            record["output"] = str(Path(case["pred_path"]).relative_to(self.job.output_dir))
        if self.figures.is_wanted(number, record):
            record["shown"], arrays = self.figures.keep(case)
        files = case.get("written", ())
        self.job.add(number, case["stamp"], record, files, arrays)

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
