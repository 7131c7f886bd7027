"""The error of a full disk says which disk is full and what to do, and no part of a transaction is
committed.
"""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, OperationalError, PendingRollbackError

from batch_system.database.engine import Database
from batch_system.database.troubles import cause_of

BLOB = text("INSERT INTO rows VALUES (zeroblob(1000000))")


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    database = Database(f"sqlite+aiosqlite:///{tmp_path}/shop.db", setting="DATABASE_URL")
    async with database.engine.begin() as connection:
        await connection.execute(text("CREATE TABLE rows (value TEXT)"))
    yield database
    await database.dispose()


@contextlib.contextmanager
def no_file_may_grow() -> Iterator[None]:
    """Limit the size of files: a write then fails with another error, which SQLite treats like that
    of a full disk.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


async def rows(database: Database) -> list[str]:
    async with database.session(readonly=True) as db:
        assert await db.scalar(text("PRAGMA integrity_check")) == "ok"
        return list((await db.scalars(text("SELECT substr(value, 1, 10) FROM rows"))).all())


async def test_an_error_of_a_full_disk_names_the_file_and_the_setting_and_says_what_to_do(
    database: Database, tmp_path: Path
) -> None:
    async with database.session() as db:
        await db.execute(text("PRAGMA max_page_count = 10"))
        with pytest.raises(OperationalError) as raised:
            await db.execute(BLOB)
        await db.rollback()
        await db.execute(text("PRAGMA max_page_count = 1000000"))
    first = str(raised.value).splitlines()[0]
    assert first.startswith("(sqlite3.OperationalError) database or disk is full: ")
    assert first.endswith(f"{tmp_path}/shop.db (DATABASE_URL): its disk is full; make room there")
    assert "its disk is full; make room there" in database.why(raised.value)
    async with database.session() as db:
        await db.execute(text("INSERT INTO rows VALUES ('later')"))
        await db.commit()
    assert await rows(database) == ["later"]


async def test_a_transaction_that_sqlite_has_ended_by_itself_takes_no_further_statement(
    database: Database,
) -> None:
    """Otherwise later statements in the same session would each be committed, and the earlier ones
    would be lost.
    """
    async with database.session() as db:
        # So that the statement itself has to write to the disk.
        await db.execute(text("PRAGMA cache_size = 10"))
        await db.execute(text("INSERT INTO rows VALUES ('before')"))
        with no_file_may_grow():
            with pytest.raises(
                OperationalError, match="its disk is full, or it fails; make room there"
            ):
                await db.execute(BLOB)
            for _ in range(2):
                with pytest.raises(PendingRollbackError):
                    await db.execute(text("INSERT INTO rows VALUES ('after')"))
        with pytest.raises(PendingRollbackError):
            await db.commit()
        await db.rollback()
        await db.execute(text("INSERT INTO rows VALUES ('anew')"))
        await db.commit()
    assert await rows(database) == ["anew"]


async def test_errors_of_a_full_disk_leave_no_file_open(database: Database) -> None:
    """SQLite keeps a closed connection, and its files, as long as Python has a cursor of it whose
    statement failed.
    """
    errors = []
    for _ in range(10):
        with no_file_may_grow(), pytest.raises(OperationalError) as raised:
            await insert_blob(database)
        errors.append(raised.value)  # as a log does, or a result that is written later
    await database.dispose()
    files = [
        os.readlink(f"/proc/self/fd/{number}")
        for number in os.listdir("/proc/self/fd")
        if is_open(number)
    ]
    assert [file for file in files if "shop.db" in file] == []


async def insert_blob(database: Database) -> None:
    async with database.engine.begin() as connection:
        # So that the statement itself has to write.
        await connection.execute(text("PRAGMA cache_size = 10"))
        await connection.execute(BLOB)


def is_open(number: str) -> bool:
    """Whether a descriptor that was listed is not that of the list itself."""
    return os.path.lexists(f"/proc/self/fd/{number}")


async def test_an_error_that_leaves_the_transaction_open_leaves_the_session_usable(
    database: Database,
) -> None:
    async with database.session() as db:
        await db.execute(text("INSERT INTO rows VALUES ('before')"))
        with pytest.raises(OperationalError, match="no such table") as raised:
            await db.execute(text("INSERT INTO nowhere VALUES (1)"))
        await db.execute(text("INSERT INTO rows VALUES ('after')"))
        await db.commit()
    assert "full" not in str(raised.value)
    assert await rows(database) == ["before", "after"]


async def test_a_full_disk_of_postgresql_is_reported_too(postgres_database: str) -> None:
    database = Database(postgres_database, setting="LEDGER_URL")
    raising = (
        "DO $$ BEGIN RAISE 'could not extend file \"base/5\"' USING ERRCODE = 'disk_full'; END $$"
    )
    for engine in (database.engine, database.reader):
        with pytest.raises(DBAPIError) as raised:
            async with engine.begin() as connection:
                await connection.execute(text(raising))
        first = str(raised.value).splitlines()[0]
        advice = (
            f": {database.safe_url} (LEDGER_URL): the disk of its server is full; make room there"
        )
        assert first.endswith(f'could not extend file "base/5"{advice}')
    await database.dispose()


@pytest.mark.parametrize(
    ("error", "kind", "cause"),
    [
        (TimeoutError(), "postgresql", "no answer in time"),
        (TimeoutError(), "sqlite", "no answer in time; another process may hold its write lock"),
        (
            ConnectionRefusedError(111, "Connection refused"),
            "postgresql",
            "[Errno 111] Connection refused",
        ),
        (KeyError("x"), "sqlite", "KeyError: 'x'"),
        (OSError(), "postgresql", "OSError"),
    ],
)
def test_the_cause_of_any_other_error_is_one_line(error: Exception, kind: str, cause: str) -> None:
    assert cause_of(error, kind) == cause
