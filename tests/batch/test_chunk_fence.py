"""One statement writes the position and the fence of a chunk. It refuses an older holder of the
run.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
from sqlalchemy import event, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession

from batch_system import get_db
from batch_system.batch.chunks import checkpoints
from batch_system.batch.chunks.checkpoints import LoopPosition, Overtaken
from batch_system.batch.context import fencing
from batch_system.database.companions import checkpoints as table
from batch_system.database.engine import Database
from batch_system.database.migrate import migrate
from batch_system.database.session import (
    application_database,
    leave_application_database,
    use_application_database,
)
from batch_system.errors import LeaseLost
from service.application.models import User
from tests.batch.test_chunks import Attempt, task
from tests.migrations import APPLICATION_HISTORIES

NAME = "chunks:1"


@pytest.fixture
async def fenced(application: Database) -> Database:
    use_application_database(application, partial(fencing.guard, idle_seconds=30))
    return application


@pytest.fixture
async def postgres_application(postgres_database: str) -> AsyncIterator[Database]:
    database = Database(postgres_database, setting="DATABASE_URL")
    await migrate(database, *APPLICATION_HISTORIES)
    use_application_database(database, partial(fencing.guard, idle_seconds=30))
    yield database
    leave_application_database(database)
    await database.dispose()


@contextmanager
def statements(database: Database) -> Iterator[list[str]]:
    """The statements about batch_checkpoints."""
    seen: list[str] = []

    def see(_: Any, __: Any, statement: str, *___: Any) -> None:
        if "batch_checkpoints" in statement and not statement.startswith("SELECT"):
            seen.append(statement)

    event.listen(database.engine.sync_engine, "before_cursor_execute", see)
    yield seen
    event.remove(database.engine.sync_engine, "before_cursor_execute", see)


async def loop(name: str = "a") -> None:
    """Commit two chunks with one user each."""
    async for chunk in task.chunks(range(2), size=1):
        async with chunk as (db, _):
            db.add(User(email=f"{name}{chunk.number}"))


async def takes_over() -> None:
    async with application_database().engine.begin():
        pass


async def stored() -> tuple[list[str], dict[str, tuple[int, int | None]]]:
    """The emails of the users, and the fence and count of each row of batch_checkpoints by name."""
    async with get_db(readonly=True) as db:
        emails = (await db.scalars(select(User.email).order_by(User.email))).all()
        rows = await db.execute(select(table.c.name, table.c.fence, table.c["count"]))
        return list(emails), {name: (number, count) for name, number, count in rows}


@pytest.mark.parametrize("is_fenced", [True, False])
async def test_each_commit_of_a_loop_has_one_statement_for_the_position_and_the_fence(
    fenced: Database, is_fenced: bool
) -> None:
    attempt = Attempt()
    attempt.state.is_fenced = is_fenced
    with statements(fenced) as seen:
        await attempt.does(loop)
    assert len(seen) == 3  # two chunks, and the end of the loop
    fence_row = {"": (1, None)} if is_fenced else {}
    assert await stored() == (["a1", "a2"], {NAME: (1, 2), **fence_row})


@pytest.mark.parametrize("has_gone_on", [False, True])
async def test_a_chunk_of_an_older_holder_is_refused(fenced: Database, has_gone_on: bool) -> None:
    """That holds whether or not the newer holder has already committed a chunk."""
    old = Attempt()
    new = Attempt(old)

    async def wakes_up() -> None:
        chunks = task.chunks(range(2), size=1)
        chunk = await anext(chunks)
        await (new.does(partial(loop, "new")) if has_gone_on else new.does(takes_over))
        async with chunk as (db, _):
            db.add(User(email="old"))

    with pytest.raises(LeaseLost, match="another node holds run"):
        await old.does(wakes_up)
    async with get_db() as db:  # outside of runs, with the connection of the refused commit
        db.add(User(email="z"))
        await db.commit()
    place = {NAME: (2, 2)} if has_gone_on else {}
    assert await stored() == (
        [*(["new1", "new2"] if has_gone_on else []), "z"],
        {"": (2, None), **place},
    )


@pytest.mark.parametrize("items", [0, 1])
@pytest.mark.parametrize("is_fenced", [True, False])
async def test_a_chunk_committed_without_a_reply_is_not_committed_again_even_if_it_was_empty(
    fenced: Database, items: int, is_fenced: bool
) -> None:
    """The COMMIT takes effect after the loop has read its position, and rows it as it was
    before.
    """
    attempt = Attempt()
    attempt.state.is_fenced = is_fenced
    positions = [LoopPosition(), LoopPosition("a", 3, 1), LoopPosition("b", 3 + items, 2)]

    async def commit(chunk: int, email: str) -> None:
        async with get_db() as db:
            db.add(User(email=email))
            await checkpoints.write(db, attempt.run, NAME, positions[chunk - 1], positions[chunk])
            await db.commit()

    await attempt.does(partial(commit, 1, "one"))
    await attempt.does(partial(commit, 2, "two"))
    with pytest.raises(Overtaken):
        await attempt.does(partial(commit, 2, "twice"))
    fence_row = {"": (1, None)} if is_fenced else {}
    assert await stored() == (["one", "two"], {NAME: (1, 3 + items), **fence_row})


async def test_a_lease_that_ends_during_the_statement_refuses_the_commit(fenced: Database) -> None:
    """The lease is checked at the begin of the transaction, before the statement, and after it."""
    attempt, looks = Attempt(), iter((True, True, False))
    attempt.state.holds_lease = lambda: next(looks)
    with pytest.raises(LeaseLost, match="the lease of this node has ended"):
        await attempt.does(loop)
    assert await stored() == ([], {})


async def test_the_fence_is_checked_again_for_each_transaction_of_a_session(
    fenced: Database,
) -> None:
    old = Attempt()
    new = Attempt(old)

    async def twice() -> None:
        async with get_db() as db:
            await checkpoints.write(db, old.run, NAME, LoopPosition(), LoopPosition([1], 1, 1))
            await db.rollback()
            await new.does(takes_over)
            db.add(User(email="old"))
            await db.commit()

    with pytest.raises(LeaseLost, match="another node holds run"):
        await old.does(twice)
    assert await stored() == ([], {"": (2, None)})


@pytest.mark.parametrize("is_lost", [True, False])
async def test_after_a_serialization_failure_of_a_position_the_fence_is_read(
    postgres_application: Database, is_lost: bool
) -> None:
    """The snapshot of the old holder is older than the fence of the new one."""
    old = Attempt()
    new = Attempt(old) if is_lost else old
    engine = postgres_application.engine.execution_options(isolation_level="REPEATABLE READ")

    async def writes() -> None:
        async with AsyncSession(engine) as db:
            db.add(User(email="old"))
            await db.flush()
            await new.does(takes_over)
            await checkpoints.write(db, old.run, NAME, LoopPosition(), LoopPosition([1], 1, 1))
            await db.commit()

    with pytest.raises(LeaseLost if is_lost else DBAPIError) as refused:
        await old.does(writes)
    assert is_lost or "could not serialize" in str(refused.value)
    assert await stored() == ([], {"": (1 + is_lost, None)})
