"""Creates the tables in the databases of tests, and lets synchronous code wait for a coroutine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from sqlalchemy import MetaData, make_url
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.schema import CreateSchema

from batch_system.batch.ledger.migration import LEDGER_HISTORY
from batch_system.database.engine import Database
from batch_system.database.histories import application_histories
from batch_system.database.migrate import migrate
from batch_system.errors import BatchError
from batch_system.settings.reading import get_settings
from batch_system.settings.urls import async_url

T = TypeVar("T")


def wait_for(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` to its end on an event loop in another thread, and return its result.

    It is another thread because the caller's thread may have a running event loop.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


Tables = MetaData | Iterable[MetaData] | Callable[[str], None] | None
"""The application's tables: the metadata of SQLAlchemy models, or a function that gets a URL and
creates the tables in that database. None: the application has no tables.
"""


async def prepared(application_url: str, ledger_url: str, tables: Tables) -> None:
    """Create the service's tables in both databases, and the application's tables in the
    application's database.
    """
    await migrated(application_url, ledger_url)
    if tables is None:
        return
    url = async_url(application_url)
    if callable(tables):
        await asyncio.to_thread(tables, url)
        return
    database = Database(url, setting="DATABASE_URL", pooled=False)
    async with database.engine.begin() as connection:
        for metadata in [tables] if isinstance(tables, MetaData) else tables:
            for schema in sorted(
                {table.schema for table in metadata.tables.values() if table.schema}
            ):
                await _make_schema(connection, schema)
            await connection.run_sync(metadata.create_all)
    await database.dispose()


async def _make_schema(connection: AsyncConnection, schema: str) -> None:
    if connection.dialect.name != "postgresql":
        raise BatchError(
            f"batch_metadata has tables in the schema {schema}, and SQLite has no schemas: run "
            "these tests with --batch-database=postgresql"
        )
    await connection.execute(CreateSchema(schema, if_not_exists=True))


async def migrated(application_url: str, ledger_url: str) -> None:
    """Create the service's tables in both databases."""
    for url, histories in (
        (application_url, application_histories(get_settings().BATCH_MIGRATIONS)),
        (ledger_url, (LEDGER_HISTORY,)),
    ):
        database = Database(async_url(url), setting="DATABASE_URL", pooled=False)
        await migrate(database, *histories)
        await database.dispose()


def name_of(url: str) -> str:
    """The name of a URL's database."""
    return str(make_url(url).database)
