"""Makes a new SQLite database file: its tables from trusted SQL, their rows from a backup."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Self

from batch_system.backup.file.folder import create
from batch_system.backup.file.progress import BackupMeter
from batch_system.backup.file.reader import Backup, SavedTable
from batch_system.backup.file.selection import quoted
from batch_system.backup.sqlite.plain_file import (
    CHECK_EVERY_INSTRUCTIONS,
    guard,
    loading,
    opened,
    uri_of,
)
from batch_system.backup.sqlite.structure import Structure, row_number
from batch_system.backup.sqlite.tables import PLAIN_COLUMN
from batch_system.concurrency.stoppable import Stop
from batch_system.errors import BackupError, DamagedBackup

FILE_SETTINGS = ("page_size", "encoding", "auto_vacuum", "application_id", "user_version")
WRITING = (
    "journal_mode = OFF",
    "synchronous = OFF",
    "foreign_keys = OFF",
    "temp_store = FILE",
    "cache_size = -32000",
)
"""Settings for speed without safety: the file is thrown away if anything fails."""
LARGEST_VALUE = 2**31 - 1
SAVED, LIVE, MADE = "saved", "live", "made"
"""Schemas of the connection: the file of the backup, which is not trusted; the live file; that of
the migrations.
"""
SEQUENCES = "sqlite_sequence"


def file_settings(connection: sqlite3.Connection) -> dict[str, int | str]:
    """The settings that a database file stores besides its tables, by the names of their
    pragmas.
    """
    return {name: connection.execute(f"PRAGMA {name}").fetchone()[0] for name in FILE_SETTINGS}


class NewFile:
    """The new database file. `structure`: the tables, indexes, views and triggers that it gets."""

    def __init__(self, path: Path, backup: Backup, structure: Structure, stop: Stop) -> None:
        self._path = path
        self._backup = backup
        self._structure = structure
        self._stop = stop
        os.close(create(path))
        self.connection = opened(path, "mode=rw")
        guard(self.connection, backup.source.size, defensive=False)
        self.connection.set_progress_handler(stop.is_requested, CHECK_EVERY_INSTRUCTIONS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.connection.close()

    def make_tables(self, settings: Mapping[str, int | str]) -> None:
        """Create the tables. Indexes follow when a table has its rows, and triggers at the end, so
        that none fires.
        """
        for name, value in settings.items():
            self.connection.execute(f"PRAGMA {name} = {value!r}")
        for setting in WRITING:
            self.connection.execute(f"PRAGMA {setting}")
        for table in self._structure.created("table"):
            self.connection.execute(table.sql)
        if self._structure.has_statistics:
            self.connection.execute("ANALYZE")

    def fill(self, saved: Path, tables: Sequence[SavedTable], meter: BackupMeter) -> dict[str, int]:
        """Copy the rows of the backup. Returns the number of rows of each table by its name. Raises
        DamagedBackup.
        """
        meter.begin("restoring", 0)
        with loading(self._backup, "the database", self._stop):
            self._attach(SAVED, saved, "immutable=1")
        for table in tables:
            with loading(self._backup, f"the rows of {table}", self._stop):
                self._fill(table)
            meter.add(0, table.rows)
        with loading(self._backup, "the rows", self._stop):
            return self._counted(tables)

    def keep(self, schema: str, path: Path, tables: Iterable[str]) -> None:
        """Copy the rows of tables that are not restored, from the live file or from the file of the
        migrations.
        """
        # These files are trusted.
        self.connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LARGEST_VALUE)
        self._attach(schema, path, "mode=rw")
        for name in tables:
            for part in self._structure.parts(name):
                self._copy(part.name, schema, tuple(part.columns))
            self._make_indexes(name)
            self.go_on_behind(schema, name)
        if self._structure.has_statistics and schema == LIVE:
            self.connection.execute("DELETE FROM main.sqlite_stat1")
            self.connection.execute("INSERT INTO main.sqlite_stat1 SELECT * FROM live.sqlite_stat1")

    def go_on_behind(self, schema: str, table: str) -> None:
        """Continue AUTOINCREMENT behind the last number that the table has given in that schema."""
        last, own_last = self._last_number(schema, table), self._last_number("main", table)
        if last is None or last <= (own_last or 0):
            return
        changed = self.connection.execute(
            "UPDATE main.sqlite_sequence SET seq = ? WHERE name = ?", (last, table)
        )
        if changed.rowcount == 0:
            self.connection.execute(
                "INSERT INTO main.sqlite_sequence (name, seq) VALUES (?, ?)", (table, last)
            )

    def refuse_orphans(self, restored: Collection[str]) -> None:
        """Raises BackupError if rows of a table refer to missing rows, and only one of the two
        tables is restored.
        """
        restored = {name.lower() for name in restored}
        for table in self._structure.tables:
            keys = self.connection.execute(
                'SELECT lower("table") FROM pragma_foreign_key_list(?)', (table.name,)
            )
            parents = {
                parent
                for (parent,) in keys
                if (parent in restored) != (table.name.lower() in restored)
            }
            if not parents:
                continue
            for _, _, parent, _ in self.connection.execute(
                f"PRAGMA main.foreign_key_check({quoted(table.name)})"
            ):
                if parent.lower() in parents:
                    raise BackupError(
                        f"after the restore, rows of {table.name} would refer to rows of {parent} "
                        "that are not there, so nothing was changed"
                    )

    def make_views_and_triggers(self) -> None:
        for view_or_trigger in self._structure.created("view", "trigger"):
            self.connection.execute(view_or_trigger.sql)

    def _attach(self, schema: str, path: Path, mode: str) -> None:
        self.connection.execute(f"ATTACH ? AS {schema}", (uri_of(path, mode),))

    def _fill(self, table: SavedTable) -> None:
        for part in self._structure.parts(table.name):
            columns = tuple(part.columns) if part.owner else table.columns
            self._refuse_unlike(part.name, columns)
            self._copy(part.name, SAVED, columns)
        self._make_indexes(table.name)
        if self._has_numbers(SAVED):
            self._refuse_unlike(SEQUENCES, ("name", "seq"))
            self.go_on_behind(SAVED, table.name)

    def _refuse_unlike(self, name: str, columns: tuple[str, ...]) -> None:
        """Raises DamagedBackup unless the backup's file has a table with this name, these columns,
        and sound pages.

        The file's schema is not trusted: it could define a view under that name, for example.
        """
        is_table = self.connection.execute(
            "SELECT type IN ('table', 'shadow') FROM pragma_table_list WHERE schema = ? "
            "AND name = ?",
            (SAVED, name),
        ).fetchone()
        names = self.connection.execute(
            "SELECT name FROM pragma_table_xinfo(?, ?) WHERE hidden = ? ORDER BY cid",
            (name, SAVED, PLAIN_COLUMN),
        )
        if is_table != (1,) or tuple(column for (column,) in names) != columns:
            raise self._damaged(f"{name} is not a table with the columns in its manifest")
        self.connection.execute("PRAGMA ignore_check_constraints = ON")
        (result,) = self.connection.execute(
            f"PRAGMA {SAVED}.quick_check({quoted(name)})"
        ).fetchone()
        self.connection.execute("PRAGMA ignore_check_constraints = OFF")
        if result != "ok":
            raise self._damaged(str(result.splitlines()[-1]))

    def _damaged(self, cause: str) -> DamagedBackup:
        return DamagedBackup(
            f"the database in the backup {self._backup.source.name} is damaged, and nothing was "
            f"changed: {cause}. Use another backup"
        )

    def _copy(self, name: str, schema: str, columns: tuple[str, ...]) -> None:
        """Copy all rows of a table, with their rowids. NOT INDEXED, because the backup's indexes
        are not trusted.
        """
        rowid = row_number(self.connection, name)
        listed = ", ".join([*([rowid] if rowid else []), *map(quoted, columns)])
        to, table = f"main.{quoted(name)}", f"{schema}.{quoted(name)}"
        self.connection.execute(f"DELETE FROM {to}")
        self.connection.execute(
            f"INSERT INTO {to} ({listed}) SELECT {listed} FROM {table} NOT INDEXED"
        )

    def _make_indexes(self, table: str) -> None:
        for index in self._structure.created("index"):
            if index.table == table:
                self.connection.execute(index.sql)

    def _has_numbers(self, schema: str) -> bool:
        """Whether the schema has a table with AUTOINCREMENT."""
        rows = self.connection.execute(
            f"SELECT 1 FROM {schema}.sqlite_master WHERE name = ?",
            (SEQUENCES,),
        )
        return rows.fetchone() is not None

    def _last_number(self, schema: str, table: str) -> int | None:
        """The last number that AUTOINCREMENT has given to the table in that schema; None if there
        is none.
        """
        if not (self._has_numbers(schema) and self._has_numbers("main")):
            return None
        rows = self.connection.execute(
            f"SELECT max(seq) FROM {schema}.{SEQUENCES} WHERE name = ? AND typeof(seq) = 'integer'",
            (table,),
        )
        number: int | None = rows.fetchone()[0]
        return number

    def _counted(self, tables: Sequence[SavedTable]) -> dict[str, int]:
        """Count the rows by a new connection: in this one, a virtual table may hold state older
        than its rows.
        """
        with closing(opened(self._path, "mode=ro")) as connection:
            guard(connection, self._backup.source.size)
            connection.set_progress_handler(self._stop.is_requested, CHECK_EVERY_INSTRUCTIONS)
            return {
                str(table): connection.execute(
                    f"SELECT count(*) FROM {quoted(table.name)}"
                ).fetchone()[0]
                for table in tables
            }
