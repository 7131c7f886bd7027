"""Reads what a run has waited for when an attempt begins, from the ledger of this event loop's
service.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Row, select
from sqlalchemy.exc import DBAPIError

from batch_system.batch.context.upstream import Done, Upstream
from batch_system.batch.ledger import parts as parts_of
from batch_system.batch.ledger import waits
from batch_system.batch.ledger.tables import runs
from batch_system.batch.queue import enqueue


async def read(run: str, parts: bool = False) -> Upstream:
    """What the run with this id has waited for. `parts`: whether its members are its parts. Raises
    DatabaseError.
    """
    database = enqueue.ledger()
    try:
        async with database.reader.connect() as connection:
            slots = await waits.slots_with_results(connection, run)
    except (DBAPIError, OSError) as error:
        raise database.unreachable(error) from error
    return Upstream([_done(row) for row in slots], lambda after: members(run, after, parts))


async def members(run: str, after: str | None, parts: bool = False) -> Sequence[Done]:
    """The next members of the group of the run with this id, or its parts. `after`: the id of the
    last one already read.

    Raises DatabaseError.
    """
    database = enqueue.ledger()
    try:
        async with database.reader.connect() as connection:
            return [
                _done(row)
                for row in await waits.members_with_results(connection, run, after, parts)
            ]
    except (DBAPIError, OSError) as error:
        raise database.unreachable(error) from error


async def are_parts_over(run: str) -> bool:
    """Whether all parts of the run with this id have succeeded. Raises DatabaseError."""
    database = enqueue.ledger()
    try:
        async with database.reader.connect() as connection:
            tally = (await parts_of.tallies(connection, [run])).get(run)
    except (DBAPIError, OSError) as error:
        raise database.unreachable(error) from error
    return tally is None or not (tally.active or tally.bad)


async def slot_of(run: str) -> datetime | None:
    """The slot of the run with this id. Raises DatabaseError."""
    database = enqueue.ledger()
    try:
        async with database.reader.connect() as connection:
            slot: datetime | None = (
                await connection.execute(select(runs.c.slot).where(runs.c.id == run))
            ).scalar()
    except (DBAPIError, OSError) as error:
        raise database.unreachable(error) from error
    return slot


def _done(row: Row[Any]) -> Done:
    return Done(
        row.task,
        row.id,
        row.slot,
        row.state,
        row.params or {},
        row.result,
        getattr(row, "part", None),
    )
