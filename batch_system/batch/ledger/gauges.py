"""Queries for the gauges of the ledger that monitoring reads again and again.

Each of them looks at a bounded number of rows, or at one index entry for each task. So it takes as
long on a ledger of many years, or with a million runs in the queue, as on a new one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from typing import Any

from sqlalchemy import Boolean, Column, Integer, Row, bindparam, func, select, text
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.sql.selectable import TextualSelect

from batch_system.batch.ledger import database_time, json_rows, queue_rows
from batch_system.batch.ledger.states import ACTIVE, RunState
from batch_system.batch.ledger.tables import (
    NO_PART_SQL,
    PART_SQL,
    READY_SQL,
    backups,
    durations,
    nodes,
    not_held,
    runs,
    tasks,
)
from batch_system.database import sql

MOST_COUNTED = 10_000
"""Runs of one state are counted up to this number, and so are parts of runs."""

LOOKED = 100
"""At most this many of a task's newest runs are searched for its last success and its failures
since.
"""

_LONG_AGO = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Totals:
    """`now`: the database time (UTC). `runs`, `parts`: how many runs and parts of runs are in each
    active state.

    At most MOST_COUNTED runs and as many parts are counted in each state. `verified_backup_at`:
    when the newest verified backup was taken (UTC); None without one.
    """

    now: datetime
    runs: Mapping[str, int]
    parts: Mapping[str, int]
    verified_backup_at: datetime | None

    @property
    def by_state(self) -> dict[str, int]:
        """Runs and parts together."""
        return {state: number + self.parts[state] for state, number in self.runs.items()}


async def totals(connection: AsyncConnection) -> Totals:
    """Count the runs and parts in the active states, and find the newest verified backup."""
    is_good = (backups.c.verified_at.is_not(None), backups.c.failed_at.is_(None))
    backup = select(func.max(backups.c.taken_at)).where(*is_good).scalar_subquery()
    now = database_time.moment(connection)
    row = (await connection.execute(select(now.label("now"), backup.label("backup")))).one()
    counted = {
        (state, is_part): number for state, is_part, number in await connection.execute(_COUNTS)
    }
    of_runs, of_parts = (
        {str(s): counted.get((s, is_part), 0) for s in ACTIVE} for is_part in (False, True)
    )
    return Totals(row.now, of_runs, of_parts, row.backup)


def _first(state: RunState, kind: str) -> str:
    """SQL for the oldest runs in a state, or parts. `kind`: the condition that a run is a part, or
    is not one.

    The order, and a limit whose value PostgreSQL does not know when it plans, let it read the index
    of the states, and not all runs.
    """
    is_part = str(kind == PART_SQL).lower()
    of_state = (
        f"SELECT state, {is_part} AS is_part FROM batch_runs WHERE state = '{state}' AND {kind}"
    )
    return (
        f"SELECT * FROM ({of_state} ORDER BY created_at, id "
        f"LIMIT (SELECT {MOST_COUNTED})) AS {state}_{is_part}"
    )


_FIRSTS = " UNION ALL ".join(
    _first(state, kind) for state in ACTIVE for kind in (NO_PART_SQL, PART_SQL)
)
_COUNTS = text(
    f"SELECT x.state, x.is_part, count(*) AS number FROM ({_FIRSTS}) AS x "
    "GROUP BY x.state, x.is_part"
).columns(runs.c.state, Column("is_part", Boolean), Column("number", Integer))


async def oldest_waiting_since(connection: AsyncConnection) -> datetime | None:
    """Since when the run that could have started first of all has waited (UTC); None if no run
    waits.

    These are queued and interrupted runs that no pause holds. It costs some index lookups for each
    task that has such runs, however many runs there are.
    """
    return (await connection.execute(_oldest_waiting())).scalar()


@cache
def _oldest_waiting() -> TextualSelect:
    parts = " UNION ALL ".join(
        "SELECT (SELECT q.due_at FROM batch_runs q WHERE q.task = v.task "
        f"AND q.{of} AND q.rank = {rank} AND {READY_SQL} AND {not_held('q')} "
        "ORDER BY q.exclusive, q.rank, q.due_at, q.id LIMIT (SELECT 1)) AS due_at FROM v"
        for of in ("exclusive = v.task", "exclusive IS NULL")
        for rank in queue_rows.RANKS
    )
    of_limits = (
        f"SELECT (SELECT q.due_at {queue_rows.READY_IN_ALL_QUEUES} "
        f"ORDER BY q.created_at LIMIT (SELECT 1)) AS due_at FROM v WHERE {queue_rows.HAS_LIMIT}"
    )
    parts = f"{parts} UNION ALL {of_limits}"
    waiting = f"WITH v AS MATERIALIZED ({queue_rows.names(queue_rows.READY)})"
    return text(f"{waiting} SELECT min(due_at) AS due_at FROM ({parts}) AS heads").columns(
        runs.c.due_at
    )


@dataclass(frozen=True)
class TaskRow:
    """A task of the ledger. `failure_streak`: failed runs that were made after the last one that
    has succeeded.

    `last_success_at`: when that one ended (UTC); None if none is known. Both are found among its
    LOOKED newest runs. `p50`, `p95`: how many seconds its successes take, as batch_durations has
    them; None if they are not computed yet.
    """

    name: str
    is_paused: bool
    last_success_at: datetime | None
    failure_streak: int
    p50: float | None
    p95: float | None


_GOOD = (
    "SELECT x.id FROM (SELECT r.id, r.state FROM batch_runs r WHERE r.task = t.name "
    f"AND r.{NO_PART_SQL} "
    f"ORDER BY r.created_at DESC, r.id DESC LIMIT {LOOKED}) AS x "
    f"WHERE x.state = '{RunState.SUCCEEDED}' LIMIT 1"
)
_ENDED = "SELECT g.finished_at FROM batch_runs g WHERE g.id = a.good"
_SINCE = (
    "f.created_at > coalesce((SELECT g.created_at FROM batch_runs g "
    "WHERE g.id = a.good), :long_ago)"
)
_FAILURES = (
    "SELECT count(*) FROM (SELECT f.state FROM batch_runs f WHERE f.task = a.name "
    f"AND f.{NO_PART_SQL} AND {_SINCE} "
    f"ORDER BY f.created_at DESC, f.id DESC LIMIT (SELECT {LOOKED})) AS z "
    f"WHERE z.state = '{RunState.FAILED}'"
)


def _tasks(which: str) -> TextualSelect:
    """A query for tasks. The names are materialized; otherwise PostgreSQL would search for each
    last success several times.
    """
    names = ("last_success_at", "p50", "p95")
    last, p50, p95 = (
        f"(SELECT d.{name} FROM batch_durations d WHERE d.task = a.name)" for name in names
    )
    statement = text(
        f"WITH a AS MATERIALIZED (SELECT t.name, t.paused_at, ({_GOOD}) AS good "
        f"FROM batch_tasks t WHERE {which}) "
        f"SELECT a.name, a.paused_at, coalesce(({_ENDED}), {last}) AS last_success_at, "
        f"({_FAILURES}) AS streak, "
        f"{p50} AS p50, {p95} AS p95 FROM a ORDER BY a.name"
    ).bindparams(bindparam("long_ago", _LONG_AGO, type_=runs.c.created_at.type))
    of_task = (
        tasks.c.name,
        tasks.c.paused_at,
        durations.c.last_success_at,
        Column("streak", Integer),
    )
    return statement.columns(*of_task, durations.c.p50, durations.c.p95)


_ALL_TASKS = _tasks("t.removed_at IS NULL")
_ONE_TASK = _tasks("t.name = :name")


@cache
def _these_tasks(kind: str) -> TextualSelect:
    names = f"SELECT v.name FROM {json_rows.source([tasks.c.name], kind)}"
    return _tasks(f"t.removed_at IS NULL AND {sql.among('t.name', names, kind)}")


async def task_rows(
    connection: AsyncConnection, names: Collection[str] | None = None
) -> list[TaskRow]:
    """These tasks as far as they were not removed, by name; None: all. It reads the runs of a task
    only back to its last success.
    """
    if names is None:
        return [_task_row(row) for row in await connection.execute(_ALL_TASKS)]
    kind = connection.dialect.name
    rows = json_rows.encode([{"name": name} for name in names], kind)
    found = await connection.execute(_these_tasks(kind), {"rows": rows})
    return [_task_row(row) for row in found]


async def task_row(connection: AsyncConnection, name: str) -> TaskRow | None:
    """One task, also one that was removed; None if the ledger does not know it."""
    row = (await connection.execute(_ONE_TASK, {"name": name})).first()
    return _task_row(row) if row is not None else None


def _task_row(row: Row[Any]) -> TaskRow:
    return TaskRow(
        row.name, row.paused_at is not None, row.last_success_at, row.streak, row.p50, row.p95
    )


async def living_nodes(connection: AsyncConnection) -> list[Row[Any]]:
    """`draining` and `seen_at` (UTC) of each node that fires and is not marked as stopped."""
    query = select(nodes.c.draining, nodes.c.seen_at).where(
        nodes.c.stopped_at.is_(None), nodes.c.fires
    )
    return list(await connection.execute(query))
