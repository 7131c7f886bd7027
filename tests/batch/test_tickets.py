"""Tickets: a node on tickets claims only for these, and services place as many as are needed, one
service at a time.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from sqlalchemy import update

from batch_system import Retry, clock
from batch_system.batch.execution import tickets as tickets_module
from batch_system.batch.execution.engine import LocalEngine
from batch_system.batch.execution.tickets import Tickets
from batch_system.batch.ledger import database_time, duties, tables
from batch_system.batch.nodes.outage import Outage
from batch_system.batch.placing.demand import demand, running
from batch_system.batch.placing.placer import Needs
from batch_system.batch.placing.placing import DUTY, SHORTEST_PAUSE, Placing
from batch_system.batch.tasks.registry import Task
from batch_system.database.engine import Database
from tests.batch.ledger_world import NODE, know, make_task, rows, until
from tests.batch.test_leases import put_node
from tests.batch.test_runs import insert, new

POOL = {"pool": "cpu"}


@asynccontextmanager
async def on_tickets(
    ledger: Database,
    loaded: dict[str, Task],
    places: int = 4,
    may_work: Callable[[], bool] = lambda: True,
) -> AsyncIterator[tuple[LocalEngine, Tickets]]:
    tickets = Tickets()
    engine = LocalEngine(
        ledger,
        loaded,
        NODE,
        places,
        places,
        pools={"cpu"},
        tickets=tickets,
        may_work=may_work,
        child_pools={},
    )
    engine.start()
    yield engine, tickets
    await engine.drain(5)
    await engine.stop()


async def test_a_ticket_executes_runs_of_its_task_until_there_is_none_and_nothing_else_is_claimed(
    ledger: Database,
) -> None:
    loaded = await know(ledger, make_task("a", None, **POOL), make_task("b", None, **POOL))
    await insert(ledger, *(new(name) for name in ("a", "a", "a", "b")))
    async with on_tickets(ledger, loaded) as (engine, tickets):
        engine.wake()
        assert await tickets.use("a", 30) is False
    assert Counter((row["task"], row["state"]) for row in await rows(ledger)) == {
        ("a", "succeeded"): 3,
        ("b", "queued"): 1,
    }


async def test_each_ticket_has_one_run_at_a_time(ledger: Database) -> None:
    together, most = Counter[str](), Counter[str]()

    async def run(_: object) -> None:
        together["now"] += 1
        most["now"] = max(most["now"], together["now"])
        await asyncio.sleep(0.02)
        together["now"] -= 1

    loaded = await know(ledger, make_task("a", None, run=run, overlap="allow", **POOL))
    await insert(ledger, *(new("a", exclusive=None) for _ in range(9)))
    async with on_tickets(ledger, loaded) as (_, tickets):
        await asyncio.gather(*(tickets.use("a", 30) for _ in range(3)))
    assert most["now"] == 3
    assert {row["state"] for row in await rows(ledger)} == {"succeeded"}


async def test_a_ticket_whose_time_is_over_claims_no_further_run_and_ends_the_one_it_has(
    ledger: Database,
) -> None:
    loaded = await know(ledger, make_task("a", None, **POOL))
    await insert(ledger, new("a"), new("a"))
    async with on_tickets(ledger, loaded) as (_, tickets):
        assert await tickets.use("a", 0.0) is True
    assert [row["state"] for row in await rows(ledger)] == ["succeeded", "queued"]


async def test_a_doubled_ticket_or_one_of_an_unknown_task_ends_at_once(ledger: Database) -> None:
    loaded = await know(ledger, make_task("a", None, **POOL))
    await insert(ledger, new("a"))
    async with on_tickets(ledger, loaded) as (_, tickets):
        assert (
            await asyncio.gather(*(tickets.use(name, 30) for name in ("a", "a", "nobody")))
            == [False] * 3
        )
    assert [row["state"] for row in await rows(ledger)] == ["succeeded"]


async def test_a_retry_without_a_wait_is_executed_by_the_same_ticket(ledger: Database) -> None:
    def run(_: object) -> None:
        raise ValueError

    loaded = await know(
        ledger, make_task("a", None, run=run, retry=Retry(attempts=2, wait=0), **POOL)
    )
    await insert(ledger, new("a"))
    async with on_tickets(ledger, loaded) as (_, tickets):
        await tickets.use("a", 30)
    assert [(row["state"], row["attempt"]) for row in await rows(ledger)] == [("failed", 2)]


async def test_a_ticket_waits_a_while_for_a_node_that_has_lost_its_lease_and_then_ends(
    ledger: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tickets_module, "PATIENCE_SECONDS", 0.05)
    loaded = await know(ledger, make_task("a", None, **POOL))
    await insert(ledger, new("a"))
    async with on_tickets(ledger, loaded, may_work=lambda: False) as (_, tickets):
        assert await tickets.use("a", 0.0) is False
    assert [row["state"] for row in await rows(ledger)] == ["queued"]


async def test_a_drain_ends_tickets_and_takes_no_more_of_them(ledger: Database) -> None:
    may_end = asyncio.Event()

    async def run(_: object) -> None:
        await may_end.wait()

    loaded = await know(ledger, make_task("a", None, run=run, **POOL), make_task("b", None, **POOL))
    await insert(ledger, new("a"), new("a"))
    async with on_tickets(ledger, loaded) as (engine, tickets):
        using = asyncio.create_task(tickets.use("a", 30))
        await until(lambda: rows(ledger, state="running"))
        engine.begin_drain()
        assert await tickets.use("b", 30) is False
        may_end.set()
        assert await using is True
    assert [row["state"] for row in await rows(ledger)] == ["succeeded", "queued"]


async def wanted(
    ledger: Database, loaded: dict[str, Task], places: int
) -> dict[str, tuple[int, int]]:
    async with ledger.reader.connect() as connection:
        found = await demand(connection, loaded, "cpu", places, await running(connection))
    return {name: (one.tickets, one.priority) for name, one in found.items()}


async def test_as_many_tickets_are_wanted_as_may_start_or_are_running_bounded_by_the_places(
    ledger: Database,
) -> None:
    loaded = await know(
        ledger,
        make_task("many", None, overlap="allow", **POOL),
        make_task("single", None, **POOL),
        make_task("urgent", None, priority=9, **POOL),
        make_task("other", None),
    )
    await insert(
        ledger,
        *(new("many", exclusive=None) for _ in range(50)),
        new("single"),
        new("single"),
        new("other"),
    )
    assert await wanted(ledger, loaded, 0) == {}
    assert await wanted(ledger, loaded, 4) == {"many": (8, 0), "single": (1, 0)}
    assert await wanted(ledger, loaded, 40) == {"many": (50, 0), "single": (1, 0)}
    await insert(ledger, new("urgent", priority=9))
    assert list((await wanted(ledger, loaded, 4)).items()) == [
        ("urgent", (1, 9)),
        # No more than twice the equal share of one of three tasks, so that each has its turn.
        ("many", (6, 0)),
        ("single", (1, 0)),
    ]
    of_single = await rows(ledger, task="single")
    async with ledger.engine.begin() as connection:
        begun = update(tables.runs).where(tables.runs.c.id == of_single[0]["id"])
        values = {
            "state": "running",
            "node": NODE,
            "fence": 1,
            "attempt": 1,
            "started_at": clock.now(),
        }
        await connection.execute(begun.values(values | {"attempt_started_at": clock.now()}))
    assert (await wanted(ledger, loaded, 40))["single"] == (1, 0)


async def test_each_task_has_a_ticket_however_many_runs_wait_before_its_own(
    ledger: Database,
) -> None:
    """There may be no place for those before it: no worker has their memory, or their file."""
    names = [f"small-{number}" for number in range(40)]
    smalls = (make_task(name, None, overlap="allow", **POOL) for name in names)
    loaded = await know(
        ledger, make_task("big", None, overlap="allow", memory="1 PiB", **POOL), *smalls
    )
    await insert(ledger, *(new("big", exclusive=None, priority=1) for _ in range(100)))
    await insert(ledger, *(new(name, exclusive=None) for name in names for _ in range(5)))
    found = await wanted(ledger, loaded, 2)
    assert found["big"] == (1, 1)
    assert found.keys() == loaded.keys()
    assert {tickets for tickets, _ in found.values()} == {1}


class Noted:
    """A placer that records its calls."""

    def __init__(self, places: int = 4) -> None:
        self.number, self.is_closed = places, False
        self.told: list[tuple[str, int, Needs]] = []

    async def places(self) -> int:
        return self.number

    async def place(self, task: str, tickets: int, needs: Needs) -> None:
        self.told.append((task, tickets, needs))

    async def close(self) -> None:
        self.is_closed = True


async def test_a_service_places_tickets_with_what_they_need_and_takes_them_back(
    ledger: Database,
) -> None:
    task = make_task("a", None, memory="1 GiB", priority=3, **POOL)
    loaded, node, noted = await know(ledger, task), await put_node(ledger, fires=True), Noted()
    placing = Placing(ledger, node, loaded, {"cpu": noted}, Outage())
    run = new("a", priority=3)
    await insert(ledger, run)
    await placing._turn()
    assert noted.told == [("a", 1, Needs("cpu", 2**30, 3))]
    async with ledger.engine.begin() as connection:
        await connection.execute(
            update(tables.runs).where(tables.runs.c.id == run.id).values(state="cancelled")
        )
    await placing._turn()
    assert noted.told[1:] == [("a", 0, Needs("cpu"))]
    await placing._turn()
    assert len(noted.told) == 2


async def test_one_service_at_a_time_places_and_another_one_when_it_has_ended(
    ledger: Database,
) -> None:
    loaded = await know(ledger, make_task("a", None, **POOL))
    await insert(ledger, new("a"))
    first, second = await put_node(ledger, fires=True), await put_node(ledger, fires=True)
    by_first, by_second = Noted(), Noted()
    one = Placing(ledger, first, loaded, {"cpu": by_first}, Outage())
    other = Placing(ledger, second, loaded, {"cpu": by_second}, Outage())
    await one._turn()
    await other._turn()
    assert (len(by_first.told), len(by_second.told)) == (1, 0)
    async with ledger.engine.begin() as connection:
        now = await database_time.now_of(connection)
        assert not await duties.is_free(connection, DUTY, 15.0)
        await connection.execute(
            update(tables.nodes).where(tables.nodes.c.id == first).values(stopped_at=now)
        )
    await other._turn()
    await one._turn()
    assert (len(by_first.told), len(by_second.told)) == (1, 1)
    async with ledger.reader.connect() as connection:
        assert await duties.holder(connection, DUTY) == second


async def test_an_idle_service_does_not_look_and_a_poll_with_something_to_do_wakes_it(
    ledger: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = await know(ledger, make_task("a", None, **POOL))
    node, noted = await put_node(ledger, fires=True), Noted()
    placing = Placing(ledger, node, loaded, {"cpu": noted}, Outage())
    turn, looks = placing._turn, 0

    async def counted() -> None:
        nonlocal looks
        await turn()
        looks += 1

    monkeypatch.setattr(placing, "_turn", counted)
    placing.start()
    await until(lambda: asyncio.sleep(0, looks))
    async with ledger.reader.connect() as connection:
        assert await duties.holder(connection, DUTY) == node
    await insert(ledger, new("a"))
    await asyncio.sleep(2 * SHORTEST_PAUSE)
    assert (looks, noted.told) == (1, [])
    placing.wake()

    async def told() -> bool:
        return bool(noted.told)

    await until(told)
    await placing.stop()
    assert noted.is_closed
