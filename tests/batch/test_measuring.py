"""What is counted of slots and attempts in the cases that are harder than a run without errors."""

from __future__ import annotations

import asyncio
from collections import Counter
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import update

from batch_system import clock
from batch_system.batch.context.attempt_state import MAX_WAITING_LINES, LogBuffer
from batch_system.batch.ledger.states import Rank, RunState
from batch_system.batch.ledger.tables import runs as runs_table
from batch_system.batch.queue.claiming import Capacity
from batch_system.batch.tasks.declaration import Missed, Retry
from batch_system.database.engine import Database
from batch_system.metrics.process import BOUNDS, Fate, Histogram, ProcessMetrics
from batch_system.testing.engine import DrivenEngine
from tests.batch.ledger_world import NODE, fire, know, make_task, rows
from tests.batch.test_runs import insert, new

START = datetime(2026, 3, 10, 12, 0, tzinfo=UTC)


async def test_each_slot_has_one_fate(ledger: Database) -> None:
    with clock.moved(START):
        loaded = await know(
            ledger,
            make_task("skips", missed=Missed("once")),
            make_task("replaces", overlap="replace", missed="skip"),
        )
    first = await fire(ledger, loaded, START + timedelta(minutes=9, seconds=30), Capacity(9, 9))
    late = await fire(ledger, loaded, START + timedelta(minutes=10, seconds=30), Capacity(9, 9))
    assert first.slots == Counter(
        {
            ("skips", Fate.ON_TIME): 1,
            ("skips", Fate.CAUGHT_UP): 1,
            ("skips", Fate.MISSED): 7,
            ("replaces", Fate.ON_TIME): 1,
            ("replaces", Fate.MISSED): 8,
        }
    )
    assert late.slots == Counter({("skips", Fate.SKIPPED): 1, ("replaces", Fate.ON_TIME): 1})


async def test_an_outcome_that_another_node_makes_void_is_counted_as_refused_and_not_as_a_run(
    ledger: Database,
) -> None:
    metrics = ProcessMetrics()
    may_end = asyncio.Event()

    async def run(_: object) -> None:
        await may_end.wait()

    engine = DrivenEngine(
        ledger, await know(ledger, make_task("t", None, run=run)), NODE, metrics=metrics
    )
    await insert(ledger, new())
    await engine._turn()
    async with ledger.engine.begin() as connection:
        await connection.execute(update(runs_table).values(fence=runs_table.c.fence + 1))
    may_end.set()
    await engine.settle()
    assert (metrics.refused, metrics.runs, metrics.attempts) == (1, Counter(), Counter())


async def test_a_retry_is_one_run_of_two_attempts(ledger: Database) -> None:
    metrics = ProcessMetrics()
    failures = iter([ValueError()])

    async def run(_: object) -> None:
        for error in failures:
            raise error

    task = make_task("t", None, run=run, retry=Retry(2, wait=0))
    engine = DrivenEngine(ledger, await know(ledger, task), NODE, metrics=metrics)
    await insert(ledger, new())
    await engine.settle()
    await engine.settle()
    assert [row["state"] for row in await rows(ledger)] == ["succeeded"]
    assert metrics.runs == {("t", "succeeded", "manual"): 1}
    assert metrics.attempts == {("t", "failed"): 1, ("t", "succeeded"): 1}
    assert {
        outcome: sum(found.buckets().counts) for outcome, found in metrics.durations.items()
    } == {
        "failed": 1,
        "succeeded": 1,
    }


async def test_the_start_delay_is_that_of_first_attempts_at_slots_on_time_only(
    ledger: Database,
) -> None:
    metrics = ProcessMetrics()
    engine = DrivenEngine(ledger, await know(ledger, make_task("t", None)), NODE, metrics=metrics)
    now = clock.now()
    on_time = {"origin": "schedule", "rank": Rank.ON_TIME, "created_at": now, "due_at": now}
    of_slots = [
        new(slot=now - timedelta(seconds=30), **on_time),
        new(slot=now - timedelta(hours=2), **(on_time | {"rank": Rank.CATCH_UP})),
        new(
            slot=now - timedelta(seconds=20),
            state=RunState.INTERRUPTED,
            fence=1,
            attempt=1,
            **on_time,
        ),
    ]
    await insert(ledger, *of_slots, new())
    for _ in range(4):
        await engine.settle()
    assert (
        sum(number for (_, state, _), number in metrics.runs.items() if state == "succeeded") == 4
    )
    counts, total = metrics.start_delay.buckets()
    assert sum(counts) == 1 and 30 <= total < 60


def test_lines_that_were_dropped_are_counted_once() -> None:
    log = LogBuffer({})
    for number in range(MAX_WAITING_LINES + 3):
        log.keep_line("now", "info", "mine", f"{number}")
    assert log.dropped == 3
    assert "3 lines were dropped" in log.take_lines()[-1].text
    log.keep_line("now", "info", "mine", "one more")
    log.drop_lines()
    assert log.dropped == 4


def test_a_duration_is_in_the_first_bucket_that_is_long_enough() -> None:
    histogram = Histogram()
    for seconds in (-1.0, BOUNDS[0], BOUNDS[-1], BOUNDS[-1] + 1):
        histogram.add(seconds)
    counts, total = histogram.buckets()
    assert (counts[0], counts[-2], counts[-1], sum(counts)) == (2, 1, 1, 4)
    assert total == pytest.approx(BOUNDS[0] + 2 * BOUNDS[-1] + 1)
