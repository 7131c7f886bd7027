"""What does the service cost while nothing is due?

    python bench/idle.py [--tasks 50] [--seconds 60]

`python -m service serve` runs in a process of its own: on SQLite and, at the same time, on PostgreSQL,
with tasks that are due on the 1st of January. CPU time and memory are what Linux says of that process (/proc).
Statements (BEGIN, COMMIT and ROLLBACK are not among them) and transactions are counted by SQLAlchemy's events,
which a sitecustomize.py installs in it. PostgreSQL is asked for its own count as well, from another database
of the server (pg_stat_database, commits and rollbacks): that sees also what SQLAlchemy does not report, such as a ping
of a pooled connection, and autovacuum now and then.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import asyncpg
from machine import describe, print_table, version_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from service.testing.postgres import PostgresServer, start_server

ROOT = Path(__file__).resolve().parents[1]

COUNTING = """
import mmap, os, struct
from sqlalchemy import event
from sqlalchemy.engine import Engine

with open(os.environ["BENCH_COUNTS"], "r+b") as file:
    counts = mmap.mmap(file.fileno(), 16)

def add(place):
    struct.pack_into("Q", counts, place, struct.unpack_from("Q", counts, place)[0] + 1)

event.listen(Engine, "before_cursor_execute", lambda *_: add(0))
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
    database: str | None

    async def look(self, server: PostgresServer) -> dict[str, float]:
        statements, transactions = struct.unpack("QQ", self.counts.read_bytes())
        found = {"at": time.monotonic(), "cpu": self._cpu_seconds(), "statements": statements}
        if self.database is not None:
            found["of the server"] = await transactions_of(server, self.database)
        return {**found, "transactions": transactions}

    def _cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def megabytes(self) -> float:
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


@contextlib.contextmanager
def serving(folder: Path, tasks: int, url: str) -> Iterator[Service]:
    (folder / "tasks").mkdir(parents=True)
    source = "from service import BaseTask\n" + "".join(TASK.format(number=number) for number in range(tasks))
    (folder / "tasks/many.py").write_text(source)
    (folder / "sitecustomize.py").write_text(COUNTING)
    counts = folder / "counts"
    counts.write_bytes(bytes(16))
    own = {"DATABASE_URL": f"sqlite:///{folder}/app.db", "LEDGER_URL": url, "TASKS_DIR": f"{folder}/tasks", "PORT": "0"}
    environment = {**os.environ, **own, "PYTHONPATH": f"{folder}:{ROOT}", "BENCH_COUNTS": str(counts)}
    command = [sys.executable, "-m", "service", "serve"]
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        if not process.stdout.readline().startswith("Batch System on"):
            raise SystemExit("the service did not start")
        yield Service(process, counts, url.rpartition("/")[2].partition("?")[0] if "postgresql" in url else None)
    finally:
        process.terminate()
        process.communicate()


async def transactions_of(server: PostgresServer, database: str) -> int:
    connection = await asyncpg.connect(server.url.replace("+asyncpg", ""))
    try:
        query = "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = $1"
        return int(await connection.fetchval(query, database))
    finally:
        await connection.close()


async def measure(server: PostgresServer, services: dict[str, Service], seconds: float) -> list[list[str]]:
    before = {name: await service.look(server) for name, service in services.items()}
    await asyncio.sleep(seconds)
    rows = [["", "% of a core", "MB", "statements/s", "transactions/s", "as the server counts them"]]
    for name, service in services.items():
        after = await service.look(server)
        rate = {what: (after[what] - before[name][what]) / (after["at"] - before[name]["at"]) for what in after}
        counted = [
            f"{rate[what]:.2f}" if what in rate else "-" for what in ("statements", "transactions", "of the server")
        ]
        rows.append([name, f"{rate['cpu'] * 100:.2f}", f"{service.megabytes():.0f}", *counted])
    return [*rows, ["goal", "< 0.5", "< 120", "", "<= 2", "<= 2"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tasks", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--settle", type=float, default=40, help="seconds before; a lease is over then")
    options = parser.parse_args()
    with start_server(fast=False) as server, tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        describe(
            ("apscheduler", "sqlalchemy", "asyncpg", "aiosqlite", "uvicorn", "uvloop"),
            asyncio.run(version_of(server.url)),
        )
        folder = Path(name)
        urls = {"SQLite": f"sqlite:///{folder}/SQLite/ledger.db", "PostgreSQL": asyncio.run(server.create_database())}
        services = {kind: stack.enter_context(serving(folder / kind, options.tasks, url)) for kind, url in urls.items()}
        time.sleep(options.settle)
        rows = asyncio.run(measure(server, services, options.seconds))
    print_table(f"idle for {options.seconds:.0f} s with {options.tasks} tasks", rows)


if __name__ == "__main__":
    main()
