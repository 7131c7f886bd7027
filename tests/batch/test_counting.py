"""Slots are counted by whole days, hours and minutes, and the count equals the number of slots
listed one by one.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_system.batch.cron import utc_offsets
from batch_system.batch.cron.counting import AROUND, count
from batch_system.batch.cron.cron import Schedule, schedule

CRONS = (
    *(
        "* * * * *",
        "*/7 3-9 * * *",
        "0 * * * *",
        "30 2 * * *",
        "0 0 * * *",
        "59 23 * * *",
        "15 3 * * 1",
    ),
    *(
        "*/20 * * * * *",
        "5,50 1-59/2 * * * *",
        "0 2 1 * *",
        "0 12 29 2 *",
        "* 0-2 * 3,10 *",
        "0 0 L * *",
    ),
)
ZONES = (
    *(
        "UTC",
        "Europe/Berlin",
        "America/New_York",
        "America/Santiago",
        "Australia/Lord_Howe",
        "Asia/Kathmandu",
    ),
    *("Africa/Casablanca", "Pacific/Apia"),
)
MOMENTS = (
    *(
        "2026-03-28",
        "2026-10-24",
        "2026-03-07",
        "2026-10-31",
        "2026-04-04",
        "2026-09-05",
        "2026-02-14",
    ),
    *("2011-12-29", "2024-02-27"),
)


@given(
    st.sampled_from(CRONS),
    st.sampled_from(ZONES),
    st.sampled_from(MOMENTS),
    st.integers(-200_000, 200_000),
    st.integers(0, 300_000),
    st.integers(0, 999_999),
)
def test_the_count_equals_the_number_of_listed_slots(
    cron: str, zone: str, moment: str, shift: int, length: int, part: int
) -> None:
    timetable = schedule(cron, zone)
    after = datetime.fromisoformat(moment).replace(tzinfo=UTC) + timedelta(
        seconds=shift, microseconds=part
    )
    until = after + timedelta(seconds=length)
    assert count(timetable, after, until) == len(list(timetable.between(after, until)))


@pytest.mark.parametrize("microseconds", [0, 1, 500_000, 999_999, 1_000_001, 1_999_999])
def test_an_interval_that_ends_within_a_second_of_a_clock_change_is_counted(
    microseconds: int,
) -> None:
    """Clock changes are searched for up to `AROUND` after the end of the interval, which is any
    instant.
    """
    change = datetime(2026, 3, 29, 1, tzinfo=UTC)
    end = change + timedelta(microseconds=microseconds)
    assert utc_offsets.change(ZoneInfo("Europe/Berlin"), change - timedelta(days=3), end) == change
    until = end - AROUND
    assert count(schedule("0 * * * *", "Europe/Berlin"), until - timedelta(hours=48), until) == 48


@pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin"])
def test_ten_years_of_seconds_take_some_thousand_steps(
    zone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 0
    following = Schedule.next

    def counted(self: Schedule, after: datetime) -> datetime | None:
        nonlocal steps
        steps += 1
        return following(self, after)

    monkeypatch.setattr(Schedule, "next", counted)
    after = datetime(2020, 1, 1, 5, 17, 3, tzinfo=UTC)
    until = datetime(2030, 1, 1, tzinfo=UTC) if zone == "UTC" else datetime(2020, 3, 1, tzinfo=UTC)
    assert count(schedule("* * * * * *", zone), after, until) == (until - after).total_seconds()
    assert steps < 5_000
