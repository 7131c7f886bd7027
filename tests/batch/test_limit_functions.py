"""Limits whose numbers a function returns."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import func, select

from batch_system import Limit, clock, limit_changed
from batch_system.batch.firing import limit_functions
from batch_system.batch.firing.limit_functions import LimitFunctions
from batch_system.batch.ledger import limit_numbers
from batch_system.batch.ledger.tables import runs
from batch_system.batch.nodes.outage import Outage
from batch_system.batch.queue import enqueue
from batch_system.batch.tasks.registry import Task
from batch_system.database.engine import Database
from batch_system.errors import InvalidParameters, InvalidTask
from batch_system.verbs.tasks import ListKeys
from tests.asking import operations_on
from tests.batch.ledger_world import know
from tests.batch.test_limits import claim, limited, queue, tenants
from tests.batch.test_rates import what_holds

PLANS = {"acme": 3, "bolt": 1, "stopped": 0}


def asking(ledger: Database, tasks: dict[str, Task]) -> LimitFunctions:
    return LimitFunctions(ledger, tasks, lambda: None, Outage())


async def numbers(ledger: Database) -> dict[str, int | None]:
    async with ledger.reader.connect() as connection:
        query = select(limit_numbers.limits.c.queue, limit_numbers.limits.c.number)
        found = await connection.execute(query)
        return {name.partition("=")[2].removesuffix("]"): number for name, number in found}


def plan_of(tenant: str) -> int:
    return PLANS[tenant]


async def plan_from_elsewhere(tenant: str) -> int:
    await asyncio.sleep(0)
    return PLANS[tenant]


def plans_of(tenants: list[str]) -> dict[str, int]:
    return {tenant: PLANS[tenant] for tenant in tenants if tenant in PLANS}


@pytest.mark.parametrize(
    ("function", "many"), [(plan_of, False), (plan_from_elsewhere, False), (plans_of, True)]
)
async def test_the_function_says_how_many_runs_of_each_key_may_run(
    ledger: Database, function: Callable[[Any], Any], many: bool
) -> None:
    limit = Limit(function, key="tenant", default=1, many=many)
    tasks = await know(ledger, limited(limit))
    await queue(ledger, tasks["mail"], *["acme"] * 5, *["bolt"] * 5, *["stopped"] * 5)
    await asking(ledger, tasks).look()
    assert await numbers(ledger) == PLANS
    await claim(ledger, tasks)
    assert await tenants(ledger) == {"acme": 3, "bolt": 1}
    assert {key.key: key.limit for key in (await keys(ledger)).keys} == {
        f"tenant={tenant}": number for tenant, number in PLANS.items()
    }


async def keys(ledger: Database) -> Any:
    return await operations_on(ledger)(ListKeys(name="mail"))


async def test_until_the_function_has_returned_the_default_holds(ledger: Database) -> None:
    tasks = await know(ledger, limited(Limit(plan_of, key="tenant", default=2)))
    await queue(ledger, tasks["mail"], *["acme"] * 5)
    await claim(ledger, tasks)
    assert await tenants(ledger) == {"acme": 2}


async def test_a_task_whose_limit_has_no_function_any_more_has_its_own_number(
    ledger: Database,
) -> None:
    by_function = Limit(plan_of, key="tenant", default=1)
    before = await know(ledger, limited(by_function), limited(by_function, "other"))
    await queue(ledger, before["mail"], *["acme"] * 5)
    await queue(ledger, before["other"], *["acme"] * 5)
    await asking(ledger, before).look()
    tasks = await know(ledger, limited(Limit(2, key="tenant")), limited(by_function, "other"))
    await claim(ledger, tasks)
    async with ledger.reader.connect() as connection:
        running = await connection.execute(
            select(runs.c.task, func.count()).where(runs.c.state == "running").group_by("task")
        )
        assert dict(running.all()) == {"mail": 2, "other": 3}


async def test_a_lower_number_lets_running_runs_end(ledger: Database) -> None:
    plans = {"acme": 3}
    tasks = await know(ledger, limited(Limit(plans.__getitem__, key="tenant", default=1)))
    await queue(ledger, tasks["mail"], *["acme"] * 5)
    functions = asking(ledger, tasks)
    await functions.look()
    await claim(ledger, tasks)
    plans["acme"] = 0
    with clock.moved(clock.now() + limit_numbers.EVERY):
        await functions.look()
    assert await claim(ledger, tasks) == []
    assert await tenants(ledger) == {"acme": 3}
    [*_, waiting] = await queue(ledger, tasks["mail"], "acme")
    assert await what_holds(ledger, waiting) == "3 of 0 of tenant=acme are running"


async def test_a_number_is_asked_for_once_a_minute_by_one_node(ledger: Database) -> None:
    calls: list[str] = []

    def plan(tenant: str) -> int:
        calls.append(tenant)
        return 1

    tasks = await know(ledger, limited(Limit(plan, key="tenant", default=1)))
    await queue(ledger, tasks["mail"], "acme", "bolt", "acme")
    nodes = [asking(ledger, tasks) for _ in range(3)]
    await asyncio.gather(*(node.look() for node in nodes))
    assert sorted(calls) == ["acme", "bolt"]
    with clock.moved(clock.now() + timedelta(seconds=61)):
        await asyncio.gather(*(node.look() for node in nodes))
    assert sorted(calls) == ["acme", "acme", "bolt", "bolt"]


@pytest.fixture
async def in_service(ledger: Database) -> AsyncIterator[None]:
    enqueue.use_service(ledger, lambda: None)
    yield
    enqueue.use_no_service()


@pytest.mark.usefixtures("in_service")
async def test_limit_changed_lets_the_function_be_called_at_once(ledger: Database) -> None:
    plans = {"acme": 1, "bolt": 1}
    tasks = await know(ledger, limited(Limit(plans.__getitem__, key="tenant", default=1)))
    await queue(ledger, tasks["mail"], "acme", "bolt")
    functions = asking(ledger, tasks)
    await functions.look()
    plans.update(acme=5, bolt=5)
    await limit_changed(tasks["mail"].cls, tenant="acme")
    await limit_changed(tasks["mail"].cls, tenant="unknown")
    await functions.look()
    assert await numbers(ledger) == {"acme": 5, "bolt": 1}
    with pytest.raises(InvalidParameters, match="the parameter is 'number'; allowed: tenant"):
        await limit_changed(tasks["mail"].cls, number=1)


def fails(tenant: str) -> int:
    raise ConnectionError("the billing service is away")


def returns_text(tenant: str) -> Any:
    return "three"


def hangs(tenant: str) -> Any:
    HANGING.wait(60)


async def waits_for_ever(tenant: str) -> Any:
    await asyncio.Event().wait()


HANGING = threading.Event()


@pytest.mark.parametrize(
    ("function", "many", "said"),
    [
        (fails, False, "ConnectionError: the billing service is away"),
        (returns_text, False, "it returned 'three'; allowed: an int from 0 to 1,000"),
        (returns_text, True, "it returned 'three'; allowed: a mapping to numbers"),
        (hangs, False, "it took more than 0.2 seconds"),
        (waits_for_ever, False, "it took more than 0.2 seconds"),
    ],
)
async def test_after_a_failure_the_number_before_it_holds_and_no_claim_waits(
    ledger: Database,
    monkeypatch: pytest.MonkeyPatch,
    function: Callable[[Any], Any],
    many: bool,
    said: str,
) -> None:
    monkeypatch.setattr(limit_functions, "CALL_SECONDS", 0.2)
    HANGING.clear()
    limit = Limit(function, key="tenant", default=1, many=many)
    tasks = await know(ledger, limited(limit))
    await queue(ledger, tasks["mail"], *["acme"] * 5, *["bolt"] * 5)
    async with ledger.engine.begin() as connection:
        task = tasks["mail"]
        before = clock.now() - timedelta(hours=1)
        known = limit_numbers.Answer(task.queueing.of({"tenant": "acme"}) or "", 3)
        await limit_numbers.store(connection, "mail", [known], before)
    looking = asyncio.create_task(asking(ledger, tasks).look())
    await claim(ledger, tasks)
    assert await tenants(ledger) == {"acme": 3, "bolt": 1}
    await looking
    HANGING.set()
    assert await numbers(ledger) == {"acme": 3, "bolt": None}
    async with ledger.reader.connect() as connection:
        later = clock.now() + timedelta(minutes=1)
        found = await limit_numbers.failing(connection, later, timedelta(0))
    assert (found["mail"].keys, found["mail"].error) == (2, said)


@pytest.mark.rest
async def test_the_functions_of_many_keys_are_called_in_some_turns(
    ledger: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limit_functions, "MOST_QUEUES", 10)
    tasks = await know(ledger, limited(Limit(len, key="tenant", default=1)))
    await queue(ledger, tasks["mail"], *[f"t{number:02}" for number in range(25)])
    functions = asking(ledger, tasks)
    for expected in (10, 20, 25, 25):
        await functions.look()
        assert len(await numbers(ledger)) == expected


async def test_numbers_that_nobody_has_needed_for_long_are_deleted(ledger: Database) -> None:
    tasks = await know(ledger, limited(Limit(plan_of, key="tenant", default=1)))
    await queue(ledger, tasks["mail"], "acme")
    await asking(ledger, tasks).look()
    for after, left in ((timedelta(days=6), 1), (timedelta(days=8), 0)):
        async with ledger.engine.begin() as connection:
            await limit_numbers.prune(connection, clock.now() + after)
            query = select(func.count()).select_from(limit_numbers.limits)
            assert await connection.scalar(query) == left


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        ({"number": plan_of, "default": 1}, "Limit(number) is a function; allowed: with a key"),
        (
            {"number": plan_of, "key": "tenant"},
            "Limit(default) is None; allowed: an int from 0 to 1,000, which holds until the func",
        ),
        (
            {"number": 2, "key": "tenant", "default": 3},
            "Limit(default) is 3; allowed: only with a function",
        ),
        (
            {"number": "two", "key": "tenant"},
            "Limit(number) is 'two'; allowed: an int from 1 to 1,000, or a function",
        ),
        (
            {"number": plan_of, "key": "tenant", "default": 1, "many": 1},
            "Limit(many) is 1; allowed: True or False",
        ),
    ],
)
def test_a_limit_with_a_function_that_can_not_hold_is_refused(
    limit: dict[str, Any], said: str
) -> None:
    with pytest.raises(InvalidTask) as refused:
        Limit(**limit)
    assert said in str(refused.value)
