"""`operations.migrations`: which revision each database has, and migrations to the revisions of
this code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from sqlalchemy.exc import DBAPIError

from batch_system.batch.ledger import database_time
from batch_system.batch.ledger.migration import LEDGER_HISTORY
from batch_system.batch.ledger.people import audit
from batch_system.database.engine import Database
from batch_system.database.histories import application_histories
from batch_system.database.migrate import History, migrate, revision_of
from batch_system.errors import InvalidParameters
from batch_system.escaping import echoed
from batch_system.operations.asking.context import Context
from batch_system.operations.asking.databases import is_missing_file, migrate_ledger
from batch_system.operations.system.results import Migration


async def list_migrations(context: Context) -> Sequence[Migration]:
    """The state of each history. Nothing is changed, and no file is made."""
    return [
        await _state(name, database, history) for name, database, history in _histories(context)
    ]


async def carry_out(context: Context, to: str | None = None) -> Sequence[Migration]:
    """Migrate both databases as a starting service does, and make them if they are missing.
    Returns their states.

    `to`: only the history that has this revision is migrated, and no further. Raises
    InvalidParameters if none has it, and DatabaseInUse while a service of an older version
    lives.
    """
    databases = context.databases
    if to is None:
        await databases.make_both()
    else:
        name, database, history = _history_with(context, to)
        if name == "ledger":
            await migrate_ledger(database, context.lease_seconds, to)
        else:
            await migrate(database, history, to=to)
    states = await list_migrations(context)
    await _record(context, to, states)
    return states


async def _record(context: Context, to: str | None, states: Sequence[Migration]) -> None:
    """Add an event to the audit, if the ledger has its newest tables."""
    if any(state.is_due for state in states if state.database == "ledger"):
        return
    async with context.databases.changing() as connection:
        now = await database_time.now_of(connection)
        after = {state.version_table: state.current for state in states}
        await audit.record(
            connection, context.actor.by, "database.migrate", now, target=to, after=after
        )


def _history_with(context: Context, revision: str) -> tuple[str, Database, History]:
    for name, database, history in _histories(context):
        if revision in history.revisions:
            return name, database, history
    known = ", ".join(
        revision for _, _, history in _histories(context) for revision in history.revisions
    )
    raise InvalidParameters(f"there is no revision {echoed(revision)}; allowed: {known}")


def _histories(
    context: Context,
) -> Iterator[tuple[Literal["application", "ledger"], Database, History]]:
    databases = context.databases
    yield "ledger", databases.ledger, LEDGER_HISTORY
    for history in application_histories(context.settings.BATCH_MIGRATIONS):
        yield "application", databases.application, history


async def _state(
    name: Literal["application", "ledger"], database: Database, history: History
) -> Migration:
    newest, current = history.revisions[-1], None
    if not is_missing_file(database):
        await database.check()
        try:
            current = await revision_of(database, history)
        except (DBAPIError, OSError) as error:
            raise database.unreachable(error) from error
    return Migration(
        database=name,
        version_table=history.version_table,
        current=current,
        newest=newest,
        is_due=current != newest,
    )
