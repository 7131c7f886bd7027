"""The real ledger beneath the machine: the service's functions, each in a transaction, and what stands there."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Table, delete, select
from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.ledger import tables
from service.batch.ledger.migration import LEDGER_HISTORY
from service.database.engine import Database
from service.database.histories import APPLICATION_HISTORIES
from service.database.migrate import migrate
from service.testing.postgres import PostgresServer
from tests.batch.lock_order import watch

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


class World:
    """A ledger and an application database, on an event loop of its own: hypothesis' rules are no coroutines."""

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
        """Both, the second one while the first is not committed yet. On PostgreSQL: SQLite has one writer."""

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


async def _clear(connection: AsyncConnection) -> None:
    for table in tables.ledger.sorted_tables:
        await connection.execute(delete(table))


async def _look(connection: AsyncConnection) -> Snapshot:
    return Snapshot(
        runs={row["id"]: row for row in await _rows(connection, tables.runs)},
        attempts=await _rows(connection, tables.attempts),
        missed=await _rows(connection, tables.missed),
        nodes={row["id"]: row for row in await _rows(connection, tables.nodes)},
        tasks={row["name"]: row for row in await _rows(connection, tables.tasks)},
    )


async def _rows(connection: AsyncConnection, table: Table) -> list[Row]:
    return [dict(row) for row in (await connection.execute(select(table))).mappings()]
