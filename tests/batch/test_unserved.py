"""Runs of a task that no service has any more."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import event, text, update

from batch_system import clock
from batch_system.batch.firing import task_sync
from batch_system.batch.ledger import tables, transitions
from batch_system.batch.ledger.runs import NewRun
from batch_system.batch.ledger.states import FINAL, Rank, RunState
from batch_system.batch.nodes import ledger_poll
from batch_system.batch.queue import unserved
from batch_system.batch.queue.retry import retry
from batch_system.batch.queue.unserved import REASON, fail_unserved
from batch_system.batch.tasks.registry import Task
from batch_system.database.engine import Database
from tests.batch.ledger_world import NODE, know, make_task, rows
from tests.batch.test_locks import until_waiting
from tests.batch.test_runs import insert, new

HOUR = timedelta(hours=1)
LONG_AGO = clock.now() - 30 * HOUR
WAITING = (RunState.QUEUED, RunState.RETRYING, RunState.INTERRUPTED)


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unserved, "PAUSE_SECONDS", 0)


async def removed(ledger: Database, name: str = "gone", hours: float = 25) -> Task:
    """A task that was removed `hours` ago."""
    task = make_task(name, None)
    await know(ledger, task)
    async with ledger.engine.begin() as connection:
        at = {"removed_at": clock.now() - hours * HOUR}
        await connection.execute(update(tables.tasks).where(tables.tasks.c.name == name).values(at))
    return task


def waiting(task: str = "gone", **more: Any) -> NewRun:
    return new(task, **{"created_at": LONG_AGO, "due_at": LONG_AGO, **more})


async def states(ledger: Database) -> dict[str, str]:
    return {run["id"]: run["state"] for run in await rows(ledger)}


async def test_runs_that_wait_for_a_task_removed_a_day_ago_fail(ledger: Database) -> None:
    await removed(ledger)
    made = [waiting(state=state) for state in WAITING]
    await insert(ledger, *made)
    assert await fail_unserved(ledger) == {"gone": 3}
    for run in await rows(ledger):
        assert (run["state"], run["reason"]) == ("failed", REASON)
        assert clock.now() - run["finished_at"] < HOUR
    async with ledger.reader.connect() as connection:
        assert not (await ledger_poll.read(connection, NODE)).is_claimable
    assert await fail_unserved(ledger) == {}


async def test_all_other_runs_stay_as_they_are(ledger: Database) -> None:
    await removed(ledger)
    await removed(ledger, "lately", hours=23)
    await know(ledger, make_task("there", None))
    over = [waiting(state=state, finished_at=LONG_AGO) for state in FINAL]
    young = [
        waiting(due_at=clock.now() - HOUR),
        waiting(state=RunState.RETRYING, due_at=clock.now() + HOUR),
    ]
    running = waiting(state=RunState.RUNNING, node=NODE, fence=1, attempt_started_at=LONG_AGO)
    await insert(ledger, *over, *young, running, waiting("lately"), waiting("there"))
    before = await rows(ledger)
    assert await fail_unserved(ledger) == {}
    assert await rows(ledger) == before


async def test_runs_of_a_task_that_a_node_loads_at_that_moment_do_not_fail(
    ledger: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node loads the task after the search for removed tasks, and before the first of their
    runs fails.
    """
    task = await removed(ledger)
    await insert(ledger, waiting())
    fail_some = unserved._fail_some

    async def loaded_first(*given: Any) -> int:
        async with ledger.engine.begin() as connection:
            await task_sync.record_tasks(connection, {"gone": task}, clock.now())
        return await fail_some(*given)

    monkeypatch.setattr(unserved, "_fail_some", loaded_first)
    assert await fail_unserved(ledger) == {}
    assert set((await states(ledger)).values()) == {"queued"}


@pytest.mark.parametrize("ledger_url", ["postgresql"], indirect=True)
async def test_runs_of_a_task_that_a_node_is_about_to_commit_do_not_fail(ledger: Database) -> None:
    task = await removed(ledger)
    await insert(ledger, waiting())
    async with ledger.engine.begin() as loading:
        await task_sync.record_tasks(loading, {"gone": task}, clock.now())
        failing = asyncio.create_task(fail_unserved(ledger))
        await until_waiting(ledger, 1)
    assert await failing == {}
    assert set((await states(ledger)).values()) == {"queued"}


async def test_a_failed_unserved_run_may_be_retried_and_then_waits_for_another_24_hours(
    ledger: Database,
) -> None:
    await removed(ledger)
    run = waiting()
    await insert(ledger, run)
    await fail_unserved(ledger)
    async with ledger.engine.begin() as connection:
        await retry(connection, run.id, "ann")
    assert await fail_unserved(ledger) == {}
    async with ledger.engine.begin() as connection:
        (claimed,) = await transitions.claim(connection, [run.id], NODE, clock.now())
    assert (claimed.id, claimed.attempt) == (run.id, 1)


async def test_many_unserved_runs_fail_in_several_transactions(
    ledger: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unserved, "BATCH", 2)
    await removed(ledger)
    await removed(ledger, "other")
    await insert(
        ledger,
        *(waiting(rank=Rank.CATCH_UP) for _ in range(5)),
        *(waiting("other") for _ in range(4)),
    )
    sizes: list[int] = []
    fail_some = unserved._fail_some

    async def note(*given: Any) -> int:
        sizes.append(await fail_some(*given))
        return sizes[-1]

    monkeypatch.setattr(unserved, "_fail_some", note)
    assert await fail_unserved(ledger) == {"gone": 5, "other": 4}
    assert sizes == [2, 2, 1, 0, 2, 2, 0, 0]


async def test_the_search_reads_the_index_once_for_each_removed_task(ledger: Database) -> None:
    """The ledger has many ended runs, and PostgreSQL has statistics of them."""
    await removed(ledger)
    history = {"state": RunState.SUCCEEDED, "finished_at": LONG_AGO}
    made = [waiting(f"task-{n % 20}", **(history if n % 10 else {})) for n in range(3_000)]
    await insert(ledger, waiting(), *made)
    asked: list[tuple[str, Any]] = []

    def note(_: Any, __: Any, statement: str, parameters: Any, *___: Any) -> None:
        if "batch_runs" in statement and statement.startswith("SELECT"):
            asked.append((statement, parameters))

    event.listen(ledger.reader.sync_engine, "before_cursor_execute", note)
    await fail_unserved(ledger)
    ((statement, parameters),) = asked
    explain = "EXPLAIN QUERY PLAN" if ledger.kind == "sqlite" else "EXPLAIN"
    async with ledger.engine.begin() as connection:
        if ledger.kind == "postgresql":
            await connection.execute(text("ANALYZE"))
        plan = "\n".join(
            str(row)
            for row in await connection.exec_driver_sql(f"{explain} {statement}", parameters)
        )
    for index in ("ix_batch_runs_waiting", "ix_batch_runs_retry"):
        assert index in plan, plan
