"""Many rows in one parameter: a JSON array that the database reads as a table.

One statement for any number of rows, the same shape on both databases, and within every driver's limit of arguments.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import Column, Table, bindparam, text
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.sql.elements import TextClause
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
    def plain(value: Any) -> Any:
        if isinstance(value, str):
            return value.replace("\0", "\N{SYMBOL FOR NULL}").encode("utf-8", "replace").decode()
        if isinstance(value, dict):
            return {plain(k): plain(v) for k, v in value.items()}
        return [plain(item) for item in value] if isinstance(value, list) else value

    return json.dumps(plain(json.loads(encoded)))


def insert_from(table: Table, names: tuple[str, ...], kind: str, conflict: str = "", returning: str = "") -> TextClause:
    """INSERT INTO table (names) SELECT … FROM :rows, with the ON CONFLICT and RETURNING clauses given."""
    columns = [table.c[name] for name in names]
    listed = ", ".join(f'"{name}"' for name in names)
    # SQLite needs the WHERE to tell an upsert's ON from a join's.
    statement = f"INSERT INTO {table.name} ({listed}) SELECT {listed} FROM {source(columns, kind)} WHERE true"
    if conflict:
        statement += f" ON CONFLICT {conflict} DO NOTHING"
    return text(statement + (f" RETURNING {returning}" if returning else "")).bindparams(bindparam("rows"))


def among(column: Column[Any], values: Iterable[Any], kind: str) -> TextualSelect:
    """For `column.in_(…)`: any number of values, in the parameter :rows."""
    encoded = encode([{column.name: value} for value in values], kind)
    statement = text(f'SELECT v."{column.name}" FROM {source([column], kind)}').bindparams(rows=encoded)
    return statement.columns(column)


async def insert(
    connection: AsyncConnection,
    table: Table,
    names: tuple[str, ...],
    rows: list[dict[str, Any]],
    conflict: str = "",
) -> None:
    if rows:
        kind = connection.dialect.name
        await connection.execute(insert_from(table, names, kind, conflict), {"rows": encode(rows, kind)})
