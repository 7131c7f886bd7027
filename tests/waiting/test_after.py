"""A task that waits for the slots of others: each case of the table in docs/waiting.md."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import update

from batch_system import clock
from batch_system.batch.firing import pauses, task_sync
from batch_system.batch.firing.backfill import Backfill, interval_of
from batch_system.batch.ledger import missed_ranges, schedules, tables
from batch_system.batch.ledger.missed_ranges import Cause
from batch_system.batch.ledger.states import Rank, RunState
from batch_system.batch.ledger.waits import waits as waits_table
from batch_system.batch.queue import gates
from batch_system.batch.queue.cancel import request_cancel
from batch_system.batch.queue.enqueue import Startable
from batch_system.batch.queue.retry import retry
from batch_system.batch.tasks.after import After
from batch_system.batch.tasks.registry import Task
from batch_system.database.engine import Database
from tests.batch.ledger_world import NODE, know, make_task, refresh, rows, schedule_sync_of
from tests.batch.test_leases import put_node
from tests.waiting.world import DAY, MINUTE, Waits

HOUR = timedelta(hours=1)
THREE = datetime(2026, 3, 10, 3, tzinfo=UTC)
"""The first slot of a task that is due daily at three."""


def daily(name: str, schedule: str | None = "0 3 * * *", **attributes: Any) -> Task:
    return make_task(name, schedule, **attributes)


def load_after(*tasks: str | After, **attributes: Any) -> Task:
    """A task without a schedule of its own."""
    after = tasks[0] if tasks and isinstance(tasks[0], After) else tasks or "extract"
    return make_task("load", None, after=after, **attributes)


async def make_slots(waits: Waits, *tasks: Task, at: datetime = THREE) -> None:
    """Know the tasks, and fire their slots at `at`."""
    await waits.know(*tasks)
    await waits.fire(at)


async def again(waits: Waits, run: str) -> None:
    async with waits.ledger.engine.begin() as connection:
        await retry(connection, run, "ann")


async def test_a_follower_has_the_slots_of_the_first_task_and_waits_for_them(waits: Waits) -> None:
    await make_slots(waits, daily("extract", timezone="Europe/Berlin"), load_after())
    extract, load = await rows(waits.ledger, schedules.schedules)
    assert (load["cron"], load["timezone"], load["follows"]) == (
        "0 3 * * *",
        "Europe/Berlin",
        "extract",
    )
    assert load["after"] == {"tasks": ["extract"], "within": 86_400, "on": "success"}
    row = await waits.run_of("load")
    assert (row["slot"], row["state"], row["gate"]) == (
        THREE - timedelta(hours=1),
        "waiting",
        "success",
    )
    assert await rows(waits.ledger, waits_table) == [
        {"run": row["id"], "task": "extract", "slot": row["slot"]}
    ]
    assert extract["after"] is None


async def test_it_opens_when_the_slot_succeeds_in_whichever_attempt(waits: Waits) -> None:
    await make_slots(waits, daily("extract"), load_after())
    assert await waits.look() == 0
    run = (await waits.run_of("extract"))["id"]
    await waits.start(run)
    assert await waits.look() == 0
    await waits.finish(run, RunState.RETRYING, due_at=clock.now())
    assert await waits.look() == 0
    await waits.end("extract")
    assert await waits.look() == 1
    row = await waits.run_of("load")
    assert (row["state"], row["due_at"]) == ("queued", clock.now())


async def test_it_waits_for_all_of_several_tasks(waits: Waits) -> None:
    await make_slots(waits, daily("extract"), daily("rates"), load_after("extract", "rates"))
    await waits.end("extract")
    assert await waits.look() == 0
    await waits.end("rates")
    assert await waits.look() == 1
    assert await waits.state("load") == "queued"


@pytest.mark.parametrize(
    ("state", "words"),
    [(RunState.FAILED, "extract failed"), (RunState.CANCELLED, "extract was cancelled")],
)
async def test_it_closes_when_a_slot_did_not_succeed_once_all_are_over(
    waits: Waits, state: RunState, words: str
) -> None:
    await make_slots(waits, daily("extract"), daily("rates"), load_after("extract", "rates"))
    await waits.end("extract", state=state)
    assert await waits.look() == 0
    await waits.end("rates")
    assert await waits.look() == 1
    row, extract = await waits.run_of("load"), await waits.run_of("extract")
    assert (row["state"], row["reason"]) == ("skipped", f"{words}: run {extract['id']}")
    assert row["finished_at"] == clock.now()


async def test_with_on_end_any_end_opens_it(waits: Waits) -> None:
    await make_slots(
        waits, daily("extract"), make_task("load", None, after=After("extract", on="end"))
    )
    await waits.end("extract", state=RunState.FAILED)
    await waits.look()
    assert await waits.state("load") == "queued"


async def test_a_skipped_slot_closes_it(waits: Waits) -> None:
    await waits.know(daily("extract", "0 * * * *"), load_after())
    await waits.fire(THREE)
    first = await waits.run_of("extract", THREE)
    await waits.start(first["id"])
    await waits.fire(THREE + timedelta(hours=1))
    await waits.look()
    row = await waits.run_of("load", THREE + timedelta(hours=1))
    skipped = await waits.run_of("extract", THREE + timedelta(hours=1))
    assert (row["state"], row["reason"]) == ("skipped", f"extract was skipped: run {skipped['id']}")
    assert await waits.state("load", THREE) == "waiting"


async def test_a_missed_slot_closes_it(waits: Waits) -> None:
    extract, load = daily("extract"), make_task("load", "0 4 * * *", after="extract")
    await waits.know(extract, load)
    clock.advance(THREE + timedelta(hours=1) - clock.now())
    async with waits.ledger.engine.begin() as connection:
        (row,) = await schedules.lock(connection, ["extract"])
        missed = missed_ranges.MissedRange(THREE, THREE, 1, "the service was down", Cause.OTHER)
        await missed_ranges.record(connection, [(row, missed)], clock.now())
        await schedules.move_cursors(connection, [row.id], clock.now())
    del waits.tasks["extract"]
    await waits.fire(clock.now())
    await waits.look()
    row = await waits.run_of("load")
    assert (row["state"], row["reason"]) == ("skipped", "extract was missed: the service was down")


@pytest.mark.parametrize("is_known", [True, False])
async def test_an_unknown_or_removed_task_closes_it(waits: Waits, is_known: bool) -> None:
    extract, load = daily("extract"), make_task("load", "0 3 * * *", after="extract")
    await waits.know(*([extract, load] if is_known else [load]))
    if is_known:
        async with waits.ledger.engine.begin() as connection:
            await task_sync.remove_gone(connection, ["extract"], lambda _: no_tasks())
    del waits.tasks["load"]
    waits.tasks = {"load": load}
    await waits.fire(THREE)
    await waits.look()
    row = await waits.run_of("load")
    assert (row["state"], row["reason"]) == ("skipped", "there is no task extract")


async def no_tasks() -> set[str]:
    return set()


async def test_a_task_without_a_slot_yet_closes_it(waits: Waits) -> None:
    weekly, load = daily("extract", "0 3 * * 0"), make_task("load", "0 3 * * *", after="extract")
    await make_slots(waits, weekly, load)
    await waits.look()
    row = await waits.run_of("load")
    assert (row["state"], row["reason"]) == ("skipped", "extract had no slot before this one")


async def test_a_task_that_was_paused_before_the_slot_closes_it_at_once(waits: Waits) -> None:
    await waits.know(daily("extract"), load_after())
    async with waits.ledger.engine.begin() as connection:
        await pauses.pause(connection, "extract", "ann")
    del waits.tasks["extract"]
    await waits.fire(THREE)
    await waits.look()
    row = await waits.run_of("load")
    assert (row["state"], row["reason"]) == ("skipped", "extract is paused by ann")


async def test_a_retry_of_the_slot_lets_it_wait_again(waits: Waits) -> None:
    await make_slots(waits, daily("extract"), load_after())
    await waits.end("extract", state=RunState.FAILED)
    await waits.look()
    clock.advance(MINUTE)
    await again(waits, (await waits.run_of("extract"))["id"])
    row = await waits.run_of("load")
    assert (row["state"], row["reason"], row["finished_at"]) == ("waiting", None, None)
    assert row["wait_until"] == clock.now() + DAY
    await waits.end("extract")
    await waits.look()
    assert await waits.state("load") == "queued"


@pytest.mark.parametrize("overlap", ["skip", "wait", "replace"])
async def test_a_retry_of_several_slots_loses_no_later_slot_and_delays_none_of_today(
    waits: Waits, overlap: str
) -> None:
    """This holds for slots that were closed because of the failures, and for slots that still wait:
    they are caught up one at a time.
    """
    load = load_after("extract", "other", overlap=overlap)
    await waits.know(
        *(daily(name, "0 * * * *", overlap="allow") for name in ("extract", "other")), load
    )
    slots = [THREE + n * HOUR for n in range(4)]
    for slot in slots:
        await waits.fire(slot)
        await waits.end("extract", slot, RunState.FAILED)
    for slot in slots[:2]:
        await waits.end("other", slot)
    await waits.look()
    assert [await waits.state("load", slot) for slot in slots] == [
        "skipped",
        "skipped",
        "waiting",
        "waiting",
    ]
    for slot in slots:
        await again(waits, (await waits.run_of("extract", slot))["id"])
        await waits.end("extract", slot)
    for slot in slots[2:]:
        await waits.end("other", slot)
    today = THREE + 4 * HOUR
    await waits.fire(today)
    for task in ("extract", "other"):
        await waits.end(task, today)
    await waits.look()
    loads = [await waits.run_of("load", slot) for slot in (*slots, today)]
    assert [run["state"] for run in loads] == ["queued"] * 5
    assert [(run["catch_up"], run["rank"]) for run in loads] == [
        *[(True, Rank.CATCH_UP)] * 4,
        (False, Rank.ON_TIME),
    ]


async def test_a_backfill_of_the_missed_slot_lets_it_wait_again(waits: Waits) -> None:
    extract = daily("extract")
    await waits.know(extract, make_task("load", "0 4 * * *", after="extract"))
    clock.advance(THREE + timedelta(hours=1) - clock.now())
    async with waits.ledger.engine.begin() as connection:
        (row,) = await schedules.lock(connection, ["extract"])
        missed = missed_ranges.MissedRange(THREE, THREE, 1, "the service was down", Cause.OTHER)
        await missed_ranges.record(connection, [(row, missed)], clock.now())
        await schedules.move_cursors(connection, [row.id], clock.now())
    await waits.fire(clock.now())
    await waits.look()
    assert await waits.state("load") == "skipped"
    clock.advance(5 * MINUTE)
    backfill = Backfill(waits.ledger, waits.ledger, Startable.of(extract), "ann")
    async with waits.ledger.reader.connect() as connection:
        interval = await interval_of(connection, "extract", THREE, THREE)
    await backfill.make(interval)
    assert await waits.state("load") == "waiting"
    await waits.end("extract")
    await waits.look()
    assert await waits.state("load") == "queued"


async def test_a_slot_that_a_person_has_cancelled_stays(waits: Waits) -> None:
    await make_slots(waits, daily("extract"), load_after())
    load = (await waits.run_of("load"))["id"]
    async with waits.ledger.engine.begin() as connection:
        await request_cancel(connection, load, "cancelled by ann", "ann")
    await waits.end("extract", state=RunState.FAILED)
    await again(waits, (await waits.run_of("extract"))["id"])
    assert await waits.look() == 0
    assert await waits.state("load") == "cancelled"


async def test_a_slot_that_its_overlap_policy_has_skipped_stays(
    waits: Waits, application: Database
) -> None:
    await waits.know(daily("extract", "0 * * * *", overlap="allow"), load_after())
    await waits.fire(THREE)
    await waits.end("extract", THREE)
    await waits.look()
    await waits.start((await waits.run_of("load", THREE))["id"])
    later = THREE + timedelta(hours=1)
    await waits.fire(later)
    await waits.end("extract", later)
    await waits.look()
    row, before = await waits.run_of("load", later), await waits.run_of("load", THREE)
    assert row["state"] == "skipped"
    assert row["reason"] == f"run {before['id']} of slot 2026-03-10 03:00:00 UTC was still running"
    await waits.finish(before["id"])
    async with waits.ledger.engine.begin() as connection:
        await connection.execute(waits_table.delete().where(waits_table.c.run == before["id"]))
    extract = (await waits.run_of("extract", later))["id"]
    backfill = Backfill(
        waits.ledger, application, Startable.of(waits.tasks["extract"]), "ann", redo=True
    )
    clock.advance(5 * MINUTE)
    async with waits.ledger.reader.connect() as connection:
        interval = await interval_of(connection, "extract", later, later)
    await backfill.make(interval)
    assert (await rows(waits.ledger, id=extract))[0]["state"] == "queued"
    assert await waits.state("load", later) == "skipped"


async def test_a_retry_of_its_own_run_starts_it_without_waiting(waits: Waits) -> None:
    await make_slots(waits, daily("extract"), load_after())
    await waits.end("extract", state=RunState.FAILED)
    await waits.look()
    await again(waits, (await waits.run_of("load"))["id"])
    assert await waits.state("load") == "queued"


async def test_a_run_again_after_a_success_changes_nothing_for_it(
    waits: Waits, application: Database
) -> None:
    extract = daily("extract")
    await make_slots(waits, extract, load_after())
    await waits.end("extract")
    await waits.look()
    await waits.end("load")
    backfill = Backfill(waits.ledger, application, Startable.of(extract), "ann", redo=True)
    clock.advance(5 * MINUTE)
    async with waits.ledger.reader.connect() as connection:
        interval = await interval_of(connection, "extract", THREE, THREE)
    await backfill.make(interval)
    assert (await waits.state("extract"), await waits.state("load")) == ("queued", "succeeded")


@pytest.mark.parametrize("days", [0, 7], ids=["missed", "from before the schedules"])
async def test_a_backfilled_slot_waits_by_the_same_rule(waits: Waits, days: int) -> None:
    slot = THREE - timedelta(days=days)
    extract, load = daily("extract", missed="skip"), load_after(missed="skip")
    await waits.know(extract, load)
    await waits.fire(THREE + timedelta(hours=2))
    assert await rows(waits.ledger) == []
    for task in (load, extract):
        backfill = Backfill(waits.ledger, waits.ledger, Startable.of(task), "ann")
        async with waits.ledger.reader.connect() as connection:
            interval = await interval_of(connection, task.name, slot, slot)
        await backfill.make(interval)
    assert (await waits.state("extract"), await waits.state("load")) == ("queued", "waiting")
    await waits.end("extract")
    await waits.look()
    row = await waits.run_of("load")
    assert (row["state"], row["origin"]) == ("queued", "backfill")


async def test_slots_that_are_caught_up_wait_too(waits: Waits) -> None:
    await waits.know(daily("extract", "0 3,4 * * *", missed="all"), load_after(missed="all"))
    await waits.fire(THREE + timedelta(hours=3))
    assert [row["state"] for row in await rows(waits.ledger, task="load")] == ["waiting"] * 2
    for slot in (THREE, THREE + timedelta(hours=1)):
        await waits.end("extract", slot)
    assert await waits.look() == 2
    assert [row["state"] for row in await rows(waits.ledger, task="load")] == ["queued"] * 2


async def test_it_closes_when_it_has_waited_long_enough(waits: Waits) -> None:
    await make_slots(
        waits,
        daily("extract"),
        make_task("load", None, after=After("extract", within=timedelta(hours=2))),
    )
    await waits.start((await waits.run_of("extract"))["id"])
    clock.advance(timedelta(hours=2) - MINUTE)
    assert await waits.look() == 0
    clock.advance(MINUTE)
    assert await waits.look() == 1
    row = await waits.run_of("load")
    assert (row["state"], row["reason"]) == ("skipped", "extract was still running after 2 h")


async def test_a_pause_does_not_count_for_how_long_it_waits(waits: Waits) -> None:
    await make_slots(
        waits, daily("extract"), make_task("load", None, after=After("extract", within=3_600))
    )
    async with waits.ledger.engine.begin() as connection:
        await pauses.pause(connection, "load", "ann")
    clock.advance(timedelta(hours=5))
    assert await waits.look() == 0
    async with waits.ledger.engine.begin() as connection:
        await pauses.resume(connection, "load")
    clock.advance(59 * MINUTE)
    assert await waits.look() == 0
    clock.advance(MINUTE)
    assert await waits.look() == 1
    assert "was still queued after 6 h" in (await waits.run_of("load"))["reason"]


@pytest.mark.rest
@pytest.mark.parametrize(
    ("upstream", "own", "slot", "awaited"),
    [
        # Daily after hourly: the newest.
        ("0 * * * *", "30 3 * * *", "2026-03-11 03:30", "2026-03-11 03:00"),
        # Daily after weekly: the newest.
        ("0 3 * * 3", "0 4 * * *", "2026-03-12 04:00", "2026-03-11 03:00"),
        ("0 3 * * *", "0 3 * * *", "2026-03-11 03:00", "2026-03-11 03:00"),  # the same slot
        # The one of the day before.
        ("5 3 * * *", "0 3 * * *", "2026-03-11 03:00", "2026-03-10 03:05"),
    ],
)
async def test_the_last_slot_at_or_before_its_own_counts(
    waits: Waits, upstream: str, own: str, slot: str, awaited: str
) -> None:
    await waits.know(
        daily("extract", upstream, overlap="allow"), make_task("load", own, after="extract")
    )
    at, expected = (datetime.fromisoformat(text).replace(tzinfo=UTC) for text in (slot, awaited))
    while clock.now() < at:
        await waits.fire(min(at, clock.now() + timedelta(minutes=30)))
    load = await waits.run_of("load", at)
    assert [row["slot"] for row in await rows(waits.ledger, waits_table, run=load["id"])] == [
        expected
    ]


async def test_a_slot_of_an_earlier_schedule_counts_if_the_present_one_has_none_yet(
    waits: Waits,
) -> None:
    extract, load = daily("extract"), make_task("load", "0 5 * * *", after="extract")
    await make_slots(waits, extract, load)
    clock.advance(30 * MINUTE)
    other = daily("other", "0 4 * * 0").schedule
    async with waits.ledger.engine.begin() as connection:
        await task_sync.set_schedules(connection, {"extract": other}, waits.tasks, NODE)
    await waits.fire(THREE + timedelta(hours=2))
    load_run = await waits.run_of("load")
    assert [row["slot"] for row in await rows(waits.ledger, waits_table, run=load_run["id"])] == [
        THREE
    ]


async def test_a_change_of_the_schedule_changes_those_that_follow_it(waits: Waits) -> None:
    report = make_task("report", None, after="load")
    await waits.know(daily("extract"), load_after(), report)
    clock.advance(MINUTE)
    other = make_task("other", "0 4 * * *", timezone="Asia/Tokyo").schedule
    async with waits.ledger.engine.begin() as connection:
        await task_sync.set_schedules(
            connection, {"extract": other}, {"extract": waits.tasks["extract"]}, NODE
        )
    opened = [
        row for row in await rows(waits.ledger, schedules.schedules) if row["valid_until"] is None
    ]
    assert {(row["task"], row["cron"], row["timezone"], row["follows"]) for row in opened} == {
        ("extract", "0 4 * * *", "Asia/Tokyo", None),
        ("load", "0 4 * * *", "Asia/Tokyo", "extract"),
        ("report", "0 4 * * *", "Asia/Tokyo", "load"),
    }
    assert all(row["after"] for row in opened if row["follows"])


async def test_overlap_is_decided_at_the_opening(waits: Waits) -> None:
    """Under `replace` an older slot that opens after a newer one is skipped."""
    later = THREE + timedelta(hours=1)
    await waits.know(daily("extract", "0 * * * *", overlap="allow"), load_after(overlap="replace"))
    for slot in (THREE, later):
        await waits.fire(slot)
    await waits.end("extract", later)
    await waits.look()
    await waits.start((await waits.run_of("load", later))["id"])
    await waits.end("extract", THREE)
    await waits.look()
    row = await waits.run_of("load", THREE)
    assert (row["state"], row["reason"]) == ("skipped", "a newer slot of load runs")
    assert await waits.state("load", later) == "running"


@pytest.mark.parametrize(("overlap", "admitted"), [("skip", [False, True]), ("wait", [True, True])])
async def test_of_many_that_open_at_once_skip_admits_the_newest_and_wait_the_oldest_first(
    waits: Waits, overlap: str, admitted: list[bool]
) -> None:
    slots = [THREE, THREE + timedelta(hours=1)]
    await waits.know(daily("extract", "0 * * * *", overlap="allow"), load_after(overlap=overlap))
    for slot in slots:
        await waits.fire(slot)
    for slot in slots:
        await waits.end("extract", slot)
    await waits.look()
    assert [await waits.state("load", slot) == "queued" for slot in slots] == admitted


async def test_many_slots_that_a_node_may_not_open_do_not_keep_it_from_its_own(
    waits: Waits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gates, "MOST", 3)
    mine = make_task("mine", None, after="extract")
    await waits.know(daily("extract", "0 * * * *", overlap="allow"), load_after(overlap="allow"))
    for slot in (THREE + n * HOUR for n in range(3)):
        await waits.fire(slot)
        await waits.end("extract", slot)
    await waits.know(mine)
    last = THREE + 3 * HOUR
    await waits.fire(last)
    await waits.end("extract", last)
    assert await waits.look({"mine": mine}) == 1
    assert await waits.state("mine") == "queued"
    assert {run["state"] for run in await rows(waits.ledger, task="load")} == {"waiting"}


async def test_only_a_node_that_has_loaded_the_task_opens_a_slot_but_any_closes_it(
    waits: Waits,
) -> None:
    await make_slots(waits, daily("extract"), load_after())
    await waits.end("extract")
    assert await waits.look({}) == 0
    assert await waits.state("load") == "waiting"
    assert await waits.look() == 1


async def test_tasks_that_can_not_work_because_of_others_are_reported_by_the_node_that_has_them(
    waits: Waits, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The task that would give them their slots is missing or has none, or tasks of two services
    wait for each other.
    """
    node, other = await put_node(waits.ledger), await put_node(waits.ledger)
    theirs = (
        update(tables.nodes)
        .where(tables.nodes.c.id == other)
        .values(tasks=["by_hand", "ping", "gone"])
    )
    async with waits.ledger.engine.begin() as connection:
        await connection.execute(theirs)
    await waits.know(make_task("by_hand", None), daily("ping", after="pong"))
    followers = [make_task("lost", None, after="gone"), make_task("idle", None, after="by_hand")]
    loaded = await know(waits.ledger, *followers, daily("pong", after="ping"))
    caplog.set_level("WARNING")
    sync = schedule_sync_of(waits.ledger, loaded, node)
    monkeypatch.setattr(sync, "_lease", 0.0)
    sync._started_at -= 1
    await refresh(sync)
    await refresh(sync)
    (row,) = await rows(waits.ledger, tables.nodes, id=node)
    assert {file["task"]: file["error"] for file in row["broken"]} == {
        "idle": "task idle: it has no slots: it waits for by_hand, which has no slots",
        "lost": "task lost: it has no slots: it waits for gone, which no service has",
        "pong": "task pong: tasks wait for each other: ping after pong after ping",
    }
    assert "lost waits for gone, which no service has: it has no slots" in caplog.text
    assert caplog.text.count("tasks wait for each other") == 1
    await waits.know(daily("gone"), daily("by_hand"), daily("ping"))
    for _ in range(3):
        await refresh(sync)
    opened = {
        row["task"]: row["cron"]
        for row in await rows(waits.ledger, tables.schedules, valid_until=None)
    }
    assert opened["lost"] == opened["idle"] == "0 3 * * *", (
        "they have slots as soon as what they follow has"
    )
    assert [row["broken"] for row in await rows(waits.ledger, tables.nodes, id=node)] == [[]]
