"""Many rows in one parameter of a statement: a JSON array that the database reads as a table.

So one statement takes any number of rows. It works on both databases, and stays within the drivers'
limits of parameters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Column, ColumnElement, Label, Table, bindparam, func, select, text
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.sql.selectable import TextualSelect

from batch_system.database import sql
from batch_system.database.types import Id, Json, stamp

POSTGRESQL_TYPES = {
    "String": "text",
    "Text": "text",
    "DateTime": "timestamptz",
    "UtcDateTime": "timestamptz",
    "JSON": "jsonb",
    "BigInteger": "bigint",
    "Integer": "integer",
    "SmallInteger": "smallint",
    "Boolean": "boolean",
    "Float": "double precision",
}

_ID = Column("id", Id)

ANY = " "
"""A target of ON CONFLICT: every unique index."""


def source(
    columns: Iterable[Column[Any]],
    kind: str,
    present: Collection[str] | None = None,
    parameter: str = "rows",
) -> str:
    """SQL for a FROM item with the alias `v`, which reads these columns from the parameter :rows.

    `present`: the names of those that the rows may have; None: all. The others are NULL.
    `parameter`: another name.
    """
    if kind == "postgresql":
        fields = ", ".join(f'"{c.name}" {_postgresql_type(c)}' for c in columns)
        return f"jsonb_to_recordset(CAST(:{parameter} AS jsonb)) AS v({fields})"
    fields = ", ".join(f'{_value(c, present)} AS "{c.name}"' for c in columns)
    return f"(SELECT {fields} FROM json_each(:{parameter})) AS v"


def _postgresql_type(column: Column[Any]) -> str:
    if column.type._variant_mapping and type(column.type).__name__ == "String":
        return "uuid"
    return POSTGRESQL_TYPES[type(column.type).__name__]


def _value(column: Column[Any], present: Collection[str] | None) -> str:
    if present is not None and column.name not in present:
        return "NULL"
    return f"value {'->' if type(column.type).__name__ == 'JSON' else '->>'} '$.{column.name}'"


def encode(rows: Iterable[Mapping[str, Any]], kind: str) -> str:
    """The value of the parameter :rows. Instants are written as this database stores them; None
    values are left out.
    """

    stamps: dict[datetime, str | None] = {}

    def convert(value: Any) -> Any:
        if not isinstance(value, datetime):
            return str(value)
        if value not in stamps:  # the same few instants occur in many rows
            stamps[value] = stamp(value, kind)
        return stamps[value]

    encoded = json.dumps(
        [{k: v for k, v in row.items() if v is not None} for row in rows], default=convert
    )
    return _without_unstorable(encoded) if _UNSTORABLE.search(encoded) else encoded


# PostgreSQL can store neither U+0000 nor half a surrogate pair in a text. One such row must not
# make all others fail.
_UNSTORABLE = re.compile(r"\\(u0000|ud[89a-f])", re.IGNORECASE)


def of_ids(ids: Iterable[str], kind: str) -> dict[str, str]:
    """The parameter of a statement whose `source` has only the column `id`: these ids."""
    return {"rows": encode([{"id": i} for i in ids], kind)}


def is_of_ids(column: str, kind: str) -> str:
    """SQL for the condition that this column has one of the ids in the parameter that `of_ids`
    makes.
    """
    return sql.among(column, f"SELECT v.id FROM {source([_ID], kind)}", kind)


def _without_unstorable(encoded: str) -> str:
    return json.dumps(_replaced(json.loads(encoded)))


def storable(value: Any) -> Any:
    """The JSON value with other characters in place of those that PostgreSQL can't store."""
    is_fine = isinstance(value, dict) and not _UNSTORABLE.search(json.dumps(value, default=str))
    return value if is_fine else _replaced(value)


def _replaced(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace("\0", "\N{SYMBOL FOR NULL}").encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {_replaced(k): _replaced(v) for k, v in value.items()}
    return [_replaced(item) for item in value] if isinstance(value, list) else value


def among(column: Column[Any], values: Iterable[Any], kind: str) -> TextualSelect:
    """A subquery for `column.in_(…)` with any number of values, which are in the parameter
    :rows.
    """
    encoded = encode([{column.name: value} for value in values], kind)
    statement = text(f'SELECT v."{column.name}" FROM {source([column], kind)}').bindparams(
        rows=encoded
    )
    return statement.columns(column)


def is_among(column: Column[Any], values: Iterable[Any], kind: str) -> ColumnElement[bool]:
    """The condition `column IN (values)`, in a form for which PostgreSQL uses the index even of a
    small table.
    """
    subquery = among(column, values, kind)
    return (
        column == func.any(func.array(subquery.scalar_subquery()))
        if kind == "postgresql"
        else column.in_(subquery)
    )


def collected(column: Column[Any], kind: str) -> Label[Any]:
    """The values of a column in a group of rows, as a list with the name `collected`."""
    together = func.jsonb_agg if kind == "postgresql" else func.json_group_array
    return together(column, type_=Json).label("collected")


async def insert(
    connection: AsyncConnection,
    table: Table,
    rows: Sequence[Mapping[str, Any]],
    conflict: str = "",
    key: Column[Any] | None = None,
) -> list[Any]:
    """Insert rows that have the same keys, in one statement.

    `conflict`: the target of ON CONFLICT … DO NOTHING. `key`: a column with values that no row has
    had before; those of the inserted rows are returned.
    """
    if not rows:
        return []
    inserted = await insert_all(connection, table, rows, conflict)
    if key is None:
        return []
    keys = [row[key.name] for row in rows]
    if inserted == len(rows):
        return keys
    found = select(key).where(is_among(key, keys, connection.dialect.name))
    return list((await connection.execute(found)).scalars())


async def insert_all(
    connection: AsyncConnection,
    table: Table,
    rows: Sequence[Mapping[str, Any]],
    conflict: str = "",
) -> int:
    """The same for at least one row. Returns how many were inserted. A value that is the same in
    all rows is sent only once.
    """
    same = {
        name: value
        for name, value in rows[0].items()
        if [row[name] for row in rows].count(value) == len(rows)
    }
    columns = {name: table.c[name] for name in rows[0] if name not in same}
    encoded = encode(
        ({name: row[name] for name in columns} for row in rows), connection.dialect.name
    )
    return await insert_encoded(connection, table, columns, encoded, same, conflict)


async def insert_encoded(
    connection: AsyncConnection,
    table: Table,
    columns: Mapping[str, Column[Any]],
    encoded: str,
    same: Mapping[str, Any],
    conflict: str = "",
) -> int:
    """Insert rows that `encode` has encoded, as `insert` does. Returns their number. `same`: the
    values that all rows have in common.

    `columns`: maps the name of a column of the table to the column with the name and type of the
    encoded value.
    """
    kind = connection.dialect.name
    same_columns = [table.c[name] for name, value in same.items() if value is not None]
    names = ", ".join(f'"{name}"' for name in (*columns, *(c.name for c in same_columns)))
    values = ", ".join(
        [*(f'v."{c.name}"' for c in columns.values()), *(f":same_{c.name}" for c in same_columns)]
    )
    # Without the WHERE, SQLite would take the ON of ON CONFLICT for the ON of a join.
    from_clause = f" FROM {source(columns.values(), kind)}" if columns else ""
    statement = f"INSERT INTO {table.name} ({names}) SELECT {values}{from_clause} WHERE true"
    if conflict:
        statement += f" ON CONFLICT {conflict} DO NOTHING"
    parameters = {f"same_{c.name}": storable(same[c.name]) for c in same_columns}
    if columns:
        parameters["rows"] = encoded
    typed = [bindparam(f"same_{c.name}", type_=c.type) for c in same_columns]
    return (await connection.execute(text(statement).bindparams(*typed), parameters)).rowcount
