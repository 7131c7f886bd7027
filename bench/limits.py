"""What does a limit with a key cost: a look at many waiting runs, and a run from its claim to its
end?

    python bench/limits.py [--runs 100000] [--keys 10000] [--rounds 30]

Each task has so many waiting runs. "none" has no limit; its runs have no queue. "limit" has
`Limit(2, key="tenant")`, "total" has one with `total=1000`, "rate" has `Rate(10, per=60,
key="tenant")`, "function" has a limit whose numbers are in the ledger. A look finds the first runs
that may start, and is rolled back. A round claims 100 runs in one transaction and ends them in
another one. The tasks take turns.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from statistics import median
from typing import Any

import uvloop
from machine import describe, print_table, version_of
from sqlalchemy import text

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from batch_system import BaseTask, Limit, Rate, TaskRegistry, logs
from batch_system.batch.firing import task_sync
from batch_system.batch.ledger import database_time, limit_numbers, runs, transitions
from batch_system.batch.ledger.attempts import Outcome
from batch_system.batch.ledger.limit_numbers import Answer
from batch_system.batch.ledger.migration import LEDGER_HISTORY
from batch_system.batch.ledger.runs import NewRun
from batch_system.batch.ledger.states import RunState
from batch_system.batch.ledger.tables import new_id
from batch_system.batch.queue import claiming
from batch_system.batch.queue.claiming import Capacity
from batch_system.batch.queue.turns import Turns
from batch_system.batch.tasks.registry import Task
from batch_system.database.engine import Database
from batch_system.database.migrate import migrate
from batch_system.testing.postgres import PostgresServer, start_server

GOALS = {"sqlite": 0.5, "postgresql": 2.0}
"""The milliseconds of a look for one run at 100,000 waiting ones of 10,000 keys."""
GOAL = 1.3
"""How many times a claim without a limit one with a limit may take."""
SIZES = (1, 10, 100)
NODE = new_id()

POLICIES: dict[str, dict[str, Any]] = {
    "none": {"overlap": "allow"},
    "limit": {"limit": Limit(2, key="tenant")},
    "total": {"limit": Limit(2, key="tenant", total=1_000)},
    "rate": {"rate": Rate(10, per=60, key="tenant")},
    "function": {"limit": Limit(len, key="tenant", default=2)},
}


async def run(self: Any, tenant: str = "nobody") -> None: ...


def declared() -> dict[str, Task]:
    for name, policies in POLICIES.items():
        attributes = {"name": name, "schedule": None, "run": run, **policies}
        TaskRegistry.register(type(name, (BaseTask,), attributes))
    return {name: TaskRegistry.get(name) for name in POLICIES}


async def fill(ledger: Database, tasks: dict[str, Task], number: int, keys: int) -> None:
    await migrate(ledger, LEDGER_HISTORY)
    async with ledger.engine.begin() as connection:
        now = await database_time.now_of(connection)
        await task_sync.record_tasks(connection, tasks, now)
    for task in tasks.values():
        for first in range(0, number, 5_000):
            async with ledger.engine.begin() as connection:
                await runs.insert(
                    connection, new_runs(task, range(first, first + 5_000), keys, now)
                )
    async with ledger.engine.begin() as connection:
        queues = {tasks["function"].queueing.of({"tenant": f"t{key}"}) for key in range(keys)}
        answers = [Answer(queue or "", 2) for queue in queues]
        await limit_numbers.store(connection, "function", answers, now)
    async with ledger.engine.connect() as connection:
        connection = await connection.execution_options(isolation_level="AUTOCOMMIT")
        await connection.execute(text("ANALYZE"))


def new_runs(task: Task, numbers: range, keys: int, now: Any) -> list[NewRun]:
    found = []
    for number in numbers:
        params = {"tenant": f"t{number % keys}"}
        queue = task.queueing.of(params)
        found.append(
            NewRun.queued(task.name, None, now, exclusive=queue, priority=0, params=params)
        )
    return found


async def milliseconds(work: Callable[[], Awaitable[Any]]) -> float:
    began_at = time.perf_counter()
    await work()
    return (time.perf_counter() - began_at) * 1000


async def look(ledger: Database, task: Task, size: int, turns: Turns) -> float:
    async with ledger.engine.begin() as connection:
        took = await milliseconds(
            lambda: claiming.startable(
                connection, {task.name: task}, Capacity(size, size), locks=True, turns=turns
            )
        )
        await connection.rollback()
    return took


async def round_of(ledger: Database, task: Task, turns: Turns) -> tuple[float, float]:
    """The milliseconds of the claim of 100 runs, and of all until they have ended."""
    began_at = time.perf_counter()
    async with ledger.engine.begin() as connection:
        claimed, _ = await claiming.take(
            connection, {task.name: task}, NODE, Capacity(100, 100), turns=turns
        )
        now = await database_time.now_of(connection)
    claimed_at = time.perf_counter()
    if len(claimed) != 100:
        raise SystemExit(f"{len(claimed)} runs of {task.name} instead of 100")
    outcomes = [
        Outcome(
            id=each.id,
            fence=each.fence,
            state=RunState.SUCCEEDED,
            outcome=RunState.SUCCEEDED,
            number=each.attempt,
            node=NODE,
            task=task.name,
            started_at=now,
            ended_at=now,
        )
        for each in claimed
    ]
    async with ledger.engine.begin() as connection:
        await transitions.finish(connection, outcomes)
    ended_at = time.perf_counter()
    return (claimed_at - began_at) * 1000, (ended_at - began_at) * 1000


async def measure(ledger: Database, rounds: int, is_goal: bool) -> list[list[list[str]]]:
    tasks = {name: TaskRegistry.get(name) for name in POLICIES}
    turns = {name: Turns() for name in tasks}
    goal = GOALS[ledger.kind]
    looks = [["a look, ms", *(f"{size} may start" for size in SIZES), f"<= {goal:g} for 1"]]
    for name, task in tasks.items():
        took = {
            size: [await look(ledger, task, size, turns[name]) for _ in range(rounds)]
            for size in SIZES
        }
        first = median(took[1])
        verdict = ("yes" if first <= goal else "no") if is_goal else "-"
        looks.append([name, *(f"{median(took[size]):.2f}" for size in SIZES), verdict])
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in tasks}
    for _ in range(rounds):
        for name, task in tasks.items():
            found[name].append(await round_of(ledger, task, turns[name]))
    claims = [["100 runs, ms", "claim", "x none", f"<= {GOAL:g}", "claim and end", "x none"]]
    for name, pairs in found.items():
        claim, whole = (median(column) for column in zip(*pairs, strict=True))
        ratios = [
            median(
                mine[part] / other[part] for mine, other in zip(pairs, found["none"], strict=True)
            )
            for part in (0, 1)
        ]
        verdict = "yes" if ratios[0] <= GOAL else "no"
        claims.append(
            [name, f"{claim:.1f}", f"{ratios[0]:.2f}", verdict, f"{whole:.1f}", f"{ratios[1]:.2f}"]
        )
    return [looks, claims]


async def both(server: PostgresServer, options: argparse.Namespace) -> dict[str, Any]:
    tables = {}
    tasks = declared()
    is_goal = (options.runs, options.keys) == (100_000, 10_000)
    for name in ("SQLite", "PostgreSQL"):
        is_sqlite = name == "SQLite"
        url = (
            f"sqlite+aiosqlite:///{os.getcwd()}/ledger.db"
            if is_sqlite
            else await server.create_database()
        )
        ledger = Database(url, setting="LEDGER_URL")
        await fill(ledger, tasks, options.runs, options.keys)
        tables[name] = await measure(ledger, options.rounds, is_goal)
        await ledger.dispose()
    return tables


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--keys", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    logs.set_up("WARNING")
    with start_server(fast=False) as server, tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        describe(postgresql=asyncio.run(version_of(server.url)))
        for name, tables in uvloop.run(both(server, options)).items():
            for table in tables:
                print_table(
                    f"{name}: {options.runs:,} waiting runs of {options.keys:,} keys", table
                )


if __name__ == "__main__":
    main()
