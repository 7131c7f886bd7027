"""Chunks in real processes that are killed, frozen and stopped: a witness says that each item was
done exactly once.

CHUNK_KILLS=100 is the long form, here and in test_chunk_faults.py; CHUNK_SEED repeats its moments.
`CHUNK_KILLS=100 pytest -s tests/batch/test_chunk_processes.py tests/batch/test_chunk_faults.py
-k "killed or cut"` prints figures.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from batch_system.batch.ledger.migration import LEDGER_HISTORY
from batch_system.database.engine import Database
from batch_system.database.migrate import migrate
from tests.batch.ledger_world import rows
from tests.migrations import APPLICATION_HISTORIES
from tests.processes import SERVE, Service, batch, process, service

ITEMS = 50_000
KILLS = int(os.environ.get("CHUNK_KILLS", "4"))
SEED = int(os.environ.get("CHUNK_SEED", "7"))
SIZE = 250 if KILLS < 50 else 10
POINTS = ("before", "in", "after", "at random")
"""Of a chunk's commit: what was written but not committed, while it commits, and before anybody
heard that it did.
"""
COMMITTED = {"before": False, "after": True}

TASKS = """
import os, random, signal, threading, time
from sqlalchemy import event, insert, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from batch_system import BaseTask, Retry, current_run
from batch_system.database.session import application_database

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

point, number, what = os.environ.get("STRIKE", "never,0,0").split(",")
left = [int(number)]

def strike(*_):
    os.kill(os.getpid(), getattr(signal, what))

def strike_within(seconds):
    wait = random.uniform(0, seconds)
    threading.Thread(target=lambda: (time.sleep(wait), strike()), daemon=True).start()

def prepare(db):
    engine = application_database().engine.sync_engine
    if point == "in the body":
        strike()
    if point == "before":  # this listener is behind the fence's: all is written
        event.listen(engine, "commit", strike, once=True)
    if point == "in":
        event.listen(engine, "commit", lambda _: strike_within(0.0005), once=True)
        # It goes no further.
        event.listen(db.sync_session, "after_commit", lambda _: time.sleep(60), once=True)
    if point == "after":
        event.listen(db.sync_session, "after_commit", strike, once=True)
    if point == "at random":
        strike_within(0.05)

class Work(BaseTask):
    name, schedule = "work", None
    retry = Retry(attempts=1_000_000, wait=0.05, factor=1)

    async def run(self, pause: float = 0.002) -> int:
        run = current_run()
        by_itself = run.fence % 2 == 0
        async for chunk in self.chunks(
            select(Item.id), key=Item.id, size=SIZE, pause=pause, retry_chunk=by_itself
        ):
            async with chunk as (db, items):
                rows = [{"item": item, "run": run.id, "chunk": chunk.number} for item in items]
                await db.execute(insert(Witness), rows)
                if chunk.number in left:
                    left.remove(chunk.number)
                    prepare(db)
        return chunk.number
"""

SERIAL = {"sqlite": "INTEGER PRIMARY KEY AUTOINCREMENT", "postgresql": "BIGSERIAL PRIMARY KEY"}
FILL = (
    "WITH RECURSIVE s(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM s "
    "WHERE n < :n) INSERT INTO items SELECT n FROM s"
)


class World:
    """A folder, an application's database with items, and a ledger beside it."""

    def __init__(self, folder: Path, application: str) -> None:
        self.folder = folder
        self.url = application
        (folder / "tasks").mkdir(exist_ok=True)
        (folder / "tasks/work.py").write_text(f"SIZE = {SIZE}\n{TASKS}")
        self.settings = {
            "DATABASE_URL": application,
            "LEDGER_URL": f"sqlite+aiosqlite:///{folder}/ledger.db"
            if "sqlite" in application
            else application,
            "POLL_SECONDS": "0.2",
            "DRAIN_SECONDS": "1",
        }

    async def make(self) -> None:
        for url, histories in (
            (self.url, APPLICATION_HISTORIES),
            (self.settings["LEDGER_URL"], (LEDGER_HISTORY,)),
        ):
            database = Database(url, setting="DATABASE_URL", pooled=False)
            await migrate(database, *histories)
        database = Database(self.url, setting="DATABASE_URL", pooled=False)
        async with database.engine.begin() as connection:
            await connection.execute(text("CREATE TABLE items (id INTEGER PRIMARY KEY)"))
            columns = f"number {SERIAL[database.kind]}, item INTEGER, run TEXT, chunk INTEGER"
            await connection.execute(text(f"CREATE TABLE witness ({columns})"))
            await connection.execute(text(FILL), {"n": ITEMS})

    def query(self, statement: str, ledger: bool = False) -> list[tuple[object, ...]]:
        async def ask() -> list[tuple[object, ...]]:
            database = Database(
                self.settings["LEDGER_URL"] if ledger else self.url,
                setting="LEDGER_URL",
                pooled=False,
            )
            async with database.reader.connect() as connection:
                return [tuple(row) for row in await connection.execute(text(statement))]

        return asyncio.run(ask())

    def write(self, statement: str) -> None:
        """Change the ledger."""

        async def change() -> None:
            database = Database(self.settings["LEDGER_URL"], setting="LEDGER_URL", pooled=False)
            async with database.engine.begin() as connection:
                await connection.execute(text(statement))

        asyncio.run(change())

    async def runs(self) -> list[dict[str, Any]]:
        return await rows(Database(self.settings["LEDGER_URL"], setting="LEDGER_URL", pooled=False))

    @property
    def seen(self) -> int:
        [(count,)] = self.query("SELECT count(*) FROM witness")
        assert isinstance(count, int)
        return count

    def start(self, *words: str) -> None:
        done = batch(self.folder, "run", "work", "--queue", *words, settings=self.settings)
        assert done.returncode == 0, done.stderr
        self.run = done.stdout.split()[1]

    @contextmanager
    def striking(self, point: str, chunk: int, what: str = "SIGKILL") -> Iterator[Service]:
        """A service that sends itself this signal at that point of that chunk. It may not be ready
        yet.
        """
        with process(
            self.folder, SERVE, {**self.settings, "STRIKE": f"{point},{chunk},{what}"}
        ) as started:
            yield started

    def until_killed(self, running: Service) -> None:
        give_up_at = time.monotonic() + 60
        while (code := running.process.poll()) is None:
            self.let_it_go_on()
            assert time.monotonic() < give_up_at, running.stderr[-2000:]
            time.sleep(0.05)
        assert code == -signal.SIGKILL, running.stderr[-2000:]

    def until_seen(self, more_than: int, running: Service) -> None:
        give_up_at = time.monotonic() + 60
        while self.seen <= more_than:
            self.let_it_go_on()
            assert time.monotonic() < give_up_at, running.stderr[-2000:]
            time.sleep(0.02)

    def state(self) -> tuple[object, ...]:
        [row] = self.query("SELECT state, attempt, fence FROM batch_runs", ledger=True)
        return row

    def let_it_go_on(self) -> None:
        """A run that loses its node again and again waits, and fails at last. The wait passes; a
        person retries it.
        """
        state = self.state()[0]
        if state == "retrying":
            self.write("UPDATE batch_runs SET due_at = created_at WHERE state = 'retrying'")
        if state == "failed":
            assert batch(self.folder, "retry", self.run, settings=self.settings).returncode == 0

    def until_over(self, running: Service) -> tuple[object, ...]:
        give_up_at = time.monotonic() + 300
        while (row := self.state())[0] != "succeeded":
            self.let_it_go_on()
            assert time.monotonic() < give_up_at, (row, running.stderr[-2000:])
            time.sleep(0.1)
        return row

    def assert_exactly_once(self) -> None:
        [(count, items, runs)] = self.query(
            "SELECT count(*), count(DISTINCT item), count(DISTINCT run) FROM witness"
        )
        assert (count, items, runs) == (ITEMS, ITEMS, 1)


@pytest.fixture
def world(database_url: str, tmp_path: Path) -> World:
    made = World(tmp_path, database_url)
    asyncio.run(made.make())
    return made


def test_killed_before_in_and_after_its_commits_each_item_is_done_exactly_once(
    world: World,
) -> None:
    chance, fates, began_at = random.Random(SEED), Counter[tuple[str, str]](), time.monotonic()
    for number in range(KILLS):
        point, before = POINTS[number % len(POINTS)], world.seen
        chunk = before // SIZE + chance.randint(1, 20)
        with world.striking(point, chunk) as running:
            if number == 0:
                running.wait_until_ready()
                world.start()
            world.until_killed(running)
        has_committed = world.seen >= chunk * SIZE
        assert COMMITTED.get(point, has_committed) == has_committed
        assert point == "at random" or world.seen == (chunk if has_committed else chunk - 1) * SIZE
        fates[point, "committed" if has_committed else "rolled back"] += 1
    assert world.seen < ITEMS
    with service(world.folder, settings=world.settings) as last:
        assert world.until_over(last)[0] == "succeeded"
    world.assert_exactly_once()
    print(
        f"seed {SEED}: {KILLS} kills, {ITEMS // SIZE} chunks, {time.monotonic() - began_at:.0f} s; "
        f"{dict(fates)}"
    )


def test_stopped_in_the_middle_it_is_interrupted_and_the_node_beside_it_goes_on(
    world: World,
) -> None:
    with (
        service(world.folder, settings=world.settings) as one,
        service(world.folder, settings=world.settings) as two,
    ):
        world.start("--param", "pause=0.01")
        world.until_seen(500, one)
        [(pid,)] = world.query(
            "SELECT pid FROM batch_nodes WHERE id IN (SELECT node FROM batch_runs)", ledger=True
        )
        stopped, other = (one, two) if one.process.pid == pid else (two, one)
        stopped.stop(signal.SIGTERM)
        assert world.until_over(other)[:2] == ("succeeded", 1)
        assert "was interrupted" in stopped.stderr
        assert "resumes after chunk" in other.stderr
    outcomes = world.query("SELECT number, outcome FROM batch_attempts ORDER BY fence", ledger=True)
    assert outcomes == [(1, "interrupted"), (1, "succeeded")]
    world.assert_exactly_once()


def test_cancelled_in_a_pause_it_ends_within_two_seconds(world: World) -> None:
    world.settings["POLL_SECONDS"] = "1"  # as it is where nobody has set it
    with service(world.folder, settings=world.settings) as running:
        world.start("--param", "pause=600")
        world.until_seen(0, running)
        assert batch(world.folder, "cancel", world.run, settings=world.settings).returncode == 0
    [run] = asyncio.run(world.runs())
    assert run["state"] == "cancelled"
    assert run["finished_at"] - run["cancel_at"] < timedelta(seconds=2)
    assert world.seen == SIZE


# PostgreSQL's is in test_chunk_faults.py.
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_frozen_beyond_its_lease_it_commits_nothing_that_another_one_does_too(world: World) -> None:
    world.settings |= {"LEASE_SECONDS": "2", "HEARTBEAT_SECONDS": "0.3"}
    with service(world.folder, settings=world.settings) as frozen:
        world.start("--param", "pause=0.01")
        world.until_seen(500, frozen)
        frozen.freeze(world.url, world.settings["LEDGER_URL"])
        with service(world.folder, settings=world.settings) as other:
            world.until_seen(world.seen, other)
            frozen.process.send_signal(signal.SIGCONT)
            assert world.until_over(other)[0] == "succeeded"
    world.assert_exactly_once()
