"""Describes the tables in the copy of a SQLite database, and drops those that a backup leaves
out.
"""

from __future__ import annotations

import sqlite3
from typing import Any

from batch_system.backup.file.selection import LEDGERS_MARK, Selection, is_ledgers, quoted

ORDINARY, VIRTUAL = "table", "virtual"
PLAIN_COLUMN = 0
"""Value of `hidden` in pragma_table_xinfo for a column that is neither generated nor a virtual
table's hidden one.
"""


def revisions(connection: sqlite3.Connection) -> dict[str, str]:
    """The revisions in Alembic's version tables, by the table's name."""
    revisions_by_table = {}
    for name, kind in _tables(connection):
        if kind == ORDINARY and [column for column, *_ in _columns(connection, name)] == [
            "version_num"
        ]:
            rows = connection.execute(f"SELECT version_num FROM {quoted(name)} ORDER BY 1")
            revisions_by_table[name] = ", ".join(str(version) for (version,) in rows)
    return revisions_by_table


def unwanted(connection: sqlite3.Connection, selection: Selection) -> list[str]:
    """The tables that a backup leaves out: by the selection, or because they are the ledger's."""
    tables = [name for name, _ in _tables(connection)]
    selection.refuse_idle_patterns(map(_names, tables))
    has_ledger = LEDGERS_MARK in tables and not selection.ledger
    return [
        name
        for name in tables
        if (has_ledger and is_ledgers(name)) or not selection.holds(_names(name))
    ]


def drop(connection: sqlite3.Connection, tables: list[str]) -> None:
    """Drop the tables, and overwrite their content, so that nothing of it can be read in the
    backup.
    """
    for setting in (
        "journal_mode = OFF",
        "synchronous = OFF",
        "foreign_keys = OFF",
        "secure_delete = ON",
    ):
        connection.execute(f"PRAGMA {setting}")
    for name in tables:
        connection.execute(f"DROP TABLE {quoted(name)}")


def _names(table: str) -> tuple[str, str]:
    """The names of a table that the patterns of a selection may match."""
    return table, f"main.{table}"


def described(connection: sqlite3.Connection) -> list[dict[str, Any]]:
    """The tables' entries in the manifest.

    A virtual table whose module is not available is left out; its shadow tables are in the file
    nevertheless.
    """
    entries = []
    for name, kind in _tables(connection):
        try:
            entries.append(_described(connection, name))
        except sqlite3.OperationalError:
            if kind != VIRTUAL:
                raise
    return entries


def _described(connection: sqlite3.Connection, name: str) -> dict[str, Any]:
    columns = _columns(connection, name)
    (rows,) = connection.execute(f"SELECT count(*) FROM {quoted(name)}").fetchone()
    return {
        "schema": None,
        "name": name,
        "folder": None,
        "columns": [column for column, *_ in columns],
        "types": [kind for _, kind, _ in columns],
        "key": [
            column
            for place, column in sorted((place, column) for column, _, place in columns if place)
        ],
        "rows": rows,
        "bytes": 0,
    }


def _tables(connection: sqlite3.Connection) -> list[tuple[str, str]]:
    """Names and kinds of the ordinary and virtual tables, by name, without the shadow tables of
    virtual ones.
    """
    rows = connection.execute(
        "SELECT name, type FROM pragma_table_list WHERE schema = 'main' AND type IN (?, ?)"
        " AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\' ORDER BY name",
        (ORDINARY, VIRTUAL),
    )
    return rows.fetchall()


def _columns(connection: sqlite3.Connection, table: str) -> list[tuple[str, str, int]]:
    """Name, declared type, and position in the primary key (0: not in it) of each column that is
    not generated.
    """
    rows = connection.execute(
        "SELECT name, type, pk FROM pragma_table_xinfo(?) WHERE hidden = ? ORDER BY cid",
        (table, PLAIN_COLUMN),
    )
    return rows.fetchall()


def damage(connection: sqlite3.Connection) -> str | None:
    """The first problem that SQLite's integrity check reports; None if there is none.

    Objects that need a function or a collation of the application can't be checked.
    """
    connection.execute("PRAGMA ignore_check_constraints = ON")
    result = _checked(connection, "integrity_check(1)")
    if result is None:  # check each table by itself, with its indexes if possible
        tables = [quoted(name) for name, _ in _tables(connection)]
        results = (
            _checked(connection, f"integrity_check({name})")
            or _checked(connection, f"quick_check({name})")
            for name in tables
        )
        result = next((problem for problem in results if problem not in (None, "ok")), "ok")
    return None if result == "ok" else result


def _checked(connection: sqlite3.Connection, pragma: str) -> str | None:
    """The result of the check; None if SQLite lacks a function or a collation for it."""
    try:
        (result,) = connection.execute(f"PRAGMA {pragma}").fetchone()
    except sqlite3.OperationalError as error:
        if any(cause in str(error) for cause in ("unknown function", "no such collation")):
            return None
        raise
    return str(result.splitlines()[-1])
