"""What a transaction sends to other nodes when it commits, and what they do when they receive it.
No poll helps them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from typing import Any

import asyncpg
import pytest
from sqlalchemy import make_url, text

from batch_system import TaskRegistry, clock, config, current_run, start
from batch_system.batch.context.lease import Lease
from batch_system.batch.firing import pauses, schedule_sync
from batch_system.batch.ledger import tables, transitions, wakes
from batch_system.batch.ledger.states import Rank, RunState
from batch_system.batch.ledger.wakes import Wake
from batch_system.batch.nodes import heartbeat, listener
from batch_system.batch.nodes.heartbeat import Heartbeat
from batch_system.batch.nodes.ledger_poll import LedgerChanges
from batch_system.batch.queue import cancel
from batch_system.batch.queue.claiming import Capacity
from batch_system.config import get_settings
from batch_system.database.engine import Database
from batch_system.server.service import BatchService
from tests.batch import ledger_world
from tests.batch.ledger_world import NODE, know, make_task, until
from tests.batch.test_leases import put_node
from tests.batch.test_runs import claim, ending, finish, insert, new

LONG = 3600.0


class Heard:
    """The wakes that the transactions of a ledger have sent since `clear`."""

    def __init__(self, ledger: Database) -> None:
        self._ledger = ledger
        self._wakes: list[Wake] = []
        self._numbers: dict[int, int] = {}

    async def listen(self, stack: AsyncExitStack) -> None:
        if self._ledger.kind == "postgresql":
            connection = await asyncpg.connect(dsn_of(self._ledger))
            stack.push_async_callback(connection.close)
            channel = await connection.fetchval(f"SELECT {wakes.CHANNEL_SQL}")
            await connection.add_listener(
                channel, lambda *given: self._wakes.append(Wake.of(given[3], "nobody"))
            )
            self._connection = connection
        await self.take()

    async def take(self) -> list[Wake]:
        """The wakes since the last call. On SQLite that is at most one, and it names no pools."""
        if self._ledger.kind == "postgresql":
            await self._connection.execute("SELECT 1")  # what was committed before has come in then
            await asyncio.sleep(0)
            told, self._wakes[:] = [*self._wakes], []
            return told
        found = {
            row["id"]: row["version"]
            for row in await ledger_world.rows(self._ledger, tables.catalog)
        }
        changed = {row for row, version in found.items() if version != self._numbers.get(row)}
        self._numbers = found
        wake = Wake(
            None if wakes.QUEUED in changed else frozenset(), bool(changed - {wakes.QUEUED})
        )
        return [wake] if wake != Wake() else []


def dsn_of(ledger: Database) -> str:
    return ledger.url.set(drivername="postgresql").render_as_string(hide_password=False)


@pytest.fixture
async def heard(ledger: Database) -> AsyncIterator[Heard]:
    async with AsyncExitStack() as stack:
        heard = Heard(ledger)
        await heard.listen(stack)
        yield heard


def queued_in(ledger: Database, *pools: str, asks: bool = False) -> Wake:
    return Wake(frozenset(pools) if ledger.kind == "postgresql" else None, asks)


# What is sent.


async def test_a_process_without_a_service_sends_a_wake_for_the_pools_of_the_runs_that_it_queues(
    ledger: Database, heard: Heard
) -> None:
    await know(ledger, make_task("tick", None), make_task("heavy", None, pool="gpu"))
    await heard.take()
    await insert(ledger, new("heavy"), new("heavy", exclusive=None))
    assert await heard.take() == [queued_in(ledger, "gpu")]
    await insert(ledger, new("heavy", exclusive=None), new("tick"))
    assert await heard.take() == [queued_in(ledger, "gpu", "default")]


async def test_neither_a_transaction_that_is_rolled_back_nor_the_next_one_sends_a_wake(
    ledger: Database, heard: Heard
) -> None:
    await know(ledger, make_task("tick", None))
    await heard.take()
    async with ledger.engine.connect() as connection:
        await connection.execute(text("SELECT 1"))
        wakes.queued(connection, ["tick"])
        wakes.asked(connection)
        await connection.rollback()
        await connection.execute(text("SELECT 1"))
        await connection.commit()
    assert await heard.take() == []


async def test_one_transaction_sends_all_its_wakes_at_once(ledger: Database, heard: Heard) -> None:
    await know(ledger, make_task("tick", None), make_task("heavy", None, pool="gpu"))
    failed = [
        new("heavy", state=RunState.FAILED, finished_at=clock.now(), exclusive=None)
        for _ in range(2)
    ]
    await insert(ledger, new("tick"), *failed)
    (claimed,) = await claim(ledger, "tick")
    await heard.take()
    async with ledger.engine.begin() as connection:
        for run in failed:
            assert await transitions.reopen(connection, [run.id], Rank.MANUAL, "ann", clock.now())
        await cancel.request_cancel(connection, claimed.id, "cancelled by ann", "ann")
    assert await heard.take() == [queued_in(ledger, "gpu", asks=True)]


async def test_no_wake_is_sent_for_slots_that_are_fired_and_started_at_once(
    ledger: Database, heard: Heard
) -> None:
    loaded = await know(ledger, *(make_task(f"t{number}") for number in range(5)))
    await heard.take()
    wakes.use_engine(ledger.engine, lambda queued: Capacity(100, 32).holds(loaded, queued))
    for minute in range(1, 4):
        at = clock.now() + timedelta(minutes=minute)
        fired = await ledger_world.fire(ledger, loaded, at, Capacity(100, 32))
        await finish(ledger, *map(ending, fired.claimed))
    assert len(await ledger_world.rows(ledger, state="succeeded")) == 15
    assert await heard.take() == []


async def test_one_wake_is_sent_for_all_slots_for_which_this_process_has_no_room(
    ledger: Database, heard: Heard
) -> None:
    loaded = await know(ledger, *(make_task(f"t{number}") for number in range(5)))
    await heard.take()
    wakes.use_engine(ledger.engine, lambda queued: Capacity(3, 32).holds(loaded, queued))
    fired = await ledger_world.fire(
        ledger, loaded, clock.now() + timedelta(minutes=1), Capacity(3, 32)
    )
    assert (len(fired.claimed), fired.queued) == (3, 2)
    assert await heard.take() == [queued_in(ledger, "default")]


async def test_a_wake_is_sent_for_slots_of_a_pool_that_others_serve(
    ledger: Database, heard: Heard
) -> None:
    loaded = await know(ledger, make_task("heavy", pool="gpu"), make_task("tick"))
    await heard.take()
    wakes.use_engine(ledger.engine, lambda queued: Capacity(100, 32).holds(loaded, queued))
    await ledger_world.fire(ledger, loaded, clock.now() + timedelta(minutes=1), Capacity(100, 32))
    assert await heard.take() == [queued_in(ledger, "gpu")]


async def test_a_wake_is_sent_for_an_interrupted_run_since_another_node_may_continue_it(
    ledger: Database, heard: Heard
) -> None:
    await know(ledger, make_task("tick", None))
    await insert(ledger, new("tick"))
    (claimed,) = await claim(ledger, "tick")
    await heard.take()
    await finish(
        ledger, ending(claimed, RunState.INTERRUPTED, due_at=clock.now(), rank=Rank.INTERRUPTED)
    )
    assert await heard.take() == [queued_in(ledger, "default")]


async def test_wakes_are_sent_for_pauses_and_for_cancels_of_running_runs_and_not_for_other_cancels(
    ledger: Database, heard: Heard
) -> None:
    loaded = await know(ledger, make_task("tick", None))
    run = new("tick")
    await insert(ledger, run, waiting := new("tick"))
    changes: list[tuple[Callable[[Any], Awaitable[Any]], list[Wake]]] = [
        (lambda c: cancel.request_cancel(c, waiting.id, "cancelled by ann", "ann"), []),
        (lambda c: transitions.claim(c, [run.id], NODE, clock.now()), []),
        (lambda c: cancel.request_cancel(c, run.id, "cancelled by ann", "ann"), [Wake(asks=True)]),
        (lambda c: pauses.pause(c, "tick", "ann", loaded), [Wake(asks=True)]),
        (lambda c: pauses.pause(c, "tick", "ann", loaded), []),
        (lambda c: pauses.resume(c, "tick"), [Wake(asks=True)]),
    ]
    await heard.take()
    for change, told in changes:
        async with ledger.engine.begin() as connection:
            await change(connection)
        assert await heard.take() == told


@pytest.mark.parametrize(
    "payload", ["", " ", "x" * 8000, "batch/1 asks\0 pool:", "a b c pool:../.. ASKS", "pool:x"]
)
def test_a_payload_that_somebody_else_has_sent_does_no_harm(payload: str) -> None:
    assert not Wake.of(payload, "1").asks


def test_a_node_does_not_hear_of_runs_that_it_has_queued_itself() -> None:
    assert Wake.of("batch/1 asks pool:gpu", "1") == Wake(asks=True)
    assert Wake.of("batch/2 pool:gpu pool:cpu", "1") == Wake(frozenset({"gpu", "cpu"}))


async def test_more_pools_than_a_payload_holds_are_cut_and_the_commit_succeeds(
    ledger: Database, heard: Heard
) -> None:
    many = [make_task(f"t{number}", None, pool=f"{number:040d}") for number in range(300)]
    await know(ledger, *many)
    await heard.take()
    await insert(ledger, *(new(task.name) for task in many))
    (told,) = await heard.take()
    assert told.pools is None or 50 < len(told.pools) < 300


# Services: their clock stands still, so that no poll is ever due, and their timers never fire.


@asynccontextmanager
async def services(
    number: int, url: str, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str] | None = None
) -> AsyncIterator[list[BatchService]]:
    now = clock.boottime()
    monkeypatch.setattr(clock, "boottime", lambda: now)
    monkeypatch.setattr(heartbeat, "LONGEST_TICK", LONG)
    monkeypatch.setattr(heartbeat, "LOOK_SECONDS", LONG)
    monkeypatch.setattr(schedule_sync, "REFRESH_SECONDS", LONG)
    given = {"LEDGER_URL": url, "DRAIN_SECONDS": "0", "POLL_SECONDS": "60", **(settings or {})}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    config.forget_settings()
    async with AsyncExitStack() as stack:
        all_services = []
        for _ in range(number):
            service = BatchService(get_settings())
            polls: list[LedgerChanges] = []
            service._on_changes.append(polls.append)
            await service.start()
            stack.push_async_callback(service.stop)
            await until(lambda polls=polls: asyncio.sleep(0, bool(polls)))
            # They were not told of a poll that ended before they were made.
            service.schedules.on_changes(polls[-1])
            all_services.append(service)
        await asyncio.sleep(0.2)  # they are told of each other's catalog until then
        yield all_services


async def forever(_: object) -> None:
    await asyncio.Event().wait()


async def in_steps(_: object) -> None:
    while True:
        current_run().checkpoint()
        await asyncio.sleep(0.02)


async def test_a_run_that_another_process_queues_starts_without_a_poll(
    ledger: Database, ledger_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_task("tick", None)
    async with services(1, ledger_url, monkeypatch):
        for _ in range(3):
            run = new("tick")
            await insert(ledger, run)
            await until(lambda run=run: ledger_world.rows(ledger, id=run.id, state="succeeded"))


async def test_several_nodes_that_hear_of_one_run_start_it_once(
    ledger: Database, ledger_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_task("tick", None)
    async with services(3, ledger_url, monkeypatch):
        runs = [new("tick", exclusive=None) for _ in range(20)]
        for run in runs:
            await insert(ledger, run)
        await until(lambda: has(ledger, 20))
        assert {row["fence"] for row in await ledger_world.rows(ledger, state="succeeded")} == {1}


async def has(ledger: Database, number: int) -> bool:
    return len(await ledger_world.rows(ledger, state="succeeded")) == number


async def test_a_cancel_and_a_pause_reach_a_run_in_another_process_without_a_poll(
    ledger: Database, ledger_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = {name: make_task(name, None, in_steps) for name in ("one", "two")}
    async with services(1, ledger_url, monkeypatch):
        one, two = new("one"), new("two")
        await insert(ledger, one, two)
        await until(lambda: ledger_world.rows(ledger, id=one.id, state="running"))
        await until(lambda: ledger_world.rows(ledger, id=two.id, state="running"))
        async with ledger.engine.begin() as connection:
            await cancel.request_cancel(connection, one.id, "cancelled by ann", "ann")
        await until(lambda: ledger_world.rows(ledger, id=one.id, state="cancelled"))
        async with ledger.engine.begin() as connection:
            await pauses.pause(connection, "two", "ann", loaded)
        await until(lambda: ledger_world.rows(ledger, id=two.id, state="interrupted"))


async def test_a_pause_takes_a_task_off_the_schedule_of_other_processes_without_a_poll(
    ledger: Database, ledger_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task("tick", "0 0 1 1 *")
    async with services(1, ledger_url, monkeypatch) as (service,):
        job = service.scheduler.get_job("tick")
        assert job.next_run_time is not None
        async with ledger.engine.begin() as connection:
            await pauses.pause(connection, "tick", "ann", {"tick": task})
        await until(lambda: asyncio.sleep(0, job.next_run_time is None))
        async with ledger.engine.begin() as connection:
            await pauses.resume(connection, "tick")
        await until(lambda: asyncio.sleep(0, job.next_run_time is not None))


async def test_start_wakes_others_only_if_this_process_has_no_room(
    ledger: Database, ledger_url: str, monkeypatch: pytest.MonkeyPatch, heard: Heard
) -> None:
    make_task("long", None, forever, overlap="allow")
    long = TaskRegistry.get("long").cls
    async with services(1, ledger_url, monkeypatch, {"MAX_RUNNING": "2"}) as (service,):
        await heard.take()
        for number in (1, 2):
            await start(long)
            await until(lambda number=number: asyncio.sleep(0, service.engine.running == number))
        assert await heard.take() == []
        await start(long)
        assert await heard.take() == [queued_in(ledger, "default")]


# Connections.


@asynccontextmanager
async def beating(
    url: str, on_queued: Callable[[Any], None], node: str
) -> AsyncIterator[Heartbeat]:
    heart = Heartbeat(url, node, Lease(30), beat_seconds=5, lease_seconds=30, poll_seconds=60)
    polled = asyncio.Event()
    heart.start(lambda: None, lambda: None, lambda _: polled.set(), on_queued)
    await polled.wait()
    yield heart
    await asyncio.to_thread(heart.stop)


@pytest.mark.parametrize("ledger_url", ["postgresql"], indirect=True)
async def test_a_connection_that_is_lost_is_opened_again_and_hears(ledger: Database) -> None:
    await know(ledger, make_task("tick", None))
    told: list[Any] = []
    node = await put_node(ledger)
    async with beating(ledger.url.render_as_string(hide_password=False), told.append, node):
        mine = "datname = current_database() AND application_name LIKE 'batch/%/heartbeat'"

        async def listening() -> list[Any]:
            query = text(f"SELECT pid FROM pg_stat_activity WHERE {mine} AND state = 'idle'")
            async with ledger.reader.connect() as connection:
                return list((await connection.execute(query)).scalars())

        (before,) = await until(listening)  # it holds no transaction open
        told.clear()
        async with ledger.engine.begin() as connection:
            await connection.execute(text(f"SELECT pg_terminate_backend({before})"))
        await until(lambda: asyncio.sleep(0, None in told))  # what was told meanwhile is looked for

        async def listening_anew() -> bool:
            return any(pid != before for pid in await listening())

        await until(listening_anew)  # the old one may still be about to end
        told.clear()
        await insert(ledger, new("tick"))
        await until(lambda: asyncio.sleep(0, frozenset({"default"}) in told))


class Pooler:
    """It does what a pooler in transaction mode does to a listener: it accepts LISTEN, and passes
    no notification on.
    """

    def __init__(self, socket: str) -> None:
        self._socket = socket

    async def __aenter__(self) -> int:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back, there = await asyncio.open_unix_connection(self._socket)
        forth = asyncio.create_task(self._pass_on(reader, there))
        try:
            while True:
                head = await back.readexactly(5)
                body = await back.readexactly(int.from_bytes(head[1:]) - 4)
                if head[:1] != b"A":  # NotificationResponse
                    writer.write(head + body)
        except (OSError, asyncio.IncompleteReadError):
            forth.cancel()
            writer.close()
            there.close()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            writer.write(data)
        writer.close()


@asynccontextmanager
async def beating_behind_a_pooler(
    ledger: Database, beat_seconds: float, told: list[Any], polls: list[Any]
) -> AsyncIterator[str]:
    """The id of a node whose heartbeat uses a Pooler."""
    url = make_url(dsn_of(ledger)).set(drivername="postgresql+asyncpg")
    folder = url.query["host"]
    async with Pooler(f"{folder}/.s.PGSQL.5432") as port:
        pooled = url.set(host="127.0.0.1", port=port, query={"ssl": "disable"})
        node = await put_node(ledger)
        heart = Heartbeat(
            pooled.render_as_string(hide_password=False),
            node,
            Lease(30),
            beat_seconds=beat_seconds,
            lease_seconds=30,
            poll_seconds=0.1,
        )
        heart.start(
            lambda _: None,
            lambda: None,
            lambda found: polls.append(found.is_claimable),
            told.append,
        )
        yield node
        await asyncio.to_thread(heart.stop)


@pytest.mark.parametrize("ledger_url", ["postgresql"], indirect=True)
async def test_behind_a_pooler_that_passes_no_wakes_on_a_node_logs_that_once_and_polls(
    ledger: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "PROOF_SECONDS", 0.2)
    warned: list[str] = []
    monkeypatch.setattr(listener.logger, "warning", warned.append)
    proofs: list[str] = []
    prove = listener.Listener._prove

    async def noted(self: listener.Listener, channel: str) -> None:
        await prove(self, channel)
        proofs.append(channel)

    monkeypatch.setattr(listener.Listener, "_prove", noted)
    polls: list[Any] = []
    told: list[Any] = []
    async with beating_behind_a_pooler(ledger, 5, told, polls):
        await until(lambda: asyncio.sleep(0, warned))
        assert "passes no notifications on" in warned[0]
        assert "POLL_SECONDS" in warned[0]
        told.clear()
        await insert(ledger, new("tick"))
        await until(lambda: asyncio.sleep(0, polls[-1]))
        assert told == []
        async with ledger.engine.begin() as connection:
            theirs = "FROM pg_stat_activity WHERE application_name LIKE 'batch/%/heartbeat'"
            await connection.execute(text(f"SELECT pg_terminate_backend(pid) {theirs}"))
        await until(lambda: asyncio.sleep(0, len(proofs) > 1))
    assert sum("passes no notifications on" in warning for warning in warned) == 1


@pytest.mark.parametrize("ledger_url", ["postgresql"], indirect=True)
async def test_a_node_that_waits_for_a_lock_still_finds_out_that_no_wakes_are_passed_on(
    ledger: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "PROOF_SECONDS", 0.2)
    monkeypatch.setattr(listener, "ANSWER_SECONDS", 0.5)
    warned: list[str] = []
    monkeypatch.setattr(listener.logger, "warning", warned.append)
    sent: list[bool] = []
    notify_itself = listener.Listener._notify_itself
    loop = asyncio.get_running_loop()

    async def behind_lock(self: listener.Listener, channel: str) -> bool:
        """Its beats wait while it sends for the first time, and after it has sent."""
        if not sent:
            await keep_in_use(self)
        sent.append(await notify_itself(self, channel))
        if sent[-1]:
            await keep_in_use(self)
        return sent[-1]

    async def keep_in_use(self: listener.Listener) -> None:
        locked = asyncio.run_coroutine_threadsafe(lock(self._node), loop)
        await asyncio.wrap_future(locked)
        await until(lambda: asyncio.sleep(0, self._is_in_use()))

    async def lock(node: str) -> None:
        own_row = text("SELECT id FROM batch_nodes WHERE id = :node FOR UPDATE")
        await theirs.execute(own_row, {"node": node})

    monkeypatch.setattr(listener.Listener, "_notify_itself", behind_lock)
    waits: list[float] = []
    is_set_within = listener.is_set_within

    async def noted(event: asyncio.Event, seconds: float) -> bool:
        found = await is_set_within(event, seconds)
        waits.append(seconds)
        return found

    monkeypatch.setattr(listener, "is_set_within", noted)
    async with ledger.engine.connect() as theirs, beating_behind_a_pooler(ledger, 0.1, [], []):
        await until(lambda: asyncio.sleep(0, sent))
        await theirs.rollback()
        await until(lambda: asyncio.sleep(0, waits))
        await theirs.rollback()
        await until(lambda: asyncio.sleep(0, warned))
    assert sent == [False, True]
    assert len(waits) > 1
    assert "passes no notifications on" in warned[0]
