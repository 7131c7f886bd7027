"""Connections to PostgreSQL for SQLAlchemy, by asyncpg: a setting of a transaction is sent together
with its BEGIN.

A machine that was replaced, or a firewall that has forgotten a connection, never says that the
connection is over. Who waits for a reply would wait for ever, so the kernel asks the other machine
from time to time whether it is still there.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import asyncpg

TCP_OPTIONS = {
    "TCP_KEEPIDLE": 10,  # seconds without a word after which the kernel asks,
    "TCP_KEEPINTVL": 5,  # seconds until it asks again,
    "TCP_KEEPCNT": 3,  # and how often it asks in vain: after 25 seconds the connection is over
    # Milliseconds after which it is over if what was sent is not acknowledged
    "TCP_USER_TIMEOUT": 25_000,
}
"""That is less than a lease of 30 seconds, after which other nodes take over. Some systems lack
some of the options.
"""


class Connection(asyncpg.Connection):  # type: ignore[misc]  # asyncpg has no types
    """A connection that notices when the machine of its server is gone, and whose transactions may
    begin with one more
    statement, which takes no round trip of its own.

    Attributes:
        first_statement: What each transaction from now on executes first; None: nothing. It has no
            parameters.
    """

    first_statement: str | None = None

    def __init__(self, protocol: Any, transport: asyncio.Transport, *args: Any) -> None:
        super().__init__(protocol, transport, *args)
        _ask_now_and_then(transport.get_extra_info("socket"))

    async def execute(self, query: str, *args: Any, timeout: float | None = None) -> str:
        # asyncpg's Transaction begins it without arguments.
        if self.first_statement is not None and query.startswith("BEGIN") and not args:
            query = f"{query} {self.first_statement};"
        status: str = await super().execute(query, *args, timeout=timeout)
        return status


def _ask_now_and_then(ours: Any) -> None:
    """Have the kernel ask the machine at the other end of this socket whether it is still there."""
    if ours.family == socket.AF_UNIX:
        return
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in TCP_OPTIONS.items():
        if hasattr(socket, name):
            ours.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
