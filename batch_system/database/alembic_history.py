"""Executes migrations with Alembic. Alone, because Alembic is slow to import, and rarely has
something to execute.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
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


def due(folder: Path, current: str, to: str) -> list[ModuleType]:
    """The migrations between the revision `current` and the revision `to`, or `head`. None if `to`
    is not newer.
    """
    scripts = script_directory(folder)
    names = [script.revision for script in scripts.iterate_revisions(to, "base")]
    newer = names[: names.index(current)] if current in names else []
    return [scripts.get_revision(name).module for name in newer]


def upgrade(
    connection: Connection,
    folder: Path,
    version_table: str,
    to: str,
    after_each: Callable[[ModuleType], None],
    schema: str | None = None,
) -> None:
    """Execute the migrations that the database lacks, up to the revision `to` or to `head`.

    `after_each`: called with the module of each migration, in its transaction. `schema`: the schema
    of PostgreSQL with the version table; by default the search path finds it.
    """
    scripts = script_directory(folder)

    def steps(revision: Any, _: Any) -> Any:
        return scripts._upgrade_revs(to, revision)

    def applied(ctx: Any, step: Any, heads: Any, run_args: Any) -> None:
        after_each(scripts.get_revision(step.up_revision_id).module)

    with EnvironmentContext(Config(), scripts, fn=steps) as environment:
        environment.configure(
            connection=connection,
            version_table=version_table,
            version_table_schema=schema,
            on_version_apply=applied,
        )
        with environment.begin_transaction():
            environment.run_migrations()
