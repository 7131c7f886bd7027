"""Executes migrations with Alembic. Alone, because Alembic is slow to import, and rarely has
something to execute.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection


def script_directory(folder: Path) -> ScriptDirectory:
    """The migrations in `folder`."""
    config = Config()
    config.set_main_option("script_location", str(folder).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return ScriptDirectory.from_config(config)


def upgrade(
    connection: Connection, folder: Path, version_table: str, to: str, schema: str | None = None
) -> None:
    """Execute the migrations that the database lacks, up to the revision `to` or to `head`.

    `schema`: the schema of PostgreSQL with the version table; by default the search path finds it.
    """
    scripts = script_directory(folder)

    def steps(revision: Any, _: Any) -> Any:
        return scripts._upgrade_revs(to, revision)

    with EnvironmentContext(Config(), scripts, fn=steps) as environment:
        environment.configure(
            connection=connection, version_table=version_table, version_table_schema=schema
        )
        with environment.begin_transaction():
            environment.run_migrations()
