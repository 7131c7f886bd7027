"""Queries on missed ranges: slots that did not run, with the reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from sqlalchemy import Select, case, delete, func, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.cron.counting import count
from batch_system.batch.ledger import json_rows
from batch_system.batch.ledger.schedules import OpenSchedule
from batch_system.batch.ledger.tables import missed, new_id
from batch_system.concurrency.offload import offload
from batch_system.database import sql

_INSTANT = timedelta(microseconds=1)


class Cause(StrEnum):
    """Why slots did not run, as a word: no service handled them in time, a person paused the task,
    or its file is gone.
    """

    DOWN = "down"
    PAUSED = "paused"
    GONE = "gone"
    OTHER = "other"


@dataclass(frozen=True)
class MissedRange:
    """Consecutive slots of one task that do not run, and why. `first` and `last` are aware, and
    both belong to it.
    """

    first: datetime
    last: datetime
    count: int
    reason: str
    cause: Cause


async def record(
    connection: AsyncConnection, ranges: list[tuple[OpenSchedule, MissedRange]], now: datetime
) -> None:
    """Write missed ranges, each with the open schedule of its task.

    If a range follows the last range of its task without a gap, and has the same reason, that one
    is extended. This is not done across a change of schedule, since slots of the old schedule in
    between may have run; nor to a range that a person has left as it is, since it was not about
    these slots.
    """
    if not ranges:
        return
    newest = await _newest(connection, [row.task for row, _ in ranges])
    new_rows = []
    by_id = sorted(
        ranges, key=lambda pair: newest[pair[0].task].id if pair[0].task in newest else ""
    )
    for (
        row,
        missed_range,
    ) in by_id:  # by id, the order in which leaving ranges locks them: no deadlock
        last = newest.get(row.task)
        if (
            last is not None
            and last.reason == missed_range.reason
            and _follows(row, last.last_slot, missed_range.first)
            and await _extend(connection, last.id, missed_range)
        ):
            continue
        new_rows.append(_row_of(row.task, missed_range, now))
    await json_rows.insert(connection, missed, new_rows)


async def not_yet(connection: AsyncConnection, rows: Sequence[OpenSchedule], now: datetime) -> None:
    """Let the ranges of these open schedules end at `now`: a clock that was ahead has recorded
    slots after it.
    """
    by_task = {row.task: row for row in rows if row.is_usable}
    theirs = json_rows.is_among(missed.c.task, by_task, connection.dialect.name)
    query = select(missed).where(theirs, missed.c.last_slot > now).with_for_update()
    for found in (await connection.execute(query)).all():
        schedule, this = by_task[found.task].schedule, missed.c.id == found.id
        last = schedule.previous(now + _INSTANT)
        if last is None or last < found.first_slot:
            await connection.execute(delete(missed).where(this))
            continue
        number = await offload(count, schedule, found.first_slot - _INSTANT, last)
        unnoticed = case((missed.c.unnoticed > number, number), else_=missed.c.unnoticed)
        await connection.execute(
            update(missed).where(this).values(last_slot=last, count=number, unnoticed=unnoticed)
        )


async def _extend(connection: AsyncConnection, id: str, more: MissedRange) -> bool:
    """Extend a range. Returns False if a person has left it as it is."""
    extended = update(missed).where(missed.c.id == id, missed.c.left_at.is_(None))
    unnoticed = func.coalesce(missed.c.unnoticed, 0) + more.count
    values = {"last_slot": more.last, "count": missed.c.count + more.count, "unnoticed": unnoticed}
    return (await connection.execute(extended.values(values))).rowcount == 1


def _follows(row: OpenSchedule, last: datetime, first: datetime) -> bool:
    """Whether `first` is the next slot after `last` in this schedule."""
    return last > row.valid_from and last == row.schedule.previous(first)


def _row_of(task: str, missed_range: MissedRange, now: datetime) -> dict[str, Any]:
    return {
        "id": new_id(),
        "task": task,
        "first_slot": missed_range.first,
        "last_slot": missed_range.last,
        "count": missed_range.count,
        "unnoticed": missed_range.count,
        "reason": missed_range.reason,
        "cause": missed_range.cause,
        "created_at": now,
    }


async def _newest(connection: AsyncConnection, names: list[str]) -> dict[str, Any]:
    """The row of the last missed range of each task, by task."""
    kind = connection.dialect.name
    columns = [missed.c.id, missed.c.task, missed.c.reason, missed.c.last_slot]
    newest = (
        "SELECT (SELECT x.id FROM batch_missed x WHERE x.task = v.task "
        "ORDER BY x.last_slot DESC LIMIT 1) "
        f"FROM {json_rows.source([missed.c.task], kind)}"
    )
    statement = text(
        "SELECT m.id, m.task, m.reason, m.last_slot FROM batch_missed m "
        f"WHERE {sql.among('m.id', newest, kind)}"
    ).columns(*columns)
    parameter = {"rows": json_rows.encode([{"task": name} for name in names], kind)}
    return {row.task: row for row in await connection.execute(statement, parameter)}


def unchosen(
    names: Sequence[str], since: datetime, until: datetime, kind: str, *, is_left: bool
) -> Select[Any]:
    """A query for the ranges of these tasks within an interval (both ends included) that nobody has
    chosen.

    Its rows have `id`, `task`, `first_slot`, `last_slot` and the number of `slots`. `is_left`:
    whether the ranges are those that a person has left as they are, or the others. `kind`: that of
    the database.
    """
    last = missed.c.last_slot
    within = (
        json_rows.is_among(missed.c.task, names, kind),
        missed.c.first_slot >= since,
        last >= since,
        last <= until,
    )
    is_meant = missed.c.left_at.is_not(None) if is_left else missed.c.left_at.is_(None)
    columns = [missed.c[name] for name in ("id", "task", "first_slot", "last_slot")]
    query = select(*columns, missed.c.count.label("slots")).where(
        *within, missed.c.cause != Cause.PAUSED, is_meant
    )
    return query.order_by(missed.c.id)


async def leave(
    connection: AsyncConnection, ids: Sequence[str], by: str, note: str, now: datetime
) -> None:
    """Record that a person leaves these ranges as they are."""
    await _decide(connection, ids, {"left_at": now, "left_by": by, "left_note": note})


async def take_up(connection: AsyncConnection, ids: Sequence[str]) -> None:
    """Undo `leave`."""
    await _decide(connection, ids, dict.fromkeys(("left_at", "left_by", "left_note")))


async def _decide(connection: AsyncConnection, ids: Sequence[str], values: dict[str, Any]) -> None:
    theirs = json_rows.is_among(missed.c.id, ids, connection.dialect.name)
    await connection.execute(update(missed).where(theirs).values(values))


async def of_task(connection: AsyncConnection, task: str, limit: int) -> list[dict[str, Any]]:
    """The last missed ranges of a task, newest first, as rows by column name; at most `limit`."""
    newest = (
        select(missed).where(missed.c.task == task).order_by(missed.c.last_slot.desc()).limit(limit)
    )
    return [dict(row) for row in (await connection.execute(newest)).mappings()]
