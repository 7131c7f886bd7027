"""The queues of keys: which queues of a task with a limit have waiting runs, and the first runs of
each. They are found by one jump in the index for each queue, however many runs wait there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from sqlalchemy import Column, Integer, Text, select, text
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.sql.selectable import TextualSelect

from batch_system.batch.ledger import json_rows, queue_rows
from batch_system.batch.ledger.states import RunState
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


@dataclass
class Queue:
    """A queue with waiting runs: the first of them, and the lanes that runs hold, each with whether
    its run is queued because it goes on after its parts.
    """

    name: str
    taken: dict[int, bool]
    heads: list[Head]


async def read_queues(
    connection: AsyncConnection, after: Mapping[str, str], values: Mapping[str, Any], retries: bool
) -> dict[str, list[Queue]]:
    """The next queues of each task behind `after`, each with its first runs. `values`: `size`, how
    many queues; `each`, how many runs of each; and `now` with `retries`.
    """
    kind = connection.dialect.name
    rows = [{"task": task, "exclusive": queue} for task, queue in after.items()]
    parameters = {"rows": json_rows.encode(rows, kind), **values}
    found: dict[str, list[Queue]] = {task: [] for task in after}
    for task, name, taken, *head in await connection.execute(_queues(kind, retries), parameters):
        queues = found[task]
        if not queues or queues[-1].name != name:
            queues.append(Queue(name, _lanes(taken), []))
        if head[0] is not None:
            queues[-1].heads.append(Head(*head))
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


async def urgent(
    connection: AsyncConnection, tasks: Collection[str], most: int
) -> dict[str, list[Queue]]:
    """The queues of these tasks in which runs wait that go before the others of their queue, each
    with the first of these runs; the longest waiting first. At most `most` runs of each task are
    read.
    """
    kind = connection.dialect.name
    rows = json_rows.encode([{"task": task, "exclusive": ""} for task in tasks], kind)
    heads: dict[tuple[str, str], list[Head]] = {}
    for row in await connection.execute(_urgent(kind), {"rows": rows, "most": most}):
        head = Head(*row)
        heads.setdefault((head.task, head.exclusive or ""), []).append(head)
    taken: dict[str, dict[int, bool]] = {queue: {} for _, queue in heads}
    queues = json_rows.encode([{"exclusive": queue} for queue in taken], kind)
    for queue, lanes in await connection.execute(_taken(kind), {"rows": queues}):
        taken[queue] = _lanes(lanes)
    found: dict[str, list[Queue]] = {task: [] for task in tasks}
    for (task, queue), its in heads.items():
        found[task].append(Queue(queue, taken[queue], its))
    return found


@cache
def _urgent(kind: str) -> TextualSelect:
    source = json_rows.source([runs.c.task, runs.c.exclusive], kind)
    first = (
        f"SELECT q.id FROM batch_runs q WHERE q.task = v.task AND {HIGH_SQL} AND {not_held('q')} "
        "ORDER BY q.due_at LIMIT (SELECT :most)"
    )
    statement = sql.statement(
        f"SELECT {', '.join(f'r.{c.name}' for c in HEAD_COLUMNS)} FROM {source} "
        f"JOIN batch_runs r ON {sql.among('r.id', first, kind)} ORDER BY r.due_at, r.id",
        most=Integer(),
    )
    return statement.columns(*HEAD_COLUMNS)


@cache
def _taken(kind: str) -> TextualSelect:
    statement = sql.statement(
        f"SELECT v.exclusive, ({_taken_in('v', kind)}) AS taken "
        f"FROM {json_rows.source([runs.c.exclusive], kind)}"
    )
    return statement.columns(runs.c.exclusive, Column("taken", Text))


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


@cache
def _queues(kind: str, retries: bool) -> TextualSelect:
    source = json_rows.source([runs.c.task, runs.c.exclusive], kind)
    first = queue_rows.first("exclusive = v.exclusive", ":each", retries)
    head = ", ".join(f"r.{c.name}" for c in HEAD_COLUMNS)
    statement = sql.statement(
        f"{_recursion(source, retries)} SELECT v.task, v.exclusive, v.taken, {head} FROM "
        f"(SELECT w.task, w.exclusive, w.number, ({_taken_in('w', kind)}) AS taken FROM w "
        "WHERE w.exclusive IS NOT NULL) AS v "
        f"LEFT JOIN batch_runs r ON {sql.among('r.id', first, kind)} "
        "ORDER BY v.task, v.number, r.rank, r.due_at, r.id",
        size=Integer(),
        each=Integer(),
        **queue_rows.types(retries),
    )
    queue = Column("queue", runs.c.exclusive.type)
    return statement.columns(
        Column("of_task", runs.c.task.type), queue, Column("taken", Text), *HEAD_COLUMNS
    )
