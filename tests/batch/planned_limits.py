"""A ledger with a task of many keys, and the statements about limits and rates, whose plans
tests/batch/test_plans.py reads.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import datetime, timedelta

from sqlalchemy import text

from batch_system import Limit, Rate
from batch_system.batch.ledger import key_counts, limit_numbers, rates, runs
from batch_system.batch.ledger.limit_numbers import Answer
from batch_system.batch.ledger.states import Rank
from batch_system.batch.queue import claiming, enqueue, key_queues, left_queues
from batch_system.batch.queue.claiming import Capacity
from batch_system.batch.queue.key_queues import Conditions
from batch_system.batch.queue.requests import Startable, StartRequest, Starts
from batch_system.batch.queue.turns import Turns
from batch_system.batch.tasks.registry import Task
from batch_system.database.engine import Database
from tests.batch.ledger_world import NODE, know, make_task
from tests.batch.test_runs import new

Of = Callable[[str], AbstractContextManager[None]]

QUEUE = "mail[tenant=0]"
MINUTE = timedelta(minutes=1)


async def fill(ledger: Database, number: int, now: datetime) -> dict[str, Task]:
    """So many waiting runs of a tenth as many keys, places of a rate, and numbers of limits."""

    async def mail(self: object, tenant: str = "nobody") -> None: ...

    limit = Limit(lambda _: 2, key="tenant", default=2, total=20, backlog=100)
    rate = Rate(5, per=60, key="tenant")
    task = make_task("mail", None, mail, limit=limit, rate=rate)
    tasks = await know(ledger, task, make_task("had-limit", None, mail))
    queues = [f"mail[tenant={n}]" for n in range(number // 10)]
    async with ledger.engine.begin() as connection:
        await runs.insert(
            connection,
            [
                new("mail", exclusive=queue, params={"tenant": queue})
                for queue in queues
                for _ in range(10)
            ],
        )
        others = [f"post[tenant={n}]" for n in range(number)]
        await rates.take(connection, [(queue, 1, -60.0) for queue in others], now)
        answers = [Answer(queue, 3) for queue in others]
        await limit_numbers.store(connection, "mail", answers, now)
        if ledger.kind == "postgresql":
            await connection.execute(text("ANALYZE"))
    return tasks


async def send(ledger: Database, tasks: dict[str, Task], of: Of, now: datetime) -> None:
    task = tasks["mail"]
    params = {"tenant": "0"}
    async with ledger.engine.begin() as connection:
        urgent = Starts((StartRequest(Startable.of(task), params, priority="high"),))
        await enqueue.write(connection, urgent, "")
        with of("claim with a limit"):
            await claiming.take(connection, tasks, NODE, Capacity(5, 5), turns=Turns())
        for rank in (Rank.JOINING, Rank.INTERRUPTED):
            conditions = Conditions(now, retries=True, have_numbers=True)
            with of("first of all keys"):
                await key_queues.read_queues_of_rank(connection, rank, tasks, 5, 5, conditions)
        with of("start with a limit"):
            await enqueue.write(connection, Starts((StartRequest(Startable.of(task), params),)), "")
        with of("keys"):
            await key_queues.behind(connection, {"mail": ""}, 100, retries=True)
            await key_counts.running(connection, "mail[", "", 100)
            await key_counts.counted(connection, "mail", [QUEUE])
            await key_counts.failing(connection, "mail", "", 100)
        with of("gauges of limits"):
            await key_counts.of_tasks(connection)
        with of("rate"):
            await rates.begun(connection, QUEUE, now)
        with of("function of a limit"):
            await limit_numbers.due(connection, "mail", [QUEUE], now)
            await limit_numbers.mark(connection, "mail", [QUEUE], now)
            answers = [Answer(QUEUE, None, "it failed")]
            await limit_numbers.store(connection, "mail", answers, now)
            await limit_numbers.ask_again(connection, QUEUE, now)
            await limit_numbers.failing(connection, now, MINUTE)
        with of("prune limits"):
            await rates.prune(connection, now - 2 * MINUTE)
            await limit_numbers.prune(connection, now)
        before = [new("mail", exclusive=None), new("had-limit", exclusive="had-limit[tenant=1]")]
        await runs.insert(connection, before)
    with of("left queues"):
        assert await left_queues.rejoin(ledger, tasks) == {"mail": 1, "had-limit": 1}
