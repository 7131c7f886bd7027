"""What a process of its own costs a run: its begin, memory, runs a second, and what the runs of a
service notice.

    python bench/pools.py [--runs 200] [--seconds 60] [--rate 10]
                          [--parts start rate cpu claims long]

- `start`: from the claim of a run to the first line of its body in a child, one run after the
  other: of children that a nursery forks, and of those that are spawned because the import of the
  tasks has left a thread behind. And the memory that a child has for itself.
- `rate`: empty runs a second through `process:2`.
- `cpu`: 200 runs that compute for 0.2 s, in threads, in `process:2`, and in two bare Python
  processes that share the same list, in turns. Beside each of the first two a task runs each
  second: how late it begins.
- `claims`: a claim of a service with and without 100,000 queued runs of a task of another pool, in
  this process.
- `long`: `--rate` children a second for `--seconds`: memory and descriptors of the service and its
  nursery.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from machine import describe, print_table, version_of
from services import Worker, ending, insert, queued, start, wait_until, wait_until_ready
from sqlalchemy import func, select

from batch_system import BaseTask, TaskRegistry
from batch_system.batch.ledger import runs, tables, transitions
from batch_system.batch.ledger.attempts import Outcome
from batch_system.batch.ledger.migration import LEDGER_HISTORY
from batch_system.batch.ledger.states import RunState
from batch_system.batch.ledger.tables import new_id
from batch_system.batch.queue import claiming
from batch_system.batch.queue.claiming import Capacity
from batch_system.database.engine import Database
from batch_system.database.migrate import migrate
from batch_system.testing.postgres import PostgresServer, start_server

TASKS = """
import os, threading, time
from batch_system import BaseTask

{at_import}

class First(BaseTask):
    name, schedule, pool, overlap = "first", None, {pool!r}, "allow"
    async def run(self):
        at = time.time()
        rollup = open("/proc/self/smaps_rollup").read().split()
        own = [int(rollup[n + 1]) for n, word in enumerate(rollup) if word.startswith("Private_")]
        return {{"at": at, "own": sum(own), "pid": os.getpid()}}

class Empty(BaseTask):
    name, schedule, pool, overlap = "empty", None, {pool!r}, "allow"
    async def run(self):
        pass

class Compute(BaseTask):
    name, schedule, pool, overlap = "compute", None, {pool!r}, "allow"
    def run(self):
        compute()

class Tick(BaseTask):
    name, schedule = "tick", {tick!r}
    async def run(self):
        pass

def compute():
    for _ in range({loops}):
        pass
"""
BARE = """
import sys
def compute():
    for _ in range({loops}):
        pass
for _ in range({each}):
    compute()
"""
NEVER, EACH_SECOND = "0 0 1 1 *", "* * * * * *"
THREAD = "threading.Thread(target=time.sleep, args=(1e6,), daemon=True).start()"
COMPUTED, COMPUTE_SECONDS, TURNS = 200, 0.2, 5
BACKLOG, CLAIMS = 100_000, 200
LIMIT = 600.0


class Place:
    """A service on a ledger of its own, with the tasks above."""

    def __init__(self, folder: Path, url: str, workers: list[Worker], **texts: Any) -> None:
        self.url, self._workers = url, workers
        (folder / "tasks").mkdir(parents=True)
        given = {"at_import": "", "pool": "cpu", "tick": NEVER, "loops": 1} | texts
        (folder / "tasks/bodies.py").write_text(TASKS.format(**given))
        settings = {
            "DATABASE_URL": f"sqlite:///{folder}/app.db",
            "LEDGER_URL": url,
            "BATCH_POOL_CPU": "process:2",
        }
        self.worker = start(
            folder, settings | {"BATCH_PAGES": "off", "POLL_SECONDS": "0.1", "MAX_THREADS": "2"}
        )
        workers.append(self.worker)
        wait_until_ready([self.worker])
        self._database = Database(url, setting="LEDGER_URL", pooled=False)

    async def make(self, tasks: Sequence[str]) -> float:
        """Queue runs of these tasks, and wait for their ends. Returns how many seconds that
        took.
        """
        new = queued(tasks)
        began_at = time.monotonic()
        await insert(self.url, new)
        while await self._ended([run.id for run in new]) < len(new):
            self.worker.check()
            # To look takes time of the cores that are measured.
            await asyncio.sleep(0.01 if len(new) == 1 else 0.1)
            if time.monotonic() > began_at + LIMIT:
                raise SystemExit(f"{len(new)} runs did not end within {LIMIT:.0f} s")
        return time.monotonic() - began_at

    async def _ended(self, ids: list[str]) -> int:
        theirs = (tables.runs.c.id.in_(ids[-500:]), tables.runs.c.state == RunState.SUCCEEDED)
        found = (await self.read(select(func.count()).select_from(tables.runs).where(*theirs)))[0][
            0
        ]
        return int(found) + max(0, len(ids) - 500)

    async def read(self, query: Any) -> Sequence[Any]:
        async with self._database.engine.connect() as connection:
            return (await connection.execute(query)).all()

    async def of(self, task: str) -> Sequence[Any]:
        table = tables.runs
        columns = (table.c.slot, table.c.started_at, table.c.result)
        return await self.read(
            select(*columns).where(table.c.task == task, table.c.state == RunState.SUCCEEDED)
        )


def share(values: Sequence[float], of: float) -> float:
    return sorted(values)[min(int(of * len(values)), len(values) - 1)]


def ms(seconds: float) -> str:
    return f"{seconds * 1000:,.1f}"


async def starts(make: Callable[..., Place], number: int) -> list[list[str]]:
    """How soon runs begin in children that are forked, and in those that are spawned with and
    without a spare.
    """
    found = [["", "p50 ms", "p99 ms", "own memory, MB", "runs"]]
    for kind, at_import, pause, count in (
        ("forked", "", 0.05, number),
        ("spawned, a spare is ready", THREAD, 3.0, 10),
        ("spawned, one right after the other", THREAD, 0.0, 20),
    ):
        place = make(at_import=at_import)
        await place.make(["first"])
        for _ in range(count):
            await asyncio.sleep(pause)
            await place.make(["first"])
        rows = (await place.of("first"))[1:]
        late = [row.result["at"] - row.started_at.timestamp() for row in rows]
        own = median(row.result["own"] for row in rows) / 1024
        found.append([kind, ms(median(late)), ms(share(late, 0.99)), f"{own:.1f}", f"{len(late)}"])
        place.worker.kill()
    return found


async def rates(make: Callable[..., Place]) -> list[list[str]]:
    place = make()
    await place.make(["empty"] * 20)
    seconds = await place.make(["empty"] * 1_000)
    place.worker.kill()
    return [["", "runs a second"], ["process:2, 1,000 empty runs", f"{1_000 / seconds:,.0f}"]]


async def computing(make: Callable[..., Place]) -> list[list[str]]:
    """200 runs that compute, against two bare processes that do the same in a loop, in turns: a
    core's speed varies.
    """
    loops = loops_for(COMPUTE_SECONDS)
    found = [
        [
            "",
            "seconds",
            "two bare processes",
            "times",
            "every-second task late by, p50 ms",
            "max ms",
        ]
    ]
    for name, pool in (("process:2", "cpu"), ("threads (MAX_THREADS=2)", "default")):
        place = make(pool=pool, loops=loops, tick=EACH_SECOND)
        await place.make(["empty"])
        bare, ours, late = 0.0, 0.0, []
        for _ in range(TURNS):
            bare += await asyncio.to_thread(two_bare_processes, loops, COMPUTED // TURNS // 2)
            before = len(await place.of("tick"))
            ours += await place.make(["compute"] * (COMPUTED // TURNS))
            late += [
                (row.started_at - row.slot).total_seconds()
                for row in (await place.of("tick"))[before:]
            ]
        found.append(
            [
                name,
                f"{ours:.1f}",
                f"{bare:.1f}",
                f"{ours / bare:.2f}",
                ms(median(late)),
                ms(max(late)),
            ]
        )
        place.worker.kill()
    return found


def two_bare_processes(loops: int, each: int) -> float:
    """How many seconds two processes take that compute so often, without anything else."""
    script = BARE.format(loops=loops, each=each)
    began_at = time.monotonic()
    if any(
        process.wait()
        for process in [subprocess.Popen([sys.executable, "-c", script]) for _ in range(2)]
    ):
        raise SystemExit("a bare process has failed")
    return time.monotonic() - began_at


def loops_for(seconds: float) -> int:
    """How often an empty loop is repeated in so many seconds of one core."""
    number = 1_000_000
    while True:
        began_at = time.perf_counter()
        for _ in range(number):
            pass
        if (took := time.perf_counter() - began_at) > 0.2:
            return int(number * seconds / took)
        number *= 2


async def claims(url: str) -> list[list[str]]:
    """A claim of a service's own run, with and without many queued runs of a task of another
    pool.
    """
    database = Database(url, setting="LEDGER_URL")
    await migrate(database, LEDGER_HISTORY)
    for name, pool in (("mine", "default"), ("theirs", "gpu")):

        async def run(self: BaseTask) -> None: ...

        attributes = {"name": name, "schedule": None, "pool": pool, "overlap": "allow", "run": run}
        TaskRegistry.register(type(name.title(), (BaseTask,), attributes))
        seen = {name: func.now() for name in ("first_seen_at", "last_seen_at")}
        about = {
            "name": name,
            "pool": pool,
            "policies": {},
            "description": "",
            "source": "",
            **seen,
        }
        async with database.engine.begin() as connection:
            await connection.execute(tables.tasks.insert().values(**about))
    before = await claim_often(database)
    await insert(url, queued(["theirs"] * BACKLOG))
    after = await claim_often(database)
    await database.dispose()
    TaskRegistry.clear()
    return [
        ["", "p50 ms", "times"],
        ["nothing else is queued", ms(before), ""],
        [f"beside {BACKLOG:,} runs of another pool", ms(after), f"{after / before:.2f}"],
    ]


async def claim_often(database: Database) -> float:
    node, took = new_id(), []
    loaded = TaskRegistry.tasks()
    for _ in range(CLAIMS):
        (new,) = queued(["mine"])
        async with database.engine.begin() as connection:
            await runs.insert(connection, [replace(new)])
        began_at = time.perf_counter()
        async with database.engine.begin() as connection:
            ((claimed), *others), _ = await claiming.take(connection, loaded, node, Capacity(1, 1))
        took.append(time.perf_counter() - began_at)
        at = claimed.attempt_started_at
        ended = Outcome(
            claimed.id, claimed.fence, RunState.SUCCEEDED, "succeeded", 1, node, "mine", at, at
        )
        async with database.engine.begin() as connection:
            if others or await transitions.finish(connection, [ended]):
                raise SystemExit(
                    "something else than one run was claimed: the figures are worth nothing"
                )
    return median(took)


async def long(make: Callable[..., Place], seconds: float, rate: float) -> list[list[str]]:
    """Many children: what the service and its nursery have at each tenth of the time."""
    place = make()
    await place.make(["empty"] * 20)
    found = [["", "service MB", "descriptors", "nursery MB", "descriptors", "processes", "runs"]]
    began_at, made = time.monotonic(), 0
    for tenth in range(11):
        while time.monotonic() < began_at + tenth * seconds / 10:
            due = int((time.monotonic() - began_at) * rate) - made
            if due > 0:
                await insert(place.url, queued(["empty"] * due))
                made += due
            await asyncio.sleep(0.1)
        pid = place.worker.pid
        nursery = min(children_of(pid), default=pid)
        figures = [
            f"{resident(p):.1f}" if is_memory else f"{descriptors(p)}"
            for p, is_memory in _each(pid, nursery)
        ]
        found.append(
            [f"{tenth * seconds / 10:,.0f} s", *figures, f"{len(children_of(pid))}", f"{made:,}"]
        )
    wait_until(lambda: place.worker.check() or True, 1)
    place.worker.kill()
    return found


def _each(pid: int, nursery: int) -> list[tuple[int, bool]]:
    return [(pid, True), (pid, False), (nursery, True), (nursery, False)]


def children_of(pid: int) -> list[int]:
    return [
        int(p)
        for file in Path(f"/proc/{pid}/task").glob("*/children")
        for p in file.read_text().split()
    ]


def resident(pid: int) -> float:
    return (
        int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    )


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


async def measure(
    kind: str, server: PostgresServer, folder: Path, options: argparse.Namespace
) -> None:
    with ending() as workers:
        numbers = iter(range(100))

        def make(**texts: Any) -> Place:
            own = folder / f"{kind}-{next(numbers)}"
            own.mkdir()
            return Place(own, urls.pop(), workers, **texts)

        urls = [await new_url(kind, server, folder, number) for number in range(12)]
        if "start" in options.parts:
            print_table(
                f"{kind}: from the claim to the first line in a child",
                await starts(make, options.runs),
            )
        if "rate" in options.parts:
            print_table(f"{kind}: throughput", await rates(make))
        if "cpu" in options.parts:
            title = (
                f"{kind}: {COMPUTED} runs that compute for {COMPUTE_SECONDS:g} s on "
                f"{os.cpu_count()} cores"
            )
            print_table(title, await computing(make))
        if "claims" in options.parts:
            print_table(f"{kind}: claims of the service's own runs", await claims(urls.pop()))
        if "long" in options.parts:
            title = f"{kind}: {options.rate:g} children a second for {options.seconds:,.0f} s"
            print_table(title, await long(make, options.seconds, options.rate))


async def new_url(kind: str, server: PostgresServer, folder: Path, number: int) -> str:
    if kind == "PostgreSQL":
        return await server.create_database()
    return f"sqlite+aiosqlite:///{folder}/ledger-{number}.db"


PARTS = ("start", "rate", "cpu", "claims", "long")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--rate", type=float, default=10)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument(
        "--kinds", nargs="+", choices=("SQLite", "PostgreSQL"), default=("SQLite", "PostgreSQL")
    )
    options = parser.parse_args()
    with start_server(fast=False) as server, tempfile.TemporaryDirectory() as folder:
        describe(postgresql=asyncio.run(version_of(server.url)))
        for kind in options.kinds:
            asyncio.run(measure(kind, server, Path(folder), options))


if __name__ == "__main__":
    main()
