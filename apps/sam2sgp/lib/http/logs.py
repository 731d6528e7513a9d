"""The server's log: `<state_dir>/logs/server.log`, for the eyes of the user that runs it.

MONAI Label writes one log for all servers of an app's folder, `<app>/logs/app.log`, which everybody on the machine may
read, and sends it to whoever reaches the port. Here each server has its own, which only its user may read (mode 0600);
it is rotated at 10 MB, and ten old ones are kept. `GET /logs/` gives its end to administrators where MONAI Label is set
up to ask for a login, else to this machine only: it tells of folders, of images and of who did what.

What clients can cause at will in the event loop and in uvicorn is written a few times a minute.
"""

import ipaddress
import logging
import os
import time
from collections import deque
from collections.abc import Callable
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Annotated, cast

import fastapi
from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse
from monailabel.config import settings as server_settings
from pydantic import Field

from lib.checks import Forbidden, NotFound
from lib.http.routing import LOGIN_ADMIN, Query, router

MODE = 0o600
MOST_BYTES, KEPT = 10 << 20, 10
MOST_LINES = 5000
# One place in the code writes so many lines in so many seconds at most.
LINES, SECONDS = 10, 60.0
BUSY_LOGGERS = ("asyncio", "uvicorn.error", "lib.http.connections")
# They write a line at INFO for every request to the archive.
CHATTY_LOGGERS = ("httpx", "httpcore")


class PrivateLog(RotatingFileHandler):
    """A rotating log that nobody but its user may read."""

    def _open(self) -> TextIOWrapper:
        def opener(path: str, flags: int) -> int:
            file = os.open(path, flags, MODE)
            os.fchmod(file, MODE)
            return file

        return cast(TextIOWrapper, open(self.baseFilename, self.mode, encoding=self.encoding, opener=opener))


class Seldom(logging.Filter):
    """Lets a few lines of each place in the code through, and then says how many it kept back.

    Args:
        lines: of a place in so many seconds.
        seconds: see `lines`.
        clock: seconds, of any origin.
    """

    def __init__(
        self, lines: int = LINES, seconds: float = SECONDS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__()
        self._lines = lines
        self._seconds = seconds
        self._clock = clock
        self._places: dict[tuple[str, int], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        now = self._clock()
        place = record.pathname, record.lineno
        since, count = self._places.get(place, (now, 0))
        kept_back = 0
        if now - since >= self._seconds:
            since, count, kept_back = now, 0, max(count - self._lines, 0)
        self._places[place] = since, count + 1
        if kept_back:
            record.msg = f"{record.getMessage()} (and {kept_back} more like this before)"
            record.args = ()
        return count < self._lines


class LogQuery(Query):
    """How many lines. The others are of no effect: MONAI Label's clients send them for its own log page."""

    lines: Annotated[int, Field(ge=1, le=MOST_LINES)] = 300
    html: bool = False
    text: bool = True
    refresh: int = 0


def keep_logs(folder: Path, app_dir: Path) -> Path:
    """Write this process's log to a folder from now on, in place of MONAI Label's file in the app's folder.

    Returns the file. Where it can't be written the lines go to the console only, with a warning.
    """
    path = folder / "server.log"
    writable = _is_writable(path)
    shared = os.path.realpath(app_dir / "logs" / "app.log")
    made: dict[logging.Handler, PrivateLog | None] = {}
    for name in (None, *logging.root.manager.loggerDict):
        owner = logging.getLogger(name)
        for handler in list(owner.handlers):
            if isinstance(handler, logging.FileHandler) and os.path.realpath(handler.baseFilename) == shared:
                if handler not in made:
                    made[handler] = _in_place_of(handler, path) if writable else None
                owner.removeHandler(handler)
                if own := made[handler]:
                    owner.addHandler(own)
                handler.close()
    if made:
        # The lines since this start stand on the console too; the log of an older version is not for everybody either.
        try:
            os.chmod(shared, MODE)
        except OSError:
            logging.getLogger(__name__).warning("%s can't be closed to other users; do it or delete it", shared)
    for name in BUSY_LOGGERS:
        logging.getLogger(name).addFilter(Seldom())
    return path


def quiet_libraries() -> None:
    """Write only the warnings of libraries that say every step they take."""
    for name in CHATTY_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)


def log_routes(path: Path) -> APIRouter:
    """`GET /logs/`, in place of MONAI Label's: the last `lines` of the log as plain text.

    Behind a reverse proxy a client's address is what the proxy says (`X-Forwarded-For`).
    """
    made = router()

    @made.get("/logs/", dependencies=[LOGIN_ADMIN])
    def logs(request: Request, query: Annotated[LogQuery, fastapi.Query()]) -> PlainTextResponse:
        if not server_settings.MONAI_LABEL_AUTH_ENABLE and not _is_here(request):
            raise Forbidden(
                "logs: expected a client on the server's own machine, found another; there, read logs/server.log in "
                "the state folder."
            )
        if not path.is_file():
            raise NotFound("logs: expected the server's log, found none; look at its output.")
        with open(path, encoding="utf-8", errors="replace") as file:
            return PlainTextResponse("".join(deque(file, query.lines)), headers={"Cache-Control": "no-store"})

    return made


def _is_here(request: Request) -> bool:
    try:
        return ipaddress.ip_address(request.client.host if request.client else "").is_loopback
    except ValueError:
        return False


def _is_writable(path: Path) -> bool:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, MODE))
    except OSError as error:
        logging.getLogger(__name__).warning(
            "%s: expected to write the log, found %s; it goes to the console only", path, error.strerror
        )
        return False
    return True


def _in_place_of(handler: logging.Handler, path: Path) -> PrivateLog:
    made = PrivateLog(path, maxBytes=MOST_BYTES, backupCount=KEPT, encoding="utf-8")
    made.setLevel(handler.level)
    made.setFormatter(handler.formatter)
    for entry in handler.filters:
        made.addFilter(entry)
    return made
