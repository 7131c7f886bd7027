"""The tables beside the authors' data have a history of their own, also where older code made them without one."""

from __future__ import annotations

import pytest
from sqlalchemy import text

from service.batch.ledger.migration import LEDGER_HISTORY
from service.batch.ledger.tables import ledger as ledger_tables
from service.database import include_object
from service.database.companions import companions
from service.database.engine import Database
from service.database.histories import APPLICATION_HISTORIES, DATA_HISTORY
from service.database.migrate import migrate
from service.database.our_tables import DATA_TABLES, LEDGER_TABLES
from service.errors import DatabaseTooNew
from tests.docs_blocks import blocks, read

EARLIER = {
    "data_0003": (),
    "data_0002": ("DROP TABLE batch_quarantine",),
    "data_0001": ("DROP TABLE batch_quarantine", "DROP INDEX ix_batch_once_run"),
}
"""What undoes the later migrations, by revision."""
ALEMBICS = "CREATE TABLE IF NOT EXISTS alembic_version (version_num VARCHAR(32) PRIMARY KEY)"


async def older(database_url: str, revision: str, alembic_version: str) -> Database:
    """A database as code left it that had one history for its own tables and the application's."""
    database = Database(database_url, setting="DATABASE_URL", pooled=False)
    await migrate(database, DATA_HISTORY)
    statements = (
        *EARLIER[revision],
        f"DROP TABLE {DATA_HISTORY.version_table}",
        *(ALEMBICS, f"INSERT INTO alembic_version VALUES ('{alembic_version}')"),
        "INSERT INTO batch_once (key, run, at) VALUES ('k', '00000000-0000-0000-0000-000000000000', '2026-01-01')",
    )
    async with database.engine.begin() as connection:
        for statement in statements:
            await connection.execute(text(statement))
    return database


async def values(database: Database, query: str) -> list[object]:
    async with database.reader.connect() as connection:
        return list((await connection.execute(text(query))).scalars())


@pytest.mark.parametrize(
    ("revision", "alembic_version"),
    [
        ("data_0001", "app_0002"),
        ("data_0002", "app_0003"),
        ("data_0003", "app_0004"),
        ("data_0003", "app_0007"),  # a clone's own migrations followed
        ("data_0003", "5f3a9c"),  # somebody else's Alembic
    ],
)
async def test_tables_that_older_code_made_are_taken_over_with_their_rows(
    database_url: str, revision: str, alembic_version: str
) -> None:
    database = await older(database_url, revision, alembic_version)
    await migrate(database, DATA_HISTORY)
    assert await values(database, f"SELECT version_num FROM {DATA_HISTORY.version_table}") == ["data_0003"]
    assert await values(database, "SELECT version_num FROM alembic_version") == [alembic_version]
    assert await values(database, "SELECT key FROM batch_once") == ["k"]
    assert await values(database, "SELECT count(*) FROM batch_quarantine") == [0]
    await database.dispose()


async def test_tables_are_made_beside_those_of_an_application_with_its_own_alembic(database_url: str) -> None:
    database = Database(database_url, setting="DATABASE_URL", pooled=False)
    async with database.engine.begin() as connection:
        for statement in (ALEMBICS, "INSERT INTO alembic_version VALUES ('5f3a9c')"):
            await connection.execute(text(statement))
    await migrate(database, DATA_HISTORY)
    assert await values(database, "SELECT version_num FROM alembic_version") == ["5f3a9c"]
    assert await values(database, "SELECT count(*) FROM batch_checkpoints") == [0]
    await database.dispose()


async def test_a_clone_in_the_database_of_somebody_elses_alembic_is_told_how_to_install(database_url: str) -> None:
    database = Database(database_url, setting="DATABASE_URL", pooled=False)
    async with database.engine.begin() as connection:
        for statement in (ALEMBICS, "INSERT INTO alembic_version VALUES ('5f3a9c')"):
            await connection.execute(text(statement))
    with pytest.raises(DatabaseTooNew, match=r"migration 5f3a9c.*pip install PATH_OF_THE_CLONE"):
        await migrate(database, *APPLICATION_HISTORIES)
    await database.dispose()


def test_the_names_of_our_tables_are_complete() -> None:
    assert {*ledger_tables.tables, LEDGER_HISTORY.version_table} == LEDGER_TABLES
    assert {*companions.tables, DATA_HISTORY.version_table} == DATA_TABLES


def test_autogenerate_leaves_out_our_tables_and_nothing_else() -> None:
    for name in LEDGER_TABLES | DATA_TABLES:
        assert not include_object(None, name, "table", True, None)
        assert include_object(None, name, "table", False, None), "the application's metadata declares it"
        assert include_object(None, name, "index", True, None)
    assert include_object(None, "batch_orders", "table", True, None)


async def test_the_page_says_how_to_take_us_out_again(postgres_database: str) -> None:
    database = Database(postgres_database, setting="DATABASE_URL", pooled=False)
    async with database.engine.begin() as connection:
        await connection.execute(text("CREATE TABLE batch_orders (id integer)"))
    await migrate(database, LEDGER_HISTORY, DATA_HISTORY)
    [block] = blocks(read("docs/apps-project.md"), "sql")
    async with database.engine.begin() as connection:
        for statement in filter(str.strip, block.code.split(";")):
            await connection.execute(text(statement))
    everything = "SELECT relname FROM pg_catalog.pg_class WHERE relnamespace = 'public'::regnamespace"
    assert await values(database, everything) == ["batch_orders"]
    await database.dispose()
