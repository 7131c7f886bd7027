"""Which incidents are sent, by which channels, and when: as soon as nothing delays the message."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Row, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.incidents import problem as one_error
from batch_system.batch.incidents.deadlines import quiet_until
from batch_system.batch.incidents.watched import WatchedTask, WatchedTasks
from batch_system.batch.ledger import chains
from batch_system.batch.ledger.chains import KeptBack
from batch_system.batch.ledger.incidents import incidents as incident_rows
from batch_system.batch.ledger.incidents import outbox
from batch_system.batch.ledger.incidents.outbox import Note
from batch_system.batch.ledger.incidents.tables import OPEN_SQL, incidents
from batch_system.batch.ledger.states import Closed, IncidentKind

Channels = Callable[[Sequence[str]], Sequence[str]]
"""Returns the channels with the names in `Alerts(to=…)`; without names, the channels for all
tasks.
"""


COUNTED_AFTER = timedelta(seconds=5)
"""The message about an outage comes this much later than it was noticed, because its slots are
counted first.
"""

FLAPS_WITHIN, STEADY_AFTER = timedelta(minutes=10), timedelta(minutes=2)
"""An incident that opens again shortly after it was closed is sent only if it stays open for this
time.
"""

HIDDEN = "what its runs say is not sent, because the task has the tag secret"


def may_tell(
    opened: Sequence[Row[Any]], watched: WatchedTasks, every: timedelta, now: datetime
) -> tuple[datetime | None, bool]:
    """When a message about an open incident that is held back may be written, and whether one has
    to be written now.

    `every`: how long until incidents are told again; zero for never.
    """
    later, must = [], False
    for incident in opened:
        if incident.acknowledged_at is not None:
            continue
        if incident.told_at is not None:
            must = must or (bool(every) and incident.told_at <= now - every)
            continue
        task = watched.get(_task_of(incident))
        if (held_until := _told_from(incident, watched, now)) is not None:
            later.append(held_until)
        else:
            must = must or _is_enough(incident, task)
    return min(later, default=None), must


def _is_enough(incident: Row[Any], task: WatchedTask | None) -> bool:
    """Whether an error has occurred often enough to be told."""
    if task is None or incident.kind != IncidentKind.FAILED:
        return True
    return bool(incident._mapping["count"] >= task.after_failures)


async def tell(
    connection: AsyncConnection,
    watched: WatchedTasks,
    channels: Channels,
    now: datetime,
) -> tuple[int, datetime | None]:
    """Write messages about open incidents that were not told yet.

    Returns how many incidents were told, and when one that is held back may be told.

    A message is held back while its task is muted, in quiet hours, and until the error has occurred
    often enough.
    """
    query = select(incidents).where(
        text(OPEN_SQL), incidents.c.told_at.is_(None), incidents.c.acknowledged_at.is_(None)
    )
    waiting = sorted(
        await connection.execute(query), key=lambda incident: (incident.opened_at, incident.id)
    )
    flapping = await _flapping(connection, waiting, now)
    told, later = [], []
    for incident in waiting:
        task = watched.get(_task_of(incident))
        held_until = _told_from(incident, watched, now)
        if incident.id in flapping:
            held_until = max(held_until or now, incident.opened_at + STEADY_AFTER)
        if held_until is not None:
            later.append(held_until)
        elif _is_enough(incident, task):
            told.append(incident)
    if told:
        await outbox.write(
            connection, await _all_notes(connection, "opened", told, watched, channels), now
        )
        await incident_rows.told(connection, told, now)
    return len(told), min(later, default=None)


async def tell_of_the_end(
    connection: AsyncConnection,
    closed: Sequence[Row[Any]],
    watched: WatchedTasks,
    channels: Channels,
    now: datetime,
) -> None:
    """Write messages that incidents have ended, to the channels that were told of them.

    There is none about an outage, whose only message comes after its end. Messages are held back
    during a mute and in quiet hours.
    """
    notes: list[Note] = []
    for incident in closed:
        if incident.told_at is not None and incident.kind != IncidentKind.DOWN:
            task = watched.get(_task_of(incident))
            until = _held_until(task, watched, now)
            notes += [
                replace(note, not_before=until)
                for note in _notes("closed", incident, task, channels)
            ]
    await outbox.write(connection, notes, now)


async def tell_again(
    connection: AsyncConnection,
    reopened: Row[Any],
    watched: WatchedTasks,
    channels: Channels,
    now: datetime,
) -> None:
    """Write a message that an incident is open again, because a person has undone its
    acknowledgement.
    """
    await outbox.write(
        connection,
        await _all_notes(connection, "repeated", [reopened], watched, channels, now),
        now,
    )


async def repeat(
    connection: AsyncConnection,
    watched: WatchedTasks,
    channels: Channels,
    every: timedelta,
    now: datetime,
) -> int:
    """Write another message about open incidents whose last message is older than `every`. Returns
    how many.
    """
    query = select(incidents).where(
        text(OPEN_SQL), incidents.c.told_at <= now - every, incidents.c.acknowledged_at.is_(None)
    )
    due = [
        row
        for row in await connection.execute(query)
        if _held_until(watched.get(_task_of(row)), watched, now) is None
    ]
    if due:
        await outbox.write(
            connection, await _all_notes(connection, "repeated", due, watched, channels, now), now
        )
        await incident_rows.told(connection, due, now)
    return len(due)


def _task_of(incident: Row[Any]) -> str:
    """The task that an incident is about; empty if there is none."""
    return incident.task or (incident.details or {}).get("task") or ""


async def _flapping(
    connection: AsyncConnection, waiting: Sequence[Row[Any]], now: datetime
) -> set[str]:
    """Those of these incidents that have just begun, but also ended a short while ago.

    They are told only if they last. Otherwise a problem that comes and goes each minute would cause
    two messages each time.
    """
    young = {row.id: row for row in waiting if row.opened_at + STEADY_AFTER > now}
    if not young:
        return set()
    columns = [incidents.c[name] for name in ("kind", "task", "subject", "fingerprint")]
    closed = select(*columns).where(
        incidents.c.closed_at > now - FLAPS_WITHIN, incidents.c.told_at.is_not(None)
    )
    lately = {tuple(row) for row in await connection.execute(closed)}
    return {
        id
        for id, row in young.items()
        if (row.kind, row.task, row.subject, row.fingerprint) in lately
    }


def _told_from(incident: Row[Any], watched: WatchedTasks, now: datetime) -> datetime | None:
    """Until when the opening message of an incident is held back; None if it can be sent now."""
    counted: datetime = incident.opened_at + COUNTED_AFTER
    if incident.kind == IncidentKind.DOWN and counted > now:
        return counted
    return _held_until(watched.get(_task_of(incident)), watched, now)


def _held_until(task: WatchedTask | None, watched: WatchedTasks, now: datetime) -> datetime | None:
    """Until when messages about the task are held back; None if they can be sent now. Without a
    task, only a mute of all tasks holds them back.
    """
    mutes = watched.mutes_of_all if task is None else task.mutes
    instants = [window.ends_at for window in mutes if window.lasts_at(now)]
    if task is not None:
        instants += [task.muted_until, quiet_until(now, task.quiet, task.zone)]
    return max((each for each in instants if each is not None and each > now), default=None)


async def _all_notes(
    connection: AsyncConnection,
    kind: str,
    told: Sequence[Row[Any]],
    watched: WatchedTasks,
    channels: Channels,
    now: datetime | None = None,
) -> list[Note]:
    """The messages about these incidents. Those about failures also list the runs that these keep
    back.
    """
    errors = [(row.task, row.fingerprint) for row in told if row.kind == IncidentKind.FAILED]
    kept = await chains.kept_back_by_errors(connection, errors)
    notes: list[Note] = []
    for row in told:
        keeps = kept.get((row.task, row.fingerprint), ()) if row.kind == IncidentKind.FAILED else ()
        notes += _notes(kind, row, watched.get(_task_of(row)), channels, now, keeps)
    return notes


def _notes(
    kind: str,
    incident: Row[Any],
    task: WatchedTask | None,
    channels: Channels,
    now: datetime | None = None,
    keeps: Sequence[KeptBack] = (),
) -> list[Note]:
    content = content_of(incident, task, keeps)
    at = incident.closed_at if kind == "closed" else now  # these may come several times
    again = f" {at.isoformat()}" if at is not None else ""
    names = channels(task.to if task is not None else ())
    return [
        Note(name, kind, content, incident.id, f"{incident.id} {kind} {name}{again}")
        for name in names
    ]


def content_of(
    incident: Row[Any], task: WatchedTask | None, keeps: Sequence[KeptBack] = ()
) -> dict[str, Any]:
    """An incident as JSON, as it is now, from which messages about it are made. `keeps`: the runs
    that it keeps back.
    """
    is_secret = task is not None and task.is_secret
    instants = {name: getattr(incident, name) for name in ("opened_at", "last_at", "closed_at")}
    return {
        "id": incident.id,
        "kind": incident.kind,
        "task": _task_of(incident) or None,
        "subject": incident.subject or None,
        "fingerprint": incident.fingerprint or None,
        "text": HIDDEN if is_secret else incident.text,
        "is_secret": is_secret,
        "count": incident._mapping["count"],
        "run": incident.newest_run,
        "owner": task.owner if task is not None else None,
        "runbook": task.runbook if task is not None else None,
        "error": None if is_secret else one_error.key_in(incident.details),
        "why": incident.closed_why if incident.closed_why != Closed.OVER else None,
        "keeps_back": [asdict(each) for each in keeps],
        **{
            name: instant.isoformat() if instant is not None else None
            for name, instant in instants.items()
        },
    }
