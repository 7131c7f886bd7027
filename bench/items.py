"""How many items a second does an ItemTask do? Beside the loops that one would write by hand.

    python bench/items.py [--items 1000] [--rounds 7] [--databases SQLite PostgreSQL]

`save` changes one attribute of an ORM object, in a savepoint as always. Without a `fetch` it stands
beside a loop by hand with the same savepoints: select by key, a savepoint for each item, COMMIT for
each hundred, outside of runs. Both take turns, each first in every other round, and the figures are
medians of these.

With a `fetch` that waits 20 ms nothing can be faster than `concurrency` / 20 ms: that is the limit
beside it. Chunks have 100 items (the default), and 1,000 in the last row: between two chunks
nothing is fetched.
"""

from __future__ import annotations

import argparse
import asyncio
import contextvars
import os
import tempfile
import time
from collections.abc import Awaitable, Callable
from functools import partial
from statistics import median
from typing import Any

import uvloop
from machine import describe, print_table, version_of
from manyrows import DATABASES, Item, fill, new_url, running
from sqlalchemy import Select, select
from sqlalchemy.ext.asyncio import AsyncSession

from batch_system import BaseTask, ItemTask, TaskRegistry, get_db, logs
from batch_system.batch.queue.starts import start
from batch_system.testing.postgres import PostgresServer, start_server

WAIT_SECONDS = 0.02
SIZE = 100
LIMITED = ((1, SIZE, 100), (10, SIZE, 1_000), (100, SIZE, 3_000), (100, 1_000, 3_000))
"""Concurrency, items in a chunk, and items."""

took: asyncio.Queue[float] = asyncio.Queue()
"""Seconds of each run."""
first = 0
"""The id before the first item of the next run."""
last = 0


class Saves(ItemTask):
    """Its items are those between `first` and `last`."""

    name, schedule = "saves", None

    def items(self) -> Select[Item]:
        return select(Item).where(Item.id > first, Item.id <= last)

    async def save(self, item: Item, fetched: Any, db: AsyncSession) -> None:
        item.done += 1

    async def run(
        self, redrive: str | None = None, items: list[str] | None = None
    ) -> dict[str, int]:
        began_at = time.perf_counter()
        result = await super().run(redrive, items)
        took.put_nowait(time.perf_counter() - began_at)
        return result


class Fetches(Saves):
    name = "fetches"

    async def fetch(self, item: Item) -> None:
        await asyncio.sleep(WAIT_SECONDS)


async def by_hand() -> float:
    """Seconds of the same without a task."""
    began_at, at = time.perf_counter(), first
    while True:
        async with get_db() as db:
            statement = (
                select(Item).where(Item.id > at, Item.id <= last).order_by(Item.id).limit(SIZE)
            )
            items = (await db.scalars(statement)).all()
            if not items:
                return time.perf_counter() - began_at
            for item in items:
                async with db.begin_nested():
                    item.done += 1
            at = items[-1].id
            await db.commit()


async def by_hand_alone() -> float:
    """Outside of runs."""
    return await asyncio.create_task(by_hand(), context=contextvars.Context())


async def by_task(task: type[BaseTask]) -> float:
    await start(task)
    return await took.get()


def next_items(count: int) -> None:
    global first, last
    first, last = last, last + count


async def measure_saves(options: argparse.Namespace) -> list[str]:
    loops: dict[str, Callable[[], Awaitable[float]]] = {
        "by hand": by_hand_alone,
        "task": partial(by_task, Saves),
    }
    rates: list[dict[str, float]] = []
    for number in range(2 * options.rounds + 1):
        found = {}
        for name in sorted(loops, reverse=number % 2 == 1):
            next_items(options.items)
            found[name] = options.items / await loops[name]()
        rates.append(found)
    del rates[0]  # it was for practice
    bare, task = (median(one[name] for one in rates) for name in loops)
    ratio = median(one["task"] / one["by hand"] for one in rates)
    return [
        "no fetch",
        f"{SIZE}",
        f"{options.items:,}",
        f"{task:,.0f}",
        f"by hand: {bare:,.0f}",
        f"{ratio:.0%}",
    ]


async def measure_fetches(
    options: argparse.Namespace, concurrency: int, size: int, items: int
) -> list[str]:
    Fetches.concurrency, Fetches.size = concurrency, size
    rates = []
    for _ in range(options.rounds):
        next_items(items)
        rates.append(items / await by_task(Fetches))
    rate, limit = median(rates), concurrency / WAIT_SECONDS
    shown = [
        f"{size:,}",
        f"{items:,}",
        f"{rate:,.0f}",
        f"limit: {limit:,.0f}",
        f"{rate / limit:.0%}",
    ]
    return [f"fetch, concurrency = {concurrency}", *shown]


async def measure(server: PostgresServer, options: argparse.Namespace) -> None:
    for kind in options.databases:
        global last
        last = 0
        async with running(await new_url(server, kind), await new_url(server, kind)) as batch:
            most = (
                2 * options.items * (2 * options.rounds + 1)
                + sum(items for _, _, items in LIMITED) * options.rounds
            )
            await fill(batch.application, most)
            rows = [["", "in a chunk", "items", "items/s", "beside it", "of that"]]
            rows.append(await measure_saves(options))
            for concurrency, size, items in LIMITED:
                rows.append(await measure_fetches(options, concurrency, size, items))
        print_table(f"An ItemTask on {kind}, median of {options.rounds} rounds", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--items", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--databases", nargs="+", default=DATABASES, choices=DATABASES)
    options = parser.parse_args()
    TaskRegistry.register(Saves)
    TaskRegistry.register(Fetches)
    logs.set_up("WARNING")
    with start_server(fast=False) as server, tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        describe(postgresql=asyncio.run(version_of(server.url)))
        uvloop.run(measure(server, options))


if __name__ == "__main__":
    main()
