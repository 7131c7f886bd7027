"""The account is complete with `after`, whatever became of the upstream: each slot is a run or a
missed range.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from batch_system import clock
from batch_system.batch.account.account import Account
from batch_system.batch.account.account import accounts as accounts_of
from batch_system.batch.firing import pauses
from batch_system.batch.firing.backfill import Backfill, interval_of
from batch_system.batch.ledger.states import RunState
from batch_system.batch.queue.enqueue import Startable
from batch_system.batch.tasks.declaration import Missed
from tests.waiting.test_after import THREE, daily, load_after, make_slots
from tests.waiting.world import DAY, MINUTE, START, Waits


async def accounts(waits: Waits) -> dict[str, Account]:
    async with waits.ledger.reader.connect() as connection:
        return {each.task: each async for each in accounts_of(connection, START)}


async def is_complete(waits: Waits, slots: int) -> dict[str, int]:
    """Each task has so many slots, and none is a finding. Returns the counts of load."""
    found = await accounts(waits)
    for account in found.values():
        assert account.findings == []
        assert sum(account.counts.values()) == slots
    return {str(kind): number for kind, number in found["load"].counts.items() if number}


async def settle(waits: Waits) -> None:
    for _ in range(3):
        await waits.look()


async def go_to(waits: Waits, at: datetime) -> None:
    await waits.fire(at)
    clock.advance(2 * MINUTE)


async def test_while_it_waits(waits: Waits) -> None:
    await make_slots(waits, daily("extract"), load_after())
    clock.advance(2 * MINUTE)
    assert await is_complete(waits, 1) == {"run": 1}


async def test_when_the_upstream_has_failed(waits: Waits) -> None:
    await make_slots(waits, daily("extract"), load_after())
    await waits.end("extract", state=RunState.FAILED)
    await settle(waits)
    clock.advance(2 * MINUTE)
    assert await is_complete(waits, 1) == {"skipped": 1}


async def test_when_the_upstream_was_skipped(waits: Waits) -> None:
    await waits.know(daily("extract", "0 * * * *"), load_after())
    await waits.fire(THREE)
    slots = 3
    await waits.start((await waits.run_of("extract", THREE))["id"])
    await go_to(waits, THREE + timedelta(hours=1))
    await settle(waits)
    assert await waits.state("extract", THREE + timedelta(hours=1)) == "skipped"
    assert (await is_complete(waits, slots + 1))["skipped"] == 1


async def test_when_the_upstream_is_paused(waits: Waits) -> None:
    await waits.know(daily("extract"), load_after())
    async with waits.ledger.engine.begin() as connection:
        await pauses.pause(connection, "extract", "ann", waits.tasks)
    await go_to(waits, THREE)
    await settle(waits)
    assert await is_complete(waits, 1) == {"skipped": 1}
    async with waits.ledger.engine.begin() as connection:
        await pauses.resume(connection, "extract")
    await go_to(waits, THREE + DAY)
    await settle(waits)
    assert await is_complete(waits, 2) == {"run": 1, "skipped": 1}


async def test_when_slots_were_missed_and_are_caught_up(waits: Waits) -> None:
    await waits.know(daily("extract", missed=Missed("once")), load_after())
    await go_to(waits, THREE + 4 * DAY + timedelta(hours=1))
    await settle(waits)
    assert await is_complete(waits, 5) == {"run": 1, "missed": 4}
    assert await waits.state("load") == "waiting"


async def test_when_both_are_backfilled(waits: Waits) -> None:
    await waits.know(daily("extract", missed=Missed("skip")), load_after(missed=Missed("skip")))
    await go_to(waits, THREE + 2 * DAY + timedelta(hours=1))
    assert await is_complete(waits, 3) == {"missed": 3}
    for name in ("extract", "load"):
        backfill = Backfill(waits.ledger, waits.ledger, Startable.of(waits.tasks[name]), "ann")
        async with waits.ledger.reader.connect() as connection:
            interval = await interval_of(connection, name, THREE, THREE + 2 * DAY)
        await backfill.make(interval)
    await settle(waits)
    assert await is_complete(waits, 3) == {"run": 3}
    assert await waits.state("load", THREE) == "waiting"
