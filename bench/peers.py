"""How many empty jobs a second does the service do beside Procrastinate and PgQueuer, on the same
PostgreSQL?

    python bench/peers.py [--jobs 1500] [--more-jobs 20000] [--processes 1] [--rounds 3]

Each contestant has so many worker processes, started as its documents say, and in each round a
database of its own and fresh processes. They wait for work when all jobs are queued with one
COMMIT. Measured is from the first line of the first job, in whatever process, until the database
says that none is left; then they are counted. The contestants take turns, in another order each
round. Procrastinate is so much slower that it takes part in the smaller race only.

The service has MAX_RUNNING as it is by default, and 1,000; PgQueuer a batch of 10, its default, and
of 1,000, as its documents advise larger ones for short jobs; Procrastinate the concurrency of 30 of
its documents, which was about the best on this bench, with more connections than by default. All
commit with PostgreSQL's default settings, and none logs a job. What is in the database afterwards:
of ours a run and an attempt for each job, with its times, its process and its outcome; of
Procrastinate the job, and an event for each of its states; PgQueuer deletes the job, and has a line
in its log for each of its states.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median

import asyncpg
import procrastinate
import psycopg
from machine import LIBRARIES, describe, print_table, version_of
from pgqueuer.db import AsyncpgDriver
from pgqueuer.queries import Queries
from processes import run_round
from rush import NOTING, Rush, cores, rush
from services import Worker, ending, start

from batch_system.testing.postgres import PostgresServer, start_server

SETTLE_SECONDS = 1.0


class Contestant(ABC):
    name: str
    set_up: str
    """What it was given, in words."""

    @abstractmethod
    async def run(
        self, server: PostgresServer, folder: Path, processes: int, jobs: int
    ) -> Rush: ...


class Ours(Contestant):
    def __init__(self, max_running: int) -> None:
        self._settings = {"MAX_RUNNING": str(max_running)}
        self.name = f"the service, {max_running:,}"
        self.set_up = f"batch serve, MAX_RUNNING={max_running}, else the defaults"

    async def run(self, server: PostgresServer, folder: Path, processes: int, jobs: int) -> Rush:
        return (await run_round(server, folder, processes, 1, jobs, **self._settings)).rush


class Peer(Contestant):
    module: str
    """The source of its job, and of what its command is told to run."""
    waiting: str
    """The query for the number of workers that are there; some moments later they wait for jobs."""
    active: str
    done: str

    async def run(self, server: PostgresServer, folder: Path, processes: int, jobs: int) -> Rush:
        url = (await server.create_database()).replace("+asyncpg", "")
        folder.mkdir(parents=True)
        (folder / "noting.py").write_text(NOTING)
        (folder / "jobs.py").write_text(self.module)
        await self.install(url)
        with ending() as workers:
            workers += [start(folder, {"BENCH_URL": url}, self.command()) for _ in range(processes)]
            await self._until_waiting(url, workers)
            found = await rush(self.put(url, jobs), self.active, url, folder, workers, server)
        connection = await asyncpg.connect(url)
        done = await connection.fetchval(self.done)
        await connection.close()
        if done != jobs:
            raise SystemExit(f"{self.name}: {done} jobs are done instead of {jobs}: worth nothing")
        return found

    async def _until_waiting(self, url: str, workers: Sequence[Worker]) -> None:
        connection = await asyncpg.connect(url)
        while await connection.fetchval(self.waiting) < len(workers):
            for worker in workers:
                worker.check()
            await asyncio.sleep(0.05)
        await connection.close()
        await asyncio.sleep(SETTLE_SECONDS)

    @abstractmethod
    async def install(self, url: str) -> None: ...

    @abstractmethod
    def command(self) -> Sequence[str]: ...

    @abstractmethod
    async def put(self, url: str, jobs: int) -> None:
        """All with one COMMIT; with fresh statistics, as ours has them."""


class Procrastinate(Peer):
    module = """
import os
import procrastinate
from noting import note_first

app = procrastinate.App(
    connector=procrastinate.PsycopgConnector(
        conninfo=os.environ["BENCH_URL"], min_size={pool}, max_size={pool}
    )
)

@app.task(name="empty")
async def empty():
    note_first()
"""
    waiting = "SELECT count(*) FROM procrastinate_workers"
    active = "SELECT 1 FROM procrastinate_jobs WHERE status IN ('todo', 'doing') LIMIT 1"
    done = "SELECT count(*) FROM procrastinate_jobs WHERE status = 'succeeded'"

    def __init__(self, concurrency: int, pool: int) -> None:
        self._concurrency = concurrency
        self.module = self.module.format(pool=pool)
        self.name = f"Procrastinate, {concurrency}"
        self.set_up = (
            f"procrastinate worker --concurrency={concurrency}, PsycopgConnector with {pool} "
            "connections"
        )

    async def install(self, url: str) -> None:
        async with procrastinate.App(
            connector=procrastinate.PsycopgConnector(conninfo=url)
        ).open_async() as app:
            await app.schema_manager.apply_schema_async()

    def command(self) -> Sequence[str]:
        worker = ("worker", f"--concurrency={self._concurrency}")
        return (
            sys.executable,
            "-m",
            "procrastinate",
            "--app=jobs.app",
            "--log-level=warning",
            *worker,
        )

    async def put(self, url: str, jobs: int) -> None:
        app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=url))
        async with app.open_async(), await psycopg.AsyncConnection.connect(url) as connection:
            empty = app.configure_task("empty", connection=connection)
            await empty.batch_defer_async(*({} for _ in range(jobs)))
            await connection.execute("ANALYZE procrastinate_jobs")


class PgQueuer(Peer):
    module = """
import os
from contextlib import asynccontextmanager
import asyncpg
from noting import note_first
from pgqueuer import PgQueuer
from pgqueuer.db import AsyncpgDriver

@asynccontextmanager
async def main():
    connection = await asyncpg.connect(os.environ["BENCH_URL"])
    queuer = PgQueuer(AsyncpgDriver(connection))

    @queuer.entrypoint("empty")
    async def empty(job):
        note_first()

    yield queuer
"""
    waiting = "SELECT count(*) - 1 FROM pg_stat_activity WHERE datname = current_database()"
    active = "SELECT 1 FROM pgqueuer LIMIT 1"
    done = "SELECT count(*) FROM pgqueuer_log WHERE status = 'successful'"

    def __init__(self, batch: int) -> None:
        self._batch = batch
        self.name = f"PgQueuer, {batch:,}"
        self.set_up = (
            f"pgqueuer.run(batch_size={batch}) on uvloop, AsyncpgDriver with one connection, pgq "
            "autovac"
        )

    async def install(self, url: str) -> None:
        connection = await asyncpg.connect(url)
        queries = Queries(AsyncpgDriver(connection))
        await queries.install()
        await queries.optimize_autovacuum()
        await connection.close()

    def command(self) -> Sequence[str]:
        # What `pgq run` does, which in 1.6.0 ends with an error about its log level.
        work = (
            "import pgqueuer, uvloop; uvloop.run(pgqueuer.run('jobs:main', "
            f"batch_size={self._batch}))"
        )
        return (sys.executable, "-c", work)

    async def put(self, url: str, jobs: int) -> None:
        connection = await asyncpg.connect(url)
        async with connection.transaction():
            await Queries(AsyncpgDriver(connection)).enqueue(
                ["empty"] * jobs, [None] * jobs, [0] * jobs
            )
            await connection.execute("ANALYZE pgqueuer")
        await connection.close()


def show(title: str, found: dict[Contestant, list[Rush]], jobs: int) -> None:
    rates = {one: median(jobs / rush.seconds for rush in rushes) for one, rushes in found.items()}
    ours = [one for one in found if isinstance(one, Ours)]
    rows = [
        [
            "",
            "jobs/s",
            "range",
            *(f"{one.name} to it" for one in ours),
            "workers' cores",
            "PostgreSQL's",
        ]
    ]
    for one, rushes in found.items():
        slowest, fastest = (jobs / pick(rush.seconds for rush in rushes) for pick in (max, min))
        ratios = [f"{rates[own] / rates[one]:.2f}" for own in ours]
        servers = [rush.server for rush in rushes if rush.server is not None]
        used = [
            cores(mean(rush.workers for rush in rushes)),
            cores(mean(servers) if servers else None),
        ]
        rows.append(
            [one.name, f"{rates[one]:,.0f}", f"{slowest:,.0f}-{fastest:,.0f}", *ratios, *used]
        )
    print_table(title, rows)


async def compete(
    server: PostgresServer,
    folder: Path,
    contestants: list[Contestant],
    jobs: int,
    options: argparse.Namespace,
) -> None:
    for processes in options.processes:
        found: dict[Contestant, list[Rush]] = {one: [] for one in contestants}
        for turn in range(options.rounds):
            for one in (
                contestants[turn % len(contestants) :] + contestants[: turn % len(contestants)]
            ):
                own = folder / f"{jobs}-{processes}-{turn}-{contestants.index(one)}"
                found[one].append(await one.run(server, own, processes, jobs))
        worker = "process" if processes == 1 else "processes"
        show(
            f"{jobs:,} empty jobs, {processes} {worker} each, median of {options.rounds} rounds",
            found,
            jobs,
        )


async def measure(server: PostgresServer, folder: Path, options: argparse.Namespace) -> None:
    fast = [*map(Ours, options.max_running), *map(PgQueuer, options.batch)]
    contestants = [*fast, Procrastinate(options.concurrency, options.pool)]
    print("\n" + "\n".join(f"{one.name}: {one.set_up}" for one in contestants))
    await compete(server, folder, contestants, options.jobs, options)
    await compete(server, folder, fast, options.more_jobs, options)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=1_500)
    parser.add_argument("--more-jobs", type=int, default=20_000, help="without Procrastinate")
    parser.add_argument("--processes", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--max-running", type=int, nargs="+", default=[100, 1_000], help="of the service"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[10, 1_000], help="of PgQueuer")
    parser.add_argument("--concurrency", type=int, default=30, help="of Procrastinate")
    parser.add_argument(
        "--pool", type=int, default=10, help="connections of a Procrastinate worker"
    )
    options = parser.parse_args()
    logging.getLogger("procrastinate").setLevel("ERROR")  # it warns of an App in a script
    with start_server(fast=False) as server, tempfile.TemporaryDirectory() as folder:
        libraries = (*LIBRARIES, "procrastinate", "pgqueuer", "psycopg")
        describe(libraries, postgresql=asyncio.run(version_of(server.url)))
        asyncio.run(measure(server, Path(folder), options))


if __name__ == "__main__":
    main()
