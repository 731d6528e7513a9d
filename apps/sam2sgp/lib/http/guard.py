"""What stands between clients and the handlers: who may ask from where, and how a request must look as a whole.

In: every HTTP request, before a handler sees it. Out: the request, whole and checked, or an answer of one sentence with
a 4xx status. A request's body is taken in full before a handler runs, up to the limit of uploads, so a handler never
meets half an upload. What a request may say is declared where it is answered: see `lib.http.endpoints` and
`lib.serving.options`. Every answer forbids browsers to load anything from elsewhere and to show it in another site's
frame, and none but the log tells where on the server a file is. The checks keep no state of their own and hold for any
number of requests at once.

Who asks is told by a reverse proxy, or by a token, and what he may do by the settings: see `lib.http.access`. What it
does not do: check passwords and encrypt, which are a reverse proxy's.
"""

import asyncio
import ipaddress
import logging
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import IO
from urllib.parse import parse_qsl, unquote, unquote_to_bytes, urlsplit

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from monailabel.config import settings as server_settings
from starlette.datastructures import Headers, MutableHeaders, UploadFile
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse

from lib.checks import (
    Forbidden,
    RequestError,
    Stalled,
    TooLarge,
    check_file_name,
    supported_suffix,
)
from lib.http.access import Access, current_role, told
from lib.refusals import FAILED, refuse
from lib.server_paths import Folders
from lib.serving.options import parse_object, sentence
from lib.serving.segmenter import Stopped
from lib.stores.audit import Audit, current_user

logger = logging.getLogger(__name__)

# Bytes of an upload that are kept in memory; the rest goes to a temporary file.
KEPT_IN_MEMORY = 1 << 20
# Fields and JSON bodies are parsed in memory: the largest are label_info and point prompts.
LARGEST_TEXT = 1 << 20
MULTIPART = "multipart/form-data"
FORMS = (MULTIPART, "application/x-www-form-urlencoded")
# Routes declare three fields at most, and up to a megabyte of each file is in memory while a form is parsed.
MOST_FIELDS, MOST_FILES = 16, 256
LONGEST_QUERY = 8192
# A body is replayed in pieces of this size; others are answered between two of them.
CHUNK = 1 << 18
# The only field of a form that may come several times: a session's files.
REPEATED = "files"
# An answer may bring its own policy; these are for data, which needs nothing from anywhere.
HEADERS = {
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "referrer-policy": "same-origin",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
# A body may take this many seconds, and one more for as many bytes as the slowest lines carry in that time.
PATIENCE = 60.0
SLOWEST = 16 << 10
SHORTEST_WAIT = 0.1
# Answers in words. The log is plain text, for those who may know the server's folders.
IN_WORDS = ("application/json", "text/html", "multipart/form-data")


def install(app: FastAPI, settings) -> None:
    """Put the checks in front of an app's routes; a second call replaces the first.

    The app's own CORS middleware, which reflects every origin, gives way to one for `settings.cors_origins`, if any.
    May be called when the app has started but answered nothing yet.

    Args:
        app: MONAI Label's FastAPI app.
        settings: the app's; reads `max_upload_mb`, `cors_origins`, `hosts`, `state_dir`, `folders`, and what
            `lib.http.access.Access` does.
    """
    logger.info("%s", told(settings))
    kept = [entry for entry in app.user_middleware if entry.cls not in (CORSMiddleware, RequestGuard)]
    added = [Middleware(RequestGuard, settings=settings)]
    if settings.cors_origins:
        added.insert(
            0,
            Middleware(
                CORSMiddleware,
                allow_origins=list(settings.cors_origins),
                allow_credentials=True,
                allow_methods=["GET", "HEAD", "POST", "PUT", "DELETE"],
                allow_headers=["*"],
            ),
        )
    app.user_middleware = added + kept
    app.add_exception_handler(RequestValidationError, _undeclared)
    # This is for what goes wrong in the middleware itself: Starlette's own answer has none of the headers.
    app.add_exception_handler(Exception, _uncaught)
    # Starlette builds this once, before the app's start.
    app.middleware_stack = app.build_middleware_stack()


def serve_only(app: FastAPI, routers: Sequence[APIRouter]) -> None:
    """Let an app answer these routes and the description of them, and nothing else that it had."""
    app.router.routes = [route for route in app.router.routes if getattr(route, "path", None) == app.openapi_url]
    for router in routers:
        app.include_router(router)


class RequestGuard:
    """ASGI middleware that checks each request, hands on its body whole, and answers where the handler raises."""

    def __init__(self, app, settings):
        self._app = app
        self._settings = settings
        self._limit = int(settings.max_upload_mb * (1 << 20))
        self._hosts = {host.lower() for host in (*settings.hosts, *own_names())}
        self._audit = Audit(settings.state_dir / "audit.jsonl")
        self._access = Access(settings)
        self._folders = Folders((*settings.folders, server_settings.MONAI_LABEL_SESSION_PATH))

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body, begun = None, False
        send = _answering(send, self._folders)

        async def handed_on(message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        user, role = current_user.set(None), current_role.set(current_role.get())
        try:
            try:
                self._check_head(scope)
                self._access.enter(scope["method"], scope["path"], Headers(scope=scope))
                body = await self._take(scope, receive)
                await self._check_body(scope, body)
                self._note(scope)
                await self._app(scope, _replay(body, receive), handed_on)
            except ClientDisconnect:
                return
            except Exception as error:
                if begun:
                    # There is no second answer. The server logs the error and ends the connection.
                    raise
                # The rest of a body that was refused unread isn't waited for.
                response = _refusal(scope, error, {"connection": "close"} if body is None else {})
                await response(scope, receive, send)
        finally:
            current_user.reset(user)
            current_role.reset(role)
            if body is not None:
                body.close()

    def _check_head(self, scope) -> None:
        method, path = scope["method"], scope["path"]
        headers = Headers(scope=scope)
        self._check_host(headers)
        self._check_origin(method, headers)
        _decoded(unquote_to_bytes(scope.get("raw_path", b"")), "path")
        # Proxied addresses are decoded a second time on their way.
        for text in (path, unquote(path)):
            _check_text(text, "path")
            if any(part in ("..", ".") for part in text.replace("\\", "/").split("/")):
                raise RequestError("path: expected one without '.' and '..'; write it out.")
        if len(scope["query_string"]) > LONGEST_QUERY:
            raise TooLarge(f"query: expected at most {LONGEST_QUERY} bytes, found more; send parameters in the body.")
        names = [name for name, _ in _query(scope["query_string"])]
        if len(set(names)) < len(names):
            raise RequestError("query: expected each name once, found one twice; correct the address.")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self._limit:
            raise self._too_large(self._limit)

    def _check_host(self, headers: Headers) -> None:
        """Other sites may give their name to this server's address, and their pages then pass for its own."""
        name = _address(headers.get("host", ""))[0]
        # A number can't be given to another address.
        if name and name not in self._hosts and not _is_number(name):
            raise Forbidden(
                f"host: expected a name of this server, found {ascii(name)[:80]}; start it with "
                "--conf hosts NAME if that is one."
            )

    def _check_origin(self, method: str, headers: Headers) -> None:
        """Other sites' pages may not send requests through the browser of someone who may."""
        origin = headers.get("origin")
        if origin in self._settings.cors_origins:
            return
        if origin is None:
            # Browsers tell in this way where pictures and the like are asked for, also by pages of another port of
            # this machine (`same-site`). Following a link is no request of the page's.
            follows = method == "GET" and headers.get("sec-fetch-mode") == "navigate"
            is_own = headers.get("sec-fetch-site", "none") in ("same-origin", "none") or follows
        else:
            is_own = _is_same(origin, headers.get("x-forwarded-host") or headers.get("host", ""))
        if not is_own:
            raise Forbidden("origin: expected a page of this server, found another; add its origin to cors_origins.")

    async def _take(self, scope, receive) -> tempfile.SpooledTemporaryFile:
        """The body, whole. Raises TooLarge, and ClientDisconnect where the client goes away before its end."""
        limit = self._limit if _media_type(scope) == MULTIPART else min(self._limit, LARGEST_TEXT)
        body = tempfile.SpooledTemporaryFile(KEPT_IN_MEMORY)
        size, more, started = 0, True, time.monotonic()
        try:
            while more:
                left = PATIENCE + size / SLOWEST - (time.monotonic() - started)
                try:
                    # What has come already is taken, also by a server that was busy for long.
                    message = await asyncio.wait_for(receive(), max(left, SHORTEST_WAIT))
                except TimeoutError as error:
                    raise Stalled(f"body: expected its end, found none after {size} bytes; send it again.") from error
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect()
                data = message.get("body", b"")
                size += len(data)
                if size > limit:
                    raise self._too_large(limit)
                body.write(data)
                more = message.get("more_body", False)
        except BaseException:
            body.close()
            raise
        body.seek(0)
        return body

    async def _check_body(self, scope, body) -> None:
        if _media_type(scope) in FORMS:
            await self._check_form(scope, body)
        elif text := body.read().strip():
            parse_object(text, "body")
        body.seek(0)

    async def _check_form(self, scope, body) -> None:
        charset = Headers(scope=scope).get("content-type", "").lower().partition("charset=")[2].strip(" \"';")
        if charset not in ("", "utf-8"):
            raise RequestError(f"body: expected UTF-8, found {ascii(charset)[:80]}; encode the form again.")
        request = Request(scope, _replay(body, None))
        try:
            async with request.form(max_files=MOST_FILES, max_fields=MOST_FIELDS) as form:
                seen = set()
                for key, value in form.multi_items():
                    if key in seen and key != REPEATED:
                        raise RequestError(f"{ascii(key)[:80]}: expected this field once, found it twice; correct it.")
                    seen.add(key)
                    if isinstance(value, UploadFile):
                        self._check_upload(scope["path"], key, value)
                    else:
                        _check_text(value, ascii(key)[:80])
        except RequestError:
            raise
        except Exception as error:
            # The parser raises types of its own, and what its code runs into.
            raise RequestError(
                f"body: expected a whole form of at most {MOST_FIELDS} fields and {MOST_FILES} files, found another "
                "content; send it again, or many files as a ZIP file."
            ) from error

    def _check_upload(self, path: str, key: str, upload: UploadFile) -> None:
        for _, content in upload.headers.raw:
            _decoded(content, f"file name of {key}")
        # MONAI Label's client and 3D Slicer send the whole path on their machine, of which the last part counts.
        *folders, last = (upload.filename or "").replace("\\", "/").split("/")
        if ".." in folders:
            raise RequestError(f"file name of {key}: expected one without '..'; send only the name.")
        name = check_file_name(last, f"file name of {key}")
        # Files of a session may lack a suffix or be packed. What a file holds is looked at where it is taken in.
        if not path.startswith("/session"):
            supported_suffix(name)

    def _note(self, scope) -> None:
        """Note who asks for a training or its end, before it happens: what can't be noted isn't done."""
        action = {"POST": "request training", "DELETE": "stop training"}.get(scope["method"])
        if action and scope["path"].strip("/").partition("/")[0] == "train":
            self._audit.write(action, path=scope["path"])

    def _too_large(self, limit: int) -> TooLarge:
        advice = "send less, or raise max_upload_mb" if limit == self._limit else "send fewer parameters"
        return TooLarge(f"body: expected at most {limit / (1 << 20):g} MB, found more; {advice}.")


def _answering(send, folders: Folders) -> Callable:
    """`send`, with what browsers must know about every answer, and without the server's folders in its words."""
    start = None

    async def answering(message) -> None:
        nonlocal start
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
            if headers.get("content-type", "").partition(";")[0] in IN_WORDS:
                # Its length is known once its text is.
                start = message
                return
        elif start is not None:
            head, start = start, None
            if not message.get("more_body", False):
                message = {**message, "body": folders.left_out(message.get("body", b""))}
                headers = MutableHeaders(scope=head)
                if message["body"]:
                    headers["content-length"] = str(len(message["body"]))
            await send(head)
        await send(message)

    return answering


def _refusal(scope, error: Exception, headers: dict[str, str]) -> JSONResponse:
    """The answer to a request that an error ended. What is the server's own fault is logged here and nowhere else."""
    answer = refuse(error)
    # Nobody waits for a segmentation that was stopped, or the server ends.
    if answer.status_code >= 500 and not isinstance(error, Stopped):
        # Where the error is a sentence for the client, it says all.
        traceback = None if isinstance(error, RequestError) else error
        logger.error("%s %s: %s", scope["method"], ascii(scope["path"]), answer.detail, exc_info=traceback)
    if answer.status_code == 401:
        headers = {**headers, "www-authenticate": "Bearer"}
    return JSONResponse({"detail": answer.detail}, answer.status_code, headers)


async def _uncaught(request: Request, error: Exception) -> JSONResponse:
    # Starlette raises it again, and the server logs it.
    return JSONResponse({"detail": FAILED}, 500, HEADERS)


async def _undeclared(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError), "added for this type"
    return JSONResponse({"detail": sentence(error.errors())}, 422)


def own_names() -> tuple[str, ...]:
    """Names by which browsers on this machine and in its network reach it, as far as the machine knows."""
    name = socket.gethostname()
    return "localhost", name, f"{name.partition('.')[0]}.local"


def _address(text: str, port: int | None = None) -> tuple[str, int | None]:
    """Name, in lower case, and port of `name:port`, or the port given. Raises RequestError for another text."""
    try:
        parts = urlsplit(f"//{text}")
        return (parts.hostname or "").rstrip("."), parts.port or port
    except ValueError:
        raise RequestError("host: expected a name and a port, found another text; correct the address.") from None


def _is_same(origin: str, host: str) -> bool:
    """Whether an origin is the server that a request went to."""
    scheme, _, rest = origin.partition("://")
    port = {"http": 80, "https": 443}.get(scheme)
    # A proxy that ends TLS hands on the name with the port, or only the name where it is the usual one.
    return port is not None and _address(rest, port) == _address(host, port)


def _is_number(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _query(query: bytes) -> list[tuple[str, str]]:
    try:
        pairs = parse_qsl(query.decode("ascii"), keep_blank_values=True, errors="strict")
    except ValueError as error:
        raise RequestError("query: expected percent-encoded UTF-8, found other bytes; correct it.") from error
    for key, value in pairs:
        _check_text(value, ascii(key)[:80])
    return pairs


def _decoded(content: bytes, what: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"{what}: expected UTF-8, found other bytes; correct it.") from error


def _check_text(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        is_text = False
    else:
        is_text = "\0" not in text
    if not is_text:
        raise RequestError(f"{what}: expected text, found bytes that aren't any; correct it.")


def _media_type(scope) -> str:
    """What a request says that its body is, in lower case: by this alone it is limited, and by this it is parsed."""
    return Headers(scope=scope).get("content-type", "").partition(";")[0].strip().lower()


def _replay(body: IO[bytes], receive: Callable | None) -> Callable:
    """An ASGI `receive` that gives a body from its start, then what `receive` gives.

    Parsing a form is work on the event loop, so others get their turn before each piece.
    """
    body.seek(0)
    done = False

    async def replay() -> dict:
        nonlocal done
        if done:
            return await receive() if receive else {"type": "http.disconnect"}
        await asyncio.sleep(0)
        data = body.read(CHUNK)
        done = len(data) < CHUNK
        return {"type": "http.request", "body": data, "more_body": not done}

    return replay
