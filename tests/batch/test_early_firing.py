"""Many slots of one instant are fired in a transaction that begins before it and is committed at
it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system import clock
from batch_system.batch.firing import pauses
from batch_system.batch.firing.dispatcher import BETWEEN_SECONDS, FEW, LONGEST_SECONDS, Dispatcher
from batch_system.batch.ledger import database_time, schedules, tables
from batch_system.batch.ledger.migration import LEDGER_HISTORY
from batch_system.batch.ledger.states import RunState
from batch_system.batch.ledger.tables import new_id
from batch_system.batch.queue.claiming import Capacity
from batch_system.batch.tasks.registry import Task
from batch_system.database.engine import Database
from tests.batch.ledger_world import NODE, fire, know, make_task, rows, until
from tests.databases import migrated

SLOT = datetime(2026, 3, 10, 12, 1, tzinfo=UTC)
BEFORE = SLOT - timedelta(seconds=0.3)


class Recording:
    """An engine that executes nothing, and records when it was given runs."""

    losses = 0

    def __init__(self) -> None:
        self.claiming = asyncio.Lock()
        self.capacity = Capacity(100, 100)
        self.ready: list[str] = []
        self.launched: dict[str, datetime] = {}
        self.is_able = True

    def may_work(self) -> bool:
        return self.is_able

    def make_ready(self, claimed: Collection[Any]) -> None:
        self.ready = [run.task for run in claimed]

    async def launch_all(self, claimed: Collection[Any], losses: int) -> None:
        self.launched |= {run.task: clock.now() for run in claimed}

    def wake(self) -> None: ...

    def recheck_claims(self) -> None: ...


class Held(Dispatcher):
    """Its early transactions are open until `come` is called, which moves the clock to the slot."""

    def __init__(self, ledger: Database, tasks: dict[str, Task], node: str = NODE) -> None:
        self.recording = Recording()
        self.is_open, self._is_due = asyncio.Event(), asyncio.Event()
        super().__init__(ledger, tasks, node, self.recording)

    async def _wait(self, seconds: float) -> None:
        self.is_open.set()
        await self._is_due.wait()

    def come(self) -> None:
        clock.advance(max(timedelta(0), SLOT - clock.now()))
        self._is_due.set()


@asynccontextmanager
async def open_early(
    ledger: Database, tasks: dict[str, Task]
) -> AsyncIterator[tuple[Held, asyncio.Task[None]]]:
    """A dispatcher that has fired the slots of these tasks before they are due, and has not
    committed yet.
    """
    dispatcher = Held(ledger, tasks)
    turn = asyncio.create_task(dispatcher._turn(set(tasks), SLOT))
    await asyncio.wait(
        [turn, waiting := asyncio.create_task(dispatcher.is_open.wait())],
        return_when="FIRST_COMPLETED",
    )
    waiting.cancel()
    assert not turn.done() or turn.exception() is None
    yield dispatcher, turn
    dispatcher.come()
    await turn
    await asyncio.sleep(0)


@pytest.fixture
async def postgres_ledger(postgres_database: str) -> AsyncIterator[Database]:
    await migrated(postgres_database, LEDGER_HISTORY)
    database = Database(postgres_database, setting="LEDGER_URL")
    yield database
    await database.dispose()


@pytest.fixture(autouse=True)
def still_clock() -> object:
    with clock.moved(SLOT - timedelta(seconds=30)):
        yield


async def seen(ledger: Database) -> list[str]:
    """The runs that a reader sees, who on SQLite does not wait for the writer."""
    async with ledger.reader.connect() as connection:
        return list((await connection.execute(select(tables.runs.c.id))).scalars())


async def known(ledger: Database, *tasks: Task) -> dict[str, Task]:
    loaded = await know(ledger, *tasks)
    clock.advance(BEFORE - clock.now())
    return loaded


async def test_nothing_is_seen_or_launched_before_the_slot_and_all_at_it(ledger: Database) -> None:
    tasks = await known(ledger, *(make_task(f"t{number}") for number in range(30)))
    async with open_early(ledger, tasks) as (dispatcher, turn):
        assert (await seen(ledger), dispatcher.recording.launched) == ([], {})
        assert sorted(dispatcher.recording.ready) == sorted(tasks)
        dispatcher.come()
        await turn
        assert dispatcher.recording.launched == dict.fromkeys(tasks, SLOT)
    runs = await rows(ledger)
    assert {
        (run["slot"], run["created_at"], run["attempt_started_at"], run["state"]) for run in runs
    } == {(SLOT, SLOT, SLOT, RunState.RUNNING)}
    assert {row["fired_until"] for row in await rows(ledger, tables.schedules)} == {SLOT}


async def test_a_pause_waits_for_the_commit_and_then_counts_from_after_the_slot(
    ledger: Database,
) -> None:
    tasks = await known(ledger, make_task("a"), make_task("b"))
    async with open_early(ledger, tasks) as (dispatcher, turn):

        async def pause() -> None:
            async with ledger.engine.begin() as connection:
                await pauses.pause(connection, "a", "ada", tasks, NODE)

        pausing = asyncio.create_task(pause())
        await asyncio.wait([pausing], timeout=0.2)
        assert not pausing.done()
        dispatcher.come()
        await asyncio.gather(turn, pausing)
    assert sorted(run["task"] for run in await rows(ledger)) == ["a", "b"]
    paused = {row["name"]: row["paused_at"] for row in await rows(ledger, tables.tasks)}
    assert paused == {"a": SLOT, "b": None}


async def test_what_was_paused_before_makes_no_run(ledger: Database) -> None:
    tasks = await known(ledger, make_task("a"), make_task("b"))
    async with ledger.engine.begin() as connection:
        await pauses.pause(connection, "a", "ada", tasks, NODE)
    async with open_early(ledger, tasks) as (dispatcher, turn):
        dispatcher.come()
        await turn
        await dispatcher._turn(dispatcher._due | {"a"})
    assert [run["task"] for run in await rows(ledger)] == ["b"]
    assert [(row["task"], row["reason"]) for row in await rows(ledger, tables.missed)] == [
        ("a", "paused by ada")
    ]


async def test_whether_a_run_is_still_active_is_decided_at_the_slot(ledger: Database) -> None:
    """The run of the slot before ends while the early transaction is open, so the slot is not
    skipped.
    """
    clock.advance(-timedelta(minutes=1))
    tasks = await know(ledger, make_task("a"), make_task("b", "1 * * * *"))
    clock.advance(BEFORE - clock.now())
    await fire(ledger, {"a": tasks["a"]}, SLOT - timedelta(minutes=1), Capacity(1, 1))
    async with open_early(ledger, tasks) as (dispatcher, turn):
        dispatcher.come()
        await turn
    assert sorted(run["task"] for run in await rows(ledger) if run["slot"] == SLOT) == ["b"]
    await until(lambda: _true(dispatcher._due == {"a"}))
    async with ledger.engine.begin() as connection:
        await connection.execute(
            update(tables.runs).where(tables.runs.c.task == "a").values(state="succeeded")
        )
    await dispatcher._turn({"a"})
    assert [
        run["state"] for run in await rows(ledger) if (run["task"], run["slot"]) == ("a", SLOT)
    ] == ["running"]


async def test_after_a_failure_the_slots_are_fired_when_they_are_due(ledger: Database) -> None:
    tasks = await known(ledger, make_task("a"), make_task("b"))
    dispatcher = Held(ledger, tasks)
    dispatcher.recording.is_able = False
    await dispatcher._turn(set(tasks), SLOT)
    assert dispatcher._due == set() and await rows(ledger) == []
    dispatcher.recording.is_able = True
    clock.advance(SLOT - clock.now())
    await until(lambda: _true(dispatcher._due == {"a", "b"}))
    await dispatcher._turn(dispatcher._due)
    assert set(dispatcher.recording.launched) == {"a", "b"}


async def test_two_nodes_make_one_run_of_each_slot(ledger: Database) -> None:
    tasks = await known(ledger, *(make_task(f"t{number}") for number in range(10)))
    async with open_early(ledger, tasks) as (first, turn):
        second = Held(ledger, tasks, new_id())
        other = asyncio.create_task(second._turn(set(tasks), SLOT))
        await asyncio.wait([other], timeout=0.2)
        first.come()
        second.come()
        await asyncio.gather(turn, other)
        for _, timer in second._timers.values():
            timer.cancel()
    assert len(await rows(ledger)) == 10
    assert set(first.recording.launched) == set(tasks) and second.recording.launched == {}


class Coming(Dispatcher):
    """It only notes what it is to fire: how many tasks, and the instant if that is to come."""

    def __init__(self, lease: float = 30.0) -> None:
        super().__init__(None, {}, NODE, Recording(), lease=lease)

    @property
    def begun(self) -> list[tuple[int, datetime | None]]:
        due = [(len(self._due), None)] if self._due else []
        return due + [(len(names), slot) for names, slot in self._early]


def add_many(coming: Coming) -> None:
    """Add so many slots that the work for them begins before they are due."""
    for number in range(FEW + 1):
        coming.notify(f"t{number}", SLOT)


async def until_planned() -> None:
    """Wait until it is decided when the work for the added slots begins, and until the work that is
    due by then has begun.
    """
    await asyncio.sleep(0)
    await asyncio.sleep(0)


async def test_few_slots_are_fired_when_they_are_due_and_many_before() -> None:
    coming = Coming()
    with clock.moved(SLOT - timedelta(seconds=0.25)):
        add_many(coming)
        coming.notify("alone", SLOT - timedelta(seconds=0.2))
        clock.advance(timedelta(seconds=0.24))
        await until(lambda: _true(len(coming.begun) == 2))
        assert sorted(coming.begun, key=str) == [(1, None), (FEW + 1, SLOT)]


async def test_the_lead_follows_what_the_work_has_taken_within_its_bound() -> None:
    coming = Coming()
    coming._seconds_each = 5.0
    with clock.moved(SLOT - timedelta(seconds=LONGEST_SECONDS)):
        add_many(coming)
        await until(lambda: _true(coming.begun == [(FEW + 1, SLOT)]))


async def test_a_short_lease_bounds_the_lead() -> None:
    coming = Coming(lease=2.0)
    coming._seconds_each = 5.0
    with clock.moved(SLOT - timedelta(seconds=0.3)):
        add_many(coming)
        await until_planned()
        assert coming.begun == []
        clock.advance(timedelta(seconds=0.11))
        await until(lambda: _true(coming.begun == [(FEW + 1, SLOT)]))


async def test_no_transaction_is_open_at_an_instant_with_other_slots_before() -> None:
    coming = Coming()
    coming._seconds_each = 5.0  # so that the work would begin LONGEST_SECONDS before the slot
    before = SLOT - timedelta(seconds=1)
    with clock.moved(before - timedelta(seconds=0.4)):
        coming.notify("alone", before)
        add_many(coming)
        await until_planned()
        assert coming.begun == []
        clock.advance(timedelta(seconds=0.4))
        await until(lambda: _true(coming.begun == [(1, None)]))
        clock.advance(timedelta(seconds=BETWEEN_SECONDS))
        await until(lambda: _true(coming.begun == [(1, None), (FEW + 1, SLOT)]))


async def test_a_future_slot_is_fired_soon_after_the_clock_was_set_forward() -> None:
    coming = Coming()
    with clock.moved(SLOT - timedelta(minutes=10)):
        coming.notify("alone", SLOT)
        await asyncio.sleep(0)
        clock.advance(timedelta(hours=1))
        await until(lambda: _true(coming.begun == [(1, None)]), seconds=10)


async def clocks_differ(
    ledger: Database, monkeypatch: pytest.MonkeyPatch, behind: timedelta
) -> Held:
    """A dispatcher that has tried to fire two tasks early. `behind`: how far the ledger's clock is
    behind its own.
    """
    tasks, now_of = await known(ledger, make_task("a"), make_task("b")), database_time.now_of

    async def now_of_ledger(connection: AsyncConnection) -> datetime:
        return await now_of(connection) - behind

    monkeypatch.setattr(database_time, "now_of", now_of_ledger)
    dispatcher = Held(ledger, tasks)
    await dispatcher._turn(set(tasks), SLOT)
    assert await rows(ledger) == []
    return dispatcher


async def test_with_a_clock_that_is_ahead_slots_are_fired_when_they_are_due_by_the_ledger(
    ledger: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    before = loop.time()
    dispatcher = await clocks_differ(ledger, monkeypatch, timedelta(seconds=3))
    after = loop.time()
    assert dispatcher._due == set() and len(dispatcher._timers) == 2
    for _, timer in dispatcher._timers.values():
        timer.cancel()
        assert before + 3.29 < timer.when() < after + 3.31


async def test_with_a_clock_that_is_behind_slots_that_are_due_by_the_ledger_are_fired_at_once(
    ledger: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    dispatcher = await clocks_differ(ledger, monkeypatch, timedelta(seconds=-3))
    await until(lambda: _true(dispatcher._due == {"a", "b"}))


async def test_a_pause_that_the_lock_did_not_see_counts(
    postgres_ledger: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On PostgreSQL it may be committed between the snapshot of the locking statement and its
    lock.
    """
    tasks, lock = await known(postgres_ledger, make_task("a"), make_task("b")), schedules.lock

    async def lock_before(
        connection: AsyncConnection, names: Collection[str], wait: bool = False
    ) -> list[Any]:
        return [replace(row, paused_by=None) for row in await lock(connection, names, wait)]

    async with postgres_ledger.engine.begin() as connection:
        await pauses.pause(connection, "a", "ada", tasks, NODE)
    monkeypatch.setattr(schedules, "lock", lock_before)
    async with open_early(postgres_ledger, tasks) as (dispatcher, turn):
        dispatcher.come()
        await turn
    assert [run["task"] for run in await rows(postgres_ledger)] == ["b"]


async def test_room_for_what_is_committed_at_the_slot_is_kept_until_it_fails(
    ledger: Database,
) -> None:
    tasks = await known(ledger, make_task("a"), make_task("b"))
    dispatcher = Held(ledger, tasks)
    turn = asyncio.create_task(dispatcher._turn(set(tasks), SLOT))
    await dispatcher.is_open.wait()
    assert sorted(dispatcher.recording.ready) == ["a", "b"]
    turn.cancel()
    await asyncio.wait([turn])
    assert dispatcher.recording.ready == []


async def _true(value: bool) -> bool:
    return value
