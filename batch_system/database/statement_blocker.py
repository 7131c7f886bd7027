"""Who blocks a statement on PostgreSQL: the process of the server that holds the lock, its client
and its statement.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from contextlib import suppress

from sqlalchemy import Select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system import escaping
from batch_system.concurrency.limits import limited
from batch_system.database.engine import LOCK_SECONDS, Database

LOOK_SECONDS = 0.2
LONGEST_STATEMENT = 120
_LITERAL = re.compile(r"'(?:[^']|'')*'?|\$\w*\$.*|\b\d{4,}\b", re.DOTALL)
"""What may be data in a statement: texts, and long numbers."""

_HOLDERS = text(
    "SELECT a.pid, a.application_name, a.usename, a.state, a.query, "
    "CAST(extract(epoch FROM clock_timestamp() - a.xact_start) AS integer) AS seconds "
    "FROM pg_stat_activity a WHERE a.pid = ANY(pg_blocking_pids(:waiting)) ORDER BY a.pid LIMIT 1"
)


class StatementBlocker:
    """Who blocks a statement, asked in a task beside the loop that waits for it. One question is
    asked at a time.
    """

    in_words: str | None = None
    """The last answer; None if nobody is known."""

    def __init__(
        self,
        database: Database,
        rest: float = 0.0,
        on_found: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`rest`: seconds between two questions, at least. `on_found`: called with each answer."""
        self._database = database
        self._rest = rest
        self._on_found = on_found
        self._asking: asyncio.Task[None] | None = None

    def ask(self, locking: Select[tuple[object]]) -> None:
        """Ask who keeps this query from being executed, unless somebody is being asked for. Returns
        at once.
        """
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask(locking), name="batch-blocker")

    def forget(self) -> None:
        """Nothing is blocked any more."""
        self.in_words = None
        if self._asking is not None:
            self._asking.cancel()

    async def stop(self) -> None:
        """End the question, if it is being asked."""
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.wait([self._asking])

    async def _ask(self, locking: Select[tuple[object]]) -> None:
        self.in_words = await statement_blocker_in_words(self._database, locking)
        if self.in_words is not None:
            self._on_found(self.in_words)
        await asyncio.sleep(self._rest)


async def statement_blocker_in_words(
    database: Database, locking: Select[tuple[object]]
) -> str | None:
    """Who keeps this query from being executed, in one line. None if nobody does, or on SQLite.

    `locking`: a query that has to wait for the lock, such as one that locks a row. It is rolled
    back.
    """
    if database.kind != "postgresql":
        return None
    # The lock has just been released, or other parts report what is wrong.
    with suppress(DBAPIError, OSError):
        async with (
            limited(LOCK_SECONDS + 5),
            database.engine.connect() as waiting,
            database.reader.connect() as looking,
        ):
            number = (await waiting.execute(text("SELECT pg_backend_pid()"))).scalar_one()
            wait = asyncio.create_task(_wait(waiting, locking))
            try:
                while not wait.done():
                    await asyncio.sleep(LOOK_SECONDS)
                    if (found := await _look(looking, number)) is not None:
                        return found
            finally:
                wait.cancel()
                await asyncio.wait([wait])
    return None


async def _wait(connection: AsyncConnection, locking: Select[tuple[object]]) -> None:
    with suppress(DBAPIError):
        await connection.execute(locking)


async def _look(connection: AsyncConnection, waiting: int) -> str | None:
    row = (await connection.execute(_HOLDERS, {"waiting": waiting})).first()
    if row is None:
        return None
    statement = " ".join(_LITERAL.sub("…", row.query or "").split())[:LONGEST_STATEMENT]
    client = f"{row.application_name or 'a client without a name'}, role {row.usename}"
    return escaping.line(f"pid {row.pid} ({client}), {row.state} for {row.seconds} s: {statement}")
