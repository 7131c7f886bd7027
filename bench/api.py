"""How long do answers of the HTTP API take, and what do streams and requests cost a service, beside
a large ledger?

    python bench/api.py [--runs 1000000] [--requests 100] [--streams 200] [--seconds 20]
                        [--kinds sqlite postgresql]

For each database a ledger is made with so many runs of 200 tasks (see tests/batch/crowd.py) and a
hundred log lines for each of up to 100,000 runs. A real `batch serve` on it is asked over loopback,
by one client that waits for each answer, so the time of a request has that of the client in it. The
bare answer of /healthz is printed beside, in the same run. Requests are timed from ten seconds
after the start on.

Lateness is from a slot to the first line of the task's body, of 50 tasks that are due in each
second: first without requests, then with 50 requests a second beside them. Streams are opened while
nothing else is asked: the figures are of the service's process, as Linux says (/proc), beside the
same time without streams.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager, closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import quantiles

import httpx
from machine import describe, print_table, version_of
from sqlalchemy import text

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from batch_system.batch.ledger import run_logs
from batch_system.batch.ledger.migration import LEDGER_HISTORY
from batch_system.batch.ledger.run_logs import Block, LogLine
from batch_system.config import Settings
from batch_system.database.engine import Database
from batch_system.database.migrate import migrate
from batch_system.operations.asking.actor import Actor
from batch_system.operations.asking.context import Loaded
from batch_system.operations.operations import Operations
from batch_system.operations.people import access
from batch_system.testing.postgres import start_server
from tests.batch.crowd import OF_A_KIND, crowd

TICKS = 50
TASKS = f"""
from pathlib import Path
from batch_system import BaseTask, TaskRegistry, current_run
import time

def make(number):
    async def run(self):
        late = time.time() - current_run().slot.timestamp()
        with open("late", "a") as file:
            file.write(f"{{time.time()}} {{late}}\\n")
    facts = {{"name": f"tick-{{number}}", "schedule": "* * * * * *", "run": run}}
    return type(f"Tick{{number}}", (BaseTask,), facts)

for number in range({TICKS}):
    TaskRegistry.register(make(number))
"""
MANY = 160
QUIET = f"""
from batch_system import BaseTask, TaskRegistry

async def run(self):
    pass

many = [f"many-{{n}}" for n in range({MANY})]
over = [f"over-{{n}}" for n in range({OF_A_KIND})]
for name in many + over:
    facts = {{"name": name, "schedule": "0 0 1 1 *", "run": run}}
    TaskRegistry.register(type(name, (BaseTask,), facts))
"""
"""Loaded by the service are the tasks of the ledger that have no runs to execute."""
SETTLING = 10
"""Seconds after a start before requests are timed."""
UNTIL_REMOVED = 45
"""Seconds after a start before lateness is measured: by then the tasks that no process has are
removed.
"""
LOGGED = 100_000
LINES = 100
FAILED = 10_000
STREAMS_OF_ONE = 40
TOKENS = 10


@dataclass
class Served:
    """A service that answers. `secrets`: tokens of the role admin, each of which may have
    STREAMS_OF_ONE streams.
    """

    process: subprocess.Popen[bytes]
    folder: Path
    url: str
    secrets: list[str]
    environment: dict[str, str]

    def seconds(self) -> float:
        """CPU time of the process so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def megabytes(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+)", status)
        assert found is not None
        return int(found[1]) / 1024

    @property
    def secret(self) -> str:
        return self.secrets[0]

    def client(self, number: int = 0) -> httpx.AsyncClient:
        """A client with one of the tokens."""
        headers = {"Authorization": f"Bearer {self.secrets[number]}"}
        limits = httpx.Limits(max_connections=None)
        return httpx.AsyncClient(
            base_url=self.url, headers=headers, timeout=60, trust_env=False, limits=limits
        )


async def fill(ledger: Database, runs: int) -> None:
    """Runs of 200 tasks, and lines for some of them, made by the database itself."""
    await migrate(ledger, LEDGER_HISTORY)
    await crowd(ledger, runs, tasks=MANY, analyze=False)
    at = datetime.now(UTC).isoformat()
    lines = [
        LogLine(at, "info", "tasks.report", f"line {number} of a report about something")
        for number in range(LINES)
    ]
    [packed] = run_logs.pack([Block("0" * 8 + "-0000-7000-8000-" + "0" * 12, 1, 1, 0, lines)])
    failing = (
        "UPDATE batch_runs SET state = 'failed', reason = 'ValueError: the file is empty' "
        "WHERE id IN "
        f"(SELECT id FROM batch_runs WHERE state = 'succeeded' ORDER BY created_at LIMIT {FAILED})"
    )
    logging = (
        "INSERT INTO batch_log (run, fence, first_line, lines, attempt, block) "
        f"SELECT id, 1, 0, {LINES}, 1, :block FROM batch_runs WHERE finished_at IS NOT NULL "
        f"LIMIT {LOGGED}"
    )
    async with ledger.engine.begin() as connection:
        await connection.execute(text(failing))
        await connection.execute(text(logging), {"block": packed["block"]})
    # A service does not meet a ledger that was written in one transaction a second ago.
    if ledger.kind == "sqlite":
        await ledger.dispose()
        with closing(sqlite3.connect(str(ledger.url.database))) as file:
            file.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return
    async with ledger.engine.connect() as connection:
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        await connection.execute(text("VACUUM ANALYZE"))
        await connection.execute(text("CHECKPOINT"))


@asynccontextmanager
async def serving(folder: Path, url: str, ledger_url: str, tasks: str) -> AsyncIterator[Served]:
    (folder / "tasks").mkdir(exist_ok=True)
    for file in (folder / "tasks").glob("*.py"):
        file.unlink()
    (folder / "tasks" / "tasks.py").write_text(tasks)
    urls = {"DATABASE_URL": url, "LEDGER_URL": ledger_url}
    environment = {
        **os.environ,
        **urls,
        "PYTHONPATH": sys.path[0],
        "BATCH_REQUESTS_PER_SECOND": "100000",
        "LOG_LEVEL": "WARNING",
    }
    ledger = Database(ledger_url, setting="LEDGER_URL", pooled=False)
    operations = Operations(ledger, ledger, Loaded, Settings(), actor=Actor("bench"))
    made = [
        await access.create_token(operations.context, f"bench {time.time()} {n}", "admin")
        for n in range(TOKENS)
    ]
    await ledger.dispose()
    with (folder / "out").open("wb") as out:
        command = [sys.executable, "-m", "batch_system", "serve", "--port", "0"]
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=out)
        try:
            while (
                found := re.search(r"http://127\.0\.0\.1:\d+", (folder / "out").read_text())
            ) is None:
                assert process.poll() is None, (folder / "out").read_text()
                await asyncio.sleep(0.1)
            yield Served(process, folder, found[0], [token.secret for token in made], environment)
        finally:
            process.terminate()
            process.wait()


async def times(client: httpx.AsyncClient, path: str, number: int) -> list[float]:
    """The milliseconds of so many requests, one after the other."""
    taken = []
    for _ in range(number):
        began = time.perf_counter()
        answer = await client.get(path)
        taken.append((time.perf_counter() - began) * 1_000)
        assert answer.status_code == 200, (path, answer.text[:500])
    return taken


def spread(values: Sequence[float]) -> tuple[float, float]:
    """p50 and p95."""
    percent = quantiles(values, n=100)
    return percent[49], percent[94]


async def measure_requests(served: Served, number: int) -> list[list[str]]:
    async with served.client() as client:
        run = (await client.get("/api/v1/runs?state=succeeded&limit=1")).json()["runs"][0]["id"]
        day = (datetime.now(UTC) - timedelta(days=3)).strftime("%Y-%m-%dT%H:%M:%SZ")
        paths = {
            "/healthz": "/healthz",
            "/tasks": "/api/v1/tasks",
            "/tasks/{name}": "/api/v1/tasks/many-1",
            "/tasks/{name}/schedule": "/api/v1/tasks/many-1/schedule",
            "/tasks/{name}/runs": "/api/v1/tasks/over-1/runs?order=created",
            "/runs": "/api/v1/runs",
            "/runs?limit=200": "/api/v1/runs?limit=200",
            "/runs?state=failed": "/api/v1/runs?state=failed",
            "/runs?task=": "/api/v1/runs?task=over-1",
            "/runs, all filters": "/api/v1/runs?task=over-1&state=failed&origin=manual"
            f"&created_since={day}&ended_since={day}&param=day%3D1&text=nowhere",
            "/runs/{run}": f"/api/v1/runs/{run}",
            "/runs/{run}, by its end": f"/api/v1/runs/{run[-8:]}",
            "/runs/{run}/log": f"/api/v1/runs/{run}/log",
            "/runs/{run}/quarantine": f"/api/v1/runs/{run}/quarantine",
            "/quarantine": "/api/v1/quarantine",
            "/status": "/api/v1/status",
            "/nodes": "/api/v1/nodes",
            "/changes": "/api/v1/changes",
            "/backups": "/api/v1/backups",
            "/tokens": "/api/v1/tokens",
        }
        rows = []
        for name, path in paths.items():
            await times(client, path, 3)
            rows.append(
                [name, *(f"{value:.1f}" for value in spread(await times(client, path, number)))]
            )
        return rows


async def measure_bulk(served: Served) -> list[str]:
    async with served.client() as client:
        began = time.perf_counter()
        body = {"action": "retry", "filter": {"state": ["failed"]}}
        preview = (await client.post("/api/v1/runs/bulk", json=body)).json()
        shown = time.perf_counter() - began
        await client.post(f"/api/v1/runs/bulk/{preview['id']}")
        while (await client.get(f"/api/v1/runs/bulk/{preview['id']}")).json()[
            "finished_at"
        ] is None:
            await asyncio.sleep(0.01)
        return [
            f"bulk retry of {preview['count']:,}",
            f"{shown:.2f}",
            f"{time.perf_counter() - began - shown:.2f}",
        ]


async def measure_streams(served: Served, number: int, seconds: float) -> list[str]:
    """What so many open streams cost the service, in percent of a core, and in kilobytes of memory
    each.
    """
    before, began = served.seconds(), time.perf_counter()
    await asyncio.sleep(seconds)
    alone = (served.seconds() - before) / (time.perf_counter() - began)
    memory = served.megabytes()
    clients = [served.client(each // STREAMS_OF_ONE) for each in range(number)]

    async def read(client: httpx.AsyncClient) -> None:
        async with client.stream(
            "GET", "/api/v1/events?topic=runs&topic=tasks&topic=nodes"
        ) as answer:
            async for _ in answer.aiter_bytes():
                pass

    readers = [asyncio.create_task(read(client)) for client in clients]
    await asyncio.sleep(3)
    before, began = served.seconds(), time.perf_counter()
    await asyncio.sleep(seconds)
    share = (served.seconds() - before) / (time.perf_counter() - began)
    grown = served.megabytes() - memory
    is_open = sum(not reader.done() for reader in readers)
    for reader in readers:
        reader.cancel()
    await asyncio.gather(*readers, return_exceptions=True)
    for client in clients:
        await client.aclose()
    return [
        f"{is_open} streams",
        f"{alone:.1%}",
        f"{share:.1%}",
        f"{grown * 1024 / max(1, is_open):.0f}",
    ]


async def measure_lateness(served: Served, seconds: float) -> list[list[str]]:
    file = served.folder / "late"
    await asyncio.sleep(UNTIL_REMOVED)
    phases: list[list[str]] = []
    async with served.client() as client:
        for name, rate in (("no requests", 0), ("50 requests a second", 50)):
            began = time.time()
            give_up_at = began + seconds
            while time.time() < give_up_at:
                if rate:
                    await client.get("/api/v1/runs")
                    await asyncio.sleep(max(0.0, 1 / rate - (time.time() - began) % (1 / rate)))
                else:
                    await asyncio.sleep(0.5)
            late = [
                float(line.split()[1])
                for line in file.read_text().splitlines()
                if float(line.split()[0]) > began
            ]
            percent = quantiles(late, n=100)
            phases.append(
                [name, str(len(late)), f"{percent[49] * 1e3:.0f}", f"{percent[98] * 1e3:.0f}"]
            )
    return phases


def measure_commands(served: Served, rounds: int = 5) -> list[str]:
    """The seconds of `batch runs` on the database, and over the API."""
    taken: dict[str, list[float]] = {"database": [], "api": []}
    (served.folder / "token").write_text(served.secret)
    os.chmod(served.folder / "token", 0o600)
    remote = ["--url", served.url, "--token-file", "token"]
    for _ in range(rounds):
        for name, options in (("database", []), ("api", remote)):
            began = time.perf_counter()
            command = [sys.executable, "-m", "batch_system", *options, "runs"]
            subprocess.run(
                command,
                cwd=served.folder,
                env=served.environment,
                check=True,
                stdout=subprocess.DEVNULL,
            )
            taken[name].append(time.perf_counter() - began)
    database, api = min(taken["database"]), min(taken["api"])
    return [f"{database:.2f}", f"{api:.2f}", f"{api / database:.2f}"]


async def measure(kind: str, url: str, ledger_url: str, options: argparse.Namespace) -> None:
    ledger = Database(ledger_url, setting="LEDGER_URL", pooled=False)
    began = time.perf_counter()
    await fill(ledger, options.runs)
    await ledger.dispose()
    print(
        f"\n{kind}: a ledger with {options.runs:,} runs was made in "
        f"{time.perf_counter() - began:.0f} s",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        async with serving(folder, url, ledger_url, QUIET) as served:
            await asyncio.sleep(SETTLING)
            rows = await measure_requests(served, options.requests)
            print_table(f"{kind}: answers, ms", [["GET", "p50", "p95"], *rows])
            streams = await measure_streams(served, options.streams, options.seconds)
            print_table(f"{kind}: streams", [["", "CPU without", "CPU with", "KB each"], streams])
            print_table(
                f"{kind}: seconds", [["", "preview", "changed"], await measure_bulk(served)]
            )
            print_table(
                f"{kind}: `batch runs`, s",
                [["", "database", "API", "ratio"], ["", *measure_commands(served)]],
            )
        async with serving(folder, url, ledger_url, TASKS) as served:
            rows = await measure_lateness(served, options.seconds)
            print_table(
                f"{kind}: lateness of {TICKS} tasks a second, ms",
                [["", "runs", "p50", "p99"], *rows],
            )


async def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=1_000_000)
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument(
        "--kinds", nargs="+", choices=["sqlite", "postgresql"], default=["sqlite", "postgresql"]
    )
    options = parser.parse_args()
    describe(("starlette", "fastapi", "uvicorn", "pydantic", "sqlalchemy", "asyncpg", "aiosqlite"))
    with ExitStack() as stack:
        if "sqlite" in options.kinds:
            with tempfile.TemporaryDirectory() as folder:
                urls = (f"sqlite+aiosqlite:///{folder}/{name}.db" for name in ("app", "ledger"))
                await measure("SQLite", *urls, options)
        if "postgresql" in options.kinds:
            server = stack.enter_context(start_server(fast=False))
            url = await server.create_database()
            print(f"PostgreSQL {await version_of(url)}")
            await measure("PostgreSQL", url, url, options)


if __name__ == "__main__":
    asyncio.run(main())
