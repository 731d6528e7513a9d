"""What a run of `QueryEvaluator` leaves for people: CSV files and `report.html`.

Rows are written as the run goes on, so that a killed run leaves what it had. Pictures are drawn at the end, from the
case's own file, for the cases that are shown.
"""

import logging
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from ignite.engine import Engine, Events
from tqdm import tqdm

from sam2sgp.data.io import read_image
from sam2sgp.evaluation import METRICS, case_metrics, class_sizes, summarise, write_csv
from sam2sgp.report.html import CaseFigure, Report, SupportThumb, write_report
from sam2sgp.report.overlays import draw_overlay, montage, spread_slices, to_display
from sam2sgp.support.bank import SupportBank
from sam2sgp.transforms.array import is_ct, scale_intensity

logger = logging.getLogger(__name__)

WRITE_EVERY = 20


@dataclass
class _Shown:
    """What is kept of a case until the pictures are drawn: only the slices that are shown, on the case's own grid."""

    case: dict
    score: float
    rows: list[dict]
    slices: list[int]
    main: int
    pred: np.ndarray
    truth: np.ndarray | None
    pseudo: np.ndarray
    box: dict[int, list[float]]
    support: list[dict]


class ResultWriter:
    """Handler that writes the results of an evaluation or inference.

    Scored against labels: `metrics.csv` (a row per case and class), `metrics_summary.csv` and a report of the worst and
    best cases. Else: `summary.csv` and a report of the first queries. A failed case is a row with its error.

    Args:
        output_dir: where the files go.
        bank: the support bank that guided the run.
        title: of the report.
        facts: {name: value} of the run, shown in the report.
        scored: whether the cases are labelled and measured.
        max_figures: cases shown with pictures.
        nsd_tolerance: of the surface Dice, in mm (pixels where the spacing is unknown).
        progress: show a bar.
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
    ) -> None:
        self.output_dir = Path(output_dir)
        self.bank = bank
        self.title = title
        self.facts = facts or {}
        self.max_figures = max_figures
        self.nsd_tolerance = nsd_tolerance
        self.progress = progress
        self.rows: list[dict] = []
        self.errors: list[dict] = []
        self.shown: list[_Shown] = []
        self.scored = scored
        self.bar: tqdm | None = None

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._add)
        engine.add_event_handler(Events.COMPLETED, self._complete)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._fail)

    def finish(self) -> None:
        """End the process with exit code 1 if a case failed; the message says how many and where they are listed."""
        if self.errors:
            raise SystemExit(
                f"error: {len(self.errors)} of {len(self.errors) + self._cases()} images failed, first "
                f"{self.errors[0]['case']}: {self.errors[0]['error']} All are listed in {self._table()}."
            )

    def _start(self, engine: Engine) -> None:
        self.bar = tqdm(
            desc="Segmenting", total=engine.state.epoch_length, unit="image", disable=not self.progress, leave=True
        )

    def _add(self, engine: Engine) -> None:
        if engine.state.output:
            self._add_case(engine.state.output[0])
        else:
            case = engine.state.batch[0]
            error = {"case": case["name"], "source": case["source"], "error": case["error"]}
            self.errors.append(error)
            self.rows.append(error)
        self.bar.update()
        if engine.state.iteration % WRITE_EVERY == 0:
            write_csv(self._table(), self.rows)

    def _fail(self, engine: Engine, error: BaseException) -> None:
        """Whatever ends the run, the rows so far stay."""
        self.bar.close()
        write_csv(self._table(), self.rows)
        raise error

    def _complete(self, engine: Engine) -> None:
        self.bar.close()
        write_csv(self._table(), self.rows)
        summary = []
        if self.scored:
            summary = summarise([row for row in self.rows if "dice" in row])
            write_csv(self.output_dir / "metrics_summary.csv", summary)
            for row in summary:
                logger.info(
                    "%s: Dice %.3f, IoU %.3f, HD95 %.2f, NSD %.3f (%d cases)",
                    row["class_name"],
                    *(row[f"{metric}_mean"] for metric in METRICS),
                    row["dice_n"],
                )
        path = self.output_dir / "report.html"
        support = {entry["id"]: self._thumb(entry["id"]) for shown in self.shown for entry in shown.support}
        write_report(
            path,
            Report(
                title=self.title,
                subtitle=f"{self._cases()} images, {len(self.bank.class_names)} classes, {len(self.bank)} supports",
                meta={name: str(value) for name, value in self.facts.items()},
                classes=self.bank.class_names,
                summary_rows=summary,
                case_rows=self.rows,
                figures=self._figures(),
                support=support,
                errors=self.errors,
            ),
        )
        logger.info("Results: %s, report: %s", self._table(), path)

    def _table(self) -> Path:
        return self.output_dir / ("metrics.csv" if self.scored else "summary.csv")

    def _cases(self) -> int:
        return len({row["case"] for row in self.rows if "error" not in row})

    def _add_case(self, case: dict) -> None:
        names, spacing = self.bank.class_names, case["geometry"].spacing
        pred = case["pred"].numpy()
        if self.scored:
            measured = case_metrics(pred, case["label"].numpy(), names, spacing, self.nsd_tolerance)
        else:
            measured = class_sizes(pred, names, spacing)
        rows = [
            {
                "case": case["name"],
                "source": case["source"],
                **({"output": case["pred_path"]} if "pred_path" in case else {}),
                **row,
                "mean_confidence": case["confidence"][row["class"]],
                "support_items": self._support_used(case, row["class"]),
                "seconds": round(case["seconds"], 3),
            }
            for row in measured
        ]
        self.rows += rows
        dice = [row["dice"] for row in rows if "dice" in row and not math.isnan(row["dice"])]
        self._keep(case, rows, float(np.mean(dice)) if dice else math.nan)

    def _support_used(self, case: dict, value: int) -> str:
        """Items that guided the slices on which the class was found (all, if none), the most used first."""
        if value not in case["support"]:
            return ""
        index = case["support"][value][0]
        found = (case["pred"] == value).flatten(1).any(1)
        counts = Counter((index[found] if found.any() else index).flatten().tolist())
        return "; ".join(self.bank.items[item].id for item, _ in counts.most_common(index.shape[1]))

    def _keep(self, case: dict, rows: list[dict], score: float) -> None:
        """Keep the first cases, or of scored ones the worst and the best."""
        if not self.max_figures:
            return
        self.shown.append(self._show(case, rows, score))
        if len(self.shown) <= self.max_figures:
            return
        if not self.scored:
            self.shown.pop()
            return
        ranked = sorted(self.shown, key=lambda shown: (math.isnan(shown.score), shown.score))
        worst = (self.max_figures + 1) // 2
        self.shown = [*ranked[:worst], *ranked[worst + 1 :]]

    def _show(self, case: dict, rows: list[dict], score: float) -> _Shown:
        pred, truth = case["pred"].numpy(), case["label"].numpy() if self.scored else None
        slices = spread_slices(pred, truth)
        sizes = (pred > 0).reshape(len(pred), -1).sum(1)
        if truth is not None:
            sizes = sizes + (truth > 0).reshape(len(truth), -1).sum(1)
        main = int(sizes.argmax())
        fit, values = case["fit"], [0, *self.bank.class_values]
        pseudo = fit.restore_label(case["pseudo"][main : main + 1])[0].long()
        boxes = dict(zip(self.bank.class_values, case["box"][main], strict=True))
        support = [
            {"id": self.bank.items[item].id, "class_name": self.bank.class_names[value], "similarity": similarity}
            for value, (index, similarities) in case["support"].items()
            for item, similarity in zip(index[main].tolist(), similarities[main].tolist(), strict=True)
        ]
        kept = [main, *slices]
        return _Shown(
            case={key: case[key] for key in ("name", "source", "geometry", "modality", "is_rgb")},
            score=score,
            rows=rows,
            slices=slices,
            main=main,
            pred=pred[kept],
            truth=None if truth is None else truth[kept],
            pseudo=np.asarray(values)[pseudo],
            box={value: fit.restore_box(box.tolist()) for value, box in boxes.items() if box[0] >= 0},
            support=support,
        )

    def _figures(self) -> list[CaseFigure]:
        shown = self.shown
        if self.scored:
            shown = sorted(shown, key=lambda entry: (math.isnan(entry.score), entry.score))
        worst = (len(shown) + 1) // 2
        figures = []
        for place, entry in enumerate(tqdm(shown, desc="Drawing", unit="image", disable=not self.progress)):
            section = "Queries"
            if self.scored:
                section = "Worst cases" if place < worst else "Best cases"
            figures.append(self._figure(entry, section))
        best = [figure for figure in figures if figure.section == "Best cases"]
        return [figure for figure in figures if figure.section != "Best cases"] + best[::-1]

    def _figure(self, entry: _Shown, section: str) -> CaseFigure:
        case = entry.case
        image = read_image(case["source"], case["geometry"].slice_axis)
        slices = torch.from_numpy(image.slices)
        ct = is_ct(slices, case["modality"], image.geometry.is_picture)
        slices = scale_intensity(slices, ct, image.is_rgb)
        picture = to_display(slices[entry.main])
        truth = None if entry.truth is None else entry.truth[0]
        panels = [("Query", picture)]
        if truth is not None:
            panels.append(("Truth", draw_overlay(picture, truth)))
        panels.append(("Pseudo-mask and box", draw_overlay(picture, entry.pseudo, box=entry.box)))
        panels.append(("Segmentation", draw_overlay(picture, entry.pred[0], truth=truth)))
        volume = len(slices) > 1
        return CaseFigure(
            name=case["name"],
            caption=f"Slice {entry.main + 1} of {len(slices)}" if volume else "",
            panels=panels,
            metrics=[{key: row[key] for key in row if key in SHOWN_COLUMNS} for row in entry.rows],
            support=entry.support,
            montage=self._montage(entry, slices) if volume else None,
            section=section,
        )

    @staticmethod
    def _montage(entry: _Shown, slices: torch.Tensor) -> np.ndarray:
        truth = None if entry.truth is None else entry.truth[1:]
        return montage(slices[entry.slices], entry.pred[1:], truth, numbers=entry.slices, total=len(slices))

    def _thumb(self, identifier: str) -> SupportThumb:
        item = next(item for item in self.bank.items if item.id == identifier)
        return SupportThumb(identifier, draw_overlay(to_display(item.image.float()), item.label.numpy()), identifier)


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
