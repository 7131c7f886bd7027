"""Connections to PostgreSQL for SQLAlchemy, by asyncpg. A setting of a transaction is sent together
with its BEGIN.

If a machine was replaced, or a firewall has forgotten a connection, nothing reports that the
connection has ended, and a wait for a reply would never end. So the kernel checks from time to time
whether the other machine is still there.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping
from typing import Any

import asyncpg

from batch_system.database import pooler

TCP_OPTIONS = {
    "TCP_KEEPIDLE": 10,  # seconds of silence after which the kernel checks,
    "TCP_KEEPINTVL": 5,  # seconds until it checks again,
    "TCP_KEEPCNT": 3,  # and the number of checks in vain: the connection ends after 25 seconds
    # Milliseconds after which the connection ends if sent data is not acknowledged
    "TCP_USER_TIMEOUT": 25_000,
}
"""That is less than a lease of 30 seconds, after which other nodes take over. Some systems lack
some of the options.
"""


class Connection(asyncpg.Connection):  # type: ignore[misc]  # asyncpg has no types
    """A connection that notices when the machine of its server is gone, and whose transactions may
    begin with one more statement, which takes no round trip of its own.

    Attributes:
      first_statement: A statement without parameters that each transaction from now on executes
          first, or None.
    """

    first_statement: str | None = None
    _with_begin = ""
    _server_caps: Any

    def __init__(self, protocol: Any, transport: asyncio.Transport, *args: Any) -> None:
        super().__init__(protocol, transport, *args)
        _ask_now_and_then(transport.get_extra_info("socket"))

    async def execute(self, query: str, *args: Any, timeout: float | None = None) -> str:
        # asyncpg's Transaction begins it without arguments.
        if query.startswith("BEGIN") and not args:
            first_statement = self.first_statement and f"{self.first_statement};"
            query = " ".join(filter(None, (query, self._with_begin, first_statement)))
        status: str = await super().execute(query, *args, timeout=timeout)
        return status

    def use_pooler(self, settings: Mapping[str, str]) -> None:
        """From now on begin each transaction with these settings, and change none for the session,
        which other clients of the pooler use too.
        """
        self._with_begin = pooler.with_begin(settings)
        # asyncpg would turn jit off for the session while it looks at a type that it does not know.
        self._server_caps = self._server_caps._replace(jit=False)


def _ask_now_and_then(ours: Any) -> None:
    """Have the kernel check whether the machine at the other end of this socket is still there."""
    if ours.family == socket.AF_UNIX:
        return
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in TCP_OPTIONS.items():
        if hasattr(socket, name):
            ours.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
