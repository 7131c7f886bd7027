"""How long do others who write sessions wait while the shipped task deletes a million expired ones?

    python bench/cleanup.py [--sessions 1000000] [--idle 20]

`batch run cleanup_sessions` runs in a process of its own, with its default settings. Here somebody
makes a session, prolongs another one, and ends a third, each in a transaction of its own, 200 times
a second, without waiting for the one before; what each took is in the table, from when it was due.
Beside it the seed's way: all in one DELETE.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Awaitable
from dataclasses import dataclass, field
from statistics import median, quantiles

import uvloop
from machine import describe, print_table, version_of
from services import ROOT
from sqlalchemy import text

from batch_system import logs
from batch_system.config import Settings
from batch_system.database.engine import Database
from batch_system.database.migrate import migrate
from batch_system.testing.postgres import PostgresServer, start_server
from tests.migrations import APPLICATION_HISTORIES

EVERY = 1 / 200
NUMBERS = itertools.count(1)
SERIES = {
    "postgresql": "SELECT {name} || n, now(), CAST({at} AS timestamptz) + n * interval '1 s' "
    "FROM generate_series(1, {count}) n",
    "sqlite": "WITH RECURSIVE s(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM s WHERE n < {count}) "
    "SELECT {name} || n, {at}, strftime('%Y-%m-%d %H:%M:%S.000000', {at}, '+' || n || ' "
    "seconds') FROM s",
}
COLUMNS = "INSERT INTO sessions (session_id, created_at, expires_at) "
PAST, FUTURE = "'2020-01-01 00:00:00.000000'", "'2100-01-01 00:00:00.000000'"
WRITES = (
    f"{COLUMNS} VALUES ('new-' || :n, {PAST}, {FUTURE})",
    f"UPDATE sessions SET expires_at = {FUTURE} WHERE session_id = 'live-' || (:n % 10000 + 1)",
    "DELETE FROM sessions WHERE session_id = 'new-' || (:n - 100)",
)


@dataclass
class Writers:
    """Milliseconds that each write took, from when it was due."""

    database: Database
    took: list[float] = field(default_factory=list)

    async def beside(self, work: Awaitable[None]) -> float:
        """Write until the work is done; returns how many seconds that took."""
        began_at, over = time.perf_counter(), asyncio.Event()
        writing = asyncio.create_task(self._write(over))
        await work
        seconds = time.perf_counter() - began_at
        over.set()
        await writing
        return seconds

    async def _write(self, over: asyncio.Event) -> None:
        """What is due when it is over is waited for."""
        due_at = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            while not over.is_set():
                due_at += EVERY
                await asyncio.sleep(due_at - time.perf_counter())
                group.create_task(self._write_one(next(NUMBERS), due_at))

    async def _write_one(self, n: int, due_at: float) -> None:
        statement = WRITES[n % 3].replace(":n", str(n))
        async with self.database.engine.begin() as connection:
            await connection.exec_driver_sql(statement)
        self.took.append((time.perf_counter() - due_at) * 1000)


async def fill(database: Database, count: int) -> None:
    """So many expired ones in a table with 10,000 live ones."""
    async with database.engine.begin() as connection:
        for name, at, number in (("'old-'", PAST, count), ("'live-'", FUTURE, 10_000)):
            await connection.exec_driver_sql(
                COLUMNS + SERIES[database.kind].format(name=name, at=at, count=number)
            )
    if database.kind == "postgresql":
        async with database.engine.connect() as connection:
            await connection.execution_options(isolation_level="AUTOCOMMIT")
            await connection.execute(text("VACUUM ANALYZE sessions"))


async def left(database: Database) -> int:
    async with database.reader.connect() as connection:
        return int(
            (
                await connection.execute(
                    text("SELECT count(*) FROM sessions WHERE session_id LIKE 'old-%'")
                )
            ).scalar_one()
        )


async def in_chunks(database: Database, folder: str) -> None:
    kept = {name: value for name, value in os.environ.items() if name not in Settings.model_fields}
    url = database.url.render_as_string(hide_password=False)
    settings = {
        "DATABASE_URL": url,
        "LEDGER_URL": f"sqlite+aiosqlite:///{folder}/ledger.db",
        "LOG_LEVEL": "WARNING",
    }
    command = (sys.executable, "-m", "batch_system", "run", "cleanup_sessions")
    cleaning = await asyncio.create_subprocess_exec(
        *command, cwd=ROOT, env=kept | settings, stdout=asyncio.subprocess.DEVNULL
    )
    if await cleaning.wait():
        raise SystemExit("batch run cleanup_sessions has failed")


async def at_once(database: Database, folder: str) -> None:
    async with database.engine.begin() as connection:
        await connection.exec_driver_sql("DELETE FROM sessions WHERE session_id LIKE 'old-%'")


def row(
    name: str, took: list[float], idle: float | None = None, seconds: float | None = None
) -> list[str]:
    p99 = quantiles(took, n=100, method="inclusive")[98]
    ratio = "" if idle is None else f"{p99 / idle:.2f}"
    return [
        name,
        f"{len(took):,}",
        *(f"{figure:.2f}" for figure in (median(took), p99, max(took))),
        ratio,
        f"{seconds:.1f}" if seconds else "",
    ]


async def measure(server: PostgresServer, folder: str, options: argparse.Namespace) -> None:
    table = [["", "writes", "p50", "p99", "max", "p99 : idle", "s in all"]]
    urls = {
        "PostgreSQL": await server.create_database(),
        "SQLite": f"sqlite+aiosqlite:///{folder}/application.db",
    }
    for kind, url in urls.items():
        database = Database(url, setting="DATABASE_URL", pool_size=10)
        await migrate(database, *APPLICATION_HISTORIES)
        idle = Writers(database)
        await idle.beside(asyncio.sleep(options.idle))
        p99 = quantiles(idle.took, n=100, method="inclusive")[98]
        table.append(row(f"{kind}, idle", idle.took))
        for name, clean in (("in chunks", in_chunks), ("in one DELETE", at_once)):
            await fill(database, options.sessions)
            writers = Writers(database)
            seconds = await writers.beside(clean(database, folder))
            table.append(row(f"{kind}, {name}", writers.took, p99, seconds))
            if number := await left(database):
                raise SystemExit(f"{number} sessions are left: the figures are worth nothing")
            async with database.engine.begin() as connection:
                await connection.exec_driver_sql("DELETE FROM sessions")
        await database.dispose()
    print_table(
        f"{options.sessions:,} expired sessions deleted: ms until somebody else's write is "
        "committed",
        table,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sessions", type=int, default=1_000_000)
    parser.add_argument("--idle", type=float, default=20, help="seconds without a cleanup")
    options = parser.parse_args()
    logs.set_up("WARNING")
    with start_server(fast=False) as server, tempfile.TemporaryDirectory() as folder:
        describe(postgresql=asyncio.run(version_of(server.url)))
        uvloop.run(measure(server, folder, options))


if __name__ == "__main__":
    main()
