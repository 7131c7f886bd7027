"""The instants at which a time zone's clock changes. Pure."""

from __future__ import annotations

from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

_SECOND = timedelta(seconds=1)
_DAY = timedelta(days=1)


def offset(zone: ZoneInfo, instant: datetime) -> timedelta:
    """How far the zone's clock is ahead of UTC at an aware instant."""
    return instant.astimezone(zone).utcoffset() or timedelta(0)


def step(zone: ZoneInfo, at: datetime) -> timedelta:
    """By how much the zone's clock is put forward at an instant."""
    return offset(zone, at) - offset(zone, at - _SECOND)


def change(zone: ZoneInfo, start: datetime, end: datetime) -> datetime | None:
    """The first second whose offset differs from that of `start`, on the way from `start` to `end`.

    `start` (a whole second) and `end` are aware and in UTC; `end` may lie before `start`. None if
    nothing changes.
    """
    here = offset(zone, start)
    stride = _DAY if start < end else -_DAY
    while start != end:
        ahead = end if abs(end - start) <= _DAY else start + stride
        if offset(zone, ahead) != here:
            return _bisect(zone, start, ahead, here)
        start = ahead
    return None


def _bisect(zone: ZoneInfo, same: datetime, other: datetime, here: timedelta) -> datetime:
    """The second nearest to `same` (a whole second) that has another offset than `here`, as `other`
    does.
    """
    while abs(other - same) > _SECOND:
        half = (other - same) // _SECOND // 2
        # `other` may be 1.5 seconds away, and half of that would round to no step.
        middle = same + (half or 1) * _SECOND
        if offset(zone, middle) == here:
            same = middle
        else:
            other = middle
    return other
