"""What the audit log tells: who did what to an image, and how fast people work.

In: the audit log. Out: the last events of an image, and labels per hour of work. The log is read once, and then only
what was added since, so that looking costs nothing however long it gets.
"""

import threading
from collections import defaultdict, deque
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from lib.stores.log_lines import LogLines

# Kept of one image.
MOST_EVENTS = 50
# Actions by which somebody decides about a label.
APPROVE = "approve"
DECISIONS = {APPROVE, "correct", "remove label"}
# Seconds between two decisions of somebody, beyond which it was a pause and not work.
LONGEST_WORK = 600.0
LATEST = 20


@dataclass(frozen=True)
class Work:
    """How fast people work.

    Attributes:
        labels: approvals whose time is known: the same user had decided something at most `LONGEST_WORK` before.
        hours: what they took, pauses left out. latest: labels an hour of the last `LATEST` of them; None without any.
    """

    labels: int
    hours: float
    latest: float | None

    @property
    def per_hour(self) -> float | None:
        """Labels an hour; None where nothing is known."""
        return self.labels / self.hours if self.hours else None


class Trail:
    """Looks at the log whenever it is asked. Any number of threads may ask.

    Args:
        path: of the audit log.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._log = LogLines(path, self._take, self._forget)
        self._forget()

    def events_of(self, image: str) -> list[dict[str, Any]]:
        """What was done to an image, the newest first, at most `MOST_EVENTS`: time, user, action and tag."""
        with self._lock:
            self._log.look()
            found = list(self._events.get(image, ()))
        return [dict(zip(("time", "user", "action", "tag"), event, strict=True)) for event in reversed(found)]

    def work(self) -> Work:
        """How fast people work."""
        with self._lock:
            self._log.look()
            latest = sum(self._latest)
            return Work(self._labels, self._seconds / 3600, 3600 * len(self._latest) / latest if latest else None)

    def _forget(self) -> None:
        self._events: dict[str, deque[tuple]] = defaultdict(lambda: deque(maxlen=MOST_EVENTS))
        # By user: time of the last decision, and seconds of work since the last approval.
        self._decided: dict[str | None, float] = {}
        self._spent: dict[str | None, float] = {}
        self._labels, self._seconds = 0, 0.0
        self._latest: deque[float] = deque(maxlen=LATEST)

    def _take(self, entry: dict[str, Any]) -> None:
        image, action, user = entry.get("image"), entry.get("action"), entry.get("user")
        if not isinstance(image, str):
            return
        self._events[image].append((entry.get("time"), user, action, entry.get("tag")))
        if action in DECISIONS:
            self._count(action, user if isinstance(user, str) else None, _seconds(entry.get("time")))

    def _count(self, action: str, user: str | None, now: float | None) -> None:
        if now is None:
            return
        before = self._decided.get(user)
        self._decided[user] = now
        # A clock that was set back tells nothing.
        if before is None or not 0 <= now - before <= LONGEST_WORK:
            self._spent[user] = 0.0
            return
        spent = self._spent.get(user, 0.0) + now - before
        if action != APPROVE:
            self._spent[user] = spent
            return
        self._labels += 1
        self._seconds += spent
        self._latest.append(spent)
        self._spent[user] = 0.0


def _seconds(time: Any) -> float | None:
    """Since 1970."""
    try:
        return datetime.fromisoformat(time).timestamp()
    except (TypeError, ValueError):
        return None
