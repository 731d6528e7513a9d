"""How a batch inference gets on: a small JSON file that its process writes and the server reads.

In: what became of each image. Out: numbers, the time left, and the images that failed with their reasons. The file is
replaced in one step, so it can be read at any time; what is left when the process is killed tells how far it came.
"""

import json
import logging
import math
import time
from pathlib import Path
from typing import Any

from lib.processes import mark_of
from sam2sgp.files import write_text

logger = logging.getLogger(__name__)

FILE = "batch.json"
# Told by name; the log has them all.
MOST_FAILURES = 200
SECONDS_BETWEEN_WRITES = 0.5


class BatchReport:
    """The report of one batch, in the process that infers.

    Args:
        path: of the file.
        total: images to segment. skipped: of those that were asked for, how many have a label already.
    """

    def __init__(self, path: Path, total: int, skipped: int) -> None:
        self._path = path
        self._began = time.monotonic()
        self._written = -math.inf
        self.values: dict[str, Any] = {
            **mark_of(),
            "total": total,
            "skipped": skipped,
            "done": 0,
            "failed": 0,
            "failures": [],
            "seconds_left": None,
            "ended": False,
        }
        self._write()

    def done(self) -> None:
        """An image was segmented."""
        self.values["done"] += 1
        self._go_on()

    def failed(self, image: str, reason: str) -> None:
        """An image was not."""
        self.values["failed"] += 1
        if len(self.values["failures"]) < MOST_FAILURES:
            self.values["failures"].append({"image": image, "reason": reason})
        self._go_on()

    def left(self) -> None:
        """An image got a label meanwhile."""
        self.values["skipped"] += 1
        self.values["total"] -= 1
        self._go_on()

    def end(self) -> None:
        """All images were tried."""
        self.values |= {"ended": True, "seconds_left": 0.0}
        self._write()

    def _go_on(self) -> None:
        tried = self.values["done"] + self.values["failed"]
        if tried:
            each = (time.monotonic() - self._began) / tried
            self.values["seconds_left"] = round(each * (self.values["total"] - tried), 1)
        if time.monotonic() - self._written >= SECONDS_BETWEEN_WRITES:
            self._write()

    def _write(self) -> None:
        self._written = time.monotonic()
        try:
            write_text(self._path, json.dumps(self.values), durable=False)
        except OSError as error:
            logger.warning("%s: how the batch gets on can't be told: %s", self._path.name, error)


def last_report(path: Path) -> dict[str, Any]:
    """What was written last, by any process; {} where there was no batch."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
