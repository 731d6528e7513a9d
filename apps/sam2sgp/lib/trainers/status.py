"""How a training is doing: a small JSON file that its process writes and every other process reads.

The file is replaced in one step. A training whose process has ended without saying so, because it was stopped, killed
or lost its server, reads as "stopped".
"""

import json
import logging
import math
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events

from lib.processes import KEYS, is_running, mark_in, mark_of
from lib.stamps import Stamp, stamp
from sam2sgp.files import write_text

logger = logging.getLogger(__name__)

RUNNING, STOPPED = "running", "stopped"


class Status:
    """The state of the last training.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values: dict[str, Any] = {}
        self._stamp: Stamp | None = None
        self._read: dict[str, Any] = {}

    def start(self, message: str) -> None:
        """Begin again: this process trains from now on."""
        self.values = {
            "state": RUNNING,
            "message": message,
            "start_ts": datetime.now().astimezone().isoformat(timespec="seconds"),
            **mark_of(),
        }
        self._started = time.monotonic()
        self.update()

    def update(self, **values: Any) -> None:
        """Add values and write all; numbers that are not finite are left out, as JSON has none."""
        self.values |= values
        self.values["total_time"] = round(time.monotonic() - self._started, 1)
        finite = {k: v for k, v in self.values.items() if not isinstance(v, float) or math.isfinite(v)}
        write_text(self.path, json.dumps(finite, indent=1))

    def finish(self, state: str, message: str, **values: Any) -> None:
        """The last word: what came of it, in one sentence."""
        logger.info("%s", message)
        self.update(state=state, message=message, **values)

    def read(self) -> dict[str, Any]:
        """What was written last, by any process; {} before the first training. Costs a stat while nothing changes."""
        found = stamp(self.path)
        try:
            if found != self._stamp:
                self._read, self._stamp = json.loads(self.path.read_text(encoding="utf-8")), found
        except (OSError, ValueError):
            return {}
        # The process that trains may know more than it could write.
        written = self.values if self.values and mark_in(self.values) == mark_in(self._read) else self._read
        values = {key: value for key, value in written.items() if key not in KEYS}
        if values.get("state") == RUNNING and not is_running(mark_in(self._read)):
            values["state"] = STOPPED
            values["message"] = "The training was stopped; the weights are as before."
            if "max_epochs" in values:
                values["message"] = (
                    f"The training was stopped after {values['epoch']} of {values['max_epochs']} epochs; the weights "
                    "are as before. Started again with the same labels and options, it goes on from there."
                )
        return values


class StatusHandler:
    """Ignite handler that keeps a `Status` up to date. Attach it to the trainer after its other handlers.

    Args:
        status: what to update.
        validator: the evaluator that runs after epochs.
        metric: name of its key metric.
        part, parts: which one (from 0) of how many trainings of the same length this is; epochs and steps are counted
            over all of them.
        seconds: time between two updates within an epoch.
    """

    def __init__(
        self, status: Status, validator: Engine, metric: str, part: int = 0, parts: int = 1, seconds: float = 2.0
    ) -> None:
        self.status = status
        self.validator = validator
        self.metric = metric
        self.part, self.parts = part, parts
        self.seconds = seconds
        self._last = -math.inf

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self._epoch)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._step)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch)

    def _step(self, engine: Engine) -> None:
        if time.monotonic() - self._last >= self.seconds:
            self._last = time.monotonic()
            self.status.update(**self._progress(engine))

    def _epoch(self, engine: Engine) -> None:
        values, state = self._progress(engine), self.validator.state
        values["epoch"] = epoch = self.part * engine.state.max_epochs + engine.state.epoch
        if state.best_metric_epoch > 0:
            best_epoch = self.part * engine.state.max_epochs + state.best_metric_epoch
            values |= {"best_metric": float(state.best_metric), "best_epoch": best_epoch}
        if self.metric in state.metrics:
            values["metric"] = float(state.metrics[self.metric])
            measured = {"epoch": epoch, "part": self.part, "metric": values["metric"]}
            history = self.status.values.get("history", [])
            if state.epoch == engine.state.epoch and measured not in history:
                values["history"] = [*history, measured]
            logger.info(
                "Epoch %d of %d: loss %.3f, mean Dice %.4f (best %.4f, epoch %d)",
                epoch,
                values["max_epochs"],
                values["loss"],
                values["metric"],
                values["best_metric"],
                values["best_epoch"],
            )
        self.status.update(**values)

    def _progress(self, engine: Engine) -> dict[str, Any]:
        state = engine.state
        steps = state.max_epochs * state.epoch_length
        values = {
            "max_epochs": self.parts * state.max_epochs,
            "step": self.part * steps + state.iteration,
            "steps": self.parts * steps,
        }
        if state.output:
            values["loss"] = float(state.output[0]["loss"])
        return values
