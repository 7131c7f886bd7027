"""SQLite: no write is lost, each file has one writer, and readers do not wait for it."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from batch_system import BaseTask, get_db
from batch_system.database import engine, sqlite_connections
from batch_system.database.engine import Database
from batch_system.database.session import leave_application_database, use_application_database
from batch_system.database.writers import session_owner
from batch_system.errors import DatabaseBusy, SecondWriter


class ByHand(BaseTask):
    name = "by-hand"

    async def run(self) -> None: ...


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    database = Database(f"sqlite+aiosqlite:///{tmp_path}/app.db", setting="DATABASE_URL")
    async with database.engine.begin() as connection:
        await connection.execute(text("CREATE TABLE counter (n INTEGER NOT NULL)"))
        await connection.execute(text("INSERT INTO counter VALUES (0)"))
    use_application_database(database)
    yield database
    leave_application_database(database)
    await database.dispose()


async def count(database: Database) -> int:
    async with database.session(readonly=True) as db:
        return int(await db.scalar(text("SELECT n FROM counter")) or 0)


async def add_one(database: Database, times: int) -> None:
    for _ in range(times):
        async with database.session() as db:
            n = await db.scalar(text("SELECT n FROM counter"))
            await asyncio.sleep(0)
            await db.execute(text("UPDATE counter SET n = :n"), {"n": (n or 0) + 1})
            await db.commit()


async def test_concurrent_read_modify_writes_lose_nothing(database: Database) -> None:
    await asyncio.gather(*(add_one(database, 50) for _ in range(8)))
    assert await count(database) == 400


async def test_several_engines_on_one_file_lose_nothing(database: Database) -> None:
    """Several engines use the file as several processes would."""
    others = [Database(str(database.url), setting="DATABASE_URL") for _ in range(3)]
    await asyncio.gather(*(add_one(engine, 30) for engine in (database, *others)))
    assert await count(database) == 120
    await asyncio.gather(*(engine.dispose() for engine in others))


async def test_a_write_lock_that_is_never_given_back_is_an_error_that_names_the_file(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "BUSY_GIVE_UP_SECONDS", 0.2)
    other = Database(str(database.url), setting="DATABASE_URL")
    async with other.session() as db:
        await db.execute(text("UPDATE counter SET n = 5"))
        with pytest.raises(
            DatabaseBusy, match=rf"the write lock of {database.url.database} for 0\.2 s"
        ):
            await add_one(database, 1)
    await other.dispose()
    await add_one(database, 1)
    assert await count(database) == 1


async def write_and_fail() -> None:
    async with get_db() as db:
        await db.execute(text("UPDATE counter SET n = 5"))
        raise ZeroDivisionError


async def test_get_db_does_not_commit_by_itself_and_rolls_back_when_the_block_raises(
    database: Database,
) -> None:
    async with get_db() as db:
        await db.execute(text("UPDATE counter SET n = 5"))
    assert await count(database) == 0
    with pytest.raises(ZeroDivisionError):
        await write_and_fail()
    assert await count(database) == 0
    async with get_db() as db:
        await db.execute(text("UPDATE counter SET n = 5"))
        await db.commit()
    assert await count(database) == 5


async def test_readers_go_on_while_a_writing_session_is_open(database: Database) -> None:
    async with get_db() as db:
        await db.execute(text("UPDATE counter SET n = 7"))
        async with asyncio.timeout(20):
            assert await count(database) == 0


async def test_an_error_at_the_beginning_of_a_transaction_is_an_error_of_sqlalchemy_as_others_are(
    database: Database,
) -> None:
    async with database.engine.connect() as connection:
        driver = (await connection.get_raw_connection()).driver_connection
        assert driver is not None
        await driver.execute("BEGIN")
        with pytest.raises(OperationalError, match="within a transaction"):
            await connection.begin()


async def test_a_readonly_session_refuses_to_write(database: Database) -> None:
    async with get_db(readonly=True) as db:
        with pytest.raises(OperationalError, match="readonly"):
            await db.execute(text("UPDATE counter SET n = 1"))


async def test_any_number_of_writers_of_one_process_queue(database: Database) -> None:
    """There are more writers than connections in a pool, so that waiting writers must not take
    connections.
    """
    async with asyncio.timeout(20):
        await asyncio.gather(*(add_one(database, 1) for _ in range(100)))
    assert await count(database) == 100


async def test_a_second_writing_session_of_one_task_is_refused_and_names_the_first(
    database: Database,
) -> None:
    async with get_db() as first:
        await first.execute(text("UPDATE counter SET n = 1"))
        async with get_db() as second:
            with pytest.raises(SecondWriter, match=r"test_sqlite\.py:\d+.*one writer"):
                await second.execute(text("UPDATE counter SET n = 2"))
        await first.commit()
    assert await count(database) == 1


async def test_a_second_writing_session_is_refused_in_child_tasks_of_a_run_too(
    database: Database,
) -> None:
    async def child() -> None:
        async with get_db() as db:
            await db.execute(text("UPDATE counter SET n = 2"))

    session_owner.set(object())
    async with get_db() as db:
        await db.execute(text("UPDATE counter SET n = 1"))
        with pytest.raises(SecondWriter):
            await asyncio.create_task(child())
    session_owner.set(None)


async def test_two_writing_sessions_one_after_the_other_are_fine(database: Database) -> None:
    async with get_db() as first, get_db() as second:
        await first.execute(text("UPDATE counter SET n = 1"))
        await first.commit()
        await second.execute(text("UPDATE counter SET n = n + 1"))
        await second.commit()
    assert await count(database) == 2


async def test_a_writing_session_that_is_held_open_is_logged_with_its_place(
    database: Database, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batch_system.database.writers.LONG_SECONDS", 0.01)
    async with get_db() as db:
        await db.execute(text("UPDATE counter SET n = 1"))
        await asyncio.sleep(0.03)
    assert "test_sqlite.py" in caplog.text
    assert "held SQLite's write lock" in caplog.text and "commit before you wait" in caplog.text
    caplog.clear()
    async for chunk in ByHand().chunks([1, 2], size=2):
        async with chunk as (db, _):
            await db.execute(text("UPDATE counter SET n = 1"))
            await asyncio.sleep(0.03)
    assert "test_sqlite.py" in caplog.text and "a smaller `size=`" in caplog.text
    assert "commit before you wait" not in caplog.text, (
        "the author of a chunk can't commit it earlier"
    )


async def test_waiting_for_another_processs_lock_can_be_cancelled_at_once(
    database: Database,
) -> None:
    other = Database(str(database.url), setting="DATABASE_URL")
    async with other.session() as holding:
        await holding.execute(text("UPDATE counter SET n = 1"))
        waiting = asyncio.create_task(add_one(database, 1))
        await asyncio.sleep(0.25)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            async with asyncio.timeout(engine.BUSY_GIVE_UP_SECONDS / 3):
                await waiting
    await add_one(database, 1)
    assert await count(database) == 1
    await other.dispose()


async def test_a_cancelled_session_leaves_no_transaction_behind(database: Database) -> None:
    async def write() -> None:
        async with get_db() as db:
            await db.execute(text("UPDATE counter SET n = 9"))
            await asyncio.Event().wait()

    writing = asyncio.create_task(write())
    await asyncio.sleep(0.1)
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    await add_one(database, 1)
    assert await count(database) == 1


async def test_a_connection_that_is_cut_off_amid_its_rows_gives_up_the_write_lock(
    database: Database, tmp_path: Path
) -> None:
    """A cancel between a statement and its rows has this effect. A traceback may keep the cursor
    alive.
    """
    async with database.engine.connect() as connection:
        await connection.execute(text("INSERT INTO counter VALUES (1), (2)"))
        driver = (await connection.get_raw_connection()).driver_connection
        assert driver is not None
        unread = await driver.execute("SELECT n FROM counter")
        await connection.invalidate()
    with contextlib.closing(
        sqlite3.connect(tmp_path / "app.db", timeout=0, isolation_level=None)
    ) as other:
        other.execute("BEGIN IMMEDIATE")
        assert other.execute("SELECT count(*) FROM counter").fetchone() == (1,)
    assert unread is not None


async def test_the_file_is_set_up_for_concurrency(database: Database) -> None:
    async with database.engine.connect() as connection:
        values = [
            (await connection.execute(text(f"PRAGMA {name}"))).scalar()
            for name in ("journal_mode", "foreign_keys")
        ]
    assert values == ["wal", 1]


def test_a_connection_that_waits_for_a_lock_is_closed_although_its_loop_is_closed_before(
    tmp_path: Path,
) -> None:
    name = str(tmp_path / "app.db")
    loop = asyncio.new_event_loop()
    waiting = loop.run_until_complete(
        sqlite_connections.open_file(name, timeout=60, isolation_level=None)
    )
    with contextlib.closing(sqlite3.connect(name, isolation_level=None)) as locking:
        locking.execute("BEGIN EXCLUSIVE")
        asked = loop.create_task(waiting._execute(waiting._conn.execute, "BEGIN IMMEDIATE"))
        loop.run_until_complete(asyncio.sleep(0))
        asked.cancel()
        waiting.stop()
        loop.run_until_complete(asyncio.wait([asked]))
        loop.close()
    waiting._thread.join(60)  # an error in it would be a warning, and fail the test
    assert not waiting._thread.is_alive()
    with contextlib.closing(sqlite3.connect(name, timeout=0)) as free:
        free.execute("BEGIN EXCLUSIVE")
