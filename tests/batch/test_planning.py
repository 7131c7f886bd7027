"""The plan for due slots: on time, caught up, missed."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from batch_system.batch.cron.cron import Schedule, schedule
from batch_system.batch.firing.misfires import BUDGET, SlotPlan, plan_all_missed, plan_slots
from batch_system.batch.ledger.missed_ranges import Cause
from batch_system.batch.tasks.declaration import ON_TIME, Missed

HOURLY = schedule("0 * * * *")
MINUTELY = schedule("* * * * *")
SECONDLY = schedule("* * * * * *")
NOW = datetime(2026, 3, 10, 12, 0, 30, tzinfo=UTC)
DAYS = timedelta(days=1)


def hours_ago(hours: float) -> datetime:
    return NOW - timedelta(hours=hours)


def at(hour: int) -> datetime:
    return NOW.replace(hour=hour, minute=0, second=0)


def plan_until_complete(
    schedule: Schedule, fired_until: datetime, now: datetime, policy: Missed
) -> list[SlotPlan]:
    plans = [plan_slots(schedule, fired_until, now, policy)]
    while not plans[-1].is_complete:
        assert len(plans) < 1_000
        plans.append(plan_slots(schedule, plans[-1].fired_until, now, policy))
    return plans


def test_nothing_is_due_before_the_next_slot() -> None:
    assert plan_slots(HOURLY, at(12), NOW, Missed()) == SlotPlan(NOW)


def test_a_cursor_ahead_of_now_stays_where_it_is() -> None:
    ahead = NOW + timedelta(hours=1)
    assert plan_slots(MINUTELY, ahead, NOW, Missed()) == SlotPlan(ahead)


def test_each_slot_less_than_a_minute_late_runs_as_on_time() -> None:
    plan = plan_slots(SECONDLY, NOW - timedelta(seconds=3), NOW, Missed("skip"))
    assert plan.on_time == [NOW - timedelta(seconds=s) for s in (2, 1, 0)]
    assert plan.missed is None


def test_a_task_that_wants_all_slots_fired_together_catches_up_all_but_the_newest() -> None:
    """Its overlap policy would skip them: the last minute of each outage."""
    begin = NOW - timedelta(seconds=90)
    plan = plan_slots(SECONDLY, begin, NOW, Missed("all"))
    assert (plan.on_time, plan.missed) == ([NOW], None)
    assert plan.catch_up == [begin + timedelta(seconds=n) for n in range(1, 90)]
    late = plan_slots(SECONDLY, NOW - timedelta(seconds=3), NOW, Missed("all"))
    assert (late.catch_up, late.on_time) == (
        [NOW - timedelta(seconds=2), NOW - timedelta(seconds=1)],
        [NOW],
    )


def test_a_slot_exactly_a_minute_late_was_missed() -> None:
    now = at(12) + ON_TIME
    assert plan_slots(HOURLY, at(11), now, Missed("skip")).on_time == []
    assert plan_slots(HOURLY, at(11), now - timedelta(microseconds=1), Missed("skip")).on_time == [
        at(12)
    ]


def test_skip_runs_none_of_the_missed_slots_and_records_one_range() -> None:
    plan = plan_slots(HOURLY, hours_ago(5), NOW, Missed("skip"))
    assert (plan.on_time, plan.catch_up) == ([at(12)], [])
    assert plan.missed is not None
    assert (plan.missed.first, plan.missed.last, plan.missed.count) == (at(8), at(11), 4)
    assert plan.missed.reason == "no service fired it"


def test_once_runs_only_the_newest_missed_slot() -> None:
    plan = plan_slots(HOURLY, hours_ago(5), NOW, Missed("once"))
    assert (plan.on_time, plan.catch_up) == ([at(12)], [at(11)])
    assert plan.missed is not None
    assert (plan.missed.first, plan.missed.last, plan.missed.count) == (at(8), at(10), 3)


def test_once_with_one_missed_slot_leaves_no_range() -> None:
    plan = plan_slots(HOURLY, hours_ago(1.5), NOW, Missed("once"))
    assert (plan.catch_up, plan.missed) == ([at(11)], None)


def test_once_does_not_run_a_slot_older_than_its_age_limit() -> None:
    plan = plan_slots(
        schedule("0 1 * * *"), hours_ago(20), NOW, Missed("once", max_age=timedelta(hours=6))
    )
    assert plan.catch_up == []
    assert plan.missed is not None
    assert plan.missed.count == 1


def test_all_runs_each_missed_slot_oldest_first() -> None:
    plan = plan_slots(HOURLY, hours_ago(5), NOW, Missed("all"))
    assert (plan.catch_up, plan.on_time, plan.missed) == (
        [at(8), at(9), at(10), at(11)],
        [at(12)],
        None,
    )


def test_all_with_max_age_runs_the_younger_slots_and_records_the_older_ones_as_missed() -> None:
    plan = plan_slots(
        HOURLY, hours_ago(5), NOW, Missed("all", max_age=timedelta(hours=2, minutes=30))
    )
    assert plan.catch_up == [at(10), at(11)]
    assert plan.missed is not None
    assert (plan.missed.first, plan.missed.last, plan.missed.count) == (at(8), at(9), 2)


def test_all_with_max_count_runs_the_newest_slots() -> None:
    plan = plan_slots(HOURLY, hours_ago(5), NOW, Missed("all", max_count=2))
    assert plan.catch_up == [at(10), at(11)]
    assert plan.missed is not None
    assert plan.missed.count == 2


def test_a_long_catch_up_takes_several_plans_of_at_most_the_budget() -> None:
    plans = plan_until_complete(SECONDLY, NOW - timedelta(hours=5), NOW, Missed("all"))
    assert all(len(p.catch_up) <= BUDGET for p in plans)
    assert sum(len(p.catch_up) for p in plans) == 5 * 3600 - 1
    assert [len(p.on_time) for p in plans] == [0] * (len(plans) - 1) + [1]


def test_the_missed_slots_of_a_month_are_one_range() -> None:
    (plan,) = plan_until_complete(SECONDLY, NOW - 30 * DAYS, NOW, Missed("skip"))
    assert plan.missed is not None
    assert (plan.missed.count, len(plan.on_time)) == (30 * 86_400 - 60, 60)


def test_a_plan_keeps_to_its_budget_and_the_first_one_records_the_slots_over_max_age() -> None:
    policy = Missed("all", max_age=timedelta(hours=3, minutes=30))
    first = plan_slots(HOURLY, hours_ago(6), NOW, policy, budget=2)
    assert (first.catch_up, first.on_time, first.is_complete) == ([at(9), at(10)], [], False)
    assert first.missed is not None
    assert (first.missed.first, first.missed.last) == (at(7), at(8))
    second = plan_slots(HOURLY, first.fired_until, NOW, policy, budget=2)
    assert (second.catch_up, second.missed, second.is_complete) == ([at(11)], None, True)


def test_a_paused_schedule_runs_no_slot_not_even_on_time() -> None:
    plan = plan_all_missed(HOURLY, hours_ago(2), NOW, "paused by ann", Cause.PAUSED)
    assert (plan.on_time, plan.catch_up, plan.fired_until) == ([], [], NOW)
    assert plan.missed is not None
    assert (plan.missed.count, plan.missed.reason, plan.missed.cause) == (
        2,
        "paused by ann",
        Cause.PAUSED,
    )


CRONS = (
    "* * * * *",
    "*/7 * * * *",
    "0 * * * *",
    "30 2 * * *",
    "15 3 * * 1",
    "*/20 * * * * *",
    "0 2 1 * *",
)
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
    plans = plan_until_complete(timetable, cursor, now, policy)
    run = [slot for p in plans for slot in (*p.catch_up, *p.on_time)]
    missed = [
        slot
        for p in plans
        if p.missed
        for slot in timetable.between(p.missed.first - DAYS / 86400, p.missed.last)
    ]
    assert sorted(run + missed) == due
    assert sum(p.missed.count for p in plans if p.missed) == len(missed)
    assert plans[-1].fired_until == now
    late = [slot for slot in run if slot <= now - ON_TIME]
    limits = {"skip": 0, "once": 1, "all": policy.max_count or len(due)}
    assert len(late) <= limits[policy.policy]
    assert all(slot > now - policy.max_age for slot in late)
