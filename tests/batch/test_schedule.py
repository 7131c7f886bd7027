from __future__ import annotations

import pickle
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError
from datetime import UTC, datetime, timedelta, timezone
from itertools import islice, pairwise
from zoneinfo import ZoneInfo

import pytest
from cronsim import CronSim
from hypothesis import given, settings
from hypothesis import strategies as st

from batch_system.batch.cron.cron import Schedule, schedule
from batch_system.errors import BatchError, InvalidSchedule
from batch_system.escaping import echoed
from tests.batch import cron_model

MICROSECOND = timedelta(microseconds=1)
DAY = timedelta(days=1)
WEEKDAYS = ["SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT"]


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def slots(cron: str, zone: str, after: str, until: str) -> list[str]:
    """The slots in (after, until], both UTC, each as `day hour:minute`, with seconds unless they
    are 0.
    """
    instants = Schedule(cron, zone).between(at(after), at(until))
    return [slot.strftime("%d %H:%M:%S").removesuffix(":00") for slot in instants]


def refusal(cron: str, zone: str = "UTC") -> str:
    with pytest.raises(InvalidSchedule) as caught:
        Schedule(cron, zone)
    return caught.value.message


# Fields


@pytest.mark.parametrize("sunday", ["0", "7", "sun", "SUN", "0,7", "7-7"])
def test_sunday_is_zero_and_seven(sunday: str) -> None:
    assert slots(f"0 12 * * {sunday}", "UTC", "2026-03-01", "2026-03-16") == [
        "01 12:00",
        "08 12:00",
        "15 12:00",
    ]


@pytest.mark.parametrize(("number", "name"), list(enumerate(WEEKDAYS)))
def test_a_weekday_has_crons_number_and_name(number: int, name: str) -> None:
    for spelling in (str(number), name, name.lower(), f"{name}-{number}"):
        slot = Schedule(f"0 0 * * {spelling}").next(at("2026-01-01"))
        assert slot is not None
        assert slot.isoweekday() % 7 == number


def test_months_have_names() -> None:
    assert slots("0 0 1 feb,Nov-DEC *", "UTC", "2026-01-15", "2027-01-01") == ["01 00:00"] * 3
    assert Schedule("0 0 1 feb *").next(at("2026-01-15")) == at("2026-02-01")


def test_a_step_runs_from_the_start_of_its_range() -> None:
    assert slots("5-20/7 6 * * *", "UTC", "2026-01-01", "2026-01-02") == [
        "01 06:05",
        "01 06:12",
        "01 06:19",
    ]


def test_a_range_of_one_value_with_a_step_is_that_value() -> None:
    assert slots("0 17-17/4 * * *", "UTC", "2026-01-01", "2026-01-02") == ["01 17:00"]
    assert "day-of-week field '3-3/0'" in refusal("0 0 * * 3-3/0")
    assert "hour field '1-5-5/2'" in refusal("0 1-5-5/2 * * *")


def test_day_of_month_or_day_of_week_fires_on_either() -> None:
    assert slots("0 0 13 * 5", "UTC", "2026-03-01", "2026-03-20") == [
        "06 00:00",
        "13 00:00",
        "20 00:00",
    ]
    assert slots("0 0 11 * 5", "UTC", "2026-03-07", "2026-03-13") == ["11 00:00", "13 00:00"]


def test_a_star_in_either_day_field_asks_for_both() -> None:
    assert slots("0 0 */2 * 5", "UTC", "2026-03-01", "2026-03-31") == ["13 00:00", "27 00:00"]
    assert slots("0 0 10-16 * */5", "UTC", "2026-03-01", "2026-03-31") == ["13 00:00", "15 00:00"]


def test_the_last_day_the_last_weekday_and_the_nth_weekday_are_known() -> None:
    assert slots("0 0 L * *", "UTC", "2028-02-01", "2028-03-31") == ["29 00:00", "31 00:00"]
    assert slots("0 0 LW * *", "UTC", "2026-02-01", "2026-06-01") == [
        "27 00:00",
        "31 00:00",
        "30 00:00",
        "29 00:00",
    ]
    assert slots("0 0 * * 5L", "UTC", "2026-03-01", "2026-05-01") == ["27 00:00", "24 00:00"]
    assert slots("0 0 * * MON#2", "UTC", "2026-03-01", "2026-05-01") == ["09 00:00", "13 00:00"]


def test_a_leap_day_waits_for_a_leap_year_also_across_2100() -> None:
    leap_day = Schedule("0 0 29 2 *")
    assert leap_day.next(at("2026-01-01")) == at("2028-02-29")
    assert leap_day.next(at("2096-02-29")) == at("2104-02-29")
    assert leap_day.previous(at("2104-02-29")) == at("2096-02-29")


def test_six_fields_start_with_the_second() -> None:
    assert slots("15,45 30 4 * * *", "UTC", "2026-01-01", "2026-01-02") == [
        "01 04:30:15",
        "01 04:30:45",
    ]
    assert slots("*/20 0 0 1 1 *", "Asia/Tokyo", "2025-12-31", "2026-01-01") == [
        "31 15:00",
        "31 15:00:20",
        "31 15:00:40",
    ]


@pytest.mark.parametrize(
    ("nickname", "cron"),
    [
        ("@yearly", "0 0 1 1 *"),
        ("@annually", "0 0 1 1 *"),
        ("@monthly", "0 0 1 * *"),
        ("@weekly", "0 0 * * 0"),
        ("@daily", "0 0 * * *"),
        ("@midnight", "0 0 * * *"),
        ("@hourly", "0 * * * *"),
        (" @Daily ", "0 0 * * *"),
    ],
)
def test_a_nickname_fires_as_the_expression_it_stands_for(nickname: str, cron: str) -> None:
    start = at("2026-03-01")
    named = islice(Schedule(nickname, "Europe/Berlin").between(start, start + 900 * DAY), 900)
    assert list(named) == list(
        islice(Schedule(cron, "Europe/Berlin").between(start, start + 900 * DAY), 900)
    )


# Refusals


@pytest.mark.parametrize(
    ("cron", "parts"),
    [
        ("60 * * * *", ["'60 * * * *'", "minute field '60'", "0-59"]),
        ("0 24 * * *", ["hour field '24'", "0-23"]),
        ("0 0 32 * *", ["day-of-month field '32'", "1-31", "L ", "LW"]),
        ("0 0 0 * *", ["day-of-month field '0'"]),
        ("0 0 1 13 *", ["month field '13'", "JAN-DEC"]),
        ("0 0 * * 8", ["day-of-week field '8'", "0 and 7 are Sunday", "SUN-SAT"]),
        ("0 0 * * FRI-MON", ["day-of-week field 'FRI-MON'"]),
        ("0 0 * * 1#6", ["day-of-week field '1#6'"]),
        ("60 0 0 * * *", ["second field '60'", "0-59"]),
        ("*/0 * * * *", ["minute field '*/0'", "steps"]),
        ("1,,2 * * * *", ["minute field '1,,2'"]),
        ("0 0 ? * *", ["day-of-month field '?'"]),
        ("٣ * * * *", ["'٣ * * * *'", "ASCII", "digits are 0-9"]),
        (f"*/{'9' * 5000} * * * *", ["(5,010 characters)", "at most 1,000 characters"]),
        ("* * * *", ["'* * * *'", "has 4 fields", "five", "six", "@daily"]),
        ("", ["''", "has 0 fields"]),
        ("0 0 0 1 1 * 2026", ["has 7 fields"]),
        ("@reboot", ["'@reboot'", "does not name a time", "@daily"]),
        ("@fortnightly", ["'@fortnightly'", "@weekly"]),
    ],
)
def test_a_wrong_expression_is_refused_with_its_field_and_what_is_allowed(
    cron: str, parts: list[str]
) -> None:
    message = refusal(cron)
    assert [part for part in parts if part not in message] == []
    assert "\n" not in message
    assert "allowed" in message


@pytest.mark.parametrize(
    "cron", ["0 0 30 2 *", "0 0 31 2,4,6,9,11 *", "0 0 */31 2 MON#5", "0 0 0 30 FEB *"]
)
def test_a_date_that_never_comes_is_refused(cron: str) -> None:
    message = refusal(cron)
    assert repr(cron) in message
    assert "never fires" in message
    assert "day-of-month, month and day-of-week" in message


def test_a_time_that_the_clock_always_skips_is_refused_in_that_zone_alone() -> None:
    assert "never fires in America/New_York" in refusal("* 2 * 3 SUN#2", "America/New_York")
    assert Schedule("* 2 * 3 SUN#2", "Europe/Berlin").next(at("2026-01-01")) == at(
        "2026-03-08T01:00"
    )
    assert Schedule("0 2 * 3 SUN#2", "America/New_York").next(at("2026-01-01")) == at(
        "2026-03-08T07:00"
    )


@pytest.mark.parametrize(
    "zone",
    ["Europe/Atlantis", "", "Europe", "../etc/passwd", "/etc/localtime", "\0", "CEST", "x" * 5000],
)
def test_an_unknown_zone_is_refused_by_its_name(zone: str) -> None:
    message = refusal("0 0 * * *", zone)
    assert echoed(zone) in message
    assert "'Europe/Berlin'" in message


def test_a_refusal_is_a_batch_error_and_a_value_error() -> None:
    assert issubclass(InvalidSchedule, BatchError)
    with pytest.raises(ValueError, match="minute field"):
        Schedule("x * * * *")


def test_a_naive_datetime_is_refused_by_the_name_of_its_argument() -> None:
    daily, naive = Schedule("@daily"), datetime(2026, 1, 1)
    with pytest.raises(ValueError, match="`after` is the naive datetime 2026-01-01"):
        daily.next(naive)
    with pytest.raises(ValueError, match="`before` is the naive"):
        daily.previous(naive)
    with pytest.raises(ValueError, match="`after` is the naive"):
        daily.between(naive, at("2026-01-02"))
    with pytest.raises(ValueError, match="`until` is the naive"):
        daily.between(at("2026-01-01"), naive)


# Clock changes


def test_a_skipped_fixed_time_fires_once_at_the_instant_of_the_jump() -> None:
    assert slots("30 2 * * *", "Europe/Berlin", "2026-03-28", "2026-03-30T12:00") == [
        "28 01:30",
        "29 01:00",
        "30 00:30",
    ]


def test_the_first_and_the_last_second_of_a_gap_fire_at_the_same_instant() -> None:
    for time in ("0 0 2", "59 59 2"):
        assert slots(f"{time} * * *", "Europe/Berlin", "2026-03-28T12:00", "2026-03-29T12:00") == [
            "29 01:00"
        ]


def test_skipped_fixed_times_and_the_time_after_them_share_one_slot() -> None:
    assert slots("0,30 2,3 * * *", "Europe/Berlin", "2026-03-29", "2026-03-29T12:00") == [
        "29 01:00",
        "29 01:30",
    ]


def test_a_repeated_fixed_time_fires_the_first_time_only() -> None:
    assert slots("30 2 * * *", "Europe/Berlin", "2026-10-24T12:00", "2026-10-26") == ["25 00:30"]
    assert Schedule("30 2 * * *", "Europe/Berlin").previous(at("2026-10-25T01:10")) == at(
        "2026-10-25T00:30"
    )


def test_a_wildcard_skips_a_skipped_hour_and_fires_in_both_passes_of_a_repeated_one() -> None:
    assert slots("*/30 2 * * *", "Europe/Berlin", "2026-03-28T12:00", "2026-03-29T12:00") == []
    autumn = slots("*/30 2 * * *", "Europe/Berlin", "2026-10-24T12:00", "2026-10-25T12:00")
    assert autumn == ["25 00:00", "25 00:30", "25 01:00", "25 01:30"]


def test_an_hourly_schedule_follows_real_time() -> None:
    for day in ("2026-03-29", "2026-10-25"):
        hours = list(Schedule("@hourly", "Europe/Berlin").between(at(day), at(day) + DAY))
        assert hours == [at(day) + hour * timedelta(hours=1) for hour in range(1, 25)]


def test_every_hour_as_a_range_is_fixed_and_not_a_wildcard() -> None:
    autumn = slots("30 0-23 * * *", "Europe/Berlin", "2026-10-25", "2026-10-25T03:00")
    assert autumn == ["25 00:30", "25 02:30"]


def test_a_wildcard_second_follows_real_time_as_well() -> None:
    assert slots("*/30 30 2 * * *", "Europe/Berlin", "2026-03-29", "2026-03-29T12:00") == []
    assert len(slots("*/30 30 2 * * *", "Europe/Berlin", "2026-10-25", "2026-10-25T12:00")) == 4
    assert slots("0-59 30 2 * * *", "Europe/Berlin", "2026-03-29", "2026-03-29T12:00") == [
        "29 01:00"
    ]


def test_lord_howe_changes_by_half_an_hour() -> None:
    zone = "Australia/Lord_Howe"
    assert slots("15 2 * * *", zone, "2026-10-03T12:00", "2026-10-04T12:00") == ["03 15:30"]
    assert slots("45 1 * * *", zone, "2026-04-04T12:00", "2026-04-05T12:00") == ["04 14:45"]
    assert slots("*/15 1 * * *", zone, "2026-04-04T12:00", "2026-04-05T12:00") == [
        f"04 {time}" for time in ("14:00", "14:15", "14:30", "14:45", "15:00", "15:15")
    ]
    for day in ("2026-10-03T12:00", "2026-04-04T12:00"):
        assert len(list(Schedule("* 3 * * *", zone).between(at(day), at(day) + DAY))) == 60


def test_santiago_skips_midnight_and_loses_no_week() -> None:
    zone = "America/Santiago"
    assert slots("0 0 * * sun", zone, "2026-08-29", "2026-09-14") == [
        "30 04:00",
        "06 04:00",
        "13 03:00",
    ]
    assert slots("* 0 * * 0", zone, "2026-09-05", "2026-09-12") == []
    assert slots("30 23 * * 6", zone, "2026-04-04T12:00", "2026-04-05T12:00") == ["05 02:30"]


def test_beirut_and_the_azores_change_at_midnight() -> None:
    assert slots("15 0 * * *", "Asia/Beirut", "2026-03-28T12:00", "2026-03-29T12:00") == [
        "28 22:00"
    ]
    assert slots("30 0 * * *", "Atlantic/Azores", "2026-03-28T12:00", "2026-03-29T12:00") == [
        "29 01:00"
    ]
    assert slots("30 0 25 10 *", "Atlantic/Azores", "2026-10-24", "2026-10-26") == ["25 00:30"]
    assert slots("*/30 0 25 10 *", "Atlantic/Azores", "2026-10-24", "2026-10-26") == [
        f"25 {time}" for time in ("00:00", "00:30", "01:00", "01:30")
    ]


def test_chatham_changes_at_a_quarter_to_three() -> None:
    assert slots("0 3 * * *", "Pacific/Chatham", "2026-09-26T12:00", "2026-09-27T12:00") == [
        "26 14:00"
    ]
    assert len(slots("* 2 * * *", "Pacific/Chatham", "2026-09-26T12:00", "2026-09-27T12:00")) == 45


def test_morocco_sets_its_clock_back_for_ramadan() -> None:
    assert slots("30 2 * * *", "Africa/Casablanca", "2026-02-14T12:00", "2026-02-16T12:00") == [
        "15 01:30",
        "16 02:30",
    ]
    assert slots("30 2 * * *", "Africa/Casablanca", "2026-03-21T12:00", "2026-03-23T12:00") == [
        "22 02:00",
        "23 01:30",
    ]


def test_a_day_that_samoa_skipped_fires_once_right_after() -> None:
    noon = slots("0 12 * * *", "Pacific/Apia", "2011-12-29", "2011-12-31")
    assert noon == ["29 22:00", "30 10:00", "30 22:00"]
    assert slots("15 6,18 30 12 *", "Pacific/Apia", "2011-12-01", "2012-01-31") == ["30 10:00"]
    assert slots("* * 30 12 *", "Pacific/Apia", "2011-12-01", "2012-01-31") == []


def test_a_day_that_kwajalein_skipped_fires_once_right_after() -> None:
    assert slots("0 6 21 8 *", "Pacific/Kwajalein", "1993-08-01", "1993-09-01") == ["21 12:00"]


def test_a_day_that_alaska_had_twice_fires_once() -> None:
    # 18 October 1867 came twice, and the offsets of then have seconds.
    assert len(slots("0 20 18 10 *", "America/Juneau", "1867-10-10", "1867-10-25")) == 1
    assert len(slots("*/60 20 18 10 *", "America/Juneau", "1867-10-10", "1867-10-25")) == 2


# Next, previous and between


def test_next_and_previous_leave_out_the_instant_they_are_given() -> None:
    daily, noon = Schedule("0 12 * * *"), at("2026-01-10T12:00")
    assert daily.next(noon) == noon + DAY
    assert daily.previous(noon) == noon - DAY
    assert daily.next(noon - MICROSECOND) == noon
    assert daily.previous(noon + MICROSECOND) == noon


def test_between_leaves_out_its_start_and_keeps_its_end() -> None:
    assert slots("0 * * * *", "UTC", "2026-01-01T10:00", "2026-01-01T12:00") == [
        "01 11:00",
        "01 12:00",
    ]
    assert slots("0 * * * *", "UTC", "2026-01-01T12:00", "2026-01-01T12:00") == []
    assert slots("0 * * * *", "UTC", "2026-01-01T12:00", "2026-01-01T10:00") == []


def test_between_finds_slots_only_when_asked() -> None:
    forever = Schedule("* * * * * *").between(at("2026-01-01"), at("9999-01-01"))
    assert isinstance(forever, Iterator)
    assert list(islice(forever, 2)) == [at("2026-01-01T00:00:01"), at("2026-01-01T00:00:02")]


def test_any_zone_may_ask_and_the_answer_is_in_utc() -> None:
    asked = datetime(2026, 1, 1, 5, tzinfo=timezone(timedelta(hours=9)))
    for zone in ("UTC", "Europe/Berlin"):
        daily = Schedule("@daily", zone)
        found = [
            daily.next(asked),
            daily.previous(asked),
            *daily.between(asked, asked.astimezone(ZoneInfo(zone)) + DAY),
        ]
        assert [slot.tzinfo for slot in found if slot] == [UTC] * 3
        assert found[0] == (at("2026-01-01") if zone == "UTC" else at("2025-12-31T23:00"))


@pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin", "Asia/Tokyo"])
@pytest.mark.parametrize("cron", ["0 0 1 1 *", "* * 1 1 *"])
def test_the_ends_of_the_calendar_have_no_slot_beyond_them(zone: str, cron: str) -> None:
    assert Schedule(cron, zone).next(at("9999-06-01")) is None
    assert Schedule(cron, zone).previous(datetime(1, 1, 1, tzinfo=UTC)) is None
    assert (
        list(Schedule(cron, zone).between(at("9999-06-01"), datetime.max.replace(tzinfo=UTC))) == []
    )


CRONS = st.sampled_from(
    [
        "* * * * *",
        "*/7 * * * *",
        "0 * * * *",
        "* 2 * * *",
        "30 2 * * *",
        "0 0 * * *",
        "0,20,40 0-3 * * *",
        "15 1-23/2 * * 0",
        "5 0 13 * 5",
        "0 0 29 2 *",
        "0 3 L * *",
        "* 0 * * SUN#1",
        "*/25 59 1,2 * * *",
        "10,50 30 2 * 3,4,9-11 *",
    ]
)
ZONES = st.sampled_from(
    [
        "UTC",
        "Europe/Berlin",
        "America/New_York",
        "America/Santiago",
        "Australia/Lord_Howe",
        "Pacific/Chatham",
        "Africa/Casablanca",
        "Atlantic/Azores",
        "Antarctica/Casey",
        "Antarctica/Troll",
        "Asia/Kathmandu",
    ]
)
ANY_TIME = st.datetimes(datetime(2020, 1, 1), datetime(2030, 1, 1), timezones=st.just(UTC))
CHANGES = [
    "2026-03-29T01:00",
    "2026-10-25T01:00",
    "2026-09-06T04:00",
    "2026-04-04T15:00",
    "2026-02-15T02:00",
    "2021-03-13T13:00",
]
NEAR_A_CHANGE = st.builds(
    lambda change, ago: at(change) - ago,
    st.sampled_from(CHANGES),
    st.timedeltas(timedelta(hours=-4), timedelta(hours=4)),
)
MOMENTS = ANY_TIME | NEAR_A_CHANGE
FRACTIONS = st.floats(0, 1, exclude_max=True)
thoroughly = settings(max_examples=300, deadline=None, database=None)


@thoroughly
@given(CRONS, ZONES, MOMENTS, FRACTIONS)
def test_no_slot_lies_between_a_moment_and_its_next(
    cron: str, zone: str, moment: datetime, fraction: float
) -> None:
    slot = Schedule(cron, zone).next(moment)
    assert slot is not None
    assert slot > moment
    within = moment + fraction * (slot - moment)
    asked_afresh = Schedule(cron, zone)
    assert asked_afresh.next(min(within, slot - MICROSECOND)) == slot
    before = asked_afresh.previous(slot)
    assert before is not None
    assert before <= moment


@thoroughly
@given(CRONS, ZONES, MOMENTS)
def test_next_and_previous_undo_each_other(cron: str, zone: str, moment: datetime) -> None:
    schedule = Schedule(cron, zone)
    ahead, back = schedule.next(moment), schedule.previous(moment)
    assert ahead is not None
    assert back is not None
    assert back < moment < ahead or back < moment == schedule.next(back)
    assert schedule.previous(ahead + MICROSECOND) == ahead
    assert schedule.next(back - MICROSECOND) == back
    assert schedule.next(back) in (moment, ahead)
    assert schedule.previous(ahead) in (moment, back)


@thoroughly
@given(CRONS, ZONES, MOMENTS, st.timedeltas(timedelta(0), timedelta(hours=6)))
def test_between_forwards_is_previous_backwards(
    cron: str, zone: str, start: datetime, length: timedelta
) -> None:
    schedule, end = Schedule(cron, zone), start + length
    forwards = list(schedule.between(start, end))
    assert all(one < other for one, other in pairwise(forwards))
    backwards = []
    slot = schedule.previous(end + MICROSECOND)
    while slot is not None and slot > start:
        backwards.append(slot)
        slot = schedule.previous(slot)
    assert forwards == backwards[::-1]


# The shared parser


def random_days(rng: random.Random) -> str:
    """Random day-of-month, month and day-of-week fields in every form that cron allows."""
    names = WEEKDAYS
    first, last = sorted(rng.sample(range(8), 2))
    weekday = rng.choice(
        [
            "*",
            "*/2",
            str(first),
            f"{first}-{last}",
            f"{first},{last}",
            f"{first}#{rng.randint(1, 4)}",
        ]
    )
    named = rng.choice(
        [names[first % 7], f"{names[first % 6]}-SAT", f"mon-fri/{rng.randint(1, 3)}", f"{first}L"]
    )
    day = rng.choice(["*", "*", "*/3", str(rng.randint(1, 28)), "1-15", "1,11,21", "L", "LW"])
    month = rng.choice(["*", "*", str(rng.randint(1, 12)), "JAN-JUN", "mar,sep", "*/5"])
    return f"{day} {month} {rng.choice([weekday, named])}"


@pytest.mark.rest
def test_weekday_numbers_are_crons_as_naive_cronsim_in_utc_has_them() -> None:
    for number in range(3000):
        rng = random.Random(number)
        cron = f"{rng.randrange(60)} {rng.choice(['*/6', '3', '20-22'])} {random_days(rng)}"
        start = at("2026-01-01") + rng.randrange(4 * 366 * 86400) * timedelta(seconds=1)
        naive = start.replace(tzinfo=None)
        shared = Schedule(cron)
        expected_slots = [wall.replace(tzinfo=UTC) for wall in islice(CronSim(cron, naive), 4)]
        assert list(islice(shared.between(start, at("9999-01-01")), 4)) == expected_slots, cron
        before: datetime | None = start
        for expected in islice(CronSim(cron, naive, reverse=True), 2):
            assert before is not None
            before = shared.previous(before)
            assert before == expected.replace(tzinfo=UTC), cron


def test_weekday_numbers_are_crons_as_the_model_has_them() -> None:
    quarters = cron_model.clock("UTC", at("2026-02-23"), at("2026-04-06"), 900)
    for number in range(150):
        rng = random.Random(number)
        cron = (
            f"*/15 {rng.randrange(24)} {cron_model.part(rng, 1, 31)} * {cron_model.part(rng, 0, 7)}"
        )
        found = list(Schedule(cron).between(at("2026-02-22T23:59"), at("2026-04-06")))
        job = cron_model.Job(cron)
        assert found == [
            cron_model.EPOCH + timedelta(seconds=time)
            for time, local in quarters
            if job.matches(local)
        ], cron


def test_an_expression_is_parsed_once_for_everyone_who_shares_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shared = schedule("17 4 * * *", "Europe/Berlin")
    monkeypatch.delattr(CronSim, "__init__")
    assert schedule("17 4 * * *", "Europe/Berlin") is shared
    assert shared.next(at("2030-01-01")) == at("2030-01-01T03:17")
    assert shared.previous(at("2030-01-01")) == at("2029-12-31T03:17")


def test_a_moment_before_a_known_slot_is_answered_without_a_search(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    daily = Schedule("0 12 * * *")
    start, noon = at("2026-01-10T01:00"), at("2026-01-10T12:00")
    assert daily.next(start) == noon
    monkeypatch.delattr(CronSim, "__next__")
    assert daily.next(start) == daily.next(noon - MICROSECOND) == noon
    with pytest.raises(TypeError):
        daily.next(noon)
    with pytest.raises(TypeError):
        daily.next(start - MICROSECOND)


def test_threads_may_share_a_schedule() -> None:
    shared = Schedule("*/7 * * * *", "Europe/Berlin")
    starts = [at("2026-01-01") + number * timedelta(hours=5, minutes=3) for number in range(400)]
    expected = [Schedule("*/7 * * * *", "Europe/Berlin").next(start) for start in starts]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(shared.next, starts * 3)) == expected * 3


# As a value


def test_schedules_are_equal_by_expression_and_zone() -> None:
    one, other = Schedule("0 0 * * *", "Asia/Tokyo"), Schedule("0 0 * * *", "Asia/Tokyo")
    one.next(at("2030-01-01"))
    assert one == other
    assert hash(one) == hash(other)
    assert len({one, other, Schedule("0 0 * * *"), Schedule("0 1 * * *", "Asia/Tokyo")}) == 3
    assert one.zone == ZoneInfo("Asia/Tokyo")
    assert Schedule("0 0 * * *").timezone == "UTC"


def test_a_schedule_can_not_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        Schedule("0 0 * * *").cron = "1 0 * * *"  # type: ignore[misc]


def test_a_pickled_schedule_fires_as_before() -> None:
    berlin = Schedule("30 2 * * *", "Europe/Berlin")
    restored = pickle.loads(pickle.dumps(berlin))
    assert restored == berlin
    assert restored.next(at("2026-03-29")) == at("2026-03-29T01:00")


@pytest.mark.parametrize(
    ("cron", "zone", "words"),
    [
        ("@daily", "UTC", "At 00:00 every day"),
        ("@hourly", "UTC", "At the start of every hour"),
        ("@weekly", "Asia/Tokyo", "At 00:00 on Sunday (Asia/Tokyo)"),
        ("*/15 * * * *", "UTC", "Every 15th minute of every hour"),
        ("30 9 * * mon-fri", "Europe/Berlin", "At 09:30 on Monday through Friday (Europe/Berlin)"),
        ("0 9 L * *", "UTC", "At 09:00 on the last day of every month"),
        ("15 30 4 * * *", "UTC", "At 04:30:15 every day"),
        (
            "0 0 1,21,22,23,31 * *",
            "UTC",
            "At 00:00 on the first, the 21st, the 22nd, the 23rd, and the 31st day of month",
        ),
        ("0 0 11,12,13 * *", "UTC", "At 00:00 on the 11th, the 12th, and the 13th day of month"),
    ],
)
def test_a_schedule_can_be_said_in_words(cron: str, zone: str, words: str) -> None:
    assert Schedule(cron, zone).words == words


def test_every_expression_has_words_that_begin_with_a_capital() -> None:
    for number in range(500):
        rng = random.Random(number)
        words = Schedule(
            f"{cron_model.part(rng, 0, 59)} {cron_model.part(rng, 0, 23)} {random_days(rng)}"
        ).words
        assert words[0].isupper(), words


def test_the_slots_that_follow_are_as_many_as_asked_for_or_as_there_are() -> None:
    after = datetime(2026, 1, 1, tzinfo=UTC)
    leap_days = schedule("0 0 29 2 *")
    assert leap_days.following(after, 2) == [
        datetime(2028, 2, 29, tzinfo=UTC),
        datetime(2032, 2, 29, tzinfo=UTC),
    ]
    assert leap_days.following(after, 0) == []
    assert leap_days.following(datetime(9999, 1, 1, tzinfo=UTC), 3) == []
