"""A SQLite backup from elsewhere holds a whole database file, whose bytes and schema may be
hostile.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from batch_system.backup.file.format import DATABASE, PIECE_BYTES
from batch_system.backup.file.reader import LocalFile
from batch_system.backup.file.writer import Archive
from batch_system.backup.restoring.scratch import restore_into_scratch
from batch_system.backup.sqlite import plain_file
from batch_system.backup.sqlite import tables as sqlite_tables
from batch_system.backup.sqlite.plain_file import guard, workplace
from batch_system.errors import BackupError, DamagedBackup
from tests.backup.contents import HEADER
from tests.backup.restores import restored
from tests.databases import url_of

LIVE = (
    "CREATE TABLE t (id INTEGER PRIMARY KEY AUTOINCREMENT, data); INSERT INTO t VALUES (1, 'live')"
)
ROOT = Path(__file__).parents[2]


@pytest.fixture
def url(app_db: Path) -> str:
    execute(app_db, LIVE)
    return url_of(app_db)


def execute(path: Path, script: str) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.executescript(script)


def table(
    name: str = "t", columns: tuple[str, ...] = ("id", "data"), rows: int = 1
) -> dict[str, Any]:
    types = ["INTEGER" if column == "id" else "" for column in columns]
    facts = {"schema": None, "folder": None, "key": [], "bytes": 0, "types": types}
    return {**facts, "name": name, "columns": list(columns), "rows": rows}


def pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            yield piece


def forged(path: Path, database: Path, *tables: dict[str, Any]) -> Path:
    """Write a backup with valid checksums that holds this file."""
    path.touch()
    with Archive(path, datetime(2026, 3, 29, 12, tzinfo=UTC)) as archive:
        archive.add_header("sqlite", **HEADER)
        archive.add_file(DATABASE, database.stat().st_size, pieces(database))
        archive.finish(tables=list(tables or [table()]), sequences=[], left_out=[])
    return path


@pytest.fixture
def hostile(tmp_path: Path) -> Callable[..., Path]:
    """A forged backup of a database that a script makes; then statements of `schema` change its
    schema directly.
    """

    def make(script: str, *tables: dict[str, Any], schema: tuple[str, ...] = ()) -> Path:
        database = tmp_path / "hostile.sqlite3"
        with closing(sqlite3.connect(database, isolation_level=None)) as connection:
            connection.executescript(script)
            connection.execute("PRAGMA writable_schema = ON")
            for statement in schema:
                connection.execute(statement)
        return forged(tmp_path / "hostile.backup.gz", database, *tables)

    return make


async def tried(backup: Path, url: str) -> Any:
    with LocalFile(backup) as source:
        return await restore_into_scratch(source, url)


def contents(path: Path) -> Any:
    with closing(sqlite3.connect(path)) as connection:
        return (
            connection.execute("SELECT * FROM t ORDER BY 1").fetchall(),
            connection.execute(
                "SELECT type, name, sql FROM sqlite_master ORDER BY 1, 2"
            ).fetchall(),
        )


def with_header(page_size: int, pages: int) -> bytes:
    """The first bytes of a SQLite file with this page size and number of pages."""
    head = (
        b"SQLite format 3\0"
        + (page_size % 65535).to_bytes(2, "big")
        + bytes(6)
        + (1).to_bytes(4, "big")
    )
    return (head + pages.to_bytes(4, "big")).ljust(92, b"\0") + (1).to_bytes(4, "big") + bytes(4)


@pytest.mark.parametrize(
    ("begins", "words"),
    [
        (b"", "does not begin as a SQLite database does"),
        (with_header(4096, 1), "bytes, but 1 pages of 4,096 bytes"),
        (with_header(4096, 2**32 - 1), "bytes, but 4,294,967,295 pages of 4,096 bytes"),
        (with_header(1000, 6291), "its header gives pages of 1,000 bytes"),
        (with_header(256, 24576), "its header gives pages of 256 bytes"),
    ],
)
async def test_a_file_that_is_not_a_database_is_refused_before_a_byte_is_written(
    app_db: Path,
    url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    begins: bytes,
    words: str,
) -> None:
    bomb = tmp_path / "bomb"
    bomb.write_bytes(begins)
    os.truncate(bomb, 3 * PIECE_BYTES)
    backup = forged(tmp_path / "bomb.backup.gz", bomb)
    assert backup.stat().st_size < 100_000
    monkeypatch.setattr(plain_file, "create", lambda path: pytest.fail("something was written"))
    with pytest.raises(DamagedBackup, match=words):
        await restored(backup, url)
    with pytest.raises(DamagedBackup, match=words):
        await tried(backup, url)


async def test_a_disk_without_room_is_reported_before_a_byte_is_written(
    app_db: Path,
    url: str,
    tmp_path: Path,
    hostile: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backup = hostile(LIVE)
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(20_000))
    monkeypatch.setattr(plain_file, "create", lambda path: pytest.fail("something was written"))
    with pytest.raises(
        BackupError, match=f"needs 24,576 bytes in {tmp_path}, where 20,000 are free"
    ) as raised:
        await restored(backup, url)
    assert not isinstance(raised.value, DamagedBackup)


HOSTILE_SCHEMAS = {
    "a view": ("CREATE VIEW t AS SELECT 1 AS id, 2 AS data", ()),
    "a table that is called a view": (
        "CREATE TABLE t (id INTEGER, data); INSERT INTO t VALUES (1, 2)",
        (
            "UPDATE sqlite_master SET sql = 'CREATE VIEW t AS "
            "SELECT 1 AS id, 2 AS data', rootpage = 0",
        ),
    ),
    "a virtual table": (
        "CREATE VIRTUAL TABLE t USING fts5 (id, data); INSERT INTO t VALUES (1, 2)",
        (),
    ),
    "other columns": ("CREATE TABLE t (id INTEGER, data AS (1)); INSERT INTO t VALUES (1)", ()),
    "no table": ("CREATE TABLE u (id INTEGER, data)", ()),
    "a root page that is none": (
        "CREATE TABLE t (id INTEGER, data); INSERT INTO t VALUES (1, 2)",
        ("UPDATE sqlite_master SET rootpage = 1",),
    ),
    "no statement": (
        "CREATE TABLE t (id INTEGER, data); INSERT INTO t VALUES (1, 2)",
        ("UPDATE sqlite_master SET sql = 'CREATE nonsense'",),
    ),
    "numbers that are a view": (
        "CREATE TABLE t (id INTEGER PRIMARY KEY AUTOINCREMENT, data); INSERT INTO t VALUES (1, 2)",
        (
            "UPDATE sqlite_master SET sql = 'CREATE VIEW sqlite_sequence AS "
            "SELECT ''t'' AS name, 9 AS seq',"
            " rootpage = 0 WHERE name = 'sqlite_sequence'",
        ),
    ),
}


@pytest.mark.parametrize("what", HOSTILE_SCHEMAS)
async def test_a_schema_that_contradicts_its_manifest_is_damage_and_changes_nothing(
    app_db: Path, url: str, hostile: Callable[..., Path], what: str
) -> None:
    script, schema = HOSTILE_SCHEMAS[what]
    backup, before = hostile(script, schema=schema), contents(app_db)
    for trying in (restored, tried):
        with pytest.raises(
            DamagedBackup, match=r"is damaged, and nothing was changed|can't be loaded"
        ):
            await trying(backup, url)
    assert contents(app_db) == before


async def test_nothing_of_the_files_own_schema_is_restored_or_executed(
    app_db: Path, url: str, hostile: Callable[..., Path]
) -> None:
    before = contents(app_db)[1]
    backup = hostile(
        """
        CREATE TABLE t (
            id INTEGER PRIMARY KEY CHECK (randomblob(900000000) > 1),
            data DEFAULT (zeroblob(900000000)),
            more AS (zeroblob(900000000)),
            UNIQUE (data));
        PRAGMA ignore_check_constraints = ON;
        INSERT INTO t (id, data) VALUES (5, 'saved');
        CREATE INDEX i ON t (id) WHERE data <> 'saved';
        CREATE TABLE other (id INT);
        CREATE VIEW v AS SELECT hex(zeroblob(900000000)) FROM t;
        CREATE TRIGGER tr AFTER INSERT ON t BEGIN DELETE FROM t; END;
        """,
    )
    report = await restored(backup, url)
    assert contents(app_db) == ([(5, "saved")], before)
    assert report.rows == 1


async def test_an_index_of_the_file_that_contradicts_its_table_is_not_used(
    app_db: Path, url: str, hostile: Callable[..., Path]
) -> None:
    """The index has all columns, so SQLite would otherwise read it instead of the table."""
    backup = hostile(
        "CREATE TABLE t (id INTEGER PRIMARY KEY, data); CREATE TABLE u (id INTEGER PRIMARY KEY, "
        "data);"
        "INSERT INTO t VALUES (1, 'right'); INSERT INTO u VALUES (1, 'wrong');"
        "CREATE INDEX of_t ON t (data); CREATE INDEX of_u ON u (data);",
        schema=(
            "UPDATE sqlite_master SET rootpage = (SELECT rootpage FROM sqlite_master "
            "WHERE name = 'of_u')"
            " WHERE name = 'of_t'",
            "DELETE FROM sqlite_master WHERE name = 'of_u'",
        ),
    )
    await restored(backup, url)
    assert contents(app_db)[0] == [(1, "right")]


@pytest.mark.parametrize("number", ["'x'", "x'00'", "NULL", "-5", "1e300"])
async def test_autoincrement_values_of_the_file_that_are_not_numbers_are_ignored(
    app_db: Path, url: str, hostile: Callable[..., Path], number: str
) -> None:
    backup = hostile(
        LIVE + f"; UPDATE sqlite_sequence SET seq = {number}; INSERT INTO sqlite_sequence "
        "VALUES ('t', 7)"
    )
    await restored(backup, url)
    with closing(sqlite3.connect(app_db)) as connection:
        assert connection.execute("SELECT * FROM sqlite_sequence").fetchall() == [("t", 7)]


NUMBERS = "WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < {})"


def many_tables(count: int, columns: str) -> str:
    """A statement that adds this number of tables to a schema, all with the same root page."""
    return (
        f"INSERT INTO sqlite_master {NUMBERS.format(count)} SELECT 'table', 't' || n, 't' || n,"
        f" (SELECT max(rootpage) FROM sqlite_master), 'CREATE TABLE t' || n || ' ({columns})' "
        "FROM n"
    )


@pytest.mark.parametrize(
    ("count", "columns"), [(20_000, "x"), (90, "x" * 50_000), (1, "x" * 5_000_000)]
)
async def test_a_schema_that_takes_too_much_memory_is_refused_before_sqlite_reads_it(
    url: str,
    hostile: Callable[..., Path],
    count: int,
    columns: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backup = hostile(LIVE, schema=(many_tables(count, columns),))
    monkeypatch.setattr(plain_file, "guard", lambda *_: pytest.fail("SQLite was to open it"))
    with pytest.raises(
        DamagedBackup,
        match=r"its schema has more than 20,000 tables, .* or their text .* 4,194,304 bytes",
    ):
        await restored(backup, url)


PEAK = """
import asyncio, re, sys
from pathlib import Path
from batch_system.backup.file.reader import LocalFile
from batch_system.backup.restoring.restore import restore
from batch_system.errors import BackupError

async def main():
    with LocalFile(Path(sys.argv[1])) as source:
        try:
            print((await restore(source, sys.argv[2])).rows)
        except BackupError as error:
            print(error)

asyncio.run(main())
print(int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024)
"""


def peak(backup: Path, url: str) -> tuple[str, int]:
    """The output of a restore in a process of its own, and its peak of memory in megabytes."""
    ran = subprocess.run(
        [sys.executable, "-c", PEAK, backup, url],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    said, megabytes = ran.stdout.strip().rsplit("\n", 1)
    return said, int(megabytes)


WIDE = ", ".join(f"c{number}" for number in range(1999))


@pytest.mark.parametrize(
    ("script", "schema", "rows", "words"),
    [
        (
            "CREATE TABLE t (id, data); INSERT INTO t VALUES (1, zeroblob(400000000))",
            "",
            1,
            "A value is larger than",
        ),
        pytest.param(LIVE, many_tables(370, WIDE), 1, "1", marks=pytest.mark.rest),
        pytest.param(LIVE, many_tables(19_000, "x"), 1, "1", marks=pytest.mark.rest),
        (
            f"CREATE TABLE t (id, data); INSERT INTO t {NUMBERS.format(60_000)} "
            "SELECT n, hex(randomblob(500)) FROM n",
            *("", 60_000, "60000"),
        ),
    ],
    ids=["a large value", "wide tables", "many tables", "many rows"],
)
def test_memory_stays_flat_whatever_the_file_holds(
    url: str, hostile: Callable[..., Path], script: str, schema: str, rows: int, words: str
) -> None:
    said, megabytes = peak(hostile(script, table(rows=rows), schema=(schema,)), url)
    assert words in said
    assert megabytes < 160


def test_only_this_user_may_enter_the_folder_where_a_file_is_unpacked(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with workplace(tmp_path / "made" / "here") as place:
            assert (
                stat.S_IMODE(place.stat().st_mode) == 0o700
                and place.parent == tmp_path / "made" / "here"
            )
            (place / "file").touch()
            with workplace(place.parent) as other:
                assert other != place and (place / "file").exists(), "who is at work is left alone"
        assert list(place.parent.iterdir()) == []
    finally:
        os.umask(before)


def test_a_guarded_connection_executes_no_view_and_trusts_no_schema(tmp_path: Path) -> None:
    execute(tmp_path / "a", f"{LIVE}; CREATE VIEW v AS SELECT * FROM t")
    with closing(sqlite3.connect(tmp_path / "a")) as connection:
        guard(connection, 0)
        for name, value in (("trusted_schema", 0), ("cell_size_check", 1)):
            assert connection.execute(f"PRAGMA {name}").fetchone() == (value,)
        assert connection.execute("SELECT data FROM t").fetchone() == ("live",)
        with pytest.raises(
            sqlite3.DatabaseError, match=r"access to t.id is prohibited|not authorized"
        ):
            connection.execute("SELECT * FROM v")
        with pytest.raises(sqlite3.DataError, match="too big"):
            connection.execute("SELECT zeroblob(100000000)")
        assert sqlite_tables.revisions(connection) == {}
