"""`operations.migrations`: which revision each database has, and migrations to the revisions of
this code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger import database_time
from batch_system.batch.ledger.migration import LEDGER_HISTORY
from batch_system.batch.ledger.people import audit
from batch_system.batch.nodes import living, process_lock
from batch_system.database.engine import Database
from batch_system.database.histories import application_histories
from batch_system.database.migrate import (
    History,
    migrate,
    oldest_after,
    revision_of,
    window_of,
)
from batch_system.errors import InvalidParameters
from batch_system.escaping import echoed
from batch_system.operations.asking.context import Context
from batch_system.operations.asking.databases import is_missing_file, migrate_ledger
from batch_system.operations.system.results import Migration


async def list_migrations(context: Context) -> Sequence[Migration]:
    """The state of each history. Nothing is changed, and no file is made."""
    return [
        await _state(context, name, database, history)
        for name, database, history in _histories(context)
    ]


async def carry_out(context: Context, to: str | None = None) -> Sequence[Migration]:
    """Migrate both databases as a starting service does, and make them if they are missing.
    Returns their states.

    `to`: only the history that has this revision is migrated, and no further. Raises
    InvalidParameters if none has it, and DatabaseInUse while a process lives that can't work with
    the ledger afterwards.
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
    context: Context,
    name: Literal["application", "ledger"],
    database: Database,
    history: History,
) -> Migration:
    newest = history.revisions[-1]
    state = Migration(
        database=name,
        version_table=history.version_table,
        current=None,
        newest=newest,
        is_due=True,
    )
    if is_missing_file(database):
        return state
    await database.check()
    try:
        current = await revision_of(database, history)
        if current is None:
            return state
        oldest = oldest_after(history, current)
        async with database.reader.connect() as connection:
            window = await connection.run_sync(window_of, history)
            older = await _older(connection, context, oldest) if name == "ledger" else []
    except (DBAPIError, OSError) as error:
        raise database.unreachable(error) from error
    found = {
        "current": current,
        "is_due": oldest is not None,
        "expands": oldest is not None and window is not None and oldest <= window.oldest,
        "oldest_version": window.version if window is not None else None,
        "in_the_way": older,
    }
    return state.model_copy(update=found)


async def _older(connection: AsyncConnection, context: Context, oldest: str | None) -> list[str]:
    """The processes that would have to stop before the ledger is migrated."""
    if oldest is None:
        return []
    folder = process_lock.folder_of(context.databases.ledger.url)
    return await living.older_nodes(connection, oldest, folder, context.lease_seconds)
