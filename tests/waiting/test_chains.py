"""What was closed waits again at any depth, and what waits for a task that is gone does not wait
for ever.
"""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import update

from batch_system import Start, clock, start_all
from batch_system.batch.firing import task_sync
from batch_system.batch.firing.backfill import Backfill, interval_of
from batch_system.batch.firing.waiting import MOST_LEFT, Opener
from batch_system.batch.ledger import buckets
from batch_system.batch.ledger.buckets import buckets as buckets_table
from batch_system.batch.ledger.states import Rank, RunState
from batch_system.batch.ledger.tables import runs
from batch_system.batch.nodes.ledger_poll import LedgerChanges
from batch_system.batch.nodes.outage import Outage
from batch_system.batch.queue import retry as retrying
from batch_system.batch.queue.enqueue import Startable
from batch_system.batch.queue.retry import retry
from batch_system.database.engine import Database
from tests.batch.ledger_world import make_task, rows, until
from tests.waiting.test_after import THREE, again, daily, no_tasks
from tests.waiting.test_and_after import chain, states
from tests.waiting.world import DAY, MINUTE, Waits


async def close_all(waits: Waits) -> None:
    """The first task of a chain fails, and what comes after it is closed."""
    await waits.know(*chain())
    await waits.fire(THREE)
    await waits.end("extract", state=RunState.FAILED)
    while await waits.look():
        pass
    assert await states(waits) == {"extract": "failed", "load": "skipped", "report": "skipped"}


async def test_a_retry_lets_what_comes_after_wait_again_in_whichever_depth(waits: Waits) -> None:
    await close_all(waits)
    clock.advance(MINUTE)
    await again(waits, (await waits.run_of("extract"))["id"])
    assert await states(waits) == {"extract": "queued", "load": "waiting", "report": "waiting"}
    assert (await waits.run_of("report"))["wait_until"] == clock.now() + DAY
    for name in ("extract", "load", "report"):
        await waits.look()
        await waits.end(name)
    assert set((await states(waits)).values()) == {"succeeded"}


async def test_a_backfill_of_a_missed_slot_does_so_too(waits: Waits) -> None:
    extract, load, report = chain()
    skipping = make_task("extract", "0 3 * * *", missed="skip")
    load, report = (make_task(t.name, "0 5 * * *", after=t.cls.after) for t in (load, report))
    await waits.know(skipping, load, report)
    await waits.fire(THREE + timedelta(hours=1))
    await waits.fire(THREE + timedelta(hours=2))
    while await waits.look():
        pass
    assert await states(waits) == {"load": "skipped", "report": "skipped"}
    clock.advance(5 * MINUTE)
    async with waits.ledger.reader.connect() as connection:
        interval = await interval_of(connection, "extract", THREE, THREE)
    await Backfill(waits.ledger, waits.ledger, Startable.of(extract), "ann").make(interval)
    assert await states(waits) == {"extract": "queued", "load": "waiting", "report": "waiting"}


async def test_a_retry_of_a_member_lets_the_groups_around_its_own_wait_again(waits: Waits) -> None:
    mail, report = (
        make_task("mail", None, overlap="allow"),
        make_task("report", None, overlap="allow"),
    )
    await waits.know(mail, report)
    outer = await start_all([Start(mail.cls)], then=Start(report.cls))
    inner = await start_all([Start(mail.cls)], then=Start(report.cls))
    (first,), (second,) = [await rows(waits.ledger, awaited_by=group) for group in (outer, inner)]
    async with waits.ledger.engine.begin() as connection:
        await connection.execute(update(runs).where(runs.c.id == inner).values(awaited_by=outer))
    for member, state in ((first, RunState.SUCCEEDED), (second, RunState.FAILED)):
        await waits.start(member["id"])
        await waits.finish(member["id"], state)
    while await waits.look():
        pass
    assert [row["state"] for row in await rows(waits.ledger, task="report")] == [
        "skipped",
        "skipped",
    ]
    await again(waits, second["id"])
    assert [row["state"] for row in await rows(waits.ledger, task="report")] == [
        "waiting",
        "waiting",
    ]


async def test_the_slots_that_wait_again_are_counted_again(waits: Waits) -> None:
    """Here the slot that waits lies in another bucket than the one that it waits for."""
    await waits.know(daily("extract"), make_task("load", "30 3 * * *", after="extract"))
    await waits.fire(THREE)
    await waits.end("extract", state=RunState.FAILED)
    await waits.fire(THREE + 30 * MINUTE)
    await waits.look()
    assert await waits.state("load") == "skipped"
    bucket = buckets.bucket_of(THREE + 30 * MINUTE)
    async with waits.ledger.engine.begin() as connection:
        await buckets.lock(connection, [bucket], clock.now())
    await again(waits, (await waits.run_of("extract"))["id"])
    assert (await rows(waits.ledger, buckets_table, bucket=bucket))[0]["counted_at"] is None


async def test_a_follow_up_that_is_run_again_waits_for_its_group_by_its_own_rule(
    waits: Waits, application: Database
) -> None:
    """Its task also has slots that wait for others."""
    mail, load = make_task("mail", None, overlap="allow"), make_task("load", None, after="extract")
    await waits.know(daily("extract"), mail, load)
    follow_up = await start_all([Start(mail.cls)], then=Start(load.cls, on="end"))
    (member,) = await rows(waits.ledger, awaited_by=follow_up)
    await waits.start(member["id"])
    await waits.finish(member["id"])
    await waits.look()
    await waits.end("load")
    after = [follow_up or ""]
    await retrying.again(waits.ledger, application, [member["id"]], Rank.MANUAL, "ann", after)
    (row,) = await rows(waits.ledger, id=follow_up)
    assert (row["state"], row["gate"], row["wait_until"]) == ("waiting", "end", None)


async def test_a_run_that_waits_for_a_run_that_waits_again_waits_again_too(
    waits: Waits, application: Database
) -> None:
    """Even if it was not among the runs that were asked for."""
    await close_all(waits)
    load = (await waits.run_of("load"))["id"]
    async with waits.ledger.engine.begin() as connection:
        await retry(connection, load, "ann")
    await waits.end("load", state=RunState.FAILED)
    while await waits.look():
        pass
    assert await states(waits) == {"extract": "failed", "load": "failed", "report": "skipped"}
    await retrying.again(waits.ledger, application, [], Rank.MANUAL, "ann", [load])
    assert await states(waits) == {"extract": "failed", "load": "waiting", "report": "waiting"}


@pytest.mark.parametrize("is_loaded", [True, False])
async def test_a_slot_of_a_task_that_is_gone_opens_and_then_fails_as_any_other_run(
    waits: Waits, is_loaded: bool
) -> None:
    """No node that fires knows its overlap policy. Without this it would wait for ever."""
    await waits.know(daily("extract"), make_task("load", None, after="extract"))
    await waits.fire(THREE)
    await waits.end("extract")
    others = {"extract": waits.tasks["extract"]}
    assert await waits.look(others) == 0
    async with waits.ledger.engine.begin() as connection:
        await task_sync.remove_gone(connection, ["load"], lambda _: no_tasks())
    assert await waits.look(waits.tasks if is_loaded else others) == 1
    assert await waits.state("load") == "queued"


async def test_a_node_without_the_watch_opens_what_only_it_has_loaded(waits: Waits) -> None:
    """The node of the watch, which looks each second, opens no slot of a task that it does not
    know.
    """
    await waits.know(daily("extract"), make_task("load", None, after="extract"))
    await waits.fire(THREE)
    await waits.end("extract")
    opener = Opener(waits.ledger, {"load": waits.tasks["load"]}, lambda: None)
    opener.follow(tuple, lambda: False)
    opener.start()
    changes = LedgerChanges(clock.now(), is_claimable=False, catalog=1, is_waiting=True)
    for _ in range(MOST_LEFT - 1):
        opener.on_changes(changes)
    assert not opener._woken.is_set()
    opener.on_changes(changes)
    await until(lambda: rows(waits.ledger, task="load", state="queued"))
    await opener.stop()


async def test_after_an_outage_the_opener_looks_once_even_if_others_have_opened_what_waited(
    waits: Waits,
) -> None:
    outage = Outage()
    opener = Opener(waits.ledger, {}, lambda: None, outage)
    outage.cause_for("opener", waits.ledger, OSError("refused"))
    opener.start()
    opener.on_changes(LedgerChanges(clock.now(), is_claimable=False, catalog=1))

    async def can_work() -> bool:
        return not outage.has_failed("opener")

    await until(can_work)
    await opener.stop()
