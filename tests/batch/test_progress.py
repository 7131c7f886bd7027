"""The progress of a run: what its code reports, what is written to the ledger, the rate and the
expected end.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from batch_system import clock
from batch_system.batch.context.progress import LONGEST_MESSAGE, Progress, ProgressMeter, pace
from batch_system.batch.ledger import attempts, runs, transitions
from batch_system.batch.ledger.attempts import Outcome
from batch_system.batch.ledger.runs import NewRun
from batch_system.batch.ledger.states import RunState
from batch_system.batch.ledger.tables import new_id
from batch_system.batch.queue import retry
from batch_system.database.engine import Database
from tests.batch.ledger_world import NODE, rows

AT = datetime(2026, 11, 25, 2, 0, tzinfo=UTC)
Wait = Callable[[float], None]


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch) -> Wait:
    """Lets time pass: the clock stands still otherwise."""
    now = [1000.0]
    monkeypatch.setattr(clock, "monotonic", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


def works(meter: ProgressMeter, wait: Wait, rate: int, seconds: int) -> Progress | None:
    """The progress of a run that does `rate` items a second, as the write buffer last took it."""
    taken = meter.take() or meter.latest()
    assert taken is not None and taken.done is not None
    for second in range(seconds):
        wait(1)
        meter.report(taken.done + rate * (second + 1), 1_000_000, None)
        last = meter.take()
    return last


# The rate


def test_the_rate_is_measured_over_the_last_minute(wait: Wait) -> None:
    meter = ProgressMeter()
    meter.report(0, 1_000_000, None)
    fast = works(meter, wait, 100, seconds=100)
    half = works(meter, wait, 10, seconds=30)
    slow = works(meter, wait, 10, seconds=30)
    assert [one.rate for one in (fast, half, slow) if one] == [100, 55, 10]


def test_a_rate_needs_two_numbers_and_counts_only_items_done_after_the_first(wait: Wait) -> None:
    meter = ProgressMeter()
    meter.report(5_000, None, None)
    wait(1)
    meter.report(5_000, None, None)
    first = meter.take()
    wait(1)
    meter.report(5_010, None, None)
    second = meter.take()
    assert first is not None and first.rate is None
    assert second is not None and second.rate == 5


def test_items_done_by_earlier_attempts_do_not_count_for_the_rate(wait: Wait) -> None:
    """A second loop of a resumed run learns what earlier attempts have done when it begins."""
    meter = ProgressMeter()
    meter.report(400, None, None, before=400)
    wait(10)
    meter.report(500, None, None, before=400)
    meter.take()
    wait(10)
    meter.report(100_600, None, None, before=100_400)
    assert meter.take() == Progress(100_600, None, None, 100_400, 10, 0)


def test_a_number_that_goes_down_begins_a_new_count(wait: Wait) -> None:
    meter = ProgressMeter()
    meter.report(0, 1_000_000, None)
    works(meter, wait, 100, seconds=10)
    meter.report(1, 10, None)
    anew = meter.take()
    assert anew is not None and anew.rate is None
    wait(2)
    meter.report(2, 10, None)
    assert meter.take() == Progress(2, 10, None, 0, 0.5, 0)


def test_the_rate_of_a_stalled_run_falls_to_zero_and_is_written_to_the_ledger(wait: Wait) -> None:
    meter = ProgressMeter()
    meter.report(0, None, None)
    works(meter, wait, 100, seconds=60)
    told = []
    for _ in range(600):
        wait(1)
        if (one := meter.take()) is not None:
            told.append(one)
    rates = [one.rate for one in told if one.rate is not None]
    assert rates == sorted(rates, reverse=True) and 90 < rates[0] < 100 and rates[-1] == 0
    assert 12 <= len(told) <= 15 and [one.age for one in told][:2] == [5, 10]
    assert meter.take() is None


def test_the_rate_stays_while_a_chunk_takes_no_longer_than_the_last_one(wait: Wait) -> None:
    meter = ProgressMeter()
    meter.report(0, 100, None)
    for done in (9, 18):
        wait(90)
        meter.report(done, 100, None)
        meter.take()
    told = []
    for _ in range(18):
        wait(5)
        told.append(meter.take())
    assert told == [None] * 18
    late = [
        one.rate
        for one in (wait(5) or meter.take() for _ in range(4))
        if one and one.rate is not None
    ]
    assert late == sorted(late, reverse=True) and 0.08 < late[-1] < late[0] < 0.1


def test_unchanged_progress_is_taken_only_once_and_at_the_end(wait: Wait) -> None:
    meter = ProgressMeter()
    assert (meter.take(), meter.latest()) == (None, None)
    meter.report(1, 2, "one")
    assert meter.take() == Progress(1, 2, "one", 0, None, 0)
    wait(60)
    assert meter.take() is None
    assert meter.latest() == Progress(1, 2, "one", 0, None, 60)


# Reports


def test_a_message_may_be_given_alone_and_stays_until_the_next(wait: Wait) -> None:
    meter = ProgressMeter()
    meter.report(None, None, "begins")
    assert meter.take() == Progress(message="begins")
    meter.report(3, 9, None)
    meter.report(None, None, "goes on")
    assert meter.take() == Progress(3, 9, "goes on", age=0)
    meter.report(4, None, "")
    taken = meter.take()
    assert taken is not None and (taken.done, taken.total, taken.message) == (4, None, None)


def test_a_message_becomes_one_line_of_a_bounded_length() -> None:
    meter = ProgressMeter()
    for given, kept in [
        ("a\nb\t\x1b[31mc ", "a b [31mc"),
        ("x" * 500, "x" * (LONGEST_MESSAGE - 1) + "…"),
    ]:
        meter.report(1, None, given)
        taken = meter.latest()
        assert taken is not None and taken.message == kept


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ((-1, None, None), r"progress\(done\) is -1; allowed: an int from 0"),
        (("half", None, None), r"progress\(done\) is 'half'"),
        ((1, 2.5, None), r"progress\(total\) is 2.5"),
        ((1, 2**63, None), r"progress\(total\)"),
        ((1, None, b"x"), r"progress\(message\) is b'x'; allowed: a str"),
        ((None, None, None), r"progress\(\) has no done"),
        ((None, 5, "x"), r"progress\(\) has no done"),
    ],
)
def test_invalid_progress_is_refused_and_changes_nothing(
    given: tuple[Any, Any, Any], says: str
) -> None:
    meter = ProgressMeter()
    meter.report(1, 2, "one")
    with pytest.raises(ValueError, match=says):
        meter.report(*given)
    assert meter.latest() == Progress(1, 2, "one", age=pytest.approx(0, abs=1))


# The expected end


def row(**more: Any) -> dict[str, Any]:
    known = {"state": "running", "count": 400, "total": 1_000, "rate": 20.0}
    return {**known, "progress_at": AT, "attempt_started_at": AT - timedelta(hours=1), **more}


def test_the_expected_end_is_computed_from_the_count_and_the_rate() -> None:
    assert pace(row(), AT + timedelta(seconds=5)) == (20, AT + timedelta(seconds=30))


@pytest.mark.parametrize(
    ("more", "rate"),
    [
        ({"total": None}, 20),
        ({"total": 399}, 20),
        ({"rate": 0.0}, 0),
        ({"rate": 1e-300}, 1e-300),
        ({"rate": None}, None),
        ({"count": None, "total": None, "rate": None, "progress_at": None}, None),
        ({"state": "interrupted"}, None),
        ({"state": "succeeded"}, None),
        ({"attempt_started_at": AT + timedelta(seconds=1)}, None),
        ({"count": 1_000}, 20),
    ],
)
def test_without_a_total_or_a_rate_the_expected_end_is_not_known(
    more: dict[str, Any], rate: float | None
) -> None:
    assert pace(row(**more), AT + timedelta(seconds=2)) == (rate, None)


def test_an_expected_end_in_the_past_is_not_known() -> None:
    assert pace(row(), AT + timedelta(seconds=31)) == (20, None)


# In the ledger


async def running(ledger: Database) -> str:
    new = NewRun(
        id=new_id(),
        task="made",
        slot=None,
        origin="manual",
        state="running",
        rank=1,
        catch_up=False,
        due_at=AT,
        created_at=AT,
        fence=3,
        attempt=1,
    )
    async with ledger.engine.begin() as connection:
        await runs.insert(connection, [new])
    return new.id


async def mirror(ledger: Database, run: str, fence: int = 3, **more: Any) -> dict[str, Any]:
    async with ledger.engine.begin() as connection:
        await attempts.write_progress(
            connection, [{"id": run, "fence": fence, "count_before": 0, **more}]
        )
    [found] = await rows(ledger, id=run)
    return {name: found[name] for name in (*attempts.PROGRESS_COLUMNS, "rate")}


async def test_all_values_are_mirrored_and_missing_ones_are_kept(ledger: Database) -> None:
    run = await running(ledger)
    whole = {
        "count": 5,
        "total": 10,
        "count_before": 2,
        "message": "five",
        "rate": 1.5,
        "progress_at": AT,
    }
    assert await mirror(ledger, run, **whole) == whole
    only_a_message = await mirror(ledger, run, count_before=0, message="six")
    assert only_a_message == {**whole, "count_before": 0, "message": "six", "rate": None}
    without_a_total = await mirror(ledger, run, count=6, progress_at=AT + timedelta(seconds=1))
    assert (without_a_total["count"], without_a_total["total"], without_a_total["message"]) == (
        6,
        None,
        None,
    )


async def test_a_node_that_lost_the_run_mirrors_nothing(ledger: Database) -> None:
    run = await running(ledger)
    before = await mirror(ledger, run, count=5, message="mine")
    assert await mirror(ledger, run, fence=2, count=9, message="theirs") == before


@pytest.mark.parametrize("said", [True, False])
async def test_an_ended_run_keeps_its_numbers_and_has_no_rate(ledger: Database, said: bool) -> None:
    run = await running(ledger)
    await mirror(ledger, run, count=5, total=10, message="five", rate=1.5, progress_at=AT)
    last: dict[str, Any] = (
        {"count": 9, "total": 10, "count_before": 0, "progress_at": AT} if said else {}
    )
    outcome = Outcome(run, 3, RunState.SUCCEEDED, "succeeded", 1, NODE, "made", AT, AT, **last)
    async with ledger.engine.begin() as connection:
        await transitions.finish(connection, [outcome])
    [found] = await rows(ledger, id=run)
    assert (found["count"], found["total"], found["rate"]) == (9 if said else 5, 10, None)
    assert found["message"] == (None if said else "five")


@pytest.mark.parametrize("anew", [True, False])
async def test_a_run_that_begins_again_from_the_beginning_has_no_progress(
    ledger: Database, application: Database, anew: bool
) -> None:
    run = await running(ledger)
    await mirror(ledger, run, count=5, total=10, message="five", progress_at=AT)
    async with ledger.engine.begin() as connection:
        await transitions.finish(
            connection, [Outcome(run, 3, RunState.FAILED, "failed", 1, NODE, "made", AT, AT)]
        )
        if not anew:
            await retry.retry(connection, run, "ann")
    if anew:
        await retry.retry_from_the_beginning(ledger, application, run, "ann")
    [found] = await rows(ledger, state="queued")
    assert (found["count"], found["message"]) == ((None, None) if anew else (5, "five"))
