"""Deadlines of slots: when each is, which are over, and which of those slots have not succeeded.
Also the hours of a day in which nothing is sent.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import UTC, date, datetime, time, timedelta
from itertools import islice
from zoneinfo import ZoneInfo

from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.cron.cron import Schedule
from batch_system.batch.incidents.watched import WatchedTask
from batch_system.batch.ledger import json_rows, schedules
from batch_system.batch.ledger.incidents.incidents import Opening
from batch_system.batch.ledger.run_rows import run_rows
from batch_system.batch.ledger.schedules import OpenSchedule
from batch_system.batch.ledger.states import IncidentKind, RunState
from batch_system.batch.ledger.tables import OF_SLOT_SQL, runs, tasks
from batch_system.batch.tasks.declaration import quiet_hours
from batch_system.concurrency.offload import offload

MOST_SLOTS = 1_000
"""How many slots of a task are checked at a time. After a long downtime, these are the newest."""
SHOWN_SLOTS = 20
DAY = timedelta(days=1)


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
    query = run_rows(("slot", "state", "made_good_at"), runs.c.task == task, theirs, OF_SLOT_SQL)
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


def deadline_of(slot: datetime, deadline: str | float, zone: ZoneInfo) -> datetime:
    """The instant (UTC) until which a slot must have succeeded. `slot`: aware. `deadline`: seconds
    after the slot, or a time of day.

    A time of day means its first occurrence after the slot in the zone. On a day on which the
    clocks skip it, it counts by the offset from before the change.
    """
    if not isinstance(deadline, str):
        return slot.astimezone(UTC) + timedelta(seconds=deadline)
    at = time.fromisoformat(deadline)
    day = slot.astimezone(zone).date()
    return next(instant for instant in _instants(day, at, zone) if instant > slot)


def _instants(day: date, at: time, zone: ZoneInfo) -> list[datetime]:
    """The instants of this time of day on a day and the next two days. There are two on a day on
    which the clocks go back over it.
    """
    walls = (datetime.combine(day + number * DAY, at, tzinfo=zone) for number in range(3))
    instants = {wall.replace(fold=fold).astimezone(UTC) for wall in walls for fold in _folds(wall)}
    return sorted(instants)


def _folds(wall: datetime) -> tuple[int, ...]:
    """Both folds of a time that exists twice; otherwise only the first."""
    first, second = (wall.replace(fold=fold).utcoffset() for fold in (0, 1))
    return (0, 1) if first is not None and second is not None and first > second else (0,)


def quiet_until(now: datetime, quiet: str | None, zone: ZoneInfo) -> datetime | None:
    """The end of the quiet hours that contain `now` (aware), in UTC; None outside quiet hours."""
    hours = quiet_hours(quiet) if quiet is not None else None
    if hours is None:
        return None
    begin, end = hours
    local = now.astimezone(zone).time()
    is_in = begin <= local < end if begin < end else local >= begin or local < end
    if not is_in:
        return None
    return next(
        instant for instant in _instants(now.astimezone(zone).date(), end, zone) if instant > now
    )
