"""Counts the slots of a schedule in an interval without listing them: a downtime may contain
millions. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

from batch_system.batch.cron import utc_offsets
from batch_system.batch.cron.cron import Schedule

SECOND = timedelta(seconds=1)
MIDNIGHT = datetime(2000, 1, 1)

AROUND = timedelta(hours=26)
"""Within this distance of a clock change, slots are counted one by one. No zone's clock has ever
changed by more.
"""

Unit = tuple[timedelta, int]


def count(schedule: Schedule, after: datetime, until: datetime) -> int:
    """The number of slots in (after, until], both aware. Whole days, hours and minutes are counted
    in one step each.
    """
    changes = list(_clock_changes(schedule, after - AROUND, until + AROUND))
    number = 0
    while (slot := schedule.next(after)) is not None and slot <= until:
        after, slots = _count_unit(schedule, slot, after, until, changes)
        number += slots
    return number


def _count_unit(
    schedule: Schedule, slot: datetime, after: datetime, until: datetime, changes: list[datetime]
) -> tuple[datetime, int]:
    """The end and the number of slots of the longest day, hour or minute that has `slot` and lies
    in (after, until].
    """
    if not any(slot - AROUND <= change <= slot + AROUND for change in changes):
        wall = slot.astimezone(schedule.zone).replace(tzinfo=None)
        for length, slots in _units(schedule):
            begin = slot - (wall - MIDNIGHT) % length
            if begin > after and begin + length - SECOND <= until:
                return begin + length - SECOND, slots
    return slot, 1


def _units(schedule: Schedule) -> tuple[Unit, ...]:
    """The length of a day, an hour and a minute, each with its number of slots, provided that it
    has any.
    """
    hours, minutes, seconds = schedule.times_of_day
    return (
        (timedelta(days=1), hours * minutes * seconds),
        (timedelta(hours=1), minutes * seconds),
        (timedelta(minutes=1), seconds),
    )


def _clock_changes(schedule: Schedule, start: datetime, end: datetime) -> Iterator[datetime]:
    """The instants between `start` and `end` at which the clock of the schedule's zone changes."""
    instant: datetime | None = start.astimezone(UTC).replace(microsecond=0)
    while schedule.timezone != "UTC" and instant is not None and instant < end:
        instant = utc_offsets.change(schedule.zone, instant, end)
        if instant is not None:
            yield instant
