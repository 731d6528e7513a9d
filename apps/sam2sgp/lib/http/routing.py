"""What the app's routes have in common: the login they ask for, the threads they run in, the names they take.

Handlers are plain functions. They run in the server's threads, so that nobody waits for another's image; those that may
take long have threads of their own, so that a hundred of them leave the others' alone.
"""

import asyncio
import shutil
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Depends, Request, UploadFile
from monailabel.config import settings as server_settings
from monailabel.endpoints.user.auth import RBAC
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from lib.checks import check_id, check_tag, supported_suffix
from lib.priority import give_way

# Where MONAI Label's own login is on, a route asks for one of these as well: for the role there that is nearest to the
# one that the table in `lib.http.access` has for it. Those who approve are annotators there.
LOGIN_USER, LOGIN_ANNOTATOR, LOGIN_ADMIN = (
    Depends(RBAC(role))
    for role in (
        server_settings.MONAI_LABEL_AUTH_ROLE_USER,
        server_settings.MONAI_LABEL_AUTH_ROLE_ANNOTATOR,
        server_settings.MONAI_LABEL_AUTH_ROLE_ADMIN,
    )
)
Id = Annotated[str, Field(max_length=1024), AfterValidator(check_id)]
# Clients send it empty where they have none to give.
OptionalId = Annotated[str, Field(max_length=1024), AfterValidator(lambda value: check_id(value) if value else value)]
Tag = Annotated[str, AfterValidator(check_tag)]
OptionalTag = Annotated[str, Field(max_length=64), AfterValidator(lambda tag: check_tag(tag) if tag else tag)]


class Query(BaseModel):
    """The query of a route; a name that is not declared is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Form(BaseModel):
    """The form of a route; a field that is not declared is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def router() -> APIRouter:
    """Routes that ask for a user's login; those that change something add a role."""
    return APIRouter(dependencies=[LOGIN_USER])


def in_threads(limit: int, last: bool = False) -> Callable:
    """A decorator of handlers, which run in threads of their own, at most `limit` at once of all of them together.

    Further requests wait for their turn.

    Args:
        limit: how many threads.
        last: whether these give way to all others, see `lib.priority`.
    """
    limiter = CapacityLimiter(limit)
    threads = ThreadPoolExecutor(limit, "sam2sgp-last", give_way) if last else None

    async def run_in_one(work: Callable[[], Any]) -> Any:
        if threads is None:
            return await to_thread.run_sync(work, limiter=limiter)
        return await asyncio.get_running_loop().run_in_executor(threads, partial(copy_context().run, work))

    def decorate(function: Callable) -> Callable:
        @wraps(function)
        async def run(**arguments: Any) -> Any:
            return await run_in_one(partial(function, **arguments))

        return run

    return decorate


async def client_gone(request: Request) -> AsyncIterator[threading.Event]:
    """Set when the client of a request goes away before it is answered. Its body must have been read."""
    gone = threading.Event()

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        gone.set()

    watching = asyncio.create_task(watch())
    try:
        yield gone
    finally:
        watching.cancel()


def taken(upload: UploadFile, folder: Path, stem: str) -> Path:
    """An upload as a file in a folder, under a name of the server's with the upload's suffix.

    Raises:
        UnsupportedFile: a name that ends in no supported suffix.
    """
    path = folder / f"{stem}{supported_suffix(upload.filename or '')}"
    with open(path, "wb") as file:
        shutil.copyfileobj(upload.file, file)
    return path
