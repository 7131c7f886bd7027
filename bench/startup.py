"""How long do commands, the import of a file of tasks, and a start take beside a bare import of
what is under them?

    python bench/startup.py [--rounds 20]

Each line is a ratio of two commands, which take turns, so that a busy machine slows both down. Each
is a process of its own; before the first round each is run once, which also writes bytecode. CPU
time is that of the process, in user and system mode. `batch runs` reads a ledger that is at the
newest migration, in an empty folder, and shows no run.

`batch serve`, with the tasks of this clone and that ledger, is measured to the first answer to a
client that tries every 5 ms: of /healthz, and of the home page without a sign-in. The bare server
is uvicorn with one route of Starlette's, in a process that has imported the asyncio part of
SQLAlchemy and APScheduler's scheduler.
"""

from __future__ import annotations

import argparse
import http.client
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import describe, print_table

ROOT = Path(__file__).resolve().parents[1]
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
    "from batch_system import … / import sqlalchemy": (
        (sys.executable, "-c", "from batch_system import BaseTask, get_db, get_logger"),
        SQLALCHEMY,
    ),
}
LEDGER = """
import asyncio
from batch_system.config import get_settings
from batch_system.operations.asking.databases import open_databases

async def make():
    for database in await open_databases(get_settings()):
        await database.dispose()

asyncio.run(make())
"""
BARE_SERVER = """
import sys
import apscheduler.schedulers.asyncio
import sqlalchemy.ext.asyncio
import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

async def answer(request):
    return JSONResponse({"status": "ok"})

app = Starlette(routes=[Route("/healthz", answer)])
uvicorn.run(app, port=int(sys.argv[1]), log_level="critical")
"""
BARE = (sys.executable, "-c", BARE_SERVER)
SERVE = (*BATCH, "serve", "--port")
SERVERS = {
    "batch serve, /healthz / bare uvicorn": (SERVE, "/healthz"),
    "batch serve, home page / bare uvicorn": (SERVE, "/"),
}
RETRY_SECONDS = 0.005
LIBRARIES = (
    "typer",
    "rich",
    "sqlalchemy",
    "pydantic-settings",
    "structlog",
    "alembic",
    "uvicorn",
    "starlette",
    "fastapi",
)
Times = tuple[float, float]
"""Seconds on the clock, and of the processor."""


def environment() -> dict[str, str]:
    own = {"BATCH_AUTH": "off", "TASKS_DIR": str(ROOT / "tasks")}
    return {
        name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"
    } | own


def run(command: tuple[str, ...], folder: str) -> Times:
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, cwd=folder, env=environment(), stdout=subprocess.DEVNULL, check=True)
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def start(command: tuple[str, ...], path: str, folder: str) -> Times:
    """Until the server, which gets a free port as its last argument, has answered this path with
    200.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    began = time.perf_counter()
    server = subprocess.Popen(
        (*command, str(port)),
        cwd=folder,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while (status := ask(port, path)) is None and server.poll() is None:
            time.sleep(RETRY_SECONDS)
        if status != 200:
            raise SystemExit(f"{path} was answered with {status}")
        fields = Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()
        return time.perf_counter() - began, (int(fields[11]) + int(fields[12])) / os.sysconf(
            "SC_CLK_TCK"
        )
    finally:
        server.terminate()
        server.wait()


def ask(port: int, path: str) -> int | None:
    """The status of the answer; None if nobody listens yet."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        answer.read()
    except OSError:
        return None
    finally:
        connection.close()
    return answer.status


def cells(ours: list[Times], bare: list[Times]) -> list[str]:
    """Least and median milliseconds of both sides, and the ratios of least, median and CPU
    times.
    """
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
    describe(LIBRARIES)
    rows = [["", "least ms", "median ms", "CPU ms", "least", "median", "CPU"]]
    with tempfile.TemporaryDirectory() as folder:
        run((sys.executable, "-c", LEDGER), folder)
        for title, (ours, bare) in PAIRS.items():
            for command in (ours, bare):
                run(command, folder)
            times = [(run(ours, folder), run(bare, folder)) for _ in range(rounds)]
            rows.append([title, *cells([left for left, _ in times], [right for _, right in times])])
        for title, (ours, path) in SERVERS.items():
            sides = ((ours, path), (BARE, "/healthz"))
            for side in sides:
                start(*side, folder)
            times = [(start(*sides[0], folder), start(*sides[1], folder)) for _ in range(rounds)]
            rows.append([title, *cells([left for left, _ in times], [right for _, right in times])])
    print_table(
        f"{rounds} rounds; what it takes, and how many times as long as the other side", rows
    )


if __name__ == "__main__":
    main()
