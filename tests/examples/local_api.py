"""A real HTTP server on this event loop, which answers what a test tells it to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager


class LocalAPI:
    """Gives its `answers`, each a status and data for JSON, in turn; the last one again and again.

    `meanwhile` is awaited before each answer.
    """

    def __init__(
        self, *answers: tuple[int, object], meanwhile: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        self.requests: list[str] = []
        self._answers = list(answers)
        self._meanwhile = meanwhile

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        """Its URL."""
        async with await asyncio.start_server(self._answer, "127.0.0.1", 0) as server:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/users"

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.requests.append(head.splitlines()[0])
        if self._meanwhile is not None:
            await self._meanwhile()
        status, data = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        body = json.dumps(data).encode()
        writer.write(
            f"HTTP/1.1 {status} -\r\nContent-Length: {len(body)}\r\nConnection: "
            "close\r\n\r\n".encode()
            + body
        )
        await writer.drain()
        writer.close()
        await writer.wait_closed()
