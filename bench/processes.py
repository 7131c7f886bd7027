"""How many empty runs a second do 1, 2 and 4 processes make of one queue on one PostgreSQL?

    python bench/processes.py [--runs 40000] [--processes 1 2 4] [--max-running 100 1000]
                              [--rounds 2]

Each process is a `batch serve`. They are idle when N queued runs of ten no-op tasks (overlap =
"allow") are put into the ledger with one COMMIT. Measured is from the first line of the first body,
in whatever process, until no run is active any more, which is looked at every 20 ms. In the end all
runs and attempts are counted. These are other figures than those of throughput.py, where one
process is alone with the server and is told that there is work.

CPU is that of the services, and of PostgreSQL's processes, in cores. They share the machine with
each other and with this process: where the sums come near to its cores, more processes can't be
faster.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import asyncpg
from machine import describe, print_table, version_of
from rush import NOTING, Rush, cores, rush
from services import ending, insert, queued, start, wait_until_ready

from batch_system.batch.ledger.tables import ACTIVE_SQL, NO_PART_SQL
from batch_system.testing.postgres import PostgresServer, start_server

ACTIVE = f"SELECT 1 FROM batch_runs WHERE {ACTIVE_SQL} AND {NO_PART_SQL} LIMIT 1"
TASKS = 10
TASK = """
class Task{number}(BaseTask):
    name, schedule, overlap = "task-{number}", None, "allow"
    async def run(self):
        note_first()
"""


@dataclass(frozen=True)
class Round:
    rush: Rush
    rate: float
    shares: list[int]
    """How many runs each process made, the fewest first."""


async def run_round(
    server: PostgresServer, folder: Path, number: int, tasks: int, count: int, **settings: str
) -> Round:
    """`number` fresh processes on a fresh ledger, and `count` runs of so many tasks in turn."""
    url = await server.create_database()
    bodies = "".join(TASK.format(number=n) for n in range(tasks))
    (folder / "tasks").mkdir(parents=True)
    (folder / "tasks/bodies.py").write_text(
        f"from noting import note_first\nfrom service import BaseTask\n{bodies}"
    )
    (folder / "noting.py").write_text(NOTING)
    own = {"DATABASE_URL": f"sqlite:///{folder}/app.db", "LEDGER_URL": url, **settings}
    with ending() as workers:
        workers += [start(folder, own) for _ in range(number)]
        await asyncio.to_thread(wait_until_ready, workers)
        new = queued(f"task-{n % tasks}" for n in range(count))
        found = await rush(insert(url, new), ACTIVE, url, folder, workers, server)
    return Round(found, count / found.seconds, await shares_of(url, count))


async def shares_of(url: str, count: int) -> list[int]:
    connection = await asyncpg.connect(url.replace("+asyncpg", ""))
    done = await connection.fetchval("SELECT count(*) FROM batch_runs WHERE state = 'succeeded'")
    nodes = await connection.fetch("SELECT count(*) FROM batch_attempts GROUP BY node")
    await connection.close()
    shares = sorted(int(row[0]) for row in nodes)
    if (done, sum(shares)) != (count, count):
        raise SystemExit(
            f"{done} succeeded runs and {sum(shares)} attempts instead of {count}: worth nothing"
        )
    return shares


def row(number: int, max_running: int, rounds: list[Round], of_one: float) -> list[str]:
    rates = [one.rate for one in rounds]
    share = median(one.shares[0] / sum(one.shares) * number for one in rounds)
    servers = [one.rush.server for one in rounds if one.rush.server is not None]
    figures = [
        f"{median(rates):,.0f}",
        f"{min(rates):,.0f}-{max(rates):,.0f}",
        f"{median(rates) / of_one:.2f}",
    ]
    used = [
        cores(mean(one.rush.workers for one in rounds)),
        cores(mean(servers) if servers else None),
    ]
    return [str(number), f"{max_running:,}", *figures, f"{share:.0%}", *used]


async def measure(
    server: PostgresServer, folder: Path, options: argparse.Namespace
) -> list[list[str]]:
    combinations = list(itertools.product(options.max_running, options.processes))
    found: dict[tuple[int, int], list[Round]] = {one: [] for one in combinations}
    for turn, (max_running, number) in itertools.product(range(options.rounds), combinations):
        own = folder / f"{turn}-{max_running}-{number}"
        done = await run_round(
            server, own, number, TASKS, options.runs, MAX_RUNNING=str(max_running)
        )
        found[max_running, number].append(done)
    head = [
        "processes",
        "MAX_RUNNING",
        "runs/s",
        "range",
        "to the first",
        "least share",
        "services",
        "PostgreSQL",
    ]
    rows = [head]
    for max_running, number in combinations:
        of_one = median(one.rate for one in found[max_running, options.processes[0]])
        rows.append(row(number, max_running, found[max_running, number], of_one))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=40_000)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--max-running", type=int, nargs="+", default=[100, 1_000])
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    with start_server(fast=False) as server, tempfile.TemporaryDirectory() as folder:
        describe(postgresql=asyncio.run(version_of(server.url)))
        rows = asyncio.run(measure(server, Path(folder), options))
    title = (
        f"{options.runs:,} empty runs on PostgreSQL, runs a second, median of {options.rounds} "
        "rounds"
    )
    print_table(f"{title}; all on {os.cpu_count()} cores", rows)


if __name__ == "__main__":
    main()
