"""A statement visits the thread of its SQLite connection once, and a streamed result is read little
by little.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiosqlite
import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError, OperationalError

from batch_system.database.engine import Database
from batch_system.database.sqlite_connections import FIRST_ROWS

NUMBERS = text(
    "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT :count) SELECT i FROM n"
)


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    database = Database(f"sqlite+aiosqlite:///{tmp_path}/a.db", setting="DATABASE_URL")
    async with database.engine.begin() as connection:
        await connection.execute(
            text("CREATE TABLE items (id INTEGER PRIMARY KEY, name TEXT UNIQUE)")
        )
    yield database
    await database.dispose()


@pytest.fixture
def visits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the functions that threads of connections have called since the list was
    cleared.
    """
    called: list[str] = []
    execute = aiosqlite.Connection._execute

    async def noted(self: aiosqlite.Connection, function: Any, *args: Any, **options: Any) -> Any:
        called.append(function.__name__)
        return await execute(self, function, *args, **options)

    monkeypatch.setattr(aiosqlite.Connection, "_execute", noted)
    return called


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        *((count, ["_run"]) for count in (0, 1, FIRST_ROWS - 1)),
        *((count, ["_run", "_read"]) for count in (FIRST_ROWS, FIRST_ROWS + 1, 1_000)),
    ],
)
async def test_a_statement_visits_the_thread_once_and_once_more_for_the_rest_of_many_rows(
    database: Database, visits: list[str], count: int, expected: list[str]
) -> None:
    async with database.reader.connect() as connection:
        await connection.execute(text("SELECT 1"))
        visits.clear()
        rows = (await connection.execute(NUMBERS, {"count": count})).scalars().all()
        assert visits == expected
    assert rows == [*range(1, count + 1)]


async def test_statements_that_write_say_what_they_have_written(
    database: Database, visits: list[str]
) -> None:
    async with database.engine.begin() as connection:
        visits.clear()
        many = [{"id": number, "name": f"item {number}"} for number in range(3)]
        await connection.execute(text("INSERT INTO items VALUES (:id, :name)"), many)
        returned = await connection.execute(
            text("UPDATE items SET name = name || '!' WHERE id > 0 RETURNING id")
        )
        assert sorted(returned.scalars()) == [1, 2]
        assert (await connection.execute(text("DELETE FROM items WHERE id < 2"))).rowcount == 2
        inserted = await connection.execute(text("INSERT INTO items (name) VALUES ('last')"))
        assert (inserted.lastrowid, inserted.rowcount) == (3, 1)
        assert visits == ["_run"] * 4
    async with database.reader.connect() as connection:
        assert [*await connection.execute(text("SELECT * FROM items ORDER BY id"))] == [
            (2, "item 2!"),
            (3, "last"),
        ]


async def test_a_streamed_result_is_read_little_by_little(database: Database) -> None:
    """The first rows are read with the statement, and of the others only those that are asked
    for.
    """
    async with database.reader.connect() as connection:
        made: list[int] = []

        def made_one(number: int) -> int:
            made.append(number)
            return number

        raw: Any = await connection.get_raw_connection()
        await raw.driver_connection.create_function("made", 1, made_one)
        statement = text(f"SELECT made(i) FROM ({NUMBERS.text})").bindparams(count=10_000)
        async with connection.stream(statement, execution_options={"max_row_buffer": 1}) as result:
            streamed = result.scalars()
            assert [await anext(streamed) for _ in range(3)] == [1, 2, 3]
            assert len(made) <= FIRST_ROWS + 1  # the module sqlite3 is one row ahead
            assert [await anext(streamed) for _ in range(200)] == [*range(4, 204)]
            assert len(made) < 300
        assert (await connection.execute(text("SELECT 1"))).scalar() == 1


async def test_a_stream_that_is_left_keeps_no_lock(database: Database) -> None:
    async with database.engine.begin() as connection:
        many = [{"name": f"item {number}"} for number in range(500)]
        await connection.execute(text("INSERT INTO items (name) VALUES (:name)"), many)
    async with database.reader.connect() as connection:
        async with connection.stream(text("SELECT * FROM items")) as result:
            await anext(result)
        await connection.rollback()
        async with database.engine.begin() as writer:
            await writer.execute(text("DROP TABLE items"))
        with pytest.raises(OperationalError, match="no such table"):
            await connection.execute(text("SELECT * FROM items"))


async def test_a_refused_statement_leaves_its_connection_usable(
    database: Database, visits: list[str]
) -> None:
    async with database.engine.begin() as connection:
        await connection.execute(text("INSERT INTO items (name) VALUES ('a')"))
        with pytest.raises(IntegrityError, match=r"UNIQUE constraint failed: items\.name"):
            await connection.execute(text("INSERT INTO items (name) VALUES ('a')"))
        assert (await connection.execute(text("SELECT count(*) FROM items"))).scalar() == 1
    async with database.reader.connect() as connection:
        assert (await connection.execute(text("SELECT name FROM items"))).scalars().all() == ["a"]
