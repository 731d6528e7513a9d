"""What tells a process from all others, so that what it left in a file is known to be its.

In: the number of a process. Out: a mark, `pid` and `pid_started`: another one may get the number later, but not with
the same seconds between the machine's own start and its. These are no time of day, which somebody may set.
"""

from collections.abc import Mapping
from typing import Any

import psutil

KEYS = ("pid", "pid_started")


def mark_of(pid: int | None = None) -> dict[str, Any]:
    """The mark of a process, by default of this one; {} where there is none."""
    try:
        process = psutil.Process(pid)
        return {"pid": process.pid, "pid_started": round(process.create_time() - psutil.boot_time(), 2)}
    except (psutil.Error, TypeError, ValueError):
        return {}


def mark_in(written: Mapping[str, Any]) -> dict[str, Any]:
    """The mark among other values; {} for none."""
    return {key: written[key] for key in KEYS if key in written}


def is_running(mark: Mapping[str, Any]) -> bool:
    """Whether a process runs; one that has ended may be listed until somebody collects it, in a container for ever."""
    if not mark or mark_of(mark.get("pid")) != mark:
        return False
    try:
        return psutil.Process(mark["pid"]).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
