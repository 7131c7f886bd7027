"""Compares two SQLite databases, table by table, in one connection that has both: SQLite does the work.

Rows are joined by the key's index, so nothing is sorted and memory stays flat. Both are only read, each as one instant.
"""

from __future__ import annotations

import marshal
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from service.backup.comparing.differences import Difference, Pair, Side, Table, pairs
from service.backup.comparing.tally import AFTER, BEFORE, Counts, Keyless
from service.backup.file.selection import quoted
from service.backup.sqlite.plain_file import guard
from service.concurrency.stoppable import Stop
from service.errors import BackupError

BUSY_SECONDS = 10.0
CACHE_KILOBYTES = 8_000
CHECK_EVERY_INSTRUCTIONS = 100_000
FETCHED = 500
COLUMNS_AT_ONCE = 100
SCHEMAS = ("main", "newer")
"""What the two are called in the connection, before and after. (The main one decides about the encoding.)"""


@contextmanager
def attached(before: str, after: str, stop: Stop, packed: int = 0) -> Iterator[sqlite3.Connection]:
    """A connection with both databases, given as URIs; both show one instant until it is closed.

    `packed`: the bytes of the (larger) backup, of whose file nothing is believed.
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
    """`is_ours`: nobody else opens it. A database that is in use needs the right to write its `-shm` beside it."""
    return f"{path.absolute().as_uri()}?{'immutable=1' if is_ours else 'mode=rw'}"


def tables(connection: sqlite3.Connection, side: int) -> tuple[Table, ...]:
    """Ordinary ones, by name."""
    found = connection.execute(
        "SELECT name FROM pragma_table_list WHERE schema = ? AND type = 'table'"
        " AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\' ORDER BY 1",
        (SCHEMAS[side],),
    ).fetchall()
    return tuple(_table(connection, side, name) for (name,) in found)


def _table(connection: sqlite3.Connection, side: int, name: str) -> Table:
    """Without the columns that are generated."""
    columns = connection.execute(
        "SELECT name, type, pk FROM pragma_table_xinfo(?, ?) WHERE hidden = 0 ORDER BY cid", (name, SCHEMAS[side])
    ).fetchall()
    names, types = (tuple(column[place] for column in columns) for place in (0, 1))
    key = tuple(column for _, column in sorted((place, column) for column, _, place in columns if place))
    return Table(None, name, names, types, key)


def revisions(connection: sqlite3.Connection, side: int) -> dict[str, str]:
    """What alembic's tables say, by the table's name."""
    found = {}
    for table in tables(connection, side):
        if table.columns == ("version_num",):
            named = f"{SCHEMAS[side]}.{quoted(table.name)}"
            rows = connection.execute(f"SELECT version_num FROM {named} ORDER BY 1")  # noqa: S608 (names are quoted)
            found[table.name] = ", ".join(str(version) for (version,) in rows)
    return found


def compare(connection: sqlite3.Connection, before: Side, after: Side, stop: Stop) -> Difference:
    counted = []
    for pair in pairs(before, after):
        with explained(f"table {pair.name}", stop):
            counted.append((pair, _counts(connection, pair)))
    return Difference.of(before, after, counted)


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
    return int(connection.execute(f"SELECT count(*) FROM {_named(side, pair)}").fetchone()[0])  # noqa: S608 (names are quoted)


def _collations(connection: sqlite3.Connection, pair: Pair) -> list[str]:
    """How each column of the key is compared; empty when rows can't be told apart by it.

    That is also so where the key's types or collations differ (no index would serve), or where NULL stands in it, which
    SQLite allows, several times over.
    """
    types = [table.type_of for table in (pair.before, pair.after) if table]
    if not pair.key or any(types[BEFORE][name] != types[AFTER][name] for name in pair.key):
        return []
    before, after = (_collations_of(connection, side, pair) for side in (BEFORE, AFTER))
    if before != after or any(_has_null(connection, side, pair) for side in (BEFORE, AFTER)):
        return []
    return before


def _collations_of(connection: sqlite3.Connection, side: int, pair: Pair) -> list[str]:
    """Those of the key's index. An INTEGER PRIMARY KEY has none, and needs none."""
    found = connection.execute(
        "SELECT x.name, x.coll FROM pragma_index_list(?, ?) AS i, pragma_index_xinfo(i.name, ?) AS x"
        " WHERE i.origin = 'pk' AND x.key",
        (pair.name, SCHEMAS[side], SCHEMAS[side]),
    )
    by_column = dict(found.fetchall())
    return [by_column.get(name, "BINARY") for name in pair.key]


def _has_null(connection: sqlite3.Connection, side: int, pair: Pair) -> bool:
    null = " OR ".join(f"{quoted(name)} IS NULL" for name in pair.key)
    found = connection.execute(f"SELECT EXISTS (SELECT 1 FROM {_named(side, pair)} WHERE {null})").fetchone()  # noqa: S608 (names are quoted)
    return bool(found[0])


def _matched(connection: sqlite3.Connection, pair: Pair, collations: Iterable[str]) -> tuple[int, int]:
    """How many keys both sides have, and how many of those rows differ otherwise."""
    joined = " AND ".join(
        f"a.{quoted(name)} = b.{quoted(name)} COLLATE {quoted(collation)}"
        for name, collation in zip(pair.key, collations, strict=True)
    )
    matched, changed = connection.execute(
        f"SELECT count(*), coalesce(sum({_differs(pair.shared)}), 0)"  # noqa: S608 (names are quoted)
        f" FROM {_named(BEFORE, pair)} AS b CROSS JOIN {_named(AFTER, pair)} AS a ON {joined}"
    ).fetchone()
    return matched, changed


def _differs(columns: Sequence[str]) -> str:
    """By value and by type, for 1 is not 1.0; in groups, for there may be 2,000 columns."""
    said = []
    for at in range(0, len(columns), COLUMNS_AT_ONCE):
        names = [quoted(name) for name in columns[at : at + COLUMNS_AT_ONCE]]
        b = ", ".join(f"b.{name}, typeof(b.{name})" for name in names)
        a = ", ".join(f"a.{name} COLLATE BINARY, typeof(a.{name})" for name in names)
        said.append(f"({b}) IS NOT ({a})")
    return " OR ".join(said)


def _keyless(connection: sqlite3.Connection, pair: Pair) -> Counts:
    tally = Keyless()
    values = ", ".join(
        f"typeof({name}), CASE typeof({name}) WHEN 'text' THEN CAST({name} AS BLOB) ELSE {name} END"
        for name in map(quoted, pair.shared)
    )
    for side in (BEFORE, AFTER):
        cursor = connection.execute(f"SELECT {values} FROM {_named(side, pair)}")  # noqa: S608 (names are quoted)
        while rows := cursor.fetchmany(FETCHED):
            tally.add(side, [marshal.dumps(row, 2) for row in rows])  # 2: equal values are equal bytes
    return tally.counts()


def _named(side: int, pair: Pair) -> str:
    return f"{SCHEMAS[side]}.{quoted(pair.name)}"


def _connected(uri: str) -> sqlite3.Connection:
    return sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None)


@contextmanager
def explained(what: str, stop: Stop) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        stop.check()
        raise BackupError(
            f"{what} could not be compared: {error}. Look at the file that DATABASE_URL names, and at the room in the "
            "folder for temporary files (TMPDIR)."
        ) from error
