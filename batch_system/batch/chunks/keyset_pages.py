"""Reads a select in pages by key. An offset would skip or repeat rows when earlier rows change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from sqlalchemy import Select, func, select
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from batch_system.batch.chunks import cursor_json
from batch_system.batch.chunks.keys import Key
from batch_system.database.engine import Database
from batch_system.errors import ChunkError

T = TypeVar("T")


@dataclass(frozen=True)
class Page(Generic[T]):
    """The items of a chunk.

    Attributes:
      cursor: The position after the last item, as JSON.
      is_last: Whether there were no more items when the page was read.
    """

    items: list[T]
    cursor: Any
    is_last: bool = False


class Source(Protocol[T]):
    """Where the items of a loop come from. A cursor is JSON, and None at the beginning."""

    async def has_more(self, database: Database, cursor: Any) -> bool:
        """Whether there are items after the cursor. It is called outside a chunk's transaction."""

    @property
    def next_items(self) -> list[T] | None:
        """The items of the next page; None if they are not known before it is loaded."""

    async def load(self, db: AsyncSession, cursor: Any) -> Page[T]:
        """The next page after the cursor, in the chunk's transaction."""

    async def count(self, connection: AsyncConnection, cursor: Any) -> int | None:
        """The number of items after the cursor; None if it can't be known."""


class Pages(Generic[T]):
    """The rows of a select, in the order of a unique key."""

    def __init__(
        self, statement: Select[Any], key: Any, size: int, start: Any = None, stop: Any = None
    ) -> None:
        """`start` is included, `stop` is not; both in the order of the key. Raises ChunkError."""
        _refuse_own_order(statement)
        self._size = size
        self.key = Key(statement, key)
        self._first = statement.where(*self.key.bounds(start, stop))
        self._next = self._first.where(self.key.behind("batch_key_"))
        self._at = _unlocked(self._first).where(self.key.at("batch_key_")).limit(1)
        # Built once, because SQLAlchemy finds the compiled form of the same statement object
        # faster.
        self._first_page = self._page_of(self._first)
        self._next_page = self._page_of(self._next)
        descriptions = statement.column_descriptions
        self._is_single = len(descriptions) == 1
        self._is_entity = self._is_single and isinstance(descriptions[0]["type"], type)

    def key_of(self, item: T) -> tuple[Any, ...]:
        """The values of the item's key."""
        return self.key.read((item,) if self._is_single else item)

    async def has_more(self, database: Database, cursor: Any) -> bool:
        statement, values = self._behind(cursor, self._first, self._next)
        async with database.session(readonly=True) as db:
            return (await db.execute(_unlocked(statement).limit(1), values)).first() is not None

    @property
    def next_items(self) -> list[T] | None:
        return None  # the rows are read inside the transaction that may change them

    async def load(self, db: AsyncSession, cursor: Any) -> Page[T]:
        """Read the page and one more row, which shows whether there is a next page and whether the
        key is unique.
        """
        statement, values = self._behind(cursor, self._first_page, self._next_page)
        result = await db.execute(statement, values)
        results: Any = result.scalars() if self._is_single else result
        # An entity that a join repeats is one item, as elsewhere in SQLAlchemy's ORM.
        rows = list((results.unique() if self._is_entity else results).all())
        if not rows:
            return Page([], cursor, is_last=True)
        items, rest = rows[: self._size], rows[self._size :]
        last = self.key_of(items[-1])
        if rest and self.key_of(rest[0]) == last:
            raise ChunkError(
                f"two rows have the key {last!r}, so the second would be skipped at the end of a "
                "chunk: "
                "add columns to key= until no two rows share it"
            )
        await self._refuse_another_form(db, last)
        return Page(items, cursor_json.encode(last), is_last=not rest)

    async def _refuse_another_form(self, db: AsyncSession, last: tuple[Any, ...]) -> None:
        """Refuse a row that SQLite does not find by its own key, because the next page would not
        begin after it.

        SQLite stores and compares dates and numbers of fixed precision as text, and that text may
        have another format.
        """
        if db.get_bind().dialect.name != "sqlite" or not self.key.has_several_forms:
            return
        result = await db.execute(self._at, self.key.parameters("batch_key_", last))
        if result.first() is None:
            columns = ", ".join(str(part.column) for part in self.key.columns)
            raise ChunkError(
                f"SQLite has a value of key={columns} in another format than SQLAlchemy writes, "
                "such as a timestamp of CURRENT_TIMESTAMP, which has no microseconds: rows would "
                "be skipped. Let Python make the value (default=clock.now instead of "
                "server_default=func.now()), or choose another key"
            )

    async def count(self, connection: AsyncConnection, cursor: Any) -> int | None:
        statement, values = self._behind(cursor, self._first, self._next)
        query = select(func.count()).select_from(_unlocked(statement).subquery())
        return int((await connection.execute(query, values)).scalar_one())

    def _page_of(self, statement: Select[Any]) -> Select[Any]:
        return statement.order_by(*self.key.order).limit(self._size + 1)

    def _behind(
        self, cursor: Any, first: Select[Any], later: Select[Any]
    ) -> tuple[Select[Any], dict[str, Any]]:
        if cursor is None:
            return first, {}
        return later, self.key.parameters("batch_key_", cursor_json.decode(cursor))


def _refuse_own_order(statement: Select[Any]) -> None:
    if not isinstance(statement, Select):
        raise ChunkError(
            f"chunks() was given a {type(statement).__name__}; allowed: a select(). "
            "Make it a select with select(….subquery())"
        )
    clauses = {
        "ORDER BY": bool(statement._order_by_clauses),
        "LIMIT": statement._limit_clause is not None or statement._fetch_clause is not None,
        "OFFSET": statement._offset_clause is not None,
    }
    if present := [name for name, is_present in clauses.items() if is_present]:
        raise ChunkError(
            f"the select has its own {' and '.join(present)}, and chunks() orders and limits by "
            "itself: leave it out, "
            "give the order as key=, the number of rows as size=, and bounds as start= and stop="
        )
    if statement._for_update_arg is not None and statement._for_update_arg.skip_locked:
        raise ChunkError(
            "with_for_update(skip_locked=True) would skip rows that other transactions lock: "
            "leave skip_locked out"
        )


def _unlocked(statement: Select[Any]) -> Select[Any]:
    """The same select without FOR UPDATE: only the chunk's transaction may lock rows."""
    if statement._for_update_arg is None:
        return statement
    copy = statement._clone()
    copy._for_update_arg = None
    return copy
