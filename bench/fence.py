"""What does the fence cost a commit? The same transaction inside a run that is fenced, and outside
of runs.

    python bench/fence.py [--commits 2000] [--rounds 3]

Each transaction inserts one user by a session of get_db() and commits. Both kinds take turns in
blocks of 100, so that whatever the machine does meanwhile meets both. PostgreSQL runs with its
default settings: a commit waits for the disk. The fence is one statement more, before COMMIT. On
PostgreSQL a timeout is set together with BEGIN, too.
"""

from __future__ import annotations

import argparse
import asyncio
import contextvars
import os
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, quantiles

import uvloop
from machine import describe, print_table, version_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from batch_system import get_db, logs
from batch_system.batch.context import current_run, fencing
from batch_system.batch.context.attempt_state import AttemptState
from batch_system.batch.context.current_run import CurrentRun
from batch_system.batch.ledger.states import Origin
from batch_system.batch.ledger.tables import new_id
from batch_system.database.engine import Database
from batch_system.database.migrate import migrate
from batch_system.database.session import leave_application_database, use_application_database
from batch_system.testing.postgres import PostgresServer, start_server
from service.application.models import User
from tests.migrations import APPLICATION_HISTORIES

GOAL_MS = 1.0
BLOCK = 100


async def commits(count: int) -> list[float]:
    """Milliseconds of each."""
    took = []
    for _ in range(count):
        start = time.perf_counter()
        async with get_db() as db:
            db.add(User(email=new_id()))
            await db.commit()
        took.append((time.perf_counter() - start) * 1000)
    return took


async def commits_of_a_run(count: int) -> list[float]:
    state = AttemptState.of(new_id(), "bench", attempt=1)
    state.fence, state.is_fenced = 1, True
    run = CurrentRun(state.run, "bench", datetime.now(UTC), 1, Origin.MANUAL, state)
    own = contextvars.copy_context()
    own.run(current_run.enter, run)
    return await asyncio.get_running_loop().create_task(commits(count), context=own)


async def measure_one(url: str, options: argparse.Namespace) -> tuple[list[float], list[float]]:
    database = Database(url, setting="DATABASE_URL")
    await migrate(database, *APPLICATION_HISTORIES)
    use_application_database(database, lambda made: fencing.guard(made, idle_seconds=30))
    bare: list[float] = []
    fenced: list[float] = []
    for _ in range(2):  # the first statements of a connection are prepared
        await commits(BLOCK)
        await commits_of_a_run(BLOCK)
    for _ in range(options.commits * options.rounds // BLOCK):
        bare += await commits(BLOCK)
        fenced += await commits_of_a_run(BLOCK)
    leave_application_database(database)
    await database.dispose()
    return bare, fenced


async def measure(server: PostgresServer, options: argparse.Namespace) -> list[list[str]]:
    rows = [["", "bare p50", "fenced p50", "bare p99", "fenced p99", "cost p50", "goal"]]
    urls = {
        "SQLite": f"sqlite+aiosqlite:///{os.getcwd()}/app.db",
        "PostgreSQL": await server.create_database(),
    }
    for kind, url in urls.items():
        bare, fenced = await measure_one(url, options)
        cost = median(fenced) - median(bare)
        figures = [
            median(bare),
            median(fenced),
            quantiles(bare, n=100)[-1],
            quantiles(fenced, n=100)[-1],
            cost,
        ]
        verdict = f"<= {GOAL_MS:g}: {'yes' if cost <= GOAL_MS else 'no'}"
        rows.append([kind, *(f"{figure:.2f}" for figure in figures), verdict])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--commits", type=int, default=2_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    logs.set_up("WARNING")
    with start_server(fast=False) as server, tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        describe(postgresql=asyncio.run(version_of(server.url)))
        rows = uvloop.run(measure(server, options))
    print_table(
        f"One row inserted and committed, milliseconds, {options.commits * options.rounds:,} each",
        rows,
    )


if __name__ == "__main__":
    main()
