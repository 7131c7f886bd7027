"""What a limit or a rate means beside the other policies of a task: a test for each row of the
table in docs/policies.md, section "Limits and rates". The first row is in test_limits.py.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import update

from batch_system import Limit, Part, PartitionedTask, Rate, TaskRegistry, clock
from batch_system.batch.firing import pauses
from batch_system.batch.ledger.states import Rank, RunState
from batch_system.batch.ledger.tables import runs
from batch_system.batch.queue import claiming
from batch_system.batch.queue.cancel import request_cancel
from batch_system.batch.queue.claiming import Capacity
from batch_system.batch.queue.turns import Turns
from batch_system.database.engine import Database
from tests.batch.ledger_world import NODE, know, rows
from tests.batch.test_limits import claim, limited, queue
from tests.batch.test_rates import rated
from tests.batch.test_runs import ending, finish, insert, new

pytestmark = pytest.mark.rest

ONE = Limit(1, key="tenant")
OF_ACME: dict[str, Any] = {"exclusive": "mail[tenant=acme]", "params": {"tenant": "acme"}}


async def test_a_run_that_waits_for_other_runs_takes_no_lane(ledger: Database) -> None:
    tasks = await know(ledger, limited(ONE))
    due_at = clock.now() + timedelta(hours=1)
    await insert(ledger, new("mail", state=RunState.WAITING, due_at=due_at, **OF_ACME))
    [run] = await queue(ledger, tasks["mail"], "acme")
    assert [claimed.id for claimed in await claim(ledger, tasks)] == [run]


async def test_parts_have_lanes_of_their_own_and_their_run_keeps_its_lane(
    ledger: Database,
) -> None:
    class Mail(PartitionedTask):
        name, schedule, parallel, limit = "mail", None, 2, ONE

        async def split(self, tenant: str = "acme") -> list[Part]:
            return []

        async def work(self, part: Part) -> None: ...

    TaskRegistry.register(Mail)
    tasks = await know(ledger, TaskRegistry.get("mail"))
    split = new(
        "mail",
        state=RunState.WAITING,
        attempt=1,
        due_at=clock.now() + timedelta(hours=1),
        **OF_ACME,
    )
    parts = [new("mail", exclusive=tasks["mail"].queue_of_parts, parent=split.id) for _ in range(3)]
    await insert(ledger, split, *parts)
    _, other = await queue(ledger, tasks["mail"], "acme", "bolt")
    claimed = {each.id for each in await claim(ledger, tasks)}
    assert other in claimed
    assert len(claimed & {part.id for part in parts}) == 2
    assert len(claimed) == 3


@pytest.mark.parametrize(
    ("total", "rate"), [(1, None), (None, Rate(1, per=3_600))], ids=["total", "rate"]
)
async def test_a_run_goes_on_after_its_parts_although_the_total_or_the_rate_is_reached(
    ledger: Database, total: int | None, rate: Rate | None
) -> None:
    """It holds a lane and has begun. It would wait for itself, or for the next period."""
    tasks = await know(ledger, limited(Limit(2, key="tenant", total=total), rate=rate))
    await queue(ledger, tasks["mail"], *["a", "b"] * 5)
    [begun] = await claim(ledger, tasks)
    await finish(ledger, ending(begun, RunState.WAITING, due_at=clock.now()))
    assert await claim(ledger, tasks) == []
    parts_have_ended = {"state": RunState.QUEUED, "rank": Rank.JOINING}
    async with ledger.engine.begin() as connection:
        await connection.execute(update(runs).where(runs.c.id == begun.id).values(parts_have_ended))
    [again] = await claim(ledger, tasks)
    assert (again.id, again.attempt) == (begun.id, begun.attempt)
    assert await claim(ledger, tasks) == []


async def test_an_interrupted_run_goes_on_although_the_rate_of_all_keys_is_reached(
    ledger: Database,
) -> None:
    tasks = await know(ledger, rated(Rate(1, per=3_600)))
    await queue(ledger, tasks["mail"], "a", "b")
    [begun] = await claim(ledger, tasks)
    await finish(ledger, ending(begun, RunState.INTERRUPTED, rank=Rank.INTERRUPTED))
    [again] = await claim(ledger, tasks)
    assert again.id == begun.id
    assert await claim(ledger, tasks) == []


async def test_the_limit_holds_over_all_pools_and_nodes(ledger: Database) -> None:
    tasks = await know(ledger, limited(ONE, pool="gpu"))
    await queue(ledger, tasks["mail"], "acme", "acme")

    async def claimed_by(pools: dict[str, int | None]) -> int:
        async with ledger.engine.begin() as connection:
            found, _ = await claiming.take(
                connection, tasks, NODE, Capacity(9, 9, pools), turns=Turns()
            )
            return len(found)

    assert await claimed_by({"default": None}) == 0
    assert await claimed_by({"gpu": 5}) == 1
    assert await claimed_by({"gpu": 5}) == 0


async def test_runs_that_a_pause_holds_take_no_lane(ledger: Database) -> None:
    tasks = await know(ledger, limited(ONE), limited(Limit(1, key="tenant"), "post"))
    for task in tasks.values():
        await queue(ledger, task, "acme")
    async with ledger.engine.begin() as connection:
        await pauses.pause(connection, "mail", "ann", tasks)
    assert [run.task for run in await claim(ledger, tasks)] == ["post"]
    async with ledger.engine.begin() as connection:
        await pauses.resume(connection, "mail")
    assert [run.task for run in await claim(ledger, tasks)] == ["mail"]


async def test_a_cancelled_run_gives_its_lane_back_when_it_has_ended(ledger: Database) -> None:
    tasks = await know(ledger, limited(ONE))
    await queue(ledger, tasks["mail"], "acme", "acme")
    [claimed] = await claim(ledger, tasks)
    async with ledger.engine.begin() as connection:
        state = await request_cancel(connection, claimed.id, "cancelled by ann", "ann")
    assert state == RunState.RUNNING
    assert await claim(ledger, tasks) == []
    await finish(ledger, ending(claimed, RunState.CANCELLED, reason="cancelled by ann"))
    assert len(await claim(ledger, tasks)) == 1


async def test_a_run_has_no_lane_while_it_waits_for_its_next_attempt(ledger: Database) -> None:
    tasks = await know(ledger, rated(Rate(2, per=60, key="tenant"), limit=ONE))
    first, second = await queue(ledger, tasks["mail"], "acme", "acme")
    begins_at = clock.now()
    with clock.moved(begins_at):
        [claimed] = await claim(ledger, tasks)
        due_at = begins_at + timedelta(seconds=5)
        await finish(ledger, ending(claimed, RunState.RETRYING, due_at=due_at, reason="it failed"))
        [other] = await claim(ledger, tasks)
        assert {claimed.id, other.id} == {first, second}
    with clock.moved(due_at):
        await finish(ledger, ending(other))
        assert await claim(ledger, tasks) == []  # the rate is reached
    with clock.moved(begins_at + timedelta(seconds=60)):
        assert [run.id for run in await claim(ledger, tasks)] == [claimed.id]
    assert [row["state"] for row in await rows(ledger, id=other.id)] == ["succeeded"]
