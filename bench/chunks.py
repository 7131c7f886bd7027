"""What do chunks cost? `self.chunks()` beside a key loop written by hand, with the same statements
for the same rows.

    python bench/chunks.py [--rows 1000000] [--sizes 100 1000 10000] [--databases SQLite PostgreSQL]

One run of a service goes over three equal tables in turns, so that whatever the machine does
meanwhile meets all:

- `bare`: a loop by hand, outside of runs: a new session, a select by key with a limit, the body,
  COMMIT.
- `fenced`: the same inside the run, so that each commit passes the fence.
- `chunks`: `self.chunks()` in the run, which passes the fence too, and keeps its place.

A turn is 5,000 rows, or a chunk where that is more. After three turns for practice the figures are
medians over all turns. `fence` is fenced - bare, `place` is chunks - fenced, and `overhead` is
chunks / bare, each turn by turn: of the time, and of the processor time that this process used.

The bodies: `entities` changes an attribute of each ORM object, which the flush writes row by row;
`one UPDATE` reads columns and executes one statement for the whole chunk. The less the body does,
the more the loop weighs.
"""

from __future__ import annotations

import argparse
import asyncio
import contextvars
import os
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import uvloop
from machine import describe, print_table, version_of
from manyrows import DATABASES, Base, Columns, fill, new_url, running
from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession

from batch_system import BaseTask, TaskRegistry, get_db, logs
from batch_system.batch.queue.starts import start
from batch_system.testing.postgres import PostgresServer, start_server

KINDS = ("bare", "fenced", "chunks")
GOAL_PERCENT = 5.0
GOAL_MS = 1.0
LEAST_TURN = 5_000
PRACTICE = 3
BODIES = ("entities", "one UPDATE")


TABLES: dict[str, Any] = {
    kind: type(kind.title(), (Columns, Base), {"__tablename__": f"items_{kind}"}) for kind in KINDS
}
"""A mapped class for each kind of loop."""


async def body_of_entities(db: AsyncSession, table: Any, items: Sequence[Any]) -> None:
    for item in items:
        item.done += 1


async def body_of_one_update(db: AsyncSession, table: Any, items: Sequence[Any]) -> None:
    await db.execute(
        update(table).where(table.id.between(items[0].id, items[-1].id)).values(done=table.done + 1)
    )


@dataclass(frozen=True)
class Work:
    """What is selected, and what is done about it."""

    select: Callable[[Any], Any]
    do: Callable[[AsyncSession, Any, Sequence[Any]], Any]


WORK = {
    "entities": Work(select, body_of_entities),
    "one UPDATE": Work(lambda table: select(table.id, table.amount), body_of_one_update),
}


async def by_hand(kind: str, work: Work, size: int) -> AsyncIterator[int]:
    """The loop that `chunks()` replaces. Each step is a chunk."""
    table, last = TABLES[kind], 0
    while True:
        async with get_db() as db:
            statement = work.select(table).where(table.id > last).order_by(table.id).limit(size)
            rows = await db.execute(statement)
            items = rows.scalars().all() if work.select is select else rows.all()
            if not items:
                return
            last = items[-1].id
            await work.do(db, table, items)
            await db.commit()
        yield len(items)


async def by_chunks(task: BaseTask, work: Work, size: int) -> AsyncIterator[int]:
    table = TABLES["chunks"]
    async for chunk in task.chunks(work.select(table), key=table.id, size=size):
        async with chunk as (db, items):
            await work.do(db, table, items)
        yield len(items)


def turn_of(size: int) -> int:
    """Rows."""
    return max(size, LEAST_TURN)


@dataclass
class Turns:
    """What each turn took: seconds, and seconds of this process's processor time."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    async def take(self, loop: AsyncIterator[int], size: int) -> None:
        wall, cpu, rows = time.perf_counter(), time.process_time(), 0
        while rows < turn_of(size):
            rows += await anext(loop)
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)


measured: asyncio.Queue[dict[str, Turns]] = asyncio.Queue()


class MeasureTask(BaseTask):
    name, schedule = "measure", None

    async def run(self, body: str, size: int, turns: int) -> None:
        work, took = WORK[body], {kind: Turns() for kind in KINDS}
        loops = {kind: by_hand(kind, work, size) for kind in KINDS[:2]}
        loops["chunks"] = by_chunks(self, work, size)
        for number in range(turns):
            for kind in KINDS[number % 3 :] + KINDS[: number % 3]:
                own = contextvars.Context() if kind == "bare" else contextvars.copy_context()
                await asyncio.get_running_loop().create_task(
                    took[kind].take(loops[kind], size), context=own
                )
        for loop in loops.values():
            await loop.aclose()  # type: ignore[attr-defined]
        measured.put_nowait(took)


async def measure(kind: str, server: PostgresServer, options: argparse.Namespace) -> None:
    """One service, and a run in it for each size and each body."""
    head = ["", "bare ms", "chunks ms", "fence ms", "place ms", "overhead", "of its CPU", "goal"]
    async with running(await new_url(server, kind), await new_url(server, kind)) as batch:
        for body in options.bodies:
            rows = [head]
            for size in options.sizes:
                await fill(batch.application, options.rows, list(TABLES.values()))
                await start(MeasureTask, body=body, size=size, turns=options.rows // turn_of(size))
                rows.append([f"{size:,} rows a chunk", *figures(await measured.get(), size)])
            print_table(f"{kind}, {options.rows:,} rows, {body}: of one chunk", rows)


def figures(took: dict[str, Turns], size: int) -> list[str]:
    turns = slice(PRACTICE, None) if len(took["bare"].wall) > 3 * PRACTICE else slice(None)
    bare, fenced, chunks = (
        [1000 * seconds * size / turn_of(size) for seconds in took[kind].wall[turns]]
        for kind in KINDS
    )
    fence = median(b - a for a, b in zip(bare, fenced, strict=True))
    place = median(b - a for a, b in zip(fenced, chunks, strict=True))
    overhead = 100 * median(b / a - 1 for a, b in zip(bare, chunks, strict=True))
    cpu = 100 * median(
        b / a - 1 for a, b in zip(took["bare"].cpu[turns], took["chunks"].cpu[turns], strict=True)
    )
    goal = ""
    if size == 100:  # where a body that varies does not hide it
        goal = f"fence <= {GOAL_MS:g} ms: {'yes' if fence <= GOAL_MS else 'no'}"
    if size == 1_000:
        goal = f"<= {GOAL_PERCENT:g}%: {'yes' if overhead <= GOAL_PERCENT else 'no'}"
    shown = [f"{figure:.2f}" for figure in (median(bare), median(chunks), fence, place)]
    return [*shown, f"{overhead:+.1f}%", f"{cpu:+.1f}%", goal]


async def measure_all(server: PostgresServer, options: argparse.Namespace) -> None:
    for kind in options.databases:
        await measure(kind, server, options)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 1_000, 10_000])
    parser.add_argument("--bodies", nargs="+", default=BODIES, choices=BODIES)
    parser.add_argument("--databases", nargs="+", default=DATABASES, choices=DATABASES)
    options = parser.parse_args()
    TaskRegistry.register(MeasureTask)
    logs.set_up("WARNING")
    with start_server(fast=False) as server, tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        describe(postgresql=asyncio.run(version_of(server.url)))
        uvloop.run(measure_all(server, options))


if __name__ == "__main__":
    main()
