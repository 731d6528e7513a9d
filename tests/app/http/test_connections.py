"""Connections that send no request, or don't take its answer, cost themselves and nobody else."""

import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack

import pytest
import uvicorn
from fastapi import FastAPI, Request
from starlette.responses import StreamingResponse

from lib.http import connections as module
from lib.http.connections import ConnectionLimits, Connections, LimitedProtocol, limit_connections

REQUEST = b"GET /quick HTTP/1.1\r\nHost: localhost\r\n\r\n"
LONG = 60.0
SOON = 10.0


@pytest.fixture
def serve(monkeypatch):
    """Starts a server with limits; gives its address and its `Connections`."""
    monkeypatch.setattr(module, "_allow_files", lambda wanted: wanted)
    with ExitStack() as stack:

        def started(**limits):
            app = FastAPI()
            made: list[Connections] = []
            go_on = threading.Event()

            @app.get("/quick")
            def quick():
                return {}

            @app.get("/slow")
            def slow():
                go_on.wait(SOON)
                return {}

            @app.put("/upload")
            async def upload(request: Request):
                return {"size": len(await request.body())}

            @app.get("/large")
            def large():
                return StreamingResponse(bytes(1 << 20) for _ in range(100))

            async def lifespan(scope, receive, send):
                await receive()
                made.append(limit_connections(module.asyncio.get_running_loop(), ConnectionLimits(**limits)))
                await send({"type": "lifespan.startup.complete"})
                await receive()
                await send({"type": "lifespan.shutdown.complete"})

            async def both(scope, receive, send):
                await (lifespan if scope["type"] == "lifespan" else app)(scope, receive, send)

            server = uvicorn.Server(uvicorn.Config(both, port=0, log_level="critical"))
            thread = threading.Thread(target=server.run, daemon=True)
            thread.start()
            while not server.started:
                time.sleep(0.01)

            def stop() -> None:
                go_on.set()
                server.should_exit = server.force_exit = True
                thread.join()

            stack.callback(stop)
            return server.servers[0].sockets[0].getsockname(), made[0], go_on

        yield started


def answered(connection: socket.socket, request: bytes = REQUEST) -> bytes:
    connection.sendall(request)
    return read(connection)


def read(connection: socket.socket) -> bytes:
    """An answer, whose content is `{}`."""
    connection.settimeout(SOON)
    content = b""
    while not content.endswith(b"{}") and (data := connection.recv(4096)):
        content += data
    return content


def is_closed(connection: socket.socket) -> bool:
    connection.settimeout(SOON)
    try:
        while connection.recv(4096):
            pass
        return True
    except ConnectionError:
        return True


def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("head", [b"", b"GET /quick HTTP/1.1\r\nHost: loc", b"\r\n"])
def test_a_head_that_does_not_come_is_not_waited_for(serve, head):
    address, connections, _ = serve(idle=0.2)
    with socket.create_connection(address) as half_open:
        half_open.sendall(head)
        with socket.create_connection(address) as other:
            assert answered(other).startswith(b"HTTP/1.1 200")
        assert is_closed(half_open)
    eventually(lambda: len(connections) == 0)


def test_a_head_that_drips_is_not_waited_for(serve):
    address, *_ = serve(idle=0.2)
    with socket.create_connection(address) as dripping, pytest.raises(ConnectionError):
        for _ in range(200):
            dripping.sendall(b"G")
            time.sleep(0.05)


def test_an_answer_that_takes_its_time_is_waited_for(serve):
    address, _, go_on = serve(idle=0.2)
    with socket.create_connection(address) as connection:
        connection.sendall(REQUEST.replace(b"quick", b"slow"))
        time.sleep(0.5)
        go_on.set()
        assert read(connection).startswith(b"HTTP/1.1 200")
        # And the connection serves on.
        assert answered(connection).startswith(b"HTTP/1.1 200")


def test_a_client_that_does_not_read_is_let_go(serve):
    address, connections, _ = serve(stalled=0.2)
    with socket.create_connection(address) as connection:
        connection.sendall(REQUEST.replace(b"quick", b"large"))
        eventually(lambda: len(connections) == 1)
        eventually(lambda: len(connections) == 0)


def test_half_open_connections_lock_nobody_out(serve, caplog):
    address, connections, _ = serve(most=20, idle=LONG)
    with ExitStack() as stack:
        opened = [stack.enter_context(socket.create_connection(address)) for _ in range(100)]
        for _ in range(3):
            with socket.create_connection(address) as other:
                assert answered(other).startswith(b"HTTP/1.1 200")
        assert len(connections) <= 20
        # The oldest went.
        assert is_closed(opened[0]) and is_closed(opened[79])


def test_those_that_are_being_answered_are_not_closed_for_others(serve):
    address, connections, go_on = serve(most=16, idle=LONG)
    slow = REQUEST.replace(b"quick", b"slow")
    with ExitStack() as stack:
        busy = [stack.enter_context(socket.create_connection(address)) for _ in range(16)]
        for connection in busy:
            connection.sendall(slow)
        eventually(lambda: len(connections) == 16 and not any(entry.is_idle for entry in list(connections._open)))
        with socket.create_connection(address) as late:
            assert is_closed(late)
        go_on.set()
        for connection in busy:
            assert read(connection).startswith(b"HTTP/1.1 200")


class Loop:
    """A loop whose time is told."""

    now = 0.0

    def time(self) -> float:
        return self.now

    def call_later(self, delay, work) -> None:
        pass


class Transport:
    def __init__(self, host: str) -> None:
        self.host = host
        self.aborted = False

    def get_extra_info(self, name: str):
        return self.host, 1

    def abort(self) -> None:
        self.aborted = True


class Inner:
    cycle = None

    def connection_made(self, transport) -> None:
        pass


def connect(connections: Connections, host: str) -> Transport:
    transport = Transport(host)
    LimitedProtocol(Inner(), connections).connection_made(transport)
    return transport


@pytest.mark.parametrize(
    "request_head",
    [b"PUT /upload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nx", REQUEST.replace(b"quick", b"large")],
    ids=["slow bodies", "readers that do not read"],
)
def test_clients_that_make_the_server_wait_lock_nobody_out(serve, request_head):
    address, connections, _ = serve(most=20, idle=LONG, waited=0.3)
    with ExitStack() as stack:
        opened = [stack.enter_context(socket.create_connection(address)) for _ in range(20)]
        for connection in opened:
            connection.sendall(request_head)
        eventually(
            lambda: [c.waited_for(connections.loop.time()) > 0.3 for c in list(connections._open)] == [True] * 20
        )
        for _ in range(3):
            with socket.create_connection(address) as other:
                assert answered(other).startswith(b"HTTP/1.1 200")
        assert 15 <= len(connections) <= 20


def test_one_address_has_a_limit_of_its_own_and_the_proxy_has_none():
    connections = Connections(Loop(), ConnectionLimits(most_per_address=3), most=1000)
    mine = [connect(connections, "10.0.0.1") for _ in range(10)]
    others = [connect(connections, f"10.0.0.{n}") for n in range(2, 50)]
    local = [connect(connections, host) for host in ("127.0.0.1", "::1") for _ in range(50)]
    assert [transport.aborted for transport in mine] == [True] * 7 + [False] * 3
    assert not any(transport.aborted for transport in others + local)


def test_files_are_allowed_up_to_what_the_system_allows(monkeypatch):
    limits = [1024, 4096]
    monkeypatch.setattr(module.resource, "getrlimit", lambda kind: tuple(limits))
    monkeypatch.setattr(module.resource, "setrlimit", lambda kind, pair: limits.__setitem__(slice(None), pair))
    assert module._allow_files(2000) == 2000 and limits == [2000, 4096]
    assert module._allow_files(9000) == 4096 and limits == [4096, 4096]
    assert module._allow_files(100) == 4096 and limits == [4096, 4096]


def test_as_many_connections_are_kept_as_may_be_sent_a_file_each(monkeypatch):
    """Each takes a socket and two open files; 550 downloads at once left none for anything else."""
    limits = [1024, 4096]
    monkeypatch.setattr(module.resource, "getrlimit", lambda kind: tuple(limits))
    monkeypatch.setattr(module.resource, "setrlimit", lambda kind, pair: limits.__setitem__(slice(None), pair))
    loop = module.asyncio.new_event_loop()
    try:
        assert limit_connections(loop, ConnectionLimits(most=1000)).most == 1000
        assert limits[0] >= 3000 + module.OTHER_FILES
        limits[:] = [1024, 1024]
        assert limit_connections(loop, ConnectionLimits(most=1000)).most * 3 <= 1024 - module.OTHER_FILES
    finally:
        loop.close()
