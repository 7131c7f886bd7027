"""Many rows in one parameter: a JSON array that the database reads as a table.

One statement for any number of rows, the same shape on both databases, and within every driver's limit of arguments.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Column, Table, bindparam, text
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.sql.selectable import TextualSelect

from service.database.types import stamp

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


def source(columns: Iterable[Column[Any]], kind: str) -> str:
    """`v`: the FROM item whose columns are these, read from the parameter :rows."""
    if kind == "postgresql":
        fields = ", ".join(f'"{c.name}" {_postgresql_type(c)}' for c in columns)
        return f"jsonb_to_recordset(CAST(:rows AS jsonb)) AS v({fields})"
    fields = ", ".join(f"value {_arrow(c)} '$.{c.name}' AS \"{c.name}\"" for c in columns)
    return f"(SELECT {fields} FROM json_each(:rows)) AS v"


def _postgresql_type(column: Column[Any]) -> str:
    if column.type._variant_mapping and type(column.type).__name__ == "String":
        return "uuid"
    return POSTGRESQL_TYPES[type(column.type).__name__]


def _arrow(column: Column[Any]) -> str:
    return "->" if type(column.type).__name__ == "JSON" else "->>"


def encode(rows: Iterable[Mapping[str, Any]], kind: str) -> str:
    """The value of :rows. Instants take the form of this database's columns; keys whose value is None are left out."""

    stamps: dict[datetime, str | None] = {}

    def fit(value: Any) -> Any:
        if not isinstance(value, datetime):
            return str(value)
        if value not in stamps:  # a group has few instants, many times over
            stamps[value] = stamp(value, kind)
        return stamps[value]

    encoded = json.dumps([{k: v for k, v in row.items() if v is not None} for row in rows], default=fit)
    return _without_unstorable(encoded) if _UNSTORABLE.search(encoded) else encoded


# PostgreSQL's text can't hold U+0000 nor half a surrogate pair; one such row must not hold up its whole group.
_UNSTORABLE = re.compile(r"\\(u0000|ud[89a-f])", re.IGNORECASE)


def _without_unstorable(encoded: str) -> str:
    return json.dumps(storable(json.loads(encoded)))


def storable(value: Any) -> Any:
    """The same without what PostgreSQL's text can't hold."""
    if isinstance(value, str):
        return value.replace("\0", "\N{SYMBOL FOR NULL}").encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {storable(k): storable(v) for k, v in value.items()}
    return [storable(item) for item in value] if isinstance(value, list) else value


def among(column: Column[Any], values: Iterable[Any], kind: str) -> TextualSelect:
    """For `column.in_(…)`: any number of values, in the parameter :rows."""
    encoded = encode([{column.name: value} for value in values], kind)
    statement = text(f'SELECT v."{column.name}" FROM {source([column], kind)}').bindparams(rows=encoded)
    return statement.columns(column)


async def insert(
    connection: AsyncConnection,
    table: Table,
    rows: Sequence[Mapping[str, Any]],
    conflict: str = "",
    returning: Column[Any] | None = None,
) -> list[Any]:
    """Insert rows that have the same keys, in one statement. Returns the values of `returning`.

    `conflict` is the target of ON CONFLICT … DO NOTHING. What is the same in all rows is sent once.
    """
    if not rows:
        return []
    kind = connection.dialect.name
    same = {n: v for n, v in rows[0].items() if all(row[n] is v or row[n] == v for row in rows)}
    same_columns = [table.c[name] for name, value in same.items() if value is not None]
    columns = [table.c[name] for name in rows[0] if name not in same]
    listed = ", ".join(f'"{c.name}"' for c in (*columns, *same_columns))
    values = ", ".join([*(f'v."{c.name}"' for c in columns), *(f":same_{c.name}" for c in same_columns)])
    # SQLite needs the WHERE to tell an upsert's ON from a join's.
    origin = f" FROM {source(columns, kind)}" if columns else ""
    statement = f"INSERT INTO {table.name} ({listed}) SELECT {values}{origin} WHERE true"
    if conflict:
        statement += f" ON CONFLICT {conflict} DO NOTHING"
    parameters = {f"same_{c.name}": storable(same[c.name]) for c in same_columns}
    if columns:
        parameters["rows"] = encode(({c.name: row[c.name] for c in columns} for row in rows), kind)
    typed = [bindparam(f"same_{c.name}", type_=c.type) for c in same_columns]
    if returning is None:
        await connection.execute(text(statement).bindparams(*typed), parameters)
        return []
    selected = text(f"{statement} RETURNING {returning.name}").bindparams(*typed).columns(returning)
    return list((await connection.execute(selected, parameters)).scalars())
