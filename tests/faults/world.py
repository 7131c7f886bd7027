"""Some services on one ledger, the faults that are done to them, and what must hold in the end."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import text

from service.batch.states import ACTIVE
from service.database.engine import Database
from service.testing.postgres import OwnServer
from tests.processes import SERVE, Service, batch, process

SETTINGS = {
    "HEARTBEAT_SECONDS": "0.5",
    "LEASE_SECONDS": "3",
    "POLL_SECONDS": "0.2",
    "DRAIN_SECONDS": "1",
    "LOG_LEVEL": "WARNING",
}
LEASE = float(SETTINGS["LEASE_SECONDS"])
CALM_SECONDS = 60.0
GROWN_SECONDS = 2.5

WITNESS = "CREATE TABLE witness (number {serial}, run TEXT NOT NULL, task TEXT NOT NULL, fence INTEGER NOT NULL)"
SERIAL = {"sqlite": "INTEGER PRIMARY KEY AUTOINCREMENT", "postgresql": "BIGSERIAL PRIMARY KEY"}

TASKS = '''
import asyncio
import os
import time

from sqlalchemy import text

from service import BaseTask, Missed, Retry, call_db, current_run, get_db

FIRES = os.environ.get("FIRES", "yes") == "yes"
INSERT = text("INSERT INTO witness (run, task, fence) VALUES (:run, :task, :fence)")


def witness():
    run = current_run()
    return {"run": run.id, "task": run.task, "fence": run.fence}


async def write():
    async with get_db() as db:
        await db.execute(INSERT, witness())
        await asyncio.sleep(0.01)
        await db.commit()


class TickTask(BaseTask):
    name, schedule, missed = "tick", "* * * * * *" if FIRES else None, Missed("all")

    async def run(self):
        await write()


class SlowTask(BaseTask):
    """Longer than a lease, in steps."""

    name, schedule = "slow", "*/2 * * * * *" if FIRES else None

    async def run(self):
        for _ in range(40):
            current_run().checkpoint()
            await asyncio.sleep(0.1)
        await write()


class SyncTask(BaseTask):
    name, schedule, overlap = "sync", "*/3 * * * * *" if FIRES else None, "allow"

    def run(self):
        time.sleep(0.3)
        values = witness()
        call_db(lambda db: (db.execute(INSERT, values), db.commit()))


class FlakyTask(BaseTask):
    name, schedule, retry = "flaky", "*/2 * * * * *" if FIRES else None, Retry(attempts=3, wait=0.3, jitter=0)

    async def run(self):
        await write()
        if current_run().attempt < 3:
            raise ConnectionError("not yet")
'''


@dataclass
class World:
    folder: Path
    application: str
    server: OwnServer | None
    seed: int
    timeline: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.kind = "postgresql" if self.server else "sqlite"
        self.settings = {**SETTINGS, "DATABASE_URL": self.application}
        self.ledger = self.application if self.server else f"sqlite+aiosqlite:///{self.folder}/ledger.db"
        self.began = datetime.now(UTC)
        self.counts: Counter[str] = Counter()
        (self.folder / "tasks").mkdir(exist_ok=True)
        (self.folder / "tasks/all.py").write_text(TASKS)
        asyncio.run(self._make_witness())

    async def _make_witness(self) -> None:
        database = Database(self.application, setting="DATABASE_URL", pooled=False)
        async with database.engine.begin() as connection:
            await connection.execute(text(WITNESS.format(serial=SERIAL[self.kind])))

    def say(self, what: str) -> None:
        self.timeline.append(f"{(datetime.now(UTC) - self.began).total_seconds():7.2f} {what}")


class Nodes:
    """The services that live now. One that was killed is replaced."""

    def __init__(self, world: World, number: int, stack: ExitStack) -> None:
        self._world = world
        self._stack = stack
        self.living: list[Service] = []
        self._born: dict[int, float] = {}
        for _ in range(number):
            self.start()

    def start(self) -> None:
        service = self._stack.enter_context(process(self._world.folder, SERVE, self._world.settings))
        self.living.append(service)
        self._born[service.process.pid] = time.monotonic()

    def end(self, service: Service, number: int) -> None:
        service.process.send_signal(number)
        service.process.wait(30)
        self.living.remove(service)

    def any(self) -> Service:
        """One that has had time to begin, where there is one."""
        old = [each for each in self.living if time.monotonic() - self._born[each.process.pid] > GROWN_SECONDS]
        return self._world.random.choice(old or self.living)


Fault = Callable[[World, Nodes], None]


def kill(world: World, nodes: Nodes) -> None:
    nodes.end(nodes.any(), signal.SIGKILL)
    nodes.start()


def terminate(world: World, nodes: Nodes) -> None:
    nodes.end(nodes.any(), signal.SIGTERM)
    nodes.start()


def freeze(world: World, nodes: Nodes) -> None:
    """For longer than a lease; then it wakes and finds its runs taken."""
    service = nodes.any()
    service.process.send_signal(signal.SIGSTOP)
    time.sleep(LEASE * world.random.uniform(0.3, 2.0))
    service.process.send_signal(signal.SIGCONT)


def outage(world: World, nodes: Nodes) -> None:
    """PostgreSQL crashes and comes back; on SQLite somebody holds the ledger's write lock."""
    seconds = world.random.uniform(0.5, LEASE * 1.5)
    if world.server is not None:
        world.server.stop("immediate")
        time.sleep(seconds)
        world.server.start()
        return
    with contextlib.closing(sqlite3.connect(world.folder / "ledger.db", timeout=30, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        time.sleep(seconds)
        other.execute("ROLLBACK")


FAULTS: tuple[Fault, ...] = (kill, terminate, freeze, outage)


def disturb(world: World, faults: int, number: int = 3) -> None:
    """Do so many faults to `number` services, and then let one of them come to rest."""
    with ExitStack() as stack:
        nodes = Nodes(world, number, stack)
        time.sleep(3)
        for _ in range(faults):
            fault = world.random.choice(FAULTS)
            world.say(fault.__name__)
            world.counts[fault.__name__] += 1
            fault(world, nodes)
            time.sleep(world.random.uniform(0.2, 1.5))
        time.sleep(2 * LEASE)  # what froze last is awake, and what was lost is rescued
        for service in list(nodes.living):
            nodes.end(service, signal.SIGTERM)
    come_to_rest(world)


def come_to_rest(world: World) -> None:
    """Nothing new fires, and what is active comes to its end."""
    world.say("rest")
    world.settings["FIRES"] = "no"
    with process(world.folder, SERVE, world.settings) as last:
        give_up_at = time.monotonic() + CALM_SECONDS
        while active := asyncio.run(runs_in(world, ACTIVE)):
            assert time.monotonic() < give_up_at, f"still active: {active}\n{last.stderr[-3000:]}"
            time.sleep(0.5)
        last.stop()


async def query(world: World, statement: str, ledger: bool = True) -> list[Any]:
    url = world.ledger if ledger else world.application
    database = Database(url, setting="LEDGER_URL", pooled=False)
    async with database.reader.connect() as connection:
        return list((await connection.execute(text(statement))).all())


async def runs_in(world: World, states: tuple[str, ...]) -> list[Any]:
    listed = ", ".join(f"'{state}'" for state in states)
    return await query(world, f"SELECT id, task, state, node FROM batch_runs WHERE state IN ({listed})")


def wrong(world: World) -> list[str]:
    """What does not hold, in sentences; nothing if all is well."""
    return [*_of_the_account(world), *asyncio.run(_of_the_ledger(world)), *asyncio.run(_of_the_witness(world))]


def _of_the_account(world: World) -> Iterator[str]:
    since = world.began.isoformat()
    done = batch(world.folder, "account", "--since", since, settings=world.settings)
    if done.returncode != 0:
        yield f"the account is not complete:\n{done.stdout}{done.stderr}"


async def _of_the_ledger(world: World) -> list[str]:
    twice = await query(world, "SELECT task, slot FROM batch_runs GROUP BY task, slot HAVING count(*) > 1")
    unended = await query(
        world,
        "SELECT r.id, r.task, r.state FROM batch_runs r WHERE r.state IN ('succeeded', 'failed') AND NOT EXISTS "
        "(SELECT 1 FROM batch_attempts a WHERE a.run = r.id AND a.fence = r.fence "
        "AND (a.outcome = r.state OR r.state = 'failed' AND a.outcome = 'lost'))",
    )
    silent = await query(world, "SELECT id FROM batch_runs WHERE state NOT IN ('succeeded') AND reason IS NULL")
    return [
        *(f"a slot has two runs: {row}" for row in twice),
        *(f"the last attempt has no end that fits: {row}" for row in unended),
        *(f"there is no reason: {row}" for row in silent),
    ]


async def _of_the_witness(world: World) -> list[str]:
    """Each attempt of a run commits at most once, and none after a later one has."""
    found: list[str] = []
    seen: dict[str, list[int]] = {}
    for run, fence in await query(world, "SELECT run, fence FROM witness ORDER BY number", ledger=False):
        seen.setdefault(str(run), []).append(fence)
    for run, fences in seen.items():
        if fences != sorted(set(fences)):
            found.append(f"run {run} committed under the fences {fences}")
    succeeded = await query(world, "SELECT id, task FROM batch_runs WHERE state = 'succeeded'")
    empty = [row for row in succeeded if str(row.id) not in seen]
    return found + [f"run {row.id} of {row.task} succeeded and has committed nothing" for row in empty]
