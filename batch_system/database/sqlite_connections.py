"""Connections to an SQLite file for SQLAlchemy, by aiosqlite. Each has a thread of its own."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack, suppress
from functools import partial
from threading import Thread
from typing import Any

import aiosqlite
from aiosqlite.context import contextmanager

FIRST_ROWS = 50
"""How many rows are read together with the statement. A streamed result keeps at most this many in
advance.
"""


class _FileConnection(sqlite3.Connection):
    """A connection whose close() ends its transaction and never raises.

    SQLite keeps a closed connection and its locks alive as long as Python has one of its cursors
    with unread rows. A cancel between a statement and its rows leaves such a cursor until the
    garbage collector frees it.
    """

    def close(self) -> None:
        # For example a disk error. aiosqlite's thread does not end if close() raises.
        with suppress(sqlite3.Error):
            if self.in_transaction:
                self.rollback()
        super().close()


class _Cursor(aiosqlite.Cursor):
    """A cursor that goes to the thread only once for each statement, instead of also for its
    creation, its rows and its close.

    Going there takes about a tenth of a millisecond, which is longer than many statements take.
    """

    def __init__(self, connection: aiosqlite.Connection) -> None:
        self._conn = connection
        self.iter_chunk_size = connection._iter_chunk_size
        self._rows: list[Any] = []
        # True from a statement until the thread has read all its rows, or has closed the cursor.
        self._is_open = False

    async def execute(self, sql: str, parameters: Iterable[Any] | None = None) -> aiosqlite.Cursor:
        await self._execute(self._run, "execute", sql, () if parameters is None else parameters)
        return self

    async def executemany(self, sql: str, parameters: Iterable[Iterable[Any]]) -> aiosqlite.Cursor:
        await self._execute(self._run, "executemany", sql, parameters)
        return self

    async def fetchone(self) -> Any:
        return next(iter(await self.fetchmany(1)), None)

    async def fetchmany(self, size: int | None = None) -> list[Any]:
        size = self.arraysize if size is None else size
        if self._is_open and len(self._rows) < size:
            await self._execute(self._read, size - len(self._rows))
        rows = self._rows[:size]
        self._rows = self._rows[size:]
        return rows

    async def fetchall(self) -> list[Any]:
        if self._is_open:
            await self._execute(self._read)
        rows = self._rows
        self._rows = []
        return rows

    async def close(self) -> None:
        self._rows = []
        if self._is_open:
            await self._execute(self._close)

    async def _execute(self, function: Callable[..., None], *args: Any) -> None:
        await self._conn._execute(function, *args)  # type: ignore[no-untyped-call]

    # In the thread:

    def _run(self, method: str, sql: str, parameters: Iterable[Any]) -> None:
        self._cursor = self._conn._conn.cursor()
        self._rows = []
        self._is_open = True
        try:
            getattr(self._cursor, method)(sql, parameters)
        except BaseException:
            # The error may be kept for long, and with it the cursor, the connection and its files.
            self._close()
            raise
        self._read(FIRST_ROWS)

    def _read(self, count: int | None = None) -> None:
        """Read this many more rows, or all. The cursor is closed after the last row, and after an
        error.
        """
        try:
            rows = self._cursor.fetchall() if count is None else self._cursor.fetchmany(count)
        except BaseException:
            self._close()
            raise
        self._rows += rows
        if count is None or len(rows) < count:
            self._close()

    def _close(self) -> None:
        self._cursor.close()
        self._is_open = False


class _Connection(aiosqlite.Connection):
    """A connection whose cursors go to its thread once. It stops the thread only once, and closes
    the connection that the thread has opened.

    If a task is cancelled a second time while its connection is being closed, stop() is called
    twice. The second call would return a future that is never completed, because the thread has
    ended. If a task is cancelled while its connection is being opened, aiosqlite does not know the
    connection that its thread opens.
    """

    def __init__(self, connect: Callable[[], sqlite3.Connection], iter_chunk_size: int) -> None:
        super().__init__(self._open, iter_chunk_size)
        self._thread = Thread(target=_work_off, args=(self._tx,), daemon=True)
        self._connect_to_file = connect
        self._opened: sqlite3.Connection | None = None

    @contextmanager
    async def cursor(self) -> aiosqlite.Cursor:
        return _Cursor(self)

    def stop(self) -> asyncio.Future[Any] | None:
        if not self._running:
            return None
        self._tx.put_nowait((None, self._close_opened))
        return super().stop()

    def _open(self) -> sqlite3.Connection:
        self._opened = self._connect_to_file()
        return self._opened

    def _close_opened(self) -> None:
        if self._opened is not None:
            self._opened.close()


def _work_off(calls: Any) -> None:
    """The work of aiosqlite's thread. It goes on even if the event loop that waits for a call, such
    as for a lock, was closed.
    """
    while True:
        try:
            return aiosqlite.core._connection_worker_thread(calls)  # type: ignore[no-any-return]
        except RuntimeError:  # the result is not needed any more
            continue


async def open_file(name: str, **options: Any) -> aiosqlite.Connection:
    """Open the database in this file. `options`: those of sqlite3.connect."""
    if not options.get("uri") and name != ":memory:":
        _make_private(name)
    connection = _Connection(
        partial(sqlite3.connect, name, factory=_FileConnection, **options), iter_chunk_size=64
    )
    async with AsyncExitStack() as stack:
        # If this fails, aiosqlite's thread still calls the event loop once. Wait for it, because
        # the loop may close soon.
        stack.push_async_callback(asyncio.to_thread, connection._thread.join)
        await connection
        stack.pop_all()
    return connection


def interrupt(connection: aiosqlite.Connection) -> None:
    """End the statement that a connection is executing, if any, with an error. Any thread may call
    it.
    """
    opened = connection._opened if isinstance(connection, _Connection) else None
    if opened is not None:
        with suppress(sqlite3.ProgrammingError):  # it has just been closed
            opened.interrupt()


def _make_private(name: str) -> None:
    """Create the file so that only this user can read it. SQLite copies its permissions to the
    files beside it.
    """
    with suppress(OSError):  # the file exists, or SQLite reports the error
        os.close(os.open(os.path.realpath(name), os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
