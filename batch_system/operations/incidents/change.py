"""What a person can do about incidents: acknowledge them, mute a task, and test the channels."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from batch_system.alerts.channels import Channels
from batch_system.batch.ledger import database_time, wakes
from batch_system.batch.ledger import tasks as task_rows
from batch_system.batch.ledger.incidents import acknowledging, outbox
from batch_system.batch.ledger.incidents.outbox import Note
from batch_system.batch.ledger.people import audit
from batch_system.errors import InvalidParameters, UnknownTask
from batch_system.escaping import echoed
from batch_system.operations.asking.context import Context
from batch_system.operations.incidents.ending import tell_followers, tell_followers_again
from batch_system.operations.incidents.notes import check_note
from batch_system.operations.incidents.read import find, shown
from batch_system.operations.incidents.results import (
    Acknowledged,
    Incident,
    Muted,
    SentTest,
    Unmuted,
)
from batch_system.operations.people.redacting import hidden_tasks

LONGEST_QUIET = timedelta(days=7)
LONGEST_MUTE = timedelta(days=31)


async def acknowledge(
    context: Context,
    incident: str,
    note: str,
    quiet_until: datetime | None = None,
    failed_until: datetime | None = None,
) -> Acknowledged:
    """Record that a person takes care of an open incident, and why. Its failed runs no longer count
    as open.

    An incident that is not about runs stays open until its cause is over. `quiet_until` (aware,
    7 days at most): until then, or the first success of the task, the same error opens no other
    incident. `failed_until` (aware), such as the `last_at` of the incident as the person saw it:
    only the runs that had failed by then are acknowledged; with `quiet_until`, those that failed
    since are acknowledged as well. Raises UnknownIncident, and InvalidParameters if the note is too
    short or too long, or the instant too late.
    """
    check_note(note)
    async with context.databases.changing() as connection:
        row = await find(connection, incident)
        now = await database_time.now_of(connection)
        if quiet_until is not None and not now < quiet_until <= now + LONGEST_QUIET:
            raise InvalidParameters("quiet_until: allowed is an instant within the next 7 days")
        bound = failed_until if quiet_until is None else None
        done = await acknowledging.acknowledge(
            connection, row.id, context.actor.name, note, quiet_until, now, bound
        )
        if done.is_new:
            after = {
                "runs": done.runs,
                "quiet_until": quiet_until.isoformat() if quiet_until else None,
            }
            await audit.record(
                connection,
                context.actor.by,
                "incident.acknowledge",
                now,
                task=row.task or None,
                target=row.id,
                after=after,
                note=note,
            )
        await tell_followers(connection, context, done.closed, now)
        acknowledged = shown(
            await find(connection, row.id), await hidden_tasks(connection, context)
        )
    return Acknowledged(incident=acknowledged, runs=done.runs, still_open=done.still_open)


async def reopen(context: Context, incident: str) -> Incident:
    """Undo an acknowledgement: its failed runs count as open again. Raises UnknownIncident."""
    async with context.databases.changing() as connection:
        row = await find(connection, incident)
        now = await database_time.now_of(connection)
        if await acknowledging.undo(connection, row.id, now):
            by, task = context.actor.by, row.task or None
            await audit.record(connection, by, "incident.reopen", now, task=task, target=row.id)
        reopened = await find(connection, row.id)
        if row.closed_at is not None and reopened.closed_at is None:
            await tell_followers_again(connection, context, reopened, now)
        return shown(reopened, await hidden_tasks(connection, context))


async def mute(context: Context, task: str, until: datetime, note: str | None = None) -> Muted:
    """Send nothing about a task until an instant (aware, 31 days at most).

    Incidents are still opened. Messages about those that are still open then are sent then. Raises
    UnknownTask and InvalidParameters.
    """
    async with context.databases.changing() as connection:
        now = await database_time.now_of(connection)
        if not now < until <= now + LONGEST_MUTE:
            raise InvalidParameters(
                "the end of a mute: allowed is an instant within the next 31 days"
            )
        if not await task_rows.mute(connection, task, until, context.actor.name, note):
            raise UnknownTask(f"the ledger knows no task {echoed(task)}")
        after = {"until": until.isoformat()}
        await audit.record(
            connection, context.actor.by, "task.mute", now, task=task, after=after, note=note
        )
        await wakes.catalog_changed(connection)
    return Muted(task=task, until=until, by=context.actor.name, note=note)


async def unmute(context: Context, task: str) -> Unmuted:
    """Send messages about a task again. Raises UnknownTask."""
    async with context.databases.changing() as connection:
        now = await database_time.now_of(connection)
        row = await task_rows.get(connection, task)
        if row is None:
            raise UnknownTask(f"the ledger knows no task {echoed(task)}")
        was_muted = row["muted_until"] is not None and row["muted_until"] > now
        await task_rows.mute(connection, task, None, None, None)
        if was_muted:
            await audit.record(connection, context.actor.by, "task.unmute", now, task=task)
            await wakes.catalog_changed(connection)
    return Unmuted(was_muted=was_muted)


async def send_test(context: Context, channels: Sequence[str] = ()) -> SentTest:
    """Write a test message to all channels of the settings, or to those of these names.

    Raises InvalidParameters if there is no such channel.
    """
    known = list(Channels.of(context.settings, checked=False).by_name)
    names = [
        name
        for name in known
        if not channels or name in channels or name.rpartition("/")[0] in channels
    ]
    if not names:
        raise InvalidParameters(
            f"there is no such channel; the settings have: {', '.join(known) or 'none'}"
        )
    async with context.databases.changing() as connection:
        now = await database_time.now_of(connection)
        content: dict[str, Any] = {
            "kind": "test",
            "text": f"{context.actor.name} has sent this to see whether messages arrive.",
        }
        await outbox.write(connection, [Note(name, "test", content) for name in names], now)
        await audit.record(
            connection, context.actor.by, "alerts.test", now, target=", ".join(names)
        )
    return SentTest(channels=names)
