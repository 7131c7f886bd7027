"""Chunks that a real database refuses: deadlocks, serialization failures, lost connections, an
older attempt.

About 8 s, half of it for PostgreSQL's start.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest
from sqlalchemy import func, select, text, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from batch_system import Skip, get_db
from batch_system.batch.context.once import once
from batch_system.database.engine import Database
from batch_system.database.session import application_database
from batch_system.errors import LeaseLost
from tests.batch.ledger_world import until
from tests.batch.test_chunks import Attempt, Item, see, seen, task, world
from tests.batch.test_items import aside, make

__all__ = ["world"]

on_postgresql = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
Meets = Callable[[AsyncSession], Awaitable[Any]]


def add_one(item: int) -> Any:
    return update(Item).where(Item.id == item).values(done=Item.done + 1)


async def somebody_else(does: Callable[[AsyncConnection], Awaitable[Any]]) -> None:
    """Commit this in a transaction outside of the run."""

    async def work() -> None:
        async with application_database().engine.begin() as connection:
            await does(connection)

    await asyncio.get_running_loop().create_task(work(), context=contextvars.Context())


async def somebody_waits() -> bool:
    async with application_database().reader.connect() as connection:
        return bool(
            await connection.scalar(text("SELECT count(*) FROM pg_locks WHERE NOT granted"))
        )


async def deadlock(db: AsyncSession) -> None:
    async def the_other_way_round(connection: AsyncConnection) -> None:
        await connection.execute(add_one(2))
        holds.set()
        await connection.execute(add_one(1))

    holds = asyncio.Event()
    # So this session detects the deadlock, and is the one that fails.
    await db.execute(text("SET LOCAL deadlock_timeout = '20ms'"))
    await db.execute(add_one(1))
    async with asyncio.TaskGroup() as group:
        group.create_task(somebody_else(the_other_way_round))
        await holds.wait()
        await until(somebody_waits)
        try:
            await db.execute(add_one(2))
        except DBAPIError as error:
            refused = error
    raise refused


async def an_older_snapshot(db: AsyncSession) -> None:
    await somebody_else(lambda connection: connection.execute(add_one(12)))
    await db.execute(add_one(12))


async def write_skew(db: AsyncSession) -> None:
    """Cause a serialization failure that only the commit shows."""

    async def reads_and_writes(connection: AsyncConnection) -> None:
        await connection.execute(select(func.sum(Item.done)))
        await connection.execute(add_one(24))

    await db.execute(select(func.sum(Item.done)))
    await db.execute(add_one(25))
    await somebody_else(reads_and_writes)


async def a_lost_connection(db: AsyncSession) -> None:
    await db.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))


class Second:
    """A loop in whose second chunk `meets` is called once. `tries`: the numbers of the chunks that
    were begun.
    """

    def __init__(self, meets: Meets) -> None:
        self.meets = meets
        self.tries: list[int] = []

    async def loop(self, retry_chunk: bool) -> None:
        async for chunk in task.chunks(select(Item), key=Item.id, size=10, retry_chunk=retry_chunk):
            async with chunk as (db, items):
                see(db, items)
                await db.flush()
                self.tries.append(chunk.number)
                if self.tries == [1, 2]:
                    await self.meets(db)


@on_postgresql
@pytest.mark.parametrize(
    ("meets", "isolation", "sqlstate"),
    [
        (deadlock, "read committed", "40P01"),
        (an_older_snapshot, "repeatable read", "40001"),
        (write_skew, "serializable", "40001"),
        (a_lost_connection, "read committed", "08003"),
    ],
)
@pytest.mark.parametrize("retry_chunk", [True, False])
async def test_chunks_that_postgresql_refuses_are_retried_in_the_attempt_or_in_the_next(
    world: Database, meets: Meets, isolation: str, sqlstate: str, retry_chunk: bool
) -> None:
    async with world.engine.begin() as connection:
        statement = (
            f'ALTER DATABASE "{world.url.database}" SET default_transaction_isolation = '
            f"'{isolation}'"
        )
        await connection.execute(text(statement))
    await world.engine.dispose()  # new connections use the setting
    first, second = Attempt(), Second(meets)
    if retry_chunk:
        await first.does(partial(second.loop, True))
    else:
        with pytest.raises(DBAPIError) as refused:
            await first.does(partial(second.loop, False))
        assert getattr(refused.value.orig, "sqlstate", "") == sqlstate
        assert second.tries == [1, 2]
        assert await seen() == list(range(1, 11))
        await Attempt(first).does(partial(second.loop, False))
    assert second.tries == [1, 2, 2, 3]
    assert await seen() == list(range(1, 26))


@pytest.mark.parametrize(
    ("database_url", "inside"),
    # On SQLite an open chunk would block the other attempt.
    [("sqlite", False), ("postgresql", False), ("postgresql", True)],
    indirect=["database_url"],
)
async def test_an_older_attempt_commits_no_chunk_once_a_newer_one_has(
    world: Database, inside: bool
) -> None:
    """The first attempt is stopped before or in its second chunk, while the next one commits two
    more chunks.
    """
    first = Attempt()
    later = Attempt(first)

    async def body(is_held_up: bool) -> None:
        async for chunk in task.chunks(select(Item), key=Item.id, size=5, retry_chunk=True):
            if is_held_up and chunk.number == 2 and not inside:
                await later.does(partial(body, False))
            async with chunk as (db, items):
                see(db, items)
                await db.flush()
                if is_held_up and chunk.number == 2 and inside:
                    await later.does(partial(body, False))
            if chunk.number == 3 and not is_held_up:
                return

    with pytest.raises(LeaseLost, match="another node holds run"):
        await first.does(partial(body, True))
    assert await seen() == list(range(1, 16))


@on_postgresql
async def test_a_locking_select_holds_the_rows_of_a_chunk_and_no_others(world: Database) -> None:
    async def free() -> list[int]:
        async with world.engine.connect() as connection:
            return list(
                (await connection.scalars(select(Item.id).with_for_update(skip_locked=True))).all()
            )

    async def body() -> list[list[int]]:
        free_ids = []
        async for chunk in task.chunks(select(Item).with_for_update(), key=Item.id, size=20):
            async with chunk:
                free_ids.append(sorted(await free()))
        return free_ids

    [first, second] = await Attempt().does(body)
    # The chunk of 20 rows locks 21: the last one tells whether there is a next chunk.
    assert first == list(range(22, 26))
    assert second == list(range(1, 21))


@on_postgresql
@pytest.mark.parametrize("commits", [True, False])
async def test_once_is_true_for_one_of_two_concurrent_transactions(
    world: Database, commits: bool
) -> None:
    async def asks(has_asked: asyncio.Event, may_go_on: asyncio.Event, commits: bool) -> bool:
        async with get_db() as db:
            is_first = await once(db, "invoice-1")
            has_asked.set()
            await may_go_on.wait()
            if commits:
                await db.commit()
            return is_first

    asked, go_on, always = asyncio.Event(), asyncio.Event(), asyncio.Event()
    always.set()
    async with asyncio.TaskGroup() as group:
        first = group.create_task(Attempt().does(partial(asks, asked, go_on, commits)))
        await asked.wait()
        other = group.create_task(Attempt().does(partial(asks, always, always, True)))
        await until(somebody_waits)
        go_on.set()
    assert (first.result(), other.result()) == (True, not commits)


async def test_an_item_set_aside_is_rolled_back_with_its_chunk(world: Database) -> None:
    worse = {5: lambda tries: TypeError("worse") if tries == 1 else None}
    own = make(bad={3: ValueError("bad"), **worse}, skip=Skip(limit=9, on=ValueError))
    first = Attempt()
    with pytest.raises(TypeError, match="worse"):
        await first.does(own().run)
    assert (await aside(first.run.id), await seen()) == ([], [])
    assert await Attempt(first).does(own().run) == {"done": 24, "set_aside": 1}
    assert await aside(first.run.id) == [("3", "bad", 1)]
    assert await seen() == [1, 2, *range(4, 26)]
