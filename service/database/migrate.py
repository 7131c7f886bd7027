"""Runs one alembic history on one database. Several processes may start at once: a lock lets one of them do it."""

from __future__ import annotations

import zlib
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


async def migrate(database: Database, history: History, to: str = "head") -> None:
    """Bring `database` up to the newest revision of `history`, or to this one.

    Raises DatabaseTooNew, naming both revisions, when the database knows a revision that this code doesn't,
    and DatabaseUnreachable.
    """
    try:
        async with database.engine.begin() as connection:
            if database.kind == "postgresql":
                lock = zlib.crc32(history.version_table.encode())
                await connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": lock})
            await connection.run_sync(_upgrade, history, database, to)
    except (DBAPIError, OSError) as error:
        raise database.unreachable(error) from error


def refuse_newer(connection: Connection, history: History, database: Database) -> None:
    """Raises DatabaseTooNew, as `migrate` does, but changes nothing."""
    context = MigrationContext.configure(connection, opts={"version_table": history.version_table})
    _refuse_newer(history.scripts(), context.get_current_heads(), database)


def _upgrade(connection: Connection, history: History, database: Database, to: str) -> None:
    scripts = history.scripts()

    def steps(revision: Any, _: Any) -> Any:
        _refuse_newer(scripts, revision, database)
        return scripts._upgrade_revs(to, revision)

    with EnvironmentContext(Config(), scripts, fn=steps) as environment:
        environment.configure(connection=connection, version_table=history.version_table)
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
