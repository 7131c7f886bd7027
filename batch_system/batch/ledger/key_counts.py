"""How many runs of each key of a limit are running, and how many wait."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import datetime
from functools import cache
from typing import Any, NamedTuple

from sqlalchemy import Column, Integer
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.sql.selectable import TextualSelect

from batch_system.batch.ledger import json_rows, queue_rows
from batch_system.batch.ledger.states import RunState
from batch_system.batch.ledger.tables import HOLDS_LANE_SQL, OPEN_FAILURE_SQL, READY_SQL, runs
from batch_system.database import sql

MOST_COUNTED = 1_000
"""Waiting runs of a key are counted up to this number."""


async def running(connection: AsyncConnection, prefix: str, after: str, most: int) -> list[str]:
    """The queues of a limit behind `after` in which runs are running. `prefix`: as the names of its
    queues begin, up to and with the bracket.
    """
    # Which names follow each other is a matter of the database's collation.
    values = {"after": after, "prefix": prefix, "length": len(prefix), "most": most}
    return list((await connection.execute(_RUNNING, values)).scalars())


_RUNNING = sql.statement(
    f"SELECT DISTINCT exclusive FROM batch_runs WHERE {HOLDS_LANE_SQL} AND exclusive > :after "
    "AND substr(exclusive, 1, :length) = :prefix ORDER BY exclusive LIMIT :most",
    length=Integer(),
    most=Integer(),
).columns(runs.c.exclusive)


async def running_of_limits(
    connection: AsyncConnection, prefixes: Iterable[str], most: int
) -> dict[str, int]:
    """How many runs of each of these limits are running, over all its keys, counted up to `most`.
    A limit is given by the prefix of its queues.
    """
    kind = connection.dialect.name
    rows = json_rows.encode([{"prefix": prefix} for prefix in prefixes], kind)
    found = await connection.execute(_of_limits(kind), {"rows": rows, "most": most})
    return {row.prefix: row.number for row in found}


@cache
def _of_limits(kind: str) -> TextualSelect:
    prefix = Column("prefix", runs.c.exclusive.type)
    # PostgreSQL starts no other processes for a query of a row, which take longer than the query.
    # In the order of the index it skips the entries of runs that have ended.
    statement = sql.statement(
        "SELECT v.prefix, (SELECT count(*) FROM (SELECT exclusive FROM batch_runs "
        f"WHERE {HOLDS_LANE_SQL} AND exclusive IS NOT NULL "
        "AND substr(exclusive, 1, length(v.prefix)) = v.prefix "
        f"ORDER BY exclusive LIMIT :most) AS w) FROM {json_rows.source([prefix], kind)}",
        most=Integer(),
    )
    return statement.columns(prefix, Column("number", Integer))


async def numbers_waiting(
    connection: AsyncConnection, places: Iterable[tuple[str, str]], most: int
) -> dict[tuple[str, str], int]:
    """How many runs wait in each of these places, which are a task and a queue; counted up to
    `most`.
    """
    kind = connection.dialect.name
    rows = json_rows.encode([{"task": task, "exclusive": queue} for task, queue in places], kind)
    found = await connection.execute(_waiting(kind), {"rows": rows, "most": most})
    return {(task, queue): number for task, queue, number in found}


@cache
def _waiting(kind: str) -> TextualSelect:
    statement = sql.statement(
        "SELECT v.task, v.exclusive, (SELECT count(*) FROM (SELECT q.id FROM batch_runs q "
        f"WHERE q.task = v.task AND q.exclusive = v.exclusive AND {READY_SQL} LIMIT :most) AS w) "
        f"FROM {json_rows.source([runs.c.task, runs.c.exclusive], kind)}",
        most=Integer(),
    )
    return statement.columns(runs.c.task, runs.c.exclusive, Column("number", Integer))


async def counted(connection: AsyncConnection, task: str, queues: Sequence[str]) -> Sequence[Any]:
    """For each of these queues its name (`queue`), the numbers `running` and `waiting`, since when
    one of the latter could have started (`oldest`), and the parameters of one of its runs
    (`params`).
    """
    kind = connection.dialect.name
    rows = json_rows.encode([{"task": task, "exclusive": queue} for queue in queues], kind)
    return (await connection.execute(_counts(kind), {"rows": rows})).all()


@cache
def _counts(kind: str) -> TextualSelect:
    of_queue = "FROM batch_runs q WHERE q.task = v.task AND q.exclusive = v.exclusive"
    ready = f"SELECT q.due_at {of_queue} AND {READY_SQL} LIMIT {MOST_COUNTED}"
    holding = f"FROM batch_runs q WHERE q.exclusive = v.exclusive AND {HOLDS_LANE_SQL}"
    statement = sql.statement(
        "SELECT v.exclusive AS queue, "
        f"(SELECT count(*) {holding}) AS running, "
        f"(SELECT count(*) FROM ({ready}) AS w) AS waiting, "
        f"(SELECT min(w.due_at) FROM ({ready}) AS w) AS oldest, "
        f"coalesce((SELECT q.params {holding} LIMIT 1), "
        f"(SELECT q.params {of_queue} AND {READY_SQL} LIMIT 1)) AS params "
        f"FROM {json_rows.source([runs.c.task, runs.c.exclusive], kind)} ORDER BY v.exclusive"
    )
    columns = [
        Column("queue", runs.c.exclusive.type),
        Column("running", Integer),
        Column("waiting", Integer),
        Column("oldest", runs.c.due_at.type),
        Column("params", runs.c.params.type),
    ]
    return statement.columns(*columns)


async def failing(
    connection: AsyncConnection, task: str, after: str, most: int
) -> dict[str, tuple[int, dict[str, Any] | None]]:
    """How many runs of the first queues behind `after` have failed and were neither made good nor
    acknowledged, each with the parameters of one of them. The first 1,000 such runs of the task are
    read.
    """
    values = {"task": task, "after": after, "most": most}
    found = await connection.execute(_failing(connection.dialect.name), values)
    return {queue: (number, params) for queue, number, params in found}


@cache
def _failing(kind: str) -> TextualSelect:
    run = "CAST(w.run AS uuid)" if kind == "postgresql" else "w.run"
    statement = sql.statement(
        f"SELECT w.exclusive, w.number, r.params FROM (SELECT f.exclusive, count(*) AS number, "
        "max(CAST(f.id AS text)) AS run FROM (SELECT id, exclusive FROM batch_runs "
        f"WHERE task = :task AND {OPEN_FAILURE_SQL} AND state = '{RunState.FAILED}' "
        f"LIMIT {MOST_COUNTED}) AS f WHERE f.exclusive > :after "
        "GROUP BY f.exclusive ORDER BY f.exclusive LIMIT :most) AS w "
        f"JOIN batch_runs r ON r.id = {run}",
        most=Integer(),
    )
    return statement.columns(runs.c.exclusive, Column("number", Integer), runs.c.params)


class OfTask(NamedTuple):
    """The runs of a task with a limit. `waiting`: counted up to 1,000. `oldest`: since when the one
    that was made first waits; None if none waits.
    """

    running: int
    waiting: int
    oldest: datetime | None


async def of_tasks(connection: AsyncConnection) -> dict[str, OfTask]:
    """These numbers for each task with a limit or a rate. It reads the running runs."""
    running = Counter((await connection.execute(_HOLDING)).scalars())
    return {
        task: OfTask(running[task], waiting, oldest)
        for task, waiting, oldest in await connection.execute(_OF_TASKS)
    }


# SQLite would read all runs for a GROUP BY.
_HOLDING = sql.statement(f"SELECT task FROM batch_runs WHERE {HOLDS_LANE_SQL}").columns(runs.c.task)
_OF_TASKS = sql.statement(
    f"SELECT v.task, (SELECT count(*) FROM (SELECT q.id {queue_rows.READY_IN_ALL_QUEUES} "
    f"LIMIT {MOST_COUNTED}) AS w) AS waiting, (SELECT q.due_at {queue_rows.READY_IN_ALL_QUEUES} "
    "ORDER BY q.created_at LIMIT (SELECT 1)) AS oldest FROM (SELECT name AS task FROM batch_tasks "
    "WHERE queue IS NOT NULL) AS v"
).columns(runs.c.task, Column("waiting", Integer), Column("oldest", runs.c.due_at.type))
