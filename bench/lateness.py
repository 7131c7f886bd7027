"""How late do runs start when many tasks are due in the same second? The service beside stock
APScheduler 3.

    python bench/lateness.py [--tasks 1000] [--slots 10] [--rush 10000] [--rush-slots 3]

The service runs on SQLite, on PostgreSQL, and beside them an APScheduler AsyncIOScheduler with its
default executor fires as many bare coroutines from CronTriggers and records nothing. Each is a
process of its own on uvloop, as under uvicorn, with room for all runs (MAX_RUNNING = tasks). They
fire in turn, some seconds apart, slot by slot, so that a slow moment of the machine hits each.
"late" is from the slot until the first line of the task's body.

In the rush, another process looks into the ledger every 25 ms, on a connection of its own: the time
given is when it began to look and found all rows, which is at most one look after their commit.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import multiprocessing
import os
import sqlite3
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import asyncpg
import uvloop
from apscheduler.schedulers.asyncio import AsyncIOScheduler
from apscheduler.triggers.cron import CronTrigger
from machine import describe, print_table, version_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from batch_system import BaseTask, TaskRegistry, logs
from batch_system.config import Settings
from batch_system.server.service import BatchService
from batch_system.server.uvicorn import collect_garbage_less_often
from batch_system.testing.postgres import PostgresServer, start_server

STOCK = "stock APScheduler"
spawn = multiprocessing.get_context("spawn")
started: list[float] = []
"""When each body began, in this process."""


@dataclass(frozen=True)
class Race:
    """So many tasks due at once, so many times; the contestants' slots are `apart` seconds from
    each other.
    """

    tasks: int
    slots: int
    apart: int
    contestants: tuple[str, ...]

    @property
    def period(self) -> int:
        return self.apart * len(self.contestants)

    def second(self, name: str) -> str:
        """The cron field for the seconds at which this contestant's tasks are due."""
        return f"{self.contestants.index(name) * self.apart}-59/{self.period}"

    def slots_of(self, name: str, start: float) -> list[float]:
        """`start` is a multiple of the period."""
        first = start + self.contestants.index(name) * self.apart
        return [first + self.period * n for n in range(self.slots)]


@dataclass(frozen=True)
class Slot:
    """What one contestant made of one slot, in ms."""

    late: list[float]
    stall: float
    """The longest that a callback waited for the loop, in the second after the slot."""


async def bare() -> None:
    started.append(time.time())


async def run(self: BaseTask) -> None:
    started.append(time.time())


@contextlib.asynccontextmanager
async def stock(count: int, second: str) -> AsyncIterator[None]:
    # A line for each run that it drops; see "started".
    logging.getLogger("apscheduler").setLevel(logging.CRITICAL)
    scheduler = AsyncIOScheduler(timezone=UTC)
    for number in range(count):
        scheduler.add_job(bare, CronTrigger(second=second, timezone=UTC), id=f"task-{number}")
    scheduler.start()
    yield
    scheduler.shutdown()


@contextlib.asynccontextmanager
async def service(count: int, second: str, settings: Settings) -> AsyncIterator[None]:
    for number in range(count):
        schedule = f"{second} * * * * *"
        TaskRegistry.register(
            type(
                f"Task{number}",
                (BaseTask,),
                {"name": f"task-{number}", "schedule": schedule, "run": run},
            )
        )
    logs.set_up("WARNING")
    batch = BatchService(settings)
    await batch.start()
    collect_garbage_less_often()  # as `batch serve` does
    yield
    await batch.stop()


async def compete(name: str, race: Race, url: str, parent: Connection) -> None:
    """Start, say so, learn when the race begins, and tell what became of each slot."""
    if name == STOCK:
        contestant = stock(race.tasks, race.second(name))
    else:
        contestant = service(race.tasks, race.second(name), settings_of(url, race.tasks))
    async with contestant:
        stalls: list[tuple[float, float]] = []
        ticker = asyncio.create_task(tick(stalls))
        parent.send("ready")
        slots = race.slots_of(name, await asyncio.to_thread(parent.recv))
        await asyncio.sleep(slots[-1] + race.apart - time.time())
        ticker.cancel()
    parent.send([slot_of(at, race.apart, stalls) for at in slots])


async def tick(stalls: list[tuple[float, float]]) -> None:
    while True:
        due = time.perf_counter() + 0.002
        await asyncio.sleep(0.002)
        stalls.append((time.time(), time.perf_counter() - due))


def slot_of(at: float, apart: int, stalls: list[tuple[float, float]]) -> Slot:
    late = sorted((moment - at) * 1000 for moment in started if at <= moment < at + apart)
    return Slot(
        late, max(stall * 1000 for moment, stall in stalls if at <= moment < at + 1 + stall)
    )


def settings_of(url: str, room: int) -> Settings:
    folder = Path(tempfile.mkdtemp())
    os.chdir(folder)
    (folder / "tasks").mkdir()
    application = f"sqlite+aiosqlite:///{folder}/app.db"
    return Settings(
        _env_file=None,
        DATABASE_URL=application,
        LEDGER_URL=url,
        MAX_RUNNING=room,
        TASKS_DIR=folder / "tasks",
    )


def in_process(name: str, race: Race, url: str, parent: Connection) -> None:
    uvloop.run(compete(name, race, url, parent))


def watch(url: str, race: Race, slots: list[float], parent: Connection) -> None:
    parent.send(asyncio.run(look_on(url, race, slots)))


async def look_on(url: str, race: Race, slots: list[float]) -> list[tuple[float, float]]:
    """For each slot the ms until all runs were in the ledger, and until all were there as
    succeeded.
    """
    found = []
    async with looking(url) as look:
        for at in slots:
            await asyncio.sleep(at - time.time())
            seen: dict[str, float] = {}
            while len(seen) < 2 and time.time() < at + race.apart:
                moment = time.time()
                there, succeeded = await look(datetime.fromtimestamp(at, UTC))
                if there >= race.tasks:
                    seen.setdefault("running", (moment - at) * 1000)
                if succeeded >= race.tasks:
                    seen.setdefault("succeeded", (moment - at) * 1000)
                await asyncio.sleep(0.025)
            found.append((seen.get("running", float("inf")), seen.get("succeeded", float("inf"))))
    return found


LOOK = (
    "SELECT count(*), count(*) FILTER (WHERE state = 'succeeded') FROM batch_runs "
    "WHERE created_at >= "
)


@contextlib.asynccontextmanager
async def looking(url: str) -> AsyncIterator[Any]:
    if url.startswith("sqlite"):
        file = sqlite3.connect(url.partition(":///")[2])

        async def look(at: datetime) -> Any:
            return file.execute(LOOK + "?", [f"{at:%Y-%m-%d %H:%M:%S.%f}"]).fetchone()

        yield look
        file.close()
        return
    server = await asyncpg.connect(url.replace("+asyncpg", ""))
    statement = await server.prepare(LOOK + "$1")
    yield statement.fetchrow
    await server.close()


def run_race(
    race: Race, urls: dict[str, str], watched: bool
) -> tuple[dict[str, list[Slot]], dict[str, Any]]:
    with contextlib.ExitStack() as stack:
        ends = {
            n: stack.enter_context(beside(in_process, n, race, urls.get(n, "")))
            for n in race.contestants
        }
        for end in ends.values():
            end.recv()
        start = (time.time() + 1) // race.period * race.period + race.period
        looks = {
            n: stack.enter_context(beside(watch, urls[n], race, race.slots_of(n, start)))
            for n in urls
            if watched
        }
        for end in ends.values():
            end.send(start)
        return {name: end.recv() for name, end in ends.items()}, {
            name: end.recv() for name, end in looks.items()
        }


@contextlib.contextmanager
def beside(function: Any, *args: Any) -> Iterator[Connection]:
    """`function(*args, connection)` in a process of its own, and this end of the connection."""
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=function, args=(*args, theirs))
    process.start()
    theirs.close()
    yield ours
    process.join()


def spread(values: list[float]) -> str:
    return f"{median(values):.0f} ({min(values):.0f}-{max(values):.0f})" if values else "-"


def p99(values: list[float]) -> float:
    return quantiles(values, n=100)[98]


def show(race: Race, found: dict[str, list[Slot]]) -> None:
    """Slots of which nothing started, because stock APScheduler drops what is over a second late,
    have no lateness.
    """
    ran = {
        name: [slot for slot in slots[1:] if len(slot.late) > 1] for name, slots in found.items()
    }
    usual = [p99(slot.late) for slot in ran[STOCK]]
    rows = [
        [
            "",
            "started",
            "p50",
            "p99",
            "last",
            "the first slot's p99",
            "p99 / stock's",
            "longest stall of the loop",
        ]
    ]
    for name, slots in ran.items():
        ratio = (
            median(p99(slot.late) for slot in slots) / median(usual) if slots and usual else None
        )
        first = found[name][0].late
        rows.append(
            [
                name,
                f"{sum(len(slot.late) for slot in slots):,} of {race.tasks * (race.slots - 1):,}",
                spread([median(slot.late) for slot in slots]),
                spread([p99(slot.late) for slot in slots]),
                spread([slot.late[-1] for slot in slots]),
                f"{p99(first):.0f}" if len(first) > 1 else "-",
                f"{ratio:.2f}" if ratio is not None else "-",
                spread([slot.stall for slot in found[name][1:]]),
            ]
        )
    rows.append(["goal", "all", "", "", "", "", "<= 0.7", ""])
    title = (
        f"{race.tasks:,} due at once: ms late, median (range) of {race.slots - 1} slots after the "
        "first"
    )
    print_table(title, rows)


def show_commits(race: Race, found: dict[str, Any]) -> None:
    rows = [["", "all running", "all succeeded"]]
    for name, looks in found.items():
        rows.append(
            [name, spread([one for one, _ in looks]), spread([other for _, other in looks])]
        )
    rows.append(["goal", "", "1000"])
    print_table(
        f"{race.tasks:,} due at once: ms from the slot until committed, median (range) of "
        f"{race.slots} slots",
        rows,
    )


async def new_urls(server: PostgresServer, folder: str, name: str) -> dict[str, str]:
    return {
        "SQLite": f"sqlite+aiosqlite:///{folder}/{name}.db",
        "PostgreSQL": await server.create_database(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tasks", type=int, default=1_000)
    parser.add_argument("--slots", type=int, default=10, help="slots that each of them fires")
    parser.add_argument("--rush", type=int, default=10_000, help="tasks in the rush; 0: no rush")
    parser.add_argument("--rush-slots", type=int, default=3)
    options = parser.parse_args()
    contestants = ("SQLite", "PostgreSQL", STOCK)
    with start_server(fast=False) as server, tempfile.TemporaryDirectory() as folder:
        describe(postgresql=asyncio.run(version_of(server.url)))
        race = Race(options.tasks, options.slots, 2, contestants)
        show(race, run_race(race, asyncio.run(new_urls(server, folder, "many")), watched=False)[0])
        if options.rush:
            race = Race(options.rush, options.rush_slots, 5, contestants)
            found, looks = run_race(
                race, asyncio.run(new_urls(server, folder, "rush")), watched=True
            )
            show(race, found)
            show_commits(race, looks)


if __name__ == "__main__":
    main()
