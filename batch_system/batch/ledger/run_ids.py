"""Finding runs by a part of their id, as people type it."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Text, cast, func, select, text, union_all
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger.tables import NO_PART_SQL, runs

MOST_SEARCHED = 100_000
"""How many of the newest runs are searched for the end of an id."""


async def begin_with(connection: AsyncConnection, prefix: str, limit: int) -> list[dict[str, Any]]:
    """The id, task, state and creation of runs whose id begins with `prefix`, newest first; at most
    `limit`.

    `prefix`: at most 32 hex digits, without dashes.
    """
    low, high = (_as_id(prefix.ljust(32, filler)) for filler in "0f")
    columns = (runs.c.id, runs.c.task, runs.c.state, runs.c.created_at)
    statement = (
        select(*columns).where(runs.c.id.between(low, high)).order_by(runs.c.id.desc()).limit(limit)
    )
    return [dict(row) for row in (await connection.execute(statement)).mappings()]


async def end_in(
    connection: AsyncConnection, suffix: str, limit: int, most: int = MOST_SEARCHED
) -> list[dict[str, Any]]:
    """The same as `begin_with` for the end of the id, among the newest `most` runs.

    An id ends in random digits, so no index has them in order. Parts are found among the newest
    `most` ids: they are made later than their run, and there may be enough of them to fill
    that number alone.
    """
    by_time = (runs.c.created_at.desc(), runs.c.id.desc())
    newest_runs = (
        select(runs.c.id).where(text(NO_PART_SQL)).order_by(*by_time).limit(most).subquery()
    )
    newest_ids = select(runs.c.id).order_by(runs.c.id.desc()).limit(most).subquery()
    newest = union_all(newest_runs.select(), newest_ids.select()).subquery()
    end = _as_id(suffix.rjust(32)).lstrip(" -")
    # Cheaper than LIKE, which tries each place of each id.
    ends = func.substr(cast(newest.c.id, Text), 37 - len(end)) == end
    matching = select(newest.c.id).where(ends).limit(limit)
    columns = (runs.c.id, runs.c.task, runs.c.state, runs.c.created_at)
    statement = select(*columns).where(runs.c.id.in_(matching)).order_by(runs.c.id.desc())
    return [dict(row) for row in (await connection.execute(statement)).mappings()]


def _as_id(digits: str) -> str:
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))
