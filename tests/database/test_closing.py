"""SQLite connections are closed wherever a task is cancelled, even twice, and when the disk
fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import sqlite3
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiosqlite
import pytest
from sqlalchemy import text

from batch_system.database.engine import Database
from batch_system.database.sqlite_connections import _FileConnection
from batch_system.errors import DatabaseUnreachable

CONNECTIONS = 4
"""Use one writing and three reading connections."""


def open_database(folder: Path) -> Database:
    return Database(f"sqlite+aiosqlite:///{folder}/a.db", setting="DATABASE_URL")


def before_calls(monkeypatch: pytest.MonkeyPatch, act: Callable[[int, str], None]) -> None:
    """Call `act` before each call into SQLite, with its number from 1 on and the name of the
    function.
    """
    execute, calls = aiosqlite.Connection._execute, itertools.count(1)

    async def counted(self: aiosqlite.Connection, function: Any, *args: Any, **options: Any) -> Any:
        act(next(calls), getattr(function, "__name__", ""))
        return await execute(self, function, *args, **options)

    monkeypatch.setattr(aiosqlite.Connection, "_execute", counted)


async def use_all_connections(database: Database) -> None:
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(database.engine.begin())
        for _ in range(CONNECTIONS - 1):
            connection = await stack.enter_async_context(database.reader.connect())
            await connection.execute(text("SELECT 1"))


async def test_a_cancel_while_a_connection_is_opened_closes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, may_open = threading.Event(), threading.Event()
    connect, opened, closed = sqlite3.connect, [], []

    class Recorded(_FileConnection):
        def close(self) -> None:
            closed.append(self)
            super().close()

    def slowly(name: str, **options: Any) -> sqlite3.Connection:
        begun.set()
        may_open.wait(30)
        opened.append(connect(name, **{**options, "factory": Recorded}))
        return opened[-1]

    monkeypatch.setattr(sqlite3, "connect", slowly)
    database = open_database(tmp_path)
    using = asyncio.create_task(use_all_connections(database))
    await asyncio.to_thread(begun.wait)
    using.cancel()
    await asyncio.sleep(0)
    may_open.set()
    with pytest.raises(asyncio.CancelledError):
        await using
    assert len(opened) == 1
    assert closed[:1] == opened
    await database.dispose()


@pytest.mark.parametrize("number", range(1, CONNECTIONS + 1))
async def test_a_cancelled_dispose_closes_every_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    database = open_database(tmp_path)
    await use_all_connections(database)
    disposing = asyncio.create_task(database.dispose())
    closings = itertools.count(1)

    def act(_: int, name: str) -> None:
        if name == "close" and next(closings) == number:
            disposing.cancel()

    before_calls(monkeypatch, act)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with pytest.raises(asyncio.CancelledError):
            await disposing
        del database
        gc.collect()
    assert [str(warning.message) for warning in said] == []
    assert next(closings) == CONNECTIONS + 1


@pytest.mark.parametrize("later", range(1, 4))
@pytest.mark.parametrize("first", range(1, 12))
async def test_a_task_that_is_cancelled_twice_leaves_no_task_that_waits_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int, later: int
) -> None:
    """The second cancel comes while the connection that was in use at the first one is being
    closed.
    """
    database = open_database(tmp_path)

    async def work() -> None:
        async with database.engine.begin() as connection:
            await connection.execute(text("SELECT 1"))

    working = asyncio.create_task(work())
    before_calls(
        monkeypatch,
        lambda number, _: working.cancel() if number in (first, first + later) else None,
    )
    with contextlib.suppress(asyncio.CancelledError):
        await working
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if others:
        _, waiting = await asyncio.wait(others, timeout=10)
        assert not waiting
    monkeypatch.undo()
    await database.dispose()


async def test_a_connection_whose_rollback_fails_is_closed_and_its_thread_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection is stopped as SQLAlchemy does it when a close was cancelled: without waiting
    for the thread.
    """

    def fail(_: object) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    database = open_database(tmp_path)
    connection = await database.engine.connect()
    await connection.begin()
    opened = (await connection.get_raw_connection()).driver_connection
    assert opened is not None
    monkeypatch.setattr(type(opened._conn), "rollback", fail, raising=False)
    opened.stop()
    await asyncio.to_thread(opened._thread.join, 10)
    assert not opened._thread.is_alive()
    assert opened._connection is None
    await connection.invalidate()
    await connection.close()
    await database.dispose()


async def test_a_closed_database_opens_no_connection_that_nobody_would_close(
    database_url: str,
) -> None:
    database = Database(database_url, setting="DATABASE_URL")
    await database.check()
    await database.dispose()
    with pytest.raises(DatabaseUnreachable, match="was closed"):
        async with database.reader.connect():
            pass
