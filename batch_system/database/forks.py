"""Closes the copies of a process's PostgreSQL connections in its forked children. Alone, because
importing it changes each fork.

A server ends the transaction of a connection when all copies of its socket are closed. If a process
is killed during a transaction, a child that still has the socket, such as one of a process pool,
would keep the transaction's rows locked.
"""

from __future__ import annotations

import os
from typing import Any
from weakref import WeakSet

_open: WeakSet[Any] = WeakSet()


def remember(connection: Any, _: Any) -> None:
    """A listener for SQLAlchemy's event `connect` of an engine with asyncpg: remembers connections
    to close in children.
    """
    _open.add(connection.driver_connection)


def _close_copies() -> None:
    """Replace the sockets by /dev/null, so that their numbers stay in use until the connection
    objects close them.
    """
    null = os.open(os.devnull, os.O_RDWR)
    for connection in _open:
        if not connection.is_closed():
            os.dup2(
                null, connection._transport.get_extra_info("socket").fileno(), inheritable=False
            )
    os.close(null)


os.register_at_fork(after_in_child=_close_copies)
