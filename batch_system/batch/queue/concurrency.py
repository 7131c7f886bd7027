"""Lanes: with max_running = k, the queue of a task has k lanes, and each lane holds one running
run.

A lane is chosen when a run is claimed, and the unique index on (exclusive, lane) decides races. The
lane of a waiting run has no meaning, so k may change from one deployment to the next. This module
serves only tasks with a rule: those with `max_running`, and those whose slots wait for each other.
For other tasks, claiming.py reads one index entry.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Boolean, Column, Integer, text
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger import json_rows, limit_numbers, queue_rows
from batch_system.batch.ledger.states import Rank, RunState
from batch_system.batch.ledger.tables import HOLDS_LANE_SQL, READY_SQL, RETRYING_SQL, runs
from batch_system.batch.tasks.limit import Limit
from batch_system.batch.tasks.registry import Task
from batch_system.database import sql


@dataclass(frozen=True)
class Rule:
    """How many runs of a queue may run at once (`lanes`), and whether its slots wait for each other
    (`waits`).

    With `waits`, the run of a slot begins only when the runs of earlier slots have ended, including
    their retries. The runs belong to the task `task`. The queue has the name of the task, or
    `Task.queue_of_parts` for its parts.
    """

    lanes: int
    waits: bool
    task: str


@dataclass(slots=True)
class Head:
    """A run that is first in its queue, or among the first, and may start. `lane`: the lane that it
    may take, from 1. It is not frozen, because a look makes many, and that would take longer.
    """

    id: str
    task: str
    priority: int
    rank: int
    due_at: datetime
    state: str
    exclusive: str | None = None
    lane: int = 1

    @property
    def goes_on(self) -> bool:
        """Whether the run goes on after its parts. It has a lane already."""
        return (self.state, self.rank) == (RunState.QUEUED, Rank.JOINING)

    @property
    def sort_key(self) -> tuple[int, int, datetime, str]:
        """The order among the runs of all tasks: the smallest goes first."""
        return -self.priority, self.rank, self.due_at, self.id


HEAD_COLUMNS = [
    runs.c[name] for name in ("id", "task", "priority", "rank", "due_at", "state", "exclusive")
]
_BLOCKED: Column[Any] = Column("blocked", Boolean)


def rules(tasks: Iterable[Task]) -> dict[str, Rule]:
    """The rules by name of the queue, for queues that have one."""
    found = {}
    for task in tasks:
        if task.policies.max_running is not None or task.policies.overlap == "wait":
            found[task.name] = Rule(task.lanes, task.policies.overlap == "wait", task.name)
        if task.partition is not None:
            found[task.queue_of_parts] = Rule(task.partition.parallel, False, task.name)
    return found


async def numbers_of(
    connection: AsyncConnection, limit: Limit, queues: Collection[str]
) -> dict[str, int]:
    """How many runs of each of these queues of a limit may run at once. Without a function, it asks
    the ledger nothing.
    """
    numbers = dict.fromkeys(queues, limit.usual)
    if limit.is_dynamic and queues:
        numbers |= await limit_numbers.known(connection, queues)
    return numbers


async def free(connection: AsyncConnection, lanes: Mapping[str, int]) -> dict[str, list[int]]:
    """The lanes that a run may take now, smallest first, by name of the queue. `lanes`: the number
    of lanes of each queue.
    """
    taken = await _taken(connection, lanes)
    return {name: free_lanes(number, set(taken[name])) for name, number in lanes.items()}


async def _taken(connection: AsyncConnection, names: Iterable[str]) -> dict[str, dict[int, bool]]:
    """The lanes that runs hold, by name of the queue, each with whether its run is queued because
    it goes on after its parts.
    """
    kind = connection.dialect.name
    # With CROSS, SQLite reads the names first, and not all running runs.
    statement = text(
        f"SELECT x.exclusive, x.lane, x.state = '{RunState.QUEUED}' "
        f"FROM {json_rows.source([runs.c.exclusive], kind)} CROSS JOIN batch_runs x "
        f"WHERE x.exclusive = v.exclusive AND {HOLDS_LANE_SQL}"
    )
    parameter = {"rows": json_rows.encode([{"exclusive": name} for name in names], kind)}
    taken: dict[str, dict[int, bool]] = {name: {} for name in names}
    for name, lane, is_queued in await connection.execute(statement, parameter):
        taken[name][lane] = is_queued
    return taken


def free_lanes(lanes: int, taken: set[int], most: int | None = None) -> list[int]:
    """The numbers of the first `most` lanes that a run may take, smallest first; without `most`,
    of all of them.

    Lanes above `lanes` may be taken, too, if the limit was higher before. They count, so that at
    most `lanes` runs are running.
    """
    free = max(0, lanes - len(taken))
    if most is not None:
        free = min(free, most)
    return [lane for lane in range(1, free + len(taken) + 1) if lane not in taken][:free]


async def heads_by_rules(
    connection: AsyncConnection,
    rules: Mapping[str, Rule],
    now: datetime,
    limit: int,
    retries: bool = True,
) -> list[Head]:
    """The first runs of each queue in `rules` that may start now, as many as its rule allows, each
    with its lane.
    """
    taken = await _taken(connection, rules)
    lanes = {name: free_lanes(rule.lanes, set(taken[name])) for name, rule in rules.items()}
    own = {name: sum(taken[name].values()) for name in rules}
    lanes = {name: numbers for name, numbers in lanes.items() if numbers or own[name]}
    slots_left = {
        name: len(lanes[name]) for name, rule in rules.items() if rule.waits and name in lanes
    }
    if slots_left:
        pending = await _pending(connection, slots_left)
        slots_left = {name: number - pending[name] for name, number in slots_left.items()}
    most = min(limit, max((len(numbers) + own[name] for name, numbers in lanes.items()), default=0))
    chosen = []
    blocked = {name for name, number in slots_left.items() if number < 1}
    of_tasks = {name: rules[name].task for name in lanes}
    for head in await _first(connection, of_tasks, blocked, now, most, retries):
        queue = head.exclusive or head.task
        if head.goes_on:
            chosen.append(head)  # it keeps its lane
            continue
        if queue in slots_left and (head.state, head.rank) == (RunState.QUEUED, Rank.ON_TIME):
            if slots_left[queue] < 1:
                continue
            slots_left[queue] -= 1
        if lanes[queue]:
            head.lane = lanes[queue].pop(0)
            chosen.append(head)
    return chosen


async def _pending(connection: AsyncConnection, names: Iterable[str]) -> Counter[str]:
    """How many on-time runs of each queue have begun and will go on: those that are retrying or
    interrupted.
    """
    kind = connection.dialect.name
    # With the bare column, PostgreSQL would use the index on slots, and read all runs that the task
    # has ever had.
    begun = (
        "SELECT count(*) FROM batch_runs q WHERE q.task = v.task AND q.exclusive = v.task "
        f"AND q.rank <= {Rank.ON_TIME} AND q.state <> 'queued' AND (q.origin || '') = 'schedule' "
        "AND NOT q.catch_up AND "
    )
    statement = text(
        f"SELECT v.task, ({begun}{READY_SQL}) + ({begun}{RETRYING_SQL}) AS number "
        f"FROM {json_rows.source([runs.c.task], kind)}"
    )
    parameter = {"rows": json_rows.encode([{"task": name} for name in names], kind)}
    return Counter({row.task: row.number for row in await connection.execute(statement, parameter)})


async def _first(
    connection: AsyncConnection,
    tasks: Mapping[str, str],
    blocked: set[str],
    now: datetime,
    most: int,
    retries: bool,
) -> list[Head]:
    """The first `most` due runs of each queue. Queued on-time runs are left out for the queues in
    `blocked`.

    `tasks`: the task of each queue.
    """
    if most < 1:
        return []
    kind = connection.dialect.name
    may_start = f"(v.blocked IS NULL OR q.state <> 'queued' OR q.rank <> {Rank.ON_TIME})"
    first = queue_rows.first("exclusive = v.exclusive", ":most", retries, also=may_start)
    source = json_rows.source([runs.c.task, runs.c.exclusive, _BLOCKED], kind)
    statement = sql.statement(
        f"SELECT {', '.join(f'r.{c.name}' for c in HEAD_COLUMNS)} "
        f"FROM {source} JOIN batch_runs r ON {sql.among('r.id', first, kind)} "
        "ORDER BY r.priority DESC, r.rank, r.due_at, r.id",
        most=Integer(),
        **queue_rows.types(retries),
    )
    rows = [
        {"task": task, "exclusive": name, "blocked": name in blocked or None}
        for name, task in tasks.items()
    ]
    parameters = {"rows": json_rows.encode(rows, kind), "most": most} | (
        {"now": now} if retries else {}
    )
    return [
        Head(*row) for row in await connection.execute(statement.columns(*HEAD_COLUMNS), parameters)
    ]
