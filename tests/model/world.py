"""The real ledger beneath the machine: the service's functions, each in a transaction, and what
stands there.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Column, MetaData, Table, Text, delete, func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger import tables
from batch_system.batch.ledger.migration import LEDGER_HISTORY
from batch_system.database.engine import Database
from batch_system.database.migrate import migrate
from batch_system.testing.postgres import PostgresServer
from tests.batch.lock_order import watch
from tests.migrations import APPLICATION_HISTORIES

CHANGES = Table("changes", MetaData(), Column("old", Text), Column("new", Text))
"""One row for each change of a run's state, written by a trigger: several of one transaction are
all there.
"""

_COUNTED = select(CHANGES.c.old, CHANGES.c.new, func.count()).group_by(CHANGES.c.old, CHANGES.c.new)

TRIGGER = {
    "sqlite": [
        "CREATE TRIGGER record_change AFTER UPDATE OF state ON batch_runs "
        "WHEN old.state <> new.state "
        "BEGIN INSERT INTO changes VALUES (old.state, new.state); END"
    ],
    "postgresql": [
        "CREATE FUNCTION record_change() RETURNS trigger LANGUAGE plpgsql AS "
        "'BEGIN INSERT INTO changes VALUES (old.state, new.state); RETURN NULL; END'",
        "CREATE TRIGGER record_change AFTER UPDATE OF state ON batch_runs FOR EACH ROW "
        "WHEN (old.state <> new.state) EXECUTE FUNCTION record_change()",
    ],
}

Row = dict[str, Any]
Write = Callable[[AsyncConnection], Awaitable[Any]]


@dataclass(frozen=True)
class Snapshot:
    """All rows of a ledger; runs and nodes by their ids."""

    runs: dict[str, Row]
    attempts: list[Row]
    missed: list[Row]
    nodes: dict[str, Row]
    tasks: dict[str, Row]
    changes: Counter[tuple[str, str]]
    """How often the state of a run has changed, from which to which, since the ledger was cleared.
    """


class World:
    """A ledger and an application database, on an event loop of its own: hypothesis' rules are no
    coroutines.
    """

    def __init__(self, folder: Path, server: PostgresServer | None) -> None:
        self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        self._server = server
        self._url = f"sqlite+aiosqlite:///{folder}/ledger.db"
        if server is not None:
            self._url = self.run(server.create_database())
        self.ledger = Database(self._url, setting="LEDGER_URL")
        self.in_wrong_order = watch(self.ledger) if server is not None else []
        """Statements that could deadlock with others."""
        self.application = Database(f"sqlite+aiosqlite:///{folder}/app.db", setting="DATABASE_URL")
        self.run(migrate(self.ledger, LEDGER_HISTORY))
        self.run(migrate(self.application, *APPLICATION_HISTORIES))
        self.write(_record_changes)

    def close(self) -> None:
        self.run(self.ledger.dispose())
        self.run(self.application.dispose())
        if self._server is not None:
            self.run(self._server.drop_database(self._url))
        self._runner.close()

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return self._runner.run(coroutine)

    def write(self, function: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        """Call it with a connection, in a transaction that is committed."""

        async def call() -> Any:
            async with self.ledger.engine.begin() as connection:
                return await function(connection, *args)

        return self.run(call())

    def read(self, function: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        async def call() -> Any:
            async with self.ledger.reader.connect() as connection:
                return await function(connection, *args)

        return self.run(call())

    def write_beside(self, first: Write, second: Write) -> tuple[Any, Any]:
        """Both, the second one while the first is not committed yet. On PostgreSQL: SQLite has one
        writer.
        """

        async def call() -> tuple[Any, Any]:
            async with self.ledger.engine.begin() as connection:
                one = await first(connection)
                async with self.ledger.engine.begin() as another:
                    two = await second(another)
            return one, two

        result: tuple[Any, Any] = self.run(call())
        return result

    def clear(self) -> None:
        """Quicker than a new file or a new database, and than TRUNCATE."""
        self.write(_clear)
        self.in_wrong_order.clear()  # nobody else is there

    def look(self) -> Snapshot:
        snapshot: Snapshot = self.read(_look)
        return snapshot


async def _record_changes(connection: AsyncConnection) -> None:
    await connection.run_sync(CHANGES.create)
    for statement in TRIGGER[connection.dialect.name]:
        await connection.exec_driver_sql(statement)


async def _clear(connection: AsyncConnection) -> None:
    for table in (*tables.ledger.sorted_tables, CHANGES):
        await connection.execute(delete(table))


async def _look(connection: AsyncConnection) -> Snapshot:
    return Snapshot(
        runs={row["id"]: row for row in await _rows(connection, tables.runs)},
        attempts=await _rows(connection, tables.attempts),
        missed=await _rows(connection, tables.missed),
        nodes={row["id"]: row for row in await _rows(connection, tables.nodes)},
        tasks={row["name"]: row for row in await _rows(connection, tables.tasks)},
        changes=Counter(
            {(old, new): number for old, new, number in await connection.execute(_COUNTED)}
        ),
    )


async def _rows(connection: AsyncConnection, table: Table) -> list[Row]:
    return [dict(row) for row in (await connection.execute(select(table))).mappings()]
