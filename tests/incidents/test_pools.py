"""Pools whose runs wait in vain: the incident, when it opens and closes, and what looking for it
costs.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import pytest
from sqlalchemy import update

from batch_system import clock
from batch_system.batch.firing import pauses
from batch_system.batch.ledger import nodes, pools, tables
from batch_system.batch.ledger.runs import NewRun
from batch_system.batch.ledger.tables import new_id
from batch_system.database.engine import Database
from batch_system.operations.slots.account import accounts
from tests.asking import operations_on
from tests.batch.ledger_world import know, make_task
from tests.batch.test_pools import Cost, fill
from tests.batch.test_runs import insert, new
from tests.incidents.watching import Watching, watching

START = datetime(2026, 3, 10, 2, 0, 0, tzinfo=UTC)


@pytest.fixture
async def watch(ledger: Database) -> AsyncIterator[Watching]:
    with clock.moved(START):
        async with watching(ledger, ledger) as node:
            yield node


async def join(ledger: Database, pool: str, *tasks: str, **more: Any) -> str:
    """A worker of the pool joins, which has loaded these tasks. Returns its id."""
    row = {
        "host": "far",
        "pid": 7,
        "version": "1",
        "draining": False,
        "fires": False,
        "broken": [],
        "loop_lag": 0,
    }
    now = clock.now()
    row |= {
        "id": new_id(),
        "started_at": now,
        "seen_at": now,
        "tasks": list(tasks),
        "pools": [pool],
        **more,
    }
    async with ledger.engine.begin() as connection:
        await nodes.register(connection, row)
    return str(row["id"])


async def leave(ledger: Database, node: str) -> None:
    async with ledger.engine.begin() as connection:
        stopped = (
            update(tables.nodes).where(tables.nodes.c.id == node).values(stopped_at=clock.now())
        )
        await connection.execute(stopped)


async def passed(watch: Watching, seconds: float) -> list[str]:
    """Let time pass while the watch looks every ten seconds. Returns the texts of the open
    incidents of pools.
    """
    for _ in range(int(seconds / 10)):
        watch.later(10)
        await watch.turn()
    return [row["text"] for row in await watch.incidents(kind="pool") if row["closed_at"] is None]


async def test_a_pool_that_nobody_serves_is_an_incident_after_a_minute_until_a_node_serves_it(
    ledger: Database, watch: Watching
) -> None:
    await know(ledger, make_task("risk", None, pool="gpu"), make_task("usual", None))
    await insert(ledger, new("risk"), new("risk"))
    assert await passed(watch, 60) == []
    (text,) = await passed(watch, 10)
    assert text == (
        "no node serves pool gpu: 2 runs of risk wait; start `batch work --pool gpu` on some "
        "machine, or the Dask cluster that BATCH_POOL_GPU names, or set BATCH_POOL_GPU=process"
    )
    assert await passed(watch, 60) == [text]
    await join(ledger, "gpu", "risk")
    assert await passed(watch, 10) == []
    ((_, kind, sent), (_, end, _)) = await watch.notes()
    assert (kind, sent, end) == ("opened", text, "closed")


async def test_a_slot_that_waits_for_a_pool_that_nobody_serves_is_not_also_late(
    ledger: Database, watch: Watching
) -> None:
    await know(ledger, make_task("risk", "0 * * * *", pool="gpu"))
    slot = NewRun.scheduled("risk", START, clock.now(), catch_up=False, exclusive=None, priority=0)
    await insert(ledger, slot)
    assert len(await passed(watch, 70)) == 1
    watch.later(300)
    await watch.turn(2)
    assert {row["kind"] for row in await watch.incidents()} == {"pool"}
    await join(ledger, "gpu", "risk")
    await passed(watch, 20)
    assert "late" in {row["kind"] for row in await watch.incidents()}, "now its nodes are"


async def test_a_pool_whose_nodes_have_not_loaded_the_task_is_an_incident_too(
    ledger: Database, watch: Watching
) -> None:
    await know(ledger, make_task("risk", None, pool="gpu"), make_task("price", None, pool="gpu"))
    node = await join(ledger, "gpu", "price")
    await insert(ledger, new("risk"), new("price"))
    (text,) = await passed(watch, 70)
    assert (
        text
        == "no node of pool gpu has task risk: 1 run waits; give its nodes the file of the task"
    )
    assert [row["task"] for row in await watch.incidents(kind="pool")] == ["risk"]
    await leave(ledger, node)
    (text,) = await passed(watch, 70)
    assert text.startswith("no node serves pool gpu: 2 runs of price, risk wait")


async def test_a_node_that_takes_over_the_watch_does_not_close_the_incident(
    ledger: Database, watch: Watching
) -> None:
    await know(ledger, make_task("risk", None, pool="gpu"))
    await insert(ledger, new("risk"))
    assert len(await passed(watch, 70)) == 1
    await leave(ledger, watch.node)
    other = Watching(ledger, ledger)
    await other.register()
    assert len(await passed(other, 30)) == 1
    (incident,) = await other.incidents(kind="pool")
    assert incident["closed_at"] is None


@pytest.mark.rest
@pytest.mark.parametrize("why", ["paused", "removed", "due tomorrow", "default", "served"])
async def test_a_run_that_does_not_wait_for_a_node_is_not_an_incident(
    ledger: Database, watch: Watching, why: str
) -> None:
    loaded = await know(
        ledger, make_task("risk", None, pool="default" if why == "default" else "gpu")
    )
    state = "retrying" if why == "due tomorrow" else "queued"
    await insert(
        ledger,
        new("risk", state=state, created_at=clock.now(), due_at=clock.now() + timedelta(days=1)),
    )
    if why == "served":
        await join(ledger, "gpu", "risk")
    async with ledger.engine.begin() as connection:
        if why == "paused":
            await pauses.pause(connection, "risk", "ann", loaded)
        if why == "removed":
            await connection.execute(update(tables.tasks).values(removed_at=clock.now()))
    assert await passed(watch, 120) == []


async def test_a_retry_that_is_due_waits_in_vain(ledger: Database, watch: Watching) -> None:
    await know(ledger, make_task("risk", None, pool="gpu"))
    await insert(ledger, new("risk", state="retrying", due_at=clock.now() + timedelta(seconds=30)))
    assert await passed(watch, 60) == []
    assert len(await passed(watch, 60)) == 1


async def test_a_node_that_drains_serves_nothing_more(ledger: Database, watch: Watching) -> None:
    await know(ledger, make_task("risk", None, pool="gpu"))
    await insert(ledger, new("risk"))
    await join(ledger, "gpu", "risk", draining=True)
    assert len(await passed(watch, 70)) == 1


@pytest.mark.rest
@pytest.mark.parametrize("state", ["queued", "retrying"])
async def test_the_cost_of_looking_does_not_grow_with_the_backlog(
    ledger: Database, state: str
) -> None:
    await know(ledger, make_task("risk", None, pool="gpu"), make_task("heavy", None, pool="cpu"))
    await join(ledger, "cpu", "heavy")
    await insert(ledger, new("risk"), new("heavy"))

    async def looked(cost: Cost) -> int:
        cost.sent.clear()
        async with ledger.reader.connect() as connection:
            assert [each.task for each in await pools.in_vain(connection, clock.now())] == ["risk"]
        return sum(
            [
                await cost.measured(*sent)
                for sent in cost.sent
                if sent[0].startswith(("SELECT", "WITH"))
            ]
        )

    cost = Cost(ledger)
    cost.keeps = True
    before = await looked(cost)
    await fill(ledger, "heavy", state, 10_000)
    assert await looked(cost) < 3 * before
    async with ledger.engine.begin() as connection:
        await connection.execute(
            update(tables.runs).where(tables.runs.c.state == state).values(task="risk")
        )
    async with ledger.reader.connect() as connection:
        (found,) = await pools.in_vain(connection, clock.now())
    assert found.waiting <= 2 * pools.MOST_COUNTED


async def test_the_account_says_that_the_runs_of_slots_wait_in_vain(ledger: Database) -> None:
    await know(ledger, make_task("risk", None, pool="gpu"), make_task("usual", None))
    await insert(ledger, new("risk"))
    account = partial(accounts, operations_on(ledger).context)
    since = clock.now() - timedelta(hours=1)
    (sentence,) = (await account(since)).pools
    assert "gpu" in sentence and "risk" in sentence
    assert (await account(since, task="risk")).pools == [sentence]
    assert (await account(since, task="usual")).pools == []
    await join(ledger, "gpu", "risk")
    assert (await account(since)).pools == []
