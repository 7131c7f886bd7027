"""What becomes of due slots: pure, so every case is cheap."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from service.batch.cron.cron import Schedule, schedule
from service.batch.firing.misfires import BUDGET, ON_TIME, Plan, plan, plan_none
from service.batch.tasks.policies import Missed

HOURLY = schedule("0 * * * *")
MINUTELY = schedule("* * * * *")
SECONDLY = schedule("* * * * * *")
NOW = datetime(2026, 3, 10, 12, 0, 30, tzinfo=UTC)
DAYS = timedelta(days=1)


def hours_ago(hours: float) -> datetime:
    return NOW - timedelta(hours=hours)


def at(hour: int) -> datetime:
    return NOW.replace(hour=hour, minute=0, second=0)


def to_the_end(schedule: Schedule, fired_until: datetime, now: datetime, policy: Missed) -> list[Plan]:
    plans = [plan(schedule, fired_until, now, policy)]
    while not plans[-1].is_complete:
        assert len(plans) < 1_000
        plans.append(plan(schedule, plans[-1].fired_until, now, policy))
    return plans


def test_nothing_is_due_before_the_next_slot() -> None:
    assert plan(HOURLY, at(12), NOW, Missed()) == Plan(NOW)


def test_a_cursor_ahead_of_now_stays_where_it_is() -> None:
    ahead = NOW + timedelta(hours=1)
    assert plan(MINUTELY, ahead, NOW, Missed()) == Plan(ahead)


def test_slots_at_most_a_minute_late_are_on_time_each_for_itself() -> None:
    made = plan(SECONDLY, NOW - timedelta(seconds=3), NOW, Missed("skip"))
    assert made.on_time == [NOW - timedelta(seconds=s) for s in (2, 1, 0)]
    assert made.missed is None


def test_a_slot_exactly_a_minute_late_was_missed() -> None:
    now = at(12) + ON_TIME
    assert plan(HOURLY, at(11), now, Missed("skip")).on_time == []
    assert plan(HOURLY, at(11), now - timedelta(microseconds=1), Missed("skip")).on_time == [at(12)]


def test_skip_runs_none_of_the_missed_slots_and_says_so_in_one_range() -> None:
    made = plan(HOURLY, hours_ago(5), NOW, Missed("skip"))
    assert (made.on_time, made.catch_up) == ([at(12)], [])
    assert made.missed is not None
    assert (made.missed.first, made.missed.last, made.missed.count) == (at(8), at(11), 4)
    assert made.missed.reason == "the service was down"


def test_once_runs_the_newest_missed_slot_for_all() -> None:
    made = plan(HOURLY, hours_ago(5), NOW, Missed("once"))
    assert (made.on_time, made.catch_up) == ([at(12)], [at(11)])
    assert made.missed is not None
    assert (made.missed.first, made.missed.last, made.missed.count) == (at(8), at(10), 3)


def test_once_with_one_missed_slot_leaves_no_range() -> None:
    made = plan(HOURLY, hours_ago(1.5), NOW, Missed("once"))
    assert (made.catch_up, made.missed) == ([at(11)], None)


def test_once_does_not_run_a_slot_older_than_its_age_limit() -> None:
    made = plan(schedule("0 1 * * *"), hours_ago(20), NOW, Missed("once", max_age=timedelta(hours=6)))
    assert made.catch_up == []
    assert made.missed is not None
    assert made.missed.count == 1


def test_all_runs_each_missed_slot_oldest_first() -> None:
    made = plan(HOURLY, hours_ago(5), NOW, Missed("all"))
    assert (made.catch_up, made.on_time, made.missed) == ([at(8), at(9), at(10), at(11)], [at(12)], None)


def test_all_within_an_age_runs_the_young_and_records_the_old() -> None:
    made = plan(HOURLY, hours_ago(5), NOW, Missed("all", max_age=timedelta(hours=2, minutes=30)))
    assert made.catch_up == [at(10), at(11)]
    assert made.missed is not None
    assert (made.missed.first, made.missed.last, made.missed.count) == (at(8), at(9), 2)


def test_all_with_a_count_runs_the_newest_of_them() -> None:
    made = plan(HOURLY, hours_ago(5), NOW, Missed("all", max_count=2))
    assert made.catch_up == [at(10), at(11)]
    assert made.missed is not None
    assert made.missed.count == 2


def test_a_long_catch_up_is_worked_off_in_bounded_steps() -> None:
    plans = to_the_end(SECONDLY, NOW - timedelta(hours=5), NOW, Missed("all"))
    assert all(len(p.catch_up) <= BUDGET for p in plans)
    assert sum(len(p.catch_up) for p in plans) == 5 * 3600 - 60
    assert [len(p.on_time) for p in plans] == [0] * (len(plans) - 1) + [60]


def test_what_does_not_run_is_one_range_however_long_the_downtime_was() -> None:
    (made,) = to_the_end(SECONDLY, NOW - 30 * DAYS, NOW, Missed("skip"))
    assert made.missed is not None
    assert (made.missed.count, len(made.on_time)) == (30 * 86_400 - 60, 60)


def test_a_plan_lets_no_more_missed_slots_run_than_its_budget_and_those_too_old_stand_in_the_first() -> None:
    policy = Missed("all", max_age=timedelta(hours=3, minutes=30))
    first = plan(HOURLY, hours_ago(6), NOW, policy, budget=2)
    assert (first.catch_up, first.on_time, first.is_complete) == ([at(9), at(10)], [], False)
    assert first.missed is not None
    assert (first.missed.first, first.missed.last) == (at(7), at(8))
    second = plan(HOURLY, first.fired_until, NOW, policy, budget=2)
    assert (second.catch_up, second.missed, second.is_complete) == ([at(11)], None, True)


def test_a_paused_schedule_runs_nothing_not_even_on_time() -> None:
    made = plan_none(HOURLY, hours_ago(2), NOW, "paused by ann")
    assert (made.on_time, made.catch_up, made.fired_until) == ([], [], NOW)
    assert made.missed is not None
    assert (made.missed.count, made.missed.reason) == (2, "paused by ann")


CRONS = ("* * * * *", "*/7 * * * *", "0 * * * *", "30 2 * * *", "15 3 * * 1", "*/20 * * * * *", "0 2 1 * *")
ZONES = ("UTC", "Europe/Berlin", "America/New_York")
POLICIES = st.builds(
    Missed,
    st.sampled_from(["skip", "once", "all"]),
    max_age=st.integers(60, 200_000).map(lambda s: timedelta(seconds=s)),
    max_count=st.one_of(st.none(), st.integers(1, 50)),
)


@given(
    st.sampled_from(CRONS),
    st.sampled_from(ZONES),
    st.integers(0, 400_000),
    st.integers(0, 59_999_999),
    POLICIES,
)
def test_every_due_slot_is_accounted_for_exactly_once(
    cron: str, zone: str, lag: int, part: int, policy: Missed
) -> None:
    timetable = schedule(cron, zone)
    now = datetime(2026, 3, 30, 3, 10, tzinfo=UTC) + timedelta(microseconds=part)
    cursor = now - timedelta(seconds=lag)
    due = list(timetable.between(cursor, now))
    plans = to_the_end(timetable, cursor, now, policy)
    run = [slot for p in plans for slot in (*p.catch_up, *p.on_time)]
    missed = [
        slot for p in plans if p.missed for slot in timetable.between(p.missed.first - DAYS / 86400, p.missed.last)
    ]
    assert sorted(run + missed) == due
    assert sum(p.missed.count for p in plans if p.missed) == len(missed)
    assert plans[-1].fired_until == now
    late = [slot for slot in run if slot <= now - ON_TIME]
    limits = {"skip": 0, "once": 1, "all": policy.max_count or len(due)}
    assert len(late) <= limits[policy.policy]
    assert all(slot > now - policy.max_age for slot in late)
