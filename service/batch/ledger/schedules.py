"""Queries on schedules: which one each task has, and up to where its slots were handled."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Column, ColumnElement, Select, case, func, literal, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.cron.cron import Schedule, schedule
from service.batch.ledger import json_rows, tables
from service.batch.ledger.tables import new_id, schedules, tasks
from service.errors import InvalidSchedule


@dataclass(slots=True)
class OpenSchedule:
    """The schedule that a task has now, and up to where its slots were handled."""

    id: str
    task: str
    cron: str
    timezone: str
    fired_until: datetime
    paused_by: str | None
    valid_from: datetime

    @property
    def schedule(self) -> Schedule:
        """Raises InvalidSchedule where `is_usable` says no."""
        return schedule(self.cron, self.timezone)

    @property
    def is_usable(self) -> bool:
        """False for what another version wrote and this one can't read: a zone that is gone, say."""
        try:
            return self.schedule is not None
        except InvalidSchedule:
            return False


def _open() -> Select[Any]:
    paused_by = select(tasks.c.paused_by).where(tasks.c.name == schedules.c.task).scalar_subquery()
    return select(
        schedules.c.id,
        schedules.c.task,
        schedules.c.cron,
        schedules.c.timezone,
        schedules.c.fired_until,
        paused_by.label("paused_by"),
        schedules.c.valid_from,
    ).where(schedules.c.valid_until.is_(None))


def among(column: Column[Any], values: Iterable[Any], kind: str) -> ColumnElement[bool]:
    """`column` is one of `values`, in the form by which PostgreSQL looks into the index, however few rows there are."""
    listed = json_rows.among(column, values, kind)
    return column == func.any(func.array(listed.scalar_subquery())) if kind == "postgresql" else column.in_(listed)


async def open_schedules(connection: AsyncConnection) -> dict[str, OpenSchedule]:
    """All of them, by task. Reads, locks nothing."""
    return {row.task: OpenSchedule(*row) for row in await connection.execute(_open())}


async def lock_tasks(connection: AsyncConnection, names: Iterable[str] | None = None) -> None:
    """Lock these tasks, or all. On PostgreSQL: SQLite has one writer, which holds all.

    Whoever locks several rows takes tasks by their names, then schedules by their ids, then runs by theirs, so that
    nobody deadlocks. `catalog.record_tasks` locks tasks in this order too.
    """
    if (kind := connection.dialect.name) != "postgresql":
        return
    statement = select(tasks.c.name).order_by(tasks.c.name).with_for_update()
    if names is not None:
        statement = statement.where(among(tasks.c.name, names, kind))
    await connection.execute(statement)


async def lock(connection: AsyncConnection, names: Collection[str], wait: bool = False) -> list[OpenSchedule]:
    """Lock and return the open schedules of these tasks. Without `wait` those that another node holds are left out.

    With it their tasks are locked first (see `lock_tasks`); who does not wait may hold none of them.
    """
    if wait:
        await lock_tasks(connection, names)
    named = among(schedules.c.task, names, connection.dialect.name)
    statement = _open().where(named).order_by(schedules.c.id).with_for_update(of=schedules, skip_locked=not wait)
    return [OpenSchedule(*row) for row in await connection.execute(statement)]


async def still_open(connection: AsyncConnection, names: Iterable[str]) -> dict[str, OpenSchedule]:
    """The open schedules of these tasks, locked or not."""
    named = among(schedules.c.task, names, connection.dialect.name)
    return {row.task: OpenSchedule(*row) for row in await connection.execute(_open().where(named))}


async def move_cursors(connection: AsyncConnection, ids: Iterable[str], until: datetime) -> None:
    """Set `fired_until` of these schedules (by id), which this transaction has locked."""
    named = among(schedules.c.id, ids, connection.dialect.name)
    await connection.execute(update(schedules).where(named, schedules.c.fired_until < until).values(fired_until=until))


async def open_new(connection: AsyncConnection, wanted: Mapping[str, Schedule], node: str, now: datetime) -> None:
    """Give these tasks, which have no open schedule, theirs; slots count from now on.

    Or from where an earlier one ended, if that is later: a clock that was ahead has handled the slots up to there.
    """
    ends = await _ends_after(connection, wanted, now)
    new = [
        {
            "id": new_id(),
            "task": task,
            "cron": schedule.cron,
            "timezone": schedule.timezone,
            "valid_from": ends.get(task, now),
            "node": node,
            "fired_until": ends.get(task, now),
        }
        for task, schedule in wanted.items()
    ]
    await json_rows.insert(connection, schedules, new, "(task) WHERE valid_until IS NULL")
    named = among(tasks.c.name, wanted, connection.dialect.name)
    await connection.execute(update(tasks).where(named, tasks.c.accounted_from.is_(None)).values(accounted_from=now))


async def _ends_after(connection: AsyncConnection, names: Iterable[str], now: datetime) -> dict[str, datetime]:
    """When the last schedule of these tasks ended, for those where that is after `now`."""
    named = among(schedules.c.task, names, connection.dialect.name)
    last = select(schedules.c.task, func.max(schedules.c.valid_until).label("at"))
    ended = last.where(named, schedules.c.valid_until > now).group_by(schedules.c.task)
    return {row.task: row.at for row in await connection.execute(ended)}


async def close(connection: AsyncConnection, ids: Iterable[str], now: datetime) -> None:
    """Close these schedules (by id), which this transaction has locked, and whose slots are handled up to `now`.

    Or further, if a clock was ahead: then they end where their cursors are.
    """
    named = among(schedules.c.id, ids, connection.dialect.name)
    end = case(
        (schedules.c.fired_until > now, schedules.c.fired_until), else_=literal(now, schedules.c.fired_until.type)
    )
    await connection.execute(update(schedules).where(named).values(valid_until=end, fired_until=end))


async def history(connection: AsyncConnection, task: str) -> list[dict[str, Any]]:
    """The schedules that a task has had, oldest first."""
    statement = select(tables.schedules).where(schedules.c.task == task).order_by(schedules.c.valid_from)
    return [dict(row) for row in (await connection.execute(statement)).mappings()]
