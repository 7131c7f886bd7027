"""SQL that finds runs that may start: the tasks that have such runs, and the first runs of a queue.

A long queue of a task that this node has not loaded, or that is paused, and retries that are due
tomorrow cost only a few index lookups. Runs that wait and runs that are retried later have an index
each, so there is a query for each. The names of the tasks are found by jumping from one to the next
in the index, by a recursive query.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from sqlalchemy import BindParameter, Column, TextClause, bindparam, text

from batch_system.batch.ledger import json_rows
from batch_system.batch.ledger.states import Rank, RunState, before
from batch_system.batch.ledger.tables import (
    READY_SQL,
    RETRYING_SQL,
    is_one_of,
    not_held,
    runs,
    tasks,
)

RANKS = (Rank.JOINING, Rank.INTERRUPTED, Rank.ON_TIME, Rank.MANUAL, Rank.CATCH_UP)

READY = READY_SQL
RETRIES = RETRYING_SQL


OF_POOLS = "coalesce((SELECT t.pool FROM batch_tasks t WHERE t.name = w.task), 'default') IN :pools"
"""The condition that the task `w.task` is of one of the pools in the parameter :pools, which is a
list.
"""


OF_SLOTS = (
    "exclusive = coalesce((SELECT t.queue FROM batch_tasks t WHERE t.name = v.task), v.task)",
    "exclusive IS NULL",
)
"""The conditions for the runs of slots of the task `v.task`: in their queue, or in none."""


HAS_LIMIT = "EXISTS (SELECT 1 FROM batch_tasks t WHERE t.name = v.task AND t.queue IS NOT NULL)"
"""The condition that the task `v.task` has a limit, and so many queues."""
READY_IN_ALL_QUEUES = f"FROM batch_runs q WHERE q.task = v.task AND {READY} AND {not_held('q')}"
"""The waiting runs of the task `v.task` that no pause holds, in all its queues."""


def names(condition: str, until_found: bool = False, of_pools: bool = False) -> str:
    """SQL for the names of the tasks that have runs of this condition which are not all held by a
    pause.

    `condition`: READY or RETRIES. `until_found`: only the first of these names. `of_pools`: only of
    tasks of the pools in the parameter :pools. The runs of other tasks are not read, however many
    there are.
    """
    # PostgreSQL would execute an EXISTS here as a join with all paused tasks.
    paused_at = "SELECT t.paused_at FROM batch_tasks t WHERE t.name = w.task"
    newest = f"SELECT max(y.created_at) FROM batch_runs y WHERE y.task = w.task AND {condition}"
    held = f"coalesce(({paused_at}) >= ({newest}), false)"
    if of_pools:
        held = f"({held} OR NOT {OF_POOLS})"
    following = f"SELECT min(r.task) FROM batch_runs r WHERE {condition} AND r.task > w.task"
    goes_on = f" AND {held}" if until_found else ""
    return (
        f"WITH RECURSIVE w(task) AS (SELECT min(task) FROM batch_runs WHERE {condition} UNION ALL "
        f"SELECT ({following}) FROM w WHERE w.task IS NOT NULL{goes_on}) "
        f"SELECT w.task FROM w WHERE w.task IS NOT NULL AND NOT {held}"
    )


def first(of: str, limit: str, retries: bool, also: str = "true", lock: str = "") -> str:
    """SQL for the ids of the first runs of the task `v.task` that may start, in their order.

    `of`: "exclusive = v.task" for the runs in the queue, or "exclusive IS NULL" for runs that are
    in no queue. `limit`: SQL for their number. `retries`: whether retries are due at :now. `also`:
    a further condition on the run `q`. `lock`: a locking clause.
    """
    shape = "SELECT q.id, q.rank, q.due_at FROM batch_runs q WHERE q.task = v.task AND q."
    may_start = f"{not_held('q')} AND {also}"
    # PostgreSQL has no statistics of READY_SQL, and expects fewer waiting runs than the limit.
    # So it would read and sort the whole queue. With a subquery as the limit, whose value is
    # unknown, it reads in the order of the index.
    order = f"ORDER BY q.exclusive, q.rank, q.due_at, q.id LIMIT (SELECT {limit}){lock}"
    parts = [f"{shape}{of} AND {READY_SQL} AND {may_start} {order}"]
    if retries:
        due = f"{RETRYING_SQL} AND q.due_at <= :now"
        parts += [
            f"{shape}{of} AND q.rank = {rank} AND {due} AND {may_start} {order}" for rank in RANKS
        ]
    if len(parts) == 1:
        return f"SELECT id FROM ({parts[0]}) AS heads"
    together = " UNION ALL ".join(
        f"SELECT * FROM ({part}) AS part{number}" for number, part in enumerate(parts)
    )
    return f"SELECT id FROM ({together}) AS heads ORDER BY rank, due_at, id LIMIT {limit}"


def first_on_time(limit: int) -> str:
    """SQL for the ids of the first runs on time in the queue of each task, however many others wait
    there.
    """
    following = f"SELECT min(r.task) FROM batch_runs r WHERE {READY} AND r.task > w.task"
    names = (
        f"(WITH RECURSIVE w(task) AS (SELECT min(task) FROM batch_runs WHERE {READY} UNION ALL "
        f"SELECT ({following}) FROM w WHERE w.task IS NOT NULL) SELECT w.task FROM w "
        "WHERE w.task IS NOT NULL) AS v"
    )
    shape = "SELECT q.id FROM batch_runs q WHERE q.task = v.task AND q."
    on_time = f"{READY} AND q.rank = {Rank.ON_TIME} AND q.slot IS NOT NULL"
    order = f"ORDER BY q.exclusive, q.rank, q.due_at, q.id LIMIT (SELECT {limit})"
    heads = [
        f"SELECT r.id FROM {names} JOIN batch_runs r ON r.id IN ({shape}{of} AND {on_time} {order})"
        for of in OF_SLOTS
    ]
    return " UNION ALL ".join(heads)


HAS_ITS_LANE = f"(state = '{RunState.QUEUED}' AND attempt > attempts_before)"
"""Runs that go on after their parts: they take the lane that they have."""
GOES_ON = f"state = '{RunState.INTERRUPTED}' OR {HAS_ITS_LANE}"
"""Runs that keep their attempt when they are claimed: interrupted ones, and those that go on after
their parts.
"""


def claimed(kind: str, has_lanes: bool) -> str:
    """The value of `lane` and the WHERE clause of `transitions.claim`. A run that has a lane keeps
    it.

    If only the first lane is used, there is no join, which would take quadratic time on SQLite.
    """
    may_start = is_one_of(before(RunState.RUNNING))
    condition = f"id IN (SELECT v.id FROM {json_rows.source([runs.c.id], kind)}) AND {may_start}"
    if kind == "postgresql":
        locked = f"SELECT id FROM batch_runs WHERE {condition} ORDER BY id FOR UPDATE SKIP LOCKED"
        condition = f"batch_runs.id = ANY(ARRAY({locked}))"
    if not has_lanes:
        return f"CASE WHEN {HAS_ITS_LANE} THEN lane ELSE 1 END WHERE {condition}"
    source = json_rows.source([runs.c.id, runs.c.lane], kind)
    condition = condition if kind == "postgresql" else may_start
    lane = f"CASE WHEN {HAS_ITS_LANE} THEN batch_runs.lane ELSE v.lane END"
    return f"{lane} FROM {source} WHERE batch_runs.id = v.id AND {condition}"


def names_of_pools(condition: str, pools: Collection[str], until_found: bool = False) -> TextClause:
    """The query of `names` for the tasks of these pools."""
    return text(names(condition, until_found, of_pools=True)).bindparams(of(pools))


def is_any(condition: str, pools: Collection[str] | None) -> TextClause:
    """Whether there is any such name. `pools`: only of tasks of these pools; None: of all tasks."""
    query = text(f"EXISTS ({names(condition, until_found=True, of_pools=pools is not None)})")
    return query if pools is None else query.bindparams(of(pools))


def of(pools: Collection[str]) -> BindParameter[Any]:
    """The parameter :pools."""
    return bindparam("pools", sorted(pools), expanding=True, type_=tasks.c.pool.type)


def types(retries: bool) -> dict[str, Column[Any]]:
    """The types of the parameters of the SQL that `first` returns."""
    return {"now": runs.c.due_at} if retries else {}
