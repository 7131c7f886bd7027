"""What the ledger knows about one run or one task. Reads only."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Select, select
from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.ledger.tables import attempts, missed, nodes, runs, tasks

Row = dict[str, Any]


async def begin_with(connection: AsyncConnection, prefix: str, limit: int) -> list[Row]:
    """Runs whose id begins with these hex digits (at most 32, without dashes), newest first; at most `limit`."""
    low, high = (_as_id(prefix.ljust(32, filler)) for filler in "0f")
    columns = (runs.c.id, runs.c.task, runs.c.state, runs.c.created_at)
    return await _rows(
        connection, select(*columns).where(runs.c.id.between(low, high)).order_by(runs.c.id.desc()).limit(limit)
    )


def _as_id(digits: str) -> str:
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


async def latest(connection: AsyncConnection, task: str) -> str | None:
    """The id of the newest run of a task."""
    newest = select(runs.c.id).where(runs.c.task == task).order_by(runs.c.created_at.desc(), runs.c.id.desc())
    found: str | None = (await connection.execute(newest.limit(1))).scalar()
    return found


async def attempts_of(connection: AsyncConnection, run: str) -> list[Row]:
    """The attempts of a run that have ended, oldest first."""
    return await _rows(connection, select(attempts).where(attempts.c.run == run).order_by(attempts.c.fence))


async def node(connection: AsyncConnection, node_id: str) -> Row | None:
    return await _first(connection, select(nodes).where(nodes.c.id == node_id))


async def task(connection: AsyncConnection, name: str) -> Row | None:
    return await _first(connection, select(tasks).where(tasks.c.name == name))


async def missed_of(connection: AsyncConnection, name: str, limit: int) -> list[Row]:
    """The missed ranges of a task, newest first."""
    newest = select(missed).where(missed.c.task == name).order_by(missed.c.last_slot.desc())
    return await _rows(connection, newest.limit(limit))


async def _rows(connection: AsyncConnection, statement: Select[Any]) -> list[Row]:
    return [dict(row) for row in (await connection.execute(statement)).mappings()]


async def _first(connection: AsyncConnection, statement: Select[Any]) -> Row | None:
    return next(iter(await _rows(connection, statement)), None)
