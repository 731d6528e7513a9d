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
        file = settings.get("file") or sys.stderr
        self._in_lines = file is not None and not file.isatty()
        if file is None:
            # So it is in a process without a console.
            settings["disable"] = True
        elif self._in_lines:
            settings |= {"file": _Lines(file), "mininterval": LINE_SECONDS, "maxinterval": 2 * LINE_SECONDS}
        super().__init__(*args, **settings)

    def refresh(self, *args: Any, **settings: Any) -> bool | None:
        """Draw the bar, or write a line of it where the last one was written long enough ago."""
        if self._in_lines and time.monotonic() - self._told < LINE_SECONDS:
            return None
        self._told = time.monotonic()
        return super().refresh(*args, **settings)

    def moveto(self, n: int) -> None:
        """Go to the line of a bar below others, of which lines know nothing."""
        if not self._in_lines:
            super().moveto(n)


class _Lines:
    """Writes what is drawn as a line, which programs that read logs show at once; nothing of what is wiped out."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.encoding = getattr(file, "encoding", None)

    def write(self, text: str) -> None:
        if line := text.strip():
            self._file.write(f"{line}\n")

    def flush(self) -> None:
        self._file.flush()
