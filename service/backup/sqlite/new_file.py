"""SQLite: a new database file, whose tables are made of trusted text, and filled with the rows of a backup."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Self

from service.backup.file.folder import create
from service.backup.file.progress import Meter
from service.backup.file.reader import Backup, SavedTable
from service.backup.file.selection import quoted
from service.backup.sqlite.plain_file import CHECK_EVERY_INSTRUCTIONS, guard, loading, opened, uri_of
from service.backup.sqlite.structure import Structure, row_number
from service.backup.sqlite.tables import PLAIN_COLUMN
from service.concurrency.stoppable import Stop
from service.errors import BackupError, DamagedBackup

FILE_SETTINGS = ("page_size", "encoding", "auto_vacuum", "application_id", "user_version")
WRITING = ("journal_mode = OFF", "synchronous = OFF", "foreign_keys = OFF", "temp_store = FILE", "cache_size = -32000")
"""For a file that is thrown away where anything fails."""
LARGEST_VALUE = 2**31 - 1
SAVED, LIVE, MADE = "saved", "live", "made"
"""Schemas of the connection: the file of the backup, which is not trusted; the live file; what the migrations made."""
SEQUENCES = "sqlite_sequence"


def file_settings(connection: sqlite3.Connection) -> dict[str, int | str]:
    """What a file is, apart from its tables."""
    return {name: connection.execute(f"PRAGMA {name}").fetchone()[0] for name in FILE_SETTINGS}


class NewFile:
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

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.connection.close()

    def make_tables(self, settings: Mapping[str, int | str]) -> None:
        """A table's indexes follow when it has its rows; views and triggers at the end, so that none fires."""
        for name, value in settings.items():
            self.connection.execute(f"PRAGMA {name} = {value!r}")
        for setting in WRITING:
            self.connection.execute(f"PRAGMA {setting}")
        for one in self._structure.created("table"):
            self.connection.execute(one.sql)
        if self._structure.has_statistics:
            self.connection.execute("ANALYZE")

    def fill(self, saved: Path, tables: Sequence[SavedTable], meter: Meter) -> dict[str, int]:
        """The rows of the backup; returns how many each of these tables has. Raises DamagedBackup."""
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
        """The rows of tables that are not restored, from the live file or from what the migrations made."""
        self.connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LARGEST_VALUE)  # these are no file's from outside
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
        """AUTOINCREMENT gives no number that it has given in that schema."""
        there, here = self._last_number(schema, table), self._last_number("main", table)
        if there is None or there <= (here or 0):
            return
        changed = self.connection.execute("UPDATE main.sqlite_sequence SET seq = ? WHERE name = ?", (there, table))
        if changed.rowcount == 0:
            self.connection.execute("INSERT INTO main.sqlite_sequence (name, seq) VALUES (?, ?)", (table, there))

    def refuse_orphans(self, restored: Collection[str]) -> None:
        """Rows that refer to nothing, where one of the two tables was restored and the other one was not."""
        restored = {name.lower() for name in restored}
        for table in self._structure.tables:
            keys = self.connection.execute('SELECT lower("table") FROM pragma_foreign_key_list(?)', (table.name,))
            parents = {parent for (parent,) in keys if (parent in restored) != (table.name.lower() in restored)}
            if not parents:
                continue
            for _, _, parent, _ in self.connection.execute(f"PRAGMA main.foreign_key_check({quoted(table.name)})"):
                if parent.lower() in parents:
                    raise BackupError(
                        f"after the restore, rows of {table.name} would refer to rows of {parent} that are not there, "
                        "so nothing was changed"
                    )

    def make_views_and_triggers(self) -> None:
        for one in self._structure.created("view", "trigger"):
            self.connection.execute(one.sql)

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
        """The file's own schema may say of a table whatever it likes, so it is looked at; and its pages are checked."""
        kind = self.connection.execute(
            "SELECT type IN ('table', 'shadow') FROM pragma_table_list WHERE schema = ? AND name = ?", (SAVED, name)
        ).fetchone()
        found = self.connection.execute(
            "SELECT name FROM pragma_table_xinfo(?, ?) WHERE hidden = ? ORDER BY cid", (name, SAVED, PLAIN_COLUMN)
        )
        if kind != (1,) or tuple(column for (column,) in found) != columns:
            raise self._damaged(f"{name} is no table with the columns that its manifest says")
        self.connection.execute("PRAGMA ignore_check_constraints = ON")
        (result,) = self.connection.execute(f"PRAGMA {SAVED}.quick_check({quoted(name)})").fetchone()
        self.connection.execute("PRAGMA ignore_check_constraints = OFF")
        if result != "ok":
            raise self._damaged(str(result.splitlines()[-1]))

    def _damaged(self, why: str) -> DamagedBackup:
        return DamagedBackup(
            f"the database in the backup {self._backup.source.name} is damaged, and nothing was changed: {why}. Use "
            "another backup"
        )

    def _copy(self, name: str, schema: str, columns: tuple[str, ...]) -> None:
        """Rows keep their numbers. The schema's indexes are not used: those of the backup may say anything."""
        number = row_number(self.connection, name)
        listed = ", ".join([*([number] if number else []), *map(quoted, columns)])
        to, table = f"main.{quoted(name)}", f"{schema}.{quoted(name)}"
        self.connection.execute(f"DELETE FROM {to}")  # noqa: S608 (quoted, as is all below)
        self.connection.execute(f"INSERT INTO {to} ({listed}) SELECT {listed} FROM {table} NOT INDEXED")  # noqa: S608

    def _make_indexes(self, table: str) -> None:
        for one in self._structure.created("index"):
            if one.table == table:
                self.connection.execute(one.sql)

    def _has_numbers(self, schema: str) -> bool:
        found = self.connection.execute(f"SELECT 1 FROM {schema}.sqlite_master WHERE name = ?", (SEQUENCES,))  # noqa: S608
        return found.fetchone() is not None

    def _last_number(self, schema: str, table: str) -> int | None:
        if not (self._has_numbers(schema) and self._has_numbers("main")):
            return None
        found = self.connection.execute(
            f"SELECT max(seq) FROM {schema}.{SEQUENCES} WHERE name = ? AND typeof(seq) = 'integer'",  # noqa: S608
            (table,),
        )
        number: int | None = found.fetchone()[0]
        return number

    def _counted(self, tables: Sequence[SavedTable]) -> dict[str, int]:
        """By another connection: what a virtual table keeps in its memory is older than its rows."""
        with closing(opened(self._path, "mode=ro")) as connection:
            guard(connection, self._backup.source.size)
            connection.set_progress_handler(self._stop.is_requested, CHECK_EVERY_INSTRUCTIONS)
            return {
                str(table): connection.execute(f"SELECT count(*) FROM {quoted(table.name)}").fetchone()[0]  # noqa: S608
                for table in tables
            }
