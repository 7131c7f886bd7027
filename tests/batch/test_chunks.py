"""Chunks: the author's data and the position of the loop in one commit, on both databases."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import weakref
from collections.abc import Awaitable, Callable
from functools import partial
from itertools import chain
from typing import Any

import pytest
from sqlalchemy import String, delete, insert, select
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, aliased, mapped_column

from batch_system import BaseTask, get_db
from batch_system.batch.chunks import chunks as chunk_loop
from batch_system.batch.chunks.keyset_pages import Pages
from batch_system.batch.context import current_run, fencing
from batch_system.batch.context.attempt_state import AttemptState
from batch_system.batch.context.current_run import CurrentRun
from batch_system.batch.ledger.states import Origin
from batch_system.batch.ledger.tables import new_id
from batch_system.database.companions import checkpoints
from batch_system.database.engine import Database
from batch_system.database.session import use_application_database
from batch_system.errors import ChunkError, Interrupted
from tests.batch.attempts import SLOT
from tests.batch.ledger_world import until_counted


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = "items"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(String(10))
    note: Mapped[str | None] = mapped_column(String(10))
    done: Mapped[int] = mapped_column(default=0)


class Seen(Base):
    """The witness: what was committed, by whom."""

    __tablename__ = "seen"
    number: Mapped[int] = mapped_column(primary_key=True)
    item: Mapped[int]
    chunk: Mapped[int]


@pytest.fixture
async def world(application: Database) -> Database:
    """Twenty-five items, in an application database whose runs are fenced."""
    use_application_database(application, partial(fencing.guard, idle_seconds=30))
    async with application.engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
        await connection.execute(
            insert(Item), [{"id": n, "kind": "ab"[n % 2], "done": 0} for n in range(1, 26)]
        )
    return application


class Made(BaseTask):
    name, schedule = "made", None

    async def run(self) -> None: ...


task = Made()


class Attempt:
    """One attempt of a run: `await Attempt(run).does(body)`. A later one has a larger fence."""

    def __init__(self, before: Attempt | None = None) -> None:
        self.state = AttemptState.of(before.run.id if before else new_id(), "made", attempt=1)
        self.state.fence, self.state.is_fenced = (before.run.fence if before else 0) + 1, True
        self.run = CurrentRun(self.state.run, "made", SLOT, 1, Origin.SCHEDULE, self.state)

    async def does(self, body: Callable[[], Awaitable[Any]]) -> Any:
        own = contextvars.copy_context()
        own.run(current_run.enter, self.run)

        async def work() -> Any:
            result = await body()
            self.state.loops.raise_rolled_back()
            return result

        try:
            return await asyncio.get_running_loop().create_task(work(), context=own)
        finally:
            self.state.loops.close()


async def seen() -> list[int]:
    async with get_db(readonly=True) as db:
        return list((await db.scalars(select(Seen.item).order_by(Seen.number))).all())


def see(db: AsyncSession, items: list[Any], chunk: int = 0) -> None:
    db.add_all([Seen(item=getattr(item, "id", item), chunk=chunk) for item in items])


async def whole(size: int = 10, **options: Any) -> list[list[int]]:
    """Loop over the items, and return the items of each chunk."""
    held = []
    async for chunk in task.chunks(
        select(Item), key=options.pop("key", Item.id), size=size, **options
    ):
        async with chunk as (db, items):
            see(db, items, chunk.number)
            held.append([item.id for item in items])
    return held


async def test_each_item_is_seen_once_in_the_keys_order(world: Database) -> None:
    held = await Attempt().does(whole)
    assert [len(part) for part in held] == [10, 10, 5]
    assert await seen() == list(range(1, 26))


async def test_outside_a_run_a_loop_works_and_keeps_no_position(world: Database) -> None:
    await whole()
    await whole()
    assert await seen() == 2 * list(range(1, 26))
    assert await rows() == []


async def rows() -> list[Any]:
    async with get_db(readonly=True) as db:
        return list((await db.execute(select(checkpoints).where(checkpoints.c.name != ""))).all())


async def test_a_later_attempt_goes_on_after_the_last_committed_chunk(
    world: Database, caplog: pytest.LogCaptureFixture
) -> None:
    async def fails() -> None:
        async for chunk in task.chunks(select(Item), key=Item.id, size=10):
            async with chunk as (db, items):
                see(db, items, chunk.number)
                await db.flush()
                if chunk.number == 2:
                    raise OSError("no network")

    first = Attempt()
    with pytest.raises(OSError, match="no network"):
        await first.does(fails)
    assert await seen() == list(range(1, 11))
    caplog.set_level("INFO")
    assert [part[0] for part in await Attempt(first).does(whole)] == [11, 21]
    assert await seen() == list(range(1, 26))
    assert "resumes after chunk 1" in caplog.text and "10 are done" in caplog.text
    (row,) = await rows()
    assert (row.name, row.count, row.finished, row.fence) == ("chunks:1", 25, True, 2)


async def test_a_loop_that_has_ended_does_nothing_in_a_later_attempt(world: Database) -> None:
    first = Attempt()
    await first.does(whole)
    async with get_db() as db:
        db.add(Item(id=99, kind="a", done=0))
        await db.commit()
    assert await Attempt(first).does(whole) == []


@pytest.mark.parametrize("leave", ["break", "continue", "return"])
async def test_leaving_the_block_early_commits(world: Database, leave: str) -> None:
    async def body() -> None:
        async for chunk in task.chunks(select(Item), key=Item.id, size=20):
            async with chunk as (db, items):
                see(db, items)
                if leave == "break":
                    break
                if leave == "continue":
                    continue
                return

    first = Attempt()
    await first.does(body)
    expected = list(range(1, 26)) if leave == "continue" else list(range(1, 21))
    assert await seen() == expected
    await Attempt(first).does(whole)
    assert await seen() == list(range(1, 26))


LEFT = {"end": 25, "break": 20, "return": 20, "break outside": 20, "error": 10, "timeout": 10}
"""How a loop is left in its second chunk, and how many items are committed then."""


@pytest.mark.parametrize("leave", LEFT)
async def test_a_writing_session_can_be_opened_after_a_loop_however_it_was_left(
    world: Database, leave: str
) -> None:
    async def loop() -> None:
        async for chunk in task.chunks(select(Item), key=Item.id, size=10):
            with contextlib.suppress(ValueError, TimeoutError):
                async with asyncio.timeout(None) as limit, chunk as (db, items):
                    see(db, items)
                    await db.flush()
                    if chunk.number == 2:
                        if leave == "break":
                            break
                        if leave == "return":
                            return
                        if leave == "error":
                            raise ValueError
                        if leave == "timeout":
                            limit.reschedule(asyncio.get_running_loop().time())
                            await asyncio.sleep(30)
            if chunk.number == 2 and leave != "end":
                break

    async def body() -> None:
        await loop()
        async with get_db() as db:
            see(db, [100])
            await db.commit()

    await Attempt().does(body)
    assert await seen() == [*range(1, LEFT[leave] + 1), 100]


async def test_a_cancel_rolls_back_the_open_chunk(world: Database) -> None:
    is_in = asyncio.Event()

    async def body() -> None:
        async for chunk in task.chunks(select(Item), key=Item.id, size=10):
            async with chunk as (db, items):
                see(db, items)
                await db.flush()
                if chunk.number == 2:
                    is_in.set()
                    await asyncio.sleep(30)

    first = Attempt()
    attempt = asyncio.create_task(first.does(body))
    await is_in.wait()
    attempt.cancel()
    with pytest.raises(asyncio.CancelledError):
        await attempt
    assert await seen() == list(range(1, 11))
    assert [part[0] for part in await Attempt(first).does(whole)] == [11, 21]


async def test_after_an_error_that_is_caught_outside_its_block_the_same_chunk_is_returned_again(
    world: Database,
) -> None:
    numbers = []

    async def body() -> None:
        async for chunk in task.chunks(select(Item), key=Item.id, size=10):
            numbers.append(chunk.number)
            with contextlib.suppress(ValueError):
                async with chunk as (db, items):
                    see(db, items)
                    await db.flush()
                    if numbers.count(2) == 1 and chunk.number == 2:
                        raise ValueError

    await Attempt().does(body)
    assert numbers == [1, 2, 2, 3]
    assert await seen() == list(range(1, 26))


async def test_a_chunk_whose_error_is_caught_each_time_fails_after_five_tries(
    world: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk_loop, "FIRST_WAIT", 0.001)

    async def body() -> None:
        async for chunk in task.chunks(select(Item), key=Item.id, size=10):
            with contextlib.suppress(ValueError):
                async with chunk:
                    raise ValueError("bad")

    with pytest.raises(
        ChunkError, match=r"chunk 1 was rolled back 5 times in a row.*can't skip it"
    ):
        await Attempt().does(body)
    assert await seen() == []


async def test_a_timeout_that_is_caught_rolls_back_only_its_chunk(world: Database) -> None:
    tries = []

    async def body() -> None:
        async for chunk in task.chunks(select(Item), key=Item.id, size=10):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None) as limit, chunk as (db, items):
                    see(db, items)
                    await db.flush()
                    tries.append(chunk.number)
                    if tries == [1, 2]:
                        limit.reschedule(asyncio.get_running_loop().time())
                        await asyncio.sleep(30)
        async with get_db() as db:
            see(db, [100])
            await db.commit()

    await Attempt().does(body)
    assert tries == [1, 2, 2, 3]
    assert await seen() == [*range(1, 26), 100]


async def test_rows_that_the_body_changes_are_neither_skipped_nor_processed_twice(
    world: Database,
) -> None:
    async def body() -> None:
        async for chunk in task.chunks(select(Item).where(Item.done == 0), key=Item.id, size=4):
            async with chunk as (db, items):
                see(db, items)
                for item in items:
                    item.done = 1
                await db.execute(
                    delete(Item).where(Item.id.in_([i.id for i in items if i.id % 3 == 0]))
                )
                if chunk.number == 1:
                    db.add(Item(id=0, kind="a", done=0))  # before the position
                if chunk.number == 7:
                    db.add(Item(id=26, kind="a", done=0))  # after it, while the last chunk is open
                await db.flush()

    await Attempt().does(body)
    assert await seen() == list(range(1, 27))


async def test_composite_keys_in_every_order_visit_all_rows(world: Database) -> None:
    for key in [
        (Item.kind, Item.id),
        (Item.kind.desc(), Item.id.desc()),
        (Item.kind.desc(), Item.id),
        (Item.kind, Item.id.desc()),
        Item.id.desc(),
    ]:
        held = await whole(size=7, key=key)
        async with get_db(readonly=True) as db:
            order = key if isinstance(key, tuple) else (key,)
            expected = list((await db.scalars(select(Item.id).order_by(*order))).all())
        assert list(chain(*held)) == expected


async def test_start_is_included_and_stop_is_excluded(world: Database) -> None:
    assert [*chain(*await whole(start=5, stop=20))] == list(range(5, 20))
    assert [*chain(*await whole(key=Item.id.desc(), start=20, stop=5))] == list(range(20, 5, -1))
    held = await whole(key=(Item.kind, Item.id), start=("a", 20), stop=("b", 5))
    assert [*chain(*held)] == [20, 22, 24, 1, 3]


async def test_a_select_may_have_columns_or_one_column_or_for_update(world: Database) -> None:
    rows = []
    async for chunk in task.chunks(
        select(Item.id, Item.kind).with_for_update(), key=Item.id, size=20
    ):
        async with chunk as (_, items):
            rows += [tuple(row) for row in items]
    assert rows[:2] == [(1, "b"), (2, "a")] and len(rows) == 25
    ids = []
    async for chunk in task.chunks(select(Item.id), key=Item.id, size=20):
        async with chunk as (_, items):
            ids += items
    assert ids == list(range(1, 26))


async def test_a_select_may_be_of_aliases_and_core_tables(world: Database) -> None:
    other = aliased(Item)
    async for chunk in task.chunks(select(other).where(other.id > 20), key=other.id, size=3):
        async with chunk as (db, items):
            see(db, items)
    table = Item.__table__
    async for part in task.chunks(select(table.c.id, table.c.kind), key=table.c.id, size=20):
        async with part as (db, items):
            see(db, items)
    assert await seen() == [*range(21, 26), *range(1, 26)]


REFUSED: list[tuple[Any, Any, str]] = [
    (select(Item), Item.note, "may be NULL"),
    (select(Item), Item.kind, r"is not unique.*key=\(items.kind, items.id\)"),
    (select(Item.kind), Item.id, "is not in the select"),
    (select(Item), Seen.number, "is not in the select"),
    (select(Item).order_by(Item.id), Item.id, "has its own ORDER BY"),
    (select(Item).limit(3).offset(1), Item.id, "has its own LIMIT and OFFSET"),
    (select(Item).with_for_update(skip_locked=True), Item.id, "skip_locked"),
    (select(Item.id).union(select(Seen.item)), Item.id, "CompoundSelect; allowed: a select"),
    (select(Item), "id", "key= holds 'id'"),
    (select(Item), (), "key= is empty"),
]


@pytest.mark.parametrize(
    ("statement", "key", "message"), REFUSED, ids=[message[:12] for _, _, message in REFUSED]
)
async def test_selects_and_keys_that_would_lose_rows_are_refused(
    world: Database, statement: Any, key: Any, message: str
) -> None:
    with pytest.raises(ChunkError, match=message):
        task.chunks(statement, key=key)


async def test_a_key_that_a_join_repeats_is_refused_before_a_row_is_lost(world: Database) -> None:
    async with get_db() as db:
        see(db, [1, 1, 2, 2])
        await db.commit()
    joined = select(Item.id, Seen.number).join(Seen, Seen.item == Item.id)
    loop = task.chunks(joined, key=Item.id, size=1)
    with pytest.raises(ChunkError, match=r"two rows have the key \(1,\)"):
        await (await anext(loop)).__aenter__()
    pairs = []
    async for chunk in task.chunks(joined, key=(Item.id, Seen.number), size=1):
        async with chunk as (_, items):
            pairs += [tuple(row) for row in items]
    assert pairs == [(1, 1), (1, 2), (2, 3), (2, 4)]


async def test_a_body_that_commits_or_rolls_back_is_refused(world: Database) -> None:
    async def commits() -> None:
        async for chunk in task.chunks(select(Item), key=Item.id):
            async with chunk as (db, items):
                see(db, items)
                await db.commit()

    async def rolls_back() -> None:
        async for chunk in task.chunks(select(Item), key=Item.id):
            async with chunk as (db, _):
                await db.rollback()

    async def writes_after_that() -> None:
        async for chunk in task.chunks(select(Item), key=Item.id):
            async with chunk as (db, _):
                await db.rollback()
                see(db, [1])
                await db.flush()

    async def catches_a_bad_flush() -> None:
        async for chunk in task.chunks(select(Item), key=Item.id):
            async with chunk as (db, _):
                db.add(Item(id=99))
                with contextlib.suppress(IntegrityError):
                    await db.flush()

    with pytest.raises(ChunkError, match="calls commit"):
        await Attempt().does(commits)
    for body in (rolls_back, writes_after_that, catches_a_bad_flush):
        with pytest.raises(ChunkError, match="was rolled back inside its block"):
            await Attempt().does(body)
    assert await seen() == []


async def test_the_body_may_use_savepoints(world: Database) -> None:
    async def body() -> None:
        async for chunk in task.chunks(select(Item), key=Item.id):
            async with chunk as (db, items):
                for item in items:
                    with contextlib.suppress(ValueError):
                        async with db.begin_nested():
                            see(db, [item])
                            await db.flush()
                            if item.id == 3:
                                raise ValueError

    await Attempt().does(body)
    assert await seen() == [1, 2, *range(4, 26)]


async def test_wrong_use_is_refused_with_an_explanation(world: Database) -> None:
    async def passes_by() -> None:
        async for _ in task.chunks(select(Item), key=Item.id):
            pass

    async def enters_twice() -> None:
        async for chunk in task.chunks(select(Item), key=Item.id):
            async with chunk:
                pass
            async with chunk:
                pass

    async def asks_inside() -> None:
        loop = task.chunks(select(Item), key=Item.id, size=5)
        async with await anext(loop):
            await anext(loop)

    async def looks_before() -> None:
        async for chunk in task.chunks(select(Item), key=Item.id):
            assert chunk.items

    for body, message in [
        (passes_by, "chunk 1 was not entered"),
        (enters_twice, "was entered already"),
        (asks_inside, "is still open"),
        (looks_before, "inside `async with chunk"),
    ]:
        with pytest.raises(ChunkError, match=message):
            await Attempt().does(body)
    with pytest.raises(TypeError, match="needs `async for`"):
        iter(task.chunks(select(Item), key=Item.id))
    with pytest.raises(TypeError, match="needs `async for`"):
        await asyncio.to_thread(lambda: task.chunks(select(Item), key=Item.id))


async def test_two_loops_have_a_position_each(world: Database) -> None:
    async def body(fails: bool) -> None:
        async for chunk in task.chunks(select(Item).where(Item.kind == "a"), key=Item.id, size=5):
            async with chunk as (db, items):
                see(db, items)
        async for chunk in task.chunks(select(Item).where(Item.kind == "b"), key=Item.id, size=5):
            async with chunk as (db, items):
                see(db, items)
                if fails and chunk.number == 2:
                    raise OSError("no network")

    first = Attempt()
    with pytest.raises(OSError, match="no network"):
        await first.does(partial(body, True))
    await Attempt(first).does(partial(body, False))
    assert await seen() == [*range(2, 25, 2), *range(1, 26, 2)]
    assert {row.name: row.count for row in await rows()} == {"chunks:1": 12, "chunks:2": 13}


async def test_a_loop_inside_a_loop_needs_a_name(world: Database) -> None:
    async def body(named: bool) -> None:
        kinds = select(Item).where(Item.id <= 2)
        async for chunk in task.chunks(kinds, key=Item.id, size=1):
            async with chunk as (_, [outer]):
                pass
            inner = select(Item).where(Item.kind == outer.kind)
            async for part in task.chunks(
                inner, key=Item.id, size=5, name=f"of-{outer.id}" if named else None
            ):
                async with part as (db, items):
                    see(db, items)

    with pytest.raises(ChunkError, match="a loop inside a loop needs a name"):
        await Attempt().does(partial(body, False))
    async with get_db() as db:
        await db.execute(delete(Seen))
        await db.commit()
    await Attempt().does(partial(body, True))
    assert await seen() == [*range(1, 26, 2), *range(2, 25, 2)]


async def test_a_name_that_is_used_twice_is_refused(world: Database) -> None:
    async def body() -> None:
        await whole(name="items")
        await whole(name="items")

    with pytest.raises(ChunkError, match="'items' is used twice"):
        await Attempt().does(body)
    with pytest.raises(ChunkError, match="1 to 80 characters"):
        await Attempt().does(partial(whole, name="two words"))


async def test_a_stop_request_ends_a_run_between_two_chunks_and_it_resumes(world: Database) -> None:
    first = Attempt()

    async def body() -> None:
        async for chunk in task.chunks(select(Item), key=Item.id, size=10):
            async with chunk as (db, items):
                see(db, items)
                first.state.ask_to_stop("the service stops")

    with pytest.raises(Interrupted):
        await first.does(body)
    assert await seen() == list(range(1, 11))
    await Attempt(first).does(whole)
    assert await seen() == list(range(1, 26))


async def test_a_stop_request_ends_a_pause_between_chunks(world: Database) -> None:
    attempt = Attempt()

    async def body() -> None:
        async for chunk in task.chunks(select(Item), key=Item.id, size=10, pause=30):
            async with chunk as (db, items):
                see(db, items)
            asyncio.get_running_loop().call_later(
                0.05, attempt.state.ask_to_stop, "the service stops"
            )

    with pytest.raises(Interrupted):
        async with asyncio.timeout(10):
            await attempt.does(body)
    assert await seen() == list(range(1, 11))


class Deadlock(Exception):
    sqlstate = "40P01"


async def test_with_retry_chunk_a_chunk_that_the_database_refused_is_returned_again(
    world: Database,
) -> None:
    tries: list[int] = []

    async def body(**options: Any) -> None:
        async for chunk in task.chunks(select(Item), key=Item.id, size=10, **options):
            async with chunk as (db, items):
                see(db, items)
                await db.flush()
                tries.append(chunk.number)
                if tries.count(2) in (1, 2) and chunk.number == 2:
                    raise DBAPIError("UPDATE", {}, Deadlock())

    with pytest.raises(DBAPIError):
        await Attempt().does(body)
    async with get_db() as db:
        await db.execute(delete(Seen))
        await db.commit()
    tries.clear()
    await Attempt().does(partial(body, retry_chunk=True))
    assert tries == [1, 2, 2, 2, 3]
    assert await seen() == list(range(1, 26))


async def test_a_chunk_that_the_database_refuses_each_time_fails_the_attempt(
    world: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk_loop, "FIRST_WAIT", 0.001)
    tries = []

    async def body() -> None:
        async for chunk in task.chunks(select(Item), key=Item.id, size=10, retry_chunk=True):
            async with chunk:
                tries.append(chunk.number)
                if chunk.number == 2:
                    raise DBAPIError("UPDATE", {}, Deadlock())

    with pytest.raises(DBAPIError):
        await Attempt().does(body)
    assert tries == [1, *[2] * chunk_loop.TRIES]


async def test_leaving_a_loop_whose_last_chunk_was_refused_fails_the_attempt(
    world: Database,
) -> None:
    async def body() -> None:
        async for chunk in task.chunks(select(Item), key=Item.id, size=10, retry_chunk=True):
            async with chunk as (db, items):
                see(db, items)
                await db.flush()
                raise DBAPIError("COMMIT", {}, Deadlock())
            break

    with pytest.raises(DBAPIError):
        await Attempt().does(body)


async def test_a_chunk_whose_begin_succeeds_at_the_second_try_does_not_fail_the_attempt(
    world: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []
    load = Pages.load

    async def refused_once(self: Pages[Any], db: AsyncSession, cursor: Any) -> Any:
        tries.append(cursor)
        if len(tries) == 1:
            raise DBAPIError("SELECT", {}, Deadlock())
        return await load(self, db, cursor)

    async def body() -> None:
        async for chunk in task.chunks(select(Item), key=Item.id, size=10, retry_chunk=True):
            async with chunk as (db, items):
                see(db, items)
            break

    monkeypatch.setattr(Pages, "load", refused_once)
    await Attempt().does(body)
    assert len(tries) == 2
    assert await seen() == list(range(1, 11))


async def test_a_chunk_whose_commit_lost_its_reply_is_not_processed_again(
    world: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = []
    commit = AsyncSession.commit

    async def without_reply(self: AsyncSession) -> None:
        await commit(self)
        if not lost:
            lost.append(1)
            error = DBAPIError(
                "COMMIT", {}, OSError("connection was closed"), connection_invalidated=True
            )
            raise error

    monkeypatch.setattr(AsyncSession, "commit", without_reply)
    held = await Attempt().does(partial(whole, retry_chunk=True))
    assert [part[0] for part in held] == [1, 11, 21]
    assert await seen() == list(range(1, 26))


async def test_progress_is_the_number_of_committed_items_and_of_all_items(world: Database) -> None:
    attempt = Attempt()

    async def body() -> list[Any]:
        progress = []
        async for chunk in task.chunks(select(Item), key=Item.id, size=10, total=True):
            async with chunk as (_, _items):
                await until_counted()
            progress.append(attempt.state.meter.latest())
        return progress

    progress = await attempt.does(body)
    assert (progress[-1].done, progress[-1].total) == (25, 25)
    assert [each.done for each in progress] == [10, 20, 25]


async def test_rows_are_counted_only_with_total(
    world: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt, counts = Attempt(), []

    async def count(*_: Any) -> int:
        counts.append(1)
        return 25

    monkeypatch.setattr(Pages, "count", count)
    await attempt.does(whole)
    last = attempt.state.meter.latest()
    assert (counts, last and last.done, last and last.total) == ([], 25, None)


async def test_a_finished_loop_knows_its_total_without_a_count(world: Database) -> None:
    attempt = Attempt()

    async def body() -> None:
        loop = task.chunks(iter(range(25)), size=10, total=True)
        async for chunk in loop:
            async with chunk:
                assert (said := attempt.state.meter.latest()) is None or said.total is None

        assert [chunk async for chunk in loop] == []  # a finished loop does not count again

    await attempt.does(body)
    last = attempt.state.meter.latest()
    assert last is not None and (last.done, last.total) == (25, 25)


async def test_only_the_numbers_of_items_are_kept_of_inner_loops_that_have_ended(
    world: Database,
) -> None:
    attempt, alive = Attempt(), weakref.WeakSet[Any]()

    async def body() -> tuple[int, int]:
        most = 0
        async for chunk in task.chunks(range(40), size=1, name="outer"):
            async with chunk as (_, (outer,)):
                pass
            inner = task.chunks([object() for _ in range(3)], size=2, name=f"inner-{outer}")
            alive.add(inner)
            async for part in inner:
                async with part:
                    most = max(most, len(alive))
            del inner, part
        return most, len(attempt.state.loops._progress)

    gc.disable()
    try:
        assert await attempt.does(body) == (1, 0)
    finally:
        gc.enable()
    last = attempt.state.meter.latest()
    assert last is not None and last.done == 40 + 40 * 3


async def test_the_total_is_right_even_if_rows_are_deleted_during_the_count(
    world: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt, count, is_counting, may_count = (
        Attempt(),
        Pages.count,
        asyncio.Event(),
        asyncio.Event(),
    )

    async def slowly(self: Pages[Any], *given: Any) -> int | None:
        is_counting.set()
        await may_count.wait()
        return await count(self, *given)

    async def body() -> int | None:
        loop = task.chunks(select(Item), key=Item.id, size=10, total=True)
        async for chunk in loop:
            if chunk.number == 2:
                await is_counting.wait()
            async with chunk as (db, items):
                await db.execute(delete(Item).where(Item.id.in_([item.id for item in items])))
            if chunk.number == 2:
                may_count.set()
                while loop.total is None:
                    await asyncio.sleep(0.001)
        return loop.total

    monkeypatch.setattr(Pages, "count", slowly)
    assert await attempt.does(body) == 25


async def test_items_of_earlier_attempts_are_counted_apart(world: Database) -> None:
    async def both(limit: int) -> None:
        for kind in "ab":
            mine = select(Item).where(Item.kind == kind)
            async for chunk in task.chunks(mine, key=Item.id, size=4):
                async with chunk as (db, items):
                    see(db, items)
                if kind == "b" and chunk.number == limit:
                    return

    first = Attempt()
    await first.does(partial(both, 1))
    second = Attempt(first)
    await second.does(partial(both, 3))
    progress = [attempt.state.meter.latest() for attempt in (first, second)]
    assert [(each.done, each.before) for each in progress if each] == [
        (12 + 4, 0),
        (12 + 12, 12 + 4),
    ]
