"""Does the service stay as it is over an hour of much work?

    python bench/soak.py [--minutes 60] [--tasks 60]

Two services on each database, SQLite and PostgreSQL at the same time, with tasks that are due each
second. Memory (PSS would hide what grows in one process, so it is the resident set) and open files
are what Linux says of each process (/proc), each 15 seconds. The table shows both at a quarter, at
half and at the end of the time; what has grown in the second half, by a straight line through its
samples; and how many slots were due and how many of them ran.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from machine import describe, print_table
from sqlalchemy import text

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from batch_system.database.engine import Database
from batch_system.testing.postgres import start_server

ROOT = Path(__file__).resolve().parents[1]
SAMPLE_SECONDS = 15.0

TASK = """

class Each{number}(BaseTask):
    name, schedule = "each-{number}", "* * * * * *"

    async def run(self) -> None: ...
"""


@dataclass
class Service:
    """A running service, and its memory (MB) and open files at each sample."""

    label: str
    process: subprocess.Popen[bytes]
    memory: list[float] = field(default_factory=list)
    files: list[int] = field(default_factory=list)

    def sample(self) -> None:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found is not None
        self.memory.append(int(found[1]) / 1000)
        self.files.append(len(os.listdir(f"/proc/{self.process.pid}/fd")))

    def row(self) -> list[str]:
        quarter, half = len(self.memory) // 4, len(self.memory) // 2
        second = self.memory[half:]
        slope = statistics.linear_regression(range(len(second)), second).slope * len(second)
        at = [f"{self.memory[place]:.0f}" for place in (quarter, half, -1)]
        files = f"{self.files[quarter]}, {self.files[half]}, {self.files[-1]}"
        return [self.label, *at, f"{slope:+.1f}", files]


def start(folder: Path, label: str, settings: dict[str, str]) -> Service:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "LOG_LEVEL": "WARNING", **settings}
    with (folder / f"{label}.log").open("wb") as log:
        command = [sys.executable, "-m", "batch_system", "serve", "--port", "0"]
        return Service(
            label, subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log)
        )


async def counts(url: str) -> tuple[int, int, int]:
    """How many runs of slots there are, how many have succeeded, and how many slots were missed."""
    database = Database(url, setting="LEDGER_URL", pooled=False)
    async with database.reader.connect() as connection:
        runs = (
            await connection.execute(
                text(
                    "SELECT count(*), sum(CASE WHEN state = 'succeeded' THEN 1 ELSE 0 END) "
                    "FROM batch_runs"
                )
            )
        ).one()
        missed = (
            await connection.execute(text("SELECT coalesce(sum(count), 0) FROM batch_missed"))
        ).scalar_one()
    return int(runs[0]), int(runs[1] or 0), int(missed)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--tasks", type=int, default=60)
    given = parser.parse_args()
    describe()
    with ExitStack() as stack:
        server = stack.enter_context(start_server())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "tasks").mkdir()
        classes = "".join(TASK.format(number=number) for number in range(given.tasks))
        (folder / "tasks/each.py").write_text(f"from batch_system import BaseTask\n{classes}")
        urls = {
            "SQLite": f"sqlite+aiosqlite:///{folder}/ledger.db",
            "PostgreSQL": asyncio.run(server.create_database()),
        }
        services = []
        for kind, url in urls.items():
            application = f"sqlite+aiosqlite:///{folder}/app.db" if kind == "SQLite" else url
            for number in (1, 2):
                settings = {"DATABASE_URL": application, "LEDGER_URL": url}
                services.append(start(folder, f"{kind} {number}", settings))
                stack.callback(services[-1].process.kill)
                time.sleep(5)
        end_at = time.monotonic() + given.minutes * 60
        while time.monotonic() < end_at:
            time.sleep(SAMPLE_SECONDS)
            for each in services:
                each.sample()
        columns = [
            "service",
            "MB at 1/4",
            "at 1/2",
            "at the end",
            "grown in the second half",
            "files at the same times",
        ]
        print_table(
            f"{given.minutes:g} minutes, {given.tasks} tasks each second",
            [columns, *(s.row() for s in services)],
        )
        for kind, url in urls.items():
            runs, succeeded, missed = asyncio.run(counts(url))
            print(
                f"{kind}: {runs:,} runs, {succeeded:,} of them have succeeded; {missed:,} slots "
                "were missed"
            )


if __name__ == "__main__":
    main()
