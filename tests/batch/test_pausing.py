"""A pause holds existing runs: running ones stop at their next checkpoint, and queued ones stay
queued.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from datetime import timedelta
from typing import Any

import pytest

from batch_system import clock, current_run
from batch_system.batch.execution.engine import LocalEngine
from batch_system.batch.firing import pauses
from batch_system.batch.ledger.states import CLAIMABLE
from batch_system.batch.nodes import ledger_poll
from batch_system.batch.queue import claiming
from batch_system.batch.queue.claiming import Capacity
from batch_system.database.engine import Database
from tests.batch.ledger_world import NODE, heart_of, know, make_task, rows, until
from tests.batch.test_runs import insert, new

Start = Callable[..., Awaitable[LocalEngine]]


async def pause(ledger: Database) -> None:
    async with ledger.engine.begin() as connection:
        await pauses.pause(connection, "tick", "ann")


async def resume(ledger: Database) -> None:
    async with ledger.engine.begin() as connection:
        await pauses.resume(connection, "tick")


@pytest.fixture
async def start(ledger: Database) -> AsyncIterator[Start]:
    """Starts a node with the task `tick`, and a run of it that does not end by itself."""
    async with AsyncExitStack() as stack:

        async def start(run: Any, **attributes: Any) -> LocalEngine:
            task = make_task("tick", None, run, **attributes)
            await know(ledger, task)
            engine = LocalEngine(ledger, {"tick": task}, NODE)
            engine.start()
            stack.push_async_callback(engine.stop)
            stack.push_async_callback(engine.drain, 0)
            await stack.enter_async_context(heart_of(engine, ledger))
            await insert(ledger, new("tick"))
            await until(lambda: rows(ledger, state="running"))
            return engine

        yield start


@pytest.mark.parametrize("is_sync", [False, True])
async def test_a_running_run_stops_at_its_next_checkpoint_and_goes_on_after_the_pause(
    ledger: Database, start: Start, is_sync: bool
) -> None:
    fences: list[int] = []

    async def wait(self: Any) -> str:
        fences.append(current_run().fence)
        if len(fences) == 1:
            await current_run().sleep(60)
        return "done"

    def wait_in_a_thread(self: Any) -> str:
        fences.append(current_run().fence)
        while len(fences) == 1:
            current_run().checkpoint()
            time.sleep(0.01)
        return "done"

    await start(wait_in_a_thread if is_sync else wait)
    await pause(ledger)
    (held,) = await until(lambda: rows(ledger, state="interrupted"))
    assert (held["reason"], held["attempt"]) == ("paused by ann", 1)
    assert not await is_claimable(ledger)
    await resume(ledger)
    (done,) = await until(lambda: rows(ledger, state="succeeded"))
    assert (done["id"], done["attempt"], done["fence"], done["result"]) == (
        held["id"],
        1,
        2,
        "done",
    )
    assert fences == [1, 2]


async def test_a_run_that_may_not_be_rerun_goes_on_to_its_end(
    ledger: Database, start: Start
) -> None:
    may_end: list[bool] = []

    def run(self: Any) -> str:
        while not may_end:
            current_run().checkpoint()
            time.sleep(0.01)
        current_run().checkpoint()
        return "done"

    engine = await start(run, rerun=False)
    await pause(ledger)
    async with ledger.reader.connect() as connection:
        changes = await ledger_poll.read(connection, NODE)
    assert [request.is_pause for request in changes.requests] == [True]
    engine.on_changes(changes)
    may_end.append(True)
    (done,) = await until(lambda: rows(ledger, state="succeeded"))
    assert done["result"] == "done"


@pytest.mark.parametrize("policies", [{}, {"overlap": "allow"}, {"max_running": 2}], ids=str)
async def test_queued_runs_are_held_and_runs_that_a_person_starts_afterwards_are_not(
    ledger: Database, policies: dict[str, Any]
) -> None:
    tasks = await know(ledger, make_task("tick", None, **policies))
    queue = tasks["tick"].exclusive
    before = [new("tick", state=state, exclusive=queue) for state in CLAIMABLE]
    await insert(ledger, *before)
    await pause(ledger)
    after = new("tick", exclusive=queue, created_at=clock.now() + timedelta(seconds=1))
    assert not await is_claimable(ledger)
    await insert(ledger, after)
    assert await is_claimable(ledger)
    async with ledger.engine.begin() as connection:
        claimed, _ = await claiming.take(connection, tasks, NODE, Capacity(10, 10))
    assert [run.id for run in claimed] == [after.id]
    assert not await is_claimable(ledger)
    await resume(ledger)
    assert await is_claimable(ledger)


async def is_claimable(ledger: Database) -> bool:
    async with ledger.reader.connect() as connection:
        return (await ledger_poll.read(connection, NODE)).is_claimable
