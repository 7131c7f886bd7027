"""Transactions that lock several rows lock them in one order. Only on PostgreSQL, since SQLite has
one writer.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta

import pytest
from sqlalchemy import insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system import clock
from batch_system.batch.cron.cron import schedule
from batch_system.batch.firing import pauses, task_sync
from batch_system.batch.ledger import schedules, tables
from batch_system.batch.ledger.migration import LEDGER_HISTORY
from batch_system.batch.ledger.tables import new_id
from batch_system.batch.retention.pruning import Pruner
from batch_system.batch.retention.retention import Keep
from batch_system.database.engine import Database
from tests.batch.ledger_world import NODE, fire, know, make_task, until_waiting
from tests.batch.lock_order import watch
from tests.batch.test_runs import insert as insert_runs
from tests.batch.test_upkeep import of_slot, over
from tests.databases import migrated
from tests.migrations import APPLICATION_HISTORIES

HOURLY, DAILY = schedule("0 * * * *", "UTC"), schedule("0 0 * * *", "UTC")
OLD = clock.now().replace(minute=0, second=0, microsecond=0) - timedelta(days=100)
Do = Callable[[AsyncConnection], Awaitable[object]]


@pytest.fixture
async def ledger(postgres_database: str) -> AsyncIterator[Database]:
    """The tables of the ledger and of the application in one PostgreSQL database."""
    for histories in ((LEDGER_HISTORY,), APPLICATION_HISTORIES):
        await migrated(postgres_database, *histories)
    database = Database(postgres_database, setting="LEDGER_URL")
    yield database
    await database.dispose()


async def write(ledger: Database, do: Do) -> object:
    async with ledger.engine.begin() as connection:
        return await do(connection)


async def nobody(_: AsyncConnection) -> set[str]:
    return set()


BESIDE: dict[str, Do] = {
    "pause": lambda connection: pauses.pause(connection, "tick", "ann"),
    "resume": lambda connection: pauses.resume(connection, "tick"),
    "remove": lambda connection: task_sync.remove_gone(connection, ["tick"], nobody),
    "restore": lambda connection: task_sync.set_schedules(connection, {"tick": HOURLY}, {}, NODE),
}


@pytest.mark.parametrize("beside", BESIDE.values(), ids=BESIDE)
async def test_recording_a_task_while_another_transaction_changes_it_does_not_deadlock(
    ledger: Database, beside: Do
) -> None:
    """A transaction that waits for the row of the task must not hold the row of its schedule."""
    loaded = await know(ledger, make_task("tick", "0 * * * *"))
    if beside is BESIDE["resume"]:
        await write(ledger, BESIDE["pause"])
    if beside is BESIDE["restore"]:
        await write(ledger, lambda c: c.execute(update(tables.tasks).values(accounted_from=None)))
        await write(ledger, lambda c: c.execute(update(tables.schedules).values(cron="5 * * * *")))
    async with ledger.engine.begin() as taking_in:
        await task_sync.record_tasks(taking_in, loaded, clock.now())
        changing = asyncio.create_task(write(ledger, beside))
        await until_waiting(ledger, 1)
        await task_sync.set_schedules(taking_in, {"tick": DAILY}, loaded, NODE)
    await changing


async def make_old(connection: AsyncConnection) -> None:
    """Write an old missed range, for which pruning has to move the beginning of all accounts."""
    await connection.execute(update(tables.tasks).values(accounted_from=OLD))
    row = {
        "task": "a",
        "first_slot": OLD,
        "last_slot": OLD,
        "count": 1,
        "reason": "it was down",
        "created_at": OLD,
    }
    await connection.execute(insert(tables.missed).values(id=new_id(), **row))


async def prune(ledger: Database) -> object:
    return await Pruner(ledger, ledger, Keep(90, 1), pause=0).prune()


def recording(*names: str) -> Callable[[Database], Awaitable[object]]:
    async def record(ledger: Database) -> object:
        loaded = {name: make_task(name, None) for name in names}
        return await write(ledger, lambda c: task_sync.record_tasks(c, loaded, clock.now()))

    return record


@pytest.mark.parametrize("first", [recording("z", "m", "a"), prune], ids=["record", "prune"])
async def test_two_transactions_that_lock_several_tasks_do_not_deadlock(
    ledger: Database, first: Callable[[Database], Awaitable[object]]
) -> None:
    """A third transaction stops both halfway, when each has locked rows that the other one needs
    next.
    """
    for name in ("z", "m", "n", "a"):  # so they lie in the table, too
        await recording(name)(ledger)
    await write(ledger, make_old)
    async with ledger.engine.begin() as holding:
        held = select(tables.tasks).where(tables.tasks.c.name.in_(["m", "n"])).with_for_update()
        await holding.execute(held)
        both = [asyncio.create_task(first(ledger))]
        await until_waiting(ledger, 1)
        both.append(asyncio.create_task(recording("a", "n", "z")(ledger)))
        await until_waiting(ledger, 2)
    await asyncio.gather(*both)


async def test_each_transaction_on_tasks_locks_them_first_and_by_name(ledger: Database) -> None:
    loaded = await know(ledger, *(make_task(name, "0 * * * *") for name in ("tick", "a", "b")))
    await write(ledger, make_old)
    wrong = watch(ledger)
    await know(ledger, *loaded.values())
    await insert_runs(
        ledger, *(of_slot(OLD - timedelta(hours=n)) for n in range(3)), over(clock.now())
    )
    await prune(ledger)
    await fire(ledger, loaded, clock.now() + timedelta(hours=2))
    await write(ledger, lambda c: pauses.pause(c, "tick", "ann", loaded, NODE))
    for do in (BESIDE["resume"], BESIDE["pause"], BESIDE["remove"]):
        await write(ledger, do)
    changed = dict.fromkeys(loaded, DAILY)
    await write(ledger, lambda c: task_sync.set_schedules(c, changed, loaded, NODE))
    assert wrong == []


async def test_the_check_finds_an_order_of_locks_that_can_deadlock(ledger: Database) -> None:
    wrong = watch(ledger)
    await know(ledger, make_task("tick"), make_task("tock"))
    async with ledger.engine.begin() as connection:
        await schedules.lock(connection, ["tick"])
        await connection.execute(
            update(tables.tasks).where(tables.tasks.c.name == "tick").values(paused_by="ann")
        )
    await write(ledger, lambda c: c.execute(update(tables.tasks).values(paused_by="ann")))
    assert [one.partition(" locks ")[2] for one in wrong] == [
        "batch_tasks after ['batch_schedules']",
        "several rows of batch_tasks in no order",
    ]
