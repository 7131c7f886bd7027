"""A simple model of Debian's cron: one step of its main loop for every minute (or second) of a
clock.

It follows cron.c of Debian's 3.0pl1: `virtual` is its virtualTime, `running` its timeRunning, both
in local time.

Two differences are deliberate:
- For a change of three hours or more Debian only sets its time; here every change is treated alike.
- For a jump ahead of up to five minutes Debian also runs wildcard jobs for the skipped minutes,
  because it treats the jump as a late wake-up. No zone jumps by so little today; here a skipped
  minute is skipped.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from datetime import UTC, date, datetime, timedelta
from itertools import product
from zoneinfo import ZoneInfo

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
SECOND = timedelta(seconds=1)
EPOCH_DAY = EPOCH.toordinal()
Clock = list[tuple[int, int]]


class Job:
    """One crontab line; matches local time, in seconds since 1970 as if the zone were UTC."""

    def __init__(self, cron: str) -> None:
        parts = cron.split()
        second, minute, hour, day, month, weekday = parts if len(parts) == 6 else ["0", *parts]
        self.wildcard = any(part[0] == "*" for part in (second, minute, hour))
        self.both_days = day[0] == "*" or weekday[0] == "*"
        clock = product(values(hour, 0, 23), values(minute, 0, 59), values(second, 0, 59))
        self.times = {hour * 3600 + minute * 60 + second for hour, minute, second in clock}
        self.days, self.months = values(day, 1, 31), values(month, 1, 12)
        self.weekdays = {value % 7 for value in values(weekday, 0, 7)}

    def matches(self, local: int) -> bool:
        day, of_day = divmod(local, 86400)
        return of_day in self.times and self.matches_day(date.fromordinal(EPOCH_DAY + day))

    def matches_day(self, day: date) -> bool:
        of_month, of_week = day.day in self.days, day.isoweekday() % 7 in self.weekdays
        return day.month in self.months and (
            of_month and of_week if self.both_days else of_month or of_week
        )


def values(part: str, low: int, high: int) -> set[int]:
    found: set[int] = set()
    for term in part.split(","):
        span, _, step = term.partition("/")
        first, dash, last = (str(low), "-", str(high)) if span == "*" else span.partition("-")
        found |= set(range(int(first), int(last if dash else first) + 1, int(step or 1)))
    return found


def clock(zone: str, start: datetime, end: datetime, step: int = 60) -> Clock:
    """What the zone's clock shows, every `step` seconds from `start` to `end`: (instant, local),
    both since 1970.
    """
    info = ZoneInfo(zone)
    return [(at, at + offset(info, at)) for at in range(seconds(start), seconds(end) + 1, step)]


def offset(zone: ZoneInfo, at: int) -> int:
    """In seconds, at an instant in seconds since 1970."""
    shown = datetime.fromtimestamp(at, zone).utcoffset()
    assert shown is not None
    return shown // SECOND


def run(cron: str, clock: Clock) -> list[datetime]:
    """When cron runs the job while its clock shows `clock`. An instant at which it would run twice
    counts once.
    """
    job = Job(cron)
    step = clock[1][0] - clock[0][0]
    virtual = clock[0][1] - step
    ran = []
    for instant, running in clock:
        missed = range(virtual + step, running, step)
        if running > virtual:
            due = job.matches(running) or (not job.wildcard and any(map(job.matches, missed)))
            virtual = running
        else:
            due = job.wildcard and job.matches(running)
        if due:
            ran.append(EPOCH + timedelta(seconds=instant))
    return ran


def expression(rng: random.Random, hours: Iterable[int], six: bool = False) -> str:
    """A random expression that Job reads, fixed or wildcard, more often than not at one of
    `hours`.
    """
    near = [hour % 24 for hour in hours]
    hour = str(rng.choice(near)) if rng.random() < 0.5 else part(rng, 0, 23)
    day = part(rng, 1, 31) if rng.random() < 0.15 else "*"
    weekday = part(rng, 0, 7) if rng.random() < 0.15 else "*"
    second = [rng.choice(["0", str(rng.randrange(60)), "*/20", "10-50/20"])] if six else []
    return " ".join([*second, part(rng, 0, 59), hour, day, "*", weekday])


def part(rng: random.Random, low: int, high: int) -> str:
    first, last = sorted(rng.choices(range(low, high + 1), k=2))
    step = rng.randint(1, (high - low) // 2)
    some = ",".join(str(rng.randint(low, high)) for _ in range(rng.randint(2, 4)))
    forms = [
        "*",
        f"*/{step}",
        str(first),
        str(first),
        some,
        f"{first}-{last}",
        f"{first}-{last}/{step}",
    ]
    return rng.choice(forms)


def seconds(moment: datetime) -> int:
    return (moment - EPOCH) // SECOND
