"""How many empty runs a second go through the ledger? The service's engine beside the bare driver.

    python bench/throughput.py [--runs 20000] [--tasks 10] [--max-running 100 1000] [--rounds 2]

N queued runs of no-op tasks (overlap = "allow") are put into the ledger with one COMMIT. From there
on the engine of a running service claims them, executes each, and writes its outcome and its
attempt: until none is active any more. The ledger is asked for that when the engine holds none,
which is looked at every 5 ms. An SQLAlchemy event keeps every statement with its parameters. Then
the bare driver (asyncpg; sqlite3) executes exactly those statements, in the same transactions, on a
fresh ledger with the same queued runs. The bare driver waits for nothing, encodes nothing and runs
nothing: it is the database's share, and the limit. In between, the same statements are executed
with SQLAlchemy's asyncio engine: that is the limit of a service which is built on it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sqlite3
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import asyncpg
import uvloop
from machine import describe, print_table, version_of
from services import queued
from sqlalchemy import event, text

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from batch_system import BaseTask, TaskRegistry, logs
from batch_system.batch.ledger import runs
from batch_system.batch.ledger.migration import LEDGER_HISTORY
from batch_system.batch.ledger.runs import NewRun
from batch_system.batch.ledger.tables import ACTIVE_SQL, NO_PART_SQL, new_id
from batch_system.config import Settings
from batch_system.database.engine import Database
from batch_system.database.migrate import migrate
from batch_system.server.service import BatchService
from batch_system.server.uvicorn import collect_garbage_less_often
from batch_system.testing.postgres import PostgresServer, start_server

GOAL = 0.5
Transaction = list[tuple[str, Any]]


@dataclass
class Tape:
    """What one engine of SQLAlchemy executed, transaction by transaction."""

    transactions: list[Transaction] = field(default_factory=list)
    _open: dict[int, Transaction] = field(default_factory=dict)

    @property
    def statements(self) -> int:
        return sum(map(len, self.transactions))

    @contextlib.contextmanager
    def recording(self, database: Database) -> Iterator[None]:
        engine = database.engine.sync_engine
        listeners = [
            ("before_cursor_execute", self._execute),
            ("commit", self._end),
            ("rollback", self._drop),
        ]
        for name, listener in listeners:
            event.listen(engine, name, listener)
        yield
        for name, listener in listeners:
            event.remove(engine, name, listener)

    def _execute(self, connection: Any, _: Any, statement: str, parameters: Any, *__: Any) -> None:
        self._open.setdefault(id(connection), []).append((statement, parameters))

    def _end(self, connection: Any) -> None:
        self.transactions.append(self._open.pop(id(connection), []))

    def _drop(self, connection: Any) -> None:
        self._open.pop(id(connection), None)


async def run(self: BaseTask) -> None:
    pass


async def insert(database: Database, new: list[NewRun]) -> None:
    async with database.engine.begin() as connection:
        await runs.insert(connection, new)
        if database.kind == "postgresql":
            await connection.execute(text("ANALYZE batch_runs"))


async def through_the_service(url: str, new: list[NewRun], max_running: int) -> tuple[float, Tape]:
    """Seconds from the COMMIT of the queued runs until all are over."""
    batch, tape = BatchService(settings_of(url, max_running)), Tape()
    await batch.start()
    try:
        with tape.recording(batch.ledger):
            await insert(batch.ledger, new)
            start = time.perf_counter()
            tape.transactions.clear()
            batch.engine.wake()
            await until_over(batch)
            seconds = time.perf_counter() - start
    finally:
        await batch.stop()
    return seconds, tape


async def until_over(batch: BatchService) -> None:
    active = text(f"SELECT 1 FROM batch_runs WHERE {ACTIVE_SQL} AND {NO_PART_SQL} LIMIT 1")
    async with batch.ledger.reader.connect() as connection:
        while batch.engine.running or (await connection.execute(active)).first():
            await connection.rollback()
            await asyncio.sleep(0.005)


async def through_the_driver(url: str, new: list[NewRun], tape: Tape, by_sqlalchemy: bool) -> float:
    database = Database(url, setting="LEDGER_URL")
    await migrate(database, LEDGER_HISTORY)
    await insert(database, new)
    await database.dispose()
    if by_sqlalchemy:
        seconds = await replay_by_sqlalchemy(url, tape)
    elif database.kind == "sqlite":
        seconds = replay_on_sqlite(database.url.database or "", tape)
    else:
        seconds = await replay_on_postgresql(url, tape)
    await check(url, len(new))
    return seconds


def replay_on_sqlite(file: str, tape: Tape) -> float:
    connection = sqlite3.connect(file, isolation_level=None)
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("PRAGMA foreign_keys = ON")
    start = time.perf_counter()
    for transaction in tape.transactions:
        connection.execute("BEGIN IMMEDIATE")
        for statement, parameters in transaction:
            connection.execute(statement, parameters).fetchall()
        connection.execute("COMMIT")
    seconds = time.perf_counter() - start
    connection.close()
    return seconds


async def replay_on_postgresql(url: str, tape: Tape) -> float:
    settings = {"timezone": "UTC", "plan_cache_mode": "force_custom_plan"}
    connection = await asyncpg.connect(url.replace("+asyncpg", ""), server_settings=settings)
    start = time.perf_counter()
    for transaction in tape.transactions:
        async with connection.transaction():
            for statement, parameters in transaction:
                await connection.fetch(statement, *parameters)
    seconds = time.perf_counter() - start
    await connection.close()
    return seconds


async def replay_by_sqlalchemy(url: str, tape: Tape) -> float:
    database = Database(url, setting="LEDGER_URL")
    start = time.perf_counter()
    for transaction in tape.transactions:
        async with database.engine.begin() as connection:
            for statement, parameters in transaction:
                result = await connection.exec_driver_sql(statement, tuple(parameters))
                if result.returns_rows:
                    result.all()
    seconds = time.perf_counter() - start
    await database.dispose()
    return seconds


async def check(url: str, count: int) -> None:
    """That both ways lead to the same ledger."""
    database = Database(url, setting="LEDGER_URL", pooled=False)
    both = (
        "SELECT (SELECT count(*) FROM batch_runs WHERE state = 'succeeded'), (SELECT count(*) "
        "FROM batch_attempts)"
    )
    async with database.reader.connect() as connection:
        found = tuple((await connection.execute(text(both))).one())
    await database.dispose()
    if found != (count, count):
        raise SystemExit(
            f"{found} succeeded runs and attempts instead of {count}: the figures are worth nothing"
        )


def settings_of(url: str, max_running: int) -> Settings:
    folder = Path(tempfile.mkdtemp(dir=os.getcwd()))
    (folder / "tasks").mkdir()
    application = f"sqlite+aiosqlite:///{folder}/app.db"
    places = {"DATABASE_URL": application, "LEDGER_URL": url, "TASKS_DIR": folder / "tasks"}
    return Settings(_env_file=None, MAX_RUNNING=max_running, **places)


async def measure(server: PostgresServer, options: argparse.Namespace) -> list[list[str]]:
    rows = [
        [
            "",
            "MAX_RUNNING",
            "statements",
            "transactions",
            "bare driver",
            "by SQLAlchemy",
            "service",
            "ratio",
            "goal",
        ]
    ]
    for kind in ("SQLite", "PostgreSQL"):
        for max_running in options.max_running:
            rates: list[tuple[float, ...]] = []
            for _ in range(options.rounds):
                new = queued(f"task-{n % options.tasks}" for n in range(options.runs))
                urls = [await new_url(server, kind) for _ in range(3)]
                seconds, tape = await through_the_service(urls[0], new, max_running)
                await check(urls[0], len(new))
                replays = [
                    await through_the_driver(urls[n], new, tape, by_sqlalchemy=n == 2)
                    for n in (1, 2)
                ]
                rates.append(tuple(len(new) / taken for taken in (*replays, seconds)))
            bare, layered, ours = (median(column) for column in zip(*rates, strict=True))
            shape = [f"{max_running:,}", f"{tape.statements:,}", f"{len(tape.transactions):,}"]
            verdict = [
                f"{ours / bare:.0%}",
                f">= {GOAL:.0%}: {'yes' if ours / bare >= GOAL else 'no'}",
            ]
            rows.append(
                [kind, *shape, *(f"{rate:,.0f}" for rate in (bare, layered, ours)), *verdict]
            )
    return rows


async def new_url(server: PostgresServer, kind: str) -> str:
    if kind == "SQLite":
        return f"sqlite+aiosqlite:///{os.getcwd()}/{new_id()}.db"
    return await server.create_database()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=20_000)
    parser.add_argument("--tasks", type=int, default=10)
    parser.add_argument("--max-running", type=int, nargs="+", default=[100, 1_000])
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    for number in range(options.tasks):
        namespace = {"name": f"task-{number}", "schedule": None, "overlap": "allow", "run": run}
        TaskRegistry.register(type(f"Task{number}", (BaseTask,), namespace))
    logs.set_up("WARNING")
    with start_server(fast=False) as server, tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        collect_garbage_less_often()  # as `batch serve` does
        describe(postgresql=asyncio.run(version_of(server.url)))
        rows = uvloop.run(measure(server, options))
    print_table(
        f"{options.runs:,} empty runs, queued to succeeded: runs a second, median of "
        f"{options.rounds} rounds",
        rows,
    )


if __name__ == "__main__":
    main()
