"""The key of a loop over a select: the columns whose order it goes in, and what of the rows lies behind a place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any

from sqlalchemy import (
    Column,
    ColumnElement,
    DateTime,
    Numeric,
    Select,
    Table,
    Time,
    UniqueConstraint,
    and_,
    bindparam,
    inspect,
    or_,
    tuple_,
)
from sqlalchemy.sql import operators
from sqlalchemy.sql.elements import UnaryExpression
from sqlalchemy.types import TypeDecorator

from service.errors import ChunkError

ORDERS = {operators.asc_op: False, operators.desc_op: True}


@dataclass(frozen=True)
class KeyColumn:
    """A column, whether it goes from the largest value to the smallest, and how its value is read from a row."""

    column: ColumnElement[Any]
    descends: bool
    read: Callable[[Any], Any]

    @property
    def order(self) -> ColumnElement[Any]:
        return self.column.desc() if self.descends else self.column.asc()


class Key:
    """One or more columns that tell the rows of a select apart. Raises ChunkError where they can't."""

    def __init__(self, statement: Select[Any], key: Any) -> None:
        parts = key if isinstance(key, tuple | list) else (key,)
        if not parts:
            raise ChunkError("key= is empty; allowed: a column of the select, or a tuple of columns")
        self.columns = tuple(_key_column(statement, part) for part in parts)
        _refuse_duplicates(statement, [one.column for one in self.columns])

    @property
    def order(self) -> list[ColumnElement[Any]]:
        return [one.order for one in self.columns]

    def read(self, row: Any) -> tuple[Any, ...]:
        return tuple(one.read(row) for one in self.columns)

    @property
    def has_several_forms(self) -> bool:
        """Whether SQLite, which has no such types, may hold a value otherwise than SQLAlchemy would write it."""
        return any(isinstance(_impl(one.column.type), DateTime | Time | Numeric) for one in self.columns)

    def at(self, prefix: str) -> ColumnElement[bool]:
        """The row at the place given as the parameters `parameters(prefix, …)`."""
        pairs = zip(self.columns, self._placeholders(prefix), strict=True)
        return and_(*(one.column == value for one, value in pairs))

    def behind(self, prefix: str) -> ColumnElement[bool]:
        """The rows that come after the place given as the parameters `parameters(prefix, …)`."""
        return self._beyond(self._placeholders(prefix), includes=False)

    def bounds(self, start: Any, stop: Any) -> list[ColumnElement[bool]]:
        """In the key's order: from `start`, which is included, to `stop`, which is not."""
        found = []
        if start is not None:
            found.append(self._beyond(self._literals("start", start), includes=True))
        if stop is not None:
            found.append(~self._beyond(self._literals("stop", stop), includes=True))
        return found

    def among(self, keys: Sequence[tuple[Any, ...]]) -> ColumnElement[bool]:
        columns = [one.column for one in self.columns]
        if len(columns) == 1:
            return columns[0].in_([value for (value,) in keys])
        return tuple_(*columns).in_(keys)

    def parameters(self, prefix: str, values: Sequence[Any]) -> dict[str, Any]:
        return {f"{prefix}{number}": value for number, value in enumerate(values)}

    def _placeholders(self, prefix: str) -> list[ColumnElement[Any]]:
        return [bindparam(f"{prefix}{number}", type_=one.column.type) for number, one in enumerate(self.columns)]

    def _literals(self, name: str, values: Any) -> list[ColumnElement[Any]]:
        values = values if isinstance(values, tuple | list) else (values,)
        if len(values) != len(self.columns):
            raise ChunkError(f"{name}= has {len(values)} values, and the key has {len(self.columns)} columns")
        return [
            bindparam(None, value, type_=one.column.type, unique=True)
            for value, one in zip(values, self.columns, strict=True)
        ]

    def _beyond(self, place: list[ColumnElement[Any]], includes: bool) -> ColumnElement[bool]:
        if len({one.descends for one in self.columns}) > 1:
            return self._beyond_in_mixed_order(place, includes)
        columns = [one.column for one in self.columns]
        left, right = (columns[0], place[0]) if len(columns) == 1 else (tuple_(*columns), tuple_(*place))
        if self.columns[0].descends:
            return left <= right if includes else left < right
        return left >= right if includes else left > right

    def _beyond_in_mixed_order(self, place: list[ColumnElement[Any]], includes: bool) -> ColumnElement[bool]:
        """Row values compare in one direction only: this says the same column by column."""
        choices: list[ColumnElement[bool]] = []
        same: list[ColumnElement[bool]] = []
        for one, value in zip(self.columns, place, strict=True):
            choices.append(and_(*same, one.column < value if one.descends else one.column > value))
            same.append(one.column == value)
        return or_(*choices, *([and_(*same)] if includes else []))


def _key_column(statement: Select[Any], part: Any) -> KeyColumn:
    descends = False
    if isinstance(part, UnaryExpression) and part.modifier in ORDERS:
        descends, part = ORDERS[part.modifier], part.element
    column = part.__clause_element__() if hasattr(part, "__clause_element__") else part
    if not isinstance(column, ColumnElement):
        raise ChunkError(f"key= holds {part!r}; allowed: a column of the select, its desc(), or a tuple of such")
    if getattr(column, "nullable", False):
        raise ChunkError(
            f"key={column} may be NULL, and NULL has no place in an order: choose columns that are NOT NULL, "
            "such as the primary key"
        )
    return KeyColumn(column, descends, _reader(statement, column))


def _reader(statement: Select[Any], column: ColumnElement[Any]) -> Callable[[Any], Any]:
    """How the column's value is found in a row of the select, wherever it stands there."""
    for place, described in enumerate(statement.column_descriptions):
        expression = described["expr"]
        seen: Any = inspect(expression, raiseerr=False)
        if getattr(seen, "is_mapper", False) or getattr(seen, "is_aliased_class", False):
            attribute = _attribute(seen, column)
            if attribute is not None:
                return partial(_read_attribute, place, attribute)
        else:
            element = expression.__clause_element__() if hasattr(expression, "__clause_element__") else expression
            if element.compare(column):
                return itemgetter(place)
    raise ChunkError(f"key={column} is not in the select: add it to what is selected, or choose one that is")


def _read_attribute(place: int, attribute: str, row: Any) -> Any:
    return getattr(row[place], attribute)


def _attribute(entity: Any, column: ColumnElement[Any]) -> str | None:
    """The attribute of a mapped class, or of an alias of one, that holds the column."""
    for attribute in entity.mapper.column_attrs:
        expression = getattr(entity.entity, attribute.key).__clause_element__()
        if expression.compare(column):
            return str(attribute.key)
    return None


def _refuse_duplicates(statement: Select[Any], columns: list[ColumnElement[Any]]) -> None:
    """Where the select is of one table: of the rows with one key, those behind a chunk's end would be skipped.

    Where it is of several, this shows when two rows with the same key meet at the end of a chunk.
    """
    tables = statement.get_final_froms()
    if len(tables) != 1 or not isinstance(table := tables[0], Table):
        return
    names = {column.key for column in columns if isinstance(column, Column) and table.c.get(column.key) is not None}
    uniques = [set(table.primary_key.columns.keys())]
    uniques += [set(c.columns.keys()) for c in table.constraints if isinstance(c, UniqueConstraint)]
    uniques += [set(i.columns.keys()) for i in table.indexes if i.unique and _is_whole(i)]
    if any(unique and unique <= names for unique in uniques):
        return
    told = ", ".join(str(column) for column in columns)
    primary = ", ".join(str(column) for column in table.primary_key.columns) or "columns that are unique"
    raise ChunkError(
        f"key={told} is not unique, so rows that share it could be skipped at the end of a chunk: "
        f"add the primary key to it ({primary}), as in key=({told}, {primary})"
    )


def _impl(kind: Any) -> Any:
    return kind.impl_instance if isinstance(kind, TypeDecorator) else kind


def _is_whole(index: Any) -> bool:
    """A partial index says nothing of the rows that it leaves out."""
    return not any(options.get("where") is not None for options in index.dialect_options.values())
