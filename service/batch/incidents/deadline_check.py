"""Checks the deadlines of slots: which have passed, and which of those slots have not succeeded."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime, timedelta
from itertools import islice

from sqlalchemy import select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.cron.cron import Schedule
from service.batch.incidents.deadlines import DAY, deadline_of
from service.batch.incidents.watched import WatchedTask
from service.batch.ledger import json_rows, schedules
from service.batch.ledger.incidents.incidents import Opening
from service.batch.ledger.schedules import OpenSchedule
from service.batch.ledger.states import IncidentKind, RunState
from service.batch.ledger.tables import OF_SLOT_SQL, runs, tasks
from service.concurrency.offload import offload

MOST_SLOTS = 1_000
"""How many slots of a task are checked at a time. After a long downtime, these are the newest."""
SHOWN_SLOTS = 20


async def check(
    connection: AsyncConnection, watched: Mapping[str, WatchedTask], now: datetime
) -> tuple[list[Opening], list[str], datetime | None]:
    """The incidents of deadlines that have passed since the last check, the tasks to `record`, and
    the next deadline.

    A deadline that passed before its task was first watched does not count, nor does one of a
    paused task.
    """
    meant = {
        name: task
        for name, task in watched.items()
        if task.deadline is not None and not task.is_removed
    }
    if not meant:
        return [], [], None
    opened = await schedules.still_open(connection, meant)
    openings: list[Opening] = []
    checked: list[str] = []
    instants: list[datetime] = []
    for name, row in sorted(opened.items()):
        if not row.is_usable:
            continue
        task = meant[name]
        over, following = await offload(_slots, row, task, now)
        if following is not None:
            instants.append(following)
        unmet = await unmet_slots(connection, name, over) if over and not task.is_paused else []
        if unmet:
            openings.append(_opening(task, unmet, now))
        if over or task.deadline_until is None:
            checked.append(name)
    return openings, checked, min(instants, default=None)


async def record(connection: AsyncConnection, checked: Collection[str], now: datetime) -> None:
    """Write that the deadlines of these tasks were checked up to now."""
    for name in sorted(checked):
        await connection.execute(
            update(tasks).where(tasks.c.name == name).values(deadline_until=now)
        )


async def unmet_slots(
    connection: AsyncConnection, task: str, slots: Collection[datetime]
) -> list[datetime]:
    """Those of these slots of a task for which no run has succeeded or was made good."""
    theirs = json_rows.is_among(runs.c.slot, slots, connection.dialect.name)
    query = select(runs.c.slot, runs.c.state, runs.c.made_good_at).where(
        runs.c.task == task, theirs
    )
    query = query.where(text(OF_SLOT_SQL))
    done = {
        row.slot
        for row in await connection.execute(query)
        if row.state == RunState.SUCCEEDED or row.made_good_at is not None
    }
    return sorted(set(slots) - done)


def _slots(
    row: OpenSchedule, task: WatchedTask, now: datetime
) -> tuple[list[datetime], datetime | None]:
    """The slots whose deadline has passed and was not checked yet, and the next deadline."""
    assert task.deadline is not None
    longest = 2 * DAY if isinstance(task.deadline, str) else timedelta(seconds=task.deadline)
    checked = task.deadline_until or now
    begin = max(row.valid_from, min(checked, now) - longest)
    schedule: Schedule = row.schedule
    due: list[datetime] = []
    slot = schedule.previous(now + timedelta(microseconds=1))
    while slot is not None and slot > begin and len(due) < MOST_SLOTS:
        due.append(slot)
        slot = schedule.previous(slot)
    deadlines = {slot: deadline_of(slot, task.deadline, task.zone) for slot in due}
    over = sorted(slot for slot, deadline in deadlines.items() if checked < deadline <= now)
    pending = [deadline for deadline in deadlines.values() if deadline > now]
    coming = islice(schedule.following(now, 1), 1)
    pending += [deadline_of(slot, task.deadline, task.zone) for slot in coming]
    return over, min(pending, default=None)


def _opening(task: WatchedTask, unmet: list[datetime], now: datetime) -> Opening:
    last = unmet[-1]
    by = f"by {task.deadline}" if isinstance(task.deadline, str) else f"within {task.deadline:g} s"
    others = f", nor have {len(unmet) - 1:,} before it" if len(unmet) > 1 else ""
    return Opening(
        IncidentKind.DEADLINE,
        f"the slot {last:%Y-%m-%d %H:%M} UTC has not succeeded {by}{others}",
        now,
        task=task.name,
        count=len(unmet),
        details={"slots": [slot.isoformat() for slot in unmet[-SHOWN_SLOTS:]]},
    )
