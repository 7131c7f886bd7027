"""Problems without a row of their own: late slots, slow runs, silent tasks, old backups, limits
whose functions fail, cursors that are ahead.

Each function returns what is wrong now. The watch opens an incident for each problem without one,
and closes those whose problem is gone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Row, func, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.incidents.durations import UsualDurations
from batch_system.batch.incidents.watched import Thresholds, WatchedTask
from batch_system.batch.ledger import limit_numbers, queue_rows, schedules
from batch_system.batch.ledger.incidents.incidents import Opening
from batch_system.batch.ledger.states import IncidentKind, Rank, RunState
from batch_system.batch.ledger.tables import HELD_SQL, backups, runs
from batch_system.batch.nodes.clock_steps import AHEAD
from batch_system.database import sql

BACKUP_TASK = "backup"
LIMIT_PATIENCE = timedelta(minutes=10)
"""How long the function of a limit may fail until that is an incident."""

_WAITING_TASKS = f"({queue_rows.names(queue_rows.READY)}) AS v"
_ON_TIME = f"q.rank = {Rank.ON_TIME} AND q.slot IS NOT NULL"
_FIRST_ON_TIME = " UNION ALL ".join(
    f"SELECT ({queue_rows.first(of, '1', False, also=_ON_TIME)}) FROM {_WAITING_TASKS}"
    for of in queue_rows.OF_SLOTS
)
"""The ids of the first on-time runs in the queue of each task that has due runs and is not
paused.
"""

_WAITING_COLUMNS = [runs.c[name] for name in ("id", "task", "slot", "due_at")]
_RUNNING_COLUMNS = [
    runs.c[name]
    for name in ("id", "task", "node", "attempt_started_at", "progress_at", "count", "total")
]


async def late_slots(
    connection: AsyncConnection,
    watched: Mapping[str, WatchedTask],
    thresholds: Thresholds,
    now: datetime,
) -> list[Opening]:
    """The tasks with a run of a slot that has waited too long for its start. Runs that a pause
    holds are not late.

    For each task it reads the first on-time run in the queue, however many others wait there.
    """
    among = sql.among("r.id", _FIRST_ON_TIME, connection.dialect.name)
    query = text(f"SELECT r.id, r.task, r.slot, r.due_at FROM batch_runs r WHERE {among}").columns(
        *_WAITING_COLUMNS
    )
    openings = {}
    for row in await connection.execute(query):
        task = watched.get(row.task)
        late_after = (
            task.late_after
            if task is not None and task.late_after is not None
            else thresholds.late_after
        )
        if row.due_at + timedelta(seconds=late_after) <= now:
            openings[row.task] = Opening(
                IncidentKind.LATE,
                f"its slot {row.slot:%Y-%m-%d %H:%M} UTC has not started after "
                f"{in_words(now - row.due_at)}",
                now,
                task=row.task,
                newest_run=row.id,
                details={"slot": row.slot.isoformat()},
            )
    return list(openings.values())


async def slow_runs(
    connection: AsyncConnection,
    watched: Mapping[str, WatchedTask],
    usual: UsualDurations,
    thresholds: Thresholds,
    blocked: Collection[str],
    now: datetime,
) -> list[Opening]:
    """The runs that take much longer than usual, or have made no progress for too long.

    `blocked`: nodes whose event loop stands still. That explains why their runs are slow.
    """
    query = select(*_RUNNING_COLUMNS).where(text(HELD_SQL), runs.c.attempt_started_at.is_not(None))
    openings = []
    for run in await connection.execute(query):
        if run.node in blocked:
            continue
        why = await _why_slow(usual, run, watched.get(run.task), thresholds, now)
        if why is not None:
            openings.append(
                Opening(
                    IncidentKind.SLOW, why, now, task=run.task, subject=run.id, newest_run=run.id
                )
            )
    return openings


async def _why_slow(
    usual: UsualDurations,
    run: Row[Any],
    task: WatchedTask | None,
    thresholds: Thresholds,
    now: datetime,
) -> str | None:
    age = now - run.attempt_started_at
    if task is not None and task.stalled_after is not None and run.progress_at is not None:
        still = now - max(run.progress_at, run.attempt_started_at)
        if still >= timedelta(seconds=task.stalled_after):
            return f"it has made no progress for {in_words(still)}"
    if task is not None and task.slow_after is not None:
        limit, others = task.slow_after, ""
    elif age.total_seconds() < thresholds.least_slow:
        return None
    else:
        taken = await usual.of_task(run.task)
        if taken.p95 is None:
            return None
        limit = max(thresholds.least_slow, thresholds.slow_factor * taken.p95)
        others = f"; 95 of 100 runs take at most {in_words(timedelta(seconds=max(1.0, taken.p95)))}"
    return f"it has run for {in_words(age)}{others}" if age.total_seconds() >= limit else None


async def silent_tasks(
    watched: Mapping[str, WatchedTask], usual: UsualDurations, now: datetime
) -> tuple[list[Opening], datetime | None]:
    """The tasks without a success for longer than they expect, and when the next one may follow.
    Paused tasks don't count.
    """
    openings, instants = [], []
    for task in watched.values():
        if task.expect_every is None or task.is_paused or task.is_removed:
            continue
        taken = await usual.of_task(task.name, fresh=timedelta(0))
        last = taken.last_success_at or task.first_seen_at
        limit = last + timedelta(seconds=task.expect_every)
        if limit > now:
            instants.append(limit)
            continue
        never = "" if taken.last_success_at else ", and none is known"
        text = f"no run has succeeded for {in_words(now - last)}{never}"
        openings.append(Opening(IncidentKind.SILENT, text, now, task=task.name))
    return openings, min(instants, default=None)


def forgotten_pauses(
    watched: Mapping[str, WatchedTask], thresholds: Thresholds, now: datetime
) -> tuple[list[Opening], datetime | None]:
    """The pauses without an end that last for long, and when the next one will. A pause of many
    tasks is one of them.
    """
    if not thresholds.paused_after:
        return [], None
    openings: dict[str, Opening] = {}
    instants = []
    for task in watched.values():
        if task.paused_at is None or task.paused_until is not None or task.is_removed:
            continue
        limit = task.paused_at + timedelta(seconds=thresholds.paused_after)
        if limit > now:
            instants.append(limit)
            continue
        text = f"paused by {task.paused_by or 'somebody'} for {in_words(now - task.paused_at)}"
        if task.maintenance is None:
            text = f"{text}; `batch resume {task.name}` lets it fire"
            openings[task.name] = Opening(IncidentKind.PAUSED, text, now, task=task.name)
        else:
            text = f"many tasks are {text}; `batch maintenance list` shows which"
            subject = task.maintenance
            openings[subject] = Opening(IncidentKind.PAUSED, text, now, subject=subject)
    return list(openings.values()), min(instants, default=None)


async def old_backups(
    connection: AsyncConnection,
    watched: Mapping[str, WatchedTask],
    thresholds: Thresholds,
    now: datetime,
) -> tuple[list[Opening], datetime | None]:
    """The incident of a newest verified backup that is too old, and when it will be too old. Only
    if backups are made.
    """
    task = watched.get(BACKUP_TASK)
    if task is None or task.is_removed or task.is_paused:
        return [], None
    newest = (
        await connection.execute(select(func.max(backups.c.taken_at)).where(_IS_GOOD))
    ).scalar()
    limit = (newest or task.first_seen_at) + timedelta(seconds=thresholds.backup_after)
    if limit > now:
        return [], limit
    text = (
        f"the newest verified backup is {in_words(now - newest)} old"
        if newest
        else "there is no verified backup yet"
    )
    return [Opening(IncidentKind.BACKUP, text, now, task=BACKUP_TASK)], None


_IS_GOOD = backups.c.verified_at.is_not(None) & backups.c.failed_at.is_(None)


async def failing_limits(
    connection: AsyncConnection, watched: Mapping[str, WatchedTask], now: datetime
) -> list[Opening]:
    """The incidents of tasks the function of whose limit has failed for long."""
    failing = await limit_numbers.failing(connection, now, LIMIT_PATIENCE)
    return [
        Opening(
            IncidentKind.LIMIT,
            f"the function of its limit has failed for {in_words(now - each.since)} for "
            f"{each.keys:,} key{'' if each.keys == 1 else 's'}, whose last numbers hold: "
            f"{each.error}",
            now,
            task=task,
        )
        for task, each in failing.items()
        if task in watched and not watched[task].is_removed
    ]


async def cursors_ahead(connection: AsyncConnection, now: datetime) -> list[Opening]:
    """The incident of tasks that don't fire, because a clock that was ahead has handled their
    slots.
    """
    ahead = await schedules.ahead(connection, now + AHEAD)
    if not ahead:
        return []
    return [Opening(IncidentKind.CLOCK, schedules.ahead_in_words(ahead), now, count=len(ahead))]


async def newer_good_backups(
    connection: AsyncConnection, places: Mapping[str, datetime]
) -> set[str]:
    """Those of these places that have a verified backup taken after the instant given for the
    place.
    """
    good = set()
    for place, since in places.items():
        query = (
            select(backups.c.name)
            .where(backups.c.place == place, backups.c.taken_at > since, _IS_GOOD)
            .limit(1)
        )
        if (await connection.execute(query)).first() is not None:
            good.add(place)
    return good


async def are_running(connection: AsyncConnection, ids: list[str]) -> set[str]:
    """Those of these runs that are running."""
    query = select(runs.c.id).where(runs.c.id.in_(ids), runs.c.state == RunState.RUNNING)
    return set((await connection.execute(query)).scalars())


def in_words(age: timedelta) -> str:
    """A length of time for people, such as "12 minutes"."""
    seconds = max(0, round(age.total_seconds()))
    for size, unit in ((86_400, "days"), (3_600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit}"
    return f"{seconds} second{'' if seconds == 1 else 's'}"
