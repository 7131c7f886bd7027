"""Schedule against a model of Debian's cron, around every clock change of every zone from 2020 to
2030.

Of the zones that change alike one is compared. CRON_CASES sets the number of random cases (default
200), which are spread over all changes; a thorough check takes CRON_CASES=100000.
"""

from __future__ import annotations

import itertools
import os
import random
from bisect import bisect_left, bisect_right
from datetime import UTC, datetime, timedelta
from functools import cache
from zoneinfo import ZoneInfo, available_timezones

import pytest

from batch_system.batch.cron.cron import Schedule
from tests.batch import cron_model
from tests.batch.cron_model import offset

CASES = int(os.environ.get("CRON_CASES", "200"))
SECOND = timedelta(seconds=1)
HOUR = timedelta(hours=1)
FIRST_DAY, LAST_DAY = (
    cron_model.seconds(datetime(year, 1, 1, tzinfo=UTC)) for year in (2020, 2031)
)
DAY = 86400
BIG_CHANGES = [
    ("Pacific/Apia", datetime(2011, 12, 30, 10, tzinfo=UTC)),
    ("Pacific/Kwajalein", datetime(1993, 8, 21, 12, tzinfo=UTC)),
    ("Pacific/Kwajalein", datetime(1969, 9, 30, 13, tzinfo=UTC)),
    ("Pacific/Kiritimati", datetime(1994, 12, 31, 10, tzinfo=UTC)),
    ("America/Danmarkshavn", datetime(1996, 1, 1, 3, tzinfo=UTC)),
    ("Antarctica/Vostok", datetime(1994, 1, 31, 17, tzinfo=UTC)),
]
CHANGES_WITHIN_A_MINUTE = [
    ("Africa/Monrovia", datetime(1972, 1, 7, 0, 44, 30, tzinfo=UTC)),
    ("Europe/Amsterdam", datetime(1940, 5, 15, 23, 40, tzinfo=UTC)),
    ("Europe/Berlin", datetime(1893, 3, 31, 23, 6, 32, tzinfo=UTC)),
    ("America/New_York", datetime(1883, 11, 18, 17, tzinfo=UTC)),
]


def changes_of(zone: ZoneInfo) -> tuple[tuple[int, int, int], ...]:
    """Each change of the zone's offset from 2020 to 2030: the instant, and the offsets before and
    after it.
    """
    weeks = [*range(FIRST_DAY, LAST_DAY, 7 * DAY), LAST_DAY]
    at_week = {day: offset(zone, day) for day in weeks}
    found = []
    # No zone changes its offset and takes it back within a week.
    for week, next_week in itertools.pairwise(weeks):
        if at_week[week] != at_week[next_week]:
            offsets = {day: offset(zone, day) for day in range(week, next_week + DAY, DAY)}
            days = [
                day for day in range(week, next_week, DAY) if offsets[day] != offsets[day + DAY]
            ]
            found += [
                (first_with(zone, offsets[day + DAY], day), offsets[day], offsets[day + DAY])
                for day in days
            ]
    return tuple(found)


def first_with(zone: ZoneInfo, new: int, day: int) -> int:
    """The first minute of the day after which the zone has this offset."""
    minutes = range(day, day + DAY + 1, 60)
    return minutes[bisect_left(minutes, True, key=lambda at: offset(zone, at) == new)]


@cache
def all_changes() -> list[tuple[str, datetime]]:
    distinct = {
        changes_of(ZoneInfo(name)): name for name in sorted(available_timezones(), reverse=True)
    }
    found = [(zone, at) for changes, zone in distinct.items() for at, _, _ in changes]
    return [(zone, cron_model.EPOCH + at * SECOND) for zone, at in found]


def differences(
    cron: str, zone: str, change: datetime, clock: cron_model.Clock, rng: random.Random
) -> list[str]:
    """Where Schedule and the model disagree on one expression and one stretch of a zone's clock."""
    schedule = Schedule(cron, zone)
    start, end = (cron_model.EPOCH + clock[place][0] * SECOND for place in (0, -1))
    expected = cron_model.run(cron, clock)
    found = list(schedule.between(start - SECOND, end))
    wrong = (
        []
        if found == expected
        else [f"{cron} {zone} {change}: between {set(found) ^ set(expected)}"]
    )
    length = (end - start) // SECOND
    moments = [change, change - SECOND, *(start + rng.randrange(length) * SECOND for _ in range(2))]
    for moment in [*moments, *rng.sample(expected, min(2, len(expected)))]:
        following = expected[bisect_right(expected, moment) :]
        if following and schedule.next(moment) != following[0]:
            wrong.append(
                f"{cron} {zone} {change}: next {moment} is {schedule.next(moment)}, not "
                f"{following[0]}"
            )
        leading = expected[: bisect_left(expected, moment)]
        if leading and schedule.previous(moment) != leading[-1]:
            wrong.append(
                f"{cron} {zone} {change}: previous {moment} is {schedule.previous(moment)}, not "
                f"{leading[-1]}"
            )
    return wrong


def hours_around(zone: str, change: datetime) -> list[int]:
    info = ZoneInfo(zone)
    clock = [
        moment.astimezone(info).hour
        for moment in (change - HOUR, change - SECOND, change, change + HOUR)
    ]
    return [*clock, clock[1] + 1]


def compare(
    changes: list[tuple[str, datetime]], cases: int, around: timedelta, step: int = 60
) -> list[str]:
    wrong: list[str] = []
    known: tuple[str, datetime] | None = None
    for number in range(cases):
        zone, change = changes[number * len(changes) // cases]
        if known != (zone, change):
            known, clock = (
                (zone, change),
                cron_model.clock(zone, change - around, change + around, step),
            )
        rng = random.Random(number)
        cron = cron_model.expression(
            rng, hours_around(zone, change), six=step == 1 and rng.random() < 0.8
        )
        wrong += differences(cron, zone, change, clock, rng)
    print(f"{cases} cases around {len(changes)} clock changes: {len(wrong)} differences")
    return wrong


def test_every_zone_fires_as_in_debian_around_every_clock_change_from_2020_to_2030() -> None:
    changes = all_changes()
    assert len(changes) > 700, "the zones' data is incomplete"
    assert compare(changes, CASES, around=26 * HOUR) == []


def test_six_fields_follow_the_same_rule_second_by_second() -> None:
    assert compare(all_changes()[::17], max(96, CASES // 50), around=4 * HOUR, step=1) == []


def test_a_change_of_three_hours_and_more_follows_the_same_rule() -> None:
    assert compare(BIG_CHANGES, max(240, CASES // 50), around=50 * HOUR) == []


def test_offsets_with_seconds_follow_the_same_rule() -> None:
    assert compare(CHANGES_WITHIN_A_MINUTE, max(48, CASES // 100), around=3 * HOUR, step=1) == []


@pytest.mark.parametrize(("zone", "change"), BIG_CHANGES + CHANGES_WITHIN_A_MINUTE)
def test_the_named_changes_are_in_the_zones_data(zone: str, change: datetime) -> None:
    info = ZoneInfo(zone)
    assert (change - SECOND).astimezone(info).utcoffset() != change.astimezone(info).utcoffset()
