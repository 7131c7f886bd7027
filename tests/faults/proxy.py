"""A bad network between services and PostgreSQL: `python -m tests.faults.proxy SOCKET DOORS`, a
process of its own.

It listens on DOORS ports of this machine, and says which. What is to happen at a door is a line on
its input, to which it answers with one on its output (`network.py` does so):

    cut SHARE           end so many of the connections
    refuse SECONDS      and take no new ones
    hold SECONDS        pass nothing on, and close nothing
    swallow SECONDS     take everything and pass nothing on; new connections stay so for ever
    delay SECONDS EACH  pass each piece on so many seconds later
    lead SOCKET         to another server from now on; existing connections stay where they are
    lose SECONDS SHARE  so many COMMITs are passed on, but the connection is cut before the reply
    drop SECONDS SHARE  so many COMMITs are not even passed on
    count               the numbers of connections cut, COMMITs without a reply, and COMMITs dropped
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
from collections import Counter

COMMIT = b"COMMIT;\x00"
CHUNK = 65_536


class Door:
    """One listening port, for the connections of one service."""

    def __init__(self, socket: str, counts: Counter[str]) -> None:
        self._socket = socket
        self._counts = counts
        self._links: set[Link] = set()
        self._refuses_until = self._holds_until = self._takes_commits_until = (
            self._swallows_until
        ) = 0.0
        self._delays_until = self._delay = 0.0
        self._takes = ""
        self._share = 0.0

    async def listen(self) -> int:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    def cut(self, share: float) -> None:
        for link in list(self._links):
            if random.random() < share:
                link.cut()

    def refuse(self, seconds: float) -> None:
        self._refuses_until = _now() + seconds
        self.cut(1.0)

    def hold(self, seconds: float) -> None:
        self._holds_until = _now() + seconds

    def swallow(self, seconds: float) -> None:
        self._swallows_until = _now() + seconds
        for link in self._links:
            link.is_swallowed = True

    def delay(self, seconds: float, each: float) -> None:
        self._delays_until, self._delay = _now() + seconds, each

    def lead(self, socket: str) -> None:
        self._socket = socket

    async def until_passed_on(self) -> None:
        if _now() < self._delays_until:
            await asyncio.sleep(self._delay)

    def take_commits(self, fault: str, seconds: float, share: float) -> None:
        self._takes, self._takes_commits_until, self._share = fault, _now() + seconds, share

    def fate_of_commit(self) -> str:
        """`lose`, `drop`, or nothing."""
        if _now() >= self._takes_commits_until or random.random() >= self._share:
            return ""
        self._counts[self._takes] += 1
        return self._takes

    async def until_open(self) -> None:
        while (seconds := self._holds_until - _now()) > 0:
            await asyncio.sleep(seconds)

    def cut_off(self, link: Link) -> None:
        self._counts["cut"] += 1
        self._links.discard(link)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self.until_open()
        if _now() < self._refuses_until:
            writer.transport.abort()
            return
        try:
            server = await asyncio.open_unix_connection(self._socket)
        except OSError:  # PostgreSQL is down
            writer.transport.abort()
            return
        link = Link(self, (reader, writer), server)
        link.is_swallowed = _now() < self._swallows_until
        self._links.add(link)
        await link.serve()
        self._links.discard(link)


Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Link:
    """One connection: from a service to the server and back."""

    def __init__(self, door: Door, client: Stream, server: Stream) -> None:
        self._door = door
        self._client = client
        self._server = server
        self._loses_reply = False
        self.is_swallowed = False

    async def serve(self) -> None:
        there = asyncio.create_task(self._there())
        back = asyncio.create_task(self._back())
        await asyncio.wait([there, back], return_when=asyncio.FIRST_COMPLETED)
        there.cancel()
        back.cancel()
        await asyncio.wait([there, back])
        self._end()

    def cut(self) -> None:
        self._door.cut_off(self)
        self._end()

    def _end(self) -> None:
        for _, writer in (self._client, self._server):
            writer.transport.abort()

    async def _there(self) -> None:
        with contextlib.suppress(OSError):
            while data := await self._client[0].read(CHUNK):
                await self._door.until_open()
                await self._door.until_passed_on()
                if self.is_swallowed:
                    continue
                fate = self._door.fate_of_commit() if COMMIT in data else ""
                if fate == "drop":
                    self.cut()
                    return
                self._loses_reply = fate == "lose"
                self._server[1].write(data)
                await self._server[1].drain()

    async def _back(self) -> None:
        with contextlib.suppress(OSError):
            while data := await self._server[0].read(CHUNK):
                await self._door.until_open()
                await self._door.until_passed_on()
                if self.is_swallowed:
                    continue
                if self._loses_reply:
                    self.cut()
                    return
                self._client[1].write(data)
                await self._client[1].drain()


def _now() -> float:
    return asyncio.get_running_loop().time()


async def _serve(socket: str, number: int) -> None:
    counts: Counter[str] = Counter()
    doors = [Door(socket, counts) for _ in range(number)]
    print(*[await door.listen() for door in doors], flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        which, command, *values = line.split()
        for door in doors if which == "all" else [doors[int(which)]]:
            if command == "lead":
                door.lead(values[0])
            else:
                _do(door, command, [float(value) for value in values])
        print(*(f"{name}={counts[name]}" for name in ("cut", "lose", "drop")), flush=True)


def _do(door: Door, command: str, values: list[float]) -> None:
    if command in ("lose", "drop"):
        door.take_commits(command, *values)
    elif command != "count":
        getattr(door, command)(*values)


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], int(sys.argv[2])))
