"""Services whose databases go away and come back, and what they left in ledger, application
database and witness.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Table, make_url, select, text

from batch_system.batch.account.account import Account, accounts
from batch_system.batch.ledger import tables
from batch_system.database.engine import Database
from batch_system.testing.databases import wait_for
from tests.processes import Service

TASKS = '''
import asyncio
import os

from sqlalchemy import text

from batch_system import BaseTask, Retry, current_run, get_db

INSERT = text("INSERT INTO witness (run, fence) VALUES (:run, :fence)")


def note(what):
    run = current_run()
    with open("witness", "ab", buffering=0) as file:
        file.write(f"{what} {run.task} {run.id} {run.fence}\\n".encode())


class TickTask(BaseTask):
    """Needs no database."""

    name, schedule, overlap = "tick", "* * * * * *", "allow"

    async def run(self):
        note("ended")


class WriterTask(BaseTask):
    """Needs the application's database."""

    name, schedule, overlap = "writer", "* * * * * *", "allow"
    retry = Retry(attempts=1000, wait=0.5, factor=1, jitter=0)

    async def run(self):
        async with get_db() as db:
            await db.execute(INSERT, {"run": current_run().id, "fence": current_run().fence})
            await db.commit()


class PatientTask(BaseTask):
    """Needs no database. Begins before the outage, and ends when it is told to."""

    name, schedule = "patient", "* * * * * *"

    async def run(self):
        note("began")
        while not os.path.exists("go on"):
            await asyncio.sleep(0.02)
        note("ended")
        return "patience"
'''


@dataclass
class Case:
    """One service in a folder of its own. `ready`: what `/readyz` said, by the name of a moment."""

    folder: Path
    application: str
    ledger: str
    settings: dict[str, str] = field(default_factory=dict)
    tasks: str = TASKS
    ready: dict[str, tuple[int, dict[str, str]]] = field(default_factory=dict)
    service: Service = field(init=False)

    def __post_init__(self) -> None:
        (self.folder / "tasks").mkdir(parents=True)
        (self.folder / "tasks/all.py").write_text(self.tasks)
        self.began = datetime.now(UTC)
        self.settings = {
            "DATABASE_URL": self.application,
            "LEDGER_URL": self.ledger,
            **self.settings,
        }
        wait_for(
            execute(
                self.application, "CREATE TABLE witness (run TEXT NOT NULL, fence INTEGER NOT NULL)"
            )
        )

    def readiness(self) -> tuple[int, dict[str, str]]:
        answer = self.service.get("/readyz")
        return answer.status_code, answer.json().get("reasons", {})

    def go_on(self) -> None:
        (self.folder / "go on").touch()

    def witness(self, what: str, task: str) -> list[tuple[str, int]]:
        """The run and the fence of each line that this task has left, in order."""
        try:
            lines = [line.split() for line in (self.folder / "witness").read_text().splitlines()]
        except FileNotFoundError:
            return []
        return [
            (run, int(fence)) for said, name, run, fence in lines if (said, name) == (what, task)
        ]

    @property
    def first(self) -> str:
        """The run of PatientTask that had begun before the outage."""
        return self.witness("began", "patient")[0][0]

    def rows(self, table: Table = tables.runs, **equal: Any) -> list[dict[str, Any]]:
        wanted = select(table).order_by(*table.primary_key)
        for name, value in equal.items():
            wanted = wanted.where(table.c[name] == value)
        return [dict(row) for row in wait_for(_query(self.ledger, wanted))]

    def written(self) -> list[tuple[str, int]]:
        """The run and the fence of each row that WriterTask has committed."""
        found = wait_for(_query(self.application, text("SELECT run, fence FROM witness")))
        return [(row["run"], row["fence"]) for row in found]

    def accounts(self) -> list[Account]:
        return wait_for(_accounts(self.ledger, self.began))


async def execute(url: str, statement: str) -> None:
    database = Database(url, setting="DATABASE_URL", pooled=False)
    async with database.engine.begin() as connection:
        await connection.execute(text(statement))


async def _query(url: str, statement: Any) -> list[Any]:
    database = Database(url, setting="LEDGER_URL", pooled=False)
    async with database.reader.connect() as connection:
        return list((await connection.execute(statement)).mappings())


async def _accounts(url: str, since: datetime) -> list[Account]:
    database = Database(url, setting="LEDGER_URL", pooled=False)
    async with database.reader.connect() as connection:
        return [account async for account in accounts(connection, since)]


@contextlib.contextmanager
def locked(*urls: str) -> Iterator[None]:
    """Another process's place: the write locks of these SQLite files are taken."""
    with contextlib.ExitStack() as stack:
        for url in urls:
            other = sqlite3.connect(str(make_url(url).database), timeout=30, isolation_level=None)
            stack.enter_context(contextlib.closing(other))
            other.execute("BEGIN IMMEDIATE")
        yield


def until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """Wait until `condition()` is true, and return its value. Fails after `seconds`."""
    give_up_at = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < give_up_at, f"not within {seconds:g} s: {what}"
        time.sleep(0.1)
    return found
