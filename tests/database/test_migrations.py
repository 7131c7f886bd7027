"""Both histories end in the tables that the code declares, on both databases."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, MetaData, text

from batch_system.batch.ledger import tables
from batch_system.batch.ledger.migration import LEDGER_HISTORY
from batch_system.database.alembic_history import script_directory
from batch_system.database.companions import companions
from batch_system.database.engine import Database
from batch_system.database.histories import DATA_HISTORY
from batch_system.database.migrate import LAST_BEFORE_RELEASE, History, migrate
from batch_system.database.our_tables import include_object
from batch_system.errors import DatabaseTooNew, DatabaseTooOld, DatabaseUnreachable
from service.application.models import Base
from tests.migrations import APPLICATION_HISTORIES


def differences(
    connection: Connection, metadata: list[MetaData], version_table: str
) -> list[object]:
    """What Alembic would have a migration change: without our tables, where they are not those that
    are compared.
    """
    options = {
        "version_table": version_table,
        "compare_type": True,
        "include_object": include_object,
    }
    return compare_metadata(MigrationContext.configure(connection, opts=options), metadata)


async def test_the_ledgers_migrations_end_in_the_declared_tables(ledger: Database) -> None:
    async with ledger.engine.connect() as connection:
        assert (
            await connection.run_sync(differences, [tables.ledger], "batch_alembic_version") == []
        )


async def test_the_migrations_beside_the_data_end_in_the_declared_tables(database_url: str) -> None:
    database = Database(database_url, setting="DATABASE_URL", pooled=False)
    await migrate(database, DATA_HISTORY)
    async with database.engine.connect() as connection:
        assert (
            await connection.run_sync(differences, [companions], DATA_HISTORY.version_table) == []
        )
    await database.dispose()


async def test_the_applications_migrations_end_in_the_declared_tables(
    application: Database,
) -> None:
    """It is the test of a clone's own migrations, as docs/databases.md says."""
    async with application.engine.connect() as connection:
        assert await connection.run_sync(differences, [Base.metadata], "alembic_version") == []


@pytest.mark.parametrize(
    "history", [*APPLICATION_HISTORIES, LEDGER_HISTORY], ids=lambda history: history.version_table
)
def test_the_files_of_the_migrations_are_named_by_their_revisions_in_their_order(
    history: History,
) -> None:
    scripts = script_directory(history.folder)
    assert history.revisions == [script.revision for script in scripts.walk_revisions()][::-1]
    assert history.revisions[-1] == scripts.get_current_head()


MIGRATE = """
import asyncio, sys
from batch_system.database.engine import Database
from batch_system.database.migrate import History, migrate
from batch_system.batch.ledger.migration import LEDGER_HISTORY

async def main():
    database = Database(sys.argv[1], setting="LEDGER_URL", pooled=False)
    await migrate(database, LEDGER_HISTORY)
    await database.dispose()

asyncio.run(main())
print("alembic" in sys.modules, "mako" in sys.modules)
"""


@pytest.mark.rest
def test_alembic_is_not_imported_where_no_migration_is_executed(ledger_url: str) -> None:
    """It takes a good part of the time in which a command starts."""
    command = [sys.executable, "-c", MIGRATE, ledger_url]
    assert (
        subprocess.run(command, check=True, capture_output=True, text=True).stdout
        == "False False\n"
    )


async def test_a_missing_index_would_be_seen(ledger: Database) -> None:
    async with ledger.engine.begin() as connection:
        await connection.execute(text("DROP INDEX uq_batch_runs_exclusive"))
        missing = await connection.run_sync(differences, [tables.ledger], "batch_alembic_version")
    assert [difference[0] for difference in missing] == ["add_index"]


async def test_all_histories_fit_into_one_database(ledger: Database) -> None:
    await migrate(ledger, *APPLICATION_HISTORIES)
    async with ledger.engine.connect() as connection:
        every = [tables.ledger, companions, Base.metadata]
        assert await connection.run_sync(differences, every, "alembic_version") == []


async def test_several_processes_may_migrate_at_once(database_url: str) -> None:
    databases = [Database(database_url, setting="LEDGER_URL") for _ in range(8)]
    await asyncio.gather(*(migrate(database, LEDGER_HISTORY) for database in databases))
    async with databases[0].engine.connect() as connection:
        versions = (
            (await connection.execute(text("SELECT version_num FROM batch_alembic_version")))
            .scalars()
            .all()
        )
    assert len(versions) == 1
    await asyncio.gather(*(database.dispose() for database in databases))


async def test_a_newer_database_is_refused_and_both_revisions_are_named(ledger: Database) -> None:
    async with ledger.engine.begin() as connection:
        await connection.execute(
            text("UPDATE batch_alembic_version SET version_num = 'ledger_9999'")
        )
        await connection.execute(text("UPDATE batch_windows SET oldest = 'ledger_9999'"))
    with pytest.raises(DatabaseTooNew, match=f"ledger_9999.*up to {LEDGER_HISTORY.revisions[-1]}"):
        await migrate(ledger, LEDGER_HISTORY)


async def test_a_database_from_before_the_first_release_is_told_which_commit_upgrades_it(
    ledger: Database,
) -> None:
    async with ledger.engine.begin() as connection:
        await connection.execute(
            text("UPDATE batch_alembic_version SET version_num = 'ledger_0019'")
        )
    with pytest.raises(
        DatabaseTooOld,
        match=f"ledger_0019.*before version 0.1.0: start commit {LAST_BEFORE_RELEASE}",
    ):
        await migrate(ledger, LEDGER_HISTORY)


async def test_an_unreachable_database_is_named_without_its_password() -> None:
    database = Database("postgresql+asyncpg://bob:hunter2@127.0.0.1:1/shop", setting="DATABASE_URL")
    with pytest.raises(
        DatabaseUnreachable, match=r"bob:\*\*\*@127.0.0.1:1/shop.*DATABASE_URL"
    ) as caught:
        await database.check()
    assert "hunter2" not in str(caught.value)
    await database.dispose()


async def test_an_sqlite_file_that_cannot_be_opened_is_named() -> None:
    database = Database("sqlite+aiosqlite:////nowhere/app.db", setting="DATABASE_URL")
    with pytest.raises(DatabaseUnreachable, match=r"/nowhere/app.db.*unable to open.*DATABASE_URL"):
        await database.check()
    await database.dispose()


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize(
    ("index", "predicate"),
    [
        ("ix_batch_runs_waiting", "READY_SQL"),
        ("ix_batch_runs_queue", "READY_SQL"),
        ("ix_batch_runs_retry_due", "RETRYING_SQL"),
        ("ix_batch_runs_retrying", "RETRYING_SQL"),
        ("ix_batch_runs_retry_queue", "RETRYING_SQL"),
        ("ix_batch_runs_in_the_way", "IN_THE_WAY_SQL"),
        ("ix_batch_runs_held", "HELD_SQL"),
        ("uq_batch_runs_exclusive", "HOLDS_LANE_SQL"),
        ("ix_batch_runs_created", "NO_PART_SQL"),
        ("ix_batch_runs_task_created", "NO_PART_SQL"),
        ("ix_batch_runs_state_created", "NO_PART_SQL"),
        ("ix_batch_runs_parts", "PART_SQL"),
    ],
)
async def test_the_queries_name_the_states_as_the_migrated_indexes_do(
    database_url: str, index: str, predicate: str
) -> None:
    """SQLite uses a partial index only where both are the same to the letter."""
    database = Database(database_url, setting="LEDGER_URL")
    await migrate(database, LEDGER_HISTORY)
    async with database.engine.connect() as connection:
        statement = text("SELECT sql FROM sqlite_master WHERE name = :name")
        made = (await connection.execute(statement, {"name": index})).scalar_one()
    await database.dispose()
    assert made.endswith(f"WHERE {getattr(tables, predicate)}")
