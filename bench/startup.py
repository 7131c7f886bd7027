"""How long do commands, and the import of a file of tasks, take beside a bare import of the library under them?

    python bench/startup.py [--rounds 20]

Each line is a ratio of two commands, which take turns, so that a busy machine slows both down. Each is a process of its
own; before the first round each is run once, which also writes bytecode. CPU time is that of the process, in user and
system mode. `batch runs` reads a ledger that is at the newest migration, in an empty folder, and shows no run.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import describe, print_table

BATCH = (str(Path(sys.executable).with_name("batch")),)
TYPER = (sys.executable, "-c", "import typer")
SQLALCHEMY = (sys.executable, "-c", "import sqlalchemy")
PAIRS = {
    "batch --help / import typer": ((*BATCH, "--help"), TYPER),
    "batch runs / import typer": ((*BATCH, "runs"), TYPER),
    "batch runs / import sqlalchemy": ((*BATCH, "runs"), SQLALCHEMY),
    "import sqlalchemy / import typer": (SQLALCHEMY, TYPER),
    "import sqlalchemy.ext.asyncio / import sqlalchemy": (
        (sys.executable, "-c", "import sqlalchemy.ext.asyncio"),
        SQLALCHEMY,
    ),
    "from service import … / import sqlalchemy": (
        (sys.executable, "-c", "from service import BaseTask, get_db, get_logger"),
        SQLALCHEMY,
    ),
}
LEDGER = """
import asyncio
from service.config import get_settings
from service.operations.databases import open_databases

async def make():
    for database in await open_databases(get_settings()):
        await database.dispose()

asyncio.run(make())
"""
Times = tuple[float, float]
"""Seconds on the clock, and of the processor."""


def run(command: tuple[str, ...], folder: str) -> Times:
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, check=True)
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def cells(ours: list[Times], bare: list[Times]) -> list[str]:
    """Least and median milliseconds of both sides, and the ratios of least, median and CPU times."""
    row, ratios = [], []
    for kind, pick in ((0, min), (0, statistics.median), (1, statistics.median)):
        left, right = (pick([times[kind] for times in side]) for side in (ours, bare))
        row.append(f"{left * 1000:.0f} / {right * 1000:.0f}")
        ratios.append(f"{left / right:.2f}")
    return [*row, *ratios]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    describe(("typer", "rich", "sqlalchemy", "pydantic-settings", "structlog", "alembic"))
    rows = [["", "least ms", "median ms", "CPU ms", "least", "median", "CPU"]]
    with tempfile.TemporaryDirectory() as folder:
        run((sys.executable, "-c", LEDGER), folder)
        for title, (ours, bare) in PAIRS.items():
            for command in (ours, bare):
                run(command, folder)
            times = [(run(ours, folder), run(bare, folder)) for _ in range(rounds)]
            rows.append([title, *cells([left for left, _ in times], [right for _, right in times])])
    print_table(f"{rounds} rounds; what it takes, and how many times as long as the bare import", rows)


if __name__ == "__main__":
    main()
