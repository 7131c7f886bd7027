"""The key of a loop over a select: the columns that order its rows, and the conditions for rows
around a key.
"""

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

from batch_system.errors import ChunkError

ORDERS = {operators.asc_op: False, operators.desc_op: True}


@dataclass(frozen=True)
class KeyColumn:
    """A column of the key, whether its order is descending, and how its value is read from a row of
    the select.
    """

    column: ColumnElement[Any]
    descends: bool
    read: Callable[[Any], Any]

    @property
    def order(self) -> ColumnElement[Any]:
        return self.column.desc() if self.descends else self.column.asc()


class Key:
    """One or more columns that identify the rows of a select. Raises ChunkError if they don't, or
    can be NULL.
    """

    def __init__(self, statement: Select[Any], key: Any) -> None:
        parts = key if isinstance(key, tuple | list) else (key,)
        if not parts:
            raise ChunkError(
                "key= is empty; allowed: a column of the select, or a tuple of columns"
            )
        self.columns = tuple(_key_column(statement, part) for part in parts)
        _refuse_duplicates(statement, [part.column for part in self.columns])

    @property
    def order(self) -> list[ColumnElement[Any]]:
        return [part.order for part in self.columns]

    def read(self, row: Any) -> tuple[Any, ...]:
        """The values of the key in a row of the select."""
        return tuple(part.read(row) for part in self.columns)

    @property
    def has_several_forms(self) -> bool:
        """Whether SQLite, which lacks the column's type, may hold a value in another format than
        SQLAlchemy writes.
        """
        return any(
            isinstance(_impl(part.column.type), DateTime | Time | Numeric) for part in self.columns
        )

    def at(self, prefix: str) -> ColumnElement[bool]:
        """The condition for the row with the key passed as `parameters(prefix, …)`."""
        pairs = zip(self.columns, self._placeholders(prefix), strict=True)
        return and_(*(part.column == value for part, value in pairs))

    def behind(self, prefix: str) -> ColumnElement[bool]:
        """The condition for the rows after the key passed as `parameters(prefix, …)`."""
        return self._beyond(self._placeholders(prefix), includes=False)

    def bounds(self, start: Any, stop: Any) -> list[ColumnElement[bool]]:
        """The conditions for the rows from `start` (included) to `stop` (excluded), in the order of
        the key.
        """
        conditions = []
        if start is not None:
            conditions.append(self._beyond(self._literals("start", start), includes=True))
        if stop is not None:
            conditions.append(~self._beyond(self._literals("stop", stop), includes=True))
        return conditions

    def among(self, keys: Sequence[tuple[Any, ...]]) -> ColumnElement[bool]:
        """The condition for the rows with these keys."""
        columns = [part.column for part in self.columns]
        if len(columns) == 1:
            return columns[0].in_([value for (value,) in keys])
        return tuple_(*columns).in_(keys)

    def parameters(self, prefix: str, values: Sequence[Any]) -> dict[str, Any]:
        return {f"{prefix}{number}": value for number, value in enumerate(values)}

    def _placeholders(self, prefix: str) -> list[ColumnElement[Any]]:
        return [
            bindparam(f"{prefix}{number}", type_=part.column.type)
            for number, part in enumerate(self.columns)
        ]

    def _literals(self, name: str, values: Any) -> list[ColumnElement[Any]]:
        values = values if isinstance(values, tuple | list) else (values,)
        if len(values) != len(self.columns):
            raise ChunkError(
                f"{name}= has {len(values)} values, and the key has {len(self.columns)} columns"
            )
        return [
            bindparam(None, value, type_=part.column.type, unique=True)
            for value, part in zip(values, self.columns, strict=True)
        ]

    def _beyond(self, values: list[ColumnElement[Any]], includes: bool) -> ColumnElement[bool]:
        """The condition for the rows after the key with these values; with `includes`, also for
        that row.
        """
        if len({part.descends for part in self.columns}) > 1:
            return self._beyond_in_mixed_order(values, includes)
        columns = [part.column for part in self.columns]
        left, right = (
            (columns[0], values[0]) if len(columns) == 1 else (tuple_(*columns), tuple_(*values))
        )
        if self.columns[0].descends:
            return left <= right if includes else left < right
        return left >= right if includes else left > right

    def _beyond_in_mixed_order(
        self, values: list[ColumnElement[Any]], includes: bool
    ) -> ColumnElement[bool]:
        """The same column by column, because row values compare in one direction only."""
        alternatives: list[ColumnElement[bool]] = []
        equal: list[ColumnElement[bool]] = []
        for part, value in zip(self.columns, values, strict=True):
            alternatives.append(
                and_(*equal, part.column < value if part.descends else part.column > value)
            )
            equal.append(part.column == value)
        return or_(*alternatives, *([and_(*equal)] if includes else []))


def _key_column(statement: Select[Any], part: Any) -> KeyColumn:
    descends = False
    if isinstance(part, UnaryExpression) and part.modifier in ORDERS:
        descends, part = ORDERS[part.modifier], part.element
    column = part.__clause_element__() if hasattr(part, "__clause_element__") else part
    if not isinstance(column, ColumnElement):
        raise ChunkError(
            f"key= holds {part!r}; allowed: a column of the select, its desc(), or a tuple of these"
        )
    if getattr(column, "nullable", False):
        raise ChunkError(
            f"key={column} may be NULL, and rows can't be ordered by NULL: choose columns that are "
            "NOT NULL, such as the primary key"
        )
    return KeyColumn(column, descends, _reader(statement, column))


def _reader(statement: Select[Any], column: ColumnElement[Any]) -> Callable[[Any], Any]:
    """A function that reads the column's value from a row: an element of the row, or an attribute
    of an entity.
    """
    for index, description in enumerate(statement.column_descriptions):
        expression = description["expr"]
        entity: Any = inspect(expression, raiseerr=False)
        if getattr(entity, "is_mapper", False) or getattr(entity, "is_aliased_class", False):
            attribute = _attribute(entity, column)
            if attribute is not None:
                return partial(_read_attribute, index, attribute)
        else:
            element = (
                expression.__clause_element__()
                if hasattr(expression, "__clause_element__")
                else expression
            )
            if element.compare(column):
                return itemgetter(index)
    raise ChunkError(
        f"key={column} is not in the select: add it to the selected columns, or choose one of these"
    )


def _read_attribute(index: int, attribute: str, row: Any) -> Any:
    return getattr(row[index], attribute)


def _attribute(entity: Any, column: ColumnElement[Any]) -> str | None:
    """The attribute of a mapped class, or of an alias of one, that holds the column."""
    for attribute in entity.mapper.column_attrs:
        expression = getattr(entity.entity, attribute.key).__clause_element__()
        if expression.compare(column):
            return str(attribute.key)
    return None


def _refuse_duplicates(statement: Select[Any], columns: list[ColumnElement[Any]]) -> None:
    """Refuse a key without a unique constraint, because rows with the same key as a chunk's last
    row would be skipped.

    This is known only for a select from one table. For other selects, Pages.load compares the rows
    at the end of a chunk.
    """
    tables = statement.get_final_froms()
    if len(tables) != 1 or not isinstance(table := tables[0], Table):
        return
    names = {
        column.key
        for column in columns
        if isinstance(column, Column) and table.c.get(column.key) is not None
    }
    uniques = [set(table.primary_key.columns.keys())]
    uniques += [set(c.columns.keys()) for c in table.constraints if isinstance(c, UniqueConstraint)]
    uniques += [set(i.columns.keys()) for i in table.indexes if i.unique and _is_whole(i)]
    if any(unique and unique <= names for unique in uniques):
        return
    given = ", ".join(str(column) for column in columns)
    primary = (
        ", ".join(str(column) for column in table.primary_key.columns) or "columns that are unique"
    )
    raise ChunkError(
        f"key={given} is not unique, so rows that share it could be skipped at the end of a chunk: "
        f"add the primary key to it ({primary}), as in key=({given}, {primary})"
    )


def _impl(kind: Any) -> Any:
    return kind.impl_instance if isinstance(kind, TypeDecorator) else kind


def _is_whole(index: Any) -> bool:
    """Whether the index covers all rows. A partial index says nothing about the rows outside it."""
    return not any(options.get("where") is not None for options in index.dialect_options.values())
