"""Items that are not rows of a select: a file's lines, a list, a listing over HTTP, the pages of an API."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, Generic, Protocol, TypeVar, runtime_checkable

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from service.batch.chunks.keyset_pages import Page
from service.database.engine import Database
from service.errors import ChunkError

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

File = str | os.PathLike[str] | IO[Any]


@runtime_checkable
class CursorSource(Protocol[T_co]):
    """What hands out pages behind a place of its own, such as an API with page tokens."""

    async def after(self, cursor: Any, size: int) -> tuple[Sequence[T_co], Any]:
        """At most about `size` items behind `cursor` (JSON; None: from the beginning), and the cursor behind them.

        None as that cursor says that they are the last ones.
        """


class CursorPages(Generic[T]):
    """The pages of a CursorSource. They are fetched outside of the chunk's transaction."""

    def __init__(self, source: CursorSource[T], size: int) -> None:
        self._source = source
        self._size = size
        self._page: tuple[Any, Sequence[T], Any] | None = None

    async def has_more(self, database: Database, cursor: Any) -> bool:
        if self._page is None or self._page[0] != cursor:
            at = None if cursor is None else cursor["at"]
            if cursor is not None and at is None:
                return False
            items, behind = await self._source.after(at, self._size)
            self._page = cursor, items, {"at": behind}
        return bool(self._page[1]) or self._page[2]["at"] is not None

    @property
    def ahead(self) -> list[T] | None:
        return list(self._page[1]) if self._page is not None else None

    async def load(self, db: AsyncSession, cursor: Any) -> Page[T]:
        assert self._page is not None
        return Page(list(self._page[1]), self._page[2], is_last=True)

    async def count(self, connection: AsyncConnection, cursor: Any) -> int | None:
        return None


class Items(Generic[T]):
    """An iterable, or an async one. The place in it is a position: a later attempt passes over what is done.

    A sync one that is no sequence is read in a thread. Of a file the size and the time of its last change are kept
    with the place: behind a changed one's position there is something else.
    """

    def __init__(self, source: Iterable[T] | AsyncIterable[T], size: int, file: File | None = None) -> None:
        self._source = source
        self._size = size
        self._file = file if file is not None else _file_behind(source)
        self._take = _taker(source)
        self._at = 0
        self._buffer: list[T] = []
        self._stat: dict[str, int] | None = None

    async def has_more(self, database: Database, cursor: Any) -> bool:
        position = cursor["position"] if cursor is not None else 0
        if self._file is not None:
            await self._check(self._file, cursor)
        if isinstance(self._source, Sequence):
            self._at, self._buffer = position, list(self._source[position : position + self._size])
        elif self._at + len(self._buffer) <= position:
            await self._skip(position)
            self._at, self._buffer = position, await self._take(self._size)
        return bool(self._buffer)

    @property
    def ahead(self) -> list[T] | None:
        return self._buffer

    async def load(self, db: AsyncSession, cursor: Any) -> Page[T]:
        position = self._at + len(self._buffer)
        return Page(self._buffer, {"position": position, "file": self._stat}, is_last=True)

    async def count(self, connection: AsyncConnection, cursor: Any) -> int | None:
        if not isinstance(self._source, Sequence):
            return None
        return len(self._source) - (cursor["position"] if cursor is not None else 0)

    async def _skip(self, position: int) -> None:
        at = self._at + len(self._buffer)
        while at < position:
            taken = len(await self._take(min(position - at, 10_000)))
            if not taken:
                raise ChunkError(
                    f"only {at:,} items came, and {position:,} are done already: they are not the same ones"
                )
            at += taken

    async def _check(self, file: File, cursor: Any) -> None:
        name = os.fspath(file.name if hasattr(file, "name") else file)
        found = await asyncio.to_thread(os.stat, name)
        self._stat = {"size": found.st_size, "mtime_ns": found.st_mtime_ns}
        if cursor is not None and cursor["file"] not in (None, self._stat):
            raise ChunkError(
                f"{Path(name).name} has changed since {cursor['position']:,} of its items were done, so that number "
                "means nothing any more: put the old file back, or begin anew with `batch retry --again`"
            )


def _file_behind(source: Any) -> File | None:
    return source if hasattr(source, "fileno") and isinstance(getattr(source, "name", None), str) else None


def _taker(source: Iterable[T] | AsyncIterable[T]) -> Callable[[int], Awaitable[list[T]]]:
    if isinstance(source, AsyncIterable):
        return partial(_take_async, aiter(source))
    return partial(_take_in_thread, iter(source))


async def _take_async(iterator: Any, size: int) -> list[Any]:
    taken: list[Any] = []
    while len(taken) < size:
        try:
            taken.append(await anext(iterator))
        except StopAsyncIteration:
            break
    return taken


async def _take_in_thread(iterator: Any, size: int) -> list[Any]:
    return await asyncio.to_thread(lambda: list(islice(iterator, size)))
