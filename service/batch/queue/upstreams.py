"""Reads what a run has waited for from the ledger of the service on this event loop, when an attempt begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Row
from sqlalchemy.exc import DBAPIError

from service.batch.context.upstream import Done, Upstream
from service.batch.ledger import upstreams
from service.batch.queue import enqueue


async def read(run: str) -> Upstream:
    """What the run with this id has waited for. Raises DatabaseError."""
    database = enqueue.ledger()
    try:
        async with database.reader.connect() as connection:
            slots = await upstreams.awaited(connection, run)
    except (DBAPIError, OSError) as error:
        raise database.unreachable(error) from error
    return Upstream([_done(row) for row in slots], lambda after: members(run, after))


async def members(run: str, after: str | None) -> Sequence[Done]:
    """The next members of the group of the run with this id. `after`: the id of the last one before. Raises
    DatabaseError.
    """
    database = enqueue.ledger()
    try:
        async with database.reader.connect() as connection:
            return [_done(row) for row in await upstreams.members(connection, run, after)]
    except (DBAPIError, OSError) as error:
        raise database.unreachable(error) from error


def _done(row: Row[Any]) -> Done:
    return Done(row.task, row.id, row.slot, row.state, row.params or {}, row.result)
