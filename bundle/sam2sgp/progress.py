"""Progress bars, which a log file takes too."""

import sys
import time
from typing import Any

from tqdm import tqdm

# Seconds between two lines where the output is no terminal, on which a bar can't be drawn over.
LINE_SECONDS = 30.0


class Bar(tqdm):
    """tqdm's bar, which writes its first and its last line, and one now and then, where it can't be drawn over."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        self._told = -LINE_SECONDS
        self._in_lines = not (settings.get("file") or sys.stderr).isatty()
        if self._in_lines:
            settings |= {"mininterval": LINE_SECONDS, "maxinterval": 2 * LINE_SECONDS}
        super().__init__(*args, **settings)

    def refresh(self, *args: Any, **settings: Any) -> bool | None:
        """Draw the bar, or write a line of it where the last one was written long enough ago."""
        if self._in_lines and time.monotonic() - self._told < LINE_SECONDS:
            return None
        self._told = time.monotonic()
        return super().refresh(*args, **settings)
