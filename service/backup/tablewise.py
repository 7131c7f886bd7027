"""SQLite: the rows of some tables from one file into another, in one transaction. Other tables stay as they are."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from service.backup.count import Counted, compared
from service.backup.plainfile import CHECK_EVERY_INSTRUCTIONS, LISTEN_SECONDS, Patience, counts, opened
from service.backup.plan import Plan
from service.backup.progress import Meter
from service.backup.reader import SavedTable
from service.backup.selection import quoted
from service.backup.server import Still
from service.backup.threads import Stop
from service.errors import BackupError

ROWID_NAMES = ("rowid", "_rowid_", "oid")


def replace_tables(
    saved: Path,
    path: Path,
    plan: Plan,
    meter: Meter,
    stop: Stop,
    *,
    dry_run: bool,
    still: Still | None,
) -> tuple[Counted, ...]:
    """The rows of each table before and after. Triggers don't fire; counts and keys are right, or nothing happens."""
    with closing(opened(path, "mode=rw", LISTEN_SECONDS)) as connection:
        connection.execute("PRAGMA foreign_keys = OFF")
        connection.execute("ATTACH ? AS saved", (f"{saved.absolute().as_uri()}?mode=ro",))
        connection.set_progress_handler(stop.asked, CHECK_EVERY_INSTRUCTIONS)
        _begin(connection, Patience(path, stop))
        try:
            if still is not None:
                asyncio.run(still())
            _move(connection, plan.tables, meter)
            counted = compared(plan.backup, plan.tables, plan.rows, counts(connection))
            _refuse_orphans(connection)
            connection.execute("ROLLBACK" if dry_run else "COMMIT")
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
    return counted


def _begin(connection: sqlite3.Connection, patience: Patience) -> None:
    while True:
        try:
            connection.execute("BEGIN IMMEDIATE")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
                raise
            patience.again()


def _move(connection: sqlite3.Connection, tables: Sequence[SavedTable], meter: Meter) -> None:
    meter.begin("restoring", 0)
    triggers = connection.execute("SELECT name, sql FROM main.sqlite_master WHERE type = 'trigger'").fetchall()
    for name, _ in triggers:
        connection.execute(f"DROP TRIGGER main.{quoted(name)}")
    for table in tables:
        _refuse_virtual(connection, table)
        columns = ", ".join([*_rowid(connection, table), *map(quoted, table.columns)])
        name = quoted(table.name)
        connection.execute(f"DELETE FROM main.{name}")  # noqa: S608 (quoted, as is all below)
        connection.execute(f"INSERT INTO main.{name} ({columns}) SELECT {columns} FROM saved.{name}")  # noqa: S608
        _set_sequence(connection, table.name)
        meter.add(0, table.rows)
    for _, text in triggers:
        connection.execute(text)


def _refuse_virtual(connection: sqlite3.Connection, table: SavedTable) -> None:
    kind = connection.execute(
        "SELECT type FROM pragma_table_list WHERE schema = 'main' AND name = ?", (table.name,)
    ).fetchone()
    if kind != ("table",):
        raise BackupError(
            f"{table} is a virtual table, which can't be restored beside tables that stay as they are: restore the "
            "backup into a new file, by DATABASE_URL, and copy what is needed"
        )


def _rowid(connection: sqlite3.Connection, table: SavedTable) -> list[str]:
    """The name under which the table's rows have a number, if they do: rows keep theirs."""
    (without,) = connection.execute(
        "SELECT wr FROM pragma_table_list WHERE schema = 'main' AND name = ?", (table.name,)
    ).fetchone()
    taken = {name.lower() for (name,) in connection.execute("SELECT name FROM pragma_table_xinfo(?)", (table.name,))}
    return [] if without else [name for name in ROWID_NAMES if name not in taken][:1]


def _set_sequence(connection: sqlite3.Connection, name: str) -> None:
    """AUTOINCREMENT's next number: the saved one, or past the rows."""
    has = [
        connection.execute(f"SELECT count(*) FROM {schema}.sqlite_master WHERE name = 'sqlite_sequence'").fetchone()  # noqa: S608
        for schema in ("main", "saved")
    ]
    if has != [(1,), (1,)]:
        return
    saved = connection.execute("SELECT seq FROM saved.sqlite_sequence WHERE name = ?", (name,)).fetchone()
    if saved is None:
        return
    changed = connection.execute("UPDATE main.sqlite_sequence SET seq = max(seq, ?) WHERE name = ?", (*saved, name))
    if changed.rowcount == 0:
        connection.execute("INSERT INTO main.sqlite_sequence (name, seq) VALUES (?, ?)", (name, *saved))


def _refuse_orphans(connection: sqlite3.Connection) -> None:
    """A row that refers to nothing, unless it did so in the backup already."""
    there = {(table, parent) for table, _, parent, _ in connection.execute("PRAGMA main.foreign_key_check")}
    before = {(table, parent) for table, _, parent, _ in connection.execute("PRAGMA saved.foreign_key_check")}
    for table, parent in sorted(there - before):
        raise BackupError(
            f"after the restore, rows of {table} would refer to rows of {parent} that are not there, so nothing was "
            "changed"
        )
