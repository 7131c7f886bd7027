"""A ledger is not migrated while a process lives that could not work with it afterwards."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import insert, select, text, update

from batch_system import clock
from batch_system.batch.ledger import database_time
from batch_system.batch.ledger.migration import LEDGER_HISTORY
from batch_system.batch.ledger.tables import new_id, nodes
from batch_system.batch.nodes import process_lock
from batch_system.batch.nodes.process_lock import ProcessLock
from batch_system.database.engine import Database
from batch_system.database.migrate import migrate
from batch_system.errors import DatabaseError, DatabaseInUse
from batch_system.operations.asking import databases
from batch_system.operations.asking.databases import migrate_ledger
from tests.migrations import add_migration

OLDER = LEDGER_HISTORY.revisions[-1]
LEASE_SECONDS = 30


@pytest.fixture
async def older(
    request: pytest.FixtureRequest,
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Database:
    """A ledger that lacks a migration, with a node that has just said that it lives.

    The parameter is the oldest migration that code must know afterwards; by default the new one.
    """
    database = Database(database_url, setting="LEDGER_URL", pooled=False)
    await migrate(database, LEDGER_HISTORY)
    add_migration(monkeypatch, tmp_path, LEDGER_HISTORY, oldest=getattr(request, "param", None))
    async with database.engine.begin() as connection:
        at = await database_time.now_of(connection)
        row = {
            "id": new_id(),
            "host": "web-1",
            "pid": 4711,
            "version": "0.1",
            "started_at": at,
            "seen_at": at,
            "ledger": OLDER,
        }
        await connection.execute(insert(nodes).values({**row, "draining": False, "tasks": []}))
    return database


async def revision(database: Database) -> str:
    async with database.reader.connect() as connection:
        return str(
            (
                await connection.execute(text("SELECT version_num FROM batch_alembic_version"))
            ).scalar_one()
        )


async def test_a_living_node_of_an_older_ledger_keeps_it_as_it_is_and_is_named(
    older: Database,
) -> None:
    newest = LEDGER_HISTORY.revisions[-1]
    named = rf"{newest}: pid 4711 on web-1 \(version 0.1\)\. Stop it.*LEASE_SEC"
    with pytest.raises(DatabaseInUse, match=named):
        await migrate_ledger(older, LEASE_SECONDS)
    assert await revision(older) == OLDER


@pytest.mark.parametrize("older", [OLDER], indirect=True)
async def test_it_may_go_on_if_the_migration_says_that_its_code_knows_enough(
    older: Database,
) -> None:
    await migrate_ledger(older, LEASE_SECONDS)
    assert await revision(older) == LEDGER_HISTORY.revisions[-1]


@pytest.mark.parametrize("older", [OLDER], indirect=True)
async def test_a_node_that_does_not_say_what_its_code_knows_may_not_go_on(older: Database) -> None:
    async with older.engine.begin() as connection:
        await connection.execute(update(nodes).values(ledger=None))
    with pytest.raises(DatabaseInUse, match="pid 4711 on web-1"):
        await migrate_ledger(older, LEASE_SECONDS)


@pytest.mark.parametrize("end", ["stopped", "silent for a lease", "killed on this machine"])
async def test_once_it_is_dead_the_ledger_is_migrated(
    older: Database, end: str, tmp_path: Path
) -> None:
    if end == "killed on this machine":
        async with older.reader.connect() as connection:
            (row,) = await connection.execute(select(nodes.c.id))
        folder = process_lock.folder_of(older.url)
        ProcessLock(
            folder, row.id
        )._release()  # as the kernel does: the file stays, without its lock
    else:
        at = clock.now()
        gone = (
            {"stopped_at": at}
            if end == "stopped"
            else {"seen_at": at - timedelta(seconds=LEASE_SECONDS + 1)}
        )
        async with older.engine.begin() as connection:
            await connection.execute(update(nodes).values(gone))
    await migrate_ledger(older, LEASE_SECONDS)
    assert await revision(older) == LEDGER_HISTORY.revisions[-1]


async def test_a_ledger_of_this_version_is_nobodys_business(older: Database) -> None:
    """Processes of one version start beside each other."""
    async with older.engine.begin() as connection:
        await connection.execute(
            text(f"UPDATE batch_alembic_version SET version_num = '{LEDGER_HISTORY.revisions[-1]}'")
        )
    await migrate_ledger(older, LEASE_SECONDS)


async def test_a_worker_does_not_migrate_an_older_ledger(older: Database) -> None:
    with pytest.raises(
        DatabaseError,
        match=rf"of an older version \({OLDER}, and this code has .* start the service",
    ):
        await databases._refuse_unmigrated(older, "ledger", LEDGER_HISTORY)
    assert await revision(older) == OLDER
