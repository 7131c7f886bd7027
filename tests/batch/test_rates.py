"""Rates: how many runs of a task, or of one value of its parameter, begin within a period."""

from __future__ import annotations

import asyncio
import random
from collections import Counter, defaultdict
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError

from batch_system import Limit, Rate, TaskRegistry, clock
from batch_system.batch.execution.engine import LocalEngine
from batch_system.batch.execution.run_here import ManualRun
from batch_system.batch.ledger import rates
from batch_system.batch.ledger.runs import Claimed
from batch_system.batch.ledger.states import RunState
from batch_system.batch.queue import claiming
from batch_system.batch.queue.claiming import Capacity
from batch_system.batch.queue.turns import Turns
from batch_system.batch.tasks.registry import Task
from batch_system.database.engine import Database
from batch_system.errors import InvalidTask
from batch_system.operations.asking.results import Node
from batch_system.operations.runs import late
from batch_system.operations.runs.blocking import blocker_in_words
from batch_system.words import utc
from tests.batch.ledger_world import NODE, know, make_task, rows
from tests.batch.test_limits import claim, limited, mail, queue, tenants
from tests.batch.test_runs import ending, finish

MINUTE = timedelta(minutes=1)


def rated(rate: Rate, name: str = "mail", **attributes: Any) -> Task:
    return make_task(name, None, mail, rate=rate, **attributes)


async def finish_all(ledger: Database, claimed: Iterable[Claimed], **values: Any) -> None:
    await finish(ledger, *[ending(run, **values) for run in claimed])


async def test_no_more_runs_begin_within_a_period_than_the_rate_allows(ledger: Database) -> None:
    tasks = await know(ledger, rated(Rate(2, per=60, key="tenant")))
    await queue(ledger, tasks["mail"], *["acme"] * 5, "bolt")
    begins_at = clock.now()
    with clock.moved(begins_at):
        begun = await claim(ledger, tasks)
        assert await tenants(ledger) == {"acme": 2, "bolt": 1}
        await finish_all(ledger, begun)
    with clock.moved(begins_at + timedelta(seconds=59.9)):
        assert await claim(ledger, tasks) == []
    with clock.moved(begins_at + timedelta(seconds=60)):
        assert len(await claim(ledger, tasks)) == 2


async def test_a_rate_without_a_key_holds_for_all_runs_of_the_tasks_that_share_it(
    ledger: Database,
) -> None:
    shared = Rate(3, per=MINUTE, name="api")
    limit = Limit(2, key="tenant")
    tasks = await know(
        ledger, rated(shared, limit=limit), rated(shared, "post", limit=limit), rated(shared, "log")
    )
    for task in tasks.values():
        await queue(ledger, task, "acme", "bolt", "core")
    begins_at = clock.now()
    with clock.moved(begins_at):
        begun = await claim(ledger, tasks)
        assert len(begun) == 3
        await finish_all(ledger, begun)
        assert await claim(ledger, tasks) == []
    with clock.moved(begins_at + MINUTE):
        assert len(await claim(ledger, tasks)) == 3


async def test_a_retry_counts_and_a_run_that_goes_on_does_not(ledger: Database) -> None:
    tasks = await know(ledger, rated(Rate(1, per=60, key="tenant")))
    await queue(ledger, tasks["mail"], "acme")
    begins_at = clock.now()
    with clock.moved(begins_at):
        [claimed] = await claim(ledger, tasks)
        await finish(ledger, ending(claimed, RunState.INTERRUPTED, reason="it was drained"))
        [resumed] = await claim(ledger, tasks)
        later = begins_at + timedelta(seconds=5)
        await finish(ledger, ending(resumed, RunState.RETRYING, due_at=later, reason="it failed"))
    with clock.moved(later):
        assert await claim(ledger, tasks) == []
    with clock.moved(begins_at + MINUTE):
        assert len(await claim(ledger, tasks)) == 1


async def test_a_claim_that_is_rolled_back_takes_no_place(ledger: Database) -> None:
    tasks = await know(ledger, rated(Rate(1, per=60, key="tenant")))
    await queue(ledger, tasks["mail"], "acme")
    async with ledger.engine.begin() as connection:
        assert len((await claiming.take(connection, tasks, NODE, Capacity(9, 9)))[0]) == 1
        await connection.rollback()
    assert len(await claim(ledger, tasks)) == 1


async def test_a_lower_rate_holds_for_the_runs_that_began_under_a_higher_one(
    ledger: Database,
) -> None:
    tasks = await know(ledger, rated(Rate(5, per=60, key="tenant")))
    await queue(ledger, tasks["mail"], *["acme"] * 9)
    begins_at = clock.now()
    with clock.moved(begins_at):
        await finish_all(ledger, await claim(ledger, tasks))
    TaskRegistry.clear()
    lower = await know(ledger, rated(Rate(2, per=60, key="tenant")))
    with clock.moved(begins_at + timedelta(seconds=1)):
        assert await claim(ledger, lower) == []
    with clock.moved(begins_at + MINUTE):
        assert len(await claim(ledger, lower)) == 2


async def test_places_that_have_long_been_free_are_deleted(ledger: Database) -> None:
    tasks = await know(ledger, rated(Rate(5, per=60, key="tenant")))
    await queue(ledger, tasks["mail"], *["acme"] * 3)
    await claim(ledger, tasks)
    for after, left in ((timedelta(seconds=30), 3), (2 * MINUTE, 0)):
        async with ledger.engine.begin() as connection:
            await rates.prune(connection, clock.now() + after)
            assert await connection.scalar(select(func.count()).select_from(rates.rates)) == left


async def what_holds(ledger: Database, run: str) -> str:
    made: Any = Node.model_construct
    async with ledger.reader.connect() as connection:
        found = await late.waiting_of(connection, run, [made(tasks=["mail"])], clock.now())
    assert found is not None and found.blocker is not None
    return blocker_in_words(found.blocker)


async def test_it_is_said_how_many_have_begun_and_when_the_next_may(ledger: Database) -> None:
    tasks = await know(ledger, rated(Rate(1, per=60, key="tenant")))
    _, waiting = await queue(ledger, tasks["mail"], "acme", "acme")
    with clock.moved(datetime(2027, 3, 4, 5, 6, 7, tzinfo=UTC)):
        await claim(ledger, tasks)
        assert await what_holds(ledger, waiting) == (
            "1 of 1 of tenant=acme have begun within 60 seconds; "
            f"the next may begin at {utc(datetime(2027, 3, 4, 5, 7, 7, tzinfo=UTC))}"
        )


async def test_it_is_said_that_a_total_is_reached(ledger: Database) -> None:
    tasks = await know(ledger, limited(Limit(2, key="tenant", total=3)))
    *_, waiting = await queue(ledger, tasks["mail"], "acme", "acme", "bolt", "bolt")
    await claim(ledger, tasks)
    assert await what_holds(ledger, waiting) == "3 of 3 of mail are running"


@pytest.mark.rest
async def test_a_run_by_hand_counts_and_waits_for_the_rate(ledger: Database) -> None:
    loaded = await know(ledger, rated(Rate(1, per=60, key="tenant")))
    engine = LocalEngine(ledger, loaded, NODE, pools=())
    engine.start()

    def run_by_hand() -> asyncio.Task[dict[str, Any]]:
        by_hand = ManualRun(ledger, engine, loaded["mail"], NODE)
        return asyncio.create_task(by_hand.execute({"tenant": "acme"}, None, None))

    begins_at = clock.now()
    with clock.moved(begins_at):
        assert (await run_by_hand())["state"] == "succeeded"
        waiting = run_by_hand()
        await asyncio.sleep(0.1)
        assert len(await rows(ledger)) == 1
    with clock.moved(begins_at + MINUTE):
        assert (await waiting)["state"] == "succeeded"
    await engine.stop()


@pytest.mark.rest
@pytest.mark.parametrize("limit", [None, Limit(3, key="tenant", total=12)])
async def test_several_nodes_keep_a_rate_in_every_period(
    ledger: Database, limit: Limit | None
) -> None:
    """Four nodes claim at the same moments, some of which die before their commit."""
    rate, period = 4, timedelta(seconds=10)
    policies: Any = {"limit": limit} if limit is not None else {}
    tasks = await know(ledger, rated(Rate(rate, per=period, key="tenant"), **policies))
    chance = random.Random(7)
    keys = [f"t{number}" for number in range(8)]
    await queue(ledger, tasks["mail"], *chance.choices(keys, k=400))
    turns = [Turns() for _ in range(4)]

    async def node(number: int) -> list[Claimed]:
        try:
            async with ledger.engine.begin() as connection:
                found, _ = await claiming.take(
                    connection, tasks, NODE, Capacity(10, 10), turns=turns[number]
                )
                if chance.random() < 0.2:
                    raise ZeroDivisionError
                return found
        except (ZeroDivisionError, IntegrityError):
            return []

    now = clock.now()
    begun: dict[str, list[datetime]] = defaultdict(list)
    for _ in range(50):
        now += timedelta(seconds=chance.choice([0, 0.5, 1, 3, 9.9]))
        with clock.moved(now):
            claimed = [run for each in await asyncio.gather(*map(node, range(4))) for run in each]
            for run in claimed:
                begun[str((run.params or {})["tenant"])].append(now)
            await finish_all(ledger, claimed)
    assert begun.keys() == set(keys)
    for instants in begun.values():
        for first, beyond in zip(instants, instants[rate:], strict=False):
            assert beyond - first >= period
    most = max(Counter(at for at in instants).most_common(1)[0][1] for instants in begun.values())
    assert most > 1  # the places are used


@pytest.mark.parametrize(
    ("rate", "attributes", "said"),
    [
        ((0, 60), {}, "Rate(number) is 0; allowed: an int from 1 to 1,000"),
        ((1, 0), {}, "Rate(per) is 0; allowed: seconds above 0 (up to 31 days), or a timedelta"),
        ((1, timedelta(days=40)), {}, "allowed: seconds above 0 (up to 31 days), or a timedelta"),
        ((1, float("nan")), {}, "Rate(per) is nan; allowed: seconds above 0"),
        ((1, 60, "nope"), {}, "Rate(key) is 'nope', which is no parameter of run(); allowed: te"),
        ((1, 60, "x y"), {}, "Rate(key) is 'x y'; allowed: the name of a parameter of run()"),
        ((1, 60), {"max_running": 2}, "max_running is 2; allowed: None for a task with a rate"),
        ((1, 60), {"overlap": "wait"}, "overlap is 'wait'; allowed: 'allow', which a rate implies"),
        (
            (1, 60, "number"),
            {"limit": Limit(1, key="tenant")},
            "Rate(key) is 'number'; allowed: 'tenant', as in the Limit of the task, or a Rate with",
        ),
        (
            (1, 60, "tenant"),
            {"limit": Limit(1, key="tenant", name="erp")},
            "Rate(name) is None; allowed: 'erp', as in the Limit of the task, or a Rate without a",
        ),
    ],
)
def test_a_rate_that_can_not_hold_is_refused(
    rate: tuple[Any, ...], attributes: dict[str, Any], said: str
) -> None:
    with pytest.raises(InvalidTask) as refused:
        rated(Rate(*rate), **attributes)
    assert said in str(refused.value)


def test_a_rate_can_not_be_another_object() -> None:
    with pytest.raises(InvalidTask, match=r"rate is 5; allowed: a Rate\(…\), or None"):
        make_task("mail", None, mail, rate=5)
