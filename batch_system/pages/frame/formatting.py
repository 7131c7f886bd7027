"""Numbers, sizes, durations and instants as people read them. Pure.

Arguments are in seconds, in bytes, or aware instants; instants are shown in the viewer's zone.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

MINUS = "\N{MINUS SIGN}"
UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
FAR = timedelta(days=30)
"""An instant that is further away is only shown as an absolute time."""


def number(value: float | None) -> str:
    """A whole number with commas, such as 412,300; a dash if it is not known."""
    if value is None:
        return "–"
    text = f"{abs(round(value)):,}"
    return f"{MINUS}{text}" if value < 0 else text


def rate(value: float) -> str:
    """A number a second, with two digits where it is small, such as 8,240 or 0.25."""
    return number(value) if value >= 10 else f"{value:.2g}"


def counted(value: int, noun: str, plural: str | None = None) -> str:
    """A number with its noun, such as "1 slot" or "12 slots". `plural`: default is the noun with an
    s.
    """
    return f"{number(value)} {noun if value == 1 else plural or f'{noun}s'}"


def percent(share: float) -> str:
    """A share of 1 with one decimal, such as 41.2 %. It is rounded down, so that only the whole is
    100 %.
    """
    return f"{math.floor(share * 1000 + 1e-9) / 10:.1f} %"


def size(octets: float | None) -> str:
    """Bytes in decimal units with three digits, such as 4.82 GB."""
    if octets is None:
        return "–"
    value, unit = float(octets), 0
    while value >= 999.5 and unit < len(UNITS) - 1:
        value, unit = value / 1000, unit + 1
    if unit == 0:
        return f"{value:.0f} B"
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f} {UNITS[unit]}"


def duration(seconds: float | None) -> str:
    """Two units at most: 430 ms, 3.2 s, 11 s, 1 min 11 s, 2 h 04 min, 3 d 4 h."""
    if seconds is None:
        return "–"
    seconds = max(0.0, seconds)
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3_600:
        minutes, rest = divmod(whole, 60)
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    hours = round(seconds / 3_600)
    return f"{hours // 24} d {hours % 24} h"


def brief_duration(seconds: float) -> str:
    """A duration as a stopwatch shows it: 2:08, or 1:04:09."""
    whole = max(0, round(seconds))
    minutes, rest = divmod(whole, 60)
    return (
        f"{minutes}:{rest:02}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
    )


def relative(at: datetime, now: datetime) -> str:
    """How far away an instant is, such as "in 12 min 52 s" or "4 min ago"; absolute beyond 30
    days.
    """
    distance = at - now
    if abs(distance) > FAR:
        return date(at, now)
    text = duration(abs(distance.total_seconds()))
    return f"in {text}" if distance > timedelta() else f"{text} ago"


def clock(at: datetime, zone: ZoneInfo, with_seconds: bool = False) -> str:
    """The time of day in the zone, of 24 hours. With its offset in an hour that is repeated when
    clocks go back.
    """
    local = at.astimezone(zone)
    is_repeated = local.replace(fold=0).utcoffset() != local.replace(fold=1).utcoffset()
    return local.strftime("%H:%M:%S" if with_seconds else "%H:%M") + (
        f" {offset(at, zone)}" if is_repeated else ""
    )


def instant(at: datetime) -> str:
    """An instant as machines read it, such as 2026-10-24T18:00:00Z. It needs no quoting in an
    address.
    """
    return f"{at.astimezone(UTC).replace(tzinfo=None).isoformat()}Z"


def log_time(text: str, zone: ZoneInfo) -> str:
    """The time of day of a log line, to the millisecond. `text`: the instant as it was logged; it
    may be anything.
    """
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        return text[:23]
    return at.astimezone(zone).strftime("%H:%M:%S.%f")[:-3]


def day(at: datetime, zone: ZoneInfo, now: datetime) -> str:
    """The day in the zone, such as "Sat 24 Oct"; the year only if it is not this one."""
    local = at.astimezone(zone)
    year = "" if local.year == now.astimezone(zone).year else f" {local.year}"
    return f"{local:%a} {local.day} {local:%b}{year}"


def moment(at: datetime, zone: ZoneInfo, now: datetime) -> str:
    """The time of day; on other days than today with the day: "Sat 23:00" within a week, else "12
    Sep 23:00".
    """
    local, today = at.astimezone(zone), now.astimezone(zone)
    time = clock(at, zone)
    if local.date() == today.date():
        return time
    if abs(local.date() - today.date()) < timedelta(days=7):
        return f"{local:%a} {time}"
    year = "" if local.year == today.year else f" {local.year}"
    return f"{local.day} {local:%b}{year} {time}"


def date(at: datetime, now: datetime) -> str:
    """The date of an instant in its own zone, such as "12 Sep"; the year only if it is not this
    one.
    """
    year = "" if at.year == now.year else f" {at.year}"
    return f"{at.day} {at:%b}{year}"


def offset(at: datetime, zone: ZoneInfo) -> str:
    """The offset of the zone from UTC at an instant, such as "+01:00"."""
    text = f"{at.astimezone(zone):%z}"
    return f"{text[:3].replace('-', MINUS)}:{text[3:5]}"


def sentence_list(names: list[str]) -> str:
    """The names as in a sentence: "a, b and c"."""
    return (
        names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else ""
    )
