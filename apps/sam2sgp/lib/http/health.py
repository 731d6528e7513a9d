"""Whether the server lives and can work, for whoever watches it: systemd, a container, a load balancer, a person.

    GET /sam2sgp/health/live     200: it answers
    GET /sam2sgp/health/ready    200, or 503 with reasons: model loaded, studies, disks, archive

No login is asked for, and nothing is told of images, people, folders or addresses. Neither waits for a segmentation.
What may hang, such as a disk that is no longer there, is looked at in one thread, for which an answer waits two seconds
at most, however many ask.
"""

import os
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from lib.refresher import Refresher

# Bytes that have to be free for labels and logs of a while.
LEAST_FREE = 256 << 20
PATIENCE = 2.0
NOT_CACHED = {"Cache-Control": "no-store"}

# Why something can't do its work; None where it can.
Check = Callable[[], str | None]


class Health:
    """The state of all that a server needs.

    Args:
        checks: by the name under which clients get to know them.
        patience: seconds that an answer waits for the checks that are on.
    """

    def __init__(self, checks: Mapping[str, Check], patience: float = PATIENCE) -> None:
        self._checks = dict(checks)
        self._patience = patience
        self._found: dict[str, str | None] = {}
        self._round = Refresher(self._look, "sam2sgp-health")

    def problems(self) -> dict[str, str | None]:
        """Why each part can't do its work, None where it can."""
        if self._round.run(self._patience):
            return dict(self._found)
        late = f"no answer within {self._patience:g} s"
        return {name: late if name not in self._found else self._found[name] for name in self._checks}

    def _look(self) -> None:
        # What hangs lacks, and so do those behind it.
        self._found = {}
        for name, check in self._checks.items():
            self._found[name] = _problem(check)

    def router(self) -> APIRouter:
        """The routes."""
        made = APIRouter()
        for path, answer in (("/sam2sgp/health/live", self.live), ("/sam2sgp/health/ready", self.ready)):
            made.add_api_route(path, answer, methods=["HEAD"], include_in_schema=False)
            made.add_api_route(path, answer, methods=["GET"])
        return made

    async def live(self) -> JSONResponse:
        # On the event loop: that it answers is what is asked.
        return JSONResponse({"status": "live"}, headers=NOT_CACHED)

    def ready(self) -> JSONResponse:
        problems = self.problems()
        is_ready = not any(problems.values())
        told = {name: problem or "ok" for name, problem in problems.items()}
        answer = {"status": "ready" if is_ready else "not ready", "checks": told}
        return JSONResponse(answer, 200 if is_ready else 503, NOT_CACHED)


def checks_of(segmenter: Any, datastore: Any, settings: Any) -> dict[str, Check]:
    """What the app's server needs.

    Args:
        segmenter: tells whether a network `is_loaded`.
        datastore: of an archive; tells its `state`.
        settings: of the app.
    """
    studies = None if settings.is_remote else Path(settings.studies)

    def model() -> str | None:
        return None if segmenter.is_loaded else "the network is not loaded"

    def archive() -> str | None:
        return archive_problem(datastore.state())

    checks: dict[str, Check] = {"model": model}
    if studies is None:
        checks["archive"] = archive
    else:
        checks["studies"] = lambda: folder_problem(studies)
    folders = [settings.state_dir, *([studies] if studies else [])]
    checks["disk"] = lambda: next(filter(None, map(disk_problem, folders)), None)
    return checks


def folder_problem(folder: Path) -> str | None:
    """Why a folder can't be read."""
    try:
        os.scandir(folder).close()
    except OSError as error:
        return f"the folder can't be read: {error.strerror}"
    return None


def disk_problem(folder: Path, least_free: int = LEAST_FREE) -> str | None:
    """Why nothing more can be kept on the disk of a folder."""
    try:
        disk = os.statvfs(folder)
    except OSError as error:
        return f"can't be looked at: {error.strerror}"
    if disk.f_flag & os.ST_RDONLY:
        return "read-only"
    free = disk.f_bavail * disk.f_frsize
    return f"{free >> 20} MB free, expected {least_free >> 20}" if free < least_free else None


def archive_problem(state: Mapping[str, Any]) -> str | None:
    """Why an archive can't be asked, by what its datastore says of it."""
    if state["reachable"]:
        return None
    since = f" since {datetime.fromisoformat(state['since']):%Y-%m-%d %H:%M:%S} UTC" if state["since"] else ""
    return f"no usable answer{since}; it is asked again every few seconds"


def _problem(check: Check) -> str | None:
    try:
        return check()
    except Exception as error:
        # Its text may name files.
        return f"can't be told: {type(error).__name__}"
