"""Deadlines of slots, and quiet hours of a day in which nothing is sent. Pure: no database, no
clock.
"""

from __future__ import annotations

from datetime import UTC, date, datetime, time, timedelta
from zoneinfo import ZoneInfo

from service.batch.tasks.declaration import quiet_hours

DAY = timedelta(days=1)


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
