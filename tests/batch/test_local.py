"""The local engine beside other code in its process that claims runs: each run is started once."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system import clock
from batch_system.batch.execution import engine as engine_module
from batch_system.batch.execution.engine import LocalEngine
from batch_system.batch.execution.tickets import Tickets
from batch_system.batch.ledger import runs, tables, transitions
from batch_system.batch.ledger.attempts import Outcome
from batch_system.batch.ledger.states import Rank, RunState
from batch_system.batch.ledger.tables import new_id
from batch_system.batch.queue import claiming
from batch_system.batch.tasks.registry import Task
from batch_system.database.engine import Database
from batch_system.testing.engine import DrivenEngine
from tests.batch.ledger_world import NODE, know, make_task, rows, until
from tests.batch.test_runs import new


class Counted:
    """A task that counts how often its body begins."""

    def __init__(self) -> None:
        self.begun = 0
        self.may_end = asyncio.Event()

        async def run(_: object) -> None:
            self.begun += 1
            await self.may_end.wait()

        self.task: Task = make_task("t", None, run=run)


async def commit_a_claim(ledger: Database, exclusive: str | None = "t") -> runs.Claimed:
    """Insert a running run, as a firing does before it launches the run on its node."""
    at = clock.now()
    started = {"node": NODE, "fence": 1, "attempt": 1, "started_at": at, "attempt_started_at": at}
    made = new(state=RunState.RUNNING, exclusive=exclusive, **started)
    async with ledger.engine.begin() as connection:
        await runs.insert(connection, [made])
    return runs.claimed_from(made)


@pytest.mark.parametrize("await_of_the_turn", ["_may_claim", "_write"])
async def test_a_recheck_requested_during_a_turn_starts_no_run_twice(
    ledger: Database, monkeypatch: pytest.MonkeyPatch, await_of_the_turn: str
) -> None:
    """A recheck holds `claiming` all the time, so that it does not see runs that are about to be
    launched.

    Two firings follow each other: the COMMIT of the first gets no reply, the runs of the second are
    being launched.
    """
    counted = Counted()
    engine = DrivenEngine(ledger, await know(ledger, counted.task), NODE)
    original = getattr(LocalEngine, await_of_the_turn)
    is_there, may_go_on = asyncio.Event(), asyncio.Event()

    async def slowly(self: object, *args: object, **more: object) -> object:
        is_there.set()
        await may_go_on.wait()
        return (await original(self, *args, **more)) or await_of_the_turn == "_may_claim"

    with monkeypatch.context() as patch:
        patch.setattr(LocalEngine, await_of_the_turn, slowly)
        if await_of_the_turn == "_write":
            patch.setattr(LocalEngine, "_may_claim", lambda *_: asyncio.sleep(0, True))
        turn = asyncio.create_task(engine._turn())
        await is_there.wait()
        engine.recheck_claims()
        async with engine.claiming:
            claimed = await commit_a_claim(ledger)
            may_go_on.set()
            await turn
            engine.launch([claimed], engine.losses)
    is_recheck_due = engine.is_recheck_due
    await asyncio.sleep(0)
    counted.may_end.set()
    await engine.settle()
    assert (counted.begun, is_recheck_due, engine.is_recheck_due) == (1, True, False)
    assert [row["state"] for row in await rows(ledger)] == ["succeeded"]


async def launch_five(
    ledger: Database, monkeypatch: pytest.MonkeyPatch
) -> tuple[Counted, DrivenEngine, asyncio.Task[None]]:
    """Begin to start five runs, two in each step. The engine has room for six."""
    monkeypatch.setattr("batch_system.batch.execution.engine.LAUNCHED_AT_ONCE", 2)
    counted = Counted()
    engine = DrivenEngine(ledger, await know(ledger, counted.task), NODE, max_running=6)
    claimed = [await commit_a_claim(ledger, None) for _ in range(5)]
    launching = asyncio.create_task(engine.launch_all(claimed))
    return counted, engine, launching


async def test_many_runs_are_started_in_steps_and_count_for_the_capacity_from_the_first_on(
    ledger: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted, engine, launching = await launch_five(ledger, monkeypatch)
    seen = []
    while not launching.done():
        await asyncio.sleep(0)
        seen.append((len(engine.attempts), counted.begun, engine.running, engine.capacity.runs))
    await asyncio.sleep(0)
    assert seen[0] == (2, 0, 5, 1)
    assert [begun for _, begun, _, _ in seen] == sorted(begun for _, begun, _, _ in seen)
    assert {(running, room) for _, _, running, room in seen} == {(5, 1)}
    assert counted.begun == 5
    counted.may_end.set()
    await engine.settle()
    assert {row["state"] for row in await rows(ledger)} == {"succeeded"}


async def test_runs_that_are_claimed_are_started_although_the_start_is_cancelled(
    ledger: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dispatcher may be stopped between two steps. The runs are running in the ledger, and
    nobody else has them.
    """
    counted, engine, launching = await launch_five(ledger, monkeypatch)
    await asyncio.sleep(0)
    launching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await launching
    counted.may_end.set()
    await engine.settle()
    assert counted.begun == 5
    assert {row["state"] for row in await rows(ledger)} == {"succeeded"}


async def test_an_attempt_that_was_made_before_its_claim_was_committed_begins_when_it_is_launched(
    ledger: Database,
) -> None:
    counted = Counted()
    engine = DrivenEngine(ledger, await know(ledger, counted.task), NODE)
    with clock.moved(clock.now()):
        first, second = [await commit_a_claim(ledger, None) for _ in range(2)]
        engine.make_ready([first])
        assert (engine.running, engine.attempts, counted.begun) == (1, [], 0)
        clock.advance(timedelta(seconds=1))
        engine.make_ready([second])  # the first claim was not committed
        await engine.launch_all([second])
        assert [attempt.claimed for attempt in engine.attempts] == [second]
        clock.advance(timedelta(seconds=2))
        counted.may_end.set()
        await engine.settle()
        assert counted.begun == 1
        (ended,) = [row for row in await rows(ledger) if row["id"] == second.id]
        assert (ended["finished_at"] - ended["started_at"]).total_seconds() >= 2


async def test_groups_that_were_prepared_ahead_are_written_after_a_failure_and_in_their_order(
    ledger: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the database writes a group of outcomes, the next one is taken and encoded."""
    for module in ("outcomes", "engine"):
        monkeypatch.setattr(f"batch_system.batch.execution.{module}.GROUP_LIMIT", 3)
    finish, written = transitions.finish, list[list[str]]()

    async def fail_once(
        connection: AsyncConnection, outcomes: Sequence[Outcome], *given: Any
    ) -> list[Outcome]:
        written.append([outcome.id for outcome in outcomes])
        bounced = await finish(connection, outcomes, *given)
        if len(written) == 2:
            raise ConnectionError("the database does not answer")
        return bounced

    monkeypatch.setattr(transitions, "finish", fail_once)
    counted = Counted()
    engine = DrivenEngine(ledger, await know(ledger, counted.task), NODE)
    engine.launch([await commit_a_claim(ledger, None) for _ in range(10)])
    counted.may_end.set()
    await until(lambda: asyncio.sleep(0, engine._buffer.waiting == 10))
    ends = [outcome.id for outcome in engine._buffer._outcomes]
    await engine._turn()
    assert (engine.running, engine._buffer.waiting, engine._buffer.has_next) == (10, 7, True)
    with pytest.raises(ConnectionError):
        await engine._turn()
    assert (engine.running, engine._buffer.waiting, engine._buffer.has_next) == (7, 7, False)
    await engine.settle()
    assert written == [ends[:3], ends[3:6], ends[3:6], ends[6:9], ends[9:]]
    assert {row["state"] for row in await rows(ledger)} == {"succeeded"}
    assert sorted(row["run"] for row in await rows(ledger, tables.attempts)) == sorted(ends)
    assert engine.running == 0


async def test_room_is_kept_for_runs_whose_claim_is_not_committed_yet(ledger: Database) -> None:
    counted = Counted()
    engine = DrivenEngine(ledger, await know(ledger, counted.task), NODE, max_running=6)
    claimed = [await commit_a_claim(ledger, None) for _ in range(4)]
    threads = engine.capacity.threads
    engine.make_ready(claimed)
    assert (engine.running, engine.capacity.runs, engine.capacity.threads) == (4, 2, threads - 4)
    engine.make_ready([])
    assert (engine.running, engine.capacity.runs, engine.capacity.threads) == (0, 6, threads)


async def test_a_run_that_was_lost_and_claimed_again_has_an_attempt_with_its_new_fence(
    ledger: Database,
) -> None:
    """Its first claim was committed although it seemed to fail, and another node has interrupted it
    after that.
    """
    counted = Counted()
    engine = DrivenEngine(ledger, await know(ledger, counted.task), NODE)
    first = await commit_a_claim(ledger)
    engine.make_ready([first])
    async with ledger.engine.begin() as connection:
        await connection.execute(update(tables.runs).values(fence=2))
    await engine.launch_all([replace(first, fence=2)], engine.losses)
    counted.may_end.set()
    await engine.settle()
    assert [(row["state"], row["fence"]) for row in await rows(ledger)] == [("succeeded", 2)]


async def test_outcomes_are_written_while_a_recheck_waits_for_a_transaction_that_claims(
    ledger: Database,
) -> None:
    counted = Counted()
    engine = DrivenEngine(ledger, await know(ledger, counted.task), NODE)
    engine.launch([await commit_a_claim(ledger)], engine.losses)
    counted.may_end.set()
    for _ in range(3):
        await asyncio.sleep(0)
    engine.recheck_claims()
    async with engine.claiming:
        await engine._turn()
        assert [row["state"] for row in await rows(ledger)] == ["succeeded"]
        assert engine.is_recheck_due
    await engine._turn()
    assert not engine.is_recheck_due


@pytest.mark.parametrize("on_tickets", [False, True])
async def test_a_run_that_the_database_refuses_again_and_again_keeps_the_node_from_no_other_run(
    ledger: Database, on_tickets: bool
) -> None:
    """A ledger in a state that should never occur: a run is the first of its queue, and another one
    has the lane.
    """
    loaded = await know(ledger, make_task("stuck", None), make_task("other", None))
    joining = new("stuck", rank=Rank.JOINING, attempt=1)
    first = replace(
        joining, id=new_id(), state=RunState.RETRYING, due_at=joining.due_at - timedelta(hours=1)
    )
    other = new("other")
    async with ledger.engine.begin() as connection:
        await runs.insert(connection, [joining, first, other])
    tickets = Tickets() if on_tickets else None
    engine = LocalEngine(ledger, loaded, NODE, tickets=tickets)
    engine.start()
    used = (
        [asyncio.create_task(tickets.use(name, 5.0)) for name in loaded]
        if tickets is not None
        else []
    )
    engine.wake()
    await until(lambda: rows(ledger, id=other.id, state="succeeded"), 10)
    await asyncio.gather(*used)
    await engine.stop()
    assert [row["state"] for row in await rows(ledger, task="stuck")] == ["queued", "retrying"]


@pytest.mark.parametrize("ledger_url", ["postgresql"], indirect=True)
async def test_while_all_runs_that_may_start_are_locked_the_dispatcher_looks_less_often(
    ledger: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = await know(ledger, make_task("t", None))
    run = new()
    async with ledger.engine.begin() as connection:
        await runs.insert(connection, [run])
    looks, take = 0, claiming.take

    async def counted(*given: Any) -> Any:
        nonlocal looks
        looks += 1
        return await take(*given)

    monkeypatch.setattr(claiming, "take", counted)
    monkeypatch.setattr(engine_module, "LOCKED_LOOK_SECONDS", 1_000.0)
    engine = LocalEngine(ledger, loaded, NODE)
    async with ledger.engine.begin() as locking:
        await locking.execute(select(tables.runs.c.id).with_for_update())
        engine.start()
        engine.wake()
        await until(lambda: asyncio.sleep(0, looks))
        await asyncio.sleep(0.2)
        assert looks == 1
        monkeypatch.setattr(engine_module, "LOCKED_LOOK_SECONDS", 0.02)
        engine.wake()
        await until(lambda: asyncio.sleep(0, looks > 2))
    await until(lambda: rows(ledger, id=run.id, state="succeeded"))
    await engine.stop()
