"""How clock changes of its zone affect a schedule, in words. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from batch_system.batch.cron import utc_offsets
from batch_system.batch.cron.cron import Schedule, schedule

_SECOND = timedelta(seconds=1)
_INSTANT = timedelta(microseconds=1)

DAY = timedelta(days=1)
"""The largest clock change, and the largest distance of an affected slot from it."""


@dataclass(frozen=True)
class Effect:
    """A clock change that affects a schedule. The slots that differ from other days lie in [first,
    last]; aware, UTC.
    """

    at: datetime
    first: datetime
    last: datetime
    words: str

    def touches(self, slot: datetime) -> bool:
        """Whether the clock change affects this slot (aware)."""
        return self.first <= slot <= self.last


def effects(of: Schedule, after: datetime, until: datetime) -> Iterator[Effect]:
    """Iterate over the clock changes in (after, until] that affect the schedule, in order. All
    instants are in UTC.
    """
    at = utc_offsets.change(of.zone, after, until)
    while at is not None:
        if (effect := _effect(of, at)) is not None:
            yield effect
        at = utc_offsets.change(of.zone, at, until)


def _effect(of: Schedule, at: datetime) -> Effect | None:
    by = utc_offsets.offset(of.zone, at) - utc_offsets.offset(of.zone, at - _SECOND)
    wall_after = _wall(of, at)
    start, end = (
        (wall_after - by, wall_after) if by > timedelta(0) else (wall_after, wall_after - by)
    )
    times = _times(of, start, end)
    if not times or (of.follows_real_time and _keeps_its_rhythm(of, times, end, end - start)):
        return None
    return (
        _skipped(of, at, times, wall_after)
        if by > timedelta(0)
        else _repeated(of, at, times, end - start)
    )


def _skipped(
    of: Schedule, at: datetime, times: list[datetime], wall_after: datetime
) -> Effect | None:
    is_single = len(times) == 1
    change = (
        f"{_listed(times)} {'is' if is_single else 'are'} skipped by the clock change of "
        f"{wall_after:%Y-%m-%d}"
    )
    if of.follows_real_time:
        slot = of.next(at - _INSTANT)
        return (
            Effect(at, slot, slot, f"{change}: {'does' if is_single else 'do'} not fire")
            if slot
            else None
        )
    once = "" if is_single else " once"
    return Effect(
        at,
        at,
        at,
        f"{change}: {'fires' if is_single else 'fire'}{once} at {_hour_and_minute(wall_after)}",
    )


def _repeated(of: Schedule, at: datetime, times: list[datetime], length: timedelta) -> Effect:
    is_single = len(times) == 1
    change = f"{_listed(times)} {'comes' if is_single else 'come'} twice on {times[0]:%Y-%m-%d}"
    passes = "both times" if of.follows_real_time else "the first time"
    last = at + length - _SECOND if of.follows_real_time else at - _SECOND
    return Effect(at, at - length, last, f"{change}: {'fires' if is_single else 'fire'} {passes}")


def _keeps_its_rhythm(
    of: Schedule, times: list[datetime], end: datetime, length: timedelta
) -> bool:
    """Whether the period after the skipped or repeated one has slots at the same distances, so that
    nothing changes.
    """
    return _times(of, end, end + length) == [time + length for time in times]


def _times(of: Schedule, start: datetime, end: datetime) -> list[datetime]:
    """The wall times from `start` to before `end` (naive) that the expression names."""
    walls = schedule(of.cron).between(
        start.replace(tzinfo=UTC) - _INSTANT, end.replace(tzinfo=UTC) - _INSTANT
    )
    return [wall.replace(tzinfo=None) for wall in walls]


def _wall(of: Schedule, at: datetime) -> datetime:
    return at.astimezone(of.zone).replace(tzinfo=None, fold=0)


def _listed(times: list[datetime]) -> str:
    texts = [_hour_and_minute(time) for time in times]
    if len(texts) > 2:
        return f"{texts[0]} to {texts[-1]} ({len(texts)} times)"
    return " and ".join(texts)


def _hour_and_minute(time: datetime) -> str:
    return f"{time:%H:%M:%S}" if time.second else f"{time:%H:%M}"
