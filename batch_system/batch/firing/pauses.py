"""Pauses: no slot of a task fires until a person resumes it, or until an instant.

A person pauses one task, or all tasks of a selection, now or from a later instant on: that is a
maintenance window.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from types import MappingProxyType

from sqlalchemy import case, func, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.firing.overdue_slots import fire_all_due, record_all_missed
from batch_system.batch.ledger import database_time, json_rows, schedules, waits
from batch_system.batch.ledger import maintenance as windows
from batch_system.batch.ledger import tasks as task_rows
from batch_system.batch.ledger.maintenance import MaintenanceWindow
from batch_system.batch.ledger.missed_ranges import Cause
from batch_system.batch.ledger.people import audit
from batch_system.batch.ledger.people.audit import By
from batch_system.batch.ledger.schedules import OpenSchedule
from batch_system.batch.ledger.states import MaintenanceKind
from batch_system.batch.ledger.tables import tasks
from batch_system.batch.ledger.wakes import catalog_changed
from batch_system.batch.tasks.registry import Task
from batch_system.database.engine import Database
from batch_system.errors import UnknownTask

NEVER = datetime.max.replace(tzinfo=UTC)
EARLY = timedelta(seconds=10)
"""A planned window is written this much before its beginning, so that it holds the slot at exactly
that instant. Until then its tasks fire.
"""


@dataclass(frozen=True)
class Pause:
    """A pause of a task: since when (UTC), by whom, and until when, if it ends by itself. `window`:
    the id of the maintenance window that has paused it.
    """

    at: datetime
    by: str
    until: datetime | None = None
    window: str | None = None

    def end(self, now: datetime) -> datetime:
        """The instant up to which it holds the task's slots, if it ends at `now`. A slot exactly at
        its end is not held.
        """
        if self.until is None or now < self.until:
            return now
        return self.until - timedelta(microseconds=1)


NO_TASKS: Mapping[str, Task] = MappingProxyType({})


async def pause(
    connection: AsyncConnection,
    name: str,
    by: str,
    loaded: Mapping[str, Task] = NO_TASKS,
    node: str = "",
    until: datetime | None = None,
) -> Pause | None:
    """Stop firing a task until a person resumes it, or until an instant. Raises UnknownTask.

    If a person has paused the task already, returns that pause, and changes only its end, if
    `until` is given. If a maintenance window has, the task no longer resumes with the window.

    Slots that are due already are handled first, by the policies of the task in `loaded`. If it is
    not loaded, its policies are unknown, and those slots are recorded as missed.
    """
    opened = await schedules.lock(connection, [name], wait=True)
    if await end_if_over(connection, name, opened, by):
        opened = await schedules.lock(connection, [name])
    before = await pause_of(connection, name)
    if before is not None and before.window is not None:
        taken = {"paused_by": by, "paused_until": until, "maintenance": None}
        await connection.execute(update(tasks).where(tasks.c.name == name).values(taken))
        await catalog_changed(connection)
        return None
    if before is not None:
        if until is not None and until != before.until:
            await connection.execute(
                update(tasks).where(tasks.c.name == name).values(paused_until=until)
            )
            await catalog_changed(connection)
        return before
    if name in loaded:
        now = await fire_all_due(connection, [name], loaded, node)
    else:
        now = await database_time.now_of(connection)
        await record_all_missed(connection, opened, now, _not_handled(by), Cause.OTHER)
    paused = {"paused_at": now, "paused_by": by, "paused_until": until}
    await connection.execute(update(tasks).where(tasks.c.name == name).values(paused))
    await catalog_changed(connection)
    return None


async def resume(connection: AsyncConnection, name: str) -> Pause | None:
    """Fire a task again from now on, and record the slots of the pause as missed. Raises
    UnknownTask.

    Returns the pause that has ended; None if the task was not paused.
    """
    opened = await schedules.lock(connection, [name], wait=True)
    if (before := await pause_of(connection, name)) is not None:
        await _end(connection, name, opened, before, await database_time.now_of(connection))
        await catalog_changed(connection)
    return before


@dataclass(frozen=True)
class Turned:
    """What `begin_and_end` has done: the windows that began, and the tasks that fire again."""

    begun: Sequence[MaintenanceWindow]
    resumed: Sequence[str]


async def begin_and_end(database: Database, loaded: Mapping[str, Task], node: str) -> Turned:
    """Begin the windows that are due, and end the pauses whose time is over, each in a
    transaction.
    """
    begun = await begin_due(database, loaded, node)
    async with database.reader.connect() as connection:
        now = await database_time.now_of(connection)
        names = await task_rows.pauses_over(connection, now)
        over = await windows.are_over(connection, now)
    resumed = [name for name in names if await _end_by_itself(database, name, node)]
    if over:
        async with database.engine.begin() as connection:
            await windows.end_over(connection, now)
            await catalog_changed(connection)
    return Turned(begun, resumed)


async def begin_due(
    database: Database, loaded: Mapping[str, Task], node: str
) -> list[MaintenanceWindow]:
    """Pause the tasks of the planned windows that begin now, or should have begun while no service
    was running. Returns these windows.
    """
    async with database.reader.connect() as connection:
        latest = await database_time.now_of(connection) + EARLY
        planned = await windows.open_windows(connection, MaintenanceKind.PAUSE)
    begun = []
    for window in planned:
        if window.begun_at is None and window.begins_at <= latest:
            async with database.engine.begin() as connection:
                if await begin(connection, window, loaded, node) is not None:
                    begun.append(window)
    return begun


async def begin(
    connection: AsyncConnection,
    window: MaintenanceWindow,
    loaded: Mapping[str, Task] = NO_TASKS,
    node: str = "",
) -> list[str] | None:
    """Pause the tasks of a window from its beginning on; those that are paused already keep their
    pause. Returns their names; None if another node has done so, or the window is over.

    Slots before its beginning are handled first, as in `pause`.
    """
    now = await database_time.now_of(connection)
    if not await windows.begin(connection, window.id, now):
        return None
    await schedules.lock_tasks(connection, await _names(connection, window))
    names = await _names(connection, window)  # another one may have been paused just now
    opened = await schedules.lock(connection, names, wait=True)
    before = min(now, window.begins_at - timedelta(microseconds=1))
    await fire_all_due(connection, set(names) & loaded.keys(), loaded, node, before)
    others = [row for row in opened if row.task not in loaded and row.fired_until < before]
    await record_all_missed(
        connection, others, before, _not_handled(window.created_by), Cause.OTHER
    )
    await _pause_for(connection, names, window, window.begins_at)
    await catalog_changed(connection)
    return names


async def join(connection: AsyncConnection, now: datetime) -> None:
    """Pause the tasks that the ledger got in this transaction, at `now`, if a window lasts that is
    about them.
    """
    lasting = await _lasting(connection, now)
    if not lasting:
        return
    new = select(tasks.c.name, tasks.c.pool, tasks.c.tags).where(
        tasks.c.first_seen_at == now, tasks.c.paused_at.is_(None)
    )
    for task in (await connection.execute(new.order_by(tasks.c.name))).all():
        if (window := _longest(lasting, task.pool, task.tags)) is not None:
            await _pause_for(connection, [task.name], window, now)


async def end_window(connection: AsyncConnection, window: MaintenanceWindow, now: datetime) -> bool:
    """End a window, or call off a planned one. Returns False if it is over already.

    A service resumes its tasks at once, one after the other, or when one starts. The slots from
    `now` on are fired.
    """
    if not await windows.change(connection, window.id, ended_at=now):
        return False
    await _set_end(connection, window, now)
    return True


async def change_end(
    connection: AsyncConnection, window: MaintenanceWindow, until: datetime | None
) -> bool:
    """Let a window end at another instant; None: when a person ends it. Returns False if it is
    over.
    """
    if not await windows.change(connection, window.id, ends_at=until):
        return False
    await _set_end(connection, window, until)
    return True


async def _set_end(
    connection: AsyncConnection, window: MaintenanceWindow, until: datetime | None
) -> None:
    of_window = select(tasks.c.name).where(tasks.c.maintenance == window.id)
    names = list((await connection.execute(of_window.order_by(tasks.c.name))).scalars())
    await schedules.lock_tasks(connection, names)
    theirs = json_rows.is_among(tasks.c.name, names, connection.dialect.name)
    await connection.execute(
        update(tasks).where(theirs, tasks.c.maintenance == window.id).values(paused_until=until)
    )
    await catalog_changed(connection)


async def next_change(connection: AsyncConnection, now: datetime) -> datetime:
    """When the next planned window has to be written or begins, or the next pause ends by itself;
    NEVER if none of them is known.
    """
    begins = case((tasks.c.paused_at > now, tasks.c.paused_at))
    row = (await connection.execute(select(func.min(begins), func.min(tasks.c.paused_until)))).one()
    instants = [*row, await windows.next_change(connection, EARLY)]
    return min((each for each in instants if each is not None), default=NEVER)


async def _names(connection: AsyncConnection, window: MaintenanceWindow) -> list[str]:
    """The tasks that a window is about, and that are not paused or removed."""
    query = select(tasks.c.name, tasks.c.pool, tasks.c.tags).where(
        tasks.c.paused_at.is_(None), tasks.c.removed_at.is_(None)
    )
    rows = await connection.execute(query.order_by(tasks.c.name))
    return [row.name for row in rows if window.is_about(row.pool, row.tags)]


async def _pause_for(
    connection: AsyncConnection, names: Iterable[str], window: MaintenanceWindow, at: datetime
) -> None:
    paused = {
        "paused_at": at,
        "paused_by": window.created_by,
        "paused_until": window.ends_at,
        "maintenance": window.id,
    }
    theirs = json_rows.is_among(tasks.c.name, names, connection.dialect.name)
    await connection.execute(update(tasks).where(theirs).values(paused))


async def _lasting(connection: AsyncConnection, now: datetime) -> list[MaintenanceWindow]:
    opened = await windows.open_windows(connection, MaintenanceKind.PAUSE)
    return [window for window in opened if window.begun_at is not None and window.lasts_at(now)]


def _longest(
    lasting: Iterable[MaintenanceWindow], pool: str, tags: Sequence[str] | None
) -> MaintenanceWindow | None:
    """The window about a task of this pool and with these tags that ends last."""
    about = [window for window in lasting if window.is_about(pool, tags)]
    return max(about, key=lambda window: window.ends_at or NEVER, default=None)


def _not_handled(by: str) -> str:
    return f"not handled yet when it was paused by {by}"


async def _end_by_itself(database: Database, name: str, node: str) -> bool:
    async with database.engine.begin() as connection:
        opened = await schedules.lock(connection, [name], wait=True)
        has_ended = await end_if_over(connection, name, opened, f"node {node}")
        if has_ended:
            await catalog_changed(connection)
        return has_ended


async def end_if_over(
    connection: AsyncConnection, name: str, opened: Iterable[OpenSchedule], actor: str
) -> bool:
    """End the pause of a task, whose schedule is locked, if the pause's time is over. Returns
    whether it ended now.
    """
    before, now = await pause_of(connection, name), await database_time.now_of(connection)
    if before is None or before.until is None or before.until > now:
        return False
    if before.window is None:  # the end of a window is an event of its own
        described = {"paused_at": before.at.isoformat(), "until": before.until.isoformat()}
        await audit.record(connection, By(actor), "task.resume", now, task=name, before=described)
    await _end(connection, name, opened, before, now)
    if lasting := await _lasting(connection, now):
        row = await task_rows.get(connection, name)
        assert row is not None
        if (window := _longest(lasting, row["pool"], row["tags"])) is not None:
            await _pause_for(connection, [name], window, before.until)
    return True


async def _end(
    connection: AsyncConnection,
    name: str,
    opened: Iterable[OpenSchedule],
    pause: Pause,
    now: datetime,
) -> None:
    reason, until = f"paused by {pause.by}", pause.end(now)
    opened, before = [*opened], pause.at - timedelta(microseconds=1)
    early = [row for row in opened if row.fired_until < before]
    await record_all_missed(connection, early, before, "no service fired it", Cause.DOWN)
    held = [replace(row, fired_until=max(row.fired_until, before)) for row in opened]
    held = [row for row in held if row.fired_until < until]
    await record_all_missed(connection, held, until, reason, Cause.PAUSED)
    await waits.extend(connection, name, now - pause.at, now)
    ended = dict.fromkeys(("paused_at", "paused_by", "paused_until", "maintenance"))
    await connection.execute(update(tasks).where(tasks.c.name == name).values(ended))


async def pause_of(connection: AsyncConnection, name: str) -> Pause | None:
    """The pause of a task, or None. Locks the row of the task. Raises UnknownTask."""
    columns = (tasks.c.paused_at, tasks.c.paused_by, tasks.c.paused_until, tasks.c.maintenance)
    query = select(*columns).where(tasks.c.name == name).with_for_update()
    row = (await connection.execute(query)).first()
    if row is None:
        raise UnknownTask.named(
            name, await task_rows.known(connection), "the ledger knows no task {}", "it knows:"
        )
    if row.paused_at is None:
        return None
    return Pause(row.paused_at, row.paused_by or "somebody", row.paused_until, row.maintenance)
