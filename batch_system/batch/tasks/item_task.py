"""ItemTask: a task that processes each row of a select, and sets aside the rows that fail."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Callable, Collection
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from inspect import isasyncgenfunction, iscoroutinefunction
from itertools import takewhile
from typing import Any, ClassVar, Generic, cast

from sqlalchemy import Row, Select, inspect
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.orm import InstanceState
from typing_extensions import TypeVar

from batch_system import failures
from batch_system.batch.chunks import cursor_json, quarantine
from batch_system.batch.chunks.chunks import Chunks
from batch_system.batch.chunks.keyset_pages import Page, Pages
from batch_system.batch.context import current_run
from batch_system.batch.tasks.base import BaseTask
from batch_system.batch.tasks.declaration import Retry
from batch_system.batch.tasks.retry_after import seconds_asked
from batch_system.database.engine import Database
from batch_system.database.session import application_database
from batch_system.database.troubles import is_transient
from batch_system.errors import ChunkError, InvalidTask
from batch_system.logs import get_logger

logger = get_logger("batch_system.batch")

Item = TypeVar("Item", default=Any)
Fetched = TypeVar("Fetched", default=Any)


@dataclass(frozen=True)
class Skip:
    """Which errors of an item put it into quarantine instead of failing the run, and for how many
    items of one run.

    Raises InvalidTask.
    """

    limit: int
    on: type[Exception] | tuple[type[Exception], ...] = Exception

    def __post_init__(self) -> None:
        if isinstance(self.limit, bool) or not isinstance(self.limit, int) or self.limit < 1:
            raise InvalidTask(f"Skip(limit) is {self.limit!r}; allowed: an int from 1")
        kinds = self.on if isinstance(self.on, tuple) else (self.on,)
        if not kinds or not all(
            isinstance(kind, type) and issubclass(kind, Exception) for kind in kinds
        ):
            raise InvalidTask(
                f"Skip(on) is {self.on!r}; allowed: an exception class, or a tuple of exception "
                "classes"
            )


class ItemTask(BaseTask, Generic[Item, Fetched]):
    """A task that processes each row of a select: `items()` returns the select, `save()` writes the
    result of one row.

    `ItemTask[User, str]` tells type checkers the type of an item and of the result of `fetch()`;
    `ItemTask` leaves both open.

    Attributes:
      key: The columns that identify a row, as in `chunks()`; by default the primary key of the
          selected class.
      size: The number of items in one transaction.
      concurrency: How many `fetch()` calls may wait at the same time.
      total: Whether the items are counted when a run begins, as in `chunks()`.
      skip: Which errors set an item aside; with None an item that fails makes the run fail.
      item_retry: How often one item is tried, and for which errors, before it counts as failed.
          Between two tries `fetch()` waits, for the time of a Retry-After if there is one;
          `save()`, in an open transaction, does not wait.
    """

    key: ClassVar[Any] = None
    size: ClassVar[int] = 100
    concurrency: ClassVar[int] = 1
    total: ClassVar[bool] = False
    skip: ClassVar[Skip | None] = None
    item_retry: ClassVar[Retry] = Retry(attempts=3, wait=1.0, on=(ConnectionError, TimeoutError))

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if isasyncgenfunction(cls.resources) or iscoroutinefunction(cls.resources):
            raise InvalidTask(
                f"{cls.__qualname__}.resources() is no async context manager; allowed: a method "
                "with one `yield` and `@asynccontextmanager` above its `async def`"
            )

    @abstractmethod
    def items(self, *args: Any, **parameters: Any) -> Select[*tuple[Any, ...]]:
        """The select of the rows: a mapped class or columns, without ORDER BY and LIMIT.

        Its parameters are those of a run, besides `redrive` and `items`. It is called once, before
        anything else, so it may store on `self` the values that the other methods need.
        """

    def resources(self) -> AbstractAsyncContextManager[object]:
        """Open the resources that all items of an attempt share, such as an HTTP client.

          @asynccontextmanager
          async def resources(self) -> AsyncGenerator[None]:
              async with httpx.AsyncClient() as self.client:
                  yield

        It is entered after `items()`, and left when the attempt ends.
        """
        return nullcontext()

    async def fetch(self, item: Item, /) -> Fetched:
        """Get the data for one item from other systems, while no transaction is open. `save()`
        receives the result.
        """
        return cast(Fetched, None)

    @abstractmethod
    async def save(self, item: Item, fetched: Fetched, db: AsyncSession, /) -> None:
        """Write the result of one item, in a savepoint of the chunk's transaction. It must not
        commit.
        """

    def _methods_with_parameters(self) -> tuple[Callable[..., Any], ...]:
        return self.run, self.items

    async def run(
        self,
        redrive: str | None = None,
        items: list[str] | None = None,
        *args: Any,
        **parameters: Any,
    ) -> dict[str, int]:
        """Process all rows; with `redrive`, the id of a run, only those that it has set aside, or
        of these only `items`.

        The other parameters are those of `items()`. Returns the number of items saved (`done`) and
        set aside (`set_aside`), over all attempts.
        """
        source = _ItemSource(self, self.items(*args, **parameters))
        await source.begin(redrive, items)
        chunks: Chunks[Any] = Chunks(source, name=None, pause=0, retry_chunk=True, total=self.total)
        async with self.resources():
            async for chunk in chunks:
                async with chunk as (db, rows):
                    for row in rows:
                        await source.process(db, row)
                if chunk.error is None:
                    source.committed()
        return {"done": chunks.done - source.set_aside, "set_aside": source.set_aside}


@dataclass(frozen=True)
class _Attempted:
    """The result of `fetch()`, or the error of `fetch()` or `save()`, for one item after this
    number of tries.
    """

    value: Any = None
    error: Exception | None = None
    tries: int = 1


class _ItemSource:
    """The source of an item task's loop. It fetches items outside transactions, and saves each in a
    savepoint.
    """

    def __init__(self, task: ItemTask, statement: Select[*tuple[Any, ...]]) -> None:
        self._task = task
        self._statement = statement
        self._run = current_run.current_run_if_any()
        self._has_fetch = type(task).fetch is not ItemTask.fetch
        self._fetch_slots = asyncio.Semaphore(task.concurrency)
        self._fetched: dict[tuple[Any, ...], _Attempted] = {}
        self._fetched_after: Any = self  # the cursor of the fetched page; self is no cursor
        self._in_chunk = 0
        self.set_aside = 0

    async def begin(self, redrive: str | None, items: list[str] | None) -> None:
        """Prepare the select. Raises ChunkError if the run `redrive` has no items in quarantine."""
        statement = self._statement
        self._redrive = redrive
        self._pages: Pages[Any] = Pages(
            statement, self._task.key or _primary_key(statement), self._size
        )
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
        if self._fetched_after != cursor:
            async with database.session(readonly=True) as db:
                page = await self._pages.load(db, cursor)
            await self._fetch(page.items)
            self._fetched_after = cursor
        return bool(self._fetched)

    async def load(self, db: AsyncSession, cursor: Any) -> Page[Any]:
        """The page up to the first row that was not fetched. A row that was inserted since then is
        left to the next chunk.
        """
        self._in_chunk = 0
        page = await self._pages.load(db, cursor)
        if not self._has_fetch:
            return page
        items = list(takewhile(lambda item: self._pages.key_of(item) in self._fetched, page.items))
        if len(items) < len(page.items):
            self._fetched_after = self
        following = cursor_json.encode(self._pages.key_of(items[-1])) if items else cursor
        return Page(items, following, is_last=True)

    async def count(self, connection: AsyncConnection, cursor: Any) -> int | None:
        return await self._pages.count(connection, cursor)

    async def process(self, db: AsyncSession, item: Any) -> None:
        """Save one item, or set it aside; in a redrive, also record which run processed it."""
        key = self._pages.key_of(item)
        fetched = self._fetched.get(key, _Attempted())
        failed = fetched if fetched.error is not None else await self._save(db, item, fetched.value)
        if failed is not None:
            await self._set_aside(db, key, failed)
        if self._redrive is not None and self._run is not None:
            await quarantine.redriven(db, self._redrive, key, self._run.id)

    def committed(self) -> None:
        self.set_aside += self._in_chunk

    async def _fetch(self, items: list[Any]) -> None:
        """Fetch the items that are not fetched yet, and drop the results for other items."""
        keys = [self._pages.key_of(item) for item in items]
        known = {key: self._fetched[key] for key in keys if key in self._fetched}
        missing = [(key, item) for key, item in zip(keys, items, strict=True) if key not in known]
        async with asyncio.TaskGroup() as group:
            fetches = {key: group.create_task(self._fetch_one(item)) for key, item in missing}
        self._fetched = known | {key: task.result() for key, task in fetches.items()}

    async def _fetch_one(self, item: Any) -> _Attempted:
        retry = self._task.item_retry
        tries = 0
        while True:
            tries += 1
            try:
                async with self._fetch_slots:
                    return _Attempted(await self._task.fetch(item), tries=tries)
            except Exception as error:  # noqa: BLE001
                # An author's error, which sets the item aside or is raised later.
                asked = seconds_asked(error)
                if tries >= retry.attempts or not (
                    isinstance(error, retry.on) or asked is not None
                ):
                    return _Attempted(error=error, tries=tries)
                await asyncio.sleep(retry.seconds_before(tries + 1, asked))

    async def _save(self, db: AsyncSession, item: Any, value: Any) -> _Attempted | None:
        """Save one item; returns the error if it fails. A transient error of the database is
        raised, for the chunk.
        """
        retry = self._task.item_retry
        tries = 0
        while True:
            tries += 1
            try:
                async with db.begin_nested():
                    await self._task.save(item, value, db)
                return None
            except (
                Exception
            ) as error:  # an author's error; it sets the item aside, or is raised later
                if isinstance(error, DBAPIError) and is_transient(error):
                    raise
                if tries >= retry.attempts or not isinstance(error, retry.on):
                    return _Attempted(error=error, tries=tries)
                await _refresh(db, item)

    async def _set_aside(self, db: AsyncSession, key: tuple[Any, ...], failed: _Attempted) -> None:
        skip, error = self._task.skip, failed.error
        assert error is not None
        if skip is None or self._run is None or not isinstance(error, skip.on):
            raise error
        item = quarantine.as_text(key)
        if self.set_aside + self._in_chunk >= skip.limit:
            raise ChunkError(
                f"item {item} failed too ({failures.line_of(error)}), and {skip.limit} are set "
                "aside already, "
                "which is the limit of skip="
            ) from error
        self._in_chunk += 1
        logger.warning(f"item {item} is set aside: {failures.line_of(error)}")
        await quarantine.set_aside(db, self._run, key, error, failed.tries)


async def _refresh(db: AsyncSession, item: Any) -> None:
    """Read the entities of an item again that a rolled-back savepoint has expired, because
    attribute access can't await.
    """
    for entity in item if isinstance(item, Row) else (item,):
        state = inspect(entity, raiseerr=False)
        if isinstance(state, InstanceState) and state.expired:
            await db.refresh(entity)


async def _keys_of(run: str, items: Collection[str] | None, columns: int) -> list[tuple[Any, ...]]:
    """The keys of the items that a run has set aside and no run has processed since. Raises
    ChunkError if there are none.
    """
    set_aside = await quarantine.listed(application_database(), run, items)
    left = [entry for entry in set_aside if entry.redriven_by is None]
    if not left or (items is not None and len(set_aside) < len(items)):
        known = {entry.item for entry in set_aside}
        unknown = ", ".join(item for item in items or () if item not in known)
        raise ChunkError(
            f"run {run} has no items set aside that are not processed "
            f"yet{unknown and f': {unknown}'}"
        )
    return [quarantine.from_text(entry.item, columns) for entry in left]


def _primary_key(statement: Select[*tuple[Any, ...]]) -> tuple[Any, ...]:
    entity = inspect(statement.column_descriptions[0]["expr"], raiseerr=False)
    if not (getattr(entity, "is_mapper", False) or getattr(entity, "is_aliased_class", False)):
        raise ChunkError(
            "items() selects columns, so name those that identify a row, such as key = User.id"
        )
    mapper = entity.mapper
    return tuple(
        getattr(entity.entity, mapper.get_property_by_column(column).key)
        for column in mapper.primary_key
    )
