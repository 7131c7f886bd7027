"""The tables in the copy of a SQLite database: what they are, and dropping those that a backup leaves out."""

from __future__ import annotations

import sqlite3
from typing import Any

from service.backup.file.selection import LEDGERS_MARK, Selection, is_ledgers, quoted

ORDINARY, VIRTUAL = "table", "virtual"
PLAIN_COLUMN = 0
"""Other kinds of columns are hidden ones of virtual tables, and generated ones."""


def revisions(connection: sqlite3.Connection) -> dict[str, str]:
    """What alembic's tables say, by the table's name."""
    found = {}
    for name, kind in _tables(connection):
        if kind == ORDINARY and [column for column, *_ in _columns(connection, name)] == ["version_num"]:
            rows = connection.execute(f"SELECT version_num FROM {quoted(name)} ORDER BY 1")  # noqa: S608 (quoted)
            found[name] = ", ".join(str(version) for (version,) in rows)
    return found


def unwanted(connection: sqlite3.Connection, selection: Selection) -> list[str]:
    """Those that the settings, or the ledger's being in the same file, leave out of a backup."""
    tables = [name for name, _ in _tables(connection)]
    selection.refuse_idle_patterns(map(_names, tables))
    has_ledger = LEDGERS_MARK in tables and not selection.ledger
    return [name for name in tables if (has_ledger and is_ledgers(name)) or not selection.holds(_names(name))]


def drop(connection: sqlite3.Connection, tables: list[str]) -> None:
    """What they held is overwritten, so that nothing of it can be read in the backup."""
    for setting in ("journal_mode = OFF", "synchronous = OFF", "foreign_keys = OFF", "secure_delete = ON"):
        connection.execute(f"PRAGMA {setting}")
    for name in tables:
        connection.execute(f"DROP TABLE {quoted(name)}")


def _names(table: str) -> tuple[str, str]:
    """As patterns may have them."""
    return table, f"main.{table}"


def described(connection: sqlite3.Connection) -> list[dict[str, Any]]:
    """Those that can be counted: a virtual table may need a module that is not here (its own tables are whole)."""
    found = []
    for name, kind in _tables(connection):
        try:
            found.append(_described(connection, name))
        except sqlite3.OperationalError:
            if kind != VIRTUAL:
                raise
    return found


def _described(connection: sqlite3.Connection, name: str) -> dict[str, Any]:
    columns = _columns(connection, name)
    (rows,) = connection.execute(f"SELECT count(*) FROM {quoted(name)}").fetchone()  # noqa: S608 (quoted)
    return {
        "schema": None,
        "name": name,
        "folder": None,
        "columns": [column for column, *_ in columns],
        "types": [kind for _, kind, _ in columns],
        "key": [column for place, column in sorted((place, column) for column, _, place in columns if place)],
        "rows": rows,
        "bytes": 0,
    }


def _tables(connection: sqlite3.Connection) -> list[tuple[str, str]]:
    """Ordinary and virtual ones, by name. (A virtual table's own tables are its matter.)"""
    rows = connection.execute(
        "SELECT name, type FROM pragma_table_list WHERE schema = 'main' AND type IN (?, ?)"
        " AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\' ORDER BY name",
        (ORDINARY, VIRTUAL),
    )
    return rows.fetchall()


def _columns(connection: sqlite3.Connection, table: str) -> list[tuple[str, str, int]]:
    """Name, declared type, and place in the primary key (0: not in it), of those that are not generated."""
    rows = connection.execute(
        "SELECT name, type, pk FROM pragma_table_xinfo(?) WHERE hidden = ? ORDER BY cid", (table, PLAIN_COLUMN)
    )
    return rows.fetchall()


def damage(connection: sqlite3.Connection) -> str | None:
    """What SQLite's own check finds first. What needs functions or collations of the application's is left out."""
    connection.execute("PRAGMA ignore_check_constraints = ON")
    result = _checked(connection, "integrity_check(1)")
    if result is None:  # then each table by itself, at first with its indexes
        tables = [quoted(name) for name, _ in _tables(connection)]
        found = (
            _checked(connection, f"integrity_check({name})") or _checked(connection, f"quick_check({name})")
            for name in tables
        )
        result = next((one for one in found if one not in (None, "ok")), "ok")
    return None if result == "ok" else result


def _checked(connection: sqlite3.Connection, how: str) -> str | None:
    """None where SQLite can't: it lacks a function or a collation."""
    try:
        (result,) = connection.execute(f"PRAGMA {how}").fetchone()
    except sqlite3.OperationalError as error:
        if any(words in str(error) for words in ("unknown function", "no such collation")):
            return None
        raise
    return str(result.splitlines()[-1])
