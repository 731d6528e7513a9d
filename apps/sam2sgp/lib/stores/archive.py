"""Requests to a DICOMweb archive, each of which ends: in time, and with as many bytes as were asked for at most.

In: addresses below the archive's, by UIDs. Out: parsed JSON, files on the disk, or `ArchiveError` with one sentence.

    seconds              a connection   the next byte   the whole answer
    lists, metadata      silence        silence         3 × silence
    a label to store     silence        6 × silence     6 × silence
    series, viewers      silence        silence         30 × silence

The limits of the whole answer hold from the look-up of the name to the last byte, however slowly they drip. Redirects
are followed on the archive's own scheme, host and port only, and never with a label.

`Breaker`: after two requests in a row without an answer the others are refused at once, and one is let through every
few seconds; the first answer lets all through again.

Concurrency: all methods may be called from any thread. Those that aren't coroutines hand their work to one thread with
an event loop of its own. At most `TRANSFERS` are at work and `WAITING` wait; more are refused with 503, lest a silent
archive occupies all threads of the server. `forward` is a coroutine of the server's event loop and needs no thread.
"""

import asyncio
import json
import logging
import os
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, urlencode

import httpx
from python_multipart import MultipartParser
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import parse_options_header

from lib.checks import NotFound, RequestError

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

logger = logging.getLogger(__name__)

T = TypeVar("T")

SILENCE = 20.0
LIST, STORE, BULK = 3, 6, 30
RETRY = 5.0
# In a row: a single one may be this machine's own fault, which was too busy to listen.
FAILURES = 2
TRANSFERS, WAITING, VIEWERS = 16, 32, 64
MOST_REDIRECTS = 3
LARGEST_JSON = 64 << 20
LARGEST_SERIES = 16 << 30
# Objects, lists and values of one answer: `[[],[],` and the like take thirty times their text in memory.
MOST_VALUES = 8_000_000
# Bytes of all pages of a list together, and parts of one message.
LARGEST_LIST, MOST_PARTS = 256 << 20, 50_000
# An archive that pages by one is none; one that has more series is to be filtered.
MOST_PAGES, MOST_SERIES = 2000, 200_000
CHUNK = 1 << 18
# What DICOMweb has addresses for, and what they are made of: some servers take `..;` for `..`.
RESOURCES = ("studies", "series", "instances")
PLACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._,-]*")
DICOM = "application/dicom"
JSON = "application/dicom+json"
BOUNDARY = "sam2sgp-7c1e42f09d5b4a6e"
DOWN = (502, 503, 504)
# An answer in one of these unpacks to a thousand times its size at most.
ENCODINGS = ("identity", "gzip", "deflate")


class ArchiveError(RequestError):
    """The archive gives no answer, or one that can't be used."""

    status = 502


class Unreachable(ArchiveError):
    """The archive gives no answer at all."""


class ArchiveBusy(RequestError):
    """More requests wait for the archive than the server has room for."""

    status = 503


class Breaker:
    """Whether an archive is asked at all.

    Args:
        retry: seconds after which one request is let through again.
        clock: seconds, of any origin.

    Attributes:
        since: when the archive was given up; None while it answers.
    """

    def __init__(self, retry: float = RETRY, clock: Callable[[], float] = time.monotonic) -> None:
        self._retry = retry
        self._clock = clock
        self._lock = threading.Lock()
        self._next = 0.0
        self._why = ""
        self._failures = 0
        self.since: datetime | None = None

    def check(self) -> None:
        """Raises Unreachable at once if the archive did not answer a moment ago."""
        with self._lock:
            if self.since is None:
                return
            now = self._clock()
            if now < self._next:
                raise Unreachable(
                    f"archive: expected an answer, found none since {self.since:%Y-%m-%d %H:%M:%S} UTC ({self._why}); "
                    "it is asked again every few seconds: try again, or see whether it runs."
                )
            self._next = now + self._retry

    def failed(self, why: str) -> None:
        with self._lock:
            self._failures += 1
            if self._failures < FAILURES:
                return
            if self.since is None:
                self.since = datetime.now(UTC)
                logger.warning("The archive does not answer: %s", why)
            self._why = why
            self._next = self._clock() + self._retry

    def answered(self) -> None:
        with self._lock:
            if self.since is not None:
                logger.info("The archive answers again")
            self.since = None
            self._failures = 0


class Archive:
    """A DICOMweb archive.

    Args:
        address: such as `http://127.0.0.1:8042/dicom-web`.
        login: user name and password for it; None for none.
        prefixes: what stands between the address and `studies`, for `qido`, `wado` and `stow`.
        silence: seconds after which an archive that sends nothing is given up; the other limits are multiples.
        largest_json, largest_series: bytes that a list and a series may have.
        breaker: by default one of its own.
    """

    def __init__(
        self,
        address: str,
        login: tuple[str, str] | None = None,
        prefixes: Mapping[str, str | None] | None = None,
        silence: float = SILENCE,
        largest_json: int = LARGEST_JSON,
        largest_series: int = LARGEST_SERIES,
        breaker: Breaker | None = None,
    ) -> None:
        self.address = address.rstrip("/")
        self.breaker = breaker or Breaker()
        self._login = login
        self._prefixes = dict(prefixes or {})
        self._silence = silence
        self._largest_json = largest_json
        self._largest_series = largest_series
        self._origin = _origin(httpx.URL(self.address))
        # Authorities that the system trusts, such as a hospital's own, besides those that httpx brings.
        self._tls = httpx.create_ssl_context()
        self._tls.load_default_certs()
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._client: httpx.AsyncClient | None = None
        self._viewers: httpx.AsyncClient | None = None
        self._places = threading.BoundedSemaphore(TRANSFERS)
        self._queue = threading.BoundedSemaphore(TRANSFERS + WAITING)
        self._ignores_offset = False

    # What a thread may ask for

    def search_series(self, filters: Mapping[str, Any], fields: tuple[str, ...]) -> list[Any]:
        """Series that match, as the archive describes them: DICOM JSON objects, of which none has been looked at.

        The lists are the archive's pulse: they are asked for whatever the breaker says.
        """
        what = "a list of series"
        query = [(key, str(value)) for key, value in filters.items()] + [("includefield", name) for name in fields]
        found: list[Any] = []
        seen: set[str] = set()
        offset, size, end = 0, 0, time.monotonic() + BULK * self._silence
        for _ in range(MOST_PAGES):
            url = f"{self._url('qido')}/series?{urlencode([*query, ('offset', str(offset))])}"
            page = self._json(url, what, anyway=True)
            new = {key: entry for entry in page if (key := json.dumps(entry, sort_keys=True)) not in seen}
            if not new:
                # Whoever knows no `offset` gives the first page over and over again.
                if page and not self._ignores_offset:
                    self._ignores_offset = True
                    logger.warning("The archive ignores `offset`: of more than %d series the others are missed", offset)
                break
            seen |= new.keys()
            found += new.values()
            size += sum(map(len, new))
            if size > LARGEST_LIST:
                raise _too_large(what, LARGEST_LIST)
            offset += len(page)
            if len(found) > MOST_SERIES:
                logger.warning("The archive lists more than %d series; narrow dicomweb_filter", MOST_SERIES)
                return found[:MOST_SERIES]
            if time.monotonic() > end:
                raise ArchiveError(f"archive: expected {what}, found that it takes too long; narrow dicomweb_filter.")
        return found

    def metadata(self, study: str, series: str) -> list[Any]:
        """The headers of a series' instances, DICOM JSON objects."""
        return self._json(f"{self._series_url(study, series)}/metadata", "what a segmentation refers to")

    def fetch_series(self, study: str, series: str, folder: Path) -> list[Path]:
        """The instances of a series as files in a folder, in the order in which they come and just as they come."""
        return self._fetch(self._series_url(study, series), folder, "the files of a series")

    def fetch_instance(self, study: str, series: str, instance: str, folder: Path) -> Path:
        """One instance as a file in a folder. Raises ArchiveError if the archive sends none or several."""
        what = "an approved label"
        files = self._fetch(f"{self._series_url(study, series)}/instances/{quote(instance)}", folder, what)
        if len(files) != 1:
            raise ArchiveError(f"archive: expected {what}, found {len(files)} files; see its log.")
        return files[0]

    def store(self, path: Path) -> None:
        """Store one instance. Raises ArchiveError if the archive doesn't take it."""
        self._run(self._store(path), STORE * self._silence, "to take the label")

    # What the server's event loop may ask for

    async def forward(self, path: str, query: str = "") -> tuple[httpx.Response, AsyncIterator[bytes]]:
        """The archive's answer to a viewer that wants to read, and its content, which is still to come.

        Args:
            path: below the archive's address, such as `studies/1.2.3/series`; before it may stand `qido/` to search or
                `wado/` to fetch.
            query: as it stands behind the question mark.

        Raises NotFound for what isn't part of DICOMweb, ArchiveError, ArchiveBusy.
        """
        service, _, rest = path.partition("/")
        named = service in ("qido", "wado")
        path = rest if named else path
        if not all(PLACE.fullmatch(part) for part in path.removesuffix("/").split("/")):
            raise NotFound(f"proxy: expected an address of DICOMweb, found {ascii(path)[:80]}; correct it.")
        if path.partition("/")[0] not in RESOURCES:
            raise NotFound(f"proxy: expected one of {', '.join(RESOURCES)}, found {ascii(path)[:80]}; correct it.")
        # Viewers search for metadata, which is to be fetched.
        service = "wado" if named and path.endswith("/metadata") else service
        base = self._url(service) if named else self.address
        url = f"{base}/{quote(path, safe='/,;=:')}" + (f"?{query}" if query else "")
        self.breaker.check()
        if self._viewers is None:
            self._viewers = self._new_client(VIEWERS, kept=VIEWERS)
        what, end = "an answer for a viewer", asyncio.get_running_loop().time() + BULK * self._silence
        async with self._telling(what, asyncio.timeout_at(end), counts=False):
            answer = await self._send(self._viewers, "GET", url, headers={"Accept-Encoding": "identity"})
            if answer.status_code >= 500:
                await answer.aclose()
                raise _bad_status(what, answer)

        async def content() -> AsyncIterator[bytes]:
            try:
                async with self._telling(what, asyncio.timeout_at(end), counts=False):
                    async for data in answer.aiter_raw():
                        yield data
                self.breaker.answered()
            finally:
                await answer.aclose()

        return answer, content()

    # How it is done

    def _url(self, service: str) -> str:
        prefix = self._prefixes.get(service)
        return f"{self.address}/{prefix}" if prefix else self.address

    def _series_url(self, study: str, series: str) -> str:
        return f"{self._url('wado')}/studies/{quote(study)}/series/{quote(series)}"

    def _json(self, url: str, what: str, anyway: bool = False) -> list[Any]:
        content = self._run(self._read(url, what), LIST * self._silence, what, anyway)
        if sum(map(content.count, (b"{", b"[", b","))) > MOST_VALUES:
            raise ArchiveError(
                f"archive: expected {what}, found more than {MOST_VALUES} values; narrow dicomweb_filter."
            )
        try:
            found = json.loads(content) if content.strip() else []
        except (ValueError, RecursionError) as error:
            raise ArchiveError(f"archive: expected {what}, found an answer that isn't JSON; see its log.") from error
        found = [found] if isinstance(found, dict) else found
        if not isinstance(found, list):
            raise ArchiveError(f"archive: expected {what}, found JSON of another kind; see its log.")
        return found

    def _fetch(self, url: str, folder: Path, what: str) -> list[Path]:
        return self._run(self._save(url, folder, what), BULK * self._silence, what)

    def _run(self, work: Coroutine[Any, Any, T], seconds: float, what: str, anyway: bool = False) -> T:
        """Do a transfer in the thread for them. `anyway`: whatever the breaker says and whoever waits."""
        if anyway:
            return self._done(work, seconds, what)
        try:
            self.breaker.check()
            if not self._queue.acquire(blocking=False):
                raise ArchiveBusy(f"archive: expected {what}, found too many requests that wait for it; try again.")
        except RequestError:
            work.close()
            raise
        try:
            with self._places:
                try:
                    # It may have been waited for with others that have got no answer.
                    self.breaker.check()
                except RequestError:
                    work.close()
                    raise
                return self._done(work, seconds, what)
        finally:
            self._queue.release()

    def _done(self, work: Coroutine[Any, Any, T], seconds: float, what: str) -> T:
        async def limited() -> T:
            async with self._telling(what, asyncio.timeout(seconds)):
                return await work

        return asyncio.run_coroutine_threadsafe(limited(), self._started()).result()

    def _started(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, daemon=True, name="archive").start()
                self._client = self._new_client(TRANSFERS + 2, kept=0)
            return self._loop

    def _new_client(self, connections: int, kept: int) -> httpx.AsyncClient:
        """`kept`: how many connections stay open for further requests; viewers send thousands."""
        return httpx.AsyncClient(
            auth=self._login,
            verify=self._tls,
            timeout=self._silence,
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=kept),
        )

    @asynccontextmanager
    async def _telling(self, what: str, limit: asyncio.Timeout, counts: bool = True) -> AsyncIterator[None]:
        """Errors on the way to the archive. `counts`: whether the breaker is told of an answer that doesn't come."""
        try:
            async with limit:
                yield
        except httpx.PoolTimeout as error:
            raise ArchiveBusy(
                f"archive: expected {what}, found too many requests that wait for it; try again."
            ) from error
        except (MultipartParseError, httpx.DecodingError) as error:
            raise ArchiveError(f"archive: expected {what}, found a damaged answer ({error}); see its log.") from error
        except (httpx.HTTPError, TimeoutError) as error:
            reason = "too slow" if isinstance(error, TimeoutError) else type(error).__name__
            if counts or isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
                self.breaker.failed(reason)
            raise Unreachable(f"archive: expected {what}, found no answer ({reason}); see whether it runs.") from error
        except httpx.InvalidURL as error:
            raise ArchiveError(f"archive: expected {what}, found a redirect to nowhere; see its settings.") from error

    async def _send(self, client: httpx.AsyncClient, method: str, url: str, **options: Any) -> httpx.Response:
        """An answer whose content is still to come."""
        request = client.build_request(method, url, **options)
        for _ in range(1 + MOST_REDIRECTS):
            answer = await client.send(request, stream=True)
            if answer.status_code in DOWN:
                await answer.aclose()
                raise httpx.RemoteProtocolError(f"HTTP status {answer.status_code}")
            if answer.next_request is None:
                return answer
            await answer.aclose()
            request = answer.next_request
            if method != "GET" or _origin(request.url) != self._origin:
                break
        raise ArchiveError(
            f"archive: expected an answer, found a redirect to {ascii(str(request.url))[:120]}; start the server with "
            "the address that the archive answers at."
        )

    @asynccontextmanager
    async def _asked(self, method: str, url: str, what: str, **options: Any) -> AsyncIterator[httpx.Response]:
        assert self._client is not None, "made with the loop"
        answer = await self._send(self._client, method, url, **options)
        try:
            if answer.is_error:
                self.breaker.answered()
            if answer.status_code in (401, 403):
                raise ArchiveError(
                    f"archive: expected {what}, found that this needs another login (HTTP status "
                    f"{answer.status_code}); correct MONAI_LABEL_DICOMWEB_USERNAME and _PASSWORD."
                )
            if answer.is_error:
                raise _bad_status(what, answer)
            packed = answer.headers.get("content-encoding", "identity")
            if packed.strip().lower() not in ENCODINGS:
                # Packed twice, a piece of it unpacks to a million times its size.
                raise ArchiveError(f"archive: expected {what}, found it packed by {ascii(packed)[:80]}; see its log.")
            yield answer
            # Not at its head: an answer of which the rest doesn't come is none.
            self.breaker.answered()
        finally:
            await answer.aclose()

    async def _read(self, url: str, what: str) -> bytes:
        async with self._asked("GET", url, what, headers={"Accept": f"{JSON}, application/json"}) as answer:
            return await self._content(answer, what)

    async def _content(self, answer: httpx.Response, what: str) -> bytes:
        content = bytearray()
        async for data in answer.aiter_bytes():
            content += data
            if len(content) > self._largest_json:
                raise _too_large(what, self._largest_json)
        return bytes(content)

    async def _save(self, url: str, folder: Path, what: str) -> list[Path]:
        headers = {"Accept": f'multipart/related; type="{DICOM}"'}
        async with self._asked("GET", url, what, headers=headers) as answer:
            with _Files(folder) as files:
                kind, parameters = parse_options_header(answer.headers.get("content-type"))
                boundary = parameters.get(b"boundary")
                write: Callable[[bytes], object]
                if boundary:
                    write = MultipartParser(boundary, files.callbacks()).write
                elif kind == DICOM.encode():
                    # Not what the standard says, but what some archives send for a single instance.
                    files.begin()
                    write = files.write
                else:
                    raise ArchiveError(f"archive: expected {what}, found no DICOM files; see the archive's log.")
                size = 0
                async for data in answer.aiter_bytes(CHUNK):
                    size += len(data)
                    if size > self._largest_series:
                        raise _too_large(what, self._largest_series)
                    write(data)
                return files.finished(what)

    async def _store(self, path: Path) -> None:
        head = f"--{BOUNDARY}\r\nContent-Type: {DICOM}\r\n\r\n".encode()
        tail = f"\r\n--{BOUNDARY}--\r\n".encode()

        async def content() -> AsyncIterator[bytes]:
            yield head
            with open(path, "rb") as file:
                while data := file.read(CHUNK):
                    yield data
            yield tail

        headers = {
            "Content-Type": f'multipart/related; type="{DICOM}"; boundary="{BOUNDARY}"',
            "Content-Length": str(len(head) + os.path.getsize(path) + len(tail)),
            "Accept": JSON,
        }
        options = {"headers": headers, "content": content(), "timeout": httpx.Timeout(STORE * self._silence)}
        what = "to take the label"
        async with self._asked("POST", f"{self._url('stow')}/studies", what, **options) as answer:
            told = await self._content(answer, what)
        # `FailureReason`, which each entry of what could not be stored has, in JSON and in XML.
        if b"00081197" in told:
            raise ArchiveError("archive: expected it to take the label, found that it doesn't; see the archive's log.")


class _Files:
    """Parts of a message as files of a folder, `0.dcm` and so on. They are closed when the block ends."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._paths: list[Path] = []
        self._file: IO[bytes] | None = None
        self._whole = True

    def __enter__(self) -> "_Files":
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()

    def callbacks(self) -> "MultipartCallbacks":
        self._whole = False
        return {
            "on_part_begin": self.begin,
            "on_part_data": lambda data, start, end: self.write(memoryview(data)[start:end]),
            "on_part_end": self._end,
            "on_end": self._mark,
        }

    def begin(self) -> None:
        if len(self._paths) >= MOST_PARTS:
            raise ArchiveError(f"archive: expected at most {MOST_PARTS} files in an answer, found more; see its log.")
        self._paths.append(self._folder / f"{len(self._paths)}.dcm")
        self._file = open(self._paths[-1], "wb")

    def write(self, data: bytes | memoryview) -> None:
        assert self._file is not None, "a part has begun"
        self._file.write(data)

    def _end(self) -> None:
        assert self._file is not None, "a part has begun"
        self._file.close()

    def _mark(self) -> None:
        self._whole = True

    def finished(self, what: str) -> list[Path]:
        if not self._whole:
            raise ArchiveError(f"archive: expected {what}, found their end missing; try again.")
        return self._paths


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port


def _bad_status(what: str, answer: httpx.Response) -> ArchiveError:
    return ArchiveError(f"archive: expected {what}, found HTTP status {answer.status_code}; see the archive's log.")


def _too_large(what: str, limit: int) -> ArchiveError:
    return ArchiveError(f"archive: expected {what} of at most {limit >> 20} MB, found more; see the archive's log.")
