"""What does a service with very many tasks cost: until it answers, while it idles, and in memory?

    python bench/many_tasks.py [--tasks 10 10000] [--starts 4] [--settle 20] [--seconds 30]

Files of 50 tasks each, or of fewer, are written into a temporary folder. Each task has a schedule
(300 different ones in all, which are due on the 1st of January) and an empty `run()`. `python -m
service serve` is a process of its own, on SQLite and then on PostgreSQL. It is started so many
times on the same ledger, one start after the other is over. The time counts from the start of the
process to its first answer to a GET of /healthz, for which it is asked 50 times a second. The first
start writes the bytecode of the files, makes the tables, and writes all tasks. "warm" is the median
of the others. CPU time and memory are what Linux says of the process (/proc): the CPU time of so
many seconds that begin so long after the answer, and the resident memory at their end, each as the
median of the warm starts.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from machine import describe, print_table, version_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from batch_system.testing.postgres import PostgresServer, start_server

ROOT = Path(__file__).resolve().parents[1]
IN_A_FILE = 50
PATIENCE = 120.0
TASK = """

class Task{number}(BaseTask):
    name = "task_{number:05}"
    schedule = "{minute} {hour} 1 1 *"

    async def run(self):
        pass
"""


@dataclass(frozen=True)
class Start:
    """One start of a service, and what it cost afterwards."""

    seconds: float
    percent: float
    megabytes: float


def write_tasks(folder: Path, tasks: int) -> None:
    folder.mkdir(parents=True)
    for first in range(0, tasks, IN_A_FILE):
        numbers = range(first, min(first + IN_A_FILE, tasks))
        texts = [
            TASK.format(number=number, minute=number % 60, hour=number % 300 // 60)
            for number in numbers
        ]
        (folder / f"file_{first // IN_A_FILE:03}.py").write_text(
            f"from batch_system import BaseTask\n{''.join(texts)}"
        )


def start(folder: Path, url: str, settle: float, seconds: float) -> Start:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    own = {
        "DATABASE_URL": f"sqlite:///{folder}/app.db",
        "LEDGER_URL": url,
        "TASKS_DIR": f"{folder}/tasks",
    }
    more = {"PORT": str(port), "BATCH_AUTH": "off", "PYTHONPATH": str(ROOT), "LOG_LEVEL": "WARNING"}
    environment = {
        name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"
    }
    began_at = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "batch_system", "serve"],
        cwd=folder,
        env={**environment, **own, **more},
        stdout=subprocess.DEVNULL,
    )
    try:
        until_answered(process, port)
        answered = time.monotonic() - began_at
        time.sleep(settle)
        before = cpu_seconds(process)
        time.sleep(seconds)
        return Start(answered, (cpu_seconds(process) - before) / seconds * 100, megabytes(process))
    finally:
        process.terminate()
        process.wait()


def until_answered(process: subprocess.Popen[bytes], port: int) -> None:
    give_up_at = time.monotonic() + PATIENCE
    while time.monotonic() < give_up_at and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz"):
                return
        except urllib.error.URLError:
            time.sleep(0.02)
    raise SystemExit("the service did not start")


def cpu_seconds(process: subprocess.Popen[bytes]) -> float:
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def megabytes(process: subprocess.Popen[bytes]) -> float:
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def measure(
    place: Path, kind: str, tasks: int, server: PostgresServer, options: argparse.Namespace
) -> list[str]:
    folder = place / f"{kind}-{tasks}"
    write_tasks(folder / "tasks", tasks)
    url = (
        f"sqlite+aiosqlite:///{folder}/ledger.db"
        if kind == "SQLite"
        else asyncio.run(server.create_database())
    )
    first, *warm = [
        start(folder, url, options.settle, options.seconds) for _ in range(options.starts)
    ]
    seconds, percent, memory = (
        statistics.median(getattr(one, what) for one in warm)
        for what in ("seconds", "percent", "megabytes")
    )
    return [
        f"{kind}, {tasks:,} tasks",
        f"{first.seconds:.2f}",
        f"{seconds:.2f}",
        f"{percent:.2f}",
        f"{memory:.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tasks", type=int, nargs="+", default=[10, 10_000])
    parser.add_argument(
        "--starts", type=int, default=4, help="of each service, the first one with empty databases"
    )
    parser.add_argument(
        "--settle", type=float, default=20, help="seconds between the answer and the idle time"
    )
    parser.add_argument("--seconds", type=float, default=30, help="of the idle time")
    options = parser.parse_args()
    with start_server(fast=False) as server, tempfile.TemporaryDirectory() as name:
        describe(
            ("apscheduler", "sqlalchemy", "asyncpg", "aiosqlite", "uvicorn", "uvloop"),
            asyncio.run(version_of(server.url)),
        )
        rows = [["a service", "first start, s", "warm start, s", "idle, % of a core", "MB"]]
        for kind in ("SQLite", "PostgreSQL"):
            rows += [measure(Path(name), kind, tasks, server, options) for tasks in options.tasks]
    print_table(
        f"{options.starts} starts",
        [*rows, ["goal with 10,000 tasks", "", "<= 3", "<= 1", "<= 150"]],
    )


if __name__ == "__main__":
    main()
