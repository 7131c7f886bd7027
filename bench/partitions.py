"""What does a partitioned run cost the ledger, and how much faster is a pass over many rows with
two workers?

    python bench/partitions.py [--rows 5000000] [--repeats 3] [--parts ledger pass]

- `ledger`: a run is split into 10,000 parts: encoding them, the transaction that stores them, and a
  claim of 16. Then a look that finds nothing while all are active, and the look that finds that all
  have succeeded, with the transaction that queues the run for its join.
- `pass`: a table of `--rows` rows is computed on and updated in chunks of 1,000: in one run of a
  worker, in 64 parts of one worker, and in 64 parts of two workers. A worker executes one run at
  once. The seconds are those of the run, from its begin to its end; the median of `--repeats`.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from machine import describe, print_table, version_of
from services import Worker, ending, start, wait_until, wait_until_ready
from sqlalchemy import select, text, update

from batch_system import PartitionedTask, TaskRegistry
from batch_system.batch.firing import task_sync
from batch_system.batch.ledger import database_time, runs, tables, transitions, waits
from batch_system.batch.ledger.attempts import Outcome
from batch_system.batch.ledger.migration import LEDGER_HISTORY
from batch_system.batch.ledger.parts import PartsGate, Split
from batch_system.batch.ledger.runs import NewRun
from batch_system.batch.ledger.states import FINAL, RunState
from batch_system.batch.ledger.tables import new_id
from batch_system.batch.queue import claiming, gates
from batch_system.batch.queue.claiming import Capacity
from batch_system.batch.queue.requests import Startable
from batch_system.database.engine import Database
from batch_system.database.migrate import migrate
from batch_system.testing.postgres import PostgresServer, start_server

KINDS = ("PostgreSQL", "SQLite")
NUMBER, AT_ONCE, MOST_SECONDS = 10_000, 16, 3_600.0
TASKS = """
from batch_system import Part, PartitionedTask, BaseTask, ranges
from sqlalchemy import Integer, column, select, table, text

items = table("items", column("id", Integer), column("value", Integer))
SET = text("UPDATE items SET value = :value WHERE id = :id")
rows = select(items.c.id, items.c.value)

def computed(id, value):
    for _ in range(40):
        value = (value * 31 + id) % 1_000_003
    return {"id": id, "value": value}

async def go_over(task, **bounds):
    async for chunk in task.chunks(rows, key=items.c.id, size=1_000, **bounds):
        async with chunk as (db, found):
            await db.execute(SET, [computed(*row) for row in found])

class Beside(BaseTask):
    name, schedule = "beside", None  # of another pool: a worker says so when it has begun
    async def run(self):
        pass

class Whole(BaseTask):
    name, schedule, pool = "whole", None, "cpu"
    async def run(self):
        await go_over(self)

class Parted(PartitionedTask):
    name, schedule, pool, parallel = "parted", None, "cpu", 2
    async def split(self):
        return await ranges(rows, key=items.c.id, parts=64)
    async def work(self, part: Part):
        await go_over(self, **part)
"""


class Sums(PartitionedTask):
    name, schedule, parallel = "sums", None, AT_ONCE

    async def split(self) -> Any: ...

    async def work(self, part: Any) -> Any: ...


async def in_the_ledger(server: PostgresServer, folder: Path, repeats: int) -> None:
    rows: list[list[str]] = []
    for kind in KINDS:
        file = f"sqlite+aiosqlite:///{folder}/{new_id()}.db"
        ledger = Database(
            await server.create_database() if kind == "PostgreSQL" else file, setting="LEDGER_URL"
        )
        await migrate(ledger, LEDGER_HISTORY)
        task = TaskRegistry.of(Sums)
        async with ledger.engine.begin() as connection:
            await task_sync.record_tasks(
                connection, {"sums": task}, await database_time.now_of(connection)
            )
        taken = [await one_run(ledger, task) for _ in range(repeats)]
        rows += [
            [kind, what, f"{median(each[what] for each in taken) * 1_000:,.0f} ms"]
            for what in taken[0]
        ]
        await ledger.dispose()
    print_table(f"A run with {NUMBER:,} parts", [["database", "what", "median"], *rows])


async def one_run(ledger: Database, task: Any) -> dict[str, float]:
    node, seconds = new_id(), {}
    began = time.perf_counter()

    def took(what: str) -> None:
        nonlocal began
        seconds[what], began = time.perf_counter() - began, time.perf_counter()

    async with ledger.engine.begin() as connection:
        now = await database_time.now_of(connection)
        run = NewRun.running(node, "sums", None, now, exclusive=None, priority=0)
        await runs.insert(connection, [run])
    split = Split(
        PartsGate.PARTS, task.queue_of_parts, [{"start": n, "stop": n + 1} for n in range(NUMBER)]
    )
    began = time.perf_counter()
    outcome = Outcome(run.id, 1, RunState.WAITING, "split", 1, node, "sums", now, now, split=split)
    outcome.split_rows = split.rows(ledger.kind)
    took("encode the parts, in a thread")
    async with ledger.engine.begin() as connection:
        assert await transitions.finish(connection, [outcome]) == []
    took("store the split")
    if ledger.kind == "postgresql":
        async with ledger.engine.begin() as connection:
            await connection.execute(text("ANALYZE batch_runs"))
    began = time.perf_counter()
    async with ledger.engine.begin() as connection:
        claimed, _ = await claiming.take(
            connection, {"sums": task}, node, Capacity(AT_ONCE, AT_ONCE)
        )
        assert len(claimed) == AT_ONCE
    took(f"claim {AT_ONCE} parts")
    async with ledger.reader.connect() as connection:
        assert not await waits.is_any_ready(connection, now)
    took("look while parts are active")
    theirs = tables.runs.c.awaited_by == run.id
    async with ledger.engine.begin() as connection:
        await connection.execute(
            update(tables.runs).where(theirs).values(state="succeeded", finished_at=now)
        )
    began = time.perf_counter()
    async with ledger.reader.connect() as connection:
        assert await waits.is_any_ready(connection, now)
    took("look that finds the join")
    async with ledger.engine.begin() as connection:
        assert await gates.apply(connection, await gates.decide(connection, now), now) == 1
    took("queue the run for its join")
    async with ledger.engine.begin() as connection:
        await transitions.cancel(connection, [run.id], "over", "bench", now)
    return seconds


async def passes(server: PostgresServer, folder: Path, number: int, repeats: int) -> None:
    rows: list[list[str]] = []
    for kind in KINDS:
        place = folder / new_id()
        (place / "tasks").mkdir(parents=True)
        (place / "tasks/all.py").write_text(TASKS)
        files = [f"sqlite+aiosqlite:///{place}/{name}.db" for name in ("ledger", "app")]
        url, application = (
            [await server.create_database() for _ in files] if kind == "PostgreSQL" else files
        )
        await fill(application, number)
        whole = [await seconds_of(place, url, application, "whole", 1) for _ in range(repeats)]
        one = [await seconds_of(place, url, application, "parted", 1) for _ in range(repeats)]
        two = [await seconds_of(place, url, application, "parted", 2) for _ in range(repeats)]
        for what, taken in (
            ("one run", whole),
            ("64 parts, one worker", one),
            ("64 parts, two workers", two),
        ):
            times = median(whole) / median(taken)
            rows.append(
                [
                    kind,
                    what,
                    f"{median(taken):,.1f} s",
                    f"{number / median(taken):,.0f}",
                    f"{times:.2f}",
                ]
            )
    heading = ["database", "how", "median", "rows a second", "times as fast"]
    print_table(f"A pass over {number:,} rows", [heading, *rows])


async def fill(application: str, number: int) -> None:
    database = Database(application, setting="DATABASE_URL")
    async with database.engine.begin() as connection:
        await connection.execute(
            text("CREATE TABLE items (id INTEGER PRIMARY KEY, value INTEGER NOT NULL)")
        )
        numbers = (
            f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {number}) "
        )
        await connection.execute(text(f"INSERT INTO items {numbers} SELECT i, i % 97 FROM n"))
    await database.dispose()


async def seconds_of(place: Path, url: str, application: str, task: str, workers: int) -> float:
    """How long one run of the task takes, from its begin to its end, with so many workers."""
    settings = {"LEDGER_URL": url, "DATABASE_URL": application, "BATCH_POOL_CPU": "nodes"}
    command = (sys.executable, "-m", "batch_system", "work", "--pool", "cpu", "--max-running", "1")
    with ending() as started:
        service = start(place, settings)
        started.append(service)
        wait_until_ready([service])
        begun = [start(place, {**settings, "LOG_LEVEL": "INFO"}, command) for _ in range(workers)]
        started += begun
        for worker in begun:
            wait_until(has_begun(worker), 60)
        ledger = Database(url, setting="LEDGER_URL")
        async with ledger.engine.begin() as connection:
            now = await database_time.now_of(connection)
            startable = Startable(task, "tasks/all.py", task, 0)
            run = NewRun.queued(startable.name, None, now, exclusive=task, priority=0)
            await runs.insert(connection, [run])
        row = None
        give_up_at = time.monotonic() + MOST_SECONDS
        while row is None or row.state not in FINAL:
            await asyncio.sleep(0.2)
            assert time.monotonic() < give_up_at, "the run does not end"
            async with ledger.reader.connect() as connection:
                columns = (
                    tables.runs.c.state,
                    tables.runs.c.reason,
                    tables.runs.c.started_at,
                    tables.runs.c.finished_at,
                )
                row = (
                    await connection.execute(select(*columns).where(tables.runs.c.id == run.id))
                ).one()
        await ledger.dispose()
    assert row.state == RunState.SUCCEEDED, row.reason
    return float((row.finished_at - row.started_at).total_seconds())


def has_begun(worker: Worker) -> Callable[[], bool]:
    def said() -> bool:
        worker.check()
        return "of other pools" in worker.log.read_text()

    return said


async def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--parts", nargs="+", choices=("ledger", "pass"), default=["ledger", "pass"]
    )
    given = parser.parse_args()
    with start_server() as server, tempfile.TemporaryDirectory() as folder:
        describe(postgresql=await version_of(await server.create_database()))
        if "ledger" in given.parts:
            await in_the_ledger(server, Path(folder), given.repeats)
        if "pass" in given.parts:
            await passes(server, Path(folder), given.rows, given.repeats)


if __name__ == "__main__":
    asyncio.run(main())
