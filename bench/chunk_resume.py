"""How soon does a run in chunks go on after kill -9, and does it matter how much of it was done?

    python bench/chunk_resume.py [--rows 1000000] [--samples 3] [--databases SQLite PostgreSQL]

A `batch serve` in a process of its own goes over a table in chunks of 1,000, and is killed with -9
when so much of it was done; then another one is started, with the same settings. `restart` is from
the start of that process to the commit of the run's first new chunk: it loads Python, finds the run
of the dead one, and takes it over. `of that in the body` is from the first line of `run()` to that
commit: what the place itself costs. Medians of some samples.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

from machine import describe, print_table, version_of
from manyrows import DATABASES, fill, new_url
from services import Worker, ending, insert, queued, start, wait_until, wait_until_ready

from batch_system.database.engine import Database
from batch_system.testing.postgres import PostgresServer, start_server

DONE = (0.01, 0.5, 0.95)
SIZE = 1_000
MOST_SECONDS = 300.0

TASK = f"""
import os, time
from sqlalchemy import select, update
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from batch_system import BaseTask

class Base(DeclarativeBase):
    pass

class Item(Base):
    __tablename__ = "items"
    id: Mapped[int] = mapped_column(primary_key=True)
    done: Mapped[int]

def note(chunk):
    with open("noted", "a") as file:
        file.write(f"{{os.getpid()}} {{chunk}} {{time.monotonic()}}\\n")

class Marks(BaseTask):
    name, schedule = "marks", None

    async def run(self):
        note(0)
        async for chunk in self.chunks(select(Item.id), key=Item.id, size={SIZE}):
            async with chunk as (db, ids):
                of_chunk = Item.id.between(ids[0], ids[-1])
                await db.execute(update(Item).where(of_chunk).values(done=Item.done + 1))
            note(chunk.number)
"""


class Noted(NamedTuple):
    """A line of a process: behind which chunk it was (0: it began), and when, by the monotonic
    clock.
    """

    pid: int
    chunk: int
    at: float


@dataclass
class Place:
    """A folder in which processes work on one run."""

    folder: Path
    application: str
    ledger: str
    workers: list[Worker]

    def start(self) -> Worker:
        settings = {
            "DATABASE_URL": self.application,
            "LEDGER_URL": self.ledger,
            "TMPDIR": str(self.folder),
        }
        self.workers.append(start(self.folder, settings))
        return self.workers[-1]

    def noted(self, worker: Worker) -> list[Noted]:
        whole, _, _ = (self.folder / "noted").read_text().rpartition("\n")
        lines = [line.split() for line in whole.splitlines()]
        return [
            Noted(int(pid), int(chunk), float(at))
            for pid, chunk, at in lines
            if int(pid) == worker.pid
        ]

    def wait_for(self, worker: Worker, chunk: int) -> None:
        def is_there() -> bool:
            worker.check()
            return any(line.chunk >= chunk for line in self.noted(worker))

        wait_until(is_there, MOST_SECONDS)


def resumed(place: Place, chunk: int) -> tuple[float, float]:
    """Seconds from the start of the next process to its first commit, and from the beginning of the
    body to it.
    """
    (place.folder / "tasks").mkdir(parents=True)
    (place.folder / "tasks/marks.py").write_text(TASK)
    (place.folder / "noted").touch()
    old = place.start()
    wait_until_ready([old])
    asyncio.run(insert(place.ledger, queued(["marks"])))
    place.wait_for(old, chunk)
    old.signal(signal.SIGKILL)
    old.process.wait()
    done = place.noted(old)[-1].chunk
    began_at = time.monotonic()
    new = place.start()
    place.wait_for(new, 1)
    begun, first = place.noted(new)[:2]
    # Of the last chunk the line may be missing, and not the commit.
    if not done < first.chunk <= done + 2:
        raise SystemExit(
            f"chunk {first.chunk} followed on chunk {done}: the figures are worth nothing"
        )
    new.kill()
    new.process.wait()
    return first.at - began_at, first.at - begun.at


async def make_table(application: str, rows: int) -> None:
    database = Database(application, setting="DATABASE_URL")
    await fill(database, rows)
    await database.dispose()


def measure(server: PostgresServer, options: argparse.Namespace, folder: Path) -> list[list[str]]:
    table = [["", *(f"{part:.0%} done" for part in DONE), "largest to smallest"]]
    for kind in options.databases:
        application = asyncio.run(new_url(server, kind))
        asyncio.run(make_table(application, options.rows))
        found: dict[float, list[tuple[float, float]]] = {part: [] for part in DONE}
        for sample in range(options.samples):
            for part in DONE:
                ledger = asyncio.run(new_url(server, kind))
                with ending() as workers:
                    place = Place(folder / f"{kind}-{sample}-{part}", application, ledger, workers)
                    found[part].append(resumed(place, round(part * options.rows / SIZE)))
        for number, name in enumerate(("restart, s", "of that in the body, s")):
            medians = [median(one[number] for one in found[part]) for part in DONE]
            shown = [f"{seconds:.3f}" for seconds in medians]
            table.append([f"{kind}, {name}", *shown, f"{max(medians) / min(medians):.2f}"])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--databases", nargs="+", default=DATABASES, choices=DATABASES)
    options = parser.parse_args()
    with start_server(fast=False) as server, tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        describe(postgresql=asyncio.run(version_of(server.url)))
        rows = measure(server, options, Path(folder))
    print_table(
        f"{options.rows:,} rows, killed and started anew, median of {options.samples} samples", rows
    )


if __name__ == "__main__":
    main()
