"""Some services on one ledger, and what the faults and the checks need to know about them."""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import sqlite3
import subprocess
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

from sqlalchemy import func, select, text, update

from batch_system.batch.ledger.states import ACTIVE
from batch_system.batch.ledger.tables import nodes, runs
from batch_system.database.engine import Database
from batch_system.testing.postgres import OwnServer
from tests import preloaded
from tests.faults.network import Proxy, proxy
from tests.faults.wrong_clock import SERVE, WrongClock
from tests.processes import environment

LEASE = 2.0
LOCKED_SECONDS = LEASE / 5
FAR = timedelta(seconds=15)
"""An instant that is further away than any that the tasks ask for."""
SETTINGS = {
    "HEARTBEAT_SECONDS": "0.4",
    "LEASE_SECONDS": f"{LEASE}",
    "POLL_SECONDS": "0.2",
    "DRAIN_SECONDS": "1",
    "LOG_LEVEL": "WARNING",
}
SERVICES, WORKERS = 3, 2
NUMBER = SERVICES + WORKERS
"""The places below SERVICES have services, and the others have workers of the pool POOL."""
WITH_CHILDREN = NUMBER - 1
"""The place of the worker that executes its runs in child processes."""
POOL = "cpu"
OF_POOL = frozenset({"slow", "sync", "many", "flaky", "letter", "pooled_sums"})
"""The tasks of this pool, which only workers execute."""

WITNESS = (
    "CREATE TABLE witness (number {serial}, run TEXT NOT NULL, task TEXT NOT NULL, fence INTEGER "
    "NOT NULL, "
    "part INTEGER NOT NULL)"
)
SERIAL = {"sqlite": "INTEGER PRIMARY KEY AUTOINCREMENT", "postgresql": "BIGSERIAL PRIMARY KEY"}
TASKS = Path(__file__).parent / "disturbed_tasks.py"


class World:
    """The databases, the network and the clocks. NUMBER processes live in it, each in a place of
    its own.
    """

    def __init__(self, folder: Path, server: OwnServer | None, seed: int, stack: ExitStack) -> None:
        self.folder, self.server, self.seed, self.stack = folder, server, seed, stack
        self.kind = "postgresql" if server else "sqlite"
        self.random = random.Random(seed)
        self.witness = folder / "witness.jsonl"
        self.finals = folder / "finals.jsonl"
        self.counts: Counter[str] = Counter()
        self.reopened: Counter[str] = Counter()
        """How often a person has asked for a run that was over to go on."""
        self.wrong: list[str] = []
        """What was seen while the services were disturbed."""
        self.frozen: list[tuple[int, float, float]] = []
        """Processes that stood still: pid, since and until when, in boot time."""
        self.disturbed: list[tuple[str, float, float]] = []
        """Who could lose the lease, by a name of a process or of a place, since and until when in
        boot time.
        """
        self.network_is_well_at = 0.0
        self.places: dict[int, int] = {}
        """Of each process, by its pid."""
        self.network: Proxy | None = (
            stack.enter_context(proxy(server.directory, NUMBER)) if server else None
        )
        self.clocks = self._clocks()
        self.fires = True
        self._began_at = time.monotonic()
        self._commands: list[subprocess.Popen[bytes] | preloaded.Forked] = []
        (folder / "tasks").mkdir(exist_ok=True)
        shutil.copy(TASKS, folder / "tasks/all.py")
        self.witness.touch()
        self.finals.touch()
        self.execute(WITNESS.format(serial=SERIAL[self.kind]))

    def _clocks(self) -> list[WrongClock]:
        """One for each place on PostgreSQL; with SQLite all are on one machine."""
        if self.server:
            return [WrongClock(self.folder / f"{place}.clock") for place in range(NUMBER)]
        return [WrongClock(self.folder / "clock")] * NUMBER

    @property
    def ledger(self) -> str:
        """The URL of the ledger, past the bad network."""
        return self.server.url if self.server else f"sqlite+aiosqlite:///{self.folder}/ledger.db"

    @property
    def application(self) -> str:
        return self.server.url if self.server else f"sqlite+aiosqlite:///{self.folder}/app.db"

    def settings(self, place: int | None = None) -> dict[str, str]:
        """Of the service in this place; None: of one that is not disturbed."""
        url = self.application
        if self.network is not None and place is not None:
            port = self.network.ports[place]
            url = f"postgresql+asyncpg://postgres@127.0.0.1:{port}/postgres?ssl=disable"
        clock = self.clocks[place or 0].settings if place is not None or self.server is None else {}
        fires = {"WITNESS_FIRES": "yes" if self.fires else "no", "WITNESS_FILE": str(self.witness)}
        children = {"BATCH_POOL_CPU": "process:4"} if place == WITH_CHILDREN else {}
        return {**SETTINGS, **fires, **clock, **children, "DATABASE_URL": url}

    def blame(self, who: str, seconds: float, after: float = 0.0) -> None:
        """Who is disturbed for so long may lose its lease after so many, and need some time to come
        back.
        """
        self.disturbed.append((who, boottime() + after, boottime() + seconds + 2 * LEASE))

    def is_ledger_locked(self) -> bool:
        """Whether somebody holds the write lock of SQLite's file for longer than a transaction
        takes.
        """
        if self.server is not None:
            return False
        with contextlib.closing(
            sqlite3.connect(self.folder / "ledger.db", timeout=LOCKED_SECONDS)
        ) as connection:
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                return "locked" in str(error)
        return False

    def say(self, event: str) -> None:
        """Print a line of the timeline. pytest shows it when the test fails, or at once with -s."""
        print(f"{time.monotonic() - self._began_at:7.2f} {event}", flush=True)

    def batch(self, *words: str) -> subprocess.CompletedProcess[str]:
        """The `batch` command, to its end."""
        command = [*SERVE[:3], *words]
        env = environment(self.settings())
        return preloaded.run(command, self.folder, env, within=120)

    def begin(self, *words: str) -> str:
        """The same without waiting: what it has to wait for may be frozen. Returns it in words."""
        out = self._output("command")
        command = [*SERVE[:3], *words]
        env = environment(self.settings())
        self._commands.append(preloaded.start(command, self.folder, env, out, out))
        self.stack.callback(self._commands[-1].wait)
        return f"batch {' '.join(words)}"

    def _output(self, name: str) -> IO[bytes]:
        number = len(list(self.folder.glob(f"*.{name}")))
        return self.stack.enter_context((self.folder / f"{number}.{name}").open("wb"))

    def end_commands(self) -> None:
        for command in self._commands:
            command.wait(120)
        for file in sorted(self.folder.glob("*.command")):
            if "Traceback" in (said := file.read_text()):
                self.wrong.append(f"a command has failed:\n{said}")

    def execute(self, statement: str, **values: Any) -> None:
        asyncio.run(self._execute(statement, values))

    async def _execute(self, statement: str, values: Mapping[str, Any]) -> None:
        database = Database(self.application, setting="DATABASE_URL", pooled=False)
        async with database.engine.begin() as connection:
            await connection.execute(text(statement), values)

    def query(self, statement: str, ledger: bool = True, **values: Any) -> list[dict[str, Any]]:
        return asyncio.run(
            self._query(statement, self.ledger if ledger else self.application, values)
        )

    async def _query(
        self, statement: str, url: str, values: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        database = Database(url, setting="LEDGER_URL", pooled=False)
        async with database.reader.connect() as connection:
            return [
                dict(row) for row in (await connection.execute(text(statement), values)).mappings()
            ]

    def active(self) -> list[dict[str, Any]]:
        states = ", ".join(f"'{state}'" for state in ACTIVE)
        return self.query(
            f"SELECT id, task, state, node, due_at FROM batch_runs WHERE state IN ({states})"
        )

    def end_long_waits(self) -> None:
        """Let the waits of runs that may not begin before an instant that is far away be over."""
        asyncio.run(self._end_long_waits())

    async def _end_long_waits(self) -> None:
        database = Database(self.ledger, setting="LEDGER_URL", pooled=False)
        waits = runs.c.state.in_(["waiting", "retrying"])
        async with database.engine.begin() as connection:
            now = (
                await connection.execute(select(func.max(nodes.c.seen_at)))
            ).scalar_one()  # by the services' clock
            is_far = runs.c.due_at > now + FAR
            await connection.execute(
                update(runs).where(waits, is_far).values(due_at=runs.c.created_at)
            )


def boottime() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)
