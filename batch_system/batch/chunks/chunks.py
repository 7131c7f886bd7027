"""`self.chunks(…)`: a loop over chunks. Each chunk is committed together with the position of the
loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterable, Iterable
from dataclasses import replace
from types import TracebackType
from typing import Any, Generic, NoReturn, Self, TypeVar, cast

from sqlalchemy import Executable, Select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession

from batch_system.batch.chunks import checkpoints
from batch_system.batch.chunks.checkpoints import LoopPosition, Overtaken
from batch_system.batch.chunks.keyset_pages import Page, Pages, Source
from batch_system.batch.chunks.sources import CursorPages, CursorSource, File, Items
from batch_system.batch.chunks.transaction_guard import Guard
from batch_system.batch.context import current_run, fencing
from batch_system.batch.context.current_run import CurrentRun, state_of
from batch_system.database.engine import Database
from batch_system.database.session import application_database
from batch_system.database.troubles import cause_of, is_transient
from batch_system.errors import ChunkError, DatabaseError
from batch_system.logs import get_logger

T = TypeVar("T")
logger = get_logger("batch_system.batch")

TRIES = 5
"""How often one chunk is tried at most, with `retry_chunk` or if the author's code catches its
error.
"""
SMALLER = (
    "a smaller `size=` of chunks() lets others write sooner; wait for nothing else inside the block"
)
"""Advice for a chunk that holds SQLite's write lock for long. A chunk commits at its end, so its
author can't commit earlier.
"""
NEEDS_ASYNC = (
    "chunks() needs `async for` in an `async def run`: a sync run can't share a chunk's session"
)
FIRST_WAIT, LONGEST_WAIT = 0.05, 2.0
"""Bounds of the seconds between two tries of a chunk. The wait doubles with each try."""


class Chunks(Generic[T]):
    """`async for chunk in self.chunks(…)`: yields chunks until no item is left. Outside a run, no
    position is kept.
    """

    def __init__(
        self, source: Source[T], name: str | None, pause: float, retry_chunk: bool, total: bool
    ) -> None:
        self.source = source
        self.database = _database()
        self.run = current_run.current_run_if_any()
        if self.run is not None and self.database.kind not in fencing.KINDS:
            raise ChunkError(
                f"chunks() needs SQLite or PostgreSQL, and {self.database.setting} is "
                f"{self.database.kind}"
            )
        self.name = (
            state_of(self.run).loops.name("chunks", name) if self.run is not None else name or ""
        )
        self.position = LoopPosition()
        self.total: int | None = None
        self._wants_total = total
        self._pause = pause
        self._retries = retry_chunk and self.run is not None
        self._chunk: Chunk[T] | None = None
        self._is_known = self.run is None
        self._failures = 0
        self._expects_more = self._has_ended = False

    @property
    def done(self) -> int:
        """The number of items in committed chunks, of all attempts."""
        return self.position.count

    def __aiter__(self) -> Self:
        return self

    def __iter__(self) -> NoReturn:
        raise TypeError(NEEDS_ASYNC)

    async def __anext__(self) -> Chunk[T]:
        if self.run is not None:
            self.run.checkpoint()
            state_of(self.run).loops.before_chunk(self)
        await self._before_next()
        if not self._is_known:
            await self._read_position()
        if (
            self._chunk is None
            and self._wants_total
            and self.run is not None
            and self.total is None
        ):
            state_of(self.run).loops.in_background(self._count(self.run))
        if self.position.is_finished or not (self._expects_more or await self._has_more()):
            await self._finish()
            raise StopAsyncIteration
        self._chunk = Chunk(self)
        return self._chunk

    async def _before_next(self) -> None:
        last = self._chunk
        if last is None:
            return
        if last.is_open:
            raise ChunkError(
                f"chunk {last.number} is still open: ask for the next one after its `async with` "
                "block"
            )
        if not last.was_entered:
            raise ChunkError(
                f"chunk {last.number} was not entered: process it in `async with chunk as (db, "
                "items):`"
            )
        if last.error is not None:
            await self._after_failure(last)
        elif self._pause:
            await (
                self.run.sleep(self._pause) if self.run is not None else asyncio.sleep(self._pause)
            )

    async def _after_failure(self, last: Chunk[T]) -> None:
        """Prepare to return the chunk again, unless the database shows that it was committed after
        all.
        """
        self._is_known = self.run is None
        self._expects_more = False
        if self._failures >= TRIES:
            raise ChunkError(
                f"chunk {last.number} was rolled back {self._failures} times in a row, and a loop "
                "can't skip it: do not catch the error, or use an ItemTask, which sets bad items "
                "aside"
            ) from last.error
        longest = min(LONGEST_WAIT, FIRST_WAIT * 2**self._failures)
        # Spread chunks that have collided.
        await asyncio.sleep(random.uniform(longest / 2, longest))  # noqa: S311

    async def _read_position(self) -> None:
        assert self.run is not None
        async with self.database.reader.connect() as connection:
            position = await checkpoints.read(connection, self.run, self.name)
        if self._chunk is None and position.chunks and not position.is_finished:
            logger.info(
                f"resumes after chunk {position.chunks} of loop {self.name!r}: "
                f"{position.count:,} are done"
            )
        if position.chunks > self.position.chunks:
            self._failures = 0
        self.position = position
        self._is_known = True
        self._report_progress()

    def _report_progress(self) -> None:
        if self.run is not None:
            self.run.progress(*state_of(self.run).loops.advanced(self))

    async def _count(self, run: CurrentRun) -> None:
        """Set `total` to the items done plus the items left, read at one instant. If that fails, it
        stays unknown.
        """
        with contextlib.suppress(DBAPIError, DatabaseError, OSError):
            async with self.database.reader.connect() as connection:
                if self.database.kind == "postgresql":
                    await connection.execute(
                        text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
                    )
                position = await checkpoints.read(connection, run, self.name)
                left = await self.source.count(connection, position.cursor)
            if not self._has_ended and left is not None:
                self.total = position.count + left
                self._report_progress()

    async def _has_more(self) -> bool:
        return await self.source.has_more(self.database, self.position.cursor)

    async def _finish(self) -> None:
        """Record that the loop has finished. A loop without any chunk needs no row, because it is
        just as short the next time.
        """
        if self.run is None or (self._has_ended and self.position.is_finished):
            return
        if self.position.chunks and not self.position.is_finished:
            finished = replace(self.position, is_finished=True)
            async with self.database.session() as db:
                await checkpoints.write(db, self.run, self.name, self.position, finished)
                await db.commit()
            self.position = finished
        self._chunk = None  # the loop may outlive its last chunk, so free its memory
        self._has_ended = True
        self.total = self.done if self._wants_total else None
        self._report_progress()
        state_of(self.run).loops.ended(self)

    def committed(self, position: LoopPosition, page: Page[T]) -> None:
        """Record that the chunk with this page was committed. `position` is the one after it."""
        self.position = position
        self._failures = 0
        self._expects_more = not page.is_last
        if self.run is not None:
            state_of(self.run).loops.committed(self, position.chunks, page.items)
        self._report_progress()

    def failed(self, number: int, error: BaseException) -> bool:
        """Record that a chunk was rolled back. Returns whether it is tried again, so that its error
        is not raised.
        """
        self._failures += 1
        may_retry = isinstance(error, Overtaken) or (self._retries and is_transient(error))
        if self.run is None or not may_retry or self._failures >= TRIES:
            return False
        state_of(self.run).loops.rolled_back(self, error)
        logger.warning(
            f"chunk {number} of loop {self.name!r} is tried again: "
            f"{cause_of(error, self.database.kind)}"
        )
        return True


def chunks(
    source: Any,
    size: int,
    name: str | None,
    pause: float,
    retry_chunk: bool,
    total: bool = False,
    file: File | None = None,
    **order: Any,
) -> Chunks[Any]:
    """Implements BaseTask.chunks(), which documents the arguments. Raises ChunkError."""
    if not (isinstance(size, int) and size > 0):
        raise ChunkError(f"size={size!r}; allowed: an int from 1")
    return Chunks(_source(source, size, file, order), name, pause, retry_chunk, total)


def _source(source: Any, size: int, file: File | None, order: dict[str, Any]) -> Source[Any]:
    if isinstance(source, Executable):
        if order["key"] is None:
            raise ChunkError(
                "key= is missing: the columns that identify the rows of the select, such as "
                "key=User.id"
            )
        return Pages(cast(Select[Any], source), size=size, **order)
    if given := [f"{name}=" for name, value in order.items() if value is not None]:
        raise ChunkError(
            f"{', '.join(given)} is for a select, and chunks() was given a {type(source).__name__}"
        )
    if isinstance(source, CursorSource):
        return CursorPages(source, size)
    if isinstance(source, AsyncIterable | Iterable) and not isinstance(source, str | bytes):
        return Items(source, size, file)
    raise ChunkError(
        f"chunks() was given a {type(source).__name__}; allowed: a select(), an iterable, an async "
        "iterable, or an object with `async def after(self, cursor, size)`"
    )


def _database() -> Database:
    try:
        return application_database()
    except RuntimeError:  # no event loop is running here
        raise TypeError(NEEDS_ASYNC) from None


class Chunk(Generic[T]):
    """`async with chunk as (db, items):` is one transaction. The end of the block commits it, an
    error rolls it back.

    Attributes:
      number: The number of the chunk in its loop, from 1, over all attempts of the run.
      db: The session. It exists only inside the block.
      items: The items. Those of a select exist only inside the block, others also before it.
      error: The error that rolled the chunk back, if any.
    """

    db: AsyncSession

    def __init__(self, loop: Chunks[T]) -> None:
        self._loop = loop
        self.number = loop.position.chunks + 1
        self.was_entered = self.is_open = False
        self.error: BaseException | None = None

    @property
    def items(self) -> list[T]:
        """Raises ChunkError before the block."""
        if self.was_entered:
            return self._page.items
        if (ahead := self._loop.source.next_items) is None:
            raise ChunkError(
                f"chunk {self.number} has its items inside `async with chunk as (db, items):`"
            )
        return ahead

    async def __aenter__(self) -> tuple[AsyncSession, list[T]]:
        if self.was_entered:
            raise ChunkError(
                f"chunk {self.number} was entered already: ask the loop for the next one"
            )
        while True:
            try:
                await self._begin()
                return self.db, self._page.items
            except BaseException as error:
                await self._end()
                self.error = error
                if not self._loop.failed(self.number, error):
                    raise
                await asyncio.sleep(FIRST_WAIT)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        try:
            if error is None:
                await self._commit()
        except BaseException as raised:
            await self._end()
            self.error = raised
            if not self._loop.failed(self.number, raised):
                raise
            return False
        await self._end()
        self.error = error
        return error is not None and self._loop.failed(self.number, error)

    async def _begin(self) -> None:
        self.was_entered = self.is_open = True
        self.error = None
        self._guard = Guard()
        self.db = self._loop.database.session()
        self.db.info["advice"] = SMALLER
        self._guard.watch(self.db.sync_session, self.number)
        self._page = await self._loop.source.load(self.db, self._loop.position.cursor)

    async def _commit(self) -> None:
        self._guard.refuse_if_rolled_back(self.number, is_active=self.db.is_active)
        before, page = self._loop.position, self._page
        after = LoopPosition(page.cursor, before.count + len(page.items), before.chunks + 1)
        if self._loop.run is not None:
            await checkpoints.write(self.db, self._loop.run, self._loop.name, before, after)
        self._guard.is_committing = True
        await self.db.commit()
        self._loop.committed(after, page)

    async def _end(self) -> None:
        """Close the session, which rolls back an open transaction."""
        self.is_open = False
        self._guard.is_over = True
        await asyncio.shield(self.db.close())
