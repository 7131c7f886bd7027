"""What a SQLite database is made of, as text that is trusted: the application's own, or that of our migrations.

A new file is made of it. Nothing of a backup's own schema ever is.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Self

from service.backup.sqlite.tables import ORDINARY, PLAIN_COLUMN, VIRTUAL

SHADOW = "shadow"
"""SQLite's word for a table in which a virtual one keeps its rows."""
STATISTICS = "sqlite_stat1"

OBJECTS = """
SELECT type, name, tbl_name, sql FROM sqlite_master WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\'
ORDER BY rowid
"""


@dataclass(frozen=True)
class Object:
    """A table, an index, a view or a trigger; `table` is the one (or the view) that it belongs to."""

    kind: str
    name: str
    table: str
    sql: str

    def __str__(self) -> str:
        return f"the {self.kind} {self.name}" + (f" of {self.table}" if self.table != self.name else "")


@dataclass(frozen=True)
class Table:
    """`columns`: the type of each that is not generated. `needed`: those to which a row must give a value.

    `owner`: the virtual table whose rows it keeps.
    """

    name: str
    kind: str
    columns: dict[str, str]
    needed: tuple[str, ...]
    owner: str | None = None


@dataclass(frozen=True)
class Structure:
    """`has_statistics`: ANALYZE was called at some time."""

    objects: tuple[Object, ...] = ()
    tables: tuple[Table, ...] = ()
    has_statistics: bool = False

    @classmethod
    def of(cls, connection: sqlite3.Connection) -> Self:
        objects = tuple(Object(*row) for row in connection.execute(OBJECTS))
        kinds = connection.execute(
            "SELECT name, type FROM pragma_table_list WHERE schema = 'main' AND type IN (?, ?, ?)"
            " AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\' ORDER BY name",
            (ORDINARY, VIRTUAL, SHADOW),
        ).fetchall()
        virtual = [name for name, kind in kinds if kind == VIRTUAL]
        tables = tuple(_table(connection, name, kind, virtual) for name, kind in kinds)
        statistics = connection.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (STATISTICS,)).fetchone()
        return cls(objects, tables, statistics is not None)

    def with_missing(self, other: Self) -> Self:
        """And the other one's tables and views that are not here."""
        here = {one.table for one in self.objects}
        return type(self)(
            (*self.objects, *(one for one in other.objects if one.table not in here)),
            (*self.tables, *(table for table in other.tables if table.name not in here)),
            self.has_statistics,
        )

    def table(self, name: str) -> Table | None:
        return next((table for table in self.tables if table.name == name), None)

    def parts(self, name: str) -> list[Table]:
        """The tables that hold a table's rows: itself, or those of a virtual one, which may have none."""
        return [
            table for table in self.tables if table.owner == name or (table.name == name and table.kind == ORDINARY)
        ]

    def with_rows(self) -> list[Table]:
        """Without the tables that are parts of others, and without those that only show the rows of others."""
        return [table for table in self.tables if table.owner is None and self.parts(table.name)]

    def created(self, *kinds: str) -> Iterator[Object]:
        """Those of these kinds, in the order in which they can be made. Virtual tables make their own themselves."""
        shadows = {table.name for table in self.tables if table.kind == SHADOW}
        for kind in kinds:
            yield from (one for one in self.objects if one.kind == kind and one.table not in shadows)

    def unmakeable(self) -> list[str]:
        """What can't be made here, with the reason: it needs a function, a collation or a module of the application."""
        found: dict[str, str] = {}
        with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
            for one in self.created("table", "index"):
                try:
                    connection.execute(one.sql)
                except sqlite3.Error as error:
                    found.setdefault(one.table, f"{one} can't be made here ({error})")
        return list(found.values())


def _table(connection: sqlite3.Connection, name: str, kind: str, virtual: list[str]) -> Table:
    columns = connection.execute(
        'SELECT name, type, "notnull" AND dflt_value IS NULL AND NOT pk FROM pragma_table_xinfo(?) WHERE hidden = ?'
        " ORDER BY cid",
        (name, PLAIN_COLUMN),
    ).fetchall()
    owners = [owner for owner in virtual if kind == SHADOW and name.lower().startswith(f"{owner.lower()}_")]
    needed = tuple(column for column, _, is_needed in columns if is_needed)
    owner = max(owners, key=len, default=None)
    return Table(name, kind, {column: type_ for column, type_, _ in columns}, needed, owner)


def row_number(connection: sqlite3.Connection, table: str) -> str | None:
    """The name of the number that a table's rows have beside their columns. None: there is none, or its key is it."""
    (is_without,) = connection.execute(
        "SELECT wr FROM pragma_table_list WHERE schema = 'main' AND name = ?", (table,)
    ).fetchone()
    columns = connection.execute("SELECT name, pk FROM pragma_table_xinfo(?)", (table,)).fetchall()
    has_index = connection.execute("SELECT 1 FROM pragma_index_list(?) WHERE origin = 'pk'", (table,)).fetchone()
    if is_without or (any(place for _, place in columns) and not has_index):
        return None
    taken = {name.lower() for name, _ in columns}
    return next((name for name in ("rowid", "_rowid_", "oid") if name not in taken), None)
