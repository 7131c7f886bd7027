"""Comparing SQLite databases: backups with each other, and with the file that is in use."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batch_system.backup import create_backup
from batch_system.backup.comparing import sqlite_rows
from batch_system.backup.comparing.compare import diff
from batch_system.backup.comparing.differences import Difference, Side, TableDifference
from batch_system.backup.comparing.tally import AFTER, BEFORE
from batch_system.clock import now
from batch_system.concurrency.stoppable import Stop
from batch_system.config import get_settings
from batch_system.errors import BackupError
from tests.backup.here import make_backups_here

SCHEMA = """
CREATE TABLE "Größe; DROP" ("Key" TEXT PRIMARY KEY, "select" TEXT);
CREATE TABLE pairs (
    a INTEGER, b TEXT, v BLOB, twice INTEGER AS (a * 2), PRIMARY KEY (b, a)
) WITHOUT ROWID;
CREATE TABLE blobs (id BLOB PRIMARY KEY, v);
CREATE TABLE cases (name TEXT COLLATE NOCASE PRIMARY KEY, v);
CREATE TABLE holes (id TEXT PRIMARY KEY, v);
CREATE TABLE notes (v);
CREATE TABLE plain (id INTEGER PRIMARY KEY, v);
"""
ROWS = """
INSERT INTO "Größe; DROP" VALUES ('日本', NULL), ('', 'x'), ('é', 'y');
INSERT INTO pairs (a, b, v) VALUES (1, 'x', NULL), (2, 'x', x'00'), (1, 'y', ''), (1, 'z', 1);
INSERT INTO blobs VALUES (x'', 1), (x'00', 2), (x'0001', 3);
INSERT INTO cases VALUES ('a', 1), ('B', 2);
INSERT INTO holes VALUES (NULL, 1), (NULL, 2), ('x', 3);
INSERT INTO notes VALUES (1), (1), (CAST(x'ff00' AS TEXT)), (NULL), ('a' || char(0) || 'b');
INSERT INTO plain
    VALUES (1, 1), (2, 'text'), (3, x'616263'), (4, 0.1), (5, 'a' || char(0) || 'b'), (6, NULL);
"""


@pytest.fixture
def file(app_db: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_backups_here(monkeypatch)  # one process for each of many backups would be slow
    execute(app_db, "PRAGMA journal_mode = WAL;" + SCHEMA + ROWS)
    return app_db


def execute(file: Path, script: str) -> None:
    with closing(sqlite3.connect(file)) as connection:
        connection.executescript(script)


async def made(tmp_path: Path) -> str:
    return str(await create_backup(tmp_path / "backups"))


async def after(before: str) -> dict[str, TableDifference]:
    return {table.table: table for table in (await diff(get_settings(), before)).tables}


def rows(table: TableDifference) -> tuple[int | None, ...]:
    return table.added, table.changed, table.removed


async def test_a_backup_that_was_just_made_differs_in_nothing(file: Path, tmp_path: Path) -> None:
    found = await diff(get_settings(), await made(tmp_path))
    assert all(table.same and not table.schema for table in found.tables) and len(found.tables) == 7
    assert (found.added, found.changed, found.removed) == (0, 0, 0)


CHANGES = {
    'UPDATE "Größe; DROP" SET "select" = \'\' WHERE "Key" = \'日本\'': ("Größe; DROP", (0, 1, 0)),
    'UPDATE "Größe; DROP" SET "Key" = \'É\' WHERE "Key" = \'é\'': ("Größe; DROP", (1, 0, 1)),
    "INSERT INTO pairs (a, b) VALUES (2, 'y'); DELETE FROM pairs WHERE b = 'x'": (
        "pairs",
        (1, 0, 2),
    ),
    "UPDATE pairs SET v = '1' WHERE b = 'z'": ("pairs", (0, 1, 0)),
    "UPDATE pairs SET v = NULL WHERE v = ''": ("pairs", (0, 1, 0)),
    "UPDATE blobs SET id = x'0000' WHERE v = 2": ("blobs", (1, 0, 1)),
    "UPDATE cases SET name = 'b' WHERE name = 'B'": ("cases", (0, 1, 0)),
    "INSERT INTO cases VALUES ('c', 3)": ("cases", (1, 0, 0)),
    "UPDATE plain SET v = 1.0 WHERE id = 1": ("plain", (0, 1, 0)),
    "UPDATE plain SET v = 'abc' WHERE id = 3": ("plain", (0, 1, 0)),
    "UPDATE plain SET v = 'a' || char(0) || 'c' WHERE id = 5": ("plain", (0, 1, 0)),
    "UPDATE plain SET v = 0.1 + 1e-17 WHERE id = 4": ("plain", (0, 1, 0)),
    "DELETE FROM plain": ("plain", (0, 0, 6)),
}


@pytest.mark.parametrize("statement", CHANGES)
async def test_each_change_is_counted_once(file: Path, tmp_path: Path, statement: str) -> None:
    before = await made(tmp_path)
    execute(file, statement)
    name, counts = CHANGES[statement]
    found = await after(before)
    assert rows(found[name]) == counts
    assert all(table.same for other, table in found.items() if other != name)


WITHOUT_A_KEY = {
    "UPDATE notes SET v = 2 WHERE rowid = 1; UPDATE notes SET v = 1 WHERE rowid = 1": (
        "notes",
        True,
    ),
    "DELETE FROM notes WHERE rowid = 1; INSERT INTO notes VALUES (1)": ("notes", True),
    "DELETE FROM notes WHERE rowid = 1; INSERT INTO notes VALUES (1.0)": ("notes", False),
    "DELETE FROM notes WHERE rowid = 1; INSERT INTO notes VALUES (NULL)": ("notes", False),
    "UPDATE notes SET v = x'ff00' WHERE rowid = 3": ("notes", False),
    "UPDATE notes SET v = 'a' || char(0) WHERE rowid = 5": ("notes", False),
    "UPDATE holes SET v = 4 WHERE v = 2": ("holes", False),
}


@pytest.mark.parametrize("statement", WITHOUT_A_KEY)
async def test_without_a_key_a_comparison_only_tells_whether_rows_differ(
    file: Path, tmp_path: Path, statement: str
) -> None:
    """The key of `holes` is NULL in two rows, so it does not identify them."""
    before = await made(tmp_path)
    execute(file, statement)
    name, same = WITHOUT_A_KEY[statement]
    found = await after(before)
    assert rows(found[name]) == (None, None, None) and found[name].same is same
    assert found[name].rows_before == found[name].rows_after


async def test_a_dot_in_a_tables_name_is_no_schema(file: Path, tmp_path: Path) -> None:
    execute(
        file,
        'CREATE TABLE "public.plain" (id INTEGER PRIMARY KEY, v); INSERT INTO "public.plain" '
        "VALUES (1, 1)",
    )
    before = await made(tmp_path)
    execute(file, 'UPDATE "public.plain" SET v = 2')
    assert {
        name: rows(table) for name, table in (await after(before)).items() if not table.same
    } == {"public.plain": (0, 1, 0)}


async def test_differences_in_the_definitions_of_tables_are_reported(
    file: Path, tmp_path: Path
) -> None:
    before = await made(tmp_path)
    execute(
        file,
        "DROP TABLE holes; CREATE TABLE fresh (id INTEGER PRIMARY KEY); INSERT INTO fresh "
        "VALUES (1), (2);"
        "ALTER TABLE plain ADD COLUMN more TEXT; UPDATE plain SET more = 'x', v = 7 WHERE id < 3;"
        "DROP TABLE blobs; CREATE TABLE blobs (id TEXT PRIMARY KEY, v); INSERT INTO blobs "
        "VALUES ('', 1);"
        "DROP TABLE cases; CREATE TABLE cases (name TEXT, v PRIMARY KEY)",
    )
    found = await diff(get_settings(), before)
    assert found.schema == [
        "plain: column more added, TEXT",
        "blobs: column id was BLOB, is TEXT",
        "table holes removed",
        "cases: primary key was name, is v",
        "table fresh added",
    ]
    tables = {table.table: table for table in found.tables}
    assert rows(tables["plain"]) == (0, 2, 0), "the columns that both have are compared"
    assert rows(tables["blobs"]) == rows(tables["cases"]) == (None, None, None), (
        "their keys can't be compared"
    )
    assert (tables["fresh"].rows_before, tables["fresh"].rows_after, tables["fresh"].added) == (
        None,
        2,
        2,
    )
    assert (tables["holes"].rows_before, tables["holes"].rows_after, tables["holes"].removed) == (
        3,
        None,
        3,
    )
    assert (found.added, found.changed, found.removed) == (2, 2, 3)


async def test_keys_that_compare_differently_do_not_tell_rows_apart(
    file: Path, tmp_path: Path
) -> None:
    before = await made(tmp_path)
    execute(
        file,
        "DROP TABLE cases; CREATE TABLE cases (name TEXT PRIMARY KEY, v); INSERT INTO cases "
        "VALUES ('A', 1)",
    )
    assert rows((await after(before))["cases"]) == (None, None, None)


async def test_two_backups_are_compared_with_each_other(file: Path, tmp_path: Path) -> None:
    first = await made(tmp_path)
    execute(file, "UPDATE plain SET v = 8 WHERE id = 1; INSERT INTO plain VALUES (7, 7), (8, 8)")
    second = await made(tmp_path)
    execute(file, "DELETE FROM plain")
    found = await diff(get_settings(), first, second)
    assert (found.added, found.changed, found.removed) == (2, 1, 0)
    assert (found.before.name, found.after.name) == (first, second)
    back = await diff(get_settings(), second, first)
    assert (back.added, back.changed, back.removed) == (0, 1, 2)


async def test_one_instant_is_compared_while_others_write(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = await made(tmp_path)
    counts = sqlite_rows._counts

    def with_a_write(*args: Any) -> Any:
        execute(file, "INSERT INTO plain (v) VALUES (1); INSERT INTO notes VALUES (1)")
        return counts(*args)

    monkeypatch.setattr(sqlite_rows, "_counts", with_a_write)
    assert all(table.same for table in (await after(before)).values())


async def test_a_comparison_leaves_no_files_and_does_not_change_the_database(
    file: Path, tmp_path: Path
) -> None:
    before = await made(tmp_path)
    was = sorted(tmp_path.rglob("*")), file.read_bytes()
    await diff(get_settings(), before)
    await diff(get_settings(), before, before)
    assert (
        sorted(path for path in tmp_path.rglob("*") if not path.name.startswith("app.db-")),
        file.read_bytes(),
    ) == (
        [path for path in was[0] if not path.name.startswith("app.db-")],
        was[1],
    )


async def test_the_migrations_of_both_are_named(file: Path, tmp_path: Path) -> None:
    execute(
        file,
        "CREATE TABLE alembic_version (version_num TEXT); INSERT INTO alembic_version "
        "VALUES ('app_0004')",
    )
    before = await made(tmp_path)
    execute(file, "UPDATE alembic_version SET version_num = 'app_0005'")
    found = await diff(get_settings(), before)
    assert (found.before.revision, found.after.revision) == ("app_0004", "app_0005")


async def test_a_missing_or_invalid_database_is_named(
    file: Path, tmp_path: Path, use_database: Callable[[str], None]
) -> None:
    before = await made(tmp_path)
    use_database(f"sqlite:///{tmp_path}/missing.db")
    with pytest.raises(
        BackupError, match=r"there is no database at .*missing\.db: look at DATABASE_URL"
    ):
        await diff(get_settings(), before)
    (tmp_path / "text.db").write_text("no database " * 100)
    use_database(f"sqlite:///{tmp_path}/text.db")
    with pytest.raises(BackupError, match="could not be compared: file is not a database"):
        await diff(get_settings(), before)


async def test_a_backup_that_is_damaged_is_not_compared(file: Path, tmp_path: Path) -> None:
    before = await made(tmp_path)
    data = bytearray(Path(before).read_bytes())
    data[len(data) // 3] ^= 1
    Path(before).write_bytes(data)
    with pytest.raises(BackupError, match="is damaged"):
        await diff(get_settings(), before)


KEYED = [
    "(id INTEGER PRIMARY KEY, v)",
    "(id TEXT PRIMARY KEY, v)",
    "(id TEXT COLLATE NOCASE PRIMARY KEY, v)",
    "(id TEXT, v, PRIMARY KEY (id COLLATE NOCASE))",
    "(id PRIMARY KEY, v)",
    "(id INT, other BLOB, v, PRIMARY KEY (other, id))",
    "(id INT, other TEXT, v, PRIMARY KEY (other, id)) WITHOUT ROWID",
]


@pytest.mark.parametrize("columns", KEYED)
def test_rows_are_looked_up_by_the_keys_index_and_not_by_going_over_the_table(
    tmp_path: Path, columns: str
) -> None:
    paths = [tmp_path / name for name in ("a", "b")]
    for path in paths:
        execute(path, f"CREATE TABLE t {columns}")
    statements: list[str] = []
    with sqlite_rows.attached(
        *(sqlite_rows.uri(path, is_ours=False) for path in paths), Stop()
    ) as connection:
        connection.set_trace_callback(statements.append)
        _compare(connection)
        [joining] = [statement for statement in statements if " JOIN " in statement]
        steps = [step[3] for step in connection.execute(f"EXPLAIN QUERY PLAN {joining}")]
    assert len(steps) == 2 and steps[1].startswith("SEARCH a "), steps


VALUES = st.one_of(
    st.none(), st.integers(-2, 2), st.sampled_from([0.0, 1.0, 0.5, "1", "", "é", b"", b"1"])
)
KEYS = st.tuples(st.integers(0, 3), st.sampled_from(["", "a", "A", "日"]))
TABLES = st.dictionaries(KEYS, st.tuples(VALUES, VALUES), max_size=8)


@pytest.fixture(scope="module")
def two_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[sqlite3.Connection]]:
    folder = tmp_path_factory.mktemp("two")
    opened = [sqlite3.connect(folder / name, isolation_level=None) for name in ("a", "b")]
    for connection in opened:
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("CREATE TABLE t (a INTEGER, x, b TEXT, y, PRIMARY KEY (a, b))")
    yield opened
    for connection in opened:
        connection.close()


def compared(files: list[sqlite3.Connection]) -> Difference:
    paths = [Path(connection.execute("PRAGMA database_list").fetchone()[2]) for connection in files]
    with sqlite_rows.attached(
        *(sqlite_rows.uri(path, is_ours=False) for path in paths), Stop()
    ) as connection:
        return _compare(connection)


def _compare(connection: sqlite3.Connection) -> Difference:
    before, after = (
        Side("a side", now(), "sqlite", "", None, {}, sqlite_rows.tables(connection, side))
        for side in (BEFORE, AFTER)
    )
    return sqlite_rows.compare(connection, before, after, Stop())


@given(TABLES, TABLES)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_counts_are_those_of_a_plain_dict(
    two_files: list[sqlite3.Connection], before: Any, after: Any
) -> None:
    after = {**after, **{key: before[key] for key in list(before)[::2]}}
    for connection, side in zip(two_files, (before, after), strict=True):
        connection.execute("DELETE FROM t")
        values = [(a, x, b, y) for (a, b), (x, y) in side.items()]
        connection.executemany("INSERT INTO t VALUES (?, ?, ?, ?)", values)
    [found] = compared(two_files).tables
    both = before.keys() & after.keys()
    changed = sum(list(map(typed, before[key])) != list(map(typed, after[key])) for key in both)
    assert rows(found) == (len(after.keys() - both), changed, len(before.keys() - both))
    assert (found.rows_before, found.rows_after) == (len(before), len(after))


def typed(value: Any) -> tuple[type, Any]:
    return type(value), value
