"""Chunks in real processes that are killed, frozen and stopped: a witness says that each item was done exactly once.

CHUNK_KILLS=100 is the long form; CHUNK_SEED repeats its moments.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from pathlib import Path

import pytest
from sqlalchemy import text

from service.database.engine import Database
from service.database.migrate import migrate
from service.host import APPLICATION_HISTORY, LEDGER_HISTORY
from tests.processes import Service, batch, service

ITEMS = 50_000
KILLS = int(os.environ.get("CHUNK_KILLS", "4"))
SIZE = 100 if KILLS < 50 else 10

TASKS = """
import os
from sqlalchemy import insert, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from service import BaseTask, current_run

class Base(DeclarativeBase): ...

class Item(Base):
    __tablename__ = "items"
    id: Mapped[int] = mapped_column(primary_key=True)

class Witness(Base):
    __tablename__ = "witness"
    number: Mapped[int] = mapped_column(primary_key=True)
    item: Mapped[int]
    run: Mapped[str]
    chunk: Mapped[int]

class Work(BaseTask):
    name, schedule = "work", None

    async def run(self) -> int:
        async for chunk in self.chunks(select(Item.id), key=Item.id, size=int(os.environ["SIZE"]), pause=0.005):
            async with chunk as (db, items):
                rows = [{"item": item, "run": current_run().id, "chunk": chunk.number} for item in items]
                await db.execute(insert(Witness), rows)
        return chunk.number
"""

SERIAL = {"sqlite": "INTEGER PRIMARY KEY AUTOINCREMENT", "postgresql": "BIGSERIAL PRIMARY KEY"}
FILL = "WITH RECURSIVE s(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM s WHERE n < :n) INSERT INTO items SELECT n FROM s"


class World:
    """A folder, an application's database with items, and a ledger beside it."""

    def __init__(self, folder: Path, application: str) -> None:
        self.folder = folder
        self.url = application
        (folder / "tasks").mkdir(exist_ok=True)
        (folder / "tasks/work.py").write_text(TASKS)
        self.settings = {
            "DATABASE_URL": application,
            "LEDGER_URL": f"sqlite+aiosqlite:///{folder}/ledger.db" if "sqlite" in application else application,
            "POLL_SECONDS": "0.2",
            "DRAIN_SECONDS": "1",
            "SIZE": str(SIZE),
        }

    async def make(self) -> None:
        for url, history in ((self.url, APPLICATION_HISTORY), (self.settings["LEDGER_URL"], LEDGER_HISTORY)):
            database = Database(url, setting="DATABASE_URL", pooled=False)
            await migrate(database, history)
        database = Database(self.url, setting="DATABASE_URL", pooled=False)
        async with database.engine.begin() as connection:
            await connection.execute(text("CREATE TABLE items (id INTEGER PRIMARY KEY)"))
            columns = f"number {SERIAL[database.kind]}, item INTEGER, run TEXT, chunk INTEGER"
            await connection.execute(text(f"CREATE TABLE witness ({columns})"))
            await connection.execute(text(FILL), {"n": ITEMS})

    def query(self, statement: str, ledger: bool = False) -> list[tuple[object, ...]]:
        async def ask() -> list[tuple[object, ...]]:
            database = Database(self.settings["LEDGER_URL"] if ledger else self.url, setting="LEDGER_URL", pooled=False)
            async with database.reader.connect() as connection:
                return [tuple(row) for row in await connection.execute(text(statement))]

        return asyncio.run(ask())

    @property
    def seen(self) -> int:
        [(count,)] = self.query("SELECT count(*) FROM witness")
        assert isinstance(count, int)
        return count

    def start(self) -> None:
        done = batch(self.folder, "run", "work", "--queue", settings=self.settings)
        assert done.returncode == 0, done.stderr
        self.run = done.stdout.split()[1]

    def until_seen(self, more_than: int, running: Service) -> None:
        give_up_at = time.monotonic() + 60
        while self.seen <= more_than:
            self.retry_poison()
            assert time.monotonic() < give_up_at, running.stderr[-2000:]
            time.sleep(0.02)

    def state(self) -> tuple[object, ...]:
        [row] = self.query("SELECT state, attempt, fence FROM batch_runs", ledger=True)
        return row

    def retry_poison(self) -> None:
        """A run that was lost three times has failed. A person retries it: it goes on, and does not begin anew."""
        if self.state()[0] == "failed":
            assert batch(self.folder, "retry", self.run, settings=self.settings).returncode == 0

    def until_over(self, running: Service) -> tuple[object, ...]:
        give_up_at = time.monotonic() + 90
        while (row := self.state())[0] != "succeeded":
            self.retry_poison()
            assert time.monotonic() < give_up_at, (row, running.stderr[-2000:])
            time.sleep(0.1)
        return row

    def assert_exactly_once(self) -> None:
        [(count, items, runs)] = self.query("SELECT count(*), count(DISTINCT item), count(DISTINCT run) FROM witness")
        assert (count, items, runs) == (ITEMS, ITEMS, 1)


@pytest.fixture
def world(database_url: str, tmp_path: Path) -> World:
    made = World(tmp_path, database_url)
    asyncio.run(made.make())
    return made


def test_killed_at_random_moments_each_item_is_done_exactly_once(world: World) -> None:
    chance = random.Random(int(os.environ.get("CHUNK_SEED", "7")))
    for number in range(KILLS):
        with service(world.folder, settings=world.settings) as running:
            if number == 0:
                world.start()
            world.until_seen(world.seen, running)
            time.sleep(chance.uniform(0, 0.15))
            running.process.send_signal(signal.SIGKILL)
    assert world.seen < ITEMS
    with service(world.folder, settings=world.settings) as last:
        assert world.until_over(last)[0] == "succeeded"
    world.assert_exactly_once()


def test_stopped_in_the_middle_it_is_interrupted_and_the_next_process_goes_on(world: World) -> None:
    with service(world.folder, settings=world.settings) as first:
        world.start()
        world.until_seen(500, first)
        first.stop(signal.SIGTERM)
    assert world.state()[:2] == ("interrupted", 1)
    before = world.seen
    assert before < ITEMS
    with service(world.folder, settings=world.settings) as second:
        assert world.until_over(second)[:2] == ("succeeded", 1)
        assert f"resumes behind chunk {before // SIZE}" in second.stderr
    world.assert_exactly_once()


def test_frozen_beyond_its_lease_it_commits_nothing_that_another_one_does_too(world: World) -> None:
    world.settings |= {"LEASE_SECONDS": "2", "HEARTBEAT_SECONDS": "0.3"}
    with service(world.folder, settings=world.settings) as frozen:
        world.start()
        world.until_seen(500, frozen)
        frozen.freeze(world.url, world.settings["LEDGER_URL"])
        with service(world.folder, settings=world.settings) as other:
            world.until_seen(world.seen, other)
            frozen.process.send_signal(signal.SIGCONT)
            assert world.until_over(other)[0] == "succeeded"
    world.assert_exactly_once()
