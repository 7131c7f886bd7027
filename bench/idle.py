"""What does the service cost while nothing is due?

    python bench/idle.py [--nodes 1 3] [--tasks 50] [--seconds 60]

`python -m batch_system serve` runs in processes of its own, so many on one ledger: on SQLite and,
at the same time, on PostgreSQL, with tasks that are due on the 1st of January. CPU time and memory
are what Linux says of a process (/proc). Statements (BEGIN, COMMIT and ROLLBACK are not among them)
and transactions are counted by SQLAlchemy's events, which a sitecustomize.py installs in it.
PostgreSQL is asked for its own count as well, from another database of the server
(pg_stat_database, commits and rollbacks): that sees also what SQLAlchemy does not report, such as a
ping of a pooled connection, and autovacuum now and then. All figures are those of one process.

After that the two things that an idle node does are timed by themselves, on the same ledgers: a
look at the news, and a beat, which carries a look.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import asyncpg
from machine import describe, print_table, version_of
from sqlalchemy.ext.asyncio import AsyncConnection

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from batch_system.batch.ledger import database_time, nodes
from batch_system.batch.ledger.tables import new_id
from batch_system.batch.nodes import ledger_poll
from batch_system.database.engine import Database
from batch_system.testing.postgres import PostgresServer, start_server

ROOT = Path(__file__).resolve().parents[1]
TIMES = 300

COUNTING = """
import mmap, os, struct
from sqlalchemy import event
from sqlalchemy.engine import Engine

with open(os.environ["BENCH_COUNTS"], "r+b") as file:
    counts = mmap.mmap(file.fileno(), 16)

def add(place):
    struct.pack_into("Q", counts, place, struct.unpack_from("Q", counts, place)[0] + 1)

def add_statement(connection, cursor, statement, *_):
    if not statement.startswith("BEGIN"):
        add(0)

event.listen(Engine, "before_cursor_execute", add_statement)
event.listen(Engine, "begin", lambda *_: add(8))
"""

TASK = """
class Task{number}(BaseTask):
    name = "task-{number}"
    schedule = "0 0 1 1 *"
    async def run(self) -> None: ...
"""


@dataclass(frozen=True)
class Service:
    """A running service, and where it counts."""

    process: subprocess.Popen[str]
    counts: Path

    def look(self) -> dict[str, float]:
        statements, transactions = struct.unpack("QQ", self.counts.read_bytes())
        return {"cpu": self._cpu_seconds(), "statements": statements, "transactions": transactions}

    def _cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def megabytes(self) -> float:
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


@dataclass(frozen=True)
class Group:
    """The services on one ledger."""

    kind: str
    url: str
    services: list[Service]

    async def look(self, server: PostgresServer) -> dict[str, float]:
        """What was counted until now, of one process on the average."""
        seen = [service.look() for service in self.services]
        found = {what: statistics.fmean(one[what] for one in seen) for what in seen[0]}
        if "postgresql" in self.url:
            counted = await transactions_of(server, self.url.rpartition("/")[2].partition("?")[0])
            found["of the server"] = counted / len(self.services)
        return {**found, "at": time.monotonic()}


@contextlib.contextmanager
def serving(folder: Path, number: int, url: str) -> Iterator[Service]:
    counts = folder / f"counts-{number}"
    counts.write_bytes(bytes(16))
    own = {
        "DATABASE_URL": f"sqlite:///{folder}/app.db",
        "LEDGER_URL": url,
        "TASKS_DIR": f"{folder}/tasks",
        "PORT": "0",
    }
    more = {"PYTHONPATH": f"{folder}:{ROOT}", "BENCH_COUNTS": str(counts), "LOG_LEVEL": "WARNING"}
    command = [sys.executable, "-m", "batch_system", "serve"]
    process = subprocess.Popen(
        command, cwd=folder, env={**os.environ, **own, **more}, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout
        if not process.stdout.readline().startswith("Batch System on"):
            raise SystemExit("the service did not start")
        yield Service(process, counts)
    finally:
        process.terminate()
        process.communicate()


@contextlib.contextmanager
def group(
    place: Path, kind: str, nodes: int, tasks: int, server: PostgresServer
) -> Iterator[Group]:
    folder = place / f"{kind}-{nodes}"
    (folder / "tasks").mkdir(parents=True)
    source = "from batch_system import BaseTask\n" + "".join(
        TASK.format(number=number) for number in range(tasks)
    )
    (folder / "tasks/many.py").write_text(source)
    (folder / "sitecustomize.py").write_text(COUNTING)
    url = (
        f"sqlite+aiosqlite:///{folder}/ledger.db"
        if kind == "SQLite"
        else asyncio.run(server.create_database())
    )
    with contextlib.ExitStack() as stack:
        services = [stack.enter_context(serving(folder, number, url)) for number in range(nodes)]
        yield Group(kind, url, services)


async def transactions_of(server: PostgresServer, database: str) -> int:
    connection = await asyncpg.connect(server.url.replace("+asyncpg", ""))
    try:
        query = "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = $1"
        return int(await connection.fetchval(query, database))
    finally:
        await connection.close()


async def measure(
    server: PostgresServer, groups: Sequence[Group], seconds: float
) -> list[list[str]]:
    before = [await one.look(server) for one in groups]
    await asyncio.sleep(seconds)
    rows = [
        [
            "of one process",
            "% of a core",
            "MB",
            "statements/s",
            "transactions/s",
            "as the server counts them",
        ]
    ]
    for one, then in zip(groups, before, strict=True):
        now = await one.look(server)
        rate = {what: (now[what] - then[what]) / (now["at"] - then["at"]) for what in now}
        counted = [
            f"{rate[what]:.2f}" if what in rate else "-"
            for what in ("statements", "transactions", "of the server")
        ]
        memory = statistics.fmean(service.megabytes() for service in one.services)
        name = f"{one.kind}, nodes: {len(one.services)}"
        rows.append([name, f"{rate['cpu'] * 100:.2f}", f"{memory:.0f}", *counted])
    return [*rows, ["goal", "< 0.5", "< 120", "", "<= 1", "<= 1"]]


async def time_alone(groups: Sequence[Group]) -> list[list[str]]:
    rows = [["milliseconds", "look p50", "p99", "beat p50", "p99"]]
    for one in groups:
        database = Database(one.url, setting="LEDGER_URL", pool_size=1, plans_once=True)
        row = {
            "id": new_id(),
            "host": "bench",
            "pid": 1,
            "version": "",
            "draining": False,
            "tasks": [],
        }
        async with database.engine.begin() as connection:
            now = await database_time.now_of(connection)
            await nodes.register(connection, {**row, "started_at": now, "seen_at": now})
        figures = []
        for engine, beats in ((database.reader, False), (database.engine, True)):
            took = [await _turn(engine.begin(), str(row["id"]), beats) for _ in range(TIMES)]
            figures += [statistics.median(took), statistics.quantiles(took, n=100)[98]]
        await database.dispose()
        rows.append(
            [f"{one.kind}, nodes: {len(one.services)}", *(f"{took * 1000:.2f}" for took in figures)]
        )
    return rows


async def _turn(
    transaction: contextlib.AbstractAsyncContextManager[AsyncConnection], node: str, beats: bool
) -> float:
    began_at = time.perf_counter()
    async with transaction as connection:
        if beats:
            await nodes.beat(connection, node, 0.0)
        await ledger_poll.read(connection, node)
    return time.perf_counter() - began_at


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--nodes", type=int, nargs="+", default=[1, 3], help="how many on one ledger"
    )
    parser.add_argument("--tasks", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument(
        "--settle", type=float, default=40, help="seconds before; a lease is over then"
    )
    options = parser.parse_args()
    with start_server(fast=False) as server, tempfile.TemporaryDirectory() as name:
        describe(
            ("apscheduler", "sqlalchemy", "asyncpg", "aiosqlite", "uvicorn", "uvloop"),
            asyncio.run(version_of(server.url)),
        )
        with contextlib.ExitStack() as stack:
            groups = [
                stack.enter_context(group(Path(name), kind, number, options.tasks, server))
                for number in options.nodes
                for kind in ("SQLite", "PostgreSQL")
            ]
            time.sleep(options.settle)
            load = os.getloadavg()[0]
            rows = asyncio.run(measure(server, groups, options.seconds))
        alone = asyncio.run(time_alone(groups))
    print_table(
        f"idle for {options.seconds:.0f} s with {options.tasks} tasks; load {load:.1f} then", rows
    )
    print_table("a look at the news, and a beat with its look, by themselves", alone)


if __name__ == "__main__":
    main()
