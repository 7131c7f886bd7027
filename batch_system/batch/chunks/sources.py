"""Sources of items that are not rows of a select: lines of a file, a list, an async iterator, pages
of an API.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, Generic, Protocol, TypeVar, runtime_checkable

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from batch_system.batch.chunks.keyset_pages import Page
from batch_system.database.engine import Database
from batch_system.errors import ChunkError

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

File = str | os.PathLike[str] | IO[Any]


@runtime_checkable
class CursorSource(Protocol[T_co]):
    """A source that returns pages by a cursor of its own, such as an API with page tokens."""

    async def after(self, cursor: Any, size: int) -> tuple[Sequence[T_co], Any]:
        """About `size` items after `cursor`, and the cursor after them.

        A cursor is any JSON value. As an argument, None stands for the beginning; as a result, for
        the end.
        """


class CursorPages(Generic[T]):
    """The pages of a CursorSource, which are fetched outside the chunk's transaction."""

    def __init__(self, source: CursorSource[T], size: int) -> None:
        self._source = source
        self._size = size
        self._page: tuple[Any, Sequence[T], Any] | None = None

    async def has_more(self, database: Database, cursor: Any) -> bool:
        if self._page is None or self._page[0] != cursor:
            at = None if cursor is None else cursor["at"]
            if cursor is not None and at is None:
                return False
            items, following = await self._source.after(at, self._size)
            self._page = cursor, items, {"at": following}
        return bool(self._page[1]) or self._page[2]["at"] is not None

    @property
    def next_items(self) -> list[T] | None:
        return list(self._page[1]) if self._page is not None else None

    async def load(self, db: AsyncSession, cursor: Any) -> Page[T]:
        assert self._page is not None
        return Page(list(self._page[1]), self._page[2], is_last=True)

    async def count(self, connection: AsyncConnection, cursor: Any) -> int | None:
        return None


class Items(Generic[T]):
    """The items of an iterable or async iterable. The cursor is the number of items done, which a
    later attempt skips.

    A sync iterable that is not a sequence is read in a thread. If the items come from a `file`, the
    cursor also holds its size and modification time, because the number means nothing in a changed
    file.
    """

    def __init__(
        self, source: Iterable[T] | AsyncIterable[T], size: int, file: File | None = None
    ) -> None:
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
            self._at = position
            self._buffer = list(self._source[position : position + self._size])
        elif self._at + len(self._buffer) <= position:
            await self._skip(position)
            self._buffer = await self._take(self._size)
            self._at = position
        return bool(self._buffer)

    @property
    def next_items(self) -> list[T] | None:
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
                    f"the source has only {at:,} items, but {position:,} are done already: it has "
                    "changed"
                )
            at += taken

    async def _check(self, file: File, cursor: Any) -> None:
        name = os.fspath(file.name if hasattr(file, "name") else file)
        status = await asyncio.to_thread(os.stat, name)
        self._stat = {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
        if cursor is not None and cursor["file"] not in (None, self._stat):
            raise ChunkError(
                f"{Path(name).name} has changed since {cursor['position']:,} of its items were "
                "done, so the loop can't go on there: put the old file back, or begin anew with "
                "`batch retry --again`"
            )


def _file_behind(source: Any) -> File | None:
    return (
        source
        if hasattr(source, "fileno") and isinstance(getattr(source, "name", None), str)
        else None
    )


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
