"""The tables beside the authors' data have a history of their own, also in the database of another
application.
"""

from __future__ import annotations

import pytest
from sqlalchemy import text

from batch_system.batch.ledger.migration import LEDGER_HISTORY
from batch_system.batch.ledger.tables import ledger as ledger_tables
from batch_system.database import include_object
from batch_system.database.companions import companions
from batch_system.database.engine import Database
from batch_system.database.histories import DATA_HISTORY
from batch_system.database.migrate import migrate
from batch_system.database.our_tables import DATA_TABLES, LEDGER_TABLES
from batch_system.errors import DatabaseTooNew
from tests.docs_blocks import blocks, read
from tests.migrations import APPLICATION_HISTORIES

ALEMBICS = "CREATE TABLE IF NOT EXISTS alembic_version (version_num VARCHAR(32) PRIMARY KEY)"


async def values(database: Database, query: str) -> list[object]:
    async with database.reader.connect() as connection:
        return list((await connection.execute(text(query))).scalars())


async def test_tables_are_made_beside_those_of_an_application_with_its_own_alembic(
    database_url: str,
) -> None:
    database = Database(database_url, setting="DATABASE_URL", pooled=False)
    async with database.engine.begin() as connection:
        for statement in (ALEMBICS, "INSERT INTO alembic_version VALUES ('5f3a9c')"):
            await connection.execute(text(statement))
    await migrate(database, DATA_HISTORY)
    assert await values(database, "SELECT version_num FROM alembic_version") == ["5f3a9c"]
    assert await values(database, "SELECT count(*) FROM batch_checkpoints") == [0]
    await database.dispose()


async def test_a_clone_in_the_database_of_somebody_elses_alembic_is_told_how_to_install(
    database_url: str,
) -> None:
    database = Database(database_url, setting="DATABASE_URL", pooled=False)
    async with database.engine.begin() as connection:
        for statement in (ALEMBICS, "INSERT INTO alembic_version VALUES ('5f3a9c')"):
            await connection.execute(text(statement))
    with pytest.raises(DatabaseTooNew, match=r"migration 5f3a9c.*BATCH_MIGRATIONS empty"):
        await migrate(database, *APPLICATION_HISTORIES)
    await database.dispose()


def test_the_names_of_our_tables_are_complete() -> None:
    assert {*ledger_tables.tables, LEDGER_HISTORY.version_table} == LEDGER_TABLES
    assert {*companions.tables, DATA_HISTORY.version_table} == DATA_TABLES


def test_autogenerate_leaves_out_our_tables_and_nothing_else() -> None:
    for name in LEDGER_TABLES | DATA_TABLES:
        assert not include_object(None, name, "table", True, None)
        assert include_object(None, name, "table", False, None), (
            "the application's metadata declares it"
        )
        assert include_object(None, name, "index", True, None)
    assert include_object(None, "batch_orders", "table", True, None)


async def test_the_page_says_how_to_remove_our_tables_again(postgres_database: str) -> None:
    database = Database(postgres_database, setting="DATABASE_URL", pooled=False)
    async with database.engine.begin() as connection:
        await connection.execute(text("CREATE TABLE batch_orders (id integer)"))
    await migrate(database, LEDGER_HISTORY, DATA_HISTORY)
    [block] = blocks(read("docs/apps-project.md"), "sql")
    async with database.engine.begin() as connection:
        for statement in filter(str.strip, block.code.split(";")):
            await connection.execute(text(statement))
    everything = (
        "SELECT relname FROM pg_catalog.pg_class WHERE relnamespace = 'public'::regnamespace"
    )
    assert await values(database, everything) == ["batch_orders"]
    await database.dispose()
