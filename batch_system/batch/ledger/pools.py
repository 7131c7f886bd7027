"""Queries on pools: the runs that wait in each, and which of them wait in vain because no node
executes their runs.

The pool `default` is never among those without a node: other queries find out whether a service
lives. Runs that a pause holds don't wait. The cost is some index lookups for each task with waiting
runs, however many runs wait.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from datetime import datetime
from functools import cache
from typing import NamedTuple

from sqlalchemy import Boolean, Column, Integer, bindparam, func, select, text
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.sql.selectable import TextualSelect

from batch_system.batch.ledger import queue_rows
from batch_system.batch.ledger.tables import HELD_SQL, nodes, runs, tasks
from batch_system.database import sql
from batch_system.settings.pools import DEFAULT_POOL, NO_POOLS, Pool

MOST_COUNTED = 1_000
"""Waiting runs of one task are counted up to this number."""


class InVain(NamedTuple):
    """A task with runs that wait although no node executes them.

    `waiting`: how many, counted up to MOST_COUNTED. `is_claimed`: some node claims the runs of the
    pool, but none of these nodes has loaded the task.
    """

    task: str
    pool: str
    waiting: int
    is_claimed: bool


async def in_vain(
    connection: AsyncConnection, now: datetime, since: datetime | None = None
) -> list[InVain]:
    """The tasks with runs that wait in vain at `now`, by name. They have another pool than the
    default one.

    `since`: only nodes that were seen since then count; None: all that are not marked as stopped. A
    node that drains claims nothing more, so it does not count.
    """
    statement = _in_vain(connection.dialect.name, since is not None)
    found = await connection.execute(
        statement, {"now": now} | ({"since": since} if since is not None else {})
    )
    return [
        InVain(row.task, row.pool, row.number, bool(row.is_claimed)) for row in found if row.number
    ]


async def unclaimed(connection: AsyncConnection, since: datetime) -> dict[str, list[str]]:
    """The names of the tasks of each pool that no node seen since then claims, even if no run of
    theirs waits.
    """
    of_others = (tasks.c.removed_at.is_(None), tasks.c.pool != DEFAULT_POOL)
    claims = text(
        f"NOT EXISTS ({_nodes(connection.dialect.name, 'batch_tasks.pool', True)})"
    ).bindparams(bindparam("since", since, type_=nodes.c.seen_at.type))
    by_pool: dict[str, list[str]] = {}
    query = (
        select(tasks.c.pool, tasks.c.name)
        .where(*of_others, claims)
        .order_by(tasks.c.pool, tasks.c.name)
    )
    for row in await connection.execute(query):
        by_pool.setdefault(row.pool, []).append(row.name)
    return by_pool


async def waiting(connection: AsyncConnection, now: datetime) -> dict[str, int]:
    """How many runs of each pool may start at `now`: those of each task are counted up to
    MOST_COUNTED.
    """
    return {row.pool: row.number for row in await connection.execute(_waiting(), {"now": now})}


async def running(connection: AsyncConnection) -> dict[str, int]:
    """How many runs of each pool are running. It reads the running runs."""
    pool = select(tasks.c.pool).where(tasks.c.name == runs.c.task).scalar_subquery()
    # SQLite would read all runs for a GROUP BY.
    held = select(func.coalesce(pool, DEFAULT_POOL)).select_from(runs).where(text(HELD_SQL))
    return Counter((await connection.execute(held)).scalars())


async def places(
    connection: AsyncConnection, since: datetime, settings: Mapping[str, Pool] = NO_POOLS
) -> dict[str, int]:
    """How many runs of each pool can be executed at once by all the nodes that claim it and were
    seen since then.

    `settings`: what the settings say about pools, such as how many children of each node execute
    their runs.
    """
    lives = (nodes.c.stopped_at.is_(None), nodes.c.draining.is_(False), nodes.c.seen_at >= since)
    by_pool: dict[str, int] = {}
    for row in await connection.execute(select(nodes.c.pools, nodes.c.capacity).where(*lives)):
        for name in row.pools if isinstance(row.pools, list) else ():
            capacity = row.capacity or 0
            number = settings[name].places_of(capacity) if name in settings else capacity
            by_pool[name] = by_pool.get(name, 0) + number
    return by_pool


async def named(connection: AsyncConnection) -> set[str]:
    """The pools of all tasks that were not removed."""
    query = select(tasks.c.pool).where(tasks.c.removed_at.is_(None)).distinct()
    return set((await connection.execute(query)).scalars())


_WITH_RUNS = " UNION ".join(
    f"SELECT task FROM ({queue_rows.names(condition)}) AS {name}"
    for name, condition in (("waits", queue_rows.READY), ("retries", queue_rows.RETRIES))
)
"""SQL for the names of the tasks that have runs which wait, or are retried at some time."""

_OF_QUEUE = " + ".join(
    f"(SELECT count(*) FROM ({queue_rows.first(of, str(MOST_COUNTED), True)}) AS counted)"
    for of in ("exclusive = v.task", "exclusive IS NULL")
)
_OF_LIMIT = (
    f"(SELECT count(*) FROM (SELECT q.id {queue_rows.READY_IN_ALL_QUEUES} "
    f"LIMIT {MOST_COUNTED}) AS counted)"
)
_NUMBER = f"CASE WHEN {queue_rows.HAS_LIMIT} THEN {_OF_LIMIT} ELSE {_OF_QUEUE} END"
"""SQL for the number of runs of the task `v.task` that may start at :now; with a limit, of those
that are not retries.
"""

_POOL = f"coalesce((SELECT t.pool FROM batch_tasks t WHERE t.name = a.task), '{DEFAULT_POOL}')"


@cache
def _in_vain(kind: str, are_seen: bool) -> TextualSelect:
    claims = _nodes(kind, "b.pool", are_seen)
    is_loaded = f"EXISTS ({claims} AND {_has(kind, 'n.tasks', 'b.task')})"
    statement = sql.statement(
        f"WITH a AS MATERIALIZED ({_WITH_RUNS}), b AS MATERIALIZED (SELECT a.task, (SELECT "
        "t.pool FROM batch_tasks t "
        f"WHERE t.name = a.task AND t.removed_at IS NULL AND t.pool <> '{DEFAULT_POOL}') AS pool "
        "FROM a), "
        f"v AS MATERIALIZED (SELECT b.task, b.pool, EXISTS ({claims}) AS is_claimed FROM b "
        f"WHERE b.pool IS NOT NULL AND NOT {is_loaded}) "
        f"SELECT v.task, v.pool, v.is_claimed, {_NUMBER} AS number FROM v ORDER BY v.task",
        now=runs.c.due_at,
        **({"since": nodes.c.seen_at} if are_seen else {}),
    )
    return statement.columns(tasks.c.pool, Column("task", tasks.c.name.type), _CLAIMED, _COUNTED)


@cache
def _waiting() -> TextualSelect:
    statement = sql.statement(
        f"WITH a AS MATERIALIZED ({_WITH_RUNS}), v AS MATERIALIZED (SELECT a.task, {_POOL} AS "
        "pool FROM a) "
        "SELECT pool, CAST(sum(number) AS INTEGER) AS number "
        f"FROM (SELECT v.pool, {_NUMBER} AS number FROM v) "
        "AS counted_by_task GROUP BY pool",
        now=runs.c.due_at,
    )
    return statement.columns(tasks.c.pool, _COUNTED)


_CLAIMED: Column[bool] = Column("is_claimed", Boolean())
_COUNTED: Column[int] = Column("number", Integer())


def _nodes(kind: str, pool: str, are_seen: bool) -> str:
    """SQL for the living nodes that claim the runs of a pool. `are_seen`: only those that were seen
    since :since.
    """
    seen = " AND n.seen_at >= :since" if are_seen else ""
    lives = f"n.stopped_at IS NULL AND NOT n.draining{seen}"
    return f"SELECT 1 FROM batch_nodes n WHERE {lives} AND {_has(kind, 'n.pools', pool)}"


def _has(kind: str, names: str, name: str) -> str:
    """SQL that says whether a list of names in a JSON column has this name. A column without a
    value has none.
    """
    if kind == "postgresql":
        return f"coalesce({names} @> to_jsonb(CAST({name} AS text)), false)"
    return f"EXISTS (SELECT 1 FROM json_each({names}) AS each WHERE each.value = {name})"
