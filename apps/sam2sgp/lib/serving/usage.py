"""How often each support item guided an answer, counted over restarts and over all processes of an app.

In: the items of each answer. Out: counts by item. A count that can't be written is lost with a warning; no answer fails
for it. Any number of threads and processes may count at once.
"""

import logging
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

logger = logging.getLogger(__name__)

BUSY_SECONDS = 5.0
SCHEMA = "CREATE TABLE IF NOT EXISTS used (item TEXT PRIMARY KEY, count INTEGER NOT NULL)"
ADD = "INSERT INTO used VALUES (?, 1) ON CONFLICT (item) DO UPDATE SET count = count + 1"


class Usage:
    """Counts in an SQLite file.

    Args:
        path: of the file; made at the first count.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    def add(self, items: Iterable[str]) -> None:
        """Count one answer for each of the items, by the hashes of their content."""
        rows = [(item,) for item in set(items)]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(self._connect()) as file, file:
                file.execute(SCHEMA)
                file.executemany(ADD, rows)
        except (OSError, sqlite3.Error) as error:
            logger.warning("%s: the use of support items was not counted: %s", self.path, error)

    def counts(self) -> dict[str, int]:
        """Answers by item; items that were never used are missing."""
        if not self.path.exists():
            return {}
        try:
            with closing(self._connect()) as file:
                return dict(file.execute("SELECT item, count FROM used"))
        except sqlite3.Error as error:
            logger.warning("%s: expected counts of use, found %s; delete the file to begin again.", self.path, error)
            return {}

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, timeout=BUSY_SECONDS)
