"""Loops over sources that are no select, steps, and once(), on both databases."""

from __future__ import annotations

import csv
from collections.abc import AsyncIterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from batch_system import get_db
from batch_system.batch.context.once import once
from batch_system.database.engine import Database
from batch_system.errors import BatchError, ChunkError
from tests.batch.test_chunks import Attempt, Item, Seen, rows, see, seen, task, world

__all__ = ["world"]


async def fails_at(chunk: Any, number: int | None) -> None:
    if chunk.number == number:
        raise OSError("no network")


async def over(source: Any, fails: int | None = None, **options: Any) -> None:
    async for chunk in task.chunks(source, size=3, **options):
        async with chunk as (db, items):
            see(db, items)
            await fails_at(chunk, fails)


async def resumed(make: Any) -> list[int]:
    """The items that are seen when the second chunk fails and a later attempt continues."""
    first = Attempt()
    with pytest.raises(OSError, match="no network"):
        await first.does(lambda: over(make(), fails=2))
    assert len(await seen()) == 3
    await Attempt(first).does(lambda: over(make()))
    return await seen()


async def listing() -> AsyncIterator[int]:
    for number in range(10):
        yield number


class Api:
    """Pages of two items with a token; one page in between is empty."""

    asked: list[Any]

    def __init__(self) -> None:
        self.asked = []

    async def after(self, cursor: Any, size: int) -> tuple[Sequence[int], Any]:
        self.asked.append(cursor)
        pages = {None: ([0, 1, 2], "a"), "a": ([], "b"), "b": ([3, 4], "c"), "c": ([5], None)}
        return pages[cursor]


async def test_a_later_attempt_skips_the_done_items_of_an_iterable(world: Database) -> None:
    assert await resumed(lambda: range(10)) == list(range(10))


async def test_a_later_attempt_skips_the_done_items_of_a_generator_and_an_async_generator(
    world: Database,
) -> None:
    assert await resumed(lambda: (number for number in range(10))) == list(range(10))
    async with get_db() as db:
        for row in (await db.scalars(select(Seen))).all():
            await db.delete(row)
        await db.commit()
    assert await resumed(listing) == list(range(10))


async def test_pages_of_an_api_are_requested_after_the_cursor(world: Database) -> None:
    first, api = Attempt(), Api()
    with pytest.raises(OSError, match="no network"):
        await first.does(lambda: over(api, fails=3))
    assert api.asked == [None, "a", "b"]
    again = Api()
    await Attempt(first).does(lambda: over(again))
    assert again.asked == ["b", "c"]
    assert await seen() == list(range(6))


async def test_a_file_that_has_changed_is_refused(world: Database, tmp_path: Path) -> None:
    path = tmp_path / "numbers.csv"
    path.write_text("".join(f"{number}\n" for number in range(10)))

    async def body(fails: int | None = None) -> None:
        with path.open() as file:
            lines = (int(row[0]) for row in csv.reader(file))
            await over(lines, fails=fails, file=file)

    first = Attempt()
    with pytest.raises(OSError, match="no network"):
        await first.does(partial(body, 2))
    before = path.read_text()
    path.write_text("0\n" + before)
    with pytest.raises(
        ChunkError, match=r"numbers\.csv has changed since 3 of its items were done"
    ):
        await Attempt(first).does(body)
    assert await seen() == [0, 1, 2]


async def test_an_open_file_as_the_source_is_checked_without_file(
    world: Database, tmp_path: Path
) -> None:
    path = tmp_path / "numbers.txt"
    path.write_text("1\n2\n3\n4\n")

    async def body() -> None:
        with path.open() as file:
            async for chunk in task.chunks(file, size=2):
                async with chunk as (db, lines):
                    see(db, [int(line) for line in lines])
                if chunk.number == 1:
                    raise OSError("no network")

    first = Attempt()
    with pytest.raises(OSError, match="no network"):
        await first.does(body)
    path.write_text("1\n2\n")
    with pytest.raises(ChunkError, match=r"numbers\.txt has changed"):
        await Attempt(first).does(body)


async def test_a_source_with_fewer_items_than_are_done_is_refused(world: Database) -> None:
    first = Attempt()
    with pytest.raises(OSError, match="no network"):
        await first.does(lambda: over(iter(range(9)), fails=3))
    with pytest.raises(ChunkError, match="only 4 items, but 6 are done"):
        await Attempt(first).does(lambda: over(iter(range(4))))


async def test_items_that_are_not_rows_can_be_read_before_the_block(world: Database) -> None:
    """This makes a loop inside a loop work on SQLite, which has one writer. An unfinished inner
    loop is resumed.
    """

    async def body(fails: bool) -> None:
        async for chunk in task.chunks(["a", "b"], size=1):
            [kind] = chunk.items
            inner = select(Item).where(Item.kind == kind)
            async for part in task.chunks(inner, key=Item.id, size=5, name=f"of-{kind}"):
                async with part as (db, items):
                    see(db, items)
                    if fails and kind == "b" and part.number == 2:
                        raise OSError("no network")
            async with chunk:
                pass

    first = Attempt()
    with pytest.raises(OSError, match="no network"):
        await first.does(partial(body, True))
    await Attempt(first).does(partial(body, False))
    assert await seen() == [*range(2, 25, 2), *range(1, 26, 2)]


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("abc", {}, "was given a str; allowed"),
        (7, {}, "was given a int; allowed"),
        ([1], {"key": Item.id}, "key= is for a select"),
        ([1], {"start": 1, "stop": 2}, "start=, stop= is for a select"),
        (select(Item), {}, "key= is missing"),
        (select(Item), {"key": Item.id, "size": 0}, "size=0; allowed: an int from 1"),
    ],
)
async def test_an_object_that_is_not_a_source_is_refused(
    world: Database, source: Any, options: Any, message: str
) -> None:
    with pytest.raises(ChunkError, match=message):
        task.chunks(source, **options)


async def test_a_step_that_is_done_is_not_repeated_and_has_its_result(world: Database) -> None:
    calls = []

    async def body(fails: bool) -> Any:
        async with task.step("first") as step:
            if not step.is_done:
                calls.append("first")
                see(step.db, [1])
                step.result = {"pair": (1, 2)}
        async with task.step("second") as second:
            if not second.is_done:
                calls.append("second")
                see(second.db, [2])
                if fails:
                    raise OSError("no network")
        return step.result

    first = Attempt()
    with pytest.raises(OSError, match="no network"):
        await first.does(partial(body, True))
    assert await Attempt(first).does(partial(body, False)) == {"pair": [1, 2]}
    assert calls == ["first", "second", "second"]
    assert await seen() == [1, 2]
    assert {row.name: row.result for row in await rows()} == {
        "step:first": {"pair": [1, 2]},
        "step:second": None,
    }


async def test_wrong_use_of_a_step_is_refused(world: Database) -> None:
    async def uses_the_session_of_a_done_one() -> None:
        async with task.step("a") as step:
            see(step.db, [1])

    async def keeps_what_is_no_json() -> None:
        async with task.step("a") as step:
            step.result = object()

    async def twice() -> None:
        async with task.step("a"):
            pass
        async with task.step("a"):
            pass

    with pytest.raises(ChunkError, match="'a' can't be kept as JSON"):
        await Attempt().does(keeps_what_is_no_json)
    with pytest.raises(ChunkError, match="'a' is used twice"):
        await Attempt().does(twice)
    first = Attempt()
    await first.does(uses_the_session_of_a_done_one)
    with pytest.raises(ChunkError, match="'a' is done already"):
        await Attempt(first).does(uses_the_session_of_a_done_one)


async def test_outside_a_run_a_step_is_never_already_done(world: Database) -> None:
    for _ in range(2):
        async with task.step("a") as step:
            assert not step.is_done
            see(step.db, [1])
            step.result = (1,)
        assert step.result == [1]
    assert await seen() == [1, 1]


async def test_once_is_true_for_the_first_transaction_that_commits(world: Database) -> None:
    async def asks(commits: bool) -> bool:
        async with get_db() as db:
            is_first = await once(db, "invoice-1")
            if commits:
                await db.commit()
            return is_first

    assert await Attempt().does(partial(asks, False)) is True
    assert await Attempt().does(partial(asks, True)) is True
    assert await Attempt().does(partial(asks, True)) is False
    with pytest.raises(BatchError, match="only inside a run"):
        await asks(True)
    with pytest.raises(BatchError, match="allowed: 1 to 200"):
        await Attempt().does(lambda: once(None, ""))  # type: ignore[arg-type]


async def test_an_idempotency_key_is_the_same_in_each_attempt(world: Database) -> None:
    first = Attempt()
    later, other = Attempt(first), Attempt()
    key = first.run.idempotency_key(7)
    assert key == later.run.idempotency_key(7)
    assert (
        len(
            {
                key,
                first.run.idempotency_key(8),
                first.run.idempotency_key("7"),
                other.run.idempotency_key(7),
            }
        )
        == 4
    )
    assert first.run.idempotency_key(Item(id=7)) == first.run.idempotency_key(Item(id=7, kind="b"))
    with pytest.raises(BatchError, match="idempotency_key"):
        first.run.idempotency_key(object())
