"""The cases that a report shows with pictures: which, what is kept of them on record, and how they are drawn."""

from collections.abc import Mapping
from dataclasses import asdict

import numpy as np

from sam2sgp.data.io import read_image
from sam2sgp.drawing import draw_overlay, spread_slices, to_display
from sam2sgp.engines.job import SegmentationJob
from sam2sgp.evaluation import METRICS
from sam2sgp.progress import Bar
from sam2sgp.report.html import CaseFigure, SupportThumb
from sam2sgp.report.slices import frames, frames_per_case, nearest, scaled_slices, sides_of, slice_position
from sam2sgp.support.bank import SupportBank
from sam2sgp.transforms import ScaleIntensityByModalityd
from sam2sgp.transforms.scaling import CT, Scaling

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

Arrays = dict[str, np.ndarray]


class CaseFigures:
    """Pictures of some cases of a job: of the first ones, or of scored ones the worst and the best.

    Args:
        job: whose cases are shown.
        bank: the support bank that guided them.
        most: cases shown at most.
        scale_intensity: how pictures are scaled.
        progress: show a bar.
    """

    def __init__(
        self,
        job: SegmentationJob,
        bank: SupportBank,
        most: int,
        scale_intensity: ScaleIntensityByModalityd,
        progress: bool,
    ) -> None:
        self.job = job
        self.bank = bank
        self.most = most
        self.scale_intensity = scale_intensity
        self.progress = progress
        # Ranks of the scored cases of this process that may be shown, see `_ranking`.
        self._ranked: list[tuple[bool, float, int]] = []

    def begin(self) -> None:
        """Take in what is on record of the cases that are done already."""
        records, cases = self.job.records, self.job.cases
        drawn = [number for number in self.job.left if self.job.scored and records.has_figure(cases[number])]
        known = [(number, records.load(cases[number])) for number in drawn]
        self._ranked = [_ranking(number, record) for number, record in known if record is not None]

    def is_wanted(self, number: int, record: Mapping) -> bool:
        """Whether a case may be in the report: the first ones, or of scored ones the worst and the best so far."""
        if not self.job.scored or not self.most:
            return number < self.most
        self._ranked = sorted([*self._ranked, _ranking(number, record)])
        if len(self._ranked) <= self.most:
            return True
        dropped = self._ranked.pop((self.most + 1) // 2)[-1]
        self.job.records.drop_figure(self.job.cases[dropped])
        return dropped != number

    def keep(self, case: dict) -> tuple[dict, Arrays]:
        """What it takes to draw a case, as JSON types and arrays: the slices that are shown, on the case's own grid."""
        pred, truth = case["pred"].numpy(), case["label"].numpy() if self.job.scored else None
        count = frames_per_case(min(len(self.job.cases), self.most))
        slices = [int(number) for number in spread_slices(pred, truth, count)]
        main, letterbox, values = case["main"], case["letterbox"], [0, *self.bank.class_values]
        pseudo = letterbox.restore_label(case["pseudo"][None])[0].long().numpy()
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
            "boxes": [[value, list(letterbox.restore_box(box.tolist()))] for value, box in boxes if box[0] >= 0],
            "support": support,
        }
        arrays = {"pred": pred[kept], "pseudo": np.asarray(values)[pseudo]}
        return shown, arrays if truth is None else {**arrays, "truth": truth[kept]}

    def chosen(self) -> list[tuple[int, Arrays]]:
        """Numbers and arrays of the cases in the report: the first ones, or the worst and the best, the worst first."""
        records, cases, results = self.job.records, self.job.cases, self.job.results
        numbers = [number for number in sorted(results) if "shown" in results[number]]
        if self.job.scored:
            numbers = [number for number in numbers if records.has_figure(cases[number])]
            numbers = [number for *_, number in sorted(_ranking(number, results[number]) for number in numbers)]
            best = self.most // 2
            if len(numbers) > self.most:
                numbers = numbers[: self.most - best] + numbers[len(numbers) - best :]
        found = [(n, records.figure(cases[n], results[n])) for n in numbers[: self.most]]
        return [(number, arrays) for number, arrays in found if arrays is not None]

    def draw(self, shown: list[tuple[int, Arrays]]) -> list[CaseFigure]:
        """Figures of what `chosen` gave."""
        worst = (len(shown) + 1) // 2
        figures = []
        bar = Bar(shown, desc="Drawing", unit="image", disable=not self.progress)
        for rank, (number, arrays) in enumerate(bar):
            section = "Queries"
            if self.job.scored:
                section = "Worst cases" if rank < worst else "Best cases"
            figures.append(self._figure(number, arrays, section))
        best = [figure for figure in figures if figure.section == "Best cases"]
        return [figure for figure in figures if figure.section != "Best cases"] + best[::-1]

    def support(self, shown: list[tuple[int, Arrays]]) -> dict[str, SupportThumb]:
        """The support items that guided what `chosen` gave, by their ids."""
        used = {entry["id"] for number, _ in shown for entry in self.job.results[number]["shown"]["support"]}
        return {identifier: self._thumb(identifier) for identifier in used}

    def _thumb(self, identifier: str) -> SupportThumb:
        item = next(item for item in self.bank.items if item.id == identifier)
        return SupportThumb(identifier, draw_overlay(to_display(item.image.float()), item.label.numpy()), identifier)

    def _figure(self, number: int, arrays: Arrays, section: str) -> CaseFigure:
        case, record = self.job.cases[number], self.job.results[number]
        shown = record["shown"]
        image = read_image(case["image"], shown["slice_axis"])
        total, kept = len(image.slices), [shown["main"], *shown["slices"]]
        scaling = Scaling.of_dict(shown["scaling"])
        slices = scaled_slices(image, scaling, self.scale_intensity, kept)
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
            metrics=[{key: row[key] for key in row if key in SHOWN_COLUMNS} for row in record["rows"]],
            support=shown["support"],
            frames=frames(image.geometry, shown["slices"], slices[1:], arrays) if total > 1 else [],
            start=nearest(shown["slices"], shown["main"]) if total > 1 else 0,
            section=section,
            sides=sides_of(image.geometry),
            window=(*self.scale_intensity.ct_window, "HU") if scaling.kind == CT else None,
            width_mm=image.geometry.spacing and image.geometry.spacing[2] * image.geometry.shape[2],
        )


def _ranking(number: int, record: Mapping) -> tuple[bool, float, int]:
    """The key by which scored cases are ordered: the worst first, those without a score last."""
    score = record["score"]
    return score is None, score or 0.0, number
