"""The end of the server: asked to stop, it doesn't wait for work that takes minutes.

uvicorn takes no more requests when it is told to stop (SIGTERM, SIGINT) and waits for those that run, however long.
With `end_soon` it is so:

    told to stop                 running requests may finish
    `PATIENCE` seconds later     `ending` is set, by which segmentations stop at their next slice
    `LAST` seconds after that    the process ends, whatever it does; its temporary folder goes at the next start
"""

import logging
import os
import signal
import threading
import time
from functools import partial
from typing import Any

logger = logging.getLogger(__name__)

# Together less than the ten seconds after which containers are killed.
PATIENCE, LAST = 4.0, 4.0


def end_soon(ending: threading.Event, patience: float = PATIENCE, last: float = LAST) -> None:
    """Have this process end soon after it is told to stop. To be called in the main thread, when uvicorn runs."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, partial(_told, signal.getsignal(number), ending, patience, last))


def _told(before: Any, ending: threading.Event, patience: float, last: float, number: int, frame: Any) -> None:
    threading.Thread(target=_end, args=(ending, patience, last), daemon=True, name="sam2sgp-end").start()
    if callable(before):
        before(number, frame)


def _end(ending: threading.Event, patience: float, last: float) -> None:
    time.sleep(patience)
    ending.set()
    time.sleep(last)
    logger.warning("Work that goes on is given up: the server ends")
    os._exit(1)
