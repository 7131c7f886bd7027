"""How long does a run wait until an idle node starts it, when another process put it into the
ledger? And a cancel?

    python bench/latency.py [--runs 200] [--services 4] [--poll 1]

Of each database there are so many ledgers, each with one `batch serve` in a process of its own.
This process queues runs, into each ledger one after the other: the next when the last has ended,
and after a random part of POLL_SECONDS, so that no moment between two looks of the node is
preferred. A wait is from just before the COMMIT until the first line of the body, by the machine's
monotonic clock. What is due by its schedule does not wait so: see lateness.py.

After that some runs that would never end are cancelled by this process. Such a wait is from just
before the COMMIT of the request until the body gets CancelledError.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

from machine import describe, print_table, version_of
from services import Worker, cpu_seconds, ending, queued, start, wait_until_ready

from batch_system.batch.ledger import runs
from batch_system.batch.queue.cancel import request_cancel
from batch_system.config import Settings
from batch_system.database.engine import Database
from batch_system.testing.postgres import PostgresServer, start_server

KINDS = ("SQLite", "PostgreSQL")
DEFAULT_POLL = float(Settings.model_fields["POLL_SECONDS"].default)
MOST_SECONDS = 30.0

TASK = """
import asyncio, time
from batch_system import BaseTask, current_run

def note(name):
    with open(name, "ab", buffering=0) as file:
        file.write(f"{current_run().id} {time.monotonic()}\\n".encode())

class Noting(BaseTask):
    name, schedule, overlap = "noting", None, "allow"
    async def run(self):
        note("begun")

class Endless(BaseTask):
    name, schedule, overlap = "endless", None, "allow"
    async def run(self):
        note("begun")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            note("cancelled")
            raise
"""


@dataclass(frozen=True)
class Node:
    """A service with its own ledger, and where its runs note when they began."""

    folder: Path
    url: str
    worker: Worker

    async def waits(self, number: int, poll: float) -> list[float]:
        """Milliseconds, of so many runs."""
        database = Database(self.url, setting="LEDGER_URL", pool_size=1)
        found = []
        for _ in range(number):
            await asyncio.sleep(random.random() * poll)
            run, there_at = await self._queue(database, "noting")
            found.append((await self._noted_at("begun", run) - there_at) * 1000)
        await database.dispose()
        return found

    async def waits_for_cancel(self, number: int, poll: float) -> list[float]:
        """Milliseconds, of so many runs."""
        database = Database(self.url, setting="LEDGER_URL", pool_size=1)
        found = []
        for _ in range(number):
            run, _ = await self._queue(database, "endless")
            await self._noted_at("begun", run)
            await asyncio.sleep(random.random() * poll)
            async with database.engine.begin() as connection:
                await request_cancel(connection, run, "cancelled by the bench", "bench")
                asked_at = time.monotonic()
            found.append((await self._noted_at("cancelled", run) - asked_at) * 1000)
        await database.dispose()
        return found

    async def _queue(self, database: Database, task: str) -> tuple[str, float]:
        """Queue a run. Returns its id, and when that was committed, or a little earlier."""
        new = queued([task])
        async with database.engine.begin() as connection:
            await runs.insert(connection, new)
            there_at = time.monotonic()
        return new[0].id, there_at

    async def _noted_at(self, what: str, run: str) -> float:
        async with asyncio.timeout(MOST_SECONDS):
            while True:
                await asyncio.sleep(0.02)
                for line in (self.folder / what).read_text().splitlines():
                    if line.startswith(run):
                        return float(line.split()[1])


def open_node(folder: Path, url: str, poll: float, workers: list[Worker]) -> Node:
    (folder / "tasks").mkdir(parents=True)
    (folder / "tasks/noting.py").write_text(TASK)
    for name in ("begun", "cancelled"):
        (folder / name).touch()
    settings = {
        "DATABASE_URL": f"sqlite:///{folder}/app.db",
        "LEDGER_URL": url,
        "POLL_SECONDS": str(poll),
    }
    workers.append(start(folder, settings))
    return Node(folder, url, workers[-1])


async def new_url(server: PostgresServer, kind: str, folder: Path) -> str:
    return (
        await server.create_database()
        if kind == "PostgreSQL"
        else f"sqlite+aiosqlite:///{folder}/ledger.db"
    )


async def measure(
    server: PostgresServer, folder: Path, poll: float, options: argparse.Namespace
) -> tuple[list[list[str]], list[list[str]]]:
    """The rows of the runs, and those of the cancels."""
    share = -(-options.runs // options.services)
    with ending() as workers:
        nodes: dict[str, list[Node]] = {kind: [] for kind in KINDS}
        for kind in [*KINDS] * options.services:
            own = folder / f"{kind}-{poll}-{len(workers)}"
            nodes[kind].append(open_node(own, await new_url(server, kind, own), poll, workers))
        await asyncio.to_thread(wait_until_ready, workers)
        all_nodes = [node for kind in KINDS for node in nodes[kind]]
        before, began_at = sum(cpu_seconds(worker.pid) for worker in workers), time.monotonic()
        found = await asyncio.gather(*(node.waits(share, poll) for node in all_nodes))
        used = (sum(cpu_seconds(worker.pid) for worker in workers) - before) / len(workers)
        core = used / (time.monotonic() - began_at)
        ended = await asyncio.gather(
            *(node.waits_for_cancel(-(-share // 2), poll) for node in all_nodes)
        )
    tables = []
    for waits_by_node, last in ((found, [f"{core:.1%}"]), (ended, [])):
        rows = []
        for kind in KINDS:
            by_node = zip(all_nodes, waits_by_node, strict=True)
            waits = [wait for node, some in by_node if node in nodes[kind] for wait in some]
            figures = [
                min(waits),
                median(waits),
                quantiles(waits, n=100, method="inclusive")[98],
                max(waits),
            ]
            rows.append(
                [
                    kind,
                    f"{poll:g}",
                    str(len(waits)),
                    *(f"{figure:.0f}" for figure in figures),
                    *last,
                ]
            )
        tables.append(rows)
    return tables[0], tables[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=200, help="on each database")
    parser.add_argument(
        "--services", type=int, default=4, help="of each database, at the same time"
    )
    parser.add_argument("--poll", type=float, nargs="+", default=[DEFAULT_POLL])
    options = parser.parse_args()
    columns = ["", "POLL_SECONDS", "runs", "min", "p50", "p99", "max"]
    begun, cancelled = [[*columns, "core, a node"]], [columns]
    with start_server(fast=False) as server, tempfile.TemporaryDirectory() as name:
        describe(postgresql=asyncio.run(version_of(server.url)))
        for poll in options.poll:
            of_begun, of_cancelled = asyncio.run(measure(server, Path(name), poll, options))
            begun += of_begun
            cancelled += of_cancelled
    print_table("From queued by one process to started by another: ms", begun)
    print_table("From a cancel by one process to the run in another: ms", cancelled)


if __name__ == "__main__":
    main()
