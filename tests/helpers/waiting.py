"""Work that must not wait for ever, for tests."""

import threading
from collections.abc import Callable
from typing import Any

SECONDS = 20.0


def in_time(work: Callable[[], Any]) -> Any:
    """What `work` returns or raises, unless it waits for ever."""
    told: list[Any] = []

    def run() -> None:
        try:
            told.append((work(), None))
        except Exception as error:
            told.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(SECONDS)
    assert told, "it still waits"
    found, error = told[0]
    if error:
        raise error
    return found
