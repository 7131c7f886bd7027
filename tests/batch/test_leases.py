"""Leases on a boot-time clock that the tests move: who is silent, who is rescued, and what a node
without one does.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import select, update
from sqlalchemy.exc import DBAPIError

from batch_system import clock, config, logs
from batch_system.batch.context.current_run import current_run
from batch_system.batch.context.lease import Lease, Observer
from batch_system.batch.ledger import attempts, nodes, tables, transitions
from batch_system.batch.ledger.database_time import now_of
from batch_system.batch.ledger.migration import LEDGER_HISTORY
from batch_system.batch.ledger.runs import Claimed
from batch_system.batch.ledger.tables import new_id
from batch_system.batch.nodes import heartbeat, ledger_poll, orphans, process_lock
from batch_system.batch.nodes.harm import LostLease
from batch_system.batch.nodes.heartbeat import Heartbeat, Wakes
from batch_system.batch.nodes.orphans import rescue
from batch_system.batch.queue import claiming
from batch_system.batch.queue.retry import retry
from batch_system.config import get_settings
from batch_system.database.engine import Database
from batch_system.server.service import BatchService
from batch_system.testing.engine import DrivenEngine
from tests.batch.attempts import Begun
from tests.batch.ledger_world import fire, know, make_task, rows, until
from tests.batch.test_runs import insert, new
from tests.databases import migrated


class BootTime:
    """The boot-time clock, which the test moves forward or stops at an instant."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ahead = 0.0
        self.stands_at: float | None = None
        real = clock.boottime
        monkeypatch.setattr(clock, "boottime", lambda: self.stands_at or real() + self.ahead)


@pytest.fixture
def boot_time(monkeypatch: pytest.MonkeyPatch) -> BootTime:
    return BootTime(monkeypatch)


class TestObserver:
    def test_a_node_is_silent_after_a_whole_lease_with_the_same_counter(
        self, boot_time: BootTime
    ) -> None:
        observer = Observer(lease_seconds=30)
        for _ in range(5):
            assert observer.silent({"a": 1}) == set()
            boot_time.ahead += 7.4  # five looks later it is 29.6 seconds
        boot_time.ahead += 0.5
        assert observer.silent({"a": 1}) == {"a"}
        assert observer.silent({"a": 2}) == set()

    def test_a_counter_that_rises_begins_the_lease_anew(self, boot_time: BootTime) -> None:
        observer = Observer(lease_seconds=30)
        for beats in range(20):
            assert observer.silent({"a": beats // 2, "b": 1}) == ({"b"} if beats >= 3 else set())
            boot_time.ahead += 10.1

    def test_time_without_polls_does_not_make_a_node_silent(self, boot_time: BootTime) -> None:
        observer = Observer(lease_seconds=30)
        observer.silent({"a": 1})
        boot_time.ahead += 3600
        assert observer.silent({"a": 1}) == set()

    def test_a_node_that_comes_back_is_watched_from_that_instant(self, boot_time: BootTime) -> None:
        observer = Observer(lease_seconds=30)
        for beats in ({"a": 1}, {"a": 1}, {}, {"a": 1}):
            assert observer.silent(beats) == set()
            boot_time.ahead += 11


def test_a_lease_counts_from_the_sending_of_the_beat_and_ends_before_others_see_its_end(
    boot_time: BootTime,
) -> None:
    lease = Lease(30)
    assert not lease.is_held
    sent_at = clock.boottime()
    boot_time.ahead = 20  # the ledger took this long to answer
    lease.renew(sent_at)
    boot_time.ahead = 24.5
    assert lease.is_held
    boot_time.ahead = 25
    assert not lease.is_held
    lease.renew(clock.boottime())
    assert lease.is_held
    lease.end()
    assert not lease.is_held


async def test_a_heartbeat_that_fails_is_logged_and_begins_again(
    ledger: Database, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = iter([OSError(errno.EMFILE, "Too many open files")])

    class FirstFails(Wakes):
        def __init__(self, *given: Any) -> None:
            for failure in failures:
                raise failure
            super().__init__(*given)

    monkeypatch.setattr(heartbeat, "Wakes", FirstFails)
    monkeypatch.setattr(heartbeat, "AGAIN_SECONDS", 0.02)
    lease = Lease(30)
    url = ledger.url.render_as_string(hide_password=False)
    heart = Heartbeat(url, await put_node(ledger), lease, beat_seconds=5, lease_seconds=30)
    heart.start(lambda _: None, lambda: None)
    await until(lambda: asyncio.sleep(0.01, lease.is_held))
    await asyncio.to_thread(heart.stop)
    assert not heart.is_alive
    assert "the heartbeat has failed" in caplog.text and "Too many open files" in caplog.text


async def put_node(ledger: Database, **more: Any) -> str:
    row = {
        "id": new_id(),
        "host": "elsewhere",
        "pid": 1,
        "version": "1",
        "draining": False,
        "tasks": ["theirs"],
    }
    async with ledger.engine.begin() as connection:
        now = await now_of(connection)
        await connection.execute(
            tables.nodes.insert().values({**row, "started_at": now, "seen_at": now, **more})
        )
    return str(row["id"])


async def put_run(ledger: Database, node: str, task: str = "theirs") -> str:
    run = new_id()
    async with ledger.engine.begin() as connection:
        now = await now_of(connection)
        new = {
            "id": run,
            "task": task,
            "origin": "manual",
            "rank": 2,
            "catch_up": False,
            "attempt": 1,
            "fence": 1,
        }
        held = {
            "state": "running",
            "node": node,
            "due_at": now,
            "created_at": now,
            "attempt_started_at": now,
        }
        await connection.execute(tables.runs.insert().values(**new, **held))
    return run


async def rescue_now(ledger: Database, dead: dict[str, int]) -> list[str]:
    async with ledger.engine.begin() as connection:
        return await rescue(connection, dead, await now_of(connection))


async def test_a_dead_node_is_marked_as_stopped_and_its_run_interrupted(ledger: Database) -> None:
    node, other = await put_node(ledger), await put_node(ledger)
    run, theirs = await put_run(ledger, node), await put_run(ledger, other)
    assert await rescue_now(ledger, {node: 0}) == [node]
    assert (await rows(ledger, id=run))[0]["state"] == "interrupted"
    assert (await rows(ledger, id=theirs))[0]["state"] == "running"
    stopped = {
        row["id"] for row in await rows(ledger, tables.nodes) if row["stopped_at"] is not None
    }
    assert stopped == {node}
    async with ledger.reader.connect() as connection:
        assert await nodes.live_tasks(connection) == {"theirs"}
    await rescue_now(ledger, {other: 0})
    async with ledger.reader.connect() as connection:
        assert await nodes.live_tasks(connection) == set()


async def test_a_node_that_beats_during_the_rescue_is_not_marked_as_stopped(
    ledger: Database,
) -> None:
    node = await put_node(ledger)
    run = await put_run(ledger, node)
    async with ledger.engine.begin() as connection:
        assert await nodes.beat(connection, node, 0.0)
    assert await rescue_now(ledger, {node: 0}) == []
    assert (await rows(ledger, id=run))[0]["state"] == "running"
    assert (await rows(ledger, tables.nodes))[0]["stopped_at"] is None


async def test_a_run_claimed_after_its_node_was_marked_as_stopped_is_rescued(
    ledger: Database,
) -> None:
    """A process may be frozen between the check of its lease and the COMMIT of its claim, and die
    after that.
    """
    node = await put_node(ledger)
    await rescue_now(ledger, {node: 0})
    async with ledger.reader.connect() as connection:
        assert (await ledger_poll.read(connection, new_id())).others == []
    run = await put_run(ledger, node)
    async with ledger.reader.connect() as connection:
        (seen,) = (await ledger_poll.read(connection, new_id())).others
    assert (seen.id, seen.is_stopped) == (node, True)
    assert await rescue_now(ledger, {seen.id: seen.beats}) == [node]
    assert (await rows(ledger, id=run))[0]["state"] == "interrupted"


async def test_a_lock_that_a_frozen_node_holds_delays_no_heartbeat(postgres_database: str) -> None:
    await migrated(postgres_database, LEDGER_HISTORY)
    ledger = Database(postgres_database, setting="LEDGER_URL")
    node = await put_node(ledger)
    run = await put_run(ledger, node)
    theirs = Database(postgres_database, setting="LEDGER_URL", pool_size=1, client=f"batch/{node}")
    frozen = await theirs.engine.connect()
    try:
        await frozen.execute(update(tables.nodes).values(loop_lag=1.0))
        async with asyncio.timeout(5):
            assert await rescue_now(ledger, {node: 0}) == []
            async with ledger.engine.begin() as connection:
                await nodes.end_connections(connection, [node])
                assert await rescue(connection, {node: 0}, await now_of(connection)) == [node]
        assert (await rows(ledger, id=run))[0]["state"] == "interrupted"
    finally:
        await frozen.invalidate()
        await theirs.dispose()
        await ledger.dispose()


@pytest.mark.rest
async def test_a_node_whose_own_row_a_frozen_node_has_locked_ends_that_lock(
    postgres_database: str,
) -> None:
    """A node that can't beat still sees who is silent, and relieves it. Otherwise one frozen
    process would stop all.
    """
    await migrated(postgres_database, LEDGER_HISTORY)
    ledger = Database(postgres_database, setting="LEDGER_URL")
    own, other = await put_node(ledger), await put_node(ledger)
    theirs = Database(postgres_database, setting="LEDGER_URL", client=f"batch/{other}")
    frozen = await theirs.engine.connect()
    await frozen.execute(update(tables.nodes).where(tables.nodes.c.id == own).values(loop_lag=1.0))
    heart = Heartbeat(postgres_database, own, Lease(1), beat_seconds=0.1, lease_seconds=1)
    heart.start(lambda _: None, lambda: None)
    try:

        async def beats_and_has_relieved() -> bool:
            mine, others = [(await rows(ledger, tables.nodes, id=node))[0] for node in (own, other)]
            return mine["beats"] > 0 and others["stopped_at"] is not None

        await until(beats_and_has_relieved)
    finally:
        await asyncio.to_thread(heart.stop)
        await frozen.invalidate()
        await theirs.dispose()
        await ledger.dispose()


async def test_connections_of_a_node_that_has_beaten_again_are_not_ended(
    postgres_database: str,
) -> None:
    await migrated(postgres_database, LEDGER_HISTORY)
    ledger = Database(postgres_database, setting="LEDGER_URL")
    back, frozen, own = [await put_node(ledger) for _ in range(3)]
    run = await put_run(ledger, frozen)
    theirs = {
        node: Database(postgres_database, setting="LEDGER_URL", pool_size=1, client=f"batch/{node}")
        for node in (back, frozen)
    }
    heart = Heartbeat(postgres_database, own, Lease(30), beat_seconds=5, lease_seconds=30)
    heart._lag.loop, heart._on_rescue = asyncio.get_running_loop(), lambda: None
    try:
        async with (
            theirs[back].engine.connect() as working,
            theirs[frozen].engine.connect() as stopped,
        ):
            async with ledger.engine.begin() as connection:
                await nodes.beat(connection, back, 0.0)
            await working.execute(select(1))
            await nodes.beat(stopped, frozen, 0.0)  # and it has no further effect
            await heart._take_over(ledger, {back: 0, frozen: 0}, {back, frozen})
            with pytest.raises(DBAPIError):
                await stopped.execute(select(1))
            await stopped.invalidate()
            assert (await working.execute(select(1))).scalar() == 1
        assert (await rows(ledger, id=run))[0]["state"] == "interrupted"
    finally:
        for database in (*theirs.values(), ledger):
            await database.dispose()


async def test_a_lost_run_that_may_not_be_repeated_fails(ledger: Database) -> None:
    await know(ledger, make_task("once", rerun=False), make_task("often"))
    node = await put_node(ledger)
    once, often = await put_run(ledger, node, "once"), await put_run(ledger, node, "often")
    await rescue_now(ledger, {node: 0})
    (failed,) = await rows(ledger, id=once)
    assert (failed["state"], failed["reason"]) == ("failed", "the node was lost while it ran")
    assert failed["finished_at"] is not None
    assert (await rows(ledger, id=often))[0]["state"] == "interrupted"
    assert {row["outcome"] for row in await rows(ledger, tables.attempts)} == {"lost"}


NOTHING = None
LOSSES = {
    "says nothing": ([NOTHING] * 5, "irrrf"),
    "commits chunks in each attempt": ([(100, 0), (200, 100), (300, 200), (400, 300)], "iiii"),
    "commits chunks of other loops, which are fewer": (
        [(5005, 0), (3008, 5), (2005, 8), (1004, 9)],
        "iiii",
    ),
    "finds its place and commits nothing": ([(100, 0), *[(100, 100)] * 4], "irrrf"),
    "counts from the beginning and ends where it ended before": (
        [(500, 0), (500, 0), (480, 0)],
        "irr",
    ),
    "counts by itself and gets further each time": (
        [(100, 0), (200, 0), (300, 0), (400, 0)],
        "iiii",
    ),
    "gets on in its third attempt only": ([NOTHING, NOTHING, (10, 0), *[NOTHING] * 4], "irirrrf"),
}
"""Of each attempt its count when its node was lost, and how much of that earlier ones had done;
then the states.
"""
STATES = {"i": "interrupted", "r": "retrying", "f": "failed"}
POISON = "5 times without progress; do not retry it before that is mended"


@pytest.mark.rest
@pytest.mark.parametrize(("attempts", "states"), LOSSES.values(), ids=LOSSES)
async def test_a_run_that_is_lost_again_and_again_waits_longer_each_time_and_fails(
    ledger: Database, attempts: list[tuple[int, int] | None], states: str
) -> None:
    run = await put_run(ledger, await put_node(ledger))
    with clock.moved(clock.now()):
        waits = []
        for progress, state in zip(attempts, states, strict=True):
            assert await lose(ledger, run, progress) == STATES[state]
            (found,) = await rows(ledger)
            waits += [(found["due_at"] - clock.now()).total_seconds()] if state in "ir" else []
        assert waits == [
            0 if state == "i" else 30 * 2.0**waited for state, waited in _waited(states)
        ]
        assert found["attempt"] - found["attempts_before"] == 1 - (state == "r"), (
            "no loss uses up an attempt"
        )
        if states[-1] == "f":
            assert found["reason"] == f"poison: the node was lost while it ran, {POISON}"
            async with ledger.engine.begin() as connection:
                await retry(connection, run, "ann")
            assert [await lose(ledger, run, NOTHING) for _ in range(2)] == [
                "interrupted",
                "retrying",
            ]


def _waited(states: str) -> Iterator[tuple[str, int]]:
    """For each state before the end, how often the run has waited, as it continued without a wait
    the first time.
    """
    waited = 0
    for state in states.removesuffix("f"):
        waited = 0 if state == "i" else waited + 1
        yield state, waited - 1


async def test_a_loss_counts_for_the_run_that_blocked_the_event_loop_and_for_no_other_of_its_node(
    ledger: Database,
) -> None:
    """The process notes it in the row of the run before it ends."""
    node = await put_node(ledger)
    ran = [await put_run(ledger, node) for _ in range(2)]
    with clock.moved(clock.now()):
        for _ in range(5):
            async with ledger.engine.begin() as connection:
                await orphans.accuse(
                    connection,
                    node,
                    ran[0],
                    "it blocked the event loop for 25 s, in ops.py line 96",
                )
            await rescue_now(ledger, {node: 0})
            last = {run["id"]: run for run in await rows(ledger)}
            node = await put_node(ledger)
            clock.advance(timedelta(seconds=1))
            async with ledger.engine.begin() as connection:
                again = update(tables.runs).where(
                    tables.runs.c.state.in_(("interrupted", "retrying"))
                )
                await connection.execute(again.values(state="running", node=node, reason=None))
    blocker, other = (last[run] for run in ran)
    poison = f"poison: it blocked the event loop for 25 s, in ops.py line 96, {POISON}"
    assert (blocker["state"], blocker["reason"]) == ("failed", poison)
    assert (other["state"], other["losses"], other["reason"]) == (
        "interrupted",
        0,
        "the node was lost while it ran",
    )


async def test_a_loss_counts_for_a_run_with_which_the_ledger_stops_answering_but_not_in_an_outage(
    ledger: Database,
) -> None:
    """An outage also costs a run nothing if the run had already run for five minutes when the
    ledger stopped answering.
    """

    async def run(self: object) -> None:
        await asyncio.Event().wait()

    task = make_task("made", None, run)
    await know(ledger, task)
    await insert(ledger, new("made"))
    engine = DrivenEngine(ledger, {"made": task}, new_id())
    harms = LostLease("its node could not reach the ledger while it ran", clock.boottime())
    ends = []
    with clock.moved(clock.now()):
        for how in (
            None,
            replace(harms, since=harms.since + 600),
            harms,
            None,
            harms,
            harms,
            harms,
            harms,
        ):
            engine._is_claiming = True
            await engine._turn()
            assert engine.running == 1
            engine._is_claiming = False
            engine.give_up(how)
            await engine._turn()
            (found,) = await rows(ledger)
            ends.append((found["state"], found["losses"]))
            clock.advance(timedelta(seconds=121))
    assert [state for state, _ in ends] == [*["interrupted"] * 4, *["retrying"] * 3, "failed"]
    assert [losses for _, losses in ends] == [0, 0, 1, 1, 2, 3, 4, 5]
    assert found["reason"] == f"poison: its node could not reach the ledger while it ran, {POISON}"


@pytest.mark.rest
async def test_runs_may_have_caused_the_loss_of_a_lease_only_if_the_ledger_was_reachable(
    ledger: Database, boot_time: BootTime
) -> None:
    """If a statement waits for a lock, a run of this node may hold it; but no run makes a server
    refuse connections.

    Nor does a run make a server answer too late, and PostgreSQL reports that something is locked
    only after two seconds.
    """
    url = ledger.url.render_as_string(hide_password=False)
    cases = {url: ledger.kind == "sqlite", "postgresql+asyncpg://nobody@127.0.0.1:1/nothing": False}
    for place, may_be_by_runs in cases.items():
        node = await put_node(ledger)
        lease = Lease(1)
        lease.renew(clock.boottime())
        lost: list[LostLease | None] = []
        heart = Heartbeat(place, node, lease, beat_seconds=0.1, lease_seconds=1)
        async with ledger.engine.begin() as connection:
            await connection.execute(
                update(tables.nodes).where(tables.nodes.c.id == node).values(beats=1)
            )
            began_at = clock.boottime()
            heart.start(lost.append, lambda: None)
            await until(lambda lost=lost: asyncio.sleep(0, lost))
        await asyncio.to_thread(heart.stop)
        if not may_be_by_runs:
            assert lost[0] is None
        else:
            assert lost[0] is not None and began_at - 0.1 < lost[0].since < began_at + 1
            assert lost[0].is_proven == (ledger.kind == "sqlite"), (
                "there the kernel says who has the lock"
            )
    boot_time.ahead = 3600
    assert heart._how_lost() is None, "the machine has slept"


async def lose(ledger: Database, run: str, progress: tuple[int, int] | None) -> str:
    """A node takes the run, writes this progress and is lost. Returns the state that follows."""
    node = await put_node(ledger)
    clock.advance(timedelta(seconds=1))
    async with ledger.engine.begin() as connection:
        await connection.execute(
            update(tables.runs).where(tables.runs.c.state == "running").values(state="queued")
        )
        (claimed,) = await transitions.claim(connection, [run], node, clock.now())
    clock.advance(timedelta(seconds=1))
    if progress is not None:
        count, before = progress
        told = {
            "count": count,
            "count_before": before,
            "total": None,
            "message": None,
            "progress_at": clock.now(),
        }
        async with ledger.engine.begin() as connection:
            await attempts.write_progress(
                connection, [{"id": run, "fence": claimed.fence, "rate": None, **told}]
            )
    await rescue_now(ledger, {node: 0})
    return str((await rows(ledger, id=run))[0]["state"])


async def test_an_attempt_that_must_not_be_repeated_fails_if_the_service_stops_during_it() -> None:
    async def run(self: object) -> None:
        await asyncio.Event().wait()

    begun = Begun(run, rerun=False)
    await asyncio.sleep(0)
    begun.attempt.interrupt("the service stopped")
    ending = await begun.ending()
    assert (ending.state, ending.outcome) == ("failed", "interrupted")
    assert (
        ending.reason == "the service stopped while it ran, and it is not run again (rerun = False)"
    )


async def test_an_attempt_that_may_not_be_repeated_is_resumed_if_it_had_not_begun() -> None:
    begun = Begun(lambda self: None, rerun=False)
    begun.attempt.interrupt("the service stopped")
    assert (await begun.ending()).state == "interrupted"


@pytest.mark.rest
async def test_a_node_of_another_machine_that_falls_silent_is_rescued_after_a_lease(
    ledger: Database,
) -> None:
    """The node has no locked file here, so only its counter shows that it is dead."""
    node = await put_node(ledger)
    run = await put_run(ledger, node)
    rescued = asyncio.Event()
    url = ledger.url.render_as_string(hide_password=False)
    heart = Heartbeat(url, await put_node(ledger), Lease(1), beat_seconds=0.1, lease_seconds=1)
    began_at = clock.boottime()
    heart.start(on_loss=lambda _: None, on_rescue=rescued.set)
    await asyncio.wait_for(rescued.wait(), 10)
    assert clock.boottime() - began_at >= 1
    await asyncio.to_thread(heart.stop)
    assert (await rows(ledger, id=run))[0]["state"] == "interrupted"


async def test_the_end_of_a_process_on_this_machine_is_noticed_between_two_polls(
    ledger: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "LOOK_SECONDS", 100.0)
    url = ledger.url.render_as_string(hide_password=False)
    node, own = await put_node(ledger), await put_node(ledger)
    process = process_lock.ProcessLock(process_lock.folder_of(url), node)
    rescued = asyncio.Event()
    heart = Heartbeat(url, own, Lease(300), beat_seconds=100, lease_seconds=300, poll_seconds=100)
    heart.start(on_loss=lambda _: None, on_rescue=rescued.set)
    await until(lambda: rows(ledger, tables.nodes, id=own, beats=1))
    assert not rescued.is_set()
    process._release()
    await asyncio.wait_for(rescued.wait(), 10)
    await asyncio.to_thread(heart.stop)
    assert (await rows(ledger, tables.nodes, id=own))[0]["beats"] == 1


class World:
    """A service with a task whose first run waits, and counts how often its body was called."""

    def __init__(self, ledger: Database, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ledger = ledger
        self.calls = 0
        self.stops = 0
        self.is_cut_off = False
        self.failed = asyncio.Event()
        """A beat did not reach the ledger."""
        beat, loop = nodes.beat, asyncio.get_running_loop()

        async def may_fail(*args: Any) -> bool:
            if self.is_cut_off:
                loop.call_soon_threadsafe(self.failed.set)
                raise ConnectionRefusedError("the ledger is away")
            return await beat(*args)

        monkeypatch.setattr(nodes, "beat", may_fail)

        async def run(_: object) -> str:
            self.calls += 1
            if self.calls > 1:
                return "done"
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.stops += 1
                raise
            return "never"

        make_task("long", "* * * * * *", run)
        self.service = BatchService(get_settings())

    async def running(self) -> dict[str, Any]:
        async def begun() -> list[dict[str, Any]]:
            return await rows(self.ledger, state="running") if self.calls else []

        return dict((await until(begun))[0])

    async def has_stopped(self) -> bool:
        return self.stops == 1

    async def has_no_lease(self) -> bool:
        return not self.service.node.lease.is_held and bool(self.stops)


@pytest.fixture
async def world(ledger: Database, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    settings = {
        "HEARTBEAT_SECONDS": "0.2",
        "LEASE_SECONDS": "30",
        "POLL_SECONDS": "0.05",
        "DRAIN_SECONDS": "0",
    }
    settings["LEDGER_URL"] = ledger.url.render_as_string(hide_password=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    config.forget_settings()
    logs.set_up("INFO")
    world = World(ledger, monkeypatch)
    await world.service.start()
    yield world
    world.is_cut_off = False
    await world.service.stop()


async def test_a_heartbeat_renews_the_lease_from_the_instant_before_it_was_sent(
    world: World, boot_time: BootTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    beat, sent = nodes.beat, list[float]()
    seconds = (1, 3)  # the first beat may have been under way

    async def takes_seconds(*args: Any) -> bool:
        sent.append(clock.boottime())
        if len(sent) > len(seconds):
            raise ConnectionRefusedError("the ledger is away")
        boot_time.stands_at = sent[-1] + seconds[len(sent) - 1]
        return await beat(*args)

    async def is_away() -> bool:
        return len(sent) > len(seconds)

    boot_time.stands_at = clock.boottime() + 1
    monkeypatch.setattr(nodes, "beat", takes_seconds)
    await until(is_away)
    lease = world.service.node.lease
    assert lease._ends_at - lease.usable_seconds == pytest.approx(sent[1])


@pytest.mark.rest
async def test_a_node_that_cannot_renew_gives_up_its_runs_before_its_lease_ends(
    world: World, boot_time: BootTime, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger().addHandler(caplog.handler)
    held = await world.running()
    world.is_cut_off = True
    await asyncio.wait_for(world.failed.wait(), 30)
    lease = world.service.node.lease
    beaten_at = lease._ends_at - lease.usable_seconds
    boot_time.stands_at = beaten_at + 22
    await asyncio.sleep(0.3)
    assert world.stops == 0
    boot_time.stands_at = beaten_at + 25.1  # others wait until 30
    await until(world.has_no_lease)
    lost_at = clock.now()
    assert (await world.service.readiness())[
        "lease"
    ] == "it could not be renewed, so no run is started until it is"
    world.service.engine.recheck_claims()  # whatever the ledger says this node holds
    await asyncio.sleep(1.3)  # a slot comes due, and is left to others
    assert world.calls == 1
    assert [run["slot"] for run in await rows(world.ledger) if run["slot"] > lost_at] == []
    world.is_cut_off = False
    boot_time.ahead, boot_time.stands_at = 25.1, None
    (done,) = await until(lambda: rows(world.ledger, id=held["id"], state="succeeded"))
    assert (done["fence"], done["attempt"], done["node"]) == (2, 1, world.service.node.id)
    attempts = await rows(world.ledger, tables.attempts, run=held["id"])
    assert [attempt["outcome"] for attempt in attempts] == ["interrupted", "succeeded"]
    assert caplog.text.count("could not renew its lease in time") == 1


@pytest.mark.rest
async def test_a_machine_that_wakes_up_gives_up_its_runs_even_if_no_node_took_them(
    world: World, boot_time: BootTime
) -> None:
    held = await world.running()
    boot_time.ahead = 3600
    await until(lambda: rows(world.ledger, id=held["id"], state="succeeded"))
    assert (world.calls >= 2, world.stops) == (True, 1)


async def take_for_dead(world: World, then: Callable[[], None] = lambda: None) -> None:
    async def taken() -> bool:
        async with world.ledger.engine.begin() as connection:
            beats = {
                node.id: node.beats
                for node in (await ledger_poll.read(connection, new_id())).others
            }
            # None if it beats between the two.
            gone = await rescue(connection, beats, await now_of(connection))
            if gone:
                then()
            return gone == [world.service.node.id]

    await until(taken)


@pytest.mark.rest
async def test_a_node_that_was_marked_as_stopped_gives_up_its_runs_and_keeps_its_id(
    world: World, boot_time: BootTime, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger().addHandler(caplog.handler)
    held = await world.running()
    await take_for_dead(world, lambda: setattr(boot_time, "ahead", 31))
    (done,) = await until(lambda: rows(world.ledger, id=held["id"], state="succeeded"))
    assert (done["fence"], done["result"], world.stops) == (2, "done", 1)
    attempts = await rows(world.ledger, tables.attempts, run=held["id"])
    assert [attempt["outcome"] for attempt in attempts] == ["lost", "succeeded"]
    (node,) = await rows(world.ledger, tables.nodes)
    assert (node["id"], node["stopped_at"]) == (done["node"], None)
    assert caplog.text.count("this node lost its lease") == 1
    assert f"another node holds run {held['id']}" in caplog.text
    assert await world.service.readiness() == {}
    await until(lambda: rows(world.ledger, state="succeeded", fence=1))  # and it runs further slots


@pytest.mark.rest
async def test_a_node_that_was_marked_as_stopped_within_its_lease_gives_up_its_runs(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = await world.running()
    monkeypatch.setattr(world.service.engine, "_is_claiming", False)
    await take_for_dead(world)
    await until(world.has_stopped)
    assert [run["state"] for run in await rows(world.ledger, id=held["id"])] == ["interrupted"]


async def test_a_node_that_claims_a_run_again_ends_its_own_lost_attempt_first(world: World) -> None:
    held = await world.running()
    await take_for_dead(world)
    await until(lambda: rows(world.ledger, id=held["id"], state="succeeded"))
    await until(world.has_stopped)


async def test_a_node_whose_row_was_deleted_registers_again(world: World) -> None:
    await world.running()
    async with world.ledger.engine.begin() as connection:
        await connection.execute(tables.nodes.delete())
    (node,) = await until(lambda: rows(world.ledger, tables.nodes))
    assert (node["id"], node["tasks"]) == (world.service.node.id, ["long"])


async def test_a_run_claimed_by_a_frozen_process_is_not_begun(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.running()
    engine = world.service.engine
    run = await put_run(world.ledger, world.service.node.id, "long-too")
    (row,) = await rows(world.ledger, id=run)
    claimed = Claimed(**{name: row[name] for name in Claimed.__dataclass_fields__})
    claimed.task = "long"
    monkeypatch.setattr(engine, "may_work", lambda: False)
    engine.launch([claimed])
    await until(lambda: rows(world.ledger, id=run, state="interrupted"))
    assert world.calls == 1


async def test_a_run_claimed_across_a_loss_of_the_lease_is_not_begun(
    ledger: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reply to the COMMIT of a claim came late: meanwhile another node took the run, and this
    node has a new lease.
    """
    calls: list[int] = []

    async def run(self: object) -> None:
        calls.append(current_run().fence)

    task = make_task("made", "* * * * *", run)
    await fire(ledger, await know(ledger, task), clock.now() + timedelta(minutes=1))
    engine = DrivenEngine(ledger, {"made": task}, new_id())
    take = claiming.take

    async def loses_its_lease(*args: Any) -> Any:
        claimed = await take(*args)
        if engine.losses == 0:
            engine.give_up()
        return claimed

    monkeypatch.setattr(claiming, "take", loses_its_lease)
    await engine.settle()
    assert [attempt["outcome"] for attempt in await rows(ledger, tables.attempts)] == [
        "interrupted",
        "succeeded",
    ]
    assert calls == [2]


async def test_a_run_claimed_while_the_drain_begins_is_interrupted_before_its_body_begins(
    ledger: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    async def run(self: object) -> None:
        calls.append(current_run().id)

    task = make_task("made", None, run)
    await know(ledger, task)
    await insert(ledger, new("made"))
    stopping = DrivenEngine(ledger, {"made": task}, new_id())
    take = claiming.take

    async def just_before_the_signal(*args: Any) -> Any:
        claimed = await take(*args)
        stopping.begin_drain()
        return claimed

    with monkeypatch.context() as patch:
        patch.setattr(claiming, "take", just_before_the_signal)
        await stopping.settle()
    [run_row] = await rows(ledger)
    assert (calls, run_row["state"], run_row["reason"]) == (
        [],
        "interrupted",
        "the service stopped",
    )
    await DrivenEngine(ledger, {"made": task}, new_id()).settle()
    [run_row] = await rows(ledger)
    assert (calls, run_row["state"], run_row["attempt"]) == ([run_row["id"]], "succeeded", 1)


async def test_a_heartbeat_tries_no_more_often_during_an_outage_than_it_polls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tries: list[float] = []

    async def refuse(*_: Any) -> None:
        tries.append(clock.boottime())
        raise ConnectionRefusedError

    monkeypatch.setattr(Heartbeat, "_look", refuse)
    monkeypatch.setattr(Heartbeat, "_beat", refuse)
    url = "postgresql+asyncpg://nobody@127.0.0.1:1/nothing"
    heart = Heartbeat(url, new_id(), Lease(30), beat_seconds=5, lease_seconds=30, poll_seconds=0.2)
    heart.start(lambda _: None, lambda: None)
    await until(lambda: asyncio.sleep(0, len(tries) >= 5))
    await asyncio.to_thread(heart.stop)
    assert min(later - earlier for earlier, later in itertools.pairwise(tries)) > 0.1
