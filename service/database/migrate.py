"""Runs one alembic history on one database. Several processes may start at once: a lock lets one of them do it."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from service.database.engine import Database
from service.errors import DatabaseTooNew


@dataclass(frozen=True)
class History:
    """Alembic's revisions in one folder, and the table that says which of them a database has."""

    folder: Path
    version_table: str

    def scripts(self) -> ScriptDirectory:
        config = Config()
        config.set_main_option("script_location", str(self.folder).replace("%", "%%"))
        config.set_main_option("path_separator", "os")
        return ScriptDirectory.from_config(config)

    def known(self) -> set[str]:
        """Its revisions by their whole names: alembic itself takes `head`, `+1` and beginnings of names too."""
        return {script.revision for script in self.scripts().walk_revisions()}

    @property
    def lock(self) -> int:
        """The number of PostgreSQL's advisory lock of whoever migrates."""
        return zlib.crc32(self.version_table.encode())


async def migrate(database: Database, history: History, to: str = "head") -> None:
    """Bring `database` up to the newest revision of `history`, or to this one.

    Raises DatabaseTooNew, naming both revisions, when the database knows a revision that this code doesn't,
    and DatabaseUnreachable.
    """
    try:
        async with database.engine.begin() as connection:
            if database.kind == "postgresql":
                await connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": history.lock})
            await connection.run_sync(_upgrade, history, database, to)
    except (DBAPIError, OSError) as error:
        raise database.unreachable(error) from error


async def make_tables(connection: AsyncConnection, history: History, revision: str, schema: str | None = None) -> None:
    """Make the tables of this revision where there are none, in the transaction of this connection.

    `schema`: of PostgreSQL, the first of the search path; only there it is looked whether they are there already.
    """
    await connection.run_sync(_run, history, lambda scripts, now: scripts._upgrade_revs(revision, now), schema)


def refuse_newer(connection: Connection, history: History, database: Database) -> None:
    """Raises DatabaseTooNew, as `migrate` does, but changes nothing."""
    context = MigrationContext.configure(connection, opts={"version_table": history.version_table})
    _refuse_newer(history.scripts(), context.get_current_heads(), database)


def _upgrade(connection: Connection, history: History, database: Database, to: str) -> None:
    def steps(scripts: ScriptDirectory, revision: Any) -> Any:
        _refuse_newer(scripts, revision, database)
        return scripts._upgrade_revs(to, revision)

    _run(connection, history, steps)


def _run(
    connection: Connection, history: History, steps: Callable[[ScriptDirectory, Any], Any], schema: str | None = None
) -> None:
    scripts = history.scripts()
    with EnvironmentContext(Config(), scripts, fn=lambda revision, _: steps(scripts, revision)) as environment:
        environment.configure(connection=connection, version_table=history.version_table, version_table_schema=schema)
        with environment.begin_transaction():
            environment.run_migrations()


def _refuse_newer(scripts: ScriptDirectory, current: tuple[str, ...], database: Database) -> None:
    for revision in current or ():
        try:
            scripts.get_revision(revision)
        except CommandError:
            raise DatabaseTooNew(
                f"the database {database.safe_url} ({database.setting}) is at migration {revision}, but this code "
                f"knows migrations up to {scripts.get_current_head()}: start the newer version of the code, "
                "or point the setting at another database"
            ) from None
