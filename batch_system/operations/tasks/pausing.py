"""Pauses and resumes tasks."""

from __future__ import annotations

from datetime import datetime

from batch_system.batch.firing import pauses, task_sync
from batch_system.batch.firing.pauses import Pause
from batch_system.batch.ledger import database_time
from batch_system.batch.ledger import tasks as task_rows
from batch_system.batch.ledger.people import audit
from batch_system.errors import InvalidParameters, UnknownTask
from batch_system.escaping import echoed
from batch_system.operations.asking.context import Context
from batch_system.operations.tasks.results import Paused, Resumed, ResumedAhead


async def pause(
    context: Context, name: str, note: str | None = None, until: datetime | None = None
) -> Paused:
    """Stop firing a task, until it is resumed, or until an instant (aware). Returns the pause.

    For an existing pause, only the end is changed, if `until` is given. Raises UnknownTask and
    InvalidParameters.
    """
    async with context.databases.changing() as connection:
        now = await database_time.now_of(connection)
        if until is not None and until <= now:
            raise InvalidParameters("the end of a pause: allowed is an instant after now")
        loaded = context.loaded().tasks if context.node else pauses.NO_TASKS
        before = await pauses.pause(
            connection, name, context.actor.name, loaded, context.node, until
        )
        pause = await pauses.pause_of(connection, name)
        assert pause is not None
        if pause != before:
            after = {"until": until.isoformat()} if until is not None else None
            await audit.record(
                connection,
                context.actor.by,
                "task.pause",
                now,
                task=name,
                after=after,
                note=note,
            )
    return _paused(pause, is_new=before is None)


async def resume(context: Context, name: str, note: str | None = None) -> Resumed:
    """Fire a task again from now on: it was paused, or a clock ahead has fired its slots.
    Raises UnknownTask.
    """
    async with context.databases.changing() as connection:
        ended = await pauses.resume(connection, name)
        ahead = (await task_sync.set_back(connection, [name])).get(name)
        before = {"paused_at": ended.at.isoformat()} if ended is not None else {}
        before |= {"fired_until": ahead.isoformat()} if ahead is not None else {}
        if before:
            now, by = await database_time.now_of(connection), context.actor.by
            await audit.record(
                connection, by, "task.resume", now, task=name, before=before, note=note
            )
    return Resumed(
        ended=_paused(ended, is_new=True) if ended is not None else None, ahead_until=ahead
    )


async def resume_ahead(context: Context, note: str | None = None) -> ResumedAhead:
    """Fire all tasks again whose slots a clock ahead has fired. Returns up to which instant it
    had, by task.
    """
    async with context.databases.changing() as connection:
        ahead = await task_sync.set_back(connection)
        now, by = await database_time.now_of(connection), context.actor.by
        for name, until in sorted(ahead.items()):
            before = {"fired_until": until.isoformat()}
            await audit.record(
                connection, by, "task.resume", now, task=name, before=before, note=note
            )
    return ResumedAhead(tasks=dict(ahead))


async def pause_of(context: Context, name: str) -> Paused | None:
    """The pause of a task; None if it is not paused. Raises UnknownTask."""
    async with context.databases.reading() as connection:
        row = await task_rows.get(connection, name) if connection is not None else None
    if row is None:
        raise UnknownTask(f"the ledger knows no task {echoed(name)}")
    if row["paused_at"] is None:
        return None
    pause = Pause(row["paused_at"], row["paused_by"] or "somebody", row["paused_until"])
    return _paused(pause, is_new=False)


def _paused(pause: Pause, *, is_new: bool) -> Paused:
    return Paused(at=pause.at, by=pause.by, is_new=is_new, until=pause.until)
