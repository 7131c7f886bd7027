"""Missed slots that a person leaves as they are: nothing has to be done about them, and a note says
why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Row, Select, select
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger import database_time, missed_ranges
from batch_system.batch.ledger.people import audit
from batch_system.batch.ledger.tables import tasks
from batch_system.errors import InvalidParameters, WrongState
from batch_system.operations.asking.context import Context
from batch_system.operations.incidents.notes import check_note
from batch_system.operations.runs.read import refuse_unknown_task
from batch_system.operations.slots.results import LeftSlots

MOST_RANGES = 10_000


async def look(context: Context, since: datetime, until: datetime, task: str | None) -> LeftSlots:
    """What `leave` would leave as it is. Nothing is changed."""
    return _counted(await unchosen(context, since, until, task))


async def unchosen(
    context: Context, since: datetime, until: datetime, task: str | None
) -> Sequence[Row[Any]]:
    """The missed ranges that `leave` would cover: rows with `task`, `first_slot`, `last_slot` and
    `slots`.
    """
    async with context.databases.reading() as connection:
        if connection is None:
            return []
        return await _all(connection, await _query(connection, since, until, task, is_left=False))


async def leave(
    context: Context,
    since: datetime,
    until: datetime,
    note: str | None,
    task: str | None,
    slots: int | None,
) -> LeftSlots:
    """Record that nothing has to be done about missed slots, and why: Night no longer asks to watch
    them.

    It covers the missed ranges that lie within `since` and `until` (aware, both included), of all
    tasks or of one, except those that a pause has caused or that were left before. `slots`: how
    many the caller has seen; if the number has changed, it raises WrongState. Raises
    InvalidParameters if the note is too short or too long, and UnknownTask. With `dry_run` nothing
    is changed, and no note is needed.
    """
    note = check_note(note)
    async with context.databases.changing() as connection:
        ranges = await _all(
            connection, _locked(await _query(connection, since, until, task, is_left=False))
        )
        left = _counted(ranges)
        if slots is not None and left.slots not in (0, slots):
            raise WrongState(
                f"there are {left.slots:,} such slots by now, not {slots:,}: look at them again"
            )
        now = await database_time.now_of(connection)
        await missed_ranges.leave(
            connection, [row.id for row in ranges], context.actor.name, note, now
        )
        await _record(connection, context, "slots.leave", left, (since, until), note)
    return left


async def reopen(context: Context, since: datetime, until: datetime, task: str | None) -> LeftSlots:
    """Undo `leave` for the missed ranges within an interval. Raises UnknownTask."""
    async with context.databases.changing() as connection:
        ranges = await _all(
            connection, _locked(await _query(connection, since, until, task, is_left=True))
        )
        await missed_ranges.take_up(connection, [row.id for row in ranges])
        found = _counted(ranges)
        await _record(connection, context, "slots.reopen", found, (since, until), None)
    return found


async def _query(
    connection: AsyncConnection,
    since: datetime,
    until: datetime,
    task: str | None,
    *,
    is_left: bool,
) -> Select[Any]:
    if task is not None:
        await refuse_unknown_task(connection, task)
    names = (
        [task]
        if task is not None
        else (await connection.execute(select(tasks.c.name))).scalars().all()
    )
    return missed_ranges.unchosen(names, since, until, connection.dialect.name, is_left=is_left)


def _locked(query: Select[Any]) -> Select[Any]:
    """Waits for transactions that are noticing or extending one of the ranges, and then sees their
    changes.
    """
    return query.with_for_update()


async def _all(connection: AsyncConnection, query: Select[Any]) -> Sequence[Row[Any]]:
    rows: Sequence[Row[Any]] = (await connection.execute(query.limit(MOST_RANGES + 1))).all()
    if len(rows) > MOST_RANGES:
        raise InvalidParameters(
            f"there are more than {MOST_RANGES:,} missed ranges: name a task, or a shorter interval"
        )
    return rows


def _counted(ranges: Sequence[Row[Any]]) -> LeftSlots:
    by_task: Counter[str] = Counter()
    for row in ranges:
        by_task[row.task] += row.slots
    return LeftSlots(slots=by_task.total(), tasks=dict(by_task.most_common()))


async def _record(
    connection: AsyncConnection,
    context: Context,
    action: str,
    changed: LeftSlots,
    interval: tuple[datetime, datetime],
    note: str | None,
) -> None:
    if not changed.slots:
        return
    since, until = (instant.isoformat() for instant in interval)
    after = {"slots": changed.slots, "tasks": len(changed.tasks), "since": since, "until": until}
    task = next(iter(changed.tasks)) if len(changed.tasks) == 1 else None
    now = await database_time.now_of(connection)
    await audit.record(connection, context.actor.by, action, now, task=task, after=after, note=note)
