"""Cancelling a run, and retrying a run that has ended."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import insert as insert_into
from sqlalchemy import update

from batch_system import Retry, clock, current_run
from batch_system.batch.execution import attempt as runner
from batch_system.batch.ledger import tables, transitions
from batch_system.batch.ledger.states import FINAL, Origin, Rank, RunState
from batch_system.batch.ledger.tables import new_id
from batch_system.batch.nodes import ledger_poll
from batch_system.batch.nodes.ledger_poll import LedgerChanges
from batch_system.batch.queue import cancel
from batch_system.batch.queue import retry as again
from batch_system.batch.queue.cancel import StopRequest
from batch_system.batch.queue.retry import retry
from batch_system.batch.tasks.registry import Task
from batch_system.database import companions
from batch_system.database.engine import Database
from batch_system.errors import InvalidParameters, UnknownRun
from batch_system.testing.engine import DrivenEngine
from tests.batch.ledger_world import NODE, fire, heart_of, know, make_task, rows, until
from tests.batch.test_runs import NOW, claim, ending, finish, insert, new


async def ask(ledger: Database, run_id: str, by: str = "ann") -> RunState | None:
    async with ledger.engine.begin() as connection:
        return await cancel.request_cancel(connection, run_id, f"cancelled by {by}", by)


async def requests(ledger: Database, node: str = NODE) -> list[StopRequest]:
    async with ledger.reader.connect() as connection:
        return (await ledger_poll.read(connection, node)).requests


async def only(ledger: Database) -> dict[str, Any]:
    (run,) = await rows(ledger)
    return run


# The request.


@pytest.mark.parametrize("state", [RunState.QUEUED, RunState.RETRYING, RunState.INTERRUPTED])
async def test_a_run_that_waits_is_cancelled_at_once(ledger: Database, state: RunState) -> None:
    run = new(state=state)
    await insert(ledger, run)
    assert await ask(ledger, run.id) == RunState.CANCELLED
    found = await only(ledger)
    assert (found["state"], found["reason"], found["cancel_by"]) == (
        "cancelled",
        "cancelled by ann",
        "ann",
    )
    assert found["finished_at"] is not None
    assert await claim(ledger, "t") == []


async def test_a_run_that_is_running_gets_a_request_and_the_first_one_counts(
    ledger: Database,
) -> None:
    await insert(ledger, new())
    (claimed,) = await claim(ledger, "t")
    assert [await ask(ledger, claimed.id, by) for by in ("ann", "bob")] == [RunState.RUNNING] * 2
    found = await only(ledger)
    assert (found["state"], found["finished_at"], found["reason"]) == ("running", None, None)
    assert (found["cancel_by"], found["cancel_reason"]) == ("ann", "cancelled by ann")
    assert await requests(ledger) == [StopRequest(claimed.id, claimed.fence, "cancelled by ann")]
    assert await requests(ledger, node=new_id()) == []


@pytest.mark.parametrize("state", FINAL)
async def test_a_cancel_does_not_change_a_run_that_has_ended(
    ledger: Database, state: RunState
) -> None:
    run = new(state=state, reason="so it was", finished_at=NOW)
    await insert(ledger, run)
    before = await only(ledger)
    assert await ask(ledger, run.id) == state
    assert await only(ledger) == before


async def test_cancelling_an_unknown_run_returns_none(ledger: Database) -> None:
    assert await ask(ledger, new_id()) is None


# The end of an attempt whose run has a request.


@pytest.mark.parametrize("state", [RunState.RETRYING, RunState.INTERRUPTED])
async def test_a_run_with_a_request_neither_retries_nor_resumes(
    ledger: Database, state: RunState
) -> None:
    """This holds if its node, a drain, or the rescue of a dead node writes the outcome."""
    await insert(ledger, new())
    (claimed,) = await claim(ledger, "t")
    await ask(ledger, claimed.id)
    outcome = ending(claimed, state, reason="no network", due_at=NOW)
    assert await finish(ledger, outcome) == []
    found = await only(ledger)
    assert (found["state"], found["reason"]) == ("cancelled", "cancelled by ann")
    assert found["finished_at"] == outcome.ended_at
    assert [attempt["outcome"] for attempt in await rows(ledger, tables.attempts)] == [state]
    assert await claim(ledger, "t") == []


@pytest.mark.parametrize("state", [RunState.SUCCEEDED, RunState.FAILED])
async def test_a_run_that_ended_before_its_node_saw_the_request_keeps_its_end(
    ledger: Database, state: RunState
) -> None:
    await insert(ledger, new())
    (claimed,) = await claim(ledger, "t")
    await ask(ledger, claimed.id)
    await finish(ledger, ending(claimed, state))
    assert (await only(ledger))["state"] == state


async def test_a_request_during_the_write_of_a_retry_is_not_lost(ledger: Database) -> None:
    """The request comes when the outcome is written but not yet committed."""
    await insert(ledger, new())
    (claimed,) = await claim(ledger, "t")
    async with ledger.engine.begin() as connection:
        await transitions.finish(connection, [ending(claimed, RunState.RETRYING, due_at=NOW)])
        if ledger.kind == "postgresql":
            asking = asyncio.create_task(ask(ledger, claimed.id))
            await asyncio.sleep(0.2)
            assert not asking.done()
    state = await asking if ledger.kind == "postgresql" else await ask(ledger, claimed.id)
    assert (state, (await only(ledger))["state"]) == (RunState.CANCELLED, "cancelled")


MOST_POLLS = 3
"""A node polls once a second. One poll may be under way, and another may happen while the end is
written.
"""


class World:
    """An engine with one task, which gets the changes that a poll of the ledger reads."""

    def __init__(self, ledger: Database, task: Task) -> None:
        self.ledger = ledger
        self.engine = DrivenEngine(ledger, {task.name: task}, NODE)
        self.polls: list[LedgerChanges] = []
        on_changes = self.engine.on_changes
        self.engine.on_changes = lambda changes: self.polls.append(changes) or on_changes(changes)

    async def cancelled(self) -> tuple[dict[str, Any], int]:
        """Start the run and request its cancel. Returns the row of the ended run, and how many
        polls that took.
        """
        await insert(self.ledger, new("tick"))
        self.engine.wake()
        await until(lambda: rows(self.ledger, state="running"))
        run = await only(self.ledger)
        self.polls.clear()
        await ask(self.ledger, run["id"])
        (ended,) = await until(self._ended)
        return ended, len(self.polls)

    async def _ended(self) -> list[dict[str, Any]]:
        return [run for run in await rows(self.ledger) if run["state"] in FINAL]


@pytest.fixture
async def worlds(ledger: Database) -> AsyncIterator[Any]:
    async with AsyncExitStack() as stack:

        async def make(run: Any, **attributes: Any) -> World:
            task = make_task("tick", None, run, **attributes)
            await know(ledger, task)
            world = World(ledger, task)
            world.engine.start()
            stack.push_async_callback(world.engine.stop)
            stack.push_async_callback(world.engine.drain, 0)
            await stack.enter_async_context(heart_of(world.engine, ledger))
            return world

        yield make


async def test_an_async_run_is_cancelled_by_a_cancelled_error(
    ledger: Database, worlds: Any
) -> None:
    seen: list[BaseException] = []

    async def run(self: Any) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError as error:
            seen.append(error)
            raise

    ended, polls = await (await worlds(run)).cancelled()
    assert (ended["state"], ended["reason"], len(seen)) == ("cancelled", "cancelled by ann", 1)
    assert polls <= MOST_POLLS
    (attempt,) = await rows(ledger, tables.attempts)
    assert (attempt["outcome"], attempt["error"]) == ("cancelled", None)


def looks_at_cancelled(self: Any) -> str:
    while not current_run().cancelled:
        time.sleep(0.01)
    return "stopped"


def calls_checkpoint(self: Any) -> None:
    while True:
        current_run().checkpoint()
        time.sleep(0.01)


@pytest.mark.parametrize("run", [looks_at_cancelled, calls_checkpoint])
async def test_a_sync_run_sees_the_request_and_stops(
    ledger: Database, worlds: Any, run: Any
) -> None:
    ended, polls = await (await worlds(run)).cancelled()
    assert (ended["state"], ended["reason"], ended["result"]) == (
        "cancelled",
        "cancelled by ann",
        None,
    )
    assert polls <= MOST_POLLS


async def test_a_run_that_ignores_the_request_is_given_up(
    ledger: Database, worlds: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "ABANDON_SECONDS", 0.2)
    free = asyncio.Event()

    async def run(self: Any) -> None:
        while not free.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await free.wait()

    ended, polls = await (await worlds(run)).cancelled()
    assert (ended["state"], ended["reason"]) == ("cancelled", "cancelled by ann")
    assert polls <= MOST_POLLS
    free.set()


async def test_a_request_for_another_fence_is_ignored(ledger: Database, worlds: Any) -> None:
    """This node has lost the run, so the node that holds it now cancels it."""
    world = await worlds(looks_at_cancelled)
    await insert(ledger, new("tick"))
    world.engine.wake()
    await until(lambda: rows(ledger, state="running"))
    async with ledger.engine.begin() as connection:
        await connection.execute(update(tables.runs).values(fence=7))
    run = await only(ledger)
    await ask(ledger, run["id"])
    async with ledger.reader.connect() as connection:
        world.engine.on_changes(await ledger_poll.read(connection, NODE))
    assert [attempt.run.cancelled for attempt in world.engine.attempts] == [False]


# Retries by a person.


@pytest.mark.parametrize("state", [RunState.FAILED, RunState.CANCELLED, RunState.SKIPPED])
async def test_retry_queues_an_ended_run_for_a_new_attempt(
    ledger: Database, state: RunState
) -> None:
    await insert(
        ledger,
        new(
            state=state,
            reason="so it was",
            attempt=2,
            fence=3,
            finished_at=NOW,
            started_at=NOW,
            origin="schedule",
        ),
    )
    run = await only(ledger)
    async with ledger.engine.begin() as connection:
        await retry(connection, run["id"], "ann")
    queued = await only(ledger)
    assert (queued["state"], queued["rank"], queued["requested_by"]) == (
        "queued",
        Rank.MANUAL,
        "ann",
    )
    assert (queued["reason"], queued["finished_at"], queued["attempt"], queued["fence"]) == (
        None,
        None,
        2,
        3,
    )
    async with ledger.engine.begin() as connection:
        (claimed,) = await claims_at(connection, run["id"])
    assert (claimed.attempt, claimed.fence) == (3, 4)


async def claims_at(connection: Any, run_id: str) -> Any:
    return await transitions.claim(connection, [run_id], NODE, clock.now())


async def test_a_cancelled_run_that_is_retried_is_not_cancelled_again(ledger: Database) -> None:
    await insert(ledger, new())
    (claimed,) = await claim(ledger, "t")
    await ask(ledger, claimed.id)
    await finish(ledger, ending(claimed, RunState.CANCELLED, reason="cancelled by ann"))
    async with ledger.engine.begin() as connection:
        await retry(connection, claimed.id, "ann")
        (once_more,) = await claims_at(connection, claimed.id)
    assert await requests(ledger) == []
    await finish(ledger, ending(once_more, RunState.RETRYING, due_at=NOW))
    assert (await only(ledger))["state"] == "retrying"


@pytest.mark.parametrize(
    ("state", "word"),
    [
        (RunState.SUCCEEDED, "--again"),
        *((s, "not ended") for s in ("queued", "running", "retrying")),
    ],
)
async def test_a_refused_retry_names_the_state_of_the_run(
    ledger: Database, state: str, word: str
) -> None:
    run = new(state=state)
    await insert(ledger, run)
    async with ledger.engine.connect() as connection:
        with pytest.raises(InvalidParameters, match=rf"{run.id}.*{state}.*{word}"):
            await retry(connection, run.id, "ann")
        with pytest.raises(UnknownRun):
            await retry(connection, new_id(), "ann")
    assert (await only(ledger))["state"] == state


async def test_a_retried_run_of_an_old_slot_does_not_block_the_current_slot(
    ledger: Database,
) -> None:
    """The overlap policy considers only runs on time, and a retried run is not on time any more."""
    loaded = await know(ledger, make_task("tick", "0 * * * *"))
    async with ledger.engine.begin() as connection:
        await connection.execute(
            update(tables.schedules).values(fired_until=NOW - timedelta(minutes=30))
        )
    await fire(ledger, loaded, NOW)
    async with ledger.engine.begin() as connection:
        await connection.execute(update(tables.runs).values(state="failed", finished_at=NOW))
    failed = await only(ledger)
    async with ledger.engine.begin() as connection:
        await retry(connection, failed["id"], "ann")
    await fire(ledger, loaded, NOW + timedelta(hours=1))
    assert [run["state"] for run in await rows(ledger)] == ["queued", "queued"]


async def test_a_run_again_deletes_the_checkpoints_and_keeps_the_fence(
    ledger: Database, application: Database
) -> None:
    over, active = new(state="succeeded", origin=Origin.MANUAL), new(state="running", attempt=1)
    await insert(ledger, over, active)
    async with application.engine.begin() as connection:
        made = [
            {"run": run.id, "name": name, "fence": 1}
            for run in (over, active)
            for name in ("", "users")
        ]
        await connection.execute(insert_into(companions.checkpoints), made)
    assert await again.again(ledger, application, [over.id, active.id], Rank.CATCH_UP, "ann") == {
        over.id
    }
    left = {(row["run"], row["name"]) for row in await rows(application, companions.checkpoints)}
    assert left == {(over.id, ""), (active.id, ""), (active.id, "users")}
    assert [run["state"] for run in await rows(ledger)] == ["queued", "running"]


async def test_a_run_again_leaves_runs_that_have_not_ended_as_they_are(
    ledger: Database, application: Database
) -> None:
    run = new(state="running")
    await insert(ledger, run)
    with pytest.raises(InvalidParameters, match="is running"):
        await again.retry_from_the_beginning(ledger, application, run.id, "ann")
    with pytest.raises(UnknownRun):
        await again.retry_from_the_beginning(ledger, application, new_id(), "ann")


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("anew", [False, True])
async def test_a_run_that_used_up_its_attempts_has_all_of_them_again_after_a_retry(
    ledger: Database, application: Database, anew: bool
) -> None:
    async def run(self: object) -> None:
        raise ConnectionError("not yet")

    loaded = await know(
        ledger, make_task("t", None, run=run, retry=Retry(attempts=3, wait=60, factor=2, jitter=0))
    )
    engine = DrivenEngine(ledger, loaded, NODE)
    with clock.moved(NOW):
        await insert(ledger, new())
        assert await waits_until_over(ledger, engine) == [60, 120]
        for budget in (2, 3):
            failed = await only(ledger)
            assert (failed["state"], failed["attempt"]) == ("failed", 3 * (budget - 1))
            if anew:
                await again.retry_from_the_beginning(ledger, application, failed["id"], "ann")
            else:
                async with ledger.engine.begin() as connection:
                    await retry(connection, failed["id"], "ann")
            assert await waits_until_over(ledger, engine) == [60, 120]
    assert [row["number"] for row in await rows(ledger, tables.attempts)] == list(range(1, 10))


async def waits_until_over(ledger: Database, engine: DrivenEngine) -> list[float]:
    """The seconds that the only run waits between its attempts, until it has ended."""
    waits = []
    await engine.settle()
    while (run := await only(ledger))["state"] == "retrying":
        waits.append((run["due_at"] - clock.now()).total_seconds())
        clock.advance(run["due_at"] - clock.now())
        await engine.settle()
    return waits
