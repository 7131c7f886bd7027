"""The structure of a SQLite database as trusted SQL, which comes from the application's file or
from the migrations.

A restore makes the new file from it. The SQL in a backup's own schema is never executed.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Self

from batch_system.backup.sqlite.tables import ORDINARY, PLAIN_COLUMN, VIRTUAL

SHADOW = "shadow"
"""SQLite's word for a table in which a virtual table stores its rows."""
STATISTICS = "sqlite_stat1"

OBJECTS = """
SELECT type, name, tbl_name, sql FROM sqlite_master
WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\'
ORDER BY rowid
"""


@dataclass(frozen=True)
class SchemaObject:
    """A table, an index, a view or a trigger. `table`: the table or view that it belongs to, or its
    own name.
    """

    kind: str
    name: str
    table: str
    sql: str

    def __str__(self) -> str:
        return f"the {self.kind} {self.name}" + (
            f" of {self.table}" if self.table != self.name else ""
        )


@dataclass(frozen=True)
class Table:
    """A table. `columns`: the declared types of its columns by name, without the generated ones.

    `needed`: the columns that every row must have a value for. `owner`: the virtual table whose
    rows it stores.
    """

    name: str
    kind: str
    columns: dict[str, str]
    needed: tuple[str, ...]
    owner: str | None = None


@dataclass(frozen=True)
class Structure:
    """The objects and tables of a database. `has_statistics`: whether ANALYZE has been executed in
    it.
    """

    objects: tuple[SchemaObject, ...] = ()
    tables: tuple[Table, ...] = ()
    has_statistics: bool = False

    @classmethod
    def of(cls, connection: sqlite3.Connection) -> Self:
        objects = tuple(SchemaObject(*row) for row in connection.execute(OBJECTS))
        kinds = connection.execute(
            "SELECT name, type FROM pragma_table_list WHERE schema = 'main' AND type IN (?, ?, ?)"
            " AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\' ORDER BY name",
            (ORDINARY, VIRTUAL, SHADOW),
        ).fetchall()
        virtual = [name for name, kind in kinds if kind == VIRTUAL]
        tables = tuple(_table(connection, name, kind, virtual) for name, kind in kinds)
        statistics = connection.execute(
            "SELECT 1 FROM sqlite_master WHERE name = ?", (STATISTICS,)
        ).fetchone()
        return cls(objects, tables, statistics is not None)

    def with_missing(self, other: Self) -> Self:
        """This structure, and the tables and views of the other one that are missing in it."""
        names = {each.table for each in self.objects}
        return type(self)(
            (*self.objects, *(each for each in other.objects if each.table not in names)),
            (*self.tables, *(table for table in other.tables if table.name not in names)),
            self.has_statistics,
        )

    def table(self, name: str) -> Table | None:
        return next((table for table in self.tables if table.name == name), None)

    def parts(self, name: str) -> list[Table]:
        """The tables that store a table's rows: the table itself, or the shadow tables of a virtual
        table, if any.
        """
        return [
            table
            for table in self.tables
            if table.owner == name or (table.name == name and table.kind == ORDINARY)
        ]

    def with_rows(self) -> list[Table]:
        """The tables with rows of their own: no shadow tables, and no virtual tables without shadow
        tables.
        """
        return [table for table in self.tables if table.owner is None and self.parts(table.name)]

    def created(self, *kinds: str) -> Iterator[SchemaObject]:
        """The objects of these kinds in the order of their creation, without shadow tables: SQLite
        creates those.
        """
        shadows = {table.name for table in self.tables if table.kind == SHADOW}
        for kind in kinds:
            yield from (
                each for each in self.objects if each.kind == kind and each.table not in shadows
            )

    def unmakeable(self) -> list[str]:
        """A message for each table that can't be created, such as one with a function or module of
        the application.
        """
        problems: dict[str, str] = {}
        with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
            for each in self.created("table", "index"):
                try:
                    connection.execute(each.sql)
                except sqlite3.Error as error:
                    problems.setdefault(each.table, f"{each} can't be made here ({error})")
        return list(problems.values())


def _table(connection: sqlite3.Connection, name: str, kind: str, virtual: list[str]) -> Table:
    columns = connection.execute(
        'SELECT name, type, "notnull" AND dflt_value IS NULL AND NOT pk '
        "FROM pragma_table_xinfo(?) WHERE hidden = ?"
        " ORDER BY cid",
        (name, PLAIN_COLUMN),
    ).fetchall()
    owners = [
        owner
        for owner in virtual
        if kind == SHADOW and name.lower().startswith(f"{owner.lower()}_")
    ]
    needed = tuple(column for column, _, is_needed in columns if is_needed)
    owner = max(owners, key=len, default=None)
    return Table(name, kind, {column: type_ for column, type_, _ in columns}, needed, owner)


def row_number(connection: sqlite3.Connection, table: str) -> str | None:
    """The name of a table's hidden rowid. None if it has no rowid, or if its primary key is the
    rowid.
    """
    (is_without,) = connection.execute(
        "SELECT wr FROM pragma_table_list WHERE schema = 'main' AND name = ?", (table,)
    ).fetchone()
    columns = connection.execute("SELECT name, pk FROM pragma_table_xinfo(?)", (table,)).fetchall()
    has_index = connection.execute(
        "SELECT 1 FROM pragma_index_list(?) WHERE origin = 'pk'", (table,)
    ).fetchone()
    if is_without or (any(place for _, place in columns) and not has_index):
        return None
    taken = {name.lower() for name, _ in columns}
    return next((name for name in ("rowid", "_rowid_", "oid") if name not in taken), None)
