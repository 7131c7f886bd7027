"""The numbers of limits whose numbers a function returns: how many runs of each key may run at
once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from typing import Any

from sqlalchemy import Column, Index, Integer, String, Table, delete, func, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.sql.selectable import TextualSelect

from batch_system.batch.ledger import json_rows
from batch_system.batch.ledger.tables import READY_SQL, RETRYING_SQL, ledger, runs
from batch_system.database import sql
from batch_system.database.types import UtcDateTime

EVERY = timedelta(seconds=60)
"""How old a number may be until the function is called again."""
KEPT = timedelta(days=7)
"""A number for which the function was not called for so long is deleted."""
LONGEST_ERROR = 300

limits = Table(
    "batch_limits",
    ledger,
    Column("queue", String(120), primary_key=True),
    Column("task", String(100), nullable=False),
    Column("number", Integer),
    Column("asked_at", UtcDateTime, nullable=False),
    Column("failed_since", UtcDateTime),
    Column("error", String(LONGEST_ERROR)),
)
"""`task`: whose function was called. `number`: what it returned last. `asked_at`: when it was
called. `failed_since`: since when the calls have failed.
"""
Index(
    "ix_batch_limits_failed",
    limits.c.task,
    limits.c.failed_since,
    sqlite_where=text("failed_since IS NOT NULL"),
    postgresql_where=text("failed_since IS NOT NULL"),
)


@dataclass(frozen=True)
class Answer:
    """What the function returned for a queue: its number, or the error."""

    queue: str
    number: int | None
    error: str | None = None


@dataclass(frozen=True)
class Failing:
    """The keys of a task for which the function fails. `keys`: how many. `since`: the longest."""

    task: str
    keys: int
    since: datetime
    error: str


async def known(connection: AsyncConnection, queues: Collection[str]) -> dict[str, int]:
    """The numbers of these queues that functions have returned."""
    kind = connection.dialect.name
    rows = json_rows.encode([{"queue": queue} for queue in queues], kind)
    found = await connection.execute(_numbers(kind), {"rows": rows})
    return {row.queue: row.number for row in found}


@cache
def _numbers(kind: str) -> TextualSelect:
    statement = sql.statement(
        f"SELECT l.queue, l.number FROM {json_rows.source([limits.c.queue], kind)} "
        "JOIN batch_limits l ON l.queue = v.queue WHERE l.number IS NOT NULL"
    )
    return statement.columns(limits.c.queue, limits.c.number)


async def due(
    connection: AsyncConnection, task: str, queues: Iterable[str], now: datetime
) -> dict[str, Any]:
    """Those of these queues, which have waiting runs, whose number is too old; each with the
    parameters of one of its runs.
    """
    kind = connection.dialect.name
    rows = json_rows.encode([{"task": task, "queue": queue} for queue in queues], kind)
    values = {"rows": rows, "before": now - EVERY}
    return {row.queue: row.params for row in await connection.execute(_due(kind), values)}


@cache
def _due(kind: str) -> TextualSelect:
    of_queue = "SELECT q.params FROM batch_runs q WHERE q.task = v.task AND q.exclusive = v.queue"
    statement = sql.statement(
        f"SELECT v.queue, coalesce(({of_queue} AND {READY_SQL} LIMIT 1), "
        f"({of_queue} AND {RETRYING_SQL} LIMIT 1)) AS params "
        f"FROM {json_rows.source([limits.c.task, limits.c.queue], kind)} "
        "LEFT JOIN batch_limits l ON l.queue = v.queue "
        "WHERE l.queue IS NULL OR l.asked_at <= :before",
        before=limits.c.asked_at,
    )
    return statement.columns(limits.c.queue, runs.c.params)


async def mark(
    connection: AsyncConnection, task: str, queues: Iterable[str], now: datetime
) -> set[str]:
    """Note that the function is called for these queues now. Returns those for which no other node
    has noted that.
    """
    kind = connection.dialect.name
    rows = [{"queue": queue, "task": task, "asked_at": now} for queue in sorted(queues)]
    values = {"rows": json_rows.encode(rows, kind), "before": now - EVERY}
    return set((await connection.execute(_mark(kind), values)).scalars())


@cache
def _mark(kind: str) -> TextualSelect:
    source = json_rows.source([limits.c.queue, limits.c.task, limits.c.asked_at], kind)
    statement = sql.statement(
        "INSERT INTO batch_limits (queue, task, asked_at) "
        f"SELECT v.queue, v.task, v.asked_at FROM {source} WHERE true "
        "ON CONFLICT (queue) DO UPDATE SET asked_at = excluded.asked_at, task = excluded.task "
        "WHERE batch_limits.asked_at <= :before RETURNING queue",
        before=limits.c.asked_at,
    )
    return statement.columns(limits.c.queue)


async def store(
    connection: AsyncConnection, task: str, answers: Iterable[Answer], now: datetime
) -> None:
    """Store what the function returned. After an error, the number before it holds."""
    kind = connection.dialect.name
    rows = [
        {
            "queue": each.queue,
            "task": task,
            "number": each.number,
            "asked_at": now,
            "failed_since": None if each.error is None else now,
            "error": None if each.error is None else each.error[:LONGEST_ERROR],
        }
        for each in sorted(answers, key=lambda each: each.queue)
    ]
    await connection.execute(text(_store(kind)), {"rows": json_rows.encode(rows, kind)})


@cache
def _store(kind: str) -> str:
    columns = list(limits.c)
    names = ", ".join(column.name for column in columns)
    return (
        f"INSERT INTO batch_limits ({names}) "
        f"SELECT {', '.join(f'v.{column.name}' for column in columns)} "
        f"FROM {json_rows.source(columns, kind)} WHERE true ON CONFLICT (queue) DO UPDATE SET "
        "number = CASE WHEN excluded.error IS NULL THEN excluded.number "
        "ELSE batch_limits.number END, "
        "failed_since = CASE WHEN excluded.error IS NOT NULL "
        "THEN coalesce(batch_limits.failed_since, excluded.failed_since) END, "
        "error = excluded.error"
    )


async def ask_again(connection: AsyncConnection, queue: str, now: datetime) -> None:
    """Let the function be called soon for this queue, if it has waiting runs."""
    statement = update(limits).where(limits.c.queue == queue, limits.c.asked_at > now - EVERY)
    await connection.execute(statement.values(asked_at=now - EVERY))


async def failing(
    connection: AsyncConnection, now: datetime, patience: timedelta
) -> Mapping[str, Failing]:
    """The tasks whose function has failed for longer than `patience` for keys that still wait, by
    name.
    """
    query = (
        select(
            limits.c.task,
            func.count(),
            func.min(limits.c.failed_since),
            func.max(limits.c.error),
        )
        .where(limits.c.failed_since <= now - patience, limits.c.asked_at > now - 5 * EVERY)
        .group_by(limits.c.task)
    )
    return {row[0]: Failing(*row) for row in await connection.execute(query)}


async def prune(connection: AsyncConnection, now: datetime) -> None:
    """Delete numbers that nobody has needed for long."""
    await connection.execute(delete(limits).where(limits.c.asked_at < now - KEPT))
