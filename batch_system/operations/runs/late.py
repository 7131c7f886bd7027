"""What is late or slow now: runs that take longer than usual, that wait, or that are tried again;
and why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from typing import Any

from sqlalchemy import Row, Select, bindparam, case, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.incidents.durations import Durations, UsualDurations
from batch_system.batch.incidents.forecast import ends_by_progress
from batch_system.batch.incidents.watched import WatchedTask, watched_tasks
from batch_system.batch.ledger import database_time, json_rows, pools, queue_rows
from batch_system.batch.ledger.states import RunState
from batch_system.batch.ledger.tables import HELD_SQL, RETRYING_SQL, runs, tasks
from batch_system.batch.ledger.tasks import SECRET_TAG
from batch_system.batch.tasks.limit import Queueing
from batch_system.database import sql
from batch_system.errors import UnknownRun
from batch_system.operations.asking.context import Context
from batch_system.operations.asking.results import Node
from batch_system.operations.runs import limit_blockers
from batch_system.operations.runs.awaited import awaited, blocked_runs
from batch_system.operations.runs.read import run_of
from batch_system.operations.runs.waiting import Blocker, LateRun, Waiting
from batch_system.operations.system.nodes import living_services

SHOWN_AFTER = timedelta(minutes=1)
"""Runs that have waited or run for less are not shown."""
SOON = timedelta(seconds=5)
"""A run that has waited for less may start at once, because a service looks for runs each second.
"""
FEW = 10
"""With fewer runs, twice the longest duration stands for the one that 95 of 100 runs stay
within.
"""
NEARLY = 0.8
"""A run is shown as slow after this share of its timeout."""

MOST_RETRYING = 200
"""At most this many runs that wait for their next attempt are shown."""
OF_A_TASK = 10
"""At most this many waiting runs of one task are shown."""

_COLUMNS = [
    runs.c[name]
    for name in (
        "id",
        "task",
        "slot",
        "state",
        "gate",
        "attempt",
        "created_at",
        "due_at",
        "started_at",
        "attempt_started_at",
        "count",
        "total",
        "rate",
        "progress_at",
        "exclusive",
    )
]


_began_to_wait = case((runs.c.gate.is_(None), runs.c.created_at), else_=runs.c.due_at)
"""When a run began to wait in the queue: when it was made, or, if it waited for other tasks, when
it was opened.
"""


@dataclass(frozen=True)
class Present:
    """The present state, from which blockers are found.

    `paused`: who has paused each task, by its name. `in_vain`: the pool of each task whose runs no
    node executes. `limits`: the queueing of each task with a limit. `secret`: those of
    these whose keys nobody sees.
    """

    connection: AsyncConnection
    now: datetime
    running: Mapping[str, Sequence[Row[Any]]]
    usual: UsualDurations
    paused: Mapping[str, str]
    in_vain: Mapping[str, str]
    nodes: Sequence[Node]
    limits: Mapping[str, Queueing]
    secret: frozenset[str]


async def late_runs(
    connection: AsyncConnection,
    living: Sequence[Node],
    now: datetime,
) -> list[LateRun]:
    """What is late or slow at `now`, the oldest first."""
    present = await _present(connection, living, now)
    names = list(present.running)
    timeouts = await _timeouts(connection, names) if names else {}
    watched = await watched_tasks(connection, names) if names else {}
    late = [
        slow
        for its in present.running.values()
        for run in its
        if (slow := await _slow(run, watched.get(run.task), timeouts.get(run.task), present))
        is not None
    ]
    before = {"before": now - SHOWN_AFTER}
    waiting = (await connection.execute(_waiting(connection.dialect.name), before)).all()
    late += [await _waits(row, present) for row in waiting]
    late += [_retries(row, now) for row in await connection.execute(_retrying(), before)]
    late += await blocked_runs(connection, late, now, SHOWN_AFTER)
    return sorted(late, key=lambda each: (-each.elapsed, each.run))


async def waiting(context: Context, given: str) -> Waiting:
    """Whether a run waits, and what for. Raises UnknownRun."""
    run = await run_of(context, given)
    async with context.databases.reading() as connection:
        assert connection is not None
        now = await database_time.now_of(connection)
        living = await living_services(connection, context, now)
        found = await waiting_of(connection, run, living, now)
    if found is None:
        raise UnknownRun(f"the run {run} was deleted just now")
    return found


async def waiting_of(
    connection: AsyncConnection, run: str, living: Sequence[Node], now: datetime
) -> Waiting | None:
    """Whether a run waits, and what for; None if there is no such run."""
    row = (await connection.execute(select(*_COLUMNS).where(runs.c.id == run))).first()
    if row is None:
        return None
    of_run = {"run": row.id, "task": row.task, "state": row.state}
    if row.state == RunState.WAITING:
        awaits = (await awaited(connection, [row.id], now)).get(row.id, [])
        return Waiting(**of_run, blocker=None, eta=None, awaits=awaits)
    if row.state not in (RunState.QUEUED, RunState.INTERRUPTED):
        return Waiting(**of_run, blocker=None, eta=None)
    found = await _waits(row, await _present(connection, living, now))
    return Waiting(**of_run, blocker=found.blocker, eta=found.eta)


async def blockers_of(
    connection: AsyncConnection, ids: Sequence[str], living: Sequence[Node], now: datetime
) -> dict[str, Blocker]:
    """What holds each of these queued runs, by its id. A run that nothing is known to hold is left
    out.
    """
    present = await _present(connection, living, now)
    theirs = json_rows.is_among(runs.c.id, ids, connection.dialect.name)
    rows = (await connection.execute(select(*_COLUMNS).where(theirs))).all()
    found = {row.id: await _blocker(row, present) for row in rows}
    return {run: blocker for run, blocker in found.items() if blocker is not None}


async def _present(connection: AsyncConnection, living: Sequence[Node], now: datetime) -> Present:
    running: dict[str, list[Row[Any]]] = {}
    held = (await connection.execute(select(*_COLUMNS).where(text(HELD_SQL)))).all()
    # With an ORDER BY, SQLite might read all runs.
    for row in sorted(held, key=lambda row: row.created_at):
        running.setdefault(row.task, []).append(row)
    is_paused = select(tasks.c.name, tasks.c.paused_by).where(tasks.c.paused_at.is_not(None))
    paused = {row.name: row.paused_by or "somebody" for row in await connection.execute(is_paused)}
    in_vain = {each.task: each.pool for each in await pools.in_vain(connection, now)}
    has_limit = select(tasks.c.name, tasks.c.policies, tasks.c.tags).where(
        tasks.c.queue.is_not(None)
    )
    limits, secret = {}, set()
    for row in await connection.execute(has_limit):
        limits[row.name] = Queueing.of_policies(row.name, row.policies)
        if isinstance(row.tags, list) and SECRET_TAG in row.tags:
            secret.add(row.name)
    usual = UsualDurations(connection, now)
    return Present(
        connection, now, running, usual, paused, in_vain, living, limits, frozenset(secret)
    )


@cache
def _waiting(kind: str) -> Select[Any]:
    """The first runs on time in the queue of each task that have waited for a while, whatever else
    waits there.

    If a run waited for other tasks before, its wait counts from when it was opened.
    """
    firsts = text(sql.among("batch_runs.id", queue_rows.first_on_time(OF_A_TASK), kind))
    return (
        select(*_COLUMNS)
        .where(firsts, _began_to_wait <= bindparam("before", type_=runs.c.created_at.type))
        .order_by(runs.c.created_at)
    )


@cache
def _retrying() -> Select[Any]:
    """The next retries, found by the index on when they are due, so that those of tomorrow are not
    read.
    """
    is_old = runs.c.created_at <= bindparam("before")
    return (
        select(*_COLUMNS)
        .where(text(RETRYING_SQL), is_old)
        .order_by(runs.c.due_at)
        .limit(MOST_RETRYING)
    )


async def _timeouts(connection: AsyncConnection, names: Sequence[str]) -> dict[str, float]:
    query = select(tasks.c.name, tasks.c.policies).where(tasks.c.name.in_(names))
    return {
        row.name: row.policies["timeout"]
        for row in await connection.execute(query)
        if isinstance(row.policies, dict) and row.policies.get("timeout")
    }


async def _slow(
    run: Row[Any], task: WatchedTask | None, timeout: float | None, present: Present
) -> LateRun | None:
    began = run.attempt_started_at or run.started_at
    if began is None or present.now - began < SHOWN_AFTER:
        return None
    elapsed = (present.now - began).total_seconds()
    usual = await present.usual.of_task(run.task)
    limit = _limit(usual)
    why: Any = None
    if limit is not None and elapsed > limit:
        why = "slow"
    elif timeout is not None and elapsed >= NEARLY * timeout:
        why = "timeout"
    elif task is not None and task.stalled_after is not None and run.progress_at is not None:
        still = (present.now - max(run.progress_at, began)).total_seconds()
        why = "stalled" if still >= task.stalled_after else None
    if why is None:
        return None
    return LateRun(
        run=run.id,
        task=run.task,
        slot=run.slot,
        state=run.state,
        why=why,
        elapsed=elapsed,
        p95=usual.p95,
        timeout=timeout,
        done=run._mapping["count"],  # `count` is a method of a row
        total=run.total,
        rate=run.rate,
        eta=_eta(run, usual, present.now),
        attempt=run.attempt,
    )


def _limit(usual: Durations) -> float | None:
    if usual.p95 is None or usual.longest is None:
        return None
    return usual.p95 if usual.runs >= FEW else 2 * usual.longest


def _eta(run: Row[Any], usual: Durations, now: datetime) -> datetime | None:
    """About when a running run ends: by its progress, else by what its task usually takes."""
    by_progress = ends_by_progress(run._mapping["count"], run.total, run.rate, now)
    if by_progress is not None:
        return by_progress
    began = run.attempt_started_at
    if usual.p50 is None or began is None:
        return None
    end: datetime = began + timedelta(seconds=usual.p50)
    return end if end > now else None


async def _waits(run: Row[Any], present: Present) -> LateRun:
    blocker = await _blocker(run, present)
    eta = None
    if blocker is not None and blocker.kind == "run":
        first = next(each for each in present.running[run.task] if each.id == blocker.run)
        usual = await present.usual.of_task(run.task)
        end = _eta(first, usual, present.now)
        eta = (
            end + timedelta(seconds=usual.p50)
            if end is not None and usual.p50 is not None
            else None
        )
    return LateRun(
        run=run.id,
        task=run.task,
        slot=run.slot,
        state=run.state,
        why="waits",
        elapsed=(present.now - _queued_at(run)).total_seconds(),
        eta=eta,
        blocker=blocker,
    )


async def _blocker(run: Row[Any], present: Present) -> Blocker | None:
    """The first thing that holds a waiting run."""
    if (by := present.paused.get(run.task)) is not None:
        return Blocker(kind="paused", by=by, task=run.task)
    if not any(run.task in node.tasks for node in present.nodes):
        return Blocker(kind="unserved", task=run.task)
    if (pool := present.in_vain.get(run.task)) is not None:
        return Blocker(kind="pool", task=run.task, pool=pool)
    if (queueing := present.limits.get(run.task)) is not None:
        held = await limit_blockers.blocker_of(
            present.connection,
            run,
            queueing,
            present.running,
            present.now,
            is_secret=run.task in present.secret,
        )
        if held is not None:
            return held
    elif run.exclusive is not None and (its := present.running.get(run.task)):
        return Blocker(kind="run", run=its[0].id, task=run.task)
    if run.due_at > present.now - SOON:  # the next poll of a service that has room starts it
        return None
    everything = [
        each
        for its in present.running.values()
        for each in its
        if each.attempt_started_at is not None
    ]
    longest = min(everything, key=lambda each: each.attempt_started_at, default=None)
    return Blocker(kind="room", run=longest.id, task=longest.task) if longest is not None else None


def _queued_at(run: Row[Any]) -> datetime:
    """Since when a run could have started, if known. A run that is retried was opened before it
    started.
    """
    at: datetime | None = run.created_at
    if run.gate is not None:
        at = run.started_at if run.state == RunState.RETRYING else run.due_at
    return at or run.created_at


def _retries(run: Row[Any], now: datetime) -> LateRun:
    return LateRun(
        run=run.id,
        task=run.task,
        slot=run.slot,
        state=RunState.RETRYING,
        why="retries",
        elapsed=(now - _queued_at(run)).total_seconds(),
        next_attempt_at=run.due_at,
        attempt=run.attempt,
    )
