"""What a service asks the ledger while nothing is due, on a boot-time clock that the test moves;
and what it hears.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import event, update
from sqlalchemy.engine import Engine
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system import TaskRegistry, clock, config, logs
from batch_system.batch.account.account import tasks_of_running_nodes
from batch_system.batch.context.lease import Lease
from batch_system.batch.execution import engine as engine_module
from batch_system.batch.execution.engine import LocalEngine
from batch_system.batch.firing import handover, pauses, schedule_sync, task_sync
from batch_system.batch.firing.handover import Handover
from batch_system.batch.incidents.watch import Watch
from batch_system.batch.ledger import nodes, tables
from batch_system.batch.ledger.runs import Claimed
from batch_system.batch.ledger.tables import new_id
from batch_system.batch.nodes import heartbeat, ledger_poll, process_lock
from batch_system.batch.nodes.heartbeat import Heartbeat
from batch_system.batch.nodes.ledger_poll import LedgerChanges
from batch_system.batch.nodes.roles import BY_HAND, Roles
from batch_system.batch.queue import cancel, claiming
from batch_system.config import get_settings
from batch_system.database.engine import Database
from batch_system.operations.system.nodes import living
from batch_system.server.service import BatchService
from tests.batch import ledger_world
from tests.batch.ledger_world import NODE, know, make_task, until
from tests.batch.test_leases import put_node, put_run
from tests.batch.test_runs import claim, insert, new

START = datetime(2026, 3, 10, 12, 0, 30, tzinfo=UTC)
MINUTE = timedelta(minutes=1)


class Seconds:
    """The boot-time clock stands still until the test moves it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = clock.boottime()
        monkeypatch.setattr(clock, "boottime", lambda: self.now)
        monkeypatch.setattr(heartbeat, "LONGEST_TICK", 0.01)


@pytest.fixture
def boot_time(monkeypatch: pytest.MonkeyPatch) -> Seconds:
    return Seconds(monkeypatch)


class Asked:
    """The statements of all connections of this process since `clear`, in all threads. Without the
    checkpoints of SQLite's log: they follow the real time, which no test of this file moves.
    """

    def __init__(self) -> None:
        self.statements: list[str] = []
        self.transactions = 0

    def clear(self) -> None:
        self.statements, self.transactions = [], 0

    def add_statement(self, _: Any, __: Any, statement: str, *___: Any) -> None:
        if statement.startswith("PRAGMA wal_checkpoint"):
            self.transactions -= 1
        elif not statement.startswith("BEGIN"):
            self.statements.append(statement)

    def add_transaction(self, _: Any) -> None:
        self.transactions += 1

    @property
    def others(self) -> list[str]:
        """All but looks and beats."""
        return [
            one
            for one in self.statements
            if " AS kind" not in one and not one.startswith("UPDATE batch_nodes")
        ]


@pytest.fixture
def asked() -> Any:
    found = Asked()
    listeners = [("before_cursor_execute", found.add_statement), ("begin", found.add_transaction)]
    for name, listener in listeners:
        event.listen(Engine, name, listener)
    yield found
    for name, listener in listeners:
        event.remove(Engine, name, listener)


class Services:
    """Services in this process, on one ledger. Their timers are short, so they wait only for the
    boot-time clock.
    """

    def __init__(self, boot_time: Seconds) -> None:
        self._boot_time = boot_time
        self.all: list[BatchService] = []
        self._heard: Counter[int] = Counter()

    async def start(
        self, stack: AsyncExitStack, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        config.forget_settings()
        service = BatchService(get_settings())
        number = len(self.all)
        service._on_changes.append(lambda _: self._heard.update([number]))
        self.all.append(service)
        await service.start()
        stack.push_async_callback(service.stop)
        await until(lambda: asyncio.sleep(0, self._heard[number]))

    async def second(self) -> None:
        """Let a second pass, and wait until all have looked once."""
        self._heard.clear()
        self._boot_time.now += 1
        await until(lambda: asyncio.sleep(0, len(self._heard) == len(self.all)))

    def _is_watched(self) -> bool:
        """Whether the watch of one service has ended its first look at everything."""
        watches = [
            part for service in self.all for part in service._parts if isinstance(part, Watch)
        ]
        return any(watch._last_check > datetime.min.replace(tzinfo=UTC) for watch in watches)

    async def _are_starts_read(self) -> bool:
        """Whether no service still has to look for starts in the application's database. A thread
        reads the stamps of its file, so a look may come later than the poll that it belongs to.
        """
        handovers = [
            part for service in self.all for part in service._parts if isinstance(part, Handover)
        ]
        await until(lambda: asyncio.sleep(0, not any(part._woken.is_set() for part in handovers)))
        return all(
            part._quiet >= handover.QUIET.start and not part._is_asked and not part._has_changed
            for part in handovers
        )

    async def settled(self) -> None:
        """Wait until the services have started: two seconds pass without a statement except their
        looks.
        """
        asked, quiet = Asked(), 0
        event.listen(Engine, "before_cursor_execute", asked.add_statement)
        for _ in range(12):
            asked.clear()
            await self.second()
            await until(lambda: asyncio.sleep(0, self._is_watched()))
            await asyncio.sleep(0.05)
            quiet = quiet + 1 if await self._are_starts_read() and not asked.others else 0
            if quiet == 2:
                break
        assert quiet == 2, asked.others
        event.remove(Engine, "before_cursor_execute", asked.add_statement)
        await until(
            lambda: asyncio.sleep(0, not any(one.schedules._is_outdated() for one in self.all))
        )


@pytest.fixture
async def start(
    ledger_url: str, monkeypatch: pytest.MonkeyPatch, boot_time: Seconds
) -> AsyncIterator[Any]:
    monkeypatch.setattr(schedule_sync, "REFRESH_SECONDS", 0.02)
    monkeypatch.setattr(engine_module, "FLUSH_SECONDS", 0.01)
    logs.set_up("INFO")
    services = Services(boot_time)
    async with AsyncExitStack() as stack:

        async def start(number: int = 1, settles: bool = True) -> Services:
            for _ in range(number):
                await services.start(
                    stack, {"LEDGER_URL": ledger_url, "DRAIN_SECONDS": "0"}, monkeypatch
                )
            if settles:
                await services.settled()
            return services

        yield start


# The statements of an idle node.


@pytest.mark.rest
@pytest.mark.parametrize("number", [1, 3])
async def test_an_idle_node_polls_once_a_second_and_beats_in_the_same_transaction(
    start: Any, asked: Asked, number: int
) -> None:
    for task in range(50):
        make_task(f"yearly{task}", "0 0 1 1 *")
    services = await start(number)
    asked.clear()
    for _ in range(10):
        await services.second()
    assert asked.others == []
    assert asked.transactions == 10 * number
    assert len(asked.statements) == 12 * number  # a beat in 5 seconds


@pytest.mark.rest
@pytest.mark.parametrize("state", ["queued", "retrying"])
async def test_runs_that_wait_for_another_pool_cost_an_idle_service_nothing(
    start: Any, asked: Asked, ledger: Database, state: str
) -> None:
    make_task("heavy", None, pool="gpu")
    services = await start()
    await insert(ledger, *(new("heavy", state=state, exclusive=None) for _ in range(50)))
    await services.settled()
    asked.clear()
    for _ in range(10):
        await services.second()
    assert asked.others == []
    assert asked.transactions == 10


@pytest.fixture
def turns_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[BatchService], list[bool]]:
    """The turns that the engine of a service has ended since the list was cleared, each with
    whether something had woken it.
    """

    def turns_of(service: BatchService) -> list[bool]:
        turn, turns = service.engine._turn, list[bool]()

        async def noted(is_woken: bool = True) -> None:
            await turn(is_woken=is_woken)
            turns.append(is_woken)

        monkeypatch.setattr(service.engine, "_turn", noted)
        return turns

    return turns_of


@pytest.mark.rest
async def test_a_run_that_reports_nothing_costs_no_further_statements(
    start: Any, asked: Asked, ledger: Database, turns_of: Any
) -> None:
    async def run(_: object) -> None:
        await asyncio.Event().wait()

    make_task("long", None, run)
    services = await start()
    turns = turns_of(services.all[0])
    await insert(ledger, new("long"))
    await services.second()
    await until(lambda: ledger_world.rows(ledger, state="running"))
    turns.clear()
    await until(lambda: asyncio.sleep(0, False in turns))  # nothing wakes the engine any more
    await services.settled()
    asked.clear()
    for _ in range(5):
        await services.second()
    assert asked.others == []
    assert asked.transactions == 5


@pytest.mark.rest
async def test_a_run_that_waits_for_another_causes_no_writes(
    start: Any, asked: Asked, ledger: Database, turns_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_task("tick", None)
    services = await start()
    # While runs are active it looks at them every few seconds of the database, which nobody moves.
    (watch,) = (part for part in services.all[0]._parts if isinstance(part, Watch))
    monkeypatch.setattr(watch, "_is_needed", lambda _: False)
    other = await put_node(ledger)
    turns = turns_of(services.all[0])
    await insert(ledger, new("tick", state="running", node=other, attempt=1), new("tick"))

    async def second() -> int:
        """Let a second pass, in which the engine looks for runs to start. Returns the
        transactions.
        """
        asked.clear()
        turns.clear()
        await services.second()
        await until(lambda: asyncio.sleep(0, turns))
        return asked.transactions

    async with asyncio.timeout(30):  # other parts look at the new runs once
        while [await second() for _ in range(3)] != [2, 2, 2]:
            await asyncio.sleep(0.05)
    writes: list[Any] = []
    event.listen(services.all[0].ledger.engine.sync_engine, "begin", writes.append)
    for _ in range(4):
        await second()
        looks = [one for one in asked.statements if "once.urgent" in one]
        assert len(looks) == 1, asked.statements
    assert writes == [] or ledger.kind == "postgresql"  # which reads by the same connections
    async with ledger.engine.begin() as connection:
        await connection.execute(
            update(tables.runs).where(tables.runs.c.node == other).values(state="succeeded")
        )
    await services.second()
    await until(lambda: ledger_world.rows(ledger, state="succeeded", node=services.all[0].node.id))


async def test_an_engine_that_lost_the_reply_of_a_claim_checks_its_claims_again(
    ledger: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither its runs nor a change in the ledger would make it check its claims."""
    take, lost = claiming.take, asyncio.Event()

    async def lose_the_reply(connection: AsyncConnection, *more: Any) -> tuple[list[Claimed], bool]:
        claimed, are_more = await take(connection, *more)
        if claimed and not lost.is_set():
            lost.set()
            await connection.commit()
            raise ConnectionResetError("the reply to COMMIT was lost")
        return claimed, are_more

    monkeypatch.setattr(claiming, "take", lose_the_reply)
    engine = LocalEngine(ledger, await know(ledger, make_task("tick", None)), NODE)
    await insert(ledger, new("tick"))
    engine.start()
    engine.wake()
    (run,) = await until(lambda: ledger_world.rows(ledger, state="succeeded"))
    assert (run["fence"], lost.is_set()) == (1, True)
    await engine.drain(0)
    await engine.stop()


# What a poll reports.


async def read(ledger: Database, node: str = NODE) -> LedgerChanges:
    async with ledger.reader.connect() as connection:
        return await ledger_poll.read(connection, node)


async def test_a_poll_reports_that_a_run_may_start_once_it_is_due(ledger: Database) -> None:
    assert not (await read(ledger)).is_claimable
    await insert(
        ledger,
        new(state="retrying", due_at=START + MINUTE),
        new(state="succeeded", finished_at=START),
    )
    for at, is_claimable in ((START, False), (START + MINUTE, True)):
        with clock.moved(at):
            found = await read(ledger)
        assert (found.now, found.is_claimable) == (at, is_claimable)
    real = await read(ledger)
    assert abs(real.now - clock.now()) < timedelta(seconds=5)


async def test_a_poll_names_the_other_nodes_that_live_or_still_hold_runs(ledger: Database) -> None:
    own, live, left, holds = [await put_node(ledger) for _ in range(4)]
    await put_run(ledger, holds)
    async with ledger.engine.begin() as connection:
        assert await nodes.beat(connection, live, 0.0)
        stopped = tables.nodes.c.id.in_([left, holds])
        await connection.execute(update(tables.nodes).where(stopped).values(stopped_at=START))
    found = {node.id: (node.beats, node.is_stopped) for node in (await read(ledger, own)).others}
    assert found == {live: (1, False), holds: (0, True)}


async def test_a_poll_names_the_runs_that_this_node_is_asked_to_cancel(ledger: Database) -> None:
    await insert(ledger, new())
    (held,) = await claim(ledger, "t")
    assert (await read(ledger)).requests == []
    async with ledger.engine.begin() as connection:
        await cancel.request_cancel(connection, held.id, "cancelled by ann", "ann")
    assert (await read(ledger)).requests == [
        cancel.StopRequest(held.id, held.fence, "cancelled by ann")
    ]
    assert (await read(ledger, new_id())).requests == []


async def test_the_firing_state_changes_with_schedules_tasks_and_nodes(ledger: Database) -> None:
    tick, other, manual = (
        make_task("tick", "0 7 * * *"),
        make_task("other", "0 9 * * *"),
        make_task("manual", None),
    )
    await know(ledger, tick, manual)
    node = await put_node(ledger)

    async def differ_after(change: Callable[[AsyncConnection], Awaitable[Any]]) -> bool:
        before = (await read(ledger)).firing_state
        async with ledger.engine.begin() as connection:
            await change(connection)
        return (await read(ledger)).firing_state != before

    async def nobody(_: AsyncConnection) -> set[str]:
        return set()

    async def restore(connection: AsyncConnection) -> None:
        await task_sync.record_tasks(connection, {"manual": manual}, START)
        await task_sync.set_schedules(connection, {"manual": None}, {"manual": manual}, NODE)

    assert not await differ_after(lambda c: nodes.beat(c, node, 0.0))
    assert not await differ_after(
        lambda c: c.execute(update(tables.schedules).values(fired_until=START))
    )
    assert await differ_after(lambda c: pauses.pause(c, "tick", "ann", {"tick": tick}))
    assert await differ_after(lambda c: pauses.resume(c, "tick"))
    assert await differ_after(
        lambda c: task_sync.set_schedules(c, {"tick": other.schedule}, {"tick": tick}, NODE)
    )
    assert await differ_after(
        lambda c: task_sync.set_schedules(c, {"tick": None}, {"tick": tick}, NODE)
    )
    assert await differ_after(lambda c: task_sync.remove_gone(c, ["manual"], nobody))
    assert await differ_after(restore)
    assert await differ_after(lambda c: c.execute(update(tables.nodes).values(stopped_at=START)))


async def test_a_firing_changes_nothing_that_other_nodes_have_to_read(ledger: Database) -> None:
    loaded = await know(ledger, *(make_task(f"t{n}") for n in range(5)))
    before = (await read(ledger)).firing_state
    for minute in range(1, 4):
        await ledger_world.fire(ledger, loaded, clock.now() + minute * MINUTE)
        assert (await read(ledger)).firing_state == before


async def test_a_change_locks_the_version_of_the_catalog_last(
    ledger: Database, asked: Asked
) -> None:
    """All nodes share this one row: a transaction that locks it first and other rows later could
    deadlock.
    """
    tick = make_task("tick")
    loaded = await know(ledger, tick)

    async def nobody(_: AsyncConnection) -> set[str]:
        return set()

    changes: list[Callable[[AsyncConnection], Awaitable[Any]]] = [
        lambda c: pauses.pause(c, "tick", "ann", loaded),
        lambda c: pauses.resume(c, "tick"),
        lambda c: task_sync.set_schedules(c, {"tick": None}, loaded, NODE),
        lambda c: task_sync.set_schedules(c, {"tick": tick.schedule}, loaded, NODE),
        lambda c: task_sync.remove_gone(c, ["tick"], nobody),
    ]
    for change in changes:
        asked.clear()
        async with ledger.engine.begin() as connection:
            await change(connection)
        # pg_notify takes its lock at the commit.
        locking = [one for one in asked.statements if "pg_notify" not in one]
        of_the_catalog = [one.startswith("INSERT INTO batch_catalog") for one in locking]
        assert (of_the_catalog[-1], sum(of_the_catalog)) == (True, 1)


@pytest.mark.parametrize(
    "roles", [BY_HAND, Roles(False, frozenset({"default", "gpu"}))], ids=["by hand", "worker"]
)
async def test_a_node_that_does_not_fire_neither_watches_others_nor_counts_as_a_service(
    ledger: Database, ledger_url: str, monkeypatch: pytest.MonkeyPatch, roles: Roles
) -> None:
    tick = make_task("tick")
    await know(ledger, tick)
    known = await ledger_world.rows(ledger, tables.tasks)
    for name, value in {"LEDGER_URL": ledger_url, "DRAIN_SECONDS": "0"}.items():
        monkeypatch.setenv(name, value)
    config.forget_settings()
    other = await put_node(ledger)
    before = (await read(ledger)).firing_state
    service = BatchService(get_settings(), roles)
    await service.start()
    (row,) = await ledger_world.rows(ledger, tables.nodes, id=service.node.id)
    loaded = ["tick"] if roles.pools else []
    assert (row["fires"], row["tasks"], row["stopped_at"]) == (False, loaded, None)
    assert (await ledger_world.rows(ledger, tables.tasks) == known) == roles.is_worker
    own = await read(ledger)
    assert {one.id: one.fires for one in own.others} == {other: True, service.node.id: False}
    assert own.firing_state == before  # nobody reads the schedules again because of it
    async with ledger.reader.connect() as connection:
        assert (await ledger_poll.read(connection, service.node.id, roles)).others == []
        assert await nodes.live_tasks(connection) == {"theirs"}
        assert await tasks_of_running_nodes(connection, START) == {"theirs"}
    alive = await living(service.operations.context)
    assert not any("tick" in node.tasks for node in alive)
    await service.stop()


async def test_only_the_schedules_whose_slot_has_come_are_read_again(
    start: Any, ledger: Database, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    with clock.moved(START):
        make_task("tick")
        for number in range(5):
            make_task(f"yearly{number}", "0 0 1 1 *")
        services = await start()
        asked.clear()
        clock.advance(MINUTE)
        await services.second()
        await until(lambda: ledger_world.rows(ledger, state="succeeded"))
        await until(lambda: asyncio.sleep(0, services.all[0].schedules._next_slot > clock.now()))
        assert services.all[0].schedules._next_slots["tick"] == START + 1.5 * MINUTE
    whole = [one for one in asked.others if "FROM batch_schedules" in one and "v." not in one]
    assert whole == []


async def test_claimable_runs_are_reported_once_in_poll_seconds_and_other_changes_each_second(
    ledger: Database, boot_time: Seconds
) -> None:
    await insert(ledger, new())
    heard: list[bool] = []
    url = ledger.url.render_as_string(hide_password=False)
    heart = Heartbeat(
        url, await put_node(ledger), Lease(30), beat_seconds=5, lease_seconds=30, poll_seconds=3
    )
    heart.start(
        lambda: None, lambda: None, on_changes=lambda found: heard.append(found.is_claimable)
    )
    for second in range(8):
        await until(lambda second=second: asyncio.sleep(0, len(heard) == second + 1))
        boot_time.now += 1
    await asyncio.to_thread(heart.stop)
    assert heard[:8] == [True, False, False, True, False, False, True, False]


async def test_polls_that_succeed_do_not_hide_beats_that_fail(
    ledger: Database, boot_time: Seconds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This happens while another process holds the write lock of SQLite."""
    fails: list[float] = []

    async def fail(*_: object) -> bool:
        fails.append(boot_time.now)
        raise ConnectionRefusedError("the ledger takes no writes")

    monkeypatch.setattr(nodes, "beat", fail)
    heard: list[LedgerChanges] = []
    url = ledger.url.render_as_string(hide_password=False)
    heart = Heartbeat(url, await put_node(ledger), Lease(30), beat_seconds=5, lease_seconds=30)
    heart.start(lambda: None, lambda: None, on_changes=heard.append)
    for second in range(3):
        await until(
            lambda second=second: asyncio.sleep(0, len(fails) == second + 1 and heart.trouble)
        )
        boot_time.now += 1
    await asyncio.to_thread(heart.stop)
    assert heard == []


async def test_a_dead_node_is_rescued_while_the_event_loop_is_blocked(ledger: Database) -> None:
    url = ledger.url.render_as_string(hide_password=False)
    dead = await put_node(ledger)
    process_lock.ProcessLock(process_lock.folder_of(url), dead)._release()
    run = await put_run(ledger, dead)
    heart = Heartbeat(url, await put_node(ledger), Lease(30), beat_seconds=5, lease_seconds=30)

    async def rescued() -> None:
        own = Database(url, setting="LEDGER_URL", pooled=False)
        await until(lambda: ledger_world.rows(own, id=run, state="interrupted"))
        await own.dispose()

    heart.start(lambda: None, lambda: None)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, rescued()).result()  # and this loop does nothing until then
    await asyncio.to_thread(heart.stop)


async def test_a_pause_on_another_node_takes_effect_with_the_next_poll(
    start: Any, ledger: Database
) -> None:
    task = make_task("tick")
    services = await start()
    job = services.all[0].scheduler.get_job("tick")
    assert job.next_run_time is not None
    async with ledger.engine.begin() as connection:
        await pauses.pause(connection, "tick", "ann", {"tick": task})
    await services.second()
    await until(lambda: asyncio.sleep(0, job.next_run_time is None))


async def test_a_slot_that_is_due_by_database_time_fires_even_if_apscheduler_is_wrong(
    start: Any, ledger: Database
) -> None:
    """The clock of a node may be minutes behind. Here the clock of APScheduler is behind, since
    only ours is moved.
    """
    with clock.moved(START):
        make_task("tick")
        services = await start()
        clock.advance(MINUTE)
        await services.second()
        (run,) = await until(lambda: ledger_world.rows(ledger, state="succeeded"))
        assert run["slot"] == START + 0.5 * MINUTE


@pytest.mark.rest
@pytest.mark.parametrize("has_node", [True, False])
async def test_a_task_is_removed_when_no_living_node_has_had_it_for_a_lease(
    start: Any, ledger: Database, has_node: bool
) -> None:
    if has_node:
        await put_node(ledger)
    await know(ledger, make_task("theirs"))
    TaskRegistry.clear()
    make_task("ours")
    services = await start(settles=False)

    async def is_removed() -> bool:
        (task,) = await ledger_world.rows(ledger, tables.tasks, name="theirs")
        return task["removed_at"] is not None

    for _ in range(20):
        await services.second()
    assert not await is_removed()
    for _ in range(12):  # a lease is over then
        await services.second()
    await until(is_removed)
    (row,) = await ledger_world.rows(ledger, tables.schedules, task="theirs")
    assert row["valid_until"] is not None
