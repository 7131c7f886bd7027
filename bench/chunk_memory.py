"""Does a process grow with the number of rows that it goes over in chunks?

    python bench/chunk_memory.py [--rows 100000 5000000] [--databases SQLite PostgreSQL]

For each number of rows a new process starts a service, and runs one task in it: chunks of 1,000 ORM
objects, of which one in ten is changed. The figure is the most memory that the process ever had
resident, as Linux counts it (VmHWM). Rows have 200 bytes, so that even the smaller table fills
SQLite's page cache (16 MB a connection).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import uvloop
from machine import describe, print_table, version_of
from manyrows import DATABASES, Item, fill, new_url, running
from sqlalchemy import select

from batch_system import BaseTask, TaskRegistry, logs
from batch_system.batch.queue.starts import start
from batch_system.database.engine import Database
from batch_system.testing.postgres import PostgresServer, start_server

GOAL_MB = 10.0
PADDING = 150
HERE = Path(__file__).resolve()

over: asyncio.Queue[int] = asyncio.Queue()


class Changes(BaseTask):
    name, schedule = "changes", None

    async def run(self) -> None:
        done = 0
        async for chunk in self.chunks(select(Item), key=Item.id, size=1_000):
            async with chunk as (_, items):
                for item in items[::10]:
                    item.done += 1
                done += len(items)
        over.put_nowait(done)


async def run_once(application: str, ledger: str, rows: int) -> None:
    """In a process of its own."""
    TaskRegistry.register(Changes)
    async with running(application, ledger):
        await start(Changes)
        if (done := await over.get()) != rows:
            raise SystemExit(
                f"{done} rows were done instead of {rows}: the figures are worth nothing"
            )
    print(peak_kilobytes())


def peak_kilobytes() -> int:
    """Of this process: what getrusage() says may be of the one that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


async def measure_one(application: str, ledger: str, rows: int) -> tuple[float, float]:
    """Megabytes, and seconds."""
    database = Database(application, setting="DATABASE_URL")
    await fill(database, rows, padding=PADDING)
    await database.dispose()
    began_at = time.monotonic()
    command = [sys.executable, str(HERE), "--once", application, ledger, str(rows)]
    found = await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, check=False
    )
    if found.returncode:
        raise SystemExit(f"a process ended by itself:\n{found.stdout}{found.stderr}")
    return int(found.stdout.split()[-1]) / 1024, time.monotonic() - began_at


async def measure(server: PostgresServer, options: argparse.Namespace) -> None:
    table = [["", *(f"{rows:,} rows, MB" for rows in options.rows), "grown by", "goal", "rows/s"]]
    for kind in options.databases:
        peaks = []
        for rows in options.rows:
            megabytes, seconds = await measure_one(
                await new_url(server, kind), await new_url(server, kind), rows
            )
            peaks.append(megabytes)
        grown = peaks[-1] - peaks[0]
        verdict = [
            f"{grown:+.1f}",
            f"<= {GOAL_MB:g}: {'yes' if grown <= GOAL_MB else 'no'}",
            f"{rows / seconds:,.0f}",
        ]
        table.append([kind, *(f"{peak:.1f}" for peak in peaks), *verdict])
    print_table("The most memory of a process that goes over so many rows", table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 5_000_000])
    parser.add_argument("--databases", nargs="+", default=DATABASES, choices=DATABASES)
    parser.add_argument("--once", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    logs.set_up("WARNING")
    if options.once:
        application, ledger, rows = options.once
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            uvloop.run(run_once(application, ledger, int(rows)))
        return
    with start_server(fast=False) as server, tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        describe(postgresql=asyncio.run(version_of(server.url)))
        uvloop.run(measure(server, options))


if __name__ == "__main__":
    main()
