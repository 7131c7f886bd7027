"""How long does `/metrics` take with 200 tasks, and what does the counting cost a run?

    python bench/metrics.py [--tasks 200] [--runs 1000000] [--requests 200] [--cold 4]
                            [--kinds sqlite postgresql]

A real `batch serve` has so many tasks, each of which has run once. It is asked over loopback by one
client that waits for each answer, so the time of a request has that of the client in it; the bare
answer of /healthz is printed beside. First the ledger has only these runs, then a million others,
of forty tasks more: a quarter is over, the others are queued, held by a pause, or retried tomorrow
(see tests/batch/crowd.py). "cached": the gauges of the ledger were read less than 15 seconds ago.
"cold": they are read for this request, which happens at most once in 15 seconds.

The last table is the CPU time that a run of a task spends on being counted, measured alone in this
process.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median

from api import Served, serving, times
from machine import describe, print_table, version_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from batch_system.batch.ledger.migration import LEDGER_HISTORY
from batch_system.database.engine import Database
from batch_system.database.migrate import migrate
from batch_system.metrics.process import ProcessMetrics
from batch_system.operations.system.gauges import FRESH_SECONDS
from batch_system.testing.postgres import start_server
from tests.batch.crowd import crowd

GOAL_MS = 20
COUNTED = 200_000

TASKS = """
from batch_system import BaseTask, TaskRegistry

def make(number):
    async def run(self): pass
    name = f"task-{{number:03}}"
    facts = {{"name": name, "schedule": "0 0 1 1 *", "run": run}}
    return type(f"Task{{number}}", (BaseTask,), facts)

for number in range({number}):
    TaskRegistry.register(make(number))
"""


async def run_all(served: Served, tasks: int) -> None:
    """Run each task once, and wait until all have ended."""
    async with served.client() as client:
        for number in range(tasks):
            answer = await client.post(f"/api/v1/tasks/task-{number:03}/runs", json={})
            assert answer.status_code < 300, answer.text
        while b'batch_runs_total{origin="manual"' not in (
            content := (await client.get("/metrics")).content
        ) or (content.count(b"batch_runs_total{") < tasks):
            await asyncio.sleep(0.2)


async def cold(served: Served, number: int) -> list[float]:
    """The milliseconds of requests for which the ledger is read."""
    taken = []
    async with served.client() as client:
        for _ in range(number):
            await asyncio.sleep(FRESH_SECONDS + 0.2)
            await client.get("/healthz")  # the connection is open
            taken += await times(client, "/metrics", 1)
    return taken


async def measure(served: Served, name: str, options: argparse.Namespace) -> list[list[str]]:
    async with served.client() as client:
        alive = await times(client, "/healthz", options.requests)
        size = len((await client.get("/metrics")).content)
        cached = await times(client, "/metrics", options.requests)
    return [
        [f"{name}, /healthz", *_figures(alive), "", ""],
        [f"{name}, cached", *_figures(cached), f"{size // 1024}", f"< {GOAL_MS}"],
        [f"{name}, cold", *_figures(await cold(served, options.cold)), "", ""],
    ]


def _figures(milliseconds: Sequence[float]) -> list[str]:
    ordered = sorted(milliseconds)
    return [
        str(len(ordered)),
        *(f"{value:.1f}" for value in (ordered[0], median(ordered), ordered[-1])),
    ]


async def measure_on(
    url: str, ledger_url: str, runs: int, options: argparse.Namespace
) -> list[list[str]]:
    """The figures with a new ledger that has so many other runs."""
    ledger = Database(ledger_url, setting="LEDGER_URL", pooled=False)
    await migrate(ledger, LEDGER_HISTORY)
    await crowd(ledger, runs)
    await ledger.dispose()
    with tempfile.TemporaryDirectory() as name:
        async with serving(
            Path(name), url, ledger_url, TASKS.format(number=options.tasks)
        ) as served:
            await run_all(served, options.tasks)
            return await measure(served, f"{runs:,} other runs", options)


def counting() -> list[list[str]]:
    """Microseconds of CPU time that counting takes: at the end of a run, and at its begin if its
    slot was on time.
    """
    metrics, rows = ProcessMetrics(), [["microseconds", "a run"]]
    names = [f"task-{number}" for number in range(200)]
    slot = datetime.now(UTC)
    at = slot + timedelta(milliseconds=3)
    began = time.process_time()
    for number in range(COUNTED):
        task = names[number % 200]
        metrics.count_attempt(
            task, "succeeded", (at - slot).total_seconds(), "succeeded", "schedule"
        )
        metrics.count_work(task, 0, 0)
    rows.append(["its end", f"{(time.process_time() - began) / COUNTED * 1e6:.2f}"])
    began = time.process_time()
    for _ in range(COUNTED):
        metrics.start_delay.add((at - slot).total_seconds())
    rows.append(["its begin", f"{(time.process_time() - began) / COUNTED * 1e6:.2f}"])
    return rows


async def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", type=int, default=200)
    parser.add_argument("--runs", type=int, default=1_000_000)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--cold", type=int, default=4)
    parser.add_argument(
        "--kinds", nargs="+", choices=["sqlite", "postgresql"], default=["sqlite", "postgresql"]
    )
    options = parser.parse_args()
    libraries = ("prometheus-client", "starlette", "uvicorn", "sqlalchemy", "asyncpg", "aiosqlite")
    heads = ["milliseconds", "requests", "least", "median", "most", "KB", "goal"]
    title = f"GET /metrics with {options.tasks} tasks"
    with ExitStack() as stack:
        server = (
            stack.enter_context(start_server(fast=False)) if "postgresql" in options.kinds else None
        )
        describe(libraries, await version_of(server.url) if server is not None else None)
        if "sqlite" in options.kinds:
            rows = [heads]
            for runs in (0, options.runs):
                folder = stack.enter_context(tempfile.TemporaryDirectory())
                urls = (f"sqlite+aiosqlite:///{folder}/{name}.db" for name in ("app", "ledger"))
                rows += await measure_on(*urls, runs, options)
            print_table(f"SQLite: {title}", rows)
        if server is not None:
            rows = [heads]
            for runs in (0, options.runs):
                url = await server.create_database()
                rows += await measure_on(url, url, runs, options)
            print_table(f"PostgreSQL: {title}", rows)
    print_table("counting", counting())


if __name__ == "__main__":
    asyncio.run(main())
