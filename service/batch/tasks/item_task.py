"""ItemTask: one thing done for each row of a select, with bad ones set aside."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, ClassVar

from sqlalchemy import Row, Select, inspect
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.orm import InstanceState

from service import failures
from service.batch.chunks import cursor_json, quarantine
from service.batch.chunks.chunks import Chunks
from service.batch.chunks.keyset_pages import Page, Pages
from service.batch.context import current_run
from service.batch.tasks.base import BaseTask
from service.batch.tasks.policies import Retry
from service.batch.tasks.retry_after import seconds_asked
from service.database.engine import Database
from service.database.session import application_database
from service.database.troubles import is_transient
from service.errors import ChunkError, InvalidTask
from service.logs import get_logger

logger = get_logger("service.batch")


@dataclass(frozen=True)
class Skip:
    """Which errors of an item set it aside instead of failing the run, and how many items of one run at most."""

    limit: int
    on: type[Exception] | tuple[type[Exception], ...] = Exception

    def __post_init__(self) -> None:
        if isinstance(self.limit, bool) or not isinstance(self.limit, int) or self.limit < 1:
            raise InvalidTask(f"Skip(limit) is {self.limit!r}; allowed: an int from 1")
        kinds = self.on if isinstance(self.on, tuple) else (self.on,)
        if not kinds or not all(isinstance(kind, type) and issubclass(kind, Exception) for kind in kinds):
            raise InvalidTask(f"Skip(on) is {self.on!r}; allowed: an exception class, or a tuple of some")


class ItemTask(BaseTask):
    """A task that does one thing for each row of a select: `items()`, `fetch()` if it waits for others, `save()`.

    Attributes:
        key: The columns that tell the rows apart, as in `chunks()`; default: the primary key of the selected class.
        size: Items in one transaction.
        concurrency: How many `fetch()` calls wait at the same time.
        total: Count the items when a run begins, as in `chunks()`.
        skip: A Skip(…): which errors set an item aside; None: an item that fails, fails the run.
        item_retry: How often one item is tried, and for which errors, before it counts as failed. `fetch()` waits
            between, as `Retry-After` says too; `save()`, whose transaction is open, does not.
    """

    key: ClassVar[Any] = None
    size: ClassVar[int] = 100
    concurrency: ClassVar[int] = 1
    total: ClassVar[bool] = False
    skip: ClassVar[Skip | None] = None
    item_retry: ClassVar[Retry] = Retry(attempts=3, wait=1.0, on=(ConnectionError, TimeoutError))

    @abstractmethod
    def items(self) -> Select[Any]:
        """The select: of a mapped class, or of columns; without an order or a limit."""

    async def fetch(self, item: Any) -> Any:
        """What has to be waited for outside, for one item; no transaction is open. `save()` gets what it returns."""
        return None

    @abstractmethod
    async def save(self, item: Any, fetched: Any, db: AsyncSession) -> None:
        """Write what came of one item, in a savepoint of its chunk's transaction; never commit."""

    async def run(self, redrive: str | None = None, items: list[str] | None = None) -> dict[str, int]:
        """`redrive`: the id of a run, of which the items that were set aside are done again; `items`: only these."""
        work = _Work(self)
        await work.begin(redrive, items)
        chunks: Chunks[Any] = Chunks(work, name=None, pause=0, retry_chunk=True, total=self.total)
        async for chunk in chunks:
            async with chunk as (db, found):
                for item in found:
                    await work.do(db, item)
            if chunk.error is None:
                work.committed()
        return {"done": chunks.done - work.set_aside, "set_aside": work.set_aside}


@dataclass(frozen=True)
class _Fetched:
    """What came of `fetch()` for one item, after so many tries."""

    value: Any = None
    error: Exception | None = None
    tries: int = 1


class _Work:
    """Where the loop has its items from, and what is done about each: fetched outside, saved in a savepoint."""

    def __init__(self, task: ItemTask) -> None:
        self._task = task
        self._run = current_run.current_run_if_any()
        self._has_fetch = type(task).fetch is not ItemTask.fetch
        self._room = asyncio.Semaphore(task.concurrency)
        self._fetched: dict[tuple[Any, ...], _Fetched] = {}
        self._fetched_behind: Any = self  # no cursor yet
        self._in_chunk = 0
        self.set_aside = 0

    async def begin(self, redrive: str | None, items: list[str] | None) -> None:
        """Raises ChunkError when nothing is there to be done again."""
        statement = self._task.items()
        self._redrive = redrive
        self._pages: Pages[Any] = Pages(statement, self._task.key or _primary_key(statement), self._size)
        if self._run is not None:
            self.set_aside = await quarantine.count(application_database(), self._run.id)
        if redrive is not None:
            keys = await _keys_of(redrive, items, len(self._pages.key.columns))
            only = statement.where(self._pages.key.among(keys))
            self._pages = Pages(only, self._task.key or _primary_key(statement), self._size)

    @property
    def _size(self) -> int:
        return max(self._task.size, self._task.concurrency)

    @property
    def next_items(self) -> None:
        return None

    async def has_more(self, database: Database, cursor: Any) -> bool:
        if not self._has_fetch:
            return await self._pages.has_more(database, cursor)
        if self._fetched_behind != cursor:
            async with database.session(readonly=True) as db:
                page = await self._pages.load(db, cursor)
            await self._fetch(page.items)
            self._fetched_behind = cursor
        return bool(self._fetched)

    async def load(self, db: AsyncSession, cursor: Any) -> Page[Any]:
        """As far as all is fetched: a row that came in between waits for the next chunk."""
        self._in_chunk = 0
        page = await self._pages.load(db, cursor)
        if not self._has_fetch:
            return page
        items = list(takewhile(lambda item: self._pages.key_of(item) in self._fetched, page.items))
        if len(items) < len(page.items):
            self._fetched_behind = self
        behind = cursor_json.encode(self._pages.key_of(items[-1])) if items else cursor
        return Page(items, behind, is_last=True)

    async def count(self, connection: AsyncConnection, cursor: Any) -> int | None:
        return await self._pages.count(connection, cursor)

    async def do(self, db: AsyncSession, item: Any) -> None:
        key = self._pages.key_of(item)
        fetched = self._fetched.get(key, _Fetched())
        failed = fetched if fetched.error is not None else await self._save(db, item, fetched.value)
        if failed is not None:
            await self._set_aside(db, key, failed)
        if self._redrive is not None and self._run is not None:
            await quarantine.redriven(db, self._redrive, key, self._run.id)

    def committed(self) -> None:
        self.set_aside += self._in_chunk

    async def _fetch(self, items: list[Any]) -> None:
        """Those that are not fetched yet. What an earlier page left is dropped."""
        keys = [self._pages.key_of(item) for item in items]
        known = {key: self._fetched[key] for key in keys if key in self._fetched}
        missing = [(key, item) for key, item in zip(keys, items, strict=True) if key not in known]
        async with asyncio.TaskGroup() as group:
            waiting = {key: group.create_task(self._fetch_one(item)) for key, item in missing}
        self._fetched = known | {key: task.result() for key, task in waiting.items()}

    async def _fetch_one(self, item: Any) -> _Fetched:
        retry = self._task.item_retry
        tries = 0
        while True:
            tries += 1
            try:
                async with self._room:
                    return _Fetched(await self._task.fetch(item), tries=tries)
            except Exception as error:  # noqa: BLE001 - an author's; what is not set aside is raised in its turn
                asked = seconds_asked(error)
                if tries >= retry.attempts or not (isinstance(error, retry.on) or asked is not None):
                    return _Fetched(error=error, tries=tries)
                await asyncio.sleep(retry.seconds_before(tries + 1, asked))

    async def _save(self, db: AsyncSession, item: Any, value: Any) -> _Fetched | None:
        """None when it went well. What the database refuses for the moment is for the whole chunk to be tried again."""
        retry = self._task.item_retry
        tries = 0
        while True:
            tries += 1
            try:
                async with db.begin_nested():
                    await self._task.save(item, value, db)
                return None
            except Exception as error:  # an author's; what is not set aside is raised again
                if isinstance(error, DBAPIError) and is_transient(error):
                    raise
                if tries >= retry.attempts or not isinstance(error, retry.on):
                    return _Fetched(error=error, tries=tries)
                await _refresh(db, item)

    async def _set_aside(self, db: AsyncSession, key: tuple[Any, ...], failed: _Fetched) -> None:
        skip, error = self._task.skip, failed.error
        assert error is not None
        if skip is None or self._run is None or not isinstance(error, skip.on):
            raise error
        told = quarantine.as_text(key)
        if self.set_aside + self._in_chunk >= skip.limit:
            raise ChunkError(
                f"item {told} failed too ({failures.line_of(error)}), and {skip.limit} are set aside already, "
                "which is the limit that skip= gives"
            ) from error
        self._in_chunk += 1
        logger.warning(f"item {told} is set aside: {failures.line_of(error)}")
        await quarantine.set_aside(db, self._run, key, error, failed.tries)


async def _refresh(db: AsyncSession, item: Any) -> None:
    """What was changed in a savepoint that is rolled back has to be read again, and an attribute can't wait for it."""
    for one in item if isinstance(item, Row) else (item,):
        state = inspect(one, raiseerr=False)
        if isinstance(state, InstanceState) and state.expired:
            await db.refresh(one)


async def _keys_of(run: str, items: Collection[str] | None, columns: int) -> list[tuple[Any, ...]]:
    found = await quarantine.listed(application_database(), run, items)
    left = [one for one in found if one.redriven_by is None]
    if not left or (items is not None and len(found) < len(items)):
        known = {one.item for one in found}
        named = ", ".join(item for item in items or () if item not in known)
        raise ChunkError(f"run {run} has no items set aside that are not done again yet{named and f': {named}'}")
    return [quarantine.from_text(one.item, columns) for one in left]


def _primary_key(statement: Select[Any]) -> tuple[Any, ...]:
    entity = inspect(statement.column_descriptions[0]["expr"], raiseerr=False)
    if not (getattr(entity, "is_mapper", False) or getattr(entity, "is_aliased_class", False)):
        raise ChunkError("items() selects columns, so say which of them tell its rows apart: key = User.id")
    mapper = entity.mapper
    return tuple(getattr(entity.entity, mapper.get_property_by_column(column).key) for column in mapper.primary_key)
