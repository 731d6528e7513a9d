"""Limits of the server's connections, so that those of one client don't lock the others out.

uvicorn waits for the head of a request forever, and opens as many connections as there are files to be had. With
`limit_connections` it is so:

    no request is being answered for `idle` seconds    closed: heads that don't come or drip, forgotten connections
    what was sent is not taken for `stalled` seconds   closed: clients that don't read
    more than `most`, or `most_per_address`            the one whose last request is longest ago is closed, if it was
                                                       answered; else the one that has kept the server waiting for
                                                       longest, with a body or with taking its answer, if that is more
                                                       than `waited` seconds; where there is none, the new one is

So a flood of connections without requests costs itself its oldest, and whoever sends a request at once is answered.
Requests' bodies have a limit of their own, see `RequestGuard`. Addresses of this machine are taken for a reverse proxy,
which speaks for many clients, and have no limit of their own.

All of it happens on the event loop.
"""

import asyncio
import ipaddress
import logging
import resource
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

logger = logging.getLogger(__name__)

# What the server needs files for besides connections: models, databases, images, processes, the archive.
OTHER_FILES = 512
# Its socket, and a file that is sent, which is opened once to be looked at and once to be read.
FILES_PER_CONNECTION = 3
# Connections that the system may accept before the server hears of them, which it then opens all at once.
BACKLOG = 128
MOST_FILES = 1 << 16


@dataclass(frozen=True)
class ConnectionLimits:
    """How many connections the server keeps, and for how many seconds those that do nothing."""

    most: int = 1000
    most_per_address: int = 200
    idle: float = 20.0
    stalled: float = 60.0
    waited: float = 2.0


def limit_connections(loop: asyncio.AbstractEventLoop, limits: ConnectionLimits) -> "Connections":
    """Put limits on the servers that this event loop starts from now on."""
    spare = BACKLOG + OTHER_FILES
    allowed = _allow_files(limits.most * FILES_PER_CONNECTION + spare) - spare
    most = min(limits.most, allowed // FILES_PER_CONNECTION)
    connections = Connections(loop, limits, max(most, 16))
    create_server = loop.create_server

    async def create_limited_server(factory: Callable[[], asyncio.Protocol], *arguments: Any, **options: Any) -> Any:
        options["backlog"] = min(options.get("backlog", BACKLOG), BACKLOG)
        if options.get("ssl"):
            options["ssl_handshake_timeout"] = limits.idle
        return await create_server(lambda: LimitedProtocol(factory(), connections), *arguments, **options)

    # uvicorn makes its server with what it was started with, before the app is known, and has no place to add to it.
    loop.create_server = create_limited_server  # type: ignore[method-assign, assignment]
    connections.sweep()
    return connections


class Connections:
    """The connections that are open, in the order of their last requests."""

    def __init__(self, loop: asyncio.AbstractEventLoop, limits: ConnectionLimits, most: int) -> None:
        self.loop = loop
        self.limits = limits
        self.most = most
        self._open: dict[LimitedProtocol, None] = {}
        self._per_address: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._open)

    def add(self, connection: "LimitedProtocol") -> None:
        address = connection.address
        if len(self._open) >= self.most:
            self._make_room(connection, self._open, "connections")
        elif address and self._per_address[address] >= self.limits.most_per_address:
            its_own = (other for other in self._open if other.address == address)
            self._make_room(connection, its_own, f"connections of {address}")
        self._open[connection] = None
        self._per_address[address] += 1

    def requested(self, connection: "LimitedProtocol") -> None:
        """A request has come."""
        if connection in self._open:
            del self._open[connection]
            self._open[connection] = None

    def remove(self, connection: "LimitedProtocol") -> None:
        if connection in self._open:
            del self._open[connection]
            self._per_address[connection.address] -= 1
            if not self._per_address[connection.address]:
                del self._per_address[connection.address]

    def sweep(self) -> None:
        """Close what has done nothing for too long, now and from time to time."""
        now = self.loop.time()
        for connection in list(self._open):
            connection.look(now)
            if connection.idle_for(now) > self.limits.idle or connection.stalled_for(now) > self.limits.stalled:
                connection.close()
        self.loop.call_later(min(self.limits.idle, self.limits.stalled) / 8, self.sweep)

    def _make_room(self, newcomer: "LimitedProtocol", others: Iterable["LimitedProtocol"], what: str) -> None:
        others = list(others)
        closed, which = next((other for other in others if other.is_idle), None), "one without a request"
        if closed is None:
            closed, which = max(others, key=lambda other: other.waited_for(self.loop.time())), "one that makes us wait"
            if closed.waited_for(self.loop.time()) <= self.limits.waited:
                closed, which = newcomer, "the new one"
        logger.warning("Too many %s: %s is closed", what, which)
        closed.close()


class LimitedProtocol(asyncio.Protocol):
    """Hands all on to uvicorn's protocol for a connection, and sees what that is doing.

    Attributes:
        address: of the client; "" for this machine.
    """

    def __init__(self, inner: Any, connections: Connections) -> None:
        self._inner = inner
        self._connections = connections
        self._transport: asyncio.Transport | None = None
        self._idle_since: float | None = None
        self._stalled_since: float | None = None
        self._heard_at = 0.0
        self.address = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.address = _address(transport.get_extra_info("peername"))
        self._idle_since = self._heard_at = self._connections.loop.time()
        self._connections.add(self)
        self._inner.connection_made(transport)

    def connection_lost(self, error: Exception | None) -> None:
        self._connections.remove(self)
        self._inner.connection_lost(error)

    def data_received(self, data: bytes) -> None:
        self._heard_at = self._connections.loop.time()
        self._inner.data_received(data)
        if not self.is_idle:
            self._idle_since = None
            self._connections.requested(self)

    def eof_received(self) -> bool | None:
        return self._inner.eof_received()

    def pause_writing(self) -> None:
        self._stalled_since = self._connections.loop.time()
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._stalled_since = None
        self._inner.resume_writing()

    @property
    def is_idle(self) -> bool:
        """Whether no head of a request has come in full, or all that came are answered."""
        cycle = self._inner.cycle
        return cycle is None or cycle.response_complete

    def look(self, now: float) -> None:
        """Note whether it has become idle or busy."""
        if not self.is_idle:
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = now

    def idle_for(self, now: float) -> float:
        return 0.0 if self._idle_since is None else now - self._idle_since

    def stalled_for(self, now: float) -> float:
        return 0.0 if self._stalled_since is None else now - self._stalled_since

    def waited_for(self, now: float) -> float:
        """Seconds for which the client has been expected to send more of a body or to take more of an answer."""
        if self._stalled_since is not None:
            return now - self._stalled_since
        return now - self._heard_at if not self.is_idle and self._inner.cycle.more_body else 0.0

    def close(self) -> None:
        """At once, whatever is still to be sent."""
        self._connections.remove(self)
        if self._transport is not None:
            self._transport.abort()


def _address(peer: Any) -> str:
    try:
        address = ipaddress.ip_address(peer[0])
    except (TypeError, ValueError, IndexError):
        return ""
    return "" if address.is_loopback else str(address)


def _allow_files(wanted: int) -> int:
    """Let this process open as many files, if the system lets it; how many it may open now."""
    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed == resource.RLIM_INFINITY:
        return MOST_FILES
    wanted = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
    if wanted > allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
        logger.info("The server may open %d files, no longer %d", wanted, allowed)
    return max(wanted, allowed)
