"""ItemTask on both databases: items are fetched outside of transactions, saved in savepoints, or
set aside.
"""

from __future__ import annotations

import asyncio
import inspect
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from functools import partial
from typing import Any, ClassVar

import httpx
import pytest
from sqlalchemy import Select, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession

from batch_system import ItemTask, Retry, Skip, TaskRegistry, get_db
from batch_system.batch.chunks import quarantine
from batch_system.database.engine import Database
from batch_system.database.session import application_database
from batch_system.errors import ChunkError, InvalidParameters, InvalidTask
from tests.batch.test_chunks import Attempt, Deadlock, Item, rows, see, seen, world

__all__ = ["world"]


class _Made(ItemTask):
    name, schedule = "made", None
    size = 10
    item_retry = Retry(attempts=3, wait=0, on=(ConnectionError,))
    bad: ClassVar[dict[int, Any]] = {}
    tries: ClassVar[Counter[int]] = Counter()

    def items(self) -> Select[Item]:
        return select(Item)

    async def save(self, item: Item, fetched: Any, db: AsyncSession) -> None:
        see(db, [item])
        item.done += 1
        await db.flush()
        self.tries[item.id] += 1
        error = self.bad.get(item.id)
        if callable(error) and not isinstance(error, type):
            error = error(self.tries[item.id])
        if error is not None:
            raise error


def make(**attributes: Any) -> type[_Made]:
    return type("Own", (_Made,), {"tries": Counter(), "bad": {}, **attributes})


async def aside(run: str) -> list[tuple[str, str, int]]:
    return [
        (row.item, row.error["message"], row.times)
        for row in await quarantine.listed(application_database(), run)
    ]


async def test_each_item_is_saved_once(world: Database) -> None:
    assert await Attempt().does(make()().run) == {"done": 25, "set_aside": 0}
    assert await seen() == list(range(1, 26))


class Unreadable(ValueError):
    def __str__(self) -> str:
        raise ZeroDivisionError


async def test_an_item_whose_error_can_t_be_formatted_or_stored_is_set_aside_too(
    world: Database,
) -> None:
    attempt = Attempt()
    bad = {3: Unreadable(), 4: ValueError("a\0b"), 5: ValueError("x" * 1_000_000)}
    assert await attempt.does(make(bad=bad, skip=Skip(limit=3))().run) == {
        "done": 22,
        "set_aside": 3,
    }
    third, fourth, fifth = await aside(attempt.run.id)
    assert third == ("3", "its text can't be read", 1)
    assert fourth[1] == "a\N{SYMBOL FOR NULL}b"
    assert fifth[1] == "x" * 20_000


async def test_without_skip_an_item_that_always_fails_fails_the_run(world: Database) -> None:
    with pytest.raises(ValueError, match="bad"):
        await Attempt().does(make(bad={13: ValueError("bad")})().run)
    assert await seen() == list(range(1, 11))


async def test_bad_items_are_set_aside_with_the_error_and_their_changes_are_rolled_back(
    world: Database,
) -> None:
    attempt = Attempt()
    own = make(
        bad={3: ValueError("bad"), 13: KeyError("gone")},
        skip=Skip(limit=2, on=(ValueError, KeyError)),
    )
    assert await attempt.does(own().run) == {"done": 23, "set_aside": 2}
    assert await seen() == [n for n in range(1, 26) if n not in (3, 13)]
    assert await aside(attempt.run.id) == [("3", "bad", 1), ("13", "'gone'", 1)]
    [first, _] = await quarantine.listed(application_database(), attempt.run.id)
    assert first.error["type"] == "ValueError" and "in save" in first.error["traceback"]
    async with get_db(readonly=True) as db:
        assert (await db.get_one(Item, 3)).done == 0


async def test_an_error_that_skip_does_not_include_fails_the_run(world: Database) -> None:
    with pytest.raises(TypeError, match="worse"):
        await Attempt().does(
            make(bad={3: TypeError("worse")}, skip=Skip(limit=2, on=ValueError))().run
        )


async def test_beyond_the_limit_each_attempt_of_the_run_fails_with_that_reason(
    world: Database,
) -> None:
    first = Attempt()
    own = make(bad=dict.fromkeys((1, 2, 11), ValueError("bad")), skip=Skip(limit=2))
    for attempt in (first, Attempt(first)):
        with pytest.raises(
            ChunkError, match=r"item 11 failed too \(ValueError: bad\), and 2 are set aside already"
        ):
            await attempt.does(own().run)
    assert await seen() == list(range(3, 11))
    assert len(await aside(first.run.id)) == 2


async def test_a_temporary_error_is_retried_for_the_item_alone(world: Database) -> None:
    own = make(
        bad={
            3: lambda tries: ConnectionError() if tries < 3 else None,
            4: ConnectionError("never"),
        },
        skip=Skip(9),
    )
    attempt = Attempt()
    assert await attempt.does(own().run) == {"done": 24, "set_aside": 1}
    assert own.tries[3] == 3 and own.tries[5] == 1
    assert await aside(attempt.run.id) == [("4", "never", 3)]


async def test_after_a_deadlock_the_whole_chunk_is_saved_again(world: Database) -> None:
    deadlock = DBAPIError("UPDATE", {}, Deadlock())
    own = make(bad={3: lambda tries: deadlock if tries == 1 else None}, skip=Skip(9))
    assert await Attempt().does(own().run) == {"done": 25, "set_aside": 0}
    assert own.tries[1] == 2 and own.tries[11] == 1
    assert await seen() == list(range(1, 26))


async def test_concurrency_items_are_fetched_at_a_time_while_no_transaction_is_open(
    world: Database,
) -> None:
    waiting, most = 0, 0

    async def fetch(self: Any, item: Item) -> str:
        nonlocal waiting, most
        waiting += 1
        most = max(most, waiting)
        # On SQLite this would wait for ever for the session of an open chunk.
        async with get_db() as db:
            see(db, [-item.id])
            await db.commit()
        await asyncio.sleep(0.01)
        waiting -= 1
        return f"for {item.id}"

    got = {}

    async def save(self: Any, item: Item, fetched: Any, db: AsyncSession) -> None:
        got[item.id] = fetched
        item.done = 1

    await Attempt().does(make(fetch=fetch, save=save, concurrency=4)().run)
    assert got == {n: f"for {n}" for n in range(1, 26)}
    assert most == 4


async def test_an_item_whose_fetch_raises_is_retried_and_then_set_aside(world: Database) -> None:
    tries: Counter[int] = Counter()

    async def fetch(self: Any, item: Item) -> int:
        tries[item.id] += 1
        if item.id == 2 and tries[2] < 3:
            raise ConnectionError
        if item.id == 3:
            raise ValueError("not there")
        if item.id == 4 and tries[4] == 1:
            response = httpx.Response(429, headers={"Retry-After": "0"})
            raise httpx.HTTPStatusError(
                "busy", request=httpx.Request("GET", "http://x"), response=response
            )
        return item.id

    attempt = Attempt()
    own = make(fetch=fetch, skip=Skip(9))
    assert await attempt.does(own().run) == {"done": 24, "set_aside": 1}
    assert [tries[n] for n in (1, 2, 3, 4)] == [1, 3, 1, 2]
    assert await aside(attempt.run.id) == [("3", "not there", 1)]


async def test_a_row_inserted_during_the_fetches_is_not_skipped(world: Database) -> None:
    async def fetch(self: Any, item: Item) -> None:
        if item.id == 5:
            async with get_db() as db:
                await db.delete(await db.get_one(Item, 6))
                # Its key is before those fetched, and nothing is committed yet.
                db.add(Item(id=0, kind="a", done=0))
                await db.commit()

    own = make(fetch=fetch)
    await Attempt().does(own().run)
    assert await seen() == [0, *range(1, 6), *range(7, 26)]


async def test_a_later_attempt_fetches_and_saves_only_the_items_left(world: Database) -> None:
    fetched = []

    async def fetch(self: Any, item: Item) -> None:
        fetched.append(item.id)

    own = make(fetch=fetch, bad={15: ValueError("bad")})
    first = Attempt()
    with pytest.raises(ValueError, match="bad"):
        await first.does(own().run)
    own.bad.clear()
    fetched.clear()
    assert await Attempt(first).does(own().run) == {"done": 25, "set_aside": 0}
    assert fetched == list(range(11, 26))
    assert await seen() == list(range(1, 26))


async def test_a_redrive_processes_only_the_items_set_aside_and_marks_them(world: Database) -> None:
    first = Attempt()
    own = make(bad=dict.fromkeys((3, 13, 14), ValueError("bad")), skip=Skip(9))
    await first.does(own().run)
    del own.bad[3], own.bad[13]
    second = Attempt()
    assert await second.does(partial(own().run, redrive=first.run.id, items=["3", "14"])) == {
        "done": 1,
        "set_aside": 1,
    }
    assert (await seen())[-1] == 3
    assert await aside(second.run.id) == [("14", "bad", 1)]
    third = Attempt()
    assert await third.does(partial(own().run, redrive=first.run.id)) == {"done": 1, "set_aside": 0}
    assert (await seen())[-1] == 13
    with pytest.raises(ChunkError, match="has no items set aside that are not processed yet"):
        await Attempt().does(partial(own().run, redrive=first.run.id))
    with pytest.raises(ChunkError, match=r"not processed yet: 99"):
        await Attempt().does(partial(own().run, redrive=second.run.id, items=["14", "99"]))


async def test_keys_of_several_columns_and_selects_of_columns(world: Database) -> None:
    class Own(_Made):
        key = (Item.kind, Item.id)

        def items(self) -> Any:
            return select(Item.id, Item.kind)

        async def save(self, item: Any, fetched: Any, db: AsyncSession) -> None:
            if item.id == 3:
                raise ValueError("bad")
            see(db, [item.id])

    Own.skip = Skip(1)
    attempt = Attempt()
    await attempt.does(Own().run)
    assert len(await seen()) == 24
    assert [item for item, _, _ in await aside(attempt.run.id)] == ['["b", 3]']
    Own.key = None
    with pytest.raises(ChunkError, match="name those that identify a row"):
        await Attempt().does(Own().run)


async def test_outside_a_run_a_bad_item_raises(world: Database) -> None:
    with pytest.raises(ValueError, match="bad"):
        await make(bad={3: ValueError("bad")}, skip=Skip(9))().run()


async def test_an_item_task_keeps_its_position_like_any_other_loop(world: Database) -> None:
    await Attempt().does(make()().run)
    assert [(row.name, row.count, row.finished) for row in await rows()] == [("chunks:1", 25, True)]


def test_an_invalid_skip_is_refused_with_the_allowed_values() -> None:
    with pytest.raises(InvalidTask, match=r"Skip\(limit\) is 0; allowed: an int from 1"):
        Skip(limit=0)
    with pytest.raises(InvalidTask, match=r"Skip\(on\) is 'x'; allowed"):
        Skip(limit=1, on="x")  # type: ignore[arg-type]
    assert inspect.isabstract(ItemTask)


# Parameters of an item task's own, and what it opens for all items.


class _OfKind(_Made):
    """Its select depends on a parameter, and so does what it saves."""

    def items(self, kind: str, note: str = "seen") -> Select[Item]:
        self.note = note
        return select(Item).where(Item.kind == kind)

    async def save(self, item: Item, fetched: Any, db: AsyncSession) -> None:
        await super().save(item, fetched, db)
        item.note = self.note


async def notes() -> dict[str, set[str | None]]:
    async with get_db(readonly=True) as db:
        pairs = (await db.execute(select(Item.kind, Item.note))).all()
    return {kind: {note for other, note in pairs if other == kind} for kind in "ab"}


def test_the_parameters_of_items_are_parameters_of_its_runs() -> None:
    declared = TaskRegistry.of(type("Own", (_OfKind,), {"schedule": None})).parameters
    assert (declared.names, declared.required) == (("redrive", "items", "kind", "note"), ("kind",))
    assert declared.to_json({"kind": "a", "redrive": "x"}) == {"kind": "a", "redrive": "x"}
    with pytest.raises(
        InvalidParameters,
        match=r"there is no parameter 'colour' \(it takes redrive, items, kind, note",
    ):
        declared.to_json({"kind": "a", "colour": "red"})
    assert TaskRegistry.of(_made_plain()).parameters.names == ("redrive", "items")


def _made_plain() -> type[_Made]:
    return type("Plain", (_Made,), {"name": "plain"})


async def test_items_gets_the_parameters_and_the_other_methods_see_what_it_keeps(
    world: Database,
) -> None:
    own = type("Own", (_OfKind,), {"tries": Counter(), "bad": {}})
    assert await Attempt().does(partial(own().run, kind="a", note="mine")) == {
        "done": 12,
        "set_aside": 0,
    }
    assert await notes() == {"a": {"mine"}, "b": {None}}


class _WithItsOwnRun(_OfKind):
    async def run(
        self, redrive: str | None = None, items: list[str] | None = None, note: int = 0
    ) -> Any:
        return await super().run(redrive, items, kind="a", note=f"note {note}")


async def test_a_run_of_its_own_has_the_parameters_that_it_names(world: Database) -> None:
    own = type("Own", (_WithItsOwnRun,), {"tries": Counter(), "bad": {}})
    written = TaskRegistry.of(own).parameters.written
    assert [*written] == ["redrive", "items", "note"] and written["note"].annotation == "int"
    await Attempt().does(partial(own().run, note=7))
    assert await notes() == {"a": {"note 7"}, "b": {None}}


def test_a_parameter_of_items_that_run_has_already_is_refused() -> None:
    class Own(_Made):
        def items(self, redrive: int = 0) -> Select[Item]:
            return select(Item)

    with pytest.raises(
        InvalidTask,
        match=r"items\(\) has the parameter redrive, which run\(\) has already: rename it",
    ):
        TaskRegistry.of(Own)


def test_annotations_of_items_without_parameters_are_for_type_checkers_only() -> None:
    class Own(_Made):
        def items(self) -> NotImportedHere:  # type: ignore[name-defined] # noqa: F821
            return select(Item)

    assert TaskRegistry.of(Own).parameters.names == ("redrive", "items")


@pytest.mark.parametrize("ends", ["well", "with an error"])
async def test_resources_are_opened_once_for_all_items_and_closed_at_the_end(
    world: Database, ends: str
) -> None:
    told: list[str] = []

    class Own(_OfKind):
        @asynccontextmanager
        async def resources(self) -> AsyncIterator[None]:
            told.append(f"opened for {self.note}")
            async with httpx.AsyncClient(
                transport=httpx.MockTransport(lambda _: httpx.Response(200))
            ) as self.client:
                yield
            told.append("closed")

        async def fetch(self, item: Item) -> int:
            return (await self.client.get(f"http://x/{item.id}")).status_code

        async def save(self, item: Item, fetched: Any, db: AsyncSession) -> None:
            told.append(f"saved {fetched}")
            if ends != "well":
                raise KeyError("gone")

    Own.size = 5
    own = Own()
    with nullcontext() if ends == "well" else pytest.raises(KeyError):
        await Attempt().does(partial(own.run, kind="a", note="all"))
    assert told[0] == "opened for all" and told.count("opened for all") == 1
    assert told.count("saved 200") == (12 if ends == "well" else 1)
    assert own.client.is_closed and ("closed" in told) == (ends == "well")


async def opens(self: object) -> None: ...


async def yields(self: object) -> AsyncIterator[None]:
    yield


@pytest.mark.parametrize("resources", [opens, yields])
def test_resources_without_the_decorator_are_refused_with_what_to_write(resources: Any) -> None:
    with pytest.raises(
        InvalidTask,
        match=r"Own\.resources\(\) is no async context manager; allowed: .*asynccontextm",
    ):
        make(resources=resources)


class _Typed(ItemTask[Item, str]):
    """The classes in brackets are for type checkers."""

    name, schedule = "typed", None

    def items(self) -> Select[Item]:
        return select(Item)

    async def fetch(self, item: Item) -> str:
        return f"item {item.id}"

    async def save(self, item: Item, fetched: str, db: AsyncSession) -> None:
        item.note = fetched[-10:]


async def test_a_task_may_name_the_types_of_its_items_and_of_what_it_fetches(
    world: Database,
) -> None:
    assert TaskRegistry.of(_Typed).parameters.names == ("redrive", "items")
    assert await Attempt().does(_Typed().run) == {"done": 25, "set_aside": 0}
    assert ItemTask[Item] and inspect.isabstract(ItemTask[Item, str].__origin__)
