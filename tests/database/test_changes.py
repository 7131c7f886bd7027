"""A session of a run that ends with changes that nobody has committed is named in the log of the
run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import delete, insert, select, text, update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from batch_system import call_db, get_db, logs, once
from batch_system.batch.ledger.tables import new_id
from batch_system.database.engine import Database
from service.application.models import User
from tests.batch.attempts import Begun

Work = Callable[[AsyncSession], Awaitable[Any]]


@pytest.fixture(autouse=True)
def kept_lines() -> Iterator[None]:
    with logs.keep_run_lines():
        yield


@pytest.fixture(autouse=True)
async def users(application: Database) -> None:
    async with application.engine.begin() as connection:
        await connection.execute(insert(User), [{"email": "ann"}, {"email": "bob"}])


async def lines_of(run: Any) -> list[str]:
    begun = Begun(run, id=new_id())
    ending = await begun.ending()
    assert ending.state == "succeeded", ending
    return [line.text for line in begun.attempt.state.log.take_lines() if line.level == "warning"]


async def ann(db: AsyncSession) -> User:
    return (await db.scalars(select(User).where(User.email == "ann"))).one()


async def add(db: AsyncSession) -> None:
    db.add(User(email="eve"))


async def add_and_flush(db: AsyncSession) -> None:
    db.add(User(email="eve"))
    await db.flush()


async def change(db: AsyncSession) -> None:
    (await ann(db)).email = "changed"


async def change_and_flush(db: AsyncSession) -> None:
    await change(db)
    await db.flush()


async def remove(db: AsyncSession) -> None:
    await db.delete(await ann(db))


async def execute(db: AsyncSession) -> None:
    await db.execute(update(User).values(email=User.email + "!"))


async def execute_returning(db: AsyncSession) -> None:
    (await db.execute(delete(User).returning(User.id))).all()


async def execute_many(db: AsyncSession) -> None:
    await db.execute(insert(User), [{"email": "eve"}, {"email": "kim"}])


async def execute_text(db: AsyncSession) -> None:
    await db.execute(text("\n  delete FROM users WHERE email = 'ann'"))


async def execute_on_the_connection(db: AsyncSession) -> None:
    await (await db.connection()).execute(delete(User))


async def take_a_key(db: AsyncSession) -> None:
    assert await once(db, "key")


async def commit_and_change(db: AsyncSession) -> None:
    await add(db)
    await db.commit()
    await execute(db)


async def change_in_a_savepoint(db: AsyncSession) -> None:
    async with db.begin_nested():
        await execute(db)


async def change_before_a_savepoint_that_is_rolled_back(db: AsyncSession) -> None:
    await execute(db)
    with contextlib.suppress(KeyError):
        async with db.begin_nested():
            raise KeyError


UNSAVED: list[Work] = [
    add,
    add_and_flush,
    change,
    change_and_flush,
    remove,
    execute,
    execute_returning,
    execute_many,
    execute_text,
    execute_on_the_connection,
    take_a_key,
    commit_and_change,
    change_in_a_savepoint,
    change_before_a_savepoint_that_is_rolled_back,
]


@pytest.mark.parametrize("work", UNSAVED)
async def test_a_session_that_ends_with_changes_is_named_with_its_line(work: Work) -> None:
    async def run(self: object) -> None:
        async with get_db() as db:
            await work(db)

    [line] = await lines_of(run)
    place = f"{__file__}:{run.__code__.co_firstlineno + 1}"
    assert line.startswith(
        f"the session that {place} has opened ended with changes that were not committed, "
    )
    assert "call `commit()` before the end of its block" in line


async def test_a_session_that_a_return_ends_with_changes_is_named_too() -> None:
    async def run(self: object) -> str:
        async with get_db() as db:
            await add(db)
            return "done"

    [line] = await lines_of(run)
    assert f"{__file__}:{run.__code__.co_firstlineno + 1} has opened" in line


async def read(db: AsyncSession) -> None:
    await db.scalars(select(User))
    await db.execute(text("SELECT email FROM users WHERE email = 'UPDATE'"))
    if db.get_bind().dialect.name == "postgresql":
        await db.scalars(select(User).with_for_update())


async def read_and_set_what_was_there(db: AsyncSession) -> None:
    user = await ann(db)
    user.email = "ann"


async def commit(db: AsyncSession) -> None:
    await add_and_flush(db)
    await execute(db)
    await db.commit()


async def commit_and_read(db: AsyncSession) -> None:
    await commit(db)
    await read(db)


async def commit_by_a_block(db: AsyncSession) -> None:
    async with db.begin():
        await add(db)


async def roll_back(db: AsyncSession) -> None:
    await add(db)
    await execute(db)
    await db.rollback()


async def roll_back_what_is_not_flushed(db: AsyncSession) -> None:
    with db.no_autoflush:
        await change(db)
        await remove(db)
        await add(db)
    await db.rollback()


async def roll_back_a_savepoint(db: AsyncSession) -> None:
    with contextlib.suppress(KeyError):
        async with db.begin_nested():
            await execute(db)
            await add_and_flush(db)
            raise KeyError


async def roll_back_a_failed_flush_in_a_savepoint(db: AsyncSession) -> None:
    await read(db)
    with contextlib.suppress(Exception):
        async with db.begin_nested():
            db.add_all([User(email="eve"), User(email="ann")])


async def change_no_row(db: AsyncSession) -> None:
    nobody = delete(User).where(User.email == "nobody")
    await db.execute(nobody)
    (await db.execute(nobody.returning(User.id))).all()
    with contextlib.suppress(KeyError):
        async with db.begin_nested():
            await execute(db)
            raise KeyError
    await db.execute(nobody)


async def take_a_key_that_is_taken(db: AsyncSession) -> None:
    assert await once(db, "key")
    await db.commit()
    assert not await once(db, "key")


SAVED: list[Work] = [
    read,
    read_and_set_what_was_there,
    commit,
    commit_and_read,
    commit_by_a_block,
    roll_back,
    roll_back_what_is_not_flushed,
    roll_back_a_savepoint,
    roll_back_a_failed_flush_in_a_savepoint,
    change_no_row,
    take_a_key_that_is_taken,
]


@pytest.mark.parametrize("work", SAVED)
async def test_nothing_is_logged_about_reading_or_about_changes_that_were_committed_or_rolled_back(
    work: Work,
) -> None:
    async def run(self: object) -> None:
        async with get_db() as db:
            await work(db)

    assert await lines_of(run) == []


async def test_nothing_is_logged_when_an_error_ends_the_block() -> None:
    async def run(self: object) -> None:
        with contextlib.suppress(KeyError):
            async with get_db() as db:
                await execute(db)
                raise KeyError

    assert await lines_of(run) == []


async def test_a_session_is_not_taken_for_the_one_before_it() -> None:
    async def run(self: object) -> None:
        async with get_db() as db:
            await execute(db)
            await db.rollback()
        async with get_db() as db:
            await read(db)
        async with get_db(readonly=True) as db:
            await ann(db)

    assert await lines_of(run) == []


async def test_the_line_of_its_call_is_logged_in_a_sync_run() -> None:
    def forget(db: Session) -> None:
        db.execute(update(User).values(email=User.email + "!"))

    def keep(db: Session) -> None:
        forget(db)
        db.commit()

    def run(self: object) -> None:
        call_db(keep)
        call_db(forget)
        call_db(lambda db: db.scalars(select(User)).all())

    [line] = await lines_of(run)
    assert f"{__file__}:{run.__code__.co_firstlineno + 2} has opened" in line


async def test_outside_of_runs_nothing_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async with get_db() as db:
        await execute(db)
    assert "not committed" not in caplog.text
