"""Connections without a request are closed, so that other connections and runs get file
descriptors.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from batch_system.server.connections import MOST_CONNECTIONS, REQUEST_SECONDS, Connections, share_of
from tests.processes import SERVE, environment, service

Client = tuple[asyncio.StreamReader, asyncio.StreamWriter]

OPENING = """
import os
from batch_system import BaseTask, current_run

class Opening(BaseTask):
    name, schedule = "opening", "* * * * * *"

    def run(self) -> None:
        open("begun", "w").close()
        most = 0
        while not current_run().cancelled and not os.path.exists("enough"):
            files = [open(os.devnull) for _ in range(20)]
            most = max(most, len(os.listdir("/proc/self/fd")))
            for file in files:
                file.close()
        with open("opened", "w") as file:
            file.write(f"at most {most}")
"""

ABORTED = b"POST /signin HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n" + (
    b"Content-Type: application/x-www-form-urlencoded\r\n\r\nsecret"
)


@pytest.mark.rest
def test_half_open_connections_leave_files_for_runs_and_for_other_connections(
    tmp_path: Path,
) -> None:
    (tmp_path / "tasks/opening.py").write_text(OPENING)
    command = ["sh", "-c", 'ulimit -n 256 && exec "$@"', "sh", *SERVE]
    with service(tmp_path, command) as running, ExitStack() as stack:
        port = int(running.url.rpartition(":")[2])
        while not (tmp_path / "begun").exists():
            time.sleep(0.01)
        for number in range(400):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
            if number >= 200 and number % 40:
                client.sendall(ABORTED)  # not to its end, and it stays open
            elif number % 2:
                client.sendall(b"GET /healthz HTTP/1.1\r\nHost:")
            elif number % 40 == 0:
                client.sendall(ABORTED)
                client.close()
            if number % 100 == 99:
                began_at = time.monotonic()
                assert running.get("/healthz").status_code == 200
                assert time.monotonic() < began_at + REQUEST_SECONDS / 2, (
                    "a place is free at once, not at a time limit"
                )
        (tmp_path / "enough").touch()
        running.stop()
        assert "more than 64 HTTP connections at a time" in running.stderr
        assert "Too many open files" not in running.stderr
        assert "Traceback" not in running.stderr
        assert re.fullmatch(r"at most \d+", (tmp_path / "opened").read_text()), running.stderr


def limits_after_a_raise(hard: int) -> list[int]:
    """The soft limit and the result of `raise_file_limit`, in a process that began with the limits
    100 and `hard`.
    """
    code = (
        "import resource; from batch_system.server.connections import raise_file_limit; "
        "print(raise_file_limit(), resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    )
    command = [
        "sh",
        "-c",
        f'ulimit -n {hard} && ulimit -S -n 100 && exec "$@"',
        "sh",
        sys.executable,
        "-c",
        code,
    ]
    told = subprocess.run(
        command, env=environment(), capture_output=True, text=True, check=True
    ).stdout
    return [int(number) for number in told.split()]


def test_a_serving_process_raises_its_limit_of_files_to_the_hard_limit() -> None:
    assert limits_after_a_raise(hard=300) == [300, 300]


@pytest.mark.parametrize(
    ("files", "connections"), [(10**9, MOST_CONNECTIONS), (1024, 256), (256, 64), (3, 1)]
)
def test_connections_have_a_quarter_of_the_files(files: int, connections: int) -> None:
    assert share_of(files) == connections


class App:
    """Answers with the length of the body: `/stream` in two halves, `/early` before it has received
    the body.

    `/large` is an answer without end.
    """

    def __init__(self) -> None:
        self.may_end = asyncio.Event()

    async def __call__(
        self, scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]
    ) -> None:
        body, more = b"", scope["path"] != "/early"
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        length = [(b"content-length", b"4")] if scope["path"] != "/large" else []
        await send({"type": "http.response.start", "status": 200, "headers": length})
        while scope["path"] == "/large" and not self.may_end.is_set():
            await send({"type": "http.response.body", "body": b"x" * 100_000, "more_body": True})
            await asyncio.sleep(0)
        if scope["path"] == "/stream":
            await send({"type": "http.response.body", "body": b"so", "more_body": True})
            await self.may_end.wait()
        text = b"me" if scope["path"] == "/stream" else b"%4d" % len(body)
        await send({"type": "http.response.body", "body": text})


class Site:
    """A server of `App` on a port, with a limit of connections."""

    def __init__(self, protocol: type[asyncio.Protocol]) -> None:
        self.app = App()
        self.connections = Connections(limit=4, request_seconds=0.1)
        config = uvicorn.Config(
            self.app, http=self.connections.protocol(protocol), ws="none", log_config=None
        )
        config.load()
        state = ServerState()
        self._make: Any = lambda: config.http_protocol_class(
            config=config, server_state=state, app_state={}
        )

    async def open(self) -> None:
        self._server = await asyncio.get_running_loop().create_server(self._make, "127.0.0.1", 0)
        self._port = self._server.sockets[0].getsockname()[1]
        self._clients: list[Client] = []

    async def close(self) -> None:
        for _, writer in self._clients:
            writer.close()
        self._server.close()
        await until(lambda: not self.connections._open)

    async def client(self, first: bytes = b"") -> Client:
        """A client that the server has accepted, and that has sent these bytes."""
        before = set(self.connections._open)
        client = await self.stranger()
        await until(lambda: self.connections._open != before)
        client[1].write(first)
        return client

    async def stranger(self) -> Client:
        """A client that the server may refuse."""
        client = await asyncio.open_connection("127.0.0.1", self._port)
        self._clients.append(client)
        return client

    async def outlast_the_patience(self) -> None:
        """Wait until a new silent connection has been closed. All earlier timers have run by
        then.
        """
        await ended(await self.client())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0)


async def ended(client: Client) -> bytes:
    """The bytes that the server sent before it closed the connection."""
    async with asyncio.timeout(10):
        try:
            return await client[0].read()
        except ConnectionResetError:
            return b""


async def answer(client: Client) -> bytes:
    async with asyncio.timeout(10):
        head = await client[0].readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head
        return await client[0].readexactly(4)


@pytest.fixture(params=[HttpToolsProtocol, H11Protocol], ids=["httptools", "h11"])
async def site(request: pytest.FixtureRequest) -> AsyncIterator[Site]:
    site = Site(request.param)
    await site.open()
    yield site
    await site.close()


REQUEST = b"GET / HTTP/1.1\r\nHost: here\r\n\r\n"
BODY = b"POST / HTTP/1.1\r\nHost: here\r\nContent-Length: 2\r\n\r\n"


@pytest.mark.parametrize(
    "first", [b"", b"G", REQUEST[:-2]], ids=["nothing", "a byte", "half of the headers"]
)
async def test_a_connection_without_a_first_request_is_closed(site: Site, first: bytes) -> None:
    assert await ended(await site.client(first)) == b""


async def test_single_bytes_do_not_keep_a_connection_open(site: Site) -> None:
    reader, writer = await site.client()
    dripping = asyncio.create_task(drip(writer))
    assert await ended((reader, writer)) == b""
    dripping.cancel()


async def drip(writer: asyncio.StreamWriter) -> None:
    writer.write(b"GET / HTTP/1.1\r\nLong: ")
    while True:
        await asyncio.sleep(0.01)
        writer.write(b"x")


async def test_an_incomplete_further_request_ends_its_connection(site: Site) -> None:
    client = await site.client(REQUEST)
    assert await answer(client) == b"   0"
    client[1].write(REQUEST[:-2])
    assert await ended(client) == b""


@pytest.mark.parametrize("is_dripping", [False, True], ids=["stands still", "drips"])
async def test_a_body_that_does_not_come_to_its_end_ends_its_connection(
    site: Site, is_dripping: bool
) -> None:
    if is_dripping:
        site.connections.body_seconds = 0.1
    else:
        site.connections.body_pause_seconds = 0.1
    reader, writer = await site.client(
        b"POST / HTTP/1.1\r\nHost: here\r\nContent-Length: 1000000\r\n\r\nx"
    )
    dripping = asyncio.create_task(drip(writer)) if is_dripping else None
    assert await ended((reader, writer)) == b""
    if dripping is not None:
        dripping.cancel()


async def test_slow_bodies_streams_and_idle_clients_are_not_closed(site: Site) -> None:
    slow, stream = await site.client(BODY), await site.client(REQUEST.replace(b"/", b"/stream", 1))
    idle = await site.client(REQUEST)
    assert await answer(idle) == b"   0"
    await site.outlast_the_patience()
    slow[1].write(b"x")
    await site.outlast_the_patience()
    slow[1].write(b"x")
    idle[1].write(REQUEST)
    site.app.may_end.set()
    assert [await answer(client) for client in (slow, stream, idle)] == [b"   2", b"some", b"   0"]


async def test_beyond_the_limit_the_longest_idle_connection_is_closed(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    site.connections.request_seconds = 60
    stream = await site.client(REQUEST.replace(b"/", b"/stream", 1))
    await until(lambda: not site.connections._idle)
    half_a_body, silent, kept = (
        await site.client(BODY + b"x"),
        await site.client(),
        await site.client(REQUEST),
    )
    assert await answer(kept) == b"   0"  # it is idle from here on, and the other two were before
    for waiting in (half_a_body, silent, kept):
        newest = await site.client(REQUEST)
        assert await answer(newest) == b"   0"
        assert await ended(waiting) == b""
    site.app.may_end.set()
    assert await answer(stream) == b"some"
    assert caplog.text.count("more than 4 HTTP connections at a time") == 1


async def test_beyond_the_limit_without_an_idle_connection_the_newest_is_closed(site: Site) -> None:
    busy = [await site.client(REQUEST.replace(b"/", b"/stream", 1)) for _ in range(4)]
    await until(lambda: not site.connections._idle)
    assert await ended(await site.stranger()) == b""
    site.app.may_end.set()
    for client in busy:
        assert await answer(client) == b"some"


async def test_a_connection_with_endless_headers_is_closed(site: Site) -> None:
    site.connections.request_seconds = 60
    _, writer = await site.client(b"GET / HTTP/1.1\r\n")
    sent = 0
    with contextlib.suppress(ConnectionError):
        while site.connections._open and sent < 10_000_000:
            writer.write(b"Name: value\r\n" * 100)
            sent += 1300
            await writer.drain()
            await asyncio.sleep(0)
    assert sent < 10_000_000


async def test_the_unread_rest_of_a_body_is_discarded(site: Site) -> None:
    head = b"POST /early HTTP/1.1\r\nHost: here\r\nContent-Length: 200000\r\n\r\n"
    client = await site.client(head)
    assert await answer(client) == b"   0"
    for _ in range(20):
        client[1].write(b"x" * 10_000)
        await client[1].drain()
    client[1].write(REQUEST)
    assert await answer(client) == b"   0"


@pytest.mark.parametrize("protocol", [HttpToolsProtocol, H11Protocol], ids=["httptools", "h11"])
async def test_a_client_that_reads_nothing_of_a_large_answer_is_disconnected(
    protocol: type[asyncio.Protocol],
) -> None:
    site = Site(protocol)
    site.connections.unread_seconds = 0.2
    await site.open()
    client = await site.client(REQUEST.replace(b"/", b"/large", 1))
    client[0]._transport.pause_reading()  # type: ignore[attr-defined]
    await until(lambda: not site.connections._open)
    site.app.may_end.set()
    await site.close()
