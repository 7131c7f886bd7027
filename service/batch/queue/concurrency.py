"""Lanes: with max_running = k the queue of a task has k of them, and each holds one running run.

A lane is chosen when a run is taken, and the unique index on (exclusive, lane) decides races. It means nothing while
the run waits, so k may change from one deployment to the next. Only tasks with a rule of their own are looked at here:
those with several lanes, and those whose slots wait. For the others claims.py needs no more than one probe.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Boolean, Column, Integer, bindparam, text
from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.ledger import json_rows, queues
from service.batch.ledger.states import Rank, RunState
from service.batch.ledger.tables import RETRYING_SQL, RUNNING_SQL, WAITING_SQL, runs
from service.batch.tasks.registry import Task


@dataclass(frozen=True)
class Rule:
    """`waits`: a slot's run begins only after the end of those before it, their retries included."""

    lanes: int
    waits: bool


@dataclass(frozen=True)
class Candidate:
    """A run that is first in its queue, or one of the first."""

    id: str
    task: str
    priority: int
    rank: int
    due_at: datetime
    state: str
    lane: int = 1

    @property
    def place(self) -> tuple[int, int, datetime, str]:
        """Where it stands among those of other tasks: smaller goes first."""
        return -self.priority, self.rank, self.due_at, self.id


CANDIDATE_COLUMNS = [runs.c[name] for name in ("id", "task", "priority", "rank", "due_at", "state")]
_BLOCKED: Column[Any] = Column("blocked", Boolean)


def rules(tasks: Iterable[Task]) -> dict[str, Rule]:
    """The rules of those tasks that have one of their own."""
    return {
        task.name: Rule(task.lanes, task.policies.overlap == "wait")
        for task in tasks
        if task.policies.max_running is not None or task.policies.overlap == "wait"
    }


async def free(connection: AsyncConnection, lanes: Mapping[str, int]) -> dict[str, list[int]]:
    """The lanes of these queues that a run may take now. Fewer than are empty where more lanes were allowed before."""
    kind = connection.dialect.name
    # CROSS has SQLite begin with the names, and not with all that is running.
    statement = text(
        f"SELECT x.exclusive, x.lane FROM {json_rows.source([runs.c.task], kind)} CROSS JOIN batch_runs x "
        f"WHERE x.exclusive = v.task AND x.{RUNNING_SQL}"
    )
    parameter = {"rows": json_rows.encode([{"task": name} for name in lanes], kind)}
    taken: dict[str, set[int]] = {name: set() for name in lanes}
    for name, lane in await connection.execute(statement, parameter):
        taken[name].add(lane)
    return {name: empty(number, taken[name]) for name, number in lanes.items()}


def empty(lanes: int, taken: set[int]) -> list[int]:
    """The numbers that may be taken, smallest first."""
    left = [lane for lane in range(1, lanes + 1) if lane not in taken]
    return left[: max(0, lanes - len(taken))]


async def candidates(
    connection: AsyncConnection, rules: Mapping[str, Rule], now: datetime, limit: int, retries: bool = True
) -> list[Candidate]:
    """Of each queue the first runs that may start now, as many as its rule lets, each with its lane."""
    lanes = await free(connection, {name: rule.lanes for name, rule in rules.items()})
    lanes = {name: left for name, left in lanes.items() if left}
    waiting = {name: len(lanes[name]) for name, rule in rules.items() if rule.waits and name in lanes}
    if waiting:
        pending = await _pending(connection, waiting)
        waiting = {name: number - pending[name] for name, number in waiting.items()}
    most = min(limit, max(map(len, lanes.values()), default=0))
    chosen = []
    blocked = {name for name, number in waiting.items() if number < 1}
    for one in await _first(connection, lanes, blocked, now, most, retries):
        if one.task in waiting and (one.state, one.rank) == (RunState.QUEUED, Rank.ON_TIME):
            if waiting[one.task] < 1:
                continue
            waiting[one.task] -= 1
        if lanes[one.task]:
            chosen.append(Candidate(**{**vars(one), "lane": lanes[one.task].pop(0)}))
    return chosen


async def _pending(connection: AsyncConnection, names: Iterable[str]) -> Counter[str]:
    """How many on-time runs of each queue have begun and will go on: retrying ones, and interrupted ones."""
    kind = connection.dialect.name
    # The bare column would have PostgreSQL take the index on slots, and read all that the task has ever had.
    begun = (
        "SELECT count(*) FROM batch_runs q WHERE q.task = v.task AND q.exclusive = v.task "
        f"AND q.rank <= {Rank.ON_TIME} AND q.state <> 'queued' AND (q.origin || '') = 'schedule' "
        "AND NOT q.catch_up AND "
    )
    statement = text(
        f"SELECT v.task, ({begun}{WAITING_SQL}) + ({begun}{RETRYING_SQL}) AS number "
        f"FROM {json_rows.source([runs.c.task], kind)}"
    )
    parameter = {"rows": json_rows.encode([{"task": name} for name in names], kind)}
    return Counter({row.task: row.number for row in await connection.execute(statement, parameter)})


async def _first(
    connection: AsyncConnection, names: Iterable[str], blocked: set[str], now: datetime, most: int, retries: bool
) -> list[Candidate]:
    """The first `most` of each queue that are due; without the slots that wait, where the queue is blocked for them."""
    if most < 1:
        return []
    kind = connection.dialect.name
    may_start = f"(v.blocked IS NULL OR q.state <> 'queued' OR q.rank <> {Rank.ON_TIME})"
    first = queues.first("exclusive = v.task", ":most", retries, also=may_start)
    given = json_rows.source([runs.c.task, _BLOCKED], kind)
    statement = text(
        f"SELECT {', '.join(f'r.{c.name}' for c in CANDIDATE_COLUMNS)} "
        f"FROM {given} JOIN batch_runs r ON {queues.among('r.id', first, kind)} "
        "ORDER BY r.priority DESC, r.rank, r.due_at, r.id"
    ).bindparams(*queues.parameters(retries), bindparam("most", type_=Integer()))
    encoded = json_rows.encode([{"task": name, "blocked": name in blocked or None} for name in names], kind)
    parameters = {"rows": encoded, "most": most} | ({"now": now} if retries else {})
    return [Candidate(*row) for row in await connection.execute(statement.columns(*CANDIDATE_COLUMNS), parameters)]
