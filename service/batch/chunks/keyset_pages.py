"""A select in pages by key: never by offset, which skips rows when those before it change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from sqlalchemy import Select, func, select
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from service.batch.chunks import cursor_json
from service.batch.chunks.keys import Key
from service.database.engine import Database
from service.errors import ChunkError

T = TypeVar("T")


@dataclass(frozen=True)
class Page(Generic[T]):
    """`cursor`: the place behind its last item, as JSON. `is_last`: whether it seemed so when it was read."""

    items: list[T]
    cursor: Any
    is_last: bool = False


class Source(Protocol[T]):
    """Where a loop has its items from. A cursor is JSON, None at the beginning."""

    async def has_more(self, database: Database, cursor: Any) -> bool:
        """Whether something lies behind the cursor; asked outside of a chunk's transaction."""

    @property
    def ahead(self) -> list[T] | None:
        """What the next page holds, where that is known before it is loaded."""

    async def load(self, db: AsyncSession, cursor: Any) -> Page[T]:
        """What lies behind it, in the chunk's transaction."""

    async def count(self, connection: AsyncConnection, cursor: Any) -> int | None:
        """How many items lie behind it; None where that can't be known."""


class Pages(Generic[T]):
    """The rows of a select, in the order of a key that tells them apart."""

    def __init__(self, statement: Select[Any], key: Any, size: int, start: Any = None, stop: Any = None) -> None:
        """`start` is included, `stop` is not; both in the order of the key. Raises ChunkError."""
        _refuse_own_order(statement)
        self._size = size
        self.key = Key(statement, key)
        self._first = statement.where(*self.key.bounds(start, stop))
        self._next = self._first.where(self.key.behind("batch_key_"))
        self._at = _unlocked(self._first).where(self.key.at("batch_key_")).limit(1)
        # Made once: for the same object SQLAlchemy finds faster what it has compiled.
        self._first_page, self._next_page = self._page_of(self._first), self._page_of(self._next)
        descriptions = statement.column_descriptions
        self._is_single = len(descriptions) == 1
        self._is_entity = self._is_single and isinstance(descriptions[0]["type"], type)

    def key_of(self, item: T) -> tuple[Any, ...]:
        return self.key.read((item,) if self._is_single else item)

    async def has_more(self, database: Database, cursor: Any) -> bool:
        statement, values = self._behind(cursor, self._first, self._next)
        async with database.session(readonly=True) as db:
            return (await db.execute(_unlocked(statement).limit(1), values)).first() is not None

    @property
    def ahead(self) -> list[T] | None:
        return None  # its rows are read inside the transaction that may change them

    async def load(self, db: AsyncSession, cursor: Any) -> Page[T]:
        """One row more than the page holds is read: it says whether there is a next one, and whether the key is one."""
        statement, values = self._behind(cursor, self._first_page, self._next_page)
        result = await db.execute(statement, values)
        found: Any = result.scalars() if self._is_single else result
        # Of an entity that a join repeats each is one item, as everywhere in SQLAlchemy's ORM.
        rows = list((found.unique() if self._is_entity else found).all())
        if not rows:
            return Page([], cursor, is_last=True)
        items, rest = rows[: self._size], rows[self._size :]
        last = self.key_of(items[-1])
        if rest and self.key_of(rest[0]) == last:
            raise ChunkError(
                f"two rows have the key {last!r}, so the second would be skipped at the end of a chunk: "
                "add columns to key= until it tells all rows apart"
            )
        await self._refuse_another_form(db, last)
        return Page(items, cursor_json.encode(last), is_last=not rest)

    async def _refuse_another_form(self, db: AsyncSession, last: tuple[Any, ...]) -> None:
        """SQLite compares times as texts: by one that it holds otherwise the next page would not begin behind it."""
        if db.get_bind().dialect.name != "sqlite" or not self.key.has_several_forms:
            return
        found = await db.execute(self._at, self.key.parameters("batch_key_", last))
        if found.first() is None:
            told = ", ".join(str(one.column) for one in self.key.columns)
            raise ChunkError(
                f"SQLite holds a value of key={told} otherwise than SQLAlchemy writes it, as CURRENT_TIMESTAMP, which "
                "has no microseconds, does: rows would be skipped. Have Python make that value (default=clock.now in "
                "place of server_default=func.now()), or choose another key"
            )

    async def count(self, connection: AsyncConnection, cursor: Any) -> int | None:
        statement, values = self._behind(cursor, self._first, self._next)
        counted = select(func.count()).select_from(_unlocked(statement).subquery())
        return int((await connection.execute(counted, values)).scalar_one())

    def _page_of(self, statement: Select[Any]) -> Select[Any]:
        return statement.order_by(*self.key.order).limit(self._size + 1)

    def _behind(self, cursor: Any, first: Select[Any], later: Select[Any]) -> tuple[Select[Any], dict[str, Any]]:
        if cursor is None:
            return first, {}
        return later, self.key.parameters("batch_key_", cursor_json.decode(cursor))


def _refuse_own_order(statement: Select[Any]) -> None:
    if not isinstance(statement, Select):
        raise ChunkError(
            f"chunks() was given a {type(statement).__name__}; allowed: a select(). "
            "Make one of it with select(….subquery())"
        )
    own = {
        "ORDER BY": bool(statement._order_by_clauses),
        "LIMIT": statement._limit_clause is not None or statement._fetch_clause is not None,
        "OFFSET": statement._offset_clause is not None,
    }
    if found := [name for name, is_there in own.items() if is_there]:
        raise ChunkError(
            f"the select has its own {' and '.join(found)}, and chunks() orders and limits by itself: leave it out, "
            "give the order as key=, the number of rows as size=, and bounds as start= and stop="
        )
    if statement._for_update_arg is not None and statement._for_update_arg.skip_locked:
        raise ChunkError(
            "with_for_update(skip_locked=True) would pass over rows that others hold: leave skip_locked out"
        )


def _unlocked(statement: Select[Any]) -> Select[Any]:
    """The same without FOR UPDATE, which is for the chunk's own transaction."""
    if statement._for_update_arg is None:
        return statement
    copy = statement._clone()
    copy._for_update_arg = None
    return copy
