"""What do starts in a session cost, beside an INSERT of as many rows, and how long does the handing
over take?

    python bench/starts.py [--starts 1000] [--rounds 7]

Each row is one session that ends with its commit. On the one side are `start(session=…)`, a
statement for each, or `start_all(session=…)`. On the other one is SQLAlchemy's INSERT with the same
session and driver, of rows with the same values, into a table of the same shape with the same
indexes: a statement for each row, or one for all of them. Both sides take turns, after a round that
is not counted. `start()` without a session has nothing beside it: each has a transaction of its
own.

The handing over is that of a service: pages from `batch_starts` into the ledger, until none is
left.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import uvloop
from machine import describe, print_table, version_of
from sqlalchemy import MetaData, Table, text
from sqlalchemy.ext.asyncio import AsyncSession

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from batch_system import BaseTask, Start, TaskRegistry, logs, start, start_all
from batch_system.batch.firing import task_sync
from batch_system.batch.firing.handover import hand_over
from batch_system.batch.ledger import database_time, tables
from batch_system.batch.ledger.migration import LEDGER_HISTORY
from batch_system.batch.ledger.runs import NewRun
from batch_system.batch.ledger.tables import new_id
from batch_system.batch.queue import enqueue
from batch_system.batch.queue.start_rows import stored
from batch_system.config import get_settings
from batch_system.database import companions
from batch_system.database.engine import Database
from batch_system.database.histories import DATA_HISTORY
from batch_system.database.migrate import migrate
from batch_system.testing.postgres import PostgresServer, start_server

GOAL = 2.0
PLACES = {
    "SQLite beside SQLite": ("sqlite", "sqlite"),
    "one PostgreSQL database": ("postgresql", None),
    "two PostgreSQL databases": ("postgresql", "postgresql"),
}
"""The kinds of the application's database and of the ledger; None: it is the same database."""
MONTH = timedelta(days=30)

Work = Callable[[AsyncSession], Awaitable[object]]


class Invoice(BaseTask):
    name, schedule, overlap = "invoice", None, "allow"

    async def run(self, order: int, customer: str) -> None: ...


@dataclass(frozen=True)
class Place:
    """An application's database and a ledger. `bare`: a table like the one into which starts go."""

    name: str
    application: Database
    ledger: Database
    bare: Table

    @property
    def is_one(self) -> bool:
        return self.application is self.ledger

    async def dispose(self) -> None:
        enqueue.use_no_service()
        for database in {self.application, self.ledger}:
            await database.dispose()


async def make(server: PostgresServer, name: str) -> Place:
    kinds = PLACES[name]
    urls = [
        f"sqlite+aiosqlite:///{os.getcwd()}/{new_id()}.db"
        if kind == "sqlite"
        else await server.create_database()
        for kind in kinds
        if kind is not None
    ]
    databases = [Database(url, setting="DATABASE_URL") for url in urls]
    application, ledger = databases[0], databases[-1]
    await migrate(application, DATA_HISTORY)
    await migrate(ledger, LEDGER_HISTORY)
    shape = tables.runs if application is ledger else companions.starts
    bare = shape.to_metadata(MetaData(), name="bare")
    for index in bare.indexes:
        index.name = f"bare_{index.name}"
    async with application.engine.begin() as connection:
        await connection.run_sync(bare.metadata.create_all)
    task = TaskRegistry.of(Invoice)
    async with ledger.engine.begin() as connection:
        now = await database_time.now_of(connection)
        await task_sync.record_tasks(connection, {task.name: task}, now)
    enqueue.use_service(ledger, lambda: None)
    return Place(name, application, ledger, bare)


def params(number: int) -> dict[str, Any]:
    return {"order": number, "customer": f"customer-{number % 100}@example.org"}


async def rows_of(place: Place, number: int) -> list[dict[str, Any]]:
    """The rows that so many starts make."""
    async with place.ledger.reader.connect() as connection:
        now = await database_time.now_of(connection)
    new = [
        NewRun.queued(Invoice.name, None, now, exclusive=None, priority=0, params=params(each))
        for each in range(number)
    ]
    return [vars(run) for run in new] if place.is_one else [stored(run) for run in new]


async def seconds_of(place: Place, work: Work) -> float:
    """Of one session, with its commit."""
    began_at = time.perf_counter()
    async with place.application.session() as db:
        await work(db)
        await db.commit()
    return time.perf_counter() - began_at


async def compare(place: Place, number: int, rounds: int) -> list[list[str]]:
    rows = await rows_of(place, number)

    async def insert_each(db: AsyncSession) -> None:
        for row in rows:
            await db.execute(place.bare.insert().inline(), {**row, "id": new_id()})

    async def insert_all(db: AsyncSession) -> None:
        await db.execute(place.bare.insert().inline(), [{**row, "id": new_id()} for row in rows])

    async def start_each(db: AsyncSession) -> None:
        for each in range(number):
            await start(Invoice, **params(each), session=db)

    async def start_together(db: AsyncSession) -> None:
        await start_all([Start(Invoice, **params(each)) for each in range(number)], session=db)

    async def alone() -> float:
        began_at = time.perf_counter()
        for each in range(number):
            await start(Invoice, **params(each))
        return time.perf_counter() - began_at

    found = []
    pairs: list[tuple[str, Work, Work]] = [
        ("start(session=…)", start_each, insert_each),
        ("start_all(session=…)", start_together, insert_all),
    ]
    for name, ours, bare in pairs:
        both = [(await seconds_of(place, ours), await seconds_of(place, bare))]
        both += [
            (await seconds_of(place, ours), await seconds_of(place, bare)) for _ in range(rounds)
        ]
        mine, theirs = (median(column) for column in zip(*both[1:], strict=True))
        ratio = median(one / other for one, other in both[1:])
        verdict = "yes" if ratio <= GOAL else "no"
        found.append(
            [f"{place.name}: {name}", *in_milliseconds(mine, theirs), f"{ratio:.2f}", verdict]
        )
        await empty(place)
    found.append([f"{place.name}: start()", *in_milliseconds(await alone()), "-", "-", ""])
    await empty(place)
    return found


async def empty(place: Place) -> None:
    for database, names in (
        (place.application, ["bare", "batch_starts"]),
        (place.ledger, ["batch_runs"]),
    ):
        async with database.engine.begin() as connection:
            for name in names:
                await connection.execute(text(f"DELETE FROM {name}"))


async def handing_over(place: Place, number: int) -> list[str]:
    for first in range(0, number, 1_000):
        async with place.application.session() as db:
            for each in range(first, first + 1_000):
                await start(Invoice, **params(each), session=db)
            await db.commit()
    began_at, after = time.perf_counter(), 0
    while after is not None:
        after = await hand_over(place.application, place.ledger, MONTH, after=after)
    seconds = time.perf_counter() - began_at
    async with place.ledger.reader.connect() as connection:
        made = (await connection.execute(text("SELECT count(*) FROM batch_runs"))).scalar_one()
    if made != number:
        raise SystemExit(f"{made} runs instead of {number}: the figures are worth nothing")
    await empty(place)
    return [f"{place.name}: {number:,} starts", *in_milliseconds(seconds)]


def in_milliseconds(*seconds: float) -> list[str]:
    return [f"{each * 1000:,.0f}" for each in seconds]


async def measure(server: PostgresServer, options: argparse.Namespace) -> Sequence[list[list[str]]]:
    beside = [["", "here, ms", "bare, ms", "ratio", f"<= {GOAL:g}"]]
    handed = [["", "ms"]]
    for name in PLACES:
        place = await make(server, name)
        beside += await compare(place, options.starts, options.rounds)
        if not place.is_one:
            handed += [await handing_over(place, number) for number in (1_000, 10_000)]
        await place.dispose()
    return beside, handed


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--starts", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    logs.set_up("WARNING")
    TaskRegistry.register(Invoice)
    with start_server(fast=False) as server, tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        get_settings()
        describe(postgresql=asyncio.run(version_of(server.url)))
        beside, handed = uvloop.run(measure(server, options))
    print_table(f"{options.starts:,} starts, median of {options.rounds} rounds", beside)
    print_table("from batch_starts into the ledger", handed)


if __name__ == "__main__":
    main()
