"""How many slots a schedule has in an interval, without going through each: a downtime may have had millions. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

from service.batch.cron import utc_offsets
from service.batch.cron.cron import Schedule

SECOND = timedelta(seconds=1)
MIDNIGHT = datetime(2000, 1, 1)

AROUND = timedelta(hours=26)
"""So near to a clock change slots are counted one by one: no zone's clock moves by more, and slots move with it."""

Unit = tuple[timedelta, int]


def count(schedule: Schedule, after: datetime, until: datetime) -> int:
    """How many slots lie in (after, until], both aware. Whole days, hours and minutes are taken at once."""
    changes = list(_changes(schedule, after - AROUND, until + AROUND))
    number = 0
    while (slot := schedule.next(after)) is not None and slot <= until:
        after, slots = _stretch(schedule, slot, after, until, changes)
        number += slots
    return number


def _stretch(
    schedule: Schedule, slot: datetime, after: datetime, until: datetime, changes: list[datetime]
) -> tuple[datetime, int]:
    """The longest unit of the clock around this slot that lies in (after, until]: where it ends, and its slots."""
    if not any(slot - AROUND <= change <= slot + AROUND for change in changes):
        wall = slot.astimezone(schedule.zone).replace(tzinfo=None)
        for length, slots in _units(schedule):
            begin = slot - (wall - MIDNIGHT) % length
            if begin > after and begin + length - SECOND <= until:
                return begin + length - SECOND, slots
    return slot, 1


def _units(schedule: Schedule) -> tuple[Unit, ...]:
    """A day, an hour and a minute that have a slot: how many they have."""
    hours, minutes, seconds = schedule.times_of_day
    return (
        (timedelta(days=1), hours * minutes * seconds),
        (timedelta(hours=1), minutes * seconds),
        (timedelta(minutes=1), seconds),
    )


def _changes(schedule: Schedule, start: datetime, end: datetime) -> Iterator[datetime]:
    """When the zone's clock changes in between."""
    at: datetime | None = start.astimezone(UTC).replace(microsecond=0)
    while schedule.timezone != "UTC" and at is not None and at < end:
        at = utc_offsets.change(schedule.zone, at, end)
        if at is not None:
            yield at
