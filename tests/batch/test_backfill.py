"""Backfill: runs for slots of the past that have none, and what `batch account` says afterwards."""

from __future__ import annotations

import asyncio
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import update

from batch_system.batch.account.account import Account, accounts
from batch_system.batch.account.slots import Kind
from batch_system.batch.firing import backfill, task_sync
from batch_system.batch.firing.backfill import Backfill, Interval, SlotAction, SlotDecision
from batch_system.batch.ledger import tables
from batch_system.batch.ledger.states import Rank
from batch_system.batch.queue.enqueue import Startable
from batch_system.batch.tasks.declaration import Missed
from batch_system.batch.tasks.registry import Task
from batch_system.database.engine import Database
from batch_system.errors import InvalidParameters
from tests.batch.ledger_world import fire, know, make_task, rows

HOUR = timedelta(hours=1)
FROM = datetime(2026, 3, 10, 0, 0, tzinfo=UTC)
NOW = datetime(2026, 3, 10, 12, 30, tzinfo=UTC)


async def known(ledger: Database, **attributes: Any) -> Task:
    """A task that fires each hour, whose schedule has been in force since FROM."""
    task = make_task("tick", attributes.pop("schedule", "0 * * * *"), **attributes)
    await know(ledger, task)
    async with ledger.engine.begin() as connection:
        began = {"valid_from": FROM - HOUR / 2, "fired_until": FROM - HOUR / 2}
        await connection.execute(update(tables.schedules).values(began))
        await connection.execute(update(tables.tasks).values(accounted_from=FROM - HOUR / 2))
    return task


async def interval(ledger: Database, since: datetime = FROM, until: datetime = NOW) -> Interval:
    async with ledger.engine.connect() as connection:
        return await backfill.interval_of(connection, "tick", since, until)


def filling(ledger: Database, task: Task) -> Backfill:
    # The application's database is needed for `redo` only.
    return Backfill(ledger, ledger, Startable.of(task), "ann")


async def account_of(ledger: Database) -> Account:
    async with ledger.reader.connect() as connection:
        (account,) = [account async for account in accounts(connection, FROM, NOW)]
    return account


async def test_slots_without_a_run_get_one_with_the_last_rank(ledger: Database) -> None:
    task = await known(ledger, priority=3)
    counts = await filling(ledger, task).make(await interval(ledger, FROM, FROM + 2 * HOUR))
    assert counts == Counter({SlotAction.NEW: 3})
    runs = await rows(ledger)
    assert [run["slot"] for run in runs] == [FROM, FROM + HOUR, FROM + 2 * HOUR]
    same = {"origin", "state", "rank", "catch_up", "exclusive", "priority", "requested_by"}
    assert {tuple(run[name] for name in sorted(same)) for run in runs} == {
        (True, "tick", "backfill", 3, Rank.CATCH_UP, "ann", "queued")
    }


async def test_four_backfills_at_once_make_one_run_per_slot(ledger: Database) -> None:
    task = await known(ledger)
    wanted = await interval(ledger)
    all_counts = await asyncio.gather(*(filling(ledger, task).make(wanted) for _ in range(4)))
    assert sum(counts[SlotAction.NEW] for counts in all_counts) == 13
    assert sum(counts[SlotAction.LEFT] for counts in all_counts) == 39
    assert len(await rows(ledger)) == 13


async def test_without_redo_a_slot_that_has_a_run_is_left_alone(ledger: Database) -> None:
    task = await known(ledger, missed=Missed("all"))
    await fire(ledger, {"tick": task}, FROM + 2 * HOUR + HOUR / 2)
    slots = [run["slot"] for run in await rows(ledger)]
    states = dict(zip(slots, ("succeeded", "skipped", "running"), strict=True))
    async with ledger.engine.begin() as connection:
        for slot, state in states.items():
            await connection.execute(
                update(tables.runs).where(tables.runs.c.slot == slot).values(state=state)
            )
    wanted = await interval(ledger, FROM, FROM + 3 * HOUR)
    assert await filling(ledger, task).make(wanted) == {SlotAction.NEW: 1, SlotAction.LEFT: 3}
    assert {run["slot"]: run["state"] for run in await rows(ledger)} == {
        **states,
        FROM + 3 * HOUR: "queued",
    }


async def test_with_redo_a_run_in_a_final_state_gets_a_new_attempt(
    ledger: Database, application: Database
) -> None:
    task = await known(ledger, missed=Missed("all"))
    await fire(ledger, {"tick": task}, FROM + HOUR + HOUR / 2)
    first, second = await rows(ledger)
    async with ledger.engine.begin() as connection:
        await connection.execute(
            update(tables.runs)
            .where(tables.runs.c.id == first["id"])
            .values(state="failed", attempt=1, fence=1)
        )
    wanted = await interval(ledger, FROM, FROM + HOUR)
    assert await Backfill(ledger, application, Startable.of(task), "ann", redo=True).look(
        wanted
    ) == {
        SlotAction.AGAIN: 1,
        SlotAction.LEFT: 1,
    }
    seen: list[SlotDecision] = []
    counts = await Backfill(ledger, application, Startable.of(task), "ann", redo=True).make(
        wanted, seen.append
    )
    assert counts == {SlotAction.AGAIN: 1, SlotAction.LEFT: 1}
    assert seen[0] == SlotDecision(FROM, SlotAction.AGAIN, first["id"], "failed")
    again, active = await rows(ledger)
    assert (again["state"], again["origin"], again["fence"], again["rank"]) == (
        "queued",
        "schedule",
        1,
        Rank.CATCH_UP,
    )
    assert active == second


async def test_a_dry_run_lists_the_slots_and_changes_nothing(ledger: Database) -> None:
    task = await known(ledger)
    seen: list[SlotDecision] = []
    counts = await filling(ledger, task).look(
        await interval(ledger, FROM, FROM + HOUR), seen.append
    )
    assert counts == {SlotAction.NEW: 2}
    assert seen == [SlotDecision(FROM, SlotAction.NEW), SlotDecision(FROM + HOUR, SlotAction.NEW)]
    assert await rows(ledger) == []


async def test_future_slots_are_left_out(ledger: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    await known(ledger)
    monkeypatch.setattr(
        "batch_system.batch.ledger.database_time.now_of", lambda _: asyncio.sleep(0, NOW)
    )
    wanted = await interval(ledger, NOW - HOUR, NOW + 24 * HOUR)
    assert list(wanted.slots()) == [NOW - HOUR / 2]
    assert await (await interval(ledger)).count(5) == 6  # more than were asked for


async def test_a_slot_that_a_service_may_still_fire_on_time_is_left_out(
    ledger: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the backfill made its run, the overlap policy would skip or replace other runs in favour
    of that run.
    """
    task = await known(ledger, schedule="0,30 * * * * *")
    monkeypatch.setattr(
        "batch_system.batch.ledger.database_time.now_of", lambda _: asyncio.sleep(0, NOW)
    )
    late = [NOW - timedelta(seconds=s) for s in (90, 60, 30, 0)]
    assert list((await interval(ledger, late[0], NOW)).slots()) == late[:2]
    await fire(ledger, {"tick": task}, NOW - timedelta(seconds=10))
    assert list((await interval(ledger, late[0], NOW)).slots()) == late[:3]


async def test_a_backfill_without_a_schedule_or_with_an_empty_interval_is_refused(
    ledger: Database,
) -> None:
    await known(ledger)
    with pytest.raises(
        InvalidParameters, match="no slots from 2026-03-10 12:30:00 to 2026-03-10 00:00:00 UTC"
    ):
        await interval(ledger, NOW, FROM)
    async with ledger.engine.begin() as connection:
        await task_sync.set_schedules(connection, {"tick": None}, {}, tables.new_id())
    with pytest.raises(InvalidParameters, match="task tick: the ledger has no schedule"):
        await interval(ledger)


async def test_a_missed_range_that_is_backfilled_stays_accounted_for_and_counts_once(
    ledger: Database,
) -> None:
    task = await known(ledger, missed="skip")
    await fire(ledger, {"tick": task}, NOW)
    before = await account_of(ledger)
    assert (before.counts[Kind.MISSED], before.slots, before.is_complete) == (13, 13, True)
    await filling(ledger, task).make(await interval(ledger, FROM + HOUR, FROM + 3 * HOUR))
    after = await account_of(ledger)
    assert (after.counts[Kind.RUN], after.counts[Kind.MISSED], after.slots) == (3, 10, 13)
    assert after.is_complete and after.findings == []


async def test_slots_that_are_backfilled_before_they_were_handled_do_not_run_twice(
    ledger: Database,
) -> None:
    """The backfill runs while no service does; the service that starts next finds the slots due."""
    task = await known(ledger, missed=Missed("all"))
    await filling(ledger, task).make(await interval(ledger))
    await fire(ledger, {"tick": task}, NOW)
    assert len(await rows(ledger)) == 13
    account = await account_of(ledger)
    assert (account.counts[Kind.RUN], account.is_complete) == (13, True)


async def test_runs_for_slots_before_the_schedule_began_are_not_counted_as_surplus(
    ledger: Database,
) -> None:
    task = await known(ledger, missed="skip")
    await fire(ledger, {"tick": task}, NOW)
    async with ledger.engine.begin() as connection:
        await connection.execute(update(tables.tasks).values(accounted_from=FROM - 3 * HOUR))
    await filling(ledger, task).make(await interval(ledger, FROM - 2 * HOUR, FROM - HOUR))
    assert len(await rows(ledger)) == 2
    account = await account_of(ledger)
    assert (account.counts[Kind.SURPLUS], account.is_complete) == (0, True)


async def test_a_slot_on_time_does_not_wait_for_the_runs_of_a_backfill(ledger: Database) -> None:
    task = await known(ledger)
    await filling(ledger, task).make(await interval(ledger, FROM, NOW - 2 * HOUR))
    async with ledger.engine.begin() as connection:
        await connection.execute(update(tables.schedules).values(fired_until=NOW - HOUR))
    await fire(ledger, {"tick": task}, NOW - HOUR / 2)
    on_time = [run for run in await rows(ledger) if run["origin"] == "schedule"]
    assert [(run["state"], run["rank"]) for run in on_time] == [("queued", Rank.ON_TIME)]


async def test_ten_thousand_slots_are_backfilled_in_seconds(ledger: Database) -> None:
    task = await known(ledger, schedule="* * * * * *")
    wanted = await interval(ledger, FROM, FROM + timedelta(seconds=9_999))
    async with asyncio.timeout(20):
        assert await filling(ledger, task).make(wanted) == {SlotAction.NEW: 10_000}
