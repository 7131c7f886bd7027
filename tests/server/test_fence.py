"""A process is stopped in the middle of a run, another one takes over that run, and the first one
wakes up.
"""

from __future__ import annotations

import asyncio
import os
import signal
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import text

from batch_system.batch.ledger import tables
from batch_system.database.engine import Database
from tests.batch.ledger_world import rows, until
from tests.processes import BATCH, Service, process, service

TASK = """
import asyncio, os, signal
from sqlalchemy import event, select, text
from batch_system import BaseTask, current_run, get_db
from service.application.models import User
from batch_system.database.session import application_database

def freeze(*_):
    if not os.path.exists("frozen"):
        with open("frozen", "w") as file:
            file.write(current_run().id)
        os.kill(os.getpid(), signal.SIGSTOP)

class Adds(BaseTask):
    name, schedule = "adds", None

    async def run(self, freeze_at: str) -> None:
        while not os.path.exists("go"):
            await asyncio.sleep(0.01)
        # After the fence statement, which stands in the transaction by then.
        if freeze_at == "commit":
            event.listen(application_database().engine.sync_engine, "commit", freeze)
        async with get_db() as db:
            await db.execute(text("UPDATE witness SET writes = writes + 1"))
            if freeze_at == "first statement":
                freeze()
            if await db.scalar(select(User.id).where(User.email == current_run().id)) is None:
                db.add(User(email=current_run().id))
            await db.commit()
"""
PATIENT = {"HEARTBEAT_SECONDS": "20", "LEASE_SECONDS": "60"}
"""For the one that is stopped: it holds no lock of the ledger then, and PostgreSQL ends no
transaction by time.
"""
QUICK = {"HEARTBEAT_SECONDS": "0.3", "LEASE_SECONDS": "4", "POLL_SECONDS": "0.1"}

CASES = [
    ("postgresql", "postgresql", "first statement"),
    ("postgresql", "sqlite", "commit"),
    ("sqlite", "postgresql", "first statement"),
    ("sqlite", "sqlite", "commit"),
]


def settings_for(application: Database, ledger: Database) -> dict[str, str]:
    urls = {"DATABASE_URL": application.url, "LEDGER_URL": ledger.url}
    return {name: url.render_as_string(hide_password=False) for name, url in urls.items()}


async def witness(application: Database, run: str) -> dict[str, int | None]:
    """How many rows the run has added, how often something was written, and the run's fence."""
    statement = text(
        "SELECT (SELECT count(*) FROM users WHERE email = :email), (SELECT writes FROM witness), "
        "(SELECT fence FROM batch_checkpoints WHERE CAST(run AS text) = :email AND name = '')"
    )
    async with application.reader.connect() as connection:
        return dict(
            zip(
                ("rows", "writes", "fence"),
                (await connection.execute(statement, {"email": run})).one(),
                strict=True,
            )
        )


async def frozen_run(ledger: Database, process: Service) -> str:
    """Let the task go on once its process has beaten, so that it holds nothing of the ledger; wait
    until it froze.
    """

    async def has_beaten() -> bool:
        assert process.process.poll() is None, process.stderr
        started = await rows(ledger, state="running")
        nodes = [await rows(ledger, tables.nodes, id=run["node"]) for run in started]
        return any(node["beats"] > 0 for (node,) in nodes)

    async def frozen() -> str:
        path = process.folder / "frozen"
        return path.read_text() if path.exists() else ""

    await until(has_beaten, 20)
    (process.folder / "go").touch()
    return str(await until(frozen))


async def woken(frozen: Service) -> int:
    """Its exit code."""
    os.kill(frozen.process.pid, signal.SIGCONT)
    return await asyncio.to_thread(frozen.process.wait, 20)


@pytest.mark.parametrize(
    ("database_url", "ledger_url", "point"), CASES, indirect=["database_url", "ledger_url"]
)
async def test_a_process_that_wakes_up_after_its_run_was_taken_over_writes_nothing_twice(
    application: Database, ledger: Database, tmp_path: Path, point: str
) -> None:
    (tmp_path / "tasks/adds.py").write_text(TASK)
    async with application.engine.begin() as connection:
        await connection.execute(text("CREATE TABLE witness (writes INTEGER)"))
        await connection.execute(text("INSERT INTO witness VALUES (0)"))
    holds_the_file = application.kind == "sqlite"
    databases = settings_for(application, ledger)
    command = (*BATCH, "run", "adds", "--param", f"freeze_at={point}")
    with (
        process(tmp_path, command, {**databases, **PATIENT}) as old,
        # It has to migrate before SQLite's lock is taken for good.
        service(tmp_path, settings={**databases, **QUICK}),
    ):
        run = await frozen_run(ledger, old)
        if holds_the_file:  # nobody can take the lock from a stopped process: the next one waits
            await until(lambda: rows(ledger, id=run, state="running", fence=2))
            await woken(old)
        (row,) = await until(lambda: rows(ledger, id=run, state="succeeded"))
        if not holds_the_file:
            assert await witness(application, run) == {"rows": 1, "writes": 1, "fence": 2}
            await woken(old)
        seen = await witness(application, run)
        assert (seen["rows"], seen["fence"]) == (1, 2)
        assert holds_the_file or seen["writes"] == 1
        assert "its outcome here is not recorded" in old.stderr
    lost, done = await rows(ledger, tables.attempts, run=run)
    assert (lost["outcome"], done["outcome"], row["fence"]) == ("lost", "succeeded", 2)
    # The other one is not held up.
    assert holds_the_file or done["ended_at"] - done["started_at"] < timedelta(seconds=3)
