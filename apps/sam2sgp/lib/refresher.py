"""Work that is to be done again after each change, in a thread of its own, however many ask for it meanwhile."""

import logging
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)


class Refresher:
    """Does one thing over and over, as long as somebody asks for it; those who ask while it is done share the next run.

    Args:
        work: what is to be done; what it raises goes to the log.
        name: of the thread.
    """

    def __init__(self, work: Callable[[], object], name: str) -> None:
        self._work = work
        self._name = name
        self._changed = threading.Condition()
        self._asked = self._done = 0
        self._runs = False

    def run(self, wait: float) -> bool:
        """Have the work done from its beginning, and wait for its end for `wait` seconds at most.

        Returns whether it is done.
        """
        with self._changed:
            self._asked += 1
            number = self._asked
            if not self._runs:
                self._runs = True
                threading.Thread(target=self._run, daemon=True, name=self._name).start()
            return self._changed.wait_for(lambda: self._done >= number, wait)

    def _run(self) -> None:
        while True:
            with self._changed:
                number = self._asked
                if number == self._done:
                    self._runs = False
                    return
            try:
                self._work()
            except Exception:
                logger.exception("%s failed", self._name)
            with self._changed:
                self._done = number
                self._changed.notify_all()
