"""Frames: JSON objects of limited size on a socket between two processes, each after its length in
four bytes.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from batch_system.concurrency.offload import offload

LARGEST = 16_000_000
"""The largest size of a frame in bytes."""
LARGE = 100_000
"""Larger frames are parsed in a thread, so that the event loop does not wait."""

_LENGTH = struct.Struct("!I")


class BrokenFrame(ValueError):
    """The received bytes are not a frame, or the frame is larger than LARGEST."""


def encoded(message: dict[str, Any]) -> bytes:
    """The message as a frame. Raises BrokenFrame if it is larger than LARGEST."""
    return framed(json.dumps(message, default=str).encode())


def framed(body: bytes) -> bytes:
    """JSON with its length before it. Raises BrokenFrame if it is larger than LARGEST."""
    if len(body) > LARGEST:
        raise BrokenFrame(f"a message of {len(body):,} bytes; allowed: up to {LARGEST:,}")
    return _LENGTH.pack(len(body)) + body


def parsed(body: bytes) -> dict[str, Any]:
    """The message of a frame without its length. Raises BrokenFrame."""
    try:
        message = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BrokenFrame(f"a message that is not JSON: {error}") from None
    if not isinstance(message, dict):
        raise BrokenFrame("a message that is not an object")
    return message


class Frames:
    """Cuts received bytes into messages, without a thread or an event loop."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, received: bytes) -> list[dict[str, Any]]:
        """The messages that are complete now. Raises BrokenFrame."""
        self._bytes += received
        messages = []
        while len(self._bytes) >= _LENGTH.size:
            end = _LENGTH.size + _length_in(bytes(self._bytes[: _LENGTH.size]))
            if len(self._bytes) < end:
                break
            messages.append(parsed(bytes(self._bytes[_LENGTH.size : end])))
            del self._bytes[:end]
        return messages


def receive(connection: socket.socket) -> dict[str, Any] | None:
    """Wait for the next message in this thread; None at the end. Raises BrokenFrame and OSError."""
    length = _receive_exactly(connection, _LENGTH.size)
    body = _receive_exactly(connection, _length_in(length)) if length else None
    return parsed(body) if body is not None else None


class _ReadToTheEnd(asyncio.StreamReaderProtocol):
    """Makes everything readable that came before a connection was reset.

    The kernel resets it if the other process ends without having read everything. StreamReader
    would then raise an error, and lose the data it has already received.
    """

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(None)


@asynccontextmanager
async def reader_of(connection: socket.socket) -> AsyncIterator[asyncio.StreamReader]:
    """A reader for `read`. The connection is closed at the end of the block."""
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_unix_connection(lambda: _ReadToTheEnd(reader), sock=connection)
    try:
        yield reader
    finally:
        transport.close()


async def read(reader: asyncio.StreamReader) -> dict[str, Any] | None:
    """The next message; None at the end. Raises BrokenFrame and OSError."""
    try:
        body = await reader.readexactly(_length_in(await reader.readexactly(_LENGTH.size)))
    except asyncio.IncompleteReadError:
        return None
    return await offload(parsed, body) if len(body) > LARGE else parsed(body)


def _length_in(header: bytes) -> int:
    length: int = _LENGTH.unpack(header)[0]
    if length > LARGEST:
        raise BrokenFrame(f"a message of {length:,} bytes; allowed: up to {LARGEST:,}")
    return length


def _receive_exactly(connection: socket.socket, size: int) -> bytes | None:
    received = bytearray()
    while len(received) < size:
        part = connection.recv(min(size - len(received), 1_000_000))
        if not part:
            return None
        received += part
    return bytes(received)
