"""A client of the live events, and a server in this process for applications that have been
started.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.auto import AutoHTTPProtocol
from uvicorn.server import ServerState

from batch_system.server.connections import Connections

EVENTS = "/api/v1/events"


class Told(NamedTuple):
    """An event that the client has got. `name`: None for a block that has only an id."""

    id: str | None
    name: str | None
    data: Any

    @property
    def number(self) -> int:
        assert self.id is not None
        return int(self.id.rpartition(".")[2])


class Listener:
    """Reads the events of a stream."""

    def __init__(self, answer: httpx.Response) -> None:
        self.answer = answer
        self.start = Told(None, None, None)
        self._lines = answer.aiter_lines()

    async def next(self, within: float = 10.0) -> Told:
        """The next block that is more than a comment or the time to wait. Raises StopAsyncIteration
        at the end.
        """
        async with asyncio.timeout(within):
            while True:
                fields = await self._block()
                if fields.keys() & {"id", "event"}:
                    data = json.loads(fields["data"]) if "data" in fields else None
                    return Told(fields.get("id"), fields.get("event"), data)

    async def until(self, name: str, within: float = 10.0, **data: Any) -> Told:
        """The next event of this name whose data has these values."""
        async with asyncio.timeout(within):
            while True:
                told = await self.next(within)
                if told.name == name and data.items() <= told.data.items():
                    return told

    async def rest(self, within: float = 10.0) -> list[Told]:
        """The events up to the end of the stream."""
        found: list[Told] = []
        async with asyncio.timeout(within):
            while True:
                try:
                    found.append(await self.next(within))
                except StopAsyncIteration:
                    return found

    async def _block(self) -> dict[str, str]:
        fields: dict[str, str] = {}
        while line := await anext(self._lines):
            name, _, value = line.partition(": ")
            fields[name] = value
        return fields


@asynccontextmanager
async def listening(
    client: httpx.AsyncClient,
    *topics: str,
    last_id: str | None = None,
    below: str = "",
    **headers: str,
) -> AsyncIterator[Listener]:
    """A stream that has begun: what changes from now on is told. With `last_id` nothing was read
    from it yet.
    """
    given = {**headers, **({"Last-Event-ID": last_id} if last_id is not None else {})}
    async with client.stream(
        "GET", below + EVENTS, params={"topic": topics}, headers=given
    ) as answer:
        assert answer.status_code == 200, await answer.aread()
        listener = Listener(answer)
        if last_id is None:
            listener.start = await listener.next()
            assert listener.start.name is None
        yield listener


class Server:
    """A server in this process. `connections`: those that are open now."""

    def __init__(self, app: Starlette, connections: Connections) -> None:
        self.connections = connections
        config = uvicorn.Config(
            app, http=connections.protocol(AutoHTTPProtocol), ws="none", log_config=None
        )
        config.load()
        self._state = ServerState()
        protocol: Any = config.http_protocol_class
        self._make = lambda: protocol(config=config, server_state=self._state, app_state={})

    async def open(self) -> None:
        listening = socket.create_server(("127.0.0.1", 0))
        # The system keeps little for slow clients.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16_384)
        self.port = listening.getsockname()[1]
        self._server = await asyncio.get_running_loop().create_server(self._make, sock=listening)

    async def close(self) -> None:
        self._server.close()
        for connection in [*self.connections._open]:
            connection.transport.abort()
        async with asyncio.timeout(10):
            while self._state.tasks or self.connections._open:
                await asyncio.sleep(0)

    def client(self, secret: str | None = None) -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {secret}"} if secret is not None else {}
        url = f"http://127.0.0.1:{self.port}"
        limits = httpx.Limits(max_connections=200)
        return httpx.AsyncClient(
            base_url=url, headers=headers, timeout=30, trust_env=False, limits=limits
        )

    def slow_client(self, secret: str, topic: str) -> socket.socket:
        """A connection that asks for a stream, and has little room for what it does not read."""
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", self.port))
        ask_for_stream(client, secret, topic)
        return client


def ask_for_stream(client: socket.socket, secret: str, topic: str) -> None:
    head = (
        f"GET {EVENTS}?topic={topic} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer "
        f"{secret}\r\n\r\n"
    )
    client.sendall(head.encode())


def holder_of(client: tuple[str, int], server: tuple[str, int], pids: Iterable[int]) -> int | None:
    """Which of these processes has the server's end of a connection open; None if none has."""
    ends = tuple(f"0100007F:{port:04X}" for _, port in (server, client))
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
    sockets = {f"socket:[{fields[9]}]" for fields in lines if tuple(fields[1:3]) == ends}
    return next((pid for pid in pids if sockets & _opened_by(pid)), None)


def _opened_by(pid: int) -> set[str]:
    found = set()
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.add(os.readlink(file))
    return found
