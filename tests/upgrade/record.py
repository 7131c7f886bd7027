"""Records the databases and backups that the present code leaves: what later code has to take over.

    python -m tests.upgrade.record NAME

NAME becomes a folder of tests/upgrade/states. It gets, for each kind of database, the application's
database, the ledger and two backups, as real processes leave them: with runs in every state, places
of loops, an item that was set aside, slots that were missed, a paused task, a process that was
killed, runs that were split. A state is recorded once, when the code that leaves it is complete,
and never again.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import Update, make_url, text, update
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from batch_system import clock
from batch_system.batch.ledger.tables import schedules
from batch_system.testing.postgres import find_binaries, start_server
from tests.processes import BATCH, SERVE, batch, process, service
from tests.upgrade import states

PREPARE = (
    "INSERT INTO users (email, created_at) VALUES "
    "('ada@example.com', '2026-01-01'), ('bad@example.com', '2026-01-02'), ('eve@example.com', "
    "'2026-01-03')",
)
NEUTRAL = ("UPDATE batch_nodes SET host = 'recorded'",)
"""What tells of the machine that recorded the state."""

SEEN = (
    *(("sort", "succeeded"), ("broken", "failed"), ("flaky", "retrying"), ("slow", "running")),
    *(("joined", "succeeded"), ("halves", "failed")),
)
"""In which state a run of each of these tasks is seen."""


class Recording:
    """The folder of a service. `settings`: those of its databases are among them."""

    def __init__(self, folder: Path, urls: dict[str, str]) -> None:
        self.folder = folder
        self.urls = urls
        self.settings = {
            **urls,
            "BACKUP_LEDGER": "true",
            "POLL_SECONDS": "0.2",
            "DRAIN_SECONDS": "1",
        }
        shutil.copytree(
            states.TASKS, folder / "tasks", ignore=shutil.ignore_patterns("__pycache__")
        )

    def batch(self, *words: str) -> str:
        done = batch(self.folder, *words, settings=self.settings)
        if done.returncode:
            raise RuntimeError(f"batch {' '.join(words)}: {done.stdout}{done.stderr}")
        return done.stdout

    def execute(self, setting: str, *statements: str | Update) -> list[Any]:
        """In one transaction; returns the rows of the last one."""
        return asyncio.run(_execute(self.urls[setting], statements))

    def wait_for(self, expected: str, query: str, setting: str = "LEDGER_URL") -> None:
        """Wait until `query` counts at least one row. `expected`: for the message of the error."""
        give_up_at = time.monotonic() + 60
        while not self.execute(setting, query)[0][0]:
            if time.monotonic() > give_up_at:
                raise RuntimeError(f"{expected}: not within a minute\n{self.batch('runs')}")
            time.sleep(0.1)

    def wait_for_state(self, task: str, state: str) -> None:
        self.wait_for(
            f"{task}: {state}",
            f"SELECT count(*) FROM batch_runs WHERE task = '{task}' AND state = '{state}'",
        )

    def wait_for_chunks(self, task: str) -> None:
        self.wait_for(
            f"chunks of {task}",
            f"SELECT count(*) >= 12 FROM users WHERE email LIKE '{task}%'",
            "DATABASE_URL",
        )


async def _execute(url: str, statements: tuple[str | Update, ...]) -> list[Any]:
    engine = create_async_engine(url, poolclass=NullPool)
    async with engine.begin() as connection:
        for statement in statements:
            result = await connection.execute(
                text(statement) if isinstance(statement, str) else statement
            )
        rows = list(result) if result.returns_rows else []
    await engine.dispose()
    return rows


def live(recording: Recording) -> None:
    """What the state has seen: two services, commands, a process that was killed, and backups of
    the rest.
    """
    with service(recording.folder, SERVE, recording.settings) as first:
        recording.execute("DATABASE_URL", *PREPARE)
        first.stop()
    recording.execute(
        "LEDGER_URL", update(schedules).values(fired_until=clock.now() - timedelta(hours=6))
    )
    with service(recording.folder, SERVE, recording.settings) as second:
        recording.wait_for("a range of missed slots", "SELECT count(*) FROM batch_missed")
        recording.wait_for_state("tick", "succeeded")
        for task, state in SEEN:
            recording.batch("run", task, "--queue")
            recording.wait_for_state(task, state)
        slow = recording.execute("LEDGER_URL", "SELECT id FROM batch_runs WHERE task = 'slow'")[0][
            0
        ]
        recording.batch("cancel", str(slow))
        recording.wait_for_state("slow", "cancelled")
        for task, pause in (("spreads", "600"), ("moves", "0.3")):
            recording.batch("run", task, "--param", f"pause={pause}", "--queue")
            recording.wait_for_chunks(task)
        second.stop()
    recording.wait_for_state("moves", "interrupted")
    with process(
        recording.folder, [*BATCH, "run", "copies", "--param", "pause=0.3"], recording.settings
    ) as third:
        recording.wait_for_chunks("copies")
        third.process.send_signal(signal.SIGKILL)
        third.process.wait()
    recording.batch("run", "held", "--queue")
    recording.batch("pause", "held")
    recording.batch("run", "gathers")
    recording.wait_for_state("follows", "waiting")
    for name in ("ann", "bob"):
        recording.batch("token", "create", name, "--role", "operator")
    recording.batch("token", "revoke", "bob")
    recording.execute("LEDGER_URL", *NEUTRAL)
    recording.batch("backup", "create")
    recording.batch("backup", "verify", "latest", "--restore")
    recording.batch("backup", "pin", "latest")
    time.sleep(1.1)  # a backup's name has its second
    recording.batch("backup", "create")


def record_sqlite(folder: Path, to: Path) -> None:
    files = {"DATABASE_URL": folder / "app.db", "LEDGER_URL": folder / "ledger.db"}
    recording = Recording(
        folder, {name: f"sqlite+aiosqlite:///{file}" for name, file in files.items()}
    )
    live(recording)
    for file in files.values():
        copy = to / file.name
        with closing(sqlite3.connect(file)) as source, closing(sqlite3.connect(copy)) as target:
            source.backup(target)
            target.execute("PRAGMA journal_mode = DELETE")
        _pack(copy)
    shutil.copytree(folder / "backups", to / "sqlite_backups")


def record_postgresql(folder: Path, to: Path) -> None:
    with start_server() as server:
        url = asyncio.run(server.create_database())
        recording = Recording(folder, {"DATABASE_URL": url, "LEDGER_URL": url})
        live(recording)
        parts = make_url(url)
        where = [
            "-h",
            str(parts.query["host"]),
            "-p",
            "5432",
            "-U",
            "postgres",
            "-d",
            str(parts.database),
        ]
        options = ["--inserts", "--no-owner", "--no-privileges", "--no-sync"]
        dumped = subprocess.run(
            [find_binaries() / "pg_dump", *where, *options], check=True, capture_output=True
        )
    lines = dumped.stdout.decode().splitlines(keepends=True)
    unknown = ("\\", "SET transaction_timeout", "--")  # to a driver, and to older servers
    (to / states.DUMP).write_text("".join(line for line in lines if not line.startswith(unknown)))
    _pack(to / states.DUMP)
    shutil.copytree(folder / "backups", to / "postgresql_backups")


def _pack(file: Path) -> None:
    (file.parent / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes(), mtime=0))
    file.unlink()


def main() -> None:
    name = sys.argv[1]
    to = states.STATES / name
    to.mkdir(parents=True)
    for record in (record_sqlite, record_postgresql):
        with tempfile.TemporaryDirectory() as folder:
            record(Path(folder), to)
    print(
        json.dumps(
            {file.name: file.stat().st_size for file in to.rglob("*") if file.is_file()}, indent=2
        )
    )


if __name__ == "__main__":
    main()
