"""Work that is done in a thread of its own, again whenever it is asked for, however many ask for it meanwhile."""

import logging
import threading
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)


class Refresher:
    """Does one thing whenever somebody asks for it, one run at a time; whoever can share a run does.

    Args:
        work: what is to be done; what it raises goes to the log.
        name: of the thread.
    """

    def __init__(self, work: Callable[[], object], name: str) -> None:
        self._work = work
        self._name = name
        self._changed = threading.Condition()
        # Numbers of runs.
        self._wanted = self._begun = self._ended = 0
        self._began_at = 0.0

    def run(self, wait: float, since: float | None = None) -> bool:
        """Have the work done, and wait for its end.

        Args:
            wait: seconds to wait at most; counted from the beginning of the run that is on, so that nobody waits for
                work that takes longer than that already.
            since: the run that is on is shared if it began at this time (`time.monotonic`) or later; by default it is
                done again after that one, from its beginning.

        Returns:
            Whether it is done.
        """
        with self._changed:
            is_on = self._begun > self._ended
            is_shared = is_on and since is not None and self._began_at >= since
            number = self._begun if is_shared else self._begun + 1
            self._wanted = max(self._wanted, number)
            if not is_on:
                threading.Thread(target=self._run, daemon=True, name=self._name).start()
                self._begin()
            left = self._began_at + wait - time.monotonic()
            return self._changed.wait_for(lambda: self._ended >= number, max(left, 0.0))

    def _begin(self) -> None:
        self._begun += 1
        self._began_at = time.monotonic()

    def _run(self) -> None:
        is_on = True
        while is_on:
            try:
                self._work()
            except Exception:
                logger.exception("%s failed", self._name)
            with self._changed:
                self._ended = self._begun
                is_on = self._wanted > self._ended
                if is_on:
                    self._begin()
                self._changed.notify_all()
