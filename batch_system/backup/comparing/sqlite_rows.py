"""Compares two SQLite databases by SQL, table by table, in one connection to which both are
attached.

Rows are joined by the index of the key, so nothing is sorted and memory stays flat. Both databases
are only read, each at one instant.
"""

from __future__ import annotations

import marshal
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from batch_system.backup.comparing.differences import Difference, Pair, Side, Table, pairs
from batch_system.backup.comparing.tally import AFTER, BEFORE, Counts, Keyless
from batch_system.backup.file.selection import quoted
from batch_system.backup.sqlite.plain_file import guard
from batch_system.concurrency.stoppable import Stop
from batch_system.errors import BackupError

BUSY_SECONDS = 10.0
CACHE_KILOBYTES = 8_000
CHECK_EVERY_INSTRUCTIONS = 100_000
FETCHED = 500
COLUMNS_AT_ONCE = 100
SCHEMAS = ("main", "newer")
"""The schema names of the databases before and after. (The connection uses the encoding of the main
one.)
"""


@contextmanager
def attached(before: str, after: str, stop: Stop, packed: int = 0) -> Iterator[sqlite3.Connection]:
    """A connection to both databases, given as URIs, each of which stays at one instant until the
    end of the block.

    `packed`: the bytes of the larger backup; its database file is not trusted. Raises BackupError.
    """
    with explained("the databases", stop), closing(_connected(before)) as connection:
        guard(connection, packed)
        connection.execute(f"ATTACH ? AS {SCHEMAS[AFTER]}", (after,))
        connection.set_progress_handler(stop.is_requested, CHECK_EVERY_INSTRUCTIONS)
        for schema in SCHEMAS:
            connection.execute(f"PRAGMA {schema}.cache_size = -{CACHE_KILOBYTES}")
        connection.execute("PRAGMA temp_store = FILE")
        connection.execute("PRAGMA query_only = ON")
        connection.execute("BEGIN")
        for schema in SCHEMAS:
            connection.execute(f"PRAGMA {schema}.schema_version").fetchone()
        yield connection


def uri(path: Path, is_ours: bool) -> str:
    """The URI of a file. `is_ours`: whether only this process uses it.

    A database that others use is opened for writing too, because SQLite may have to write the
    `-shm` file beside it.
    """
    return f"{path.absolute().as_uri()}?{'immutable=1' if is_ours else 'mode=rw'}"


def tables(connection: sqlite3.Connection, side: int) -> tuple[Table, ...]:
    """The ordinary tables of one side, by name."""
    names = connection.execute(
        "SELECT name FROM pragma_table_list WHERE schema = ? AND type = 'table'"
        " AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\' ORDER BY 1",
        (SCHEMAS[side],),
    ).fetchall()
    return tuple(_table(connection, side, name) for (name,) in names)


def _table(connection: sqlite3.Connection, side: int, name: str) -> Table:
    """The table without its generated columns."""
    columns = connection.execute(
        "SELECT name, type, pk FROM pragma_table_xinfo(?, ?) WHERE hidden = 0 ORDER BY cid",
        (name, SCHEMAS[side]),
    ).fetchall()
    names, types = (tuple(column[field] for column in columns) for field in (0, 1))
    key = tuple(
        column
        for _, column in sorted((position, column) for column, _, position in columns if position)
    )
    return Table(None, name, names, types, key)


def revisions(connection: sqlite3.Connection, side: int) -> dict[str, str]:
    """The revisions in Alembic's version tables, by the table's name."""
    revisions_by_table = {}
    for table in tables(connection, side):
        if table.columns == ("version_num",):
            named = f"{SCHEMAS[side]}.{quoted(table.name)}"
            rows = connection.execute(f"SELECT version_num FROM {named} ORDER BY 1")
            revisions_by_table[table.name] = ", ".join(str(version) for (version,) in rows)
    return revisions_by_table


def compare(connection: sqlite3.Connection, before: Side, after: Side, stop: Stop) -> Difference:
    """Compare the two databases of a connection from `attached`. Raises BackupError."""
    counts = []
    for pair in pairs(before, after):
        with explained(f"table {pair.name}", stop):
            counts.append((pair, _counts(connection, pair)))
    return Difference.of(before, after, counts)


def _counts(connection: sqlite3.Connection, pair: Pair) -> Counts:
    before, after = (_count(connection, side, pair) for side in (BEFORE, AFTER))
    if pair.before is None or pair.after is None:
        return Counts(before, after, added=after, removed=before, changed=0, same=False)
    if not pair.shared:
        return Counts(before, after, None, None, None, same=before == after == 0)
    if not (collations := _collations(connection, pair)):
        return _keyless(connection, pair)
    matched, changed = _matched(connection, pair, collations)
    added, removed = after - matched, before - matched
    return Counts(before, after, added, removed, changed, same=not (added or removed or changed))


def _count(connection: sqlite3.Connection, side: int, pair: Pair) -> int:
    if (pair.before, pair.after)[side] is None:
        return 0
    return int(connection.execute(f"SELECT count(*) FROM {_named(side, pair)}").fetchone()[0])


def _collations(connection: sqlite3.Connection, pair: Pair) -> list[str]:
    """The collation of each column of the key; empty if the key does not identify rows on both
    sides.

    The key is not used either if its types or collations differ, because then no index helps, or if
    it contains NULL, which SQLite allows in several rows.
    """
    types = [table.type_of for table in (pair.before, pair.after) if table]
    if not pair.key or any(types[BEFORE][name] != types[AFTER][name] for name in pair.key):
        return []
    before, after = (_collations_of(connection, side, pair) for side in (BEFORE, AFTER))
    if before != after or any(_has_null(connection, side, pair) for side in (BEFORE, AFTER)):
        return []
    return before


def _collations_of(connection: sqlite3.Connection, side: int, pair: Pair) -> list[str]:
    """The collations in the index of the key. An INTEGER PRIMARY KEY has no index, and needs
    none.
    """
    rows = connection.execute(
        "SELECT x.name, x.coll FROM pragma_index_list(?, ?) AS i, pragma_index_xinfo(i.name, ?) "
        "AS x"
        " WHERE i.origin = 'pk' AND x.key",
        (pair.name, SCHEMAS[side], SCHEMAS[side]),
    )
    by_column = dict(rows.fetchall())
    return [by_column.get(name, "BINARY") for name in pair.key]


def _has_null(connection: sqlite3.Connection, side: int, pair: Pair) -> bool:
    null = " OR ".join(f"{quoted(name)} IS NULL" for name in pair.key)
    (has_null,) = connection.execute(
        f"SELECT EXISTS (SELECT 1 FROM {_named(side, pair)} WHERE {null})"
    ).fetchone()
    return bool(has_null)


def _matched(
    connection: sqlite3.Connection, pair: Pair, collations: Iterable[str]
) -> tuple[int, int]:
    """How many keys both sides have, and how many of the rows with those keys differ."""
    joined = " AND ".join(
        f"a.{quoted(name)} = b.{quoted(name)} COLLATE {quoted(collation)}"
        for name, collation in zip(pair.key, collations, strict=True)
    )
    matched, changed = connection.execute(
        f"SELECT count(*), coalesce(sum({_differs(pair.shared)}), "
        "0)"
        f" FROM {_named(BEFORE, pair)} AS b CROSS JOIN {_named(AFTER, pair)} AS a ON {joined}"
    ).fetchone()
    return matched, changed


def _differs(columns: Sequence[str]) -> str:
    """The SQL condition that two rows differ in these columns, in value or type (1 is not 1.0).

    The columns are compared in groups, because there may be 2,000 of them.
    """
    conditions = []
    for start in range(0, len(columns), COLUMNS_AT_ONCE):
        names = [quoted(name) for name in columns[start : start + COLUMNS_AT_ONCE]]
        before = ", ".join(f"b.{name}, typeof(b.{name})" for name in names)
        after = ", ".join(f"a.{name} COLLATE BINARY, typeof(a.{name})" for name in names)
        conditions.append(f"({before}) IS NOT ({after})")
    return " OR ".join(conditions)


def _keyless(connection: sqlite3.Connection, pair: Pair) -> Counts:
    tally = Keyless()
    values = ", ".join(
        f"typeof({name}), CASE typeof({name}) WHEN 'text' THEN CAST({name} AS BLOB) ELSE {name} END"
        for name in map(quoted, pair.shared)
    )
    for side in (BEFORE, AFTER):
        cursor = connection.execute(f"SELECT {values} FROM {_named(side, pair)}")
        while rows := cursor.fetchmany(FETCHED):
            # In version 2, equal values have equal bytes.
            tally.add(side, [marshal.dumps(row, 2) for row in rows])
    return tally.counts()


def _named(side: int, pair: Pair) -> str:
    return f"{SCHEMAS[side]}.{quoted(pair.name)}"


def _connected(uri: str) -> sqlite3.Connection:
    return sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None)


@contextmanager
def explained(what: str, stop: Stop) -> Iterator[None]:
    """Turn an error of SQLite in the block into a BackupError. `what`: the compared part, for the
    message.
    """
    try:
        yield
    except sqlite3.Error as error:
        stop.check()
        raise BackupError(
            f"{what} could not be compared: {error}. Look at the file that DATABASE_URL names, and "
            "at the room in the folder for temporary files (TMPDIR)."
        ) from error
