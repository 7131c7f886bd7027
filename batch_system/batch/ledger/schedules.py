"""Queries on schedules: the open schedule of each task, and its cursor, up to which slots were
handled.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache
from typing import Any

from sqlalchemy import Select, case, delete, func, literal, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.cron.calendar import parted
from batch_system.batch.cron.cron import Schedule, schedule
from batch_system.batch.ledger import calendars, json_rows, tables
from batch_system.batch.ledger.tables import new_id, schedules, tasks
from batch_system.errors import InvalidSchedule

MOST_NAMED = 10
"""At most this many tasks with cursors later than now are named."""

NOTHING_WAITS: Mapping[str, tuple[dict[str, Any] | None, str | None]] = {}


@dataclass(slots=True)
class OpenSchedule:
    """The schedule that a task has now. `fired_until`: its cursor. Instants are aware.

    `paused_by`: who has paused the task; None: it is not paused. `paused_until`: when the pause
    ends by itself. `after`: what its runs wait for, as After.as_json has it. `follows`: the task
    whose schedule it copies. `paused_at`: when the pause begins, which may be in a moment.
    `given`: the expression as its author has written it, if that has an `H`.
    """

    id: str
    task: str
    cron: str
    timezone: str
    fired_until: datetime
    paused_by: str | None
    valid_from: datetime
    after: dict[str, Any] | None = None
    follows: str | None = None
    paused_until: datetime | None = None
    paused_at: datetime | None = None
    given: str | None = None

    def at(self, now: datetime) -> OpenSchedule:
        """The schedule as it is at an instant: without a pause that begins only later."""
        if self.paused_at is None or self.paused_at <= now:
            return self
        return replace(self, paused_by=None, paused_until=None, paused_at=None)

    @property
    def in_words(self) -> str:
        """The expression and the zone."""
        return f"{parted(self.cron)[0]} {self.timezone}"

    @property
    def schedule(self) -> Schedule:
        """The schedule object. Raises InvalidSchedule if `is_usable` is False."""
        return schedule(self.cron, self.timezone, self.given or "")

    @property
    def is_usable(self) -> bool:
        """Whether this version can read the expression and the zone, which another version may have
        written.
        """
        try:
            return self.schedule is not None
        except InvalidSchedule:
            return False


@cache
def _open() -> Select[Any]:
    paused_by, paused_until, paused_at = (
        select(column).where(tasks.c.name == schedules.c.task).scalar_subquery().label(column.name)
        for column in (tasks.c.paused_by, tasks.c.paused_until, tasks.c.paused_at)
    )
    return select(
        schedules.c.id,
        schedules.c.task,
        schedules.c.cron,
        schedules.c.timezone,
        schedules.c.fired_until,
        paused_by,
        schedules.c.valid_from,
        schedules.c.after,
        schedules.c.follows,
        paused_until,
        paused_at,
        schedules.c.given,
    ).where(schedules.c.valid_until.is_(None))


async def _read(connection: AsyncConnection, query: Select[Any]) -> list[OpenSchedule]:
    """The open schedules of a query, with the dates that they leave out."""
    found = [OpenSchedule(*row) for row in await connection.execute(query)]
    await calendars.read(connection, (row.cron for row in found))
    return found


async def open_schedules(connection: AsyncConnection) -> dict[str, OpenSchedule]:
    """All open schedules, by task. Locks nothing."""
    return {row.task: row for row in await _read(connection, _open())}


async def open_schedule(connection: AsyncConnection, task: str) -> OpenSchedule | None:
    """The open schedule of a task; None if it has none. Locks nothing."""
    return next(iter(await _read(connection, _open().where(schedules.c.task == task))), None)


@dataclass(frozen=True)
class ScheduleInUse:
    """A schedule, with the tasks that have it now: those that fire, and those that are paused."""

    schedule: Schedule
    firing: Set[str]
    paused: Set[str]

    @property
    def tasks(self) -> Set[str]:
        """All of them."""
        return self.firing | self.paused


async def in_use(connection: AsyncConnection) -> list[ScheduleInUse]:
    """The schedules of all tasks, each once. Those that this version can't read are left out."""
    names: dict[tuple[str, str], dict[bool, list[str]]] = {}
    rows = (await connection.execute(_in_use(connection.dialect.name))).all()
    await calendars.read(connection, (row.cron for row in rows))
    for row in rows:
        names.setdefault((row.cron, row.timezone), {})[bool(row.is_paused)] = row.collected
    used = []
    for (cron, timezone), its in names.items():
        with suppress(InvalidSchedule):  # another version of the service has written it
            read = schedule(cron, timezone)
            used.append(ScheduleInUse(read, {*its.get(False, ())}, {*its.get(True, ())}))
    return used


@cache
def _in_use(kind: str) -> Select[Any]:
    is_paused = tasks.c.paused_at.is_not(None).label("is_paused")
    columns = (schedules.c.cron, schedules.c.timezone, is_paused)
    return (
        select(*columns, json_rows.collected(schedules.c.task, kind))
        .select_from(schedules.join(tasks, tasks.c.name == schedules.c.task, isouter=True))
        .where(schedules.c.valid_until.is_(None))
        .group_by(*columns)
    )


async def lock_tasks(connection: AsyncConnection, names: Iterable[str] | None = None) -> None:
    """Lock the rows of these tasks; None: of all tasks. On SQLite nothing is done: it has one
    writer at a time.

    Each transaction that locks several rows locks tasks by name, then schedules by id, then runs by
    id, so that no two deadlock. `task_sync.record_tasks` locks tasks in this order too.
    """
    if (kind := connection.dialect.name) != "postgresql":
        return
    statement = select(tasks.c.name).order_by(tasks.c.name).with_for_update()
    if names is not None:
        statement = statement.where(json_rows.is_among(tasks.c.name, names, kind))
    await connection.execute(statement)


async def lock(
    connection: AsyncConnection, names: Collection[str], wait: bool = False
) -> list[OpenSchedule]:
    """Lock and return the open schedules of these tasks. Without `wait`, those that are locked
    elsewhere are left out.

    With `wait`, the rows of the tasks are locked first (see `lock_tasks`). Without `wait`, it waits
    for no lock, so the tasks need not be locked.
    """
    if wait:
        await lock_tasks(connection, names)
    is_meant = json_rows.is_among(schedules.c.task, names, connection.dialect.name)
    statement = (
        _open()
        .where(is_meant)
        .order_by(schedules.c.id)
        .with_for_update(of=schedules, skip_locked=not wait)
    )
    return await _read(connection, statement)


async def paused(connection: AsyncConnection, names: Collection[str], now: datetime) -> set[str]:
    """Those of these tasks that are paused at `now`, although `lock` may not have seen it. SQLite
    has one writer at a time.

    On PostgreSQL, `lock` does not see a pause that is committed while it executes.
    """
    if (kind := connection.dialect.name) != "postgresql":
        return set()
    query = select(tasks.c.name).where(
        json_rows.is_among(tasks.c.name, names, kind), tasks.c.paused_at <= now
    )
    return set((await connection.execute(query)).scalars())


async def still_open(connection: AsyncConnection, names: Iterable[str]) -> dict[str, OpenSchedule]:
    """The open schedules of these tasks, by task. Includes those that another transaction has
    locked.
    """
    is_meant = json_rows.is_among(schedules.c.task, names, connection.dialect.name)
    return {row.task: row for row in await _read(connection, _open().where(is_meant))}


async def move_cursors(connection: AsyncConnection, ids: Iterable[str], until: datetime) -> None:
    """Move the cursors (`fired_until`) of the schedules with these ids to `until`. The caller has
    locked them.
    """
    is_meant = json_rows.is_among(schedules.c.id, ids, connection.dialect.name)
    await connection.execute(
        update(schedules).where(is_meant, schedules.c.fired_until < until).values(fired_until=until)
    )


async def ahead(connection: AsyncConnection, limit: datetime) -> dict[str, datetime]:
    """The cursors that are later than `limit`, by task, without paused tasks. A clock that was
    ahead has moved them.
    """
    is_paused = (
        select(tasks.c.name)
        .where(tasks.c.name == schedules.c.task, tasks.c.paused_at.is_not(None))
        .exists()
    )
    is_later = (schedules.c.valid_until.is_(None), schedules.c.fired_until > limit)
    later = select(schedules.c.task, schedules.c.fired_until).where(*is_later, ~is_paused)
    return {row.task: row.fired_until for row in await connection.execute(later)}


def ahead_in_words(cursors: Mapping[str, datetime]) -> str:
    """The message about cursors that are later than now: what they mean, and what to do. There is
    at least one.
    """
    first, last = min(cursors.values()), max(cursors.values())
    names = ", ".join(sorted(cursors)[:MOST_NAMED]) + (", …" if len(cursors) > MOST_NAMED else "")
    fire = "1 task fires" if len(cursors) == 1 else f"{len(cursors):,} tasks fire"
    again = f"{_minute(first)} and {_minute(last)}" if first < last else f"{_minute(first)}"
    when = f"again {'between ' if first < last else 'after '}{again} UTC ({names})"
    return (
        f"the clock was ahead, up to {_minute(last)} UTC: {fire} {when}; `batch resume --ahead` "
        "lets them fire now"
    )


def _minute(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M}"


async def set_back(connection: AsyncConnection, names: Collection[str], now: datetime) -> None:
    """Set the cursors of these tasks that are later than `now` to `now`. The caller has locked
    their schedules.

    The slots after `now` count as not handled. Those that have a run do not get another one.
    Schedules that have ended after `now` end now, and those that were to begin later never were.
    """
    theirs = json_rows.is_among(schedules.c.task, names, connection.dialect.name)
    is_open = schedules.c.valid_until.is_(None)
    await connection.execute(
        delete(schedules).where(theirs, ~is_open, schedules.c.valid_from >= now)
    )
    for column in (schedules.c.valid_until, schedules.c.fired_until, schedules.c.valid_from):
        await connection.execute(
            update(schedules).where(theirs, column > now).values({column.name: now})
        )


async def following(connection: AsyncConnection, names: Collection[str]) -> dict[str, str]:
    """The tasks whose open schedules copy those of `names`, directly or by way of others, each with
    the one it follows.
    """
    found: dict[str, str] = {}
    asked = set(names)
    while asked:
        is_meant = json_rows.is_among(schedules.c.follows, asked, connection.dialect.name)
        query = select(schedules.c.task, schedules.c.follows).where(
            schedules.c.valid_until.is_(None), is_meant
        )
        new = {
            row.task: row.follows
            for row in await connection.execute(query)
            if row.task not in {*found, *names}
        }
        found |= new
        asked = set(new)
    return found


async def set_after(
    connection: AsyncConnection, row: str, after: dict[str, Any] | None, follows: str | None
) -> None:
    """Write what the runs of an open schedule wait for, and which task it follows. The caller has
    locked the row.
    """
    await connection.execute(
        update(schedules).where(schedules.c.id == row).values(after=after, follows=follows)
    )


async def set_given(connection: AsyncConnection, row: str, given: str | None) -> None:
    """Write how the author has written the expression of an open schedule. The caller has locked
    the row.
    """
    await connection.execute(update(schedules).where(schedules.c.id == row).values(given=given))


async def open_new(
    connection: AsyncConnection,
    new: Mapping[str, Schedule],
    node: str,
    now: datetime,
    waiting: Mapping[str, tuple[dict[str, Any] | None, str | None]] = NOTHING_WAITS,
) -> None:
    """Write the open schedules of tasks that have none. `new`: the schedules by the names of their
    tasks. Slots count from `now` on.

    `waiting`: the values of `after` and `follows` of tasks that wait for others. If an earlier
    schedule of a task ends later than `now`, slots count from that end: the slots before it were
    handled by a clock that was ahead.
    """
    await calendars.write(connection, (schedule.excluded for schedule in new.values()))
    ends = await _ends_after(connection, new, now)
    rows = [
        {
            "id": new_id(),
            "task": task,
            "cron": schedule.cron,
            "timezone": schedule.timezone,
            "valid_from": ends.get(task, now),
            "node": node,
            "fired_until": ends.get(task, now),
            "after": waiting.get(task, (None, None))[0],
            "follows": waiting.get(task, (None, None))[1],
            "given": schedule.given or None,
        }
        for task, schedule in new.items()
    ]
    await json_rows.insert(connection, schedules, rows, "(task) WHERE valid_until IS NULL")
    is_meant = json_rows.is_among(tasks.c.name, new, connection.dialect.name)
    await connection.execute(
        update(tasks).where(is_meant, tasks.c.accounted_from.is_(None)).values(accounted_from=now)
    )


async def _ends_after(
    connection: AsyncConnection, names: Iterable[str], now: datetime
) -> dict[str, datetime]:
    """The end of the last schedule of each of these tasks, for ends after `now`."""
    is_meant = json_rows.is_among(schedules.c.task, names, connection.dialect.name)
    last = select(schedules.c.task, func.max(schedules.c.valid_until).label("at"))
    ended = last.where(is_meant, schedules.c.valid_until > now).group_by(schedules.c.task)
    return {row.task: row.at for row in await connection.execute(ended)}


async def close(connection: AsyncConnection, ids: Iterable[str], now: datetime) -> None:
    """Close the schedules with these ids at `now`. The caller has locked them and handled their
    slots up to `now`.

    If a clock was ahead, a cursor may be later than `now`; then the schedule ends at its cursor.
    """
    is_meant = json_rows.is_among(schedules.c.id, ids, connection.dialect.name)
    end = case(
        (schedules.c.fired_until > now, schedules.c.fired_until),
        else_=literal(now, schedules.c.fired_until.type),
    )
    await connection.execute(
        update(schedules).where(is_meant).values(valid_until=end, fired_until=end)
    )


async def history(connection: AsyncConnection, task: str) -> list[dict[str, Any]]:
    """All schedules that a task has had, oldest first, as rows by column name."""
    statement = (
        select(tables.schedules).where(schedules.c.task == task).order_by(schedules.c.valid_from)
    )
    rows = [dict(row) for row in (await connection.execute(statement)).mappings()]
    await calendars.read(connection, (row["cron"] for row in rows))
    return rows
