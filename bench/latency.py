"""How long does a run wait until an idle node starts it, when another process put it into the ledger?

    python bench/latency.py [--runs 200] [--services 4] [--poll 1 0.2]

Of each database there are so many ledgers, each with one `batch serve` in a process of its own. This process queues
runs, into each ledger one after the other: the next when the last has ended, and after a random part of POLL_SECONDS,
so that no moment between two looks of the node is preferred. A wait is from just before the COMMIT until the first line
of the body, by the machine's monotonic clock. What is due by its schedule does not wait so: see lateness.py.
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

from service.batch.ledger import runs
from service.config import Settings
from service.database.engine import Database
from service.testing.postgres import PostgresServer, start_server

KINDS = ("SQLite", "PostgreSQL")
DEFAULT_POLL = float(Settings.model_fields["POLL_SECONDS"].default)
MOST_SECONDS = 30.0

TASK = """
import time
from service import BaseTask, current_run

class Noting(BaseTask):
    name, schedule, overlap = "noting", None, "allow"
    async def run(self):
        with open("begun", "ab", buffering=0) as file:
            file.write(f"{current_run().id} {time.monotonic()}\\n".encode())
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
            new = queued(["noting"])
            async with database.engine.begin() as connection:
                await runs.insert(connection, new)
                there_at = time.monotonic()
            async with asyncio.timeout(MOST_SECONDS):
                found.append((await self._begun_at(new[0].id) - there_at) * 1000)
        await database.dispose()
        return found

    async def _begun_at(self, run: str) -> float:
        while True:
            await asyncio.sleep(0.02)
            for line in (self.folder / "begun").read_text().splitlines():
                if line.startswith(run):
                    return float(line.split()[1])


def open_node(folder: Path, url: str, poll: float, workers: list[Worker]) -> Node:
    (folder / "tasks").mkdir(parents=True)
    (folder / "tasks/noting.py").write_text(TASK)
    (folder / "begun").touch()
    settings = {"DATABASE_URL": f"sqlite:///{folder}/app.db", "LEDGER_URL": url, "POLL_SECONDS": str(poll)}
    workers.append(start(folder, settings))
    return Node(folder, url, workers[-1])


async def new_url(server: PostgresServer, kind: str, folder: Path) -> str:
    return await server.create_database() if kind == "PostgreSQL" else f"sqlite+aiosqlite:///{folder}/ledger.db"


async def measure(server: PostgresServer, folder: Path, poll: float, options: argparse.Namespace) -> list[list[str]]:
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
    rows = []
    for kind in KINDS:
        waits = [wait for node, some in zip(all_nodes, found, strict=True) if node in nodes[kind] for wait in some]
        figures = [min(waits), median(waits), quantiles(waits, n=100, method="inclusive")[98], max(waits)]
        rows.append([kind, f"{poll:g}", str(len(waits)), *(f"{figure:.0f}" for figure in figures), f"{core:.1%}"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=200, help="on each database")
    parser.add_argument("--services", type=int, default=4, help="of each database, at the same time")
    parser.add_argument("--poll", type=float, nargs="+", default=[DEFAULT_POLL, DEFAULT_POLL / 5])
    options = parser.parse_args()
    rows = [["", "POLL_SECONDS", "runs", "min", "p50", "p99", "max", "core, a node"]]
    with start_server(fast=False) as server, tempfile.TemporaryDirectory() as name:
        describe(postgresql=asyncio.run(version_of(server.url)))
        for poll in options.poll:
            rows += asyncio.run(measure(server, Path(name), poll, options))
    print_table("From queued by one process to started by another: ms", rows)


if __name__ == "__main__":
    main()
