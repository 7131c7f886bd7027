"""What the clock changes of its zone do to a schedule, in words. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from service.batch.cron import utc_offsets
from service.batch.cron.cron import Schedule, schedule

_SECOND = timedelta(seconds=1)
_INSTANT = timedelta(microseconds=1)

DAY = timedelta(days=1)
"""No clock change is larger, or reaches further from its instant."""


@dataclass(frozen=True)
class Effect:
    """A clock change that a schedule feels. `first` and `last` enclose the slots that are not as on other days."""

    at: datetime
    first: datetime
    last: datetime
    words: str

    def touches(self, slot: datetime) -> bool:
        return self.first <= slot <= self.last


def effects(of: Schedule, after: datetime, until: datetime) -> Iterator[Effect]:
    """The clock changes in (after, until] that hit times of the schedule, in order. All instants are aware, in UTC."""
    at = utc_offsets.change(of.zone, after, until)
    while at is not None:
        if (found := _effect(of, at)) is not None:
            yield found
        at = utc_offsets.change(of.zone, at, until)


def _effect(of: Schedule, at: datetime) -> Effect | None:
    by = utc_offsets.offset(of.zone, at) - utc_offsets.offset(of.zone, at - _SECOND)
    lands = _wall(of, at)
    start, end = (lands - by, lands) if by > timedelta(0) else (lands, lands - by)
    times = _times(of, start, end)
    if not times or (of.follows_real_time and _keeps_its_rhythm(of, times, end, end - start)):
        return None
    return _skipped(of, at, times, lands) if by > timedelta(0) else _repeated(of, at, times, end - start)


def _skipped(of: Schedule, at: datetime, times: list[datetime], lands: datetime) -> Effect | None:
    one = len(times) == 1
    what = f"{_listed(times)} {'is' if one else 'are'} skipped by the clock change of {lands:%Y-%m-%d}"
    if of.follows_real_time:
        slot = of.next(at - _INSTANT)
        return Effect(at, slot, slot, f"{what}: {'does' if one else 'do'} not fire") if slot else None
    together = "" if one else " once"
    return Effect(at, at, at, f"{what}: {'fires' if one else 'fire'}{together} at {_shown(lands)}")


def _repeated(of: Schedule, at: datetime, times: list[datetime], length: timedelta) -> Effect:
    one = len(times) == 1
    what = f"{_listed(times)} {'comes' if one else 'come'} twice on {times[0]:%Y-%m-%d}"
    how = "both times" if of.follows_real_time else "the first time"
    last = at + length - _SECOND if of.follows_real_time else at - _SECOND
    return Effect(at, at - length, last, f"{what}: {'fires' if one else 'fire'} {how}")


def _keeps_its_rhythm(of: Schedule, times: list[datetime], end: datetime, length: timedelta) -> bool:
    """Whether the stretch after the one that is skipped or repeated is like it: then nobody notices."""
    return _times(of, end, end + length) == [time + length for time in times]


def _times(of: Schedule, start: datetime, end: datetime) -> list[datetime]:
    """The wall times from `start` to before `end` (naive) that the expression names."""
    walls = schedule(of.cron).between(start.replace(tzinfo=UTC) - _INSTANT, end.replace(tzinfo=UTC) - _INSTANT)
    return [wall.replace(tzinfo=None) for wall in walls]


def _wall(of: Schedule, at: datetime) -> datetime:
    return at.astimezone(of.zone).replace(tzinfo=None, fold=0)


def _listed(times: list[datetime]) -> str:
    shown = [_shown(time) for time in times]
    if len(shown) > 2:
        return f"{shown[0]} to {shown[-1]} ({len(shown)} times)"
    return " and ".join(shown)


def _shown(time: datetime) -> str:
    return f"{time:%H:%M:%S}" if time.second else f"{time:%H:%M}"
