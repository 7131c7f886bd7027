"""What a Dask cluster costs and gives: runs a second, the wait of the first and of the urgent,
memory, a killed worker.

    python bench/dask_pool.py [--runs 2000] [--turns 3] [--queued 100000] [--seconds 180]
                              [--kills 10] [--parts rate first urgent memory kill]
                              [--kinds PostgreSQL SQLite]

Each part has a service and `batch work --dask` with two workers of four places, on a ledger of its
own.

- `rate`: empty runs a second, in turns with bare distributed that submits as many calls of an empty
  function to a cluster of the same shape.
- `first`: from the insertion of a run by the service, one after the other, to the first line of its
  body.
- `urgent`: the same for a run of an urgent task, while many runs of another one are queued and
  executed.
- `memory`: memory of the service and of the scheduler, and tasks that the scheduler remembers, over
  empty runs, for `--seconds`; `--seconds 1200` is its long form.
- `kill`: from SIGKILL of the worker of a run to its rescue, and to the first line of its next
  attempt.

It is not called dask.py, because `import dask` would then find it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from distributed import Client, LocalCluster
from machine import describe, print_table, version_of
from services import Worker, ending, insert, queued, start, wait_until_ready
from sqlalchemy import func, select

from batch_system.batch.ledger import tables
from batch_system.batch.ledger.states import RunState
from batch_system.database.engine import Database
from batch_system.testing.postgres import PostgresServer, start_server

WORKERS, PLACES = 2, 4
LIMIT = 600.0
TASKS = """
import asyncio, os, time
from batch_system import BaseTask, current_run, start

class Empty(BaseTask):
    name, schedule, pool, overlap = "empty", None, "cpu", "allow"
    def run(self):
        pass

class First(BaseTask):
    name, schedule, pool, overlap, priority = "first", None, "cpu", "allow", 9
    def run(self):
        return time.time()

class Starts(BaseTask):
    name, schedule = "starts", None
    async def run(self, number: int, pause: float):
        for _ in range(number):
            await start(First)
            await asyncio.sleep(pause)

class Held(BaseTask):
    name, schedule, pool = "held", None, "cpu"
    async def run(self):
        run = current_run()
        with open(os.environ["WITNESS"], "a") as file:
            file.write(f"{run.id} {os.getpid()} {time.time()}\\n")
        await asyncio.sleep(3600 if run.fence == 1 else 0)
"""


def empty(_: int) -> None:
    pass


class Place:
    """A service and a cluster on a ledger of its own, with the tasks above."""

    def __init__(self, folder: Path, url: str, processes: list[Worker]) -> None:
        self.url, self.witness = url, folder / "witness"
        self.witness.touch()
        (folder / "tasks").mkdir(parents=True)
        (folder / "tasks/bodies.py").write_text(TASKS)
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{listening.getsockname()[1]}"
        settings = {
            "DATABASE_URL": f"sqlite:///{folder}/app.db",
            "LEDGER_URL": url,
            "BATCH_POOL_CPU": f"dask://{self.address}",
            "BATCH_PAGES": "off",
            "WITNESS": str(self.witness),
        }
        self.service = start(folder, settings)
        processes.append(self.service)
        wait_until_ready([self.service])
        words = ("work", "--dask", "--workers", str(WORKERS), "--max-running", str(PLACES))
        self.cluster = start(folder, settings, (sys.executable, "-m", "batch_system", *words))
        processes.append(self.cluster)
        self._processes = {"service": self.service, "cluster": self.cluster}
        self._database = Database(url, setting="LEDGER_URL", pooled=False)

    async def begin(self) -> None:
        """Wait until each worker has a node, and has executed something."""
        await self.until_nodes()
        await self.make(["empty"] * 50)

    async def until_nodes(self) -> None:
        """Wait until each worker has a node."""
        give_up_at = time.monotonic() + 120
        table = tables.nodes
        living = (
            select(func.count())
            .select_from(table)
            .where(table.c.fires.is_(False), table.c.stopped_at.is_(None))
        )
        while (await self.read(living))[0][0] < WORKERS:
            self.cluster.check()
            self.service.check()
            if time.monotonic() > give_up_at:
                raise self.failed("the workers have no node")
            await asyncio.sleep(0.1)

    def written(self, run: str) -> list[tuple[int, float]]:
        """The process and the instant of each attempt of a run of `held`."""
        lines = [line.split() for line in self.witness.read_text().splitlines()]
        return [(int(pid), float(at)) for id, pid, at in lines if id == run]

    async def until_written(self, run: str, number: int) -> None:
        give_up_at = time.monotonic() + 60
        while len(self.written(run)) < number:
            if time.monotonic() > give_up_at:
                raise self.failed(f"attempt {number} of a run of `held` has not begun")
            await asyncio.sleep(0.01)

    async def make(self, tasks: Sequence[str]) -> float:
        """Queue runs of these tasks, and wait for their ends. Returns how many seconds that
        took.
        """
        new = queued(tasks)
        began_at = time.monotonic()
        await insert(self.url, new)
        await self.until_ended([run.id for run in new])
        return time.monotonic() - began_at

    async def until_ended(self, ids: Sequence[str]) -> None:
        last = ids[-500:]
        table = tables.runs
        ended = (
            select(func.count())
            .select_from(table)
            .where(table.c.id.in_(last), table.c.state == RunState.SUCCEEDED)
        )
        left = (
            select(table.c.id)
            .where(table.c.state.in_(["queued", "running", "interrupted"]))
            .limit(1)
        )
        give_up_at = time.monotonic() + LIMIT
        while (await self.read(ended))[0][0] < len(last) or await self.read(left):
            await asyncio.sleep(0.05)
            if time.monotonic() > give_up_at:
                raise self.failed(f"{len(ids)} runs did not end within {LIMIT:.0f} s")

    async def waits(self) -> list[float]:
        """How long each run of `first` has waited from its insertion to its first line, in
        seconds.
        """
        table = tables.runs
        query = select(table.c.created_at, table.c.result).where(
            table.c.task == "first", table.c.result.is_not(None)
        )
        return [float(row.result) - row.created_at.timestamp() for row in await self.read(query)]

    def failed(self, what: str) -> SystemExit:
        logs = (
            f"--- {name}\n{worker.log.read_text()[-2_000:]}"
            for name, worker in self._processes.items()
        )
        return SystemExit("\n".join((what, *logs)))

    async def read(self, query: Any) -> Sequence[Any]:
        async with self._database.engine.connect() as connection:
            return (await connection.execute(query)).all()


def share(values: Sequence[float], of: float) -> float:
    return sorted(values)[min(int(of * len(values)), len(values) - 1)]


def ms(seconds: float) -> str:
    return f"{seconds * 1000:,.0f}"


async def bare(number: int) -> float:
    """How many seconds as many calls of an empty function take on a cluster of the same shape."""
    options: dict[str, Any] = {
        "n_workers": WORKERS,
        "threads_per_worker": PLACES,
        "dashboard_address": None,
    }
    async with (
        LocalCluster(asynchronous=True, **options) as cluster,
        Client(cluster, asynchronous=True) as client,
    ):
        await client.gather(client.map(empty, range(50), pure=False))
        began_at = time.monotonic()
        await client.gather([client.submit(empty, each, pure=False) for each in range(number)])
        return time.monotonic() - began_at


async def rate(make: Callable[[], Place], number: int, turns: int) -> list[list[str]]:
    place = make()
    await place.begin()
    ours, theirs = [], []
    for _ in range(turns):
        ours.append(number / await place.make(["empty"] * number))
        theirs.append(number / await bare(number))
    of_bare = median(ours) / median(theirs)
    return [
        ["", "runs/s", "each turn", "of bare"],
        [
            "runs of the pool",
            f"{median(ours):,.0f}",
            " ".join(f"{each:,.0f}" for each in ours),
            f"{of_bare:.0%}",
        ],
        [
            "bare distributed",
            f"{median(theirs):,.0f}",
            " ".join(f"{each:,.0f}" for each in theirs),
            "",
        ],
    ]


async def first(make: Callable[[], Place], number: int) -> list[list[str]]:
    place = make()
    await place.begin()
    await start_some(place, number, 0.05)
    waits = await place.waits()
    return [
        ["", "p50 ms", "p99 ms", "runs"],
        ["to the first line", *_shares(waits), f"{len(waits):,}"],
    ]


async def start_some(place: Place, number: int, pause: float) -> None:
    """Have the service start runs of `first`, and wait for these."""
    (run,) = queued(["starts"])
    run.params = {"number": number, "pause": pause}
    await insert(place.url, [run])
    give_up_at = time.monotonic() + LIMIT
    while len(await place.waits()) < number:
        place.service.check()
        await asyncio.sleep(0.2)
        if time.monotonic() > give_up_at:
            raise place.failed("urgent runs have not begun")


def _shares(waits: Sequence[float]) -> list[str]:
    return [ms(median(waits)), ms(share(waits, 0.99))]


async def urgent(make: Callable[[], Place], number: int) -> list[list[str]]:
    place = make()
    await place.begin()
    await insert(place.url, queued(["empty"] * number))
    ended = (
        select(func.count())
        .select_from(tables.runs)
        .where(tables.runs.c.state == RunState.SUCCEEDED)
    )
    while (await place.read(ended))[0][0] < 500:
        await asyncio.sleep(0.1)
    await start_some(place, 20, 0.5)
    waits = await place.waits()
    done = (await place.read(ended))[0][0]
    return [
        ["", "p50 ms", "largest ms", "runs", "of the others executed by then"],
        [
            f"behind {number:,} runs",
            ms(median(waits)),
            ms(max(waits)),
            f"{len(waits)}",
            f"{done:,}",
        ],
    ]


async def memory(make: Callable[[], Place], seconds: float) -> list[list[str]]:
    place = make()
    await place.begin()
    found = [["", "service MB", "scheduler MB", "workers MB", "tasks at the scheduler", "runs"]]
    began_at, made = time.monotonic(), 0
    async with Client(f"tcp://{place.address}", asynchronous=True, set_as_default=False) as client:
        for tenth in range(11):
            while time.monotonic() < began_at + tenth * seconds / 10:
                await place.make(["empty"] * 200)
                made += 200
            await asyncio.sleep(1)  # the last tickets end
            known = await client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks))
            scheduler = place.cluster.pid
            workers = sum(resident(pid) for pid in children_of(scheduler))
            figures = [
                f"{each:.0f}"
                for each in (resident(place.service.pid), resident(scheduler), workers)
            ]
            found.append([f"{tenth * seconds / 10:,.0f} s", *figures, f"{known}", f"{made:,}"])
    return found


async def kill(make: Callable[[], Place], times: int) -> list[list[str]]:
    """A run of its own for each kill: one that is lost three times without progress fails."""
    place = make()
    await place.begin()
    found, took = [], []
    for _ in range(times):
        await place.until_nodes()
        (run,) = queued(["held"])
        await insert(place.url, [run])
        await place.until_written(run.id, 1)
        pid, _ = place.written(run.id)[0]
        killed_at = time.time()
        os.kill(int(pid), signal.SIGKILL)
        await place.until_written(run.id, 2)
        took.append(place.written(run.id)[1][1] - killed_at)
        ((lost_at,),) = await place.read(select(func.max(tables.nodes.c.lost_at)))
        found.append(lost_at.timestamp() - killed_at)
        await place.until_ended([run.id])
    head = ["", "p50 ms", "p90 ms", "largest ms", "times"]
    return [
        head,
        *(
            [what, *_spread(each), f"{times}"]
            for what, each in (("to the rescue", found), ("to the next attempt", took))
        ),
    ]


def _spread(seconds: Sequence[float]) -> list[str]:
    return [ms(median(seconds)), ms(share(seconds, 0.9)), ms(max(seconds))]


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


PARTS = ("rate", "first", "urgent", "memory", "kill")


async def measure(
    kind: str, server: PostgresServer, folder: Path, options: argparse.Namespace
) -> None:
    for part in options.parts:
        with ending() as processes:
            own = folder / f"{kind}-{part}"
            own.mkdir()
            is_file = kind == "SQLite"
            url = (
                f"sqlite+aiosqlite:///{own}/ledger.db"
                if is_file
                else await server.create_database()
            )

            def make(own: Path = own, url: str = url, processes: list[Worker] = processes) -> Place:
                return Place(own, url, processes)

            rows = await {
                "rate": lambda: rate(make, options.runs, options.turns),
                "first": lambda: first(make, 200),
                "urgent": lambda: urgent(make, options.queued),
                "memory": lambda: memory(make, options.seconds),
                "kill": lambda: kill(make, options.kills),
            }[part]()
            print_table(f"{kind}: {part}", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=2_000)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--queued", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument(
        "--kinds", nargs="+", choices=("PostgreSQL", "SQLite"), default=("PostgreSQL", "SQLite")
    )
    options = parser.parse_args()

    async def all_of_them() -> None:
        with start_server() as server, tempfile.TemporaryDirectory() as folder:
            url = await server.create_database()
            describe(("distributed", "sqlalchemy", "asyncpg", "aiosqlite"), await version_of(url))
            print(f"{WORKERS} workers of {PLACES} places")
            for kind in options.kinds:
                await measure(kind, server, Path(folder), options)

    asyncio.run(all_of_them())


if __name__ == "__main__":
    main()
