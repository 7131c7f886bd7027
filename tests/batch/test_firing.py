"""Due slots become runs and missed ranges, in one transaction, on both databases."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system import TaskRegistry, clock
from batch_system.batch.firing import firing, misfires, pauses, task_sync
from batch_system.batch.firing.firing import SlotPlans
from batch_system.batch.ledger import schedules as slots
from batch_system.batch.ledger import tables, transitions
from batch_system.batch.ledger import tasks as task_rows
from batch_system.batch.ledger.tables import new_id
from batch_system.batch.nodes.clock_steps import ClockStep, ClockSteps
from batch_system.batch.queue import claiming
from batch_system.batch.queue.claiming import Capacity
from batch_system.batch.tasks.declaration import Alerts, Missed
from batch_system.database.engine import Database
from tests.batch.ledger_world import NODE, fire, know, make_task, rows

START = datetime(2026, 3, 10, 12, 0, 30, tzinfo=UTC)
MINUTE = timedelta(minutes=1)


def minutes(n: float) -> datetime:
    return START + n * MINUTE


@pytest.fixture(autouse=True)
def still_clock() -> object:
    with clock.moved(START):
        yield


async def test_a_new_task_starts_now(ledger: Database) -> None:
    loaded = await know(ledger, make_task("tick"))
    await fire(ledger, loaded, START)
    assert await rows(ledger) == []
    (task,) = await rows(ledger, tables.tasks)
    assert task["accounted_from"] == START


async def test_a_due_slot_becomes_one_queued_run_and_moves_the_cursor(ledger: Database) -> None:
    loaded = await know(ledger, make_task("tick"))
    await fire(ledger, loaded, minutes(0.6))
    (run,) = await rows(ledger)
    assert (run["slot"], run["state"], run["origin"]) == (minutes(0.5), "queued", "schedule")
    (schedule,) = await rows(ledger, tables.schedules)
    assert schedule["fired_until"] == minutes(0.6)


async def test_firing_twice_for_one_instant_makes_no_second_run(ledger: Database) -> None:
    loaded = await know(ledger, make_task("tick"))
    await fire(ledger, loaded, minutes(0.6))
    await fire(ledger, loaded, minutes(0.6))
    await fire(ledger, loaded, minutes(0.1))
    assert len(await rows(ledger)) == 1


async def test_a_slot_that_already_has_a_run_is_left_alone(ledger: Database) -> None:
    """The cursor was set back by hand: the unique index holds."""
    loaded = await know(ledger, make_task("tick"))
    await fire(ledger, loaded, minutes(0.6))
    async with ledger.engine.begin() as connection:
        await connection.execute(tables.schedules.update().values(fired_until=START))
    fired = await fire(ledger, loaded, minutes(0.7), Capacity(5, 5))
    assert fired.claimed == []
    assert [run["state"] for run in await rows(ledger)] == ["queued"]


async def test_with_capacity_a_run_is_inserted_as_running_with_its_first_fence(
    ledger: Database,
) -> None:
    loaded = await know(ledger, make_task("a"), make_task("b"))
    fired = await fire(ledger, loaded, minutes(0.6), Capacity(1, 0))
    assert len(fired.claimed) == 1
    found = {run["state"]: run for run in await rows(ledger)}
    running = found["running"]
    assert (running["node"], running["fence"], running["attempt"], running["started_at"]) == (
        NODE,
        1,
        1,
        minutes(0.6),
    )
    assert (found["queued"]["node"], found["queued"]["fence"]) == (None, 0)
    assert fired.claimed[0].id == running["id"]


async def test_a_sync_task_needs_a_thread_to_start_at_once(ledger: Database) -> None:
    def sync(self: object) -> None: ...

    loaded = await know(ledger, make_task("threaded", run=sync))
    assert (await fire(ledger, loaded, minutes(0.6), Capacity(5, 0))).claimed == []


async def test_while_a_run_is_active_the_next_slot_is_skipped_with_the_reason(
    ledger: Database,
) -> None:
    loaded = await know(ledger, make_task("tick"))
    await fire(ledger, loaded, minutes(0.6), Capacity(5, 5))
    await fire(ledger, loaded, minutes(1.6), Capacity(5, 5))
    first, second = sorted(await rows(ledger), key=lambda run: run["slot"])
    assert (first["state"], second["state"]) == ("running", "skipped")
    assert (
        second["reason"] == f"run {first['id']} of slot 2026-03-10 12:01:00 UTC was still running"
    )
    assert second["finished_at"] == minutes(1.6)


async def test_allow_runs_overlapping_slots(ledger: Database) -> None:
    loaded = await know(ledger, make_task("tick", overlap="allow"))
    await fire(ledger, loaded, minutes(0.6), Capacity(5, 5))
    await fire(ledger, loaded, minutes(1.6), Capacity(5, 5))
    assert [run["state"] for run in await rows(ledger)] == ["running", "running"]


@pytest.mark.parametrize(
    ("policy", "ran", "missed"), [("skip", 0, 9), ("once", 1, 8), ("all", 9, 0)]
)
async def test_downtime_follows_the_missed_policy(
    ledger: Database, policy: str, ran: int, missed: int
) -> None:
    loaded = await know(ledger, make_task("tick", missed=Missed(policy)))
    await fire(ledger, loaded, minutes(10))
    caught_up = [run for run in await rows(ledger) if run["catch_up"]]
    assert len(caught_up) == ran
    assert sum(found["count"] for found in await rows(ledger, tables.missed)) == missed
    (on_time,) = [run for run in await rows(ledger) if not run["catch_up"]]
    assert on_time["slot"] == minutes(9.5)


async def test_a_catch_up_does_not_block_a_slot_on_time(ledger: Database) -> None:
    loaded = await know(ledger, make_task("tick", missed=Missed("all")))
    await fire(ledger, loaded, minutes(10))
    await fire(ledger, loaded, minutes(10.6))
    states = {run["slot"]: run["state"] for run in await rows(ledger) if not run["catch_up"]}
    assert states[minutes(9.5)] == "queued"
    # The run on time is the reason, not the catch-up before it.
    assert states[minutes(10.5)] == "skipped"


async def test_the_firings_after_a_long_downtime_extend_one_missed_range(ledger: Database) -> None:
    loaded = await know(ledger, make_task("tick", "* * * * * *", missed="skip"))
    await fire(ledger, loaded, START + timedelta(hours=4))
    (found,) = await rows(ledger, tables.missed)
    assert found["count"] == 4 * 3600 - 60
    assert (found["first_slot"], found["last_slot"]) == (
        START + timedelta(seconds=1),
        START + timedelta(hours=4) - MINUTE,
    )
    assert len(await rows(ledger)) == 60


async def test_the_slots_of_a_pause_are_one_missed_range_and_are_never_caught_up(
    ledger: Database,
) -> None:
    loaded = await know(ledger, make_task("tick", missed="all"))
    with clock.moved(minutes(0.6)):
        async with ledger.engine.begin() as connection:
            await pauses.pause(connection, "tick", "ann", loaded)
    await fire(ledger, loaded, minutes(5))
    await fire(ledger, loaded, minutes(9))
    (found,) = await rows(ledger, tables.missed)
    assert (found["count"], found["reason"], found["first_slot"]) == (
        8,
        "paused by ann",
        minutes(1.5),
    )
    with clock.moved(minutes(9.6)):
        async with ledger.engine.begin() as connection:
            await pauses.resume(connection, "tick")
    await fire(ledger, loaded, minutes(10.6))
    (found,) = await rows(ledger, tables.missed)
    assert found["count"] == 9
    assert [run["slot"] for run in await rows(ledger)] == [minutes(0.5), minutes(10.5)]


async def test_what_each_task_declares_is_in_its_row(ledger: Database) -> None:
    async def run(self: object, day: str = "monday") -> None: ...

    tags, alerts = ("nightly", "secret"), Alerts(after_failures=2)
    loaded = [
        make_task("plain"),
        make_task("plain_too"),
        make_task("tagged", tags=tags),
        make_task("typed", run=run, timeout=5),
        make_task("watched", alerts=alerts, missed="all", pool="cpu", schedule=None),
    ]
    for _ in range(2):
        await know(ledger, *loaded)
    stored = {row["name"]: row for row in await rows(ledger, tables.tasks)}
    assert stored.keys() == {task.name for task in loaded}
    for task in loaded:
        row = stored[task.name]
        assert (row["source"], row["pool"], row["tags"]) == (
            task.source,
            task.pool,
            list(task.tags),
        )
        declared = [
            task.policies.as_json(),
            task.monitoring.as_json(),
            task.parameters.json_schema(),
        ]
        assert [row["policies"], row["monitoring"], row["parameters"]] == json.loads(
            json.dumps(declared)
        )


async def test_before_a_schedule_changes_the_due_slots_of_the_old_one_are_handled(
    ledger: Database,
) -> None:
    loaded = await know(ledger, make_task("tick", missed="all"))
    with clock.moved(minutes(3)):
        changed = {
            "tick": replace(loaded["tick"], schedule=make_task("other", "0 * * * *").schedule)
        }
        async with ledger.engine.begin() as connection:
            await task_sync.set_schedules(
                connection, {"tick": changed["tick"].schedule}, changed, NODE
            )
    assert [run["slot"] for run in await rows(ledger)] == [minutes(n) for n in (0.5, 1.5, 2.5)]
    async with ledger.engine.connect() as connection:
        old, new = await slots.history(connection, "tick")
    assert (old["cron"], old["valid_until"], old["fired_until"]) == (
        "* * * * *",
        minutes(3),
        minutes(3),
    )
    assert (new["cron"], new["valid_from"], new["valid_until"]) == ("0 * * * *", minutes(3), None)


@pytest.mark.parametrize("how", ["changed", "gone"])
async def test_a_new_schedule_begins_after_the_slots_that_a_clock_ahead_has_fired_of_the_old_one(
    ledger: Database, how: str
) -> None:
    """Otherwise slots that the clock ahead recorded as missed would run, and slots that ran could
    be missed.
    """
    loaded = await know(ledger, make_task("tick", missed="skip"))
    await fire(ledger, loaded, minutes(60.6))
    every_second = make_task("other", "*/2 * * * *").schedule
    with clock.moved(minutes(1)):
        if how == "gone":
            assert await remove_gone(ledger, set()) == ["tick"]
        async with ledger.engine.begin() as connection:
            await task_sync.set_schedules(connection, {"tick": every_second}, loaded, NODE)
    async with ledger.engine.connect() as connection:
        old, new = await slots.history(connection, "tick")
    assert (
        old["valid_until"]
        == old["fired_until"]
        == new["valid_from"]
        == new["fired_until"]
        == minutes(60.6)
    )
    await fire(ledger, loaded, minutes(30))
    await fire(ledger, loaded, minutes(62))
    (missed,) = await rows(ledger, tables.missed)
    assert (missed["first_slot"], missed["last_slot"], missed["count"]) == (
        minutes(0.5),
        minutes(59.5),
        60,
    )
    assert [run["slot"] for run in await rows(ledger)] == [minutes(60.5), minutes(61.5)]


async def test_an_unchanged_schedule_writes_no_new_row(ledger: Database) -> None:
    task = make_task("tick")
    await know(ledger, task)
    await know(ledger, task, node=new_id())
    assert len(await rows(ledger, tables.schedules)) == 1


async def test_thousands_of_tasks_fire_in_one_transaction(ledger: Database) -> None:
    """With one argument for each value, the statements would exceed asyncpg's limit of 32,767."""
    tasks = [make_task(f"t{i}") for i in range(3_000)]
    loaded = await know(ledger, *tasks)
    fired = await fire(ledger, loaded, minutes(0.6), Capacity(5_000, 0))
    assert len(fired.claimed) == 3_000
    assert len(await rows(ledger, state="running")) == 3_000


@pytest.mark.rest
async def test_two_dispatchers_in_opposite_order_never_deadlock(
    ledger: Database, ledger_url: str
) -> None:
    tasks = [make_task(f"t{i}") for i in range(40)]
    loaded = await know(ledger, *tasks)
    backwards = dict(reversed(loaded.items()))
    other = Database(ledger_url, setting="LEDGER_URL")
    for n in range(100):
        now = minutes(n + 0.6)
        await asyncio.gather(fire(ledger, loaded, now), fire(other, backwards, now, node=new_id()))
        # Schedules that one dispatcher skipped because the other had locked them are still due, and
        # no longer locked.
        await fire(ledger, loaded, now)
    await other.dispose()
    found = await rows(ledger)
    assert len({(run["task"], run["slot"]) for run in found}) == len(found) == 40 * 100


# SQLite's one writer waits instead.
@pytest.mark.parametrize("ledger_url", ["postgresql"], indirect=True)
async def test_a_schedule_that_another_node_is_firing_is_tried_again(
    ledger: Database, ledger_url: str
) -> None:
    loaded = await know(ledger, make_task("tick"))
    other = Database(ledger_url, setting="LEDGER_URL")
    async with other.engine.begin() as holding:
        await slots.lock(holding, ["tick"])
        fired = await fire(ledger, loaded, minutes(0.6))
        assert list(fired.again_at) == ["tick"]
        assert await rows(ledger) == []
    await other.dispose()
    await fire(ledger, loaded, minutes(0.6))
    assert len(await rows(ledger)) == 1


async def test_a_slot_reported_too_early_is_fired_again_at_its_time(ledger: Database) -> None:
    """This machine's clock is ahead of the database's."""
    loaded = await know(ledger, make_task("tick"))
    with clock.moved(minutes(0.5)):
        fired = await fire(ledger, loaded, minutes(0.5) - timedelta(seconds=7))
    assert fired.again_at == {"tick": minutes(0.5)}


async def remove_gone(ledger: Database, live: set[str]) -> list[str]:
    async def seen(_: AsyncConnection) -> set[str]:
        return live

    async with ledger.engine.begin() as connection:
        known = await task_rows.known(connection)
        return await task_sync.remove_gone(
            connection, [n for n, is_removed in known.items() if not is_removed], seen
        )


async def test_a_task_whose_file_is_gone_is_closed_with_a_range_and_keeps_its_history(
    ledger: Database,
) -> None:
    loaded = await know(ledger, make_task("gone"), make_task("kept"))
    await fire(ledger, loaded, minutes(0.6))
    with clock.moved(minutes(5)):
        assert await remove_gone(ledger, {"kept"}) == ["gone"]
        assert await remove_gone(ledger, {"kept"}) == []
    (found,) = await rows(ledger, tables.missed)
    assert (found["task"], found["count"], found["reason"]) == ("gone", 4, "its file is gone")
    assert len(await rows(ledger, task="gone")) == 1
    await fire(ledger, loaded, minutes(9))
    assert len(await rows(ledger, task="gone")) == 1
    with clock.moved(minutes(10)):
        await know(ledger, loaded["gone"])
    (task,) = await rows(ledger, tables.tasks, name="gone")
    assert task["removed_at"] is None
    await fire(ledger, loaded, minutes(10.6))
    assert len(await rows(ledger, task="gone")) == 2


@pytest.mark.parametrize(("before", "after"), [("allow", "skip"), ("skip", "allow")])
async def test_a_run_outlives_a_change_of_its_tasks_overlap_policy(
    ledger: Database, before: str, after: str
) -> None:
    loaded = await know(ledger, make_task("tick", overlap=before))
    await fire(ledger, loaded, minutes(0.6))
    TaskRegistry.clear()
    make_task("tick", overlap=after)
    async with ledger.engine.begin() as connection:
        (head,) = await claiming.heads(connection, ["tick"], minutes(0.6), 5)
        (claimed,) = await transitions.claim(connection, [head.id], NODE, minutes(0.6))
    assert claimed.slot == minutes(0.5)


async def test_a_schedule_that_can_no_longer_be_read_is_replaced_and_the_others_fire(
    ledger: Database,
) -> None:
    loaded = await know(ledger, make_task("bad"), make_task("good"))
    async with ledger.engine.begin() as connection:
        where = tables.schedules.c.task == "bad"
        await connection.execute(tables.schedules.update().where(where).values(timezone="US/Gone"))
    await fire(ledger, loaded, minutes(0.6))
    assert [run["task"] for run in await rows(ledger)] == ["good"]
    with clock.moved(minutes(1)):
        await know(ledger, *loaded.values())
    await fire(ledger, loaded, minutes(1.6))
    assert len(await rows(ledger, task="bad")) == 1


# After a downtime of many schedules


async def test_missed_slots_are_planned_outside_of_transactions_and_do_not_delay_slots_on_time(
    ledger: Database,
) -> None:
    old = [
        make_task(f"old{minute}", f"{minute} * * * *", missed=Missed("once")) for minute in range(3)
    ]
    loaded = await know(ledger, *old, make_task("today", "* * * * *"))
    async with ledger.engine.begin() as connection:
        opened = await slots.lock(connection, ["today"])
        await slots.move_cursors(connection, [opened[0].id], minutes(20 * 1440))
    now = minutes(20 * 1440 + 1)
    async with ledger.engine.begin() as connection:
        fired = await firing.fire(connection, loaded, loaded, NODE, Capacity(0, 0), now, ahead={})
    assert [run["task"] for run in await rows(ledger)] == ["today"]
    assert {row.task for row in fired.behind} == {"old0", "old1", "old2"} == fired.again_at.keys()
    ahead = await firing.plan_ahead(fired.behind, loaded, now)
    async with ledger.engine.begin() as connection:
        fired = await firing.fire(
            connection, fired.again_at, loaded, NODE, Capacity(0, 0), now, ahead=ahead
        )
    assert (fired.behind, fired.again_at) == ([], {})
    missed = await rows(ledger, tables.missed)
    assert [row["count"] for row in missed] == [479, 479, 479]
    assert len(await rows(ledger, catch_up=True)) == 3


async def test_a_plan_for_a_cursor_that_has_moved_since_is_dropped(ledger: Database) -> None:
    loaded = await know(ledger, make_task("tick", missed=Missed("all")))
    async with ledger.engine.begin() as connection:
        fired = await firing.fire(
            connection, loaded, loaded, NODE, Capacity(0, 0), minutes(30), ahead={}
        )
    ahead = await firing.plan_ahead(fired.behind, loaded, minutes(30))
    async with ledger.engine.begin() as connection:
        opened = await slots.lock(connection, ["tick"])
        await slots.move_cursors(connection, [opened[0].id], minutes(10))
    async with ledger.engine.begin() as connection:
        fired = await firing.fire(
            connection, loaded, loaded, NODE, Capacity(0, 0), minutes(30), ahead=ahead
        )
    assert [row.fired_until for row in fired.behind] == [minutes(10)]
    assert await rows(ledger) == []


@pytest.mark.parametrize("schedules", [3, 12])
async def test_each_transaction_catches_up_a_bounded_number_of_slots_and_each_slot_runs_once(
    ledger: Database, monkeypatch: pytest.MonkeyPatch, schedules: int
) -> None:
    monkeypatch.setattr(misfires, "BUDGET", 20)
    monkeypatch.setattr(firing, "LEAST_SHARE", 4)
    policy = Missed("all", max_age=timedelta(days=30))
    loaded = await know(
        ledger, *[make_task(f"t{n}", f"{n}-59 * * * *", missed=policy) for n in range(schedules)]
    )
    now, again, turns = minutes(21), set(loaded), 0
    ahead: SlotPlans = {}
    advanced = set()
    while again:
        before = len(await rows(ledger, catch_up=True))
        async with ledger.engine.begin() as connection:
            fired = await firing.fire(
                connection, again, loaded, NODE, Capacity(0, 0), now, ahead=ahead
            )
        made = await rows(ledger, catch_up=True)
        assert len(made) - before <= 20
        if turns in (1, 2):
            advanced |= {run["task"] for run in made}
        ahead = await firing.plan_ahead(fired.behind, loaded, now)
        again = {name for name, at in fired.again_at.items() if at <= now}
        turns += 1
    assert len(advanced) == min(schedules, 10)
    for task in loaded.values():
        due = list(task.schedule.between(START, now))
        assert sorted(run["slot"] for run in await rows(ledger, task=task.name)) == due


async def test_a_firing_reads_active_runs_only_for_tasks_with_a_limit(ledger: Database) -> None:
    loaded = await know(ledger, make_task("free", overlap="allow"), make_task("plain"))
    statements: list[str] = []

    def keep(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        statements.append(statement)

    event.listen(ledger.engine.sync_engine, "before_cursor_execute", keep)
    await fire(ledger, {"free": loaded["free"]}, minutes(1))
    without = [statement for statement in statements if "FROM batch_runs" in statement]
    await fire(ledger, {"plain": loaded["plain"]}, minutes(1))
    event.remove(ledger.engine.sync_engine, "before_cursor_execute", keep)
    assert without == []
    assert any("FROM batch_runs" in statement for statement in statements)


async def test_a_slot_that_was_due_a_moment_before_a_step_of_the_clock_does_not_hide_the_step(
    ledger: Database,
) -> None:
    """A poll may read the clock after the slot was due, and before it is fired."""
    loaded = await know(ledger, make_task("tick", "* * * * * *", missed="skip"))
    await fire(ledger, loaded, START + timedelta(seconds=10.5))
    steps = ClockSteps()
    steps.last = ClockStep(START + timedelta(seconds=11.3), START + timedelta(hours=1))
    with clock.moved(steps.last.ended):
        async with ledger.engine.begin() as connection:
            await firing.fire(connection, loaded, loaded, NODE, Capacity(0, 0), steps=steps)
    [hour] = await rows(ledger, tables.missed)
    assert hour["first_slot"] == START + timedelta(seconds=11)
    assert hour["reason"] == str(steps.last)
