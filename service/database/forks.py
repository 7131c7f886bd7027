"""A forked child, a process pool's say, does not keep its parent's connections to a server open.

A server ends what a connection has begun when each copy of its socket is closed. Where the parent is killed in the
midst of a transaction, a child that lives on would keep the rows locked that the transaction had locked.
"""

from __future__ import annotations

import os
from typing import Any
from weakref import WeakSet

_open: WeakSet[Any] = WeakSet()


def remember(connection: Any, _: Any) -> None:
    """For SQLAlchemy's event `connect`, of an engine whose driver is asyncpg."""
    _open.add(connection.driver_connection)


def _let_go() -> None:
    """The numbers of the sockets stay taken, for their owners will close them."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for connection in _open:
        if not connection.is_closed():
            os.dup2(nothing, connection._transport.get_extra_info("socket").fileno(), inheritable=False)
    os.close(nothing)


os.register_at_fork(after_in_child=_let_go)
