"""Dates without slots, and business days: as a slow check finds them that tries each minute and
each date.
"""

from __future__ import annotations

import calendar
import pickle
import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from functools import cache
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest

from batch_system.batch.cron.calendar import ExcludedDates, joined, parted, remember
from batch_system.batch.cron.counting import count
from batch_system.batch.cron.cron import Schedule, schedule
from batch_system.errors import InvalidSchedule

MINUTE, DAY = timedelta(minutes=1), timedelta(days=1)
CHANGES = {
    "Europe/Berlin": (datetime(2026, 3, 29), datetime(2026, 10, 25)),
    "America/Santiago": (datetime(2026, 4, 5), datetime(2026, 9, 6)),  # at midnight
    "America/Goose_Bay": (datetime(2010, 3, 14), datetime(2010, 11, 7)),  # a minute after midnight
    "America/New_York": (datetime(2026, 3, 8), datetime(2026, 11, 1)),
    "Asia/Beirut": (datetime(2026, 3, 29), datetime(2026, 10, 25)),  # at midnight
    "Atlantic/Azores": (datetime(2026, 3, 29), datetime(2026, 10, 25)),
    "Africa/Casablanca": (datetime(2026, 2, 15), datetime(2026, 3, 22)),
    "Australia/Lord_Howe": (datetime(2026, 4, 5), datetime(2026, 10, 4)),  # half an hour
    "Pacific/Apia": (datetime(2011, 12, 30), datetime(2012, 4, 1)),  # skipped a whole day
    "Asia/Tokyo": (datetime(2026, 4, 29), datetime(2026, 12, 31)),  # none
}
FIRST = {name: CHANGES.pop(name) for name in ("Europe/Berlin", "America/Goose_Bay")}


@dataclass(frozen=True)
class Case:
    zone: str
    around: datetime
    second: str
    minute: str
    hour: str
    day: str
    weekday: str
    dates: ExcludedDates | None

    @property
    def since(self) -> datetime:
        return self.around.replace(tzinfo=UTC) - 20 * DAY

    @property
    def until(self) -> datetime:
        return self.around.replace(tzinfo=UTC) + 20 * DAY

    @property
    def schedule(self) -> Schedule:
        cron = f"{self.minute} {self.hour} {self.day} * {self.weekday}"
        if self.dates is not None:
            remember(self.dates)
        return schedule(joined(cron, self.dates.id if self.dates else None), self.zone)

    def names(self, day: date) -> bool:
        """Whether the fields of days name this date."""
        if self.day.endswith("B") or "B-" in self.day:
            return day.day == business_day(self.day, day, self.dates)
        of_month = self.day == "*" or day.day in numbers(self.day, 1, 31)
        of_week = self.weekday == "*" or day.isoweekday() % 7 in numbers(self.weekday, 0, 6)
        both = "*" in (self.day[0], self.weekday[0])
        return (of_month and of_week) if both else (of_month or of_week)


def numbers(part: str, low: int, high: int) -> set[int]:
    if part.startswith("*"):
        return {*range(low, high + 1, int(part[2:] or 1))}
    found: set[int] = set()
    for each in part.split(","):
        first, _, last = each.partition("-")
        found |= {*range(int(first), int(last or first) + 1)}
    return found


def business_day(part: str, of: date, dates: ExcludedDates | None) -> int | None:
    weekend = dates.weekend if dates else {5, 6}
    days = []
    for number in range(1, calendar.monthrange(of.year, of.month)[1] + 1):
        day = of.replace(day=number)
        if day.weekday() not in weekend and (dates is None or day not in dates.dates):
            days.append(number)
    if part.startswith("L"):
        days, place = days[::-1], int(part[3:] or 0)
    else:
        place = 0 if part == "FB" else int(part[:-1]) - 1
    return days[place] if place < len(days) else None


@cache
def walls(zone: str, around: datetime) -> list[tuple[datetime, datetime]]:
    """Each minute of 44 days, with what the clock shows."""
    start, tz = around.replace(tzinfo=UTC) - 22 * DAY, ZoneInfo(zone)
    instants = [start + number * MINUTE for number in range(44 * 1_440)]
    return [(at, at.astimezone(tz).replace(tzinfo=None, fold=0)) for at in instants]


def slow(case: Case) -> list[datetime]:
    """The slots of a case, by trying each minute."""
    hours, minutes = numbers(case.hour, 0, 23), numbers(case.minute, 0, 59)
    found: set[datetime] = set()
    shown = walls(case.zone, case.around)
    if "*" in (case.minute[0], case.hour[0]):
        for at, wall in shown:
            if wall.minute in minutes and wall.hour in hours and case.names(wall.date()):
                found.add(at)
    else:
        first: dict[datetime, datetime] = {}
        jumps = []
        for (_, before), (at, wall) in pairwise(shown):
            first.setdefault(wall, at)
            if wall - before > MINUTE:
                jumps.append((before, wall, at))
        day = shown[0][1].date()
        while day <= shown[-1][1].date():
            for hour in hours if case.names(day) else ():
                for minute in minutes:
                    wall = datetime(day.year, day.month, day.day, hour, minute)
                    skipped = [at for low, high, at in jumps if low < wall < high]
                    found |= {*skipped} or ({first[wall]} if wall in first else set())
            day += DAY
    local = {at: at.astimezone(ZoneInfo(case.zone)).date() for at in found}
    excluded = case.dates.dates if case.dates else {}
    return sorted(at for at in found if case.since < at <= case.until and local[at] not in excluded)


def cases(zone: str, number: int) -> Iterator[Case]:
    chance = random.Random(f"excluded {zone}")
    for _ in range(number):
        around = chance.choice((CHANGES | FIRST)[zone])
        near = [(around + each * DAY).date() for each in range(-2, 3)]
        far = [(around + each * DAY).date() for each in range(-20, 21)]
        days = {*chance.sample(near, chance.randint(0, 4)), *chance.sample(far, 8)}
        weekend = chance.choice([{5, 6}, {4, 5}, {6}, set[int]()])
        dates = ExcludedDates("some", dict.fromkeys(days, "a day"), frozenset(weekend))
        day = chance.choice(["*"] * 3 + ["FB", "LB", "5B", "13B", "LB-2", "LB-7", "5-12", "1,29"])
        yield Case(
            zone,
            around,
            "0",
            chance.choice(["0", "30", "*/20", "59", "0,1", "*/7"]),
            chance.choice(["0", "2", "23", "*", "*/3", "0-3", "1,23"]),
            day,
            "*" if day[-1] == "B" or "-" in day else chance.choice(["*", "1-5", "0,6"]),
            dates if chance.random() < 0.9 else None,
        )


@pytest.mark.parametrize(
    "zone",
    [each if each in FIRST else pytest.param(each, marks=pytest.mark.rest) for each in CHANGES],
)
def test_slots_are_those_that_a_check_of_each_minute_finds(zone: str) -> None:
    chance = random.Random(zone)
    for case in cases(zone, 40):
        of, expected = case.schedule, slow(case)
        assert list(of.between(case.since, case.until)) == expected, case
        assert count(of, case.since, case.until) == len(expected), case
        backwards, at = [], case.until + timedelta(microseconds=1)
        while (slot := of.previous(at)) is not None and slot > case.since:
            backwards.append(slot)
            at = slot
        assert backwards == expected[::-1], case
        for _ in range(5):
            at = case.since + chance.random() * (case.until - case.since)
            assert of.next(at) == next(
                (each for each in expected if each > at), of.next(case.until)
            )


def test_a_date_is_left_out_with_its_name_if_the_expression_names_times_on_it() -> None:
    dates = {date(2026, 12, 25): "Christmas", date(2026, 12, 26): "Boxing Day"}
    dates = dates | {date(2027, 1, 1): "New Year"}
    remember(its := ExcludedDates("bank", dates))
    of = schedule(joined("0 9-17 * * 1-5", its.id), "Europe/Berlin")
    since = datetime(2026, 12, 24, 10, tzinfo=UTC)
    assert [(each.date, each.name) for each in of.left_out(since, since + 30 * DAY)] == [
        (date(2026, 12, 25), "Christmas"),  # the 26th is a Saturday
        (date(2027, 1, 1), "New Year"),
    ]
    assert of.left_out(since, since + 30 * DAY)[0].slot == datetime(2026, 12, 25, 8, tzinfo=UTC)
    assert of.left_out(since, since + timedelta(hours=20)) == []
    assert schedule("0 9 * * *").left_out(since, since + 30 * DAY) == []


def test_the_words_of_a_schedule_say_what_it_leaves_out() -> None:
    remember(its := ExcludedDates("calendar bank", {date(2026, 12, 25): "Christmas"}))
    of = schedule(joined("0 18 LB * *", its.id), "Europe/Berlin")
    assert of.words == (
        "At 18:00 on the last business day of every month (Europe/Berlin), except on calendar bank"
    )
    assert of.expression == "0 18 LB * *"
    assert parted(of.cron) == ("0 18 LB * *", its.id)
    assert pickle.loads(pickle.dumps(of)).next(datetime(2026, 1, 1, tzinfo=UTC)) is not None


@pytest.mark.parametrize(
    ("day", "words", "days"),
    [
        ("FB", "first business day", [1, 2, 2]),
        ("1b", "first business day", [1, 2, 2]),
        ("2B", "2nd business day", [2, 3, 3]),
        ("11B", "11th business day", [15, 16, 16]),
        ("21B", "21st business day", [29, 30, 30]),
        ("LB", "last business day", [30, 27, 31]),
        ("lb-2", "3rd last business day", [28, 25, 27]),
    ],
)
def test_business_days_without_a_calendar_are_monday_to_friday(
    day: str, words: str, days: list[int]
) -> None:
    of = schedule(f"0 18 {day} * *")
    assert words in of.words
    found = [each.day for each in of.following(datetime(2026, 1, 1, tzinfo=UTC), 3)]
    assert found == days or day == "21B"


def test_a_month_without_that_business_day_has_no_slot() -> None:
    found = schedule("0 18 23B * *").between(
        datetime(2026, 1, 1, tzinfo=UTC), datetime(2027, 1, 1, tzinfo=UTC)
    )
    assert [f"{each:%m-%d}" for each in found] == ["07-31", "12-31"]


@pytest.mark.parametrize(
    ("cron", "message"),
    [
        ("0 0 LB * 1", "has the business day 'LB' beside the day-of-week field '1'"),
        ("0 0 24B * *", "never fires: no month has a 24th business day"),
        ("0 0 LB-31 * *", "never fires: no month has a 32nd last business day"),
        ("0 0 LB,1 * *", "wrong day-of-month field 'LB,1'"),
        ("0 0 0B * *", "wrong day-of-month field '0B'"),
        ("0 0 FB-1 * *", "wrong day-of-month field 'FB-1'"),
        ("0 0 * * LB", "wrong day-of-week field 'LB'"),
        ("0 0 1-LB * *", "wrong day-of-month field '1-LB'"),
        (f"0 0 * * * EXCEPT {'0' * 32}", "the dates that the cron expression"),
        ("0 0 * * * EXCEPT bank", "7 fields"),
    ],
)
def test_a_wrong_business_day_or_unknown_dates_are_refused(cron: str, message: str) -> None:
    with pytest.raises(InvalidSchedule) as refused:
        schedule(cron)
    assert message in refused.value.message


def test_the_hash_of_dates_is_made_of_all_that_they_are() -> None:
    christmas = {date(2026, 12, 25): "Christmas"}
    its = ExcludedDates("bank", christmas)
    assert its.id == "7dc8574608df3a28803090f70eeb2778"  # it stands in ledgers
    again = ExcludedDates.from_json("bank", its.dates_as_json, [6, 5], None)
    assert (again, again.id) == (its, its.id)
    others = [
        ExcludedDates("bank2", christmas),
        ExcludedDates("bank", {date(2026, 12, 25): "Xmas"}),
        ExcludedDates("bank", {date(2026, 12, 24): "Christmas"}),
        ExcludedDates("bank", christmas, frozenset({4, 5})),
        ExcludedDates("bank", christmas, until=date(2030, 12, 31)),
    ]
    assert len({each.id for each in (its, *others)}) == 6
