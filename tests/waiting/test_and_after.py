"""`--and-after`: what has waited for a run, or for slots, is run again or backfilled too, at any
depth.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest

from batch_system import Start, clock, start_all
from batch_system.batch.ledger import tables
from batch_system.batch.ledger.people import audit
from batch_system.batch.ledger.states import RunState
from batch_system.batch.tasks.after import After
from batch_system.batch.tasks.registry import Task
from batch_system.config import get_settings
from batch_system.database.engine import Database
from batch_system.errors import InvalidParameters, WrongState
from batch_system.operations.asking.context import Loaded
from batch_system.operations.bulks import bulk
from batch_system.operations.operations import Operations
from batch_system.operations.starting import backfill
from batch_system.operations.starting.results import BackfillRequest
from batch_system.verbs.run_changes import RetryRun
from batch_system.verbs.runs import CountRunsAfter
from tests.batch.ledger_world import make_task, rows
from tests.commands import Batch, in_this_process
from tests.waiting.test_after import THREE, daily
from tests.waiting.world import DAY, MINUTE, Waits


@pytest.fixture
def operations(waits: Waits, application: Database) -> Operations:
    return Operations(waits.ledger, application, lambda: Loaded(waits.tasks), get_settings())


def chain() -> tuple[Task, Task, Task]:
    """Three tasks, each after the one before."""
    return (
        daily("extract"),
        make_task("load", None, after="extract"),
        make_task("report", None, after="load"),
    )


async def run_all(waits: Waits, *names: str, slot: datetime | None = None) -> None:
    for name in names:
        await waits.look()
        await waits.end(name, slot)


async def states(waits: Waits) -> dict[str, str]:
    return {row["task"]: row["state"] for row in await rows(waits.ledger)}


@pytest.mark.rest
async def test_a_run_is_run_again_and_what_comes_after_waits_for_it(
    waits: Waits, operations: Operations
) -> None:
    await waits.know(*chain())
    await waits.fire(THREE)
    await run_all(waits, "extract", "load", "report")
    clock.advance(MINUTE)
    run = (await waits.run_of("extract"))["id"]
    assert (await operations(CountRunsAfter(run=run))).tasks == {"load": 1, "report": 1}
    await operations(RetryRun(run=run, from_the_beginning=True, and_after=True))
    assert await states(waits) == {"extract": "queued", "load": "waiting", "report": "waiting"}
    load = await waits.run_of("load")
    assert (load["gate"], load["wait_until"], load["result"]) == (
        "success",
        clock.now() + DAY,
        None,
    )
    assert await waits.look() == 0
    await run_all(waits, "extract", "load", "report")
    assert set((await states(waits)).values()) == {"succeeded"}
    events = await rows(waits.ledger, audit.events, action="run.retry_from_the_beginning")
    assert {event["task"] for event in events} == {"extract", "load", "report"}


async def test_what_comes_after_keeps_its_rule_and_closes_by_it(
    waits: Waits, operations: Operations
) -> None:
    """Also after a person's retry of its own run, which has taken away its gate."""
    extract, load = (
        daily("extract"),
        make_task("load", None, after=After("extract", within=60, on="end")),
    )
    await waits.know(extract, load)
    await waits.fire(THREE)
    await run_all(waits, "extract", "load")
    await operations(RetryRun(run=(await waits.run_of("load"))["id"], from_the_beginning=True))
    await waits.end("load", state=RunState.FAILED)
    assert (await waits.run_of("load"))["gate"] is None
    run = (await waits.run_of("extract"))["id"]
    await operations(RetryRun(run=run, from_the_beginning=True, and_after=True))
    row = await waits.run_of("load")
    assert (row["gate"], row["wait_until"]) == ("end", clock.now() + MINUTE)
    await waits.end("extract", state=RunState.FAILED)
    await waits.look()
    assert await waits.state("load") == "queued"


async def test_active_runs_are_left_and_without_again_it_is_refused(
    waits: Waits, operations: Operations
) -> None:
    await waits.know(*chain())
    await waits.fire(THREE)
    await run_all(waits, "extract")
    await waits.look()
    run = (await waits.run_of("extract"))["id"]
    assert (await operations(CountRunsAfter(run=run))).tasks == {}
    await operations(RetryRun(run=run, from_the_beginning=True, and_after=True))
    assert await states(waits) == {"extract": "queued", "load": "queued", "report": "waiting"}
    with pytest.raises(WrongState):
        await operations(RetryRun(run=run, from_the_beginning=True, and_after=True))
    with pytest.raises(InvalidParameters, match="--and-after needs --again"):
        await operations(RetryRun(run=run, and_after=True))


async def test_the_follow_up_of_a_member_waits_for_it(waits: Waits, operations: Operations) -> None:
    mail, report = make_task("mail", None), make_task("report", None)
    await waits.know(mail, report)
    follow_up = await start_all([Start(mail.cls)], then=Start(report.cls))
    await run_all(waits, "mail", "report")
    member = (await waits.run_of("mail"))["id"]
    await operations(RetryRun(run=member, from_the_beginning=True, and_after=True))
    (row,) = await rows(waits.ledger, id=follow_up)
    assert (row["state"], row["gate"], row["wait_until"]) == ("waiting", "success", None)


def request(**values: Any) -> BackfillRequest:
    return BackfillRequest("extract", THREE, THREE, and_after=True, **values)


async def test_a_backfill_makes_the_slots_of_what_comes_after(
    waits: Waits, operations: Operations
) -> None:
    extract, load = (
        daily("extract", missed="skip"),
        make_task("load", None, after="extract", missed="skip"),
    )
    monthly = make_task("monthly", "0 3 10 * *", after="load", missed="skip")
    await waits.know(extract, load, monthly, daily("other", "30 3 * * *", missed="skip"))
    await waits.fire(THREE + timedelta(hours=2))
    preview = await bulk.preview_backfill(operations.context, request())
    assert preview.count == 3 and preview.counts is not None
    assert {name: counts.new for name, counts in preview.counts.after.items()} == {
        "load": 1,
        "monthly": 1,
    }
    assert await rows(waits.ledger) == []
    await bulk.begin(operations.context, preview.id, "backfill")
    await bulk.carry_out(operations.context, preview.id)
    assert await states(waits) == {"extract": "queued", "load": "waiting", "monthly": "waiting"}
    await run_all(waits, "extract", "load", "monthly")
    assert set((await states(waits)).values()) == {"succeeded"}


async def test_the_preview_of_a_backfill_says_which_runs_are_skipped_because_others_were_pruned(
    waits: Waits, operations: Operations
) -> None:
    extract, load = (
        daily("extract", missed="skip"),
        make_task("load", None, after="extract", missed="skip"),
    )
    await waits.know(extract, load)
    await waits.fire(THREE + 2 * DAY)
    async with waits.ledger.engine.begin() as connection:
        rows = tables.tasks.update().where(tables.tasks.c.name == "extract")
        await connection.execute(rows.values(accounted_from=THREE + DAY))
    asked = BackfillRequest("load", THREE, THREE + DAY, dry_run=True)
    counts = await backfill.run(operations.context, asked)
    assert (counts.new, counts.pruned) == (2, 1)


async def test_a_backfill_runs_again_what_comes_after(waits: Waits, operations: Operations) -> None:
    await waits.know(*chain())
    await waits.fire(THREE)
    await run_all(waits, "extract", "load", "report")
    clock.advance(5 * MINUTE)
    counts = await backfill.run(operations.context, request(redo=True))
    assert (counts.again, {name: each.again for name, each in counts.after.items()}) == (
        1,
        {"load": 1, "report": 1},
    )
    assert await states(waits) == {"extract": "queued", "load": "waiting", "report": "waiting"}
    (event,) = await rows(waits.ledger, audit.events, action="task.backfill")
    assert event["after"]["after"]["load"]["again"] == 1


@pytest.mark.parametrize(
    ("upstream", "own", "first"),
    [
        # Daily after hourly: its slot counts the one of 03:00.
        ("0 * * * *", "30 3 * * *", "03:30"),
        ("0 3 * * 2", "0 4 * * *", "04:00"),  # daily after weekly: each day until the next week
    ],
)
async def test_other_schedules_count_by_the_last_slot_before(
    waits: Waits, operations: Operations, upstream: str, own: str, first: str
) -> None:
    extract, load = (
        daily("extract", upstream, missed="skip"),
        make_task("load", own, after="extract", missed="skip"),
    )
    await waits.know(extract, load)
    await waits.fire(THREE + timedelta(hours=5))
    await backfill.run(operations.context, request())
    (row,) = [row for row in await rows(waits.ledger, task="load") if row["origin"] == "backfill"]
    assert f"{row['slot']:%H:%M}" == first


@pytest.fixture
def batch(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Batch]:
    yield from in_this_process(capsys, monkeypatch)


@pytest.mark.rest
async def test_the_command_shows_how_many_and_asks(
    waits: Waits, batch: Batch, ledger_url: str, database_url: str
) -> None:
    await waits.know(*chain())
    await waits.fire(THREE)
    await run_all(waits, "extract", "load", "report")
    run = (await waits.run_of("extract"))["id"]

    async def call(*words: str) -> Any:
        return await asyncio.to_thread(
            batch, *words, LEDGER_URL=ledger_url, DATABASE_URL=database_url
        )

    asked = await call("retry", run, "--again", "--and-after")
    assert (asked.code, asked.out) == (
        2,
        f"run {run} is run again, and after it 1 run of load, 1 run of report\n",
    )
    assert set((await states(waits)).values()) == {"succeeded"}
    refused = await call("retry", run, "--and-after")
    assert (refused.code, "--and-after needs --again" in refused.err) == (2, True)
    done = await call("retry", run, "--again", "--and-after", "--yes")
    assert (done.code, done.out) == (0, f"run {run} of extract is queued again\n")
    assert await states(waits) == {"extract": "queued", "load": "waiting", "report": "waiting"}
