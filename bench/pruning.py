"""How long does pruning hold a transaction open, and how long does somebody else who writes wait
for it?

    python bench/pruning.py [--runs 200000] [--old 60000]

A ledger has so many runs that are over, of ten tasks, each with an attempt and a block of log
lines; the older ones of them are pruned as a service does it. A transaction that deletes is timed
from when it has its connection until it gives that back: BEGIN, the statements, COMMIT. Meanwhile,
and for some seconds before, another one on the same engine writes a row every 20 ms, as firing and
claiming would, and what that takes is the second table. Between its transactions a service pauses
for 50 ms; here it is less, which is the harder case for the one who waits, and quicker to measure.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from statistics import median, quantiles
from typing import Any

import uvloop
from machine import describe, print_table, version_of
from services import queued
from sqlalchemy import event, insert, text

from batch_system import logs
from batch_system.batch.ledger import runs, tables
from batch_system.batch.ledger.migration import LEDGER_HISTORY
from batch_system.batch.ledger.states import RunState
from batch_system.batch.retention.pruning import Pruner
from batch_system.batch.retention.retention import Keep
from batch_system.database.engine import Database
from batch_system.database.migrate import migrate
from batch_system.testing.postgres import PostgresServer, start_server
from tests.migrations import APPLICATION_HISTORIES

GOAL_MS = 50.0
TASKS = 10
CHUNK = 5_000
KEEP_DAYS = 90
NOBODY = "00000000-0000-7000-8000-000000000000"
NODE = (
    "INSERT INTO batch_nodes (id, host, pid, version, started_at, seen_at, draining, tasks) VALUES "
)
BEAT = text(f"UPDATE batch_nodes SET beats = beats + 1 WHERE id = '{NOBODY}'")


@dataclass
class Deleting:
    """Times the transactions in which something is deleted, in milliseconds."""

    took: list[float] = field(default_factory=list)
    _since: dict[int, float] = field(default_factory=dict)
    _deleting: set[int] = field(default_factory=set)

    @contextmanager
    def watched(self, database: Database) -> Iterator[None]:
        engine = database.engine.sync_engine
        listeners: dict[str, Callable[..., None]] = {
            "checkout": self._checkout,
            "before_cursor_execute": self._execute,
            "checkin": self._checkin,
        }
        for name, listener in listeners.items():
            event.listen(engine, name, listener)
        yield
        for name, listener in listeners.items():
            event.remove(engine, name, listener)

    def _checkout(self, connection: Any, *_: Any) -> None:
        self._since[id(connection)] = time.perf_counter()

    def _execute(self, connection: Any, _: Any, statement: str, *__: Any) -> None:
        if statement.startswith("DELETE"):
            self._deleting.add(id(connection.connection.dbapi_connection))

    def _checkin(self, connection: Any, *_: Any) -> None:
        since = self._since.pop(id(connection), None)
        if since is not None and id(connection) in self._deleting:
            self._deleting.discard(id(connection))
            self.took.append((time.perf_counter() - since) * 1000)


@dataclass
class Writer:
    """Somebody who has a row to write every 20 ms; what each took, in milliseconds."""

    database: Database
    took: list[float] = field(default_factory=list)

    async def write(self) -> None:
        while True:
            began_at = time.perf_counter()
            async with self.database.engine.begin() as connection:
                await connection.execute(BEAT)
            self.took.append((time.perf_counter() - began_at) * 1000)
            await asyncio.sleep(0.02)


async def fill(ledger: Database, count: int, old: int) -> None:
    """A run every minute; `old` of them are over for longer than KEEP_DAYS."""
    first = datetime.now(UTC) - timedelta(days=KEEP_DAYS) - timedelta(minutes=old)
    moments = (first + timedelta(minutes=n) for n in range(count))
    while chunk := list(itertools.islice(moments, CHUNK)):
        new = queued(f"task-{n % TASKS}" for n in range(len(chunk)))
        for run, at in zip(new, chunk, strict=True):
            run.state, run.fence, run.attempt = RunState.SUCCEEDED, 1, 1
            run.slot = run.due_at = run.created_at = run.started_at = run.attempt_started_at = (
                run.finished_at
            ) = at
        async with ledger.engine.begin() as connection:
            await runs.insert(connection, new)
            await connection.execute(
                insert(tables.attempts), [attempt_of(run.id, run.created_at) for run in new]
            )
            await connection.execute(insert(tables.log), [block_of(run.id) for run in new])


def attempt_of(run: str, at: datetime) -> dict[str, Any]:
    times = {"started_at": at, "ended_at": at}
    return {"run": run, "fence": 1, "number": 1, "node": NOBODY, "outcome": "succeeded", **times}


def block_of(run: str) -> dict[str, Any]:
    return {
        "run": run,
        "fence": 1,
        "first_line": 1,
        "lines": 10,
        "attempt": 1,
        "block": os.urandom(400),
    }


async def open_ledger(url: str, options: argparse.Namespace) -> Database:
    ledger = Database(url, setting="LEDGER_URL", pool_size=5)
    await migrate(ledger, LEDGER_HISTORY)
    await fill(ledger, options.runs, options.old)
    async with ledger.engine.begin() as connection:
        now = "CURRENT_TIMESTAMP"
        tasks = "name, description, source, policies, first_seen_at, last_seen_at"
        values = ", ".join(f"('task-{n}', '', '', '{{}}', {now}, {now})" for n in range(TASKS))
        await connection.execute(text(f"INSERT INTO batch_tasks ({tasks}) VALUES {values}"))
        await connection.execute(text(f"{NODE} ('{NOBODY}', '', 1, '', {now}, {now}, false, '[]')"))
        if ledger.kind == "postgresql":  # as autovacuum would; nobody does it for SQLite
            await connection.execute(text("ANALYZE"))
    return ledger


async def measure_one(
    url: str, folder: str, options: argparse.Namespace
) -> tuple[Deleting, Writer, Writer, float]:
    application = Database(
        f"sqlite+aiosqlite:///{folder}/{time.monotonic_ns()}.db", setting="DATABASE_URL"
    )
    await migrate(application, *APPLICATION_HISTORIES)
    ledger, deleting = await open_ledger(url, options), Deleting()
    alone, beside = Writer(ledger), Writer(ledger)
    await write_while(alone, asyncio.sleep(options.alone))
    pruner = Pruner(ledger, application, Keep(KEEP_DAYS, per_task=100), pause=options.pause)
    began_at = time.perf_counter()
    with deleting.watched(ledger):
        counts = await write_while(beside, pruner.prune())
    rate = counts["runs"] / (time.perf_counter() - began_at)
    await application.dispose()
    await ledger.dispose()
    if abs(counts["runs"] - options.old) > 1:
        raise SystemExit(
            f"{counts['runs']} runs were pruned instead of {options.old}: the figures are worth "
            "nothing"
        )
    return deleting, alone, beside, rate


async def write_while(writer: Writer, work: Any) -> Any:
    writing = asyncio.create_task(writer.write())
    try:
        return await work
    finally:
        writing.cancel()
        await asyncio.wait([writing])


def row(name: str, took: list[float], *more: str) -> list[str]:
    figures = [median(took), quantiles(took, n=100, method="inclusive")[98], max(took)]
    verdict = f"<= {GOAL_MS:g}: {'yes' if max(took) <= GOAL_MS else 'no'}"
    above = sum(one > GOAL_MS for one in took)
    return [
        name,
        f"{len(took):,}",
        *(f"{figure:.1f}" for figure in figures),
        f"{above}",
        verdict,
        *more,
    ]


async def measure(server: PostgresServer, folder: str, options: argparse.Namespace) -> None:
    head = ["", "transactions", "p50", "p99", "max", f"above {GOAL_MS:g}", "goal for all"]
    batches, writers = [[*head, "runs/s"]], [head]
    urls = {
        "SQLite": f"sqlite+aiosqlite:///{folder}/ledger.db",
        "PostgreSQL": await server.create_database(),
    }
    for kind, url in urls.items():
        deleting, alone, beside, rate = await measure_one(url, folder, options)
        batches.append(row(kind, deleting.took, f"{rate:,.0f}"))
        writers += [
            row(f"{kind}, nothing is pruned", alone.took),
            row(f"{kind}, while pruning", beside.took),
        ]
    which = f"{options.old:,} of {options.runs:,} runs pruned"
    print_table(f"{which}: ms of a transaction that deletes", batches)
    print_table(f"{which}: ms until another one has written", writers)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=200_000)
    parser.add_argument("--old", type=int, default=60_000)
    parser.add_argument(
        "--pause", type=float, default=0.005, help="seconds between two transactions"
    )
    parser.add_argument("--alone", type=float, default=5, help="seconds in which nothing is pruned")
    options = parser.parse_args()
    logs.set_up("WARNING")
    with start_server(fast=False) as server, tempfile.TemporaryDirectory() as folder:
        describe(postgresql=asyncio.run(version_of(server.url)))
        uvloop.run(measure(server, folder, options))


if __name__ == "__main__":
    main()
