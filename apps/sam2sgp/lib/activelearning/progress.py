"""How the loop gets on: how good predictions are as labels come, measured in the background and kept.

    approved label ─ wake ─┬─ Dice with the prediction that was shown (`shown`) ─┬─ progress.jsonl ─ told
    support set grew 10 % ─┴─ Dice of its images, each left out (`left_out`) ────┘

Each figure is measured once, when its label or its number of labels is new, by one thread that lets everybody else go
first: it takes the network when nobody else wants it, for one image at a time, and steps back from that where somebody
does. Between two figures it takes in approved labels, so that the next request pays nothing for them. It ends with the
server, and goes on with the next one.

Concurrency: `wake` and `told` may be called from any thread.
"""

import logging
import statistics
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lib.activelearning.enough import interval_of, verdict_of
from lib.activelearning.shown import dice_of, mean_of, pair_of
from lib.priority import give_way
from lib.serving.left_out import dice_left_out
from lib.serving.segmenter import ServerSegmenter, Stopped
from lib.stores.archive import ArchiveBusy, ArchiveError
from lib.stores.audit import Audit, content_hash
from lib.stores.decisions import FINAL, Decisions
from lib.stores.image_identity import claim_in
from lib.stores.log_lines import LogLines
from lib.stores.records import UNCHANGED, origin_of, time_of
from lib.stores.trail import LATEST, Trail
from sam2sgp.errors import Sam2SgpError
from sam2sgp.files import sha256_of

logger = logging.getLogger(__name__)

SHOWN, LEFT_OUT = "shown", "left out"
# A figure of the support set is made when it has grown, or shrunk, by this share; of so many images at most.
GROWTH = 0.1
MOST_MEASURED = 64
# Points of a curve that are told.
MOST_POINTS = 100
# Seconds after which work that stepped back is tried again; and between two looks for labels and weights that came
# unannounced, such as files that were copied in.
AGAIN, EVERY = 1.0, 60.0


@dataclass(frozen=True)
class _Point:
    """A figure that is being made: of which cases, with which weights."""

    cases: tuple[Mapping[str, Any], ...]
    labels: int
    weights: str


class Progress:
    """Measures in a thread of its own, once it is started.

    Args:
        datastore: images and labels.
        segmenter: network and support set.
        path: of the log of figures, made when first needed; its lines are those of the audit log's form.
        trail: tells how fast people work.
    """

    def __init__(self, datastore: Decisions, segmenter: ServerSegmenter, path: Path, trail: Trail) -> None:
        self.datastore = datastore
        self.segmenter = segmenter
        self.trail = trail
        self._log = Audit(path)
        self._lines = LogLines(path, self._take, self._forget)
        self._lock = threading.Lock()
        self._due = threading.Event()
        self._hashes: dict[str, str] = {}
        # By image with an approved label: what tells that label from others, and the line about it, {} for none.
        self._current: dict[str, tuple[tuple, dict[str, Any]]] = {}
        # Images of the point that is being measured: how many are done, of how many.
        self._measured: tuple[int, int] | None = None
        self._forget()

    # The thread

    def start(self) -> threading.Thread:
        """Have a thread of its own measure whatever is to be measured, until the server ends."""
        self.wake()
        thread = threading.Thread(target=self._run, daemon=True, name="sam2sgp-progress")
        thread.start()
        return thread

    def wake(self) -> None:
        """Labels have come or gone."""
        self._due.set()

    def _run(self) -> None:
        give_way()
        trouble = ""
        while not self.segmenter.ending.is_set():
            self._due.wait(EVERY)
            self._due.clear()
            try:
                if not self.work():
                    time.sleep(AGAIN)
                    self._due.set()
                trouble = ""
            except Exception as error:
                # The request that needs the support set tells its client.
                if str(error) != trouble:
                    is_known = isinstance(error, Sam2SgpError)
                    logger.warning("Progress is not measured: %s", error, exc_info=not is_known)
                trouble = str(error)

    def work(self) -> bool:
        """Measure what is to be measured. Returns whether all is done; otherwise it stepped back."""
        if not self.segmenter.catch_up():
            return False
        self.compare()
        return self.leave_out()

    # Dice of what was shown

    def compare(self) -> None:
        """Compare each newly approved label with the prediction that was shown."""
        records = self.datastore.records()
        with self._lock:
            self._lines.look()
            current = self._current
        found: dict[str, tuple[tuple, dict[str, Any]]] = {}
        for image, tags in records.items():
            if FINAL in tags:
                mark = _mark(tags[FINAL])
                known = current.get(image)
                line = known[1] if known and known[0] == mark else self._compared(image, tags)
                if line is not None:
                    found[image] = mark, line
                if self.segmenter.ending.is_set():
                    return
        with self._lock:
            self._current = found

    def _compared(self, image: str, tags: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
        """The line about an approved label; {} where it can't be compared with anything, None where not now."""
        content = claim_in(tags[FINAL]).get("content")
        # Another image may have had this id before.
        lines = {label: line for label, line in self._shown.get(image, {}).items() if line.get("content") == content}
        before = next((line["label"] for line in reversed(lines.values()) if line.get("unchanged")), None)
        try:
            # The prediction of a label that was measured may be another one by now.
            if lines and (known := lines.get(content_hash(self.datastore.path_of_label(image, FINAL)))):
                return known
            pair = pair_of(self.datastore, image, tags, before)
            if pair is None:
                return {}
            label = content_hash(pair.label)
            dice = dice_of(pair, Path(self.datastore.get_image_uri(image)))
        except (ArchiveError, ArchiveBusy):
            # The next request that needs it tells its client.
            return None
        except (Sam2SgpError, OSError) as error:
            logger.warning("Not compared with its prediction: image %s: %s", image, error)
            return {}
        self._log.write(
            SHOWN,
            image=image,
            content=content,
            label=label,
            approved=time_of(tags[FINAL]),
            unchanged=pair.unchanged,
            dice=mean_of(dice),
            classes=dice,
        )
        with self._lock:
            self._lines.look()
            return self._shown.get(image, {}).get(label, {})

    # Dice of images left out

    def leave_out(self) -> bool:
        """Segment the images of the support set, each guided by the others, if it has grown since it was last done.

        Returns:
            Whether nothing is left to do; otherwise it stepped back or the support set changed meanwhile.
        """
        point = self._next_point()
        if point is None:
            return True
        dice: list[float] = []
        names = self.segmenter.state().class_names
        by_class: dict[int, list[float]] = {value: [] for value in names}
        failed = 0
        try:
            for number, case in enumerate(point.cases):
                self._measured = number, len(point.cases)
                try:
                    found = self._left_out(point, case)
                except Stopped:
                    return False
                # Out of memory is a RuntimeError: one image must not keep the others from being measured.
                except (Sam2SgpError, OSError, RuntimeError) as error:
                    logger.warning("Not measured: image %s: %s", case["name"], error)
                    failed += 1
                    continue
                for value, of_class in found.items():
                    by_class.setdefault(value, []).append(of_class)
                mean = mean_of(found)
                dice += [] if mean is None else [mean]
        finally:
            self._measured = None
        self._write_point(point, dice, {names.get(v, str(v)): values for v, values in by_class.items()}, failed)
        return True

    def _next_point(self) -> _Point | None:
        with self.segmenter.lock.last():
            version, cases = self.segmenter.version, self._cases()
        if len({case["patient"] for case in cases}) < 2:
            return None
        if version.name not in self._hashes:
            self._hashes[version.name] = sha256_of(version.path)
        with self._lock:
            self._lines.look()
            last = self._points[-1] if self._points else None
        if last and last["sha256"] == self._hashes[version.name] and not _has_grown(last["labels"], len(cases)):
            return None
        places = np.linspace(0, len(cases) - 1, min(len(cases), MOST_MEASURED)).round().astype(int)
        return _Point(tuple(cases[place] for place in places), len(cases), version.name)

    def _cases(self) -> list[Mapping[str, Any]]:
        """The cases of the support set that can be used; the lock is held."""
        bank = self.segmenter.bank
        bad = {error["name"] for error in bank.errors}
        return [case for case in bank.data if case["name"] not in bad]

    def _left_out(self, point: _Point, case: Mapping[str, Any]) -> dict[int, float]:
        """Dice of a case by class, tried again where somebody else wanted the network. Raises Stopped for good."""
        while True:
            if self._due.is_set():
                # Who has approved a label sees its figure soon. What else is new is taken in below.
                self._due.clear()
                self.compare()
            try:
                with self.segmenter.stepping_back() as step:
                    self.segmenter.take_in()
                    is_same = self.segmenter.version.name == point.weights
                    if not is_same or _has_grown(point.labels, len(self._cases())):
                        raise _Outdated
                    return dice_left_out(self.segmenter, case, step)
            except _Outdated:
                raise
            except Stopped:
                if self.segmenter.ending.is_set():
                    raise

    def _write_point(self, point: _Point, dice: list[float], by_class: Mapping[str, list[float]], failed: int) -> None:
        low, high = interval_of(dice) if dice else (None, None)
        self._log.write(
            LEFT_OUT,
            labels=point.labels,
            images=len(dice),
            failed=failed,
            dice=statistics.mean(dice) if dice else None,
            low=low,
            high=high,
            classes={name: statistics.mean(values) for name, values in by_class.items() if values},
            weights=point.weights,
            sha256=self._hashes[point.weights],
        )

    # What is told

    def told(self) -> dict[str, Any]:
        """All of it, as plain JSON; nothing is measured for it."""
        records = self.datastore.records()
        with self._lock:
            self._lines.look()
            points, current = list(self._points), self._current
        finals = {image: tags[FINAL] for image, tags in records.items() if FINAL in tags}
        compared = [
            line
            for image, (mark, line) in current.items()
            if line.get("dice") is not None and image in finals and _mark(finals[image]) == mark
        ]
        dice = [line["dice"] for line in sorted(compared, key=lambda line: (line["approved"], line["time"]))]
        work = self.trail.work()
        verdict = verdict_of(dice)
        adaptation = self.segmenter.state().adaptation
        return {
            "labels": len(finals),
            "shown": _curve(dice),
            "left_out": [point for point in points if point["dice"] is not None][-MOST_POINTS:],
            "measured": self._measured,
            "unchanged": _unchanged(finals.values()),
            "per_hour": work.per_hour,
            "per_hour_latest": work.latest,
            "hours": work.hours,
            "verdict": verdict.kind,
            "enough": verdict.text,
            "adaptation": adaptation and adaptation.told(),
        }

    # Lines of the log

    def _forget(self) -> None:
        # By image, by the label's hash, in the order in which they were approved.
        self._shown: dict[str, dict[str, dict[str, Any]]] = {}
        self._points: list[dict[str, Any]] = []

    def _take(self, entry: dict[str, Any]) -> None:
        if entry.get("action") == SHOWN and {"image", "label", "approved"} <= entry.keys():
            self._shown.setdefault(entry["image"], {})[entry["label"]] = entry
        elif entry.get("action") == LEFT_OUT:
            kept = ("time", "labels", "images", "failed", "dice", "low", "high", "classes", "weights", "sha256")
            self._points.append({key: entry.get(key) for key in kept})


class _Outdated(Stopped):
    """The support set has grown by as much as makes a figure of its own worth while, or other weights serve."""


def _has_grown(before: int, now: int) -> bool:
    return abs(now - before) >= max(1.0, GROWTH * before)


def _mark(record: Mapping[str, Any]) -> tuple:
    """What tells an approved label from the one that takes its place."""
    return record.get("ts"), record.get("segmentation"), str(claim_in(record)), str(record.get("corrected"))


def _curve(dice: list[float]) -> list[dict[str, Any]]:
    """Dice in the order of approval, of several labels together where there are many: `first`, `last`, `dice`."""
    size = -(-len(dice) // MOST_POINTS) or 1
    parts = [(start, dice[start : start + size]) for start in range(0, len(dice), size)]
    return [{"first": start + 1, "last": start + len(part), "dice": statistics.mean(part)} for start, part in parts]


def _unchanged(finals: Any) -> dict[str, int]:
    """How many predictions were approved unchanged, `of` so many, and of the `latest`."""
    origins = [(time_of(record), origin_of(record)) for record in finals]
    known = [origin for _, origin in sorted((entry for entry in origins if entry[1]), key=lambda entry: entry[0])]
    latest = known[-LATEST:]
    return {
        "all": known.count(UNCHANGED),
        "of": len(known),
        "latest": latest.count(UNCHANGED),
        "of_latest": len(latest),
    }
