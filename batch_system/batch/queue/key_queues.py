"""The queues of keys: which queues of a task with a limit have waiting runs, and the first runs of
each. They are found by one jump in the index for each queue, however many runs wait there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Any

from sqlalchemy import Column, Integer, Text, select, text
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.sql.selectable import TextualSelect

from batch_system.batch.ledger import json_rows, queue_rows
from batch_system.batch.ledger.states import Rank, RunState
from batch_system.batch.ledger.tables import HELD_SQL, HIGH_SQL, HOLDS_LANE_SQL, not_held, runs
from batch_system.batch.queue.concurrency import HEAD_COLUMNS, Head
from batch_system.database import sql


async def behind(
    connection: AsyncConnection, after: Mapping[str, str], size: int, retries: bool
) -> dict[str, list[str]]:
    """The next `size` queues with waiting runs of each task, in their order, behind `after`.
    `retries`: whether those with retries count too.
    """
    kind = connection.dialect.name
    rows = [{"task": task, "exclusive": queue} for task, queue in after.items()]
    parameters = {"rows": json_rows.encode(rows, kind), "size": size}
    found: dict[str, list[str]] = {task: [] for task in after}
    for task, queue in await connection.execute(_jumps(kind, retries), parameters):
        found[task].append(queue)
    return found


@cache
def _jumps(kind: str, retries: bool) -> TextualSelect:
    """The names of the queues, each found by one jump in the index, in the order of the index."""
    source = json_rows.source([runs.c.task, runs.c.exclusive], kind)
    statement = sql.statement(
        f"{_recursion(source, retries)} "
        "SELECT w.task, w.exclusive FROM w WHERE w.exclusive IS NOT NULL ORDER BY w.number",
        size=Integer(),
    )
    return statement.columns(runs.c.task, runs.c.exclusive)


def _recursion(source: str, retries: bool) -> str:
    return (
        "WITH RECURSIVE w(task, exclusive, number) AS ("
        f"SELECT v.task, ({_next('v', retries)}), 1 FROM {source} UNION ALL "
        f"SELECT w.task, ({_next('w', retries)}), w.number + 1 FROM w "
        "WHERE w.exclusive IS NOT NULL AND w.number < :size)"
    )


def _next(place: str, retries: bool) -> str:
    """SQL for the next queue behind that of `place`, which is an alias."""
    behind = f"r.task = {place}.task AND r.exclusive > {place}.exclusive"
    jumps = [
        f"SELECT min(r.exclusive) AS queue FROM batch_runs r WHERE {condition} AND {behind}"
        for condition in (queue_rows.READY, queue_rows.RETRIES)
    ]
    return f"SELECT min(queue) FROM ({' UNION ALL '.join(jumps)}) AS n" if retries else jumps[0]


@dataclass(frozen=True)
class Conditions:
    """What a look at `now` has to read.

    Attributes:
      retries: Whether retries are due.
      have_numbers: Whether functions return the numbers of some limits.
    """

    now: datetime
    retries: bool
    have_numbers: bool

    @property
    def values(self) -> dict[str, Any]:
        """The values for a statement."""
        return {"now": self.now} if self.retries else {}


@dataclass
class Queue:
    """A queue with waiting runs: the first of them, and the lanes that runs hold, each with whether
    its run is queued because it goes on after its parts. `number`: how many of its runs may run at
    once, if a function has returned that.
    """

    name: str
    taken: dict[int, bool]
    number: int | None
    heads: list[Head]


async def read_queues(
    connection: AsyncConnection,
    after: Mapping[str, str],
    size: int,
    each: int,
    conditions: Conditions,
) -> dict[str, list[Queue]]:
    """The next `size` queues of each task behind `after`, with the first runs of each; `each`: how
    many.
    """
    statement = _queues(connection.dialect.name, conditions, are_named=False)
    values = {"size": size, "each": each, **conditions.values}
    found: dict[str, list[Queue]] = {task: [] for task in after}
    for task, queue in await _read(connection, statement, after.items(), values):
        found[task].append(queue)
    return found


async def read_queues_of_rank(
    connection: AsyncConnection,
    rank: int,
    tasks: Collection[str],
    most: int,
    each: int,
    conditions: Conditions,
) -> dict[str, list[Queue]]:
    """The queues of these tasks in which runs of this rank wait, each with the first of these; the
    longest waiting first. `rank`: JOINING or INTERRUPTED, which go before the others of their
    queue. `most`: how many such runs are read to find the queues, of each task with INTERRUPTED.
    `each`: as above.
    """
    kind = connection.dialect.name
    rows = json_rows.encode([{"task": task} for task in tasks], kind)
    waiting = await connection.execute(_of_rank(rank, kind), {"rows": rows, "most": most})
    places = dict.fromkeys((task, queue) for task, queue in waiting)
    statement = _queues(kind, conditions, are_named=True)
    values = {"each": each, **conditions.values}
    found: dict[str, list[Queue]] = {task: [] for task in tasks}
    queues = await _read(connection, statement, places, values) if places else []
    order = {place: number for number, place in enumerate(places)}
    for task, queue in sorted(queues, key=lambda each: order[each[0], each[1].name]):
        queue.heads = [head for head in queue.heads if head.rank == rank]
        found[task].append(queue)
    return found


async def _read(
    connection: AsyncConnection,
    statement: TextualSelect,
    places: Iterable[tuple[str, str]],
    values: Mapping[str, Any],
) -> list[tuple[str, Queue]]:
    """Queues with their tasks."""
    rows = [{"task": task, "exclusive": queue} for task, queue in places]
    parameters = {"rows": json_rows.encode(rows, connection.dialect.name), **values}
    found: list[tuple[str, Queue]] = []
    for task, name, taken, number, *head in await connection.execute(statement, parameters):
        if not found or (found[-1][0], found[-1][1].name) != (task, name):
            found.append((task, Queue(name, _lanes(taken), number, [])))
        if head[0] is not None:
            found[-1][1].heads.append(Head(*head))
    return found


async def last_served(connection: AsyncConnection, tasks: Collection[str]) -> dict[str, str]:
    """The queue of the run that has begun last, of each of these tasks. It reads the running
    runs.
    """
    columns = (runs.c.task, runs.c.exclusive)
    running = select(*columns).where(
        text(HELD_SQL), runs.c.task.in_(tasks), runs.c.exclusive.is_not(None)
    )
    found = await connection.execute(running.order_by(runs.c.attempt_started_at))
    return {row.task: row.exclusive for row in found}


@cache
def _of_rank(rank: int, kind: str) -> TextualSelect:
    source = json_rows.source([runs.c.task], kind)
    may_start = f"q.task = v.task AND {not_held('q')}"
    order = "ORDER BY q.due_at LIMIT (SELECT :most)"
    if rank == Rank.JOINING:  # they are read once for all tasks, among the runs with lanes
        is_joining = f"{HOLDS_LANE_SQL} AND state = '{RunState.QUEUED}' AND rank = {rank}"
        query = (
            "SELECT q.task, q.exclusive FROM batch_runs q"
            f"{sql.hint('uq_batch_runs_exclusive', kind)} CROSS JOIN {source} "
            f"WHERE {is_joining} AND {may_start} {order}"
        )
    else:
        first = f"SELECT q.id FROM batch_runs q WHERE {HIGH_SQL} AND {may_start} {order}"
        query = (
            f"SELECT r.task, r.exclusive FROM {source} "
            f"JOIN batch_runs r ON {sql.among('r.id', first, kind)} ORDER BY r.due_at, r.id"
        )
    statement = sql.statement(query, most=Integer())
    return statement.columns(runs.c.task, runs.c.exclusive)


def _taken_in(place: str, kind: str) -> str:
    """SQL for the lanes of the queue of `place`, which is an alias, as `_lanes` reads them."""
    lane = f"x.lane || CASE WHEN x.state = '{RunState.QUEUED}' THEN 'q' ELSE '' END"
    lanes = f"string_agg({lane}, ' ')" if kind == "postgresql" else f"group_concat({lane}, ' ')"
    return (
        f"SELECT {lanes} FROM batch_runs x WHERE x.exclusive = {place}.exclusive "
        f"AND {HOLDS_LANE_SQL}"
    )


def _lanes(taken: str | None) -> dict[int, bool]:
    """The lanes that are written as "1 2q": the second one is held by a queued run."""
    return {int(each.rstrip("q")): each.endswith("q") for each in (taken or "").split()}


def _queues(kind: str, conditions: Conditions, are_named: bool) -> TextualSelect:
    """`are_named`: these queues themselves, and not those behind them."""
    return _statement(kind, conditions.retries, conditions.have_numbers, are_named)


@cache
def _statement(kind: str, retries: bool, have_numbers: bool, are_named: bool) -> TextualSelect:
    source = json_rows.source([runs.c.task, runs.c.exclusive], kind)
    recursion = "" if are_named else f"{_recursion(source, retries)} "
    queues = (
        f"SELECT v.task, v.exclusive, 1 AS number, ({_taken_in('v', kind)}) AS taken FROM {source}"
        if are_named
        else f"SELECT w.task, w.exclusive, w.number, ({_taken_in('w', kind)}) AS taken FROM w "
        "WHERE w.exclusive IS NOT NULL"
    )
    first = queue_rows.first("exclusive = v.exclusive", ":each", retries)
    number = "(SELECT l.number FROM batch_limits l WHERE l.queue = v.exclusive)"
    head = ", ".join(f"r.{c.name}" for c in HEAD_COLUMNS)
    types = {} if are_named else {"size": Integer()}
    statement = sql.statement(
        f"{recursion}SELECT v.task, v.exclusive, v.taken, "
        f"{number if have_numbers else 'NULL'} AS lanes, {head} FROM ({queues}) AS v "
        f"LEFT JOIN batch_runs r ON {sql.among('r.id', first, kind)} "
        "ORDER BY v.task, v.number, v.exclusive, r.rank, r.due_at, r.id",
        each=Integer(),
        **types,
        **queue_rows.types(retries),
    )
    queue = [
        Column("of_task", runs.c.task.type),
        Column("queue", runs.c.exclusive.type),
        Column("taken", Text),
        Column("lanes", Integer),
    ]
    return statement.columns(*queue, *HEAD_COLUMNS)
