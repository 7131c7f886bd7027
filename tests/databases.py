"""Databases of each kind for the tests. A migrated one is a copy of one that was migrated before,
which is faster.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from sqlalchemy import make_url, text

from batch_system.database.engine import Database
from batch_system.database.migrate import History, migrate
from batch_system.testing.postgres import PostgresServer
from tests.migrations import APPLICATION_HISTORIES


class SQLiteFiles:
    """Files; those that are copied are in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def make(self, file: Path, *histories: History) -> str:
        """The URL of a new database: of an empty one, whose file is not there yet, or of a migrated
        one.
        """
        if histories:
            template = self._folder / f"{histories[-1].version_table}.db"
            if not template.exists():
                await migrated(url_of(template), *histories)
            shutil.copy(template, file)
        return url_of(file)

    async def drop(self, url: str) -> None:
        """Its folder is the test's, and is removed with it."""


class PostgresDatabases:
    """Databases of one server."""

    def __init__(self, server: PostgresServer) -> None:
        self._server = server
        self._templates: dict[tuple[History, ...], str] = {}

    async def make(self, file: Path, *histories: History) -> str:
        """The URL of a new database: of an empty one, or of a migrated one. `file` is for the other
        kind.
        """
        if not histories:
            return await self._server.create_database()
        if histories not in self._templates:
            self._templates[histories] = await self._server.create_database()
            await migrated(self._templates[histories], *histories)
        return await self._server.create_database(
            template=str(make_url(self._templates[histories]).database)
        )

    async def drop(self, url: str) -> None:
        await self._server.drop_database(url)

    async def close(self) -> None:
        for url in self._templates.values():
            await self.drop(url)


async def application_with_done(ledger: Database, folder: Path) -> str:
    """The URL of an application's database for this ledger: of a file in `folder`, or the ledger's
    own on PostgreSQL.

    It has a table in which tasks note what they have done. The table refuses an item that is there
    already.
    """
    is_file = ledger.kind == "sqlite"
    url = (
        url_of(folder / "data.db") if is_file else ledger.url.render_as_string(hide_password=False)
    )
    await migrated(url, *APPLICATION_HISTORIES)
    async with Database(url, setting="DATABASE_URL", pooled=False).engine.begin() as connection:
        await connection.execute(text("CREATE TABLE done (item INTEGER PRIMARY KEY)"))
    return url


async def items_done(url: str) -> list[int]:
    """The items in the table of `application_with_done`."""
    async with Database(url, setting="DATABASE_URL", pooled=False).engine.connect() as connection:
        return list(
            (await connection.execute(text("SELECT item FROM done ORDER BY item"))).scalars()
        )


def url_of(file: Path) -> str:
    return f"sqlite+aiosqlite:///{file}"


async def migrated(url: str, *histories: History, to: str = "head") -> None:
    database = Database(url, setting="LEDGER_URL", pooled=False)
    await migrate(database, *histories, to=to)
    await database.dispose()
