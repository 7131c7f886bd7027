"""Does what a service does all the time cost the same whatever else stands in the ledger?

    python bench/growth.py [--runs 100000 1000000] [--tasks 10000] [--nodes 100] [--loops 5000]
                           [--rounds 100]

Five things are timed, by the functions that a service and `batch runs` call, each in a transaction
of its own:

- a firing: a slot that is due becomes a run, and the cursor is moved;
- a claim: a run that waits is found and taken (its outcome is written after that, untimed);
- a look: what an idle node asks once a second;
- a chunk of ten rows, with its place and its fence; beside it so many places of other runs;
- `batch runs`: the newest fifty.

Each of them on ledgers that differ in one thing from the first, in which there are ten tasks, a
node, and no other run: as many runs of another task of this node, all of which may start; so many
other runs (a quarter each is over, queued for tasks that this node has not loaded, queued for
paused tasks, and retried tomorrow; half of them are in a queue, half may run at once), so many
tasks, all loaded by this node, and so many nodes. The ledgers take turns, so that whatever the
machine does meanwhile meets all. The figures are lower quartiles: what else it does makes some of
them longer, and none shorter.

After that a run has gone through 4,900 loops of one chunk, each with a name of its own, as inner
loops have. The next hundred take turns with the first hundred of another run.
"""

from __future__ import annotations

import argparse
import asyncio
import contextvars
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from statistics import quantiles
from typing import Any

import uvloop
from machine import describe, print_table, version_of
from services import queued
from sqlalchemy import insert, select, text

from batch_system.batch.ledger import database_time, run_query, transitions
from tests.migrations import APPLICATION_HISTORIES

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from batch_system import BaseTask, TaskRegistry, logs
from batch_system.batch.context import current_run, fencing
from batch_system.batch.context.attempt_state import AttemptState
from batch_system.batch.context.current_run import CurrentRun
from batch_system.batch.firing import firing, task_sync
from batch_system.batch.ledger import runs
from batch_system.batch.ledger.attempts import Outcome
from batch_system.batch.ledger.migration import LEDGER_HISTORY
from batch_system.batch.ledger.runs import Claimed
from batch_system.batch.ledger.states import Origin, RunState
from batch_system.batch.ledger.tables import new_id
from batch_system.batch.nodes import ledger_poll
from batch_system.batch.queue import claiming
from batch_system.batch.queue.claiming import Capacity
from batch_system.batch.tasks.registry import Task
from batch_system.database.engine import Database
from batch_system.database.migrate import migrate
from batch_system.database.session import use_application_database
from batch_system.testing.postgres import PostgresServer, start_server
from service.application.models import User
from tests.batch.crowd import crowd, words

GOAL = 1.5
NODE = new_id()
MINUTE = timedelta(minutes=1)
PRACTICE = 10
ITEMS = 10
WINDOW = 100


async def nothing(self: BaseTask) -> None:
    pass


def make_tasks(number: int) -> dict[str, Task]:
    """`mine`, which is fired and claimed, `own` for a backlog, and so many more."""
    for name in ("mine", "own", *(f"many-{n}" for n in range(number))):
        attributes = {
            "name": name,
            "schedule": "* * * * *" if name == "mine" else "0 0 1 1 *",
            "run": nothing,
        }
        TaskRegistry.register(type(name.title().replace("-", ""), (BaseTask,), attributes))
    return TaskRegistry.tasks()


@dataclass
class Ledger:
    """One that the others are compared with, or that differs from it in one thing; what each took,
    in ms.
    """

    name: str
    database: Database
    application: Database
    heartbeat: Database
    """The connection of the heartbeat, which has looked once when the ledger was empty."""
    tasks: dict[str, Task]
    due: datetime
    """Up to where the slots of `mine` have been fired."""
    took: dict[str, list[float]] = field(default_factory=dict)

    async def measure(self) -> None:
        """Each thing once."""
        for what, do in MEASURED.items():
            self.took.setdefault(what, []).append(await do(self) * 1000)


async def fire(ledger: Ledger) -> float:
    """The task's only run that is active is over before, so that each slot has a run of its own."""
    ledger.due += MINUTE
    began_at = time.perf_counter()
    async with ledger.database.engine.begin() as connection:
        fired = await firing.fire(
            connection, ["mine"], ledger.tasks, NODE, Capacity(1, 1), ledger.due, ahead={}
        )
    took = time.perf_counter() - began_at
    await finish(ledger, fired.claimed)
    return took


async def claim(ledger: Ledger) -> float:
    (new,) = queued(["mine"])
    async with ledger.database.engine.begin() as connection:
        await runs.insert(connection, [replace(new, exclusive="mine", priority=1)])
    began_at = time.perf_counter()
    async with ledger.database.engine.begin() as connection:
        claimed, _ = await claiming.take(connection, ledger.tasks, NODE, Capacity(1, 1))
    took = time.perf_counter() - began_at
    await finish(ledger, claimed)
    return took


async def finish(ledger: Ledger, claimed: list[Claimed]) -> None:
    """Ends the bench when there is not exactly one: then the figures are worth nothing."""
    (one,) = claimed
    ends = (
        one.id,
        one.fence,
        RunState.SUCCEEDED,
        "succeeded",
        1,
        NODE,
        one.task,
        one.attempt_started_at,
    )
    async with ledger.database.engine.begin() as connection:
        if await transitions.finish(connection, [Outcome(*ends, ended_at=one.attempt_started_at)]):
            raise SystemExit("an outcome was not written: the figures are worth nothing")


async def look(ledger: Ledger) -> float:
    began_at = time.perf_counter()
    async with ledger.heartbeat.reader.connect() as connection:
        await ledger_poll.read(connection, NODE)
    return time.perf_counter() - began_at


async def chunk(ledger: Ledger) -> float:
    use_application_database(ledger.application)
    seconds: list[float] = []
    await inside_a_run(partial(one_chunk, seconds))
    return seconds[0]


async def one_chunk(seconds: list[float]) -> None:
    loop = TaskRegistry.get("mine").cls().chunks(select(User), key=User.id, size=ITEMS)
    handed_out = await anext(loop)
    began_at = time.perf_counter()
    async with handed_out as (_, users):
        assert len(users) == ITEMS
    seconds.append(time.perf_counter() - began_at)


async def inside_a_run(body: Callable[[], Awaitable[None]]) -> None:
    state = AttemptState.of(new_id(), "mine", attempt=1)
    state.fence, state.is_fenced = 1, True
    run = CurrentRun(state.run, "mine", datetime.now(UTC), 1, Origin.MANUAL, state)
    own = contextvars.copy_context()
    own.run(current_run.enter, run)

    async def work() -> None:
        await body()

    await asyncio.get_running_loop().create_task(work(), context=own)


async def list_runs(ledger: Ledger) -> float:
    began_at = time.perf_counter()
    async with ledger.database.reader.connect() as connection:
        await run_query.page(connection, run_query.RunQuery(), 50)
        await database_time.now_of(connection)
    return time.perf_counter() - began_at


MEASURED = {
    "a firing": fire,
    "a claim": claim,
    "a look": look,
    "a chunk": chunk,
    "`batch runs`": list_runs,
}


async def open_ledger(
    server: PostgresServer,
    kind: str,
    name: str,
    tasks: dict[str, Task],
    runs: int = 0,
    others: int = 0,
    nodes: int = 0,
    own: int = 0,
) -> Ledger:
    databases = []
    for histories in ((LEDGER_HISTORY,), APPLICATION_HISTORIES):
        sqlite = f"sqlite+aiosqlite:///{os.getcwd()}/{new_id()}.db"
        database = Database(
            sqlite if kind == "SQLite" else await server.create_database(), setting="LEDGER_URL"
        )
        await migrate(database, *histories)
        databases.append(database)
    ledger, application = databases
    url = ledger.url.render_as_string(hide_password=False)
    heartbeat = Database(url, setting="LEDGER_URL", pool_size=1, plans_once=True)
    async with heartbeat.reader.connect() as connection:
        await ledger_poll.read(connection, NODE)
    fencing.guard(application, 30)
    known = {name: tasks[name] for name in ("mine", "own")}
    async with ledger.engine.begin() as connection:
        due = await database_time.now_of(connection)
        await task_sync.record_tasks(connection, known, due)
        await task_sync.set_schedules(connection, {"mine": tasks["mine"].schedule}, known, NODE)
    await fill_own(ledger, own)
    await crowd(ledger, runs, others, nodes)
    await fill_application(application, runs)
    return Ledger(
        name,
        ledger,
        application,
        heartbeat,
        tasks if others else dict(list(tasks.items())[:10]),
        due,
    )


async def fill_own(ledger: Database, number: int) -> None:
    for done in range(0, number, 10_000):
        async with ledger.engine.begin() as connection:
            await runs.insert(connection, queued(["own"] * min(10_000, number - done)))


async def fill_application(database: Database, places: int) -> None:
    say = words(database)
    rows = f"SELECT {say['id']}, 'chunks:1', 1, 1, false {say['from']}"
    rows = f"SELECT * FROM ({say['series']} {rows})" if database.kind == "sqlite" else rows
    async with database.engine.begin() as connection:
        await connection.execute(
            insert(User), [{"email": f"{n}@example.org"} for n in range(1_000)]
        )
        if places:
            statement = f"INSERT INTO batch_checkpoints (run, name, fence, count, finished) {rows}"
            await connection.execute(text(statement), {"count": places})
    if database.kind == "postgresql":
        async with database.engine.begin() as connection:
            await connection.execute(text("ANALYZE"))


class LoopingRun:
    """A run that goes through one inner loop after the other, each time that it is told to."""

    def __init__(self) -> None:
        self._wanted: asyncio.Queue[int] = asyncio.Queue()
        self._took: asyncio.Queue[float] = asyncio.Queue()
        self._task = asyncio.create_task(inside_a_run(self._body))

    async def go(self, number: int) -> float:
        """Through so many; how many milliseconds that took. 0: the run ends."""
        self._wanted.put_nowait(number)
        return await self._took.get()

    async def _body(self) -> None:
        task, names = TaskRegistry.get("mine").cls(), itertools.count()
        while number := await self._wanted.get():
            began_at = time.perf_counter()
            for name in itertools.islice(names, number):
                async for part in task.chunks(
                    [object() for _ in range(ITEMS)], size=ITEMS, name=f"inner-{name}"
                ):
                    async with part:
                        pass
            self._took.put_nowait((time.perf_counter() - began_at) * 1000)
        self._took.put_nowait(0.0)


async def inner_loops(application: Database, number: int) -> tuple[float, float]:
    """Milliseconds of one of the first hundred of a run, and, in turns with them, of one of the
    last of another.
    """
    use_application_database(application)
    young, old = LoopingRun(), LoopingRun()
    await old.go(number - WINDOW)
    both = [(await young.go(1), await old.go(1)) for _ in range(WINDOW)]
    for run in (young, old):
        await run.go(0)
    first, last = zip(*both, strict=True)
    return quarter(first), quarter(last)


async def measure(server: PostgresServer, kind: str, options: argparse.Namespace) -> None:
    tasks = TaskRegistry.tasks()
    wanted: list[dict[str, Any]] = [
        {"name": "nothing else"},
        *({"name": f"{number:,} runs", "runs": number} for number in options.runs),
        {"name": f"{options.runs[0]:,} runs that may start", "own": options.runs[0]},
        {"name": f"{options.tasks:,} tasks", "others": options.tasks},
        {"name": f"{options.nodes:,} nodes", "nodes": options.nodes - 1},
    ]
    ledgers = [await open_ledger(server, kind, tasks=tasks, **one) for one in wanted]
    for number in range(options.rounds + PRACTICE):
        if number == PRACTICE:
            for ledger in ledgers:
                ledger.took.clear()
        for ledger in ledgers[number % len(ledgers) :] + ledgers[: number % len(ledgers)]:
            await ledger.measure()
    print_table(
        f"{kind}: ms of one, and how many times as much as in the first row", table(ledgers)
    )
    first, last = await inner_loops(ledgers[0].application, options.loops)
    head = ["", "the first 100", f"the last of {options.loops:,}", "ratio"]
    row = ["an inner loop of one chunk", f"{first:.2f}", f"{last:.2f}", verdict(last / first)]
    print_table(f"{kind}: ms", [head, row])
    for ledger in ledgers:
        await ledger.database.dispose()
        await ledger.application.dispose()
        await ledger.heartbeat.dispose()


def table(ledgers: list[Ledger]) -> list[list[str]]:
    first, *others = [
        {what: quarter(took) for what, took in ledger.took.items()} for ledger in ledgers
    ]
    rows = [["", *(head for what in MEASURED for head in (what, "ratio"))]]
    rows.append(
        [ledgers[0].name, *(cell for took in first.values() for cell in (f"{took:.2f}", ""))]
    )
    for ledger, figures in zip(ledgers[1:], others, strict=True):
        cells = [(f"{took:.2f}", verdict(took / first[what])) for what, took in figures.items()]
        rows.append([ledger.name, *(cell for pair in cells for cell in pair)])
    return rows


def quarter(took: Sequence[float]) -> float:
    return quantiles(took, n=4)[0]


def verdict(ratio: float) -> str:
    return f"{ratio:.2f}" + ("" if ratio <= GOAL else " !")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--tasks", type=int, default=10_000)
    parser.add_argument("--nodes", type=int, default=100)
    parser.add_argument("--loops", type=int, default=5_000)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--databases", nargs="+", default=["SQLite", "PostgreSQL"])
    options = parser.parse_args()
    logs.set_up("WARNING")
    make_tasks(options.tasks)
    with start_server(fast=False) as server, tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        describe(postgresql=asyncio.run(version_of(server.url)))
        for kind in options.databases:
            uvloop.run(measure(server, kind, options))


if __name__ == "__main__":
    main()
