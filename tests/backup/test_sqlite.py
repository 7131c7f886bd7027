from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from batch_system import clock
from batch_system.backup import create_backup
from batch_system.backup.file import selection
from batch_system.backup.file.progress import BackupMeter, BackupProgress
from batch_system.backup.file.reader import Backup, LocalFile, read_header
from batch_system.backup.file.selection import Selection
from batch_system.backup.file.writer import Archive
from batch_system.backup.making import from_sqlite as sqlite
from batch_system.backup.making.request import BackupRequest
from batch_system.batch.ledger.tables import ledger
from batch_system.concurrency.stoppable import Stop
from batch_system.database.our_tables import LEDGER_TABLES
from batch_system.errors import BackupError
from tests.backup.contents import make_sqlite, manifest, members, opened


@pytest.fixture
def writer(app_db: Path) -> Iterator[list[int]]:
    """A thread that transfers money and counts the transfers as fast as it can. All its commits
    stay in the WAL.
    """
    make_sqlite(app_db, megabytes=20)
    moves, stop, started = [0], threading.Event(), threading.Event()

    def move() -> None:
        with closing(sqlite3.connect(app_db, isolation_level=None, timeout=60)) as connection:
            connection.execute("PRAGMA wal_autocheckpoint = 0")
            for name in "abcd":
                connection.execute(f"CREATE TABLE {name} AS SELECT 1000 AS n")
            connection.execute("CREATE TABLE moves (id INTEGER PRIMARY KEY)")
            while not stop.is_set():
                connection.execute("BEGIN IMMEDIATE")
                source, target = "abcd"[moves[0] % 4], "abcd"[(moves[0] + 1 + moves[0] % 3) % 4]
                connection.execute(f"UPDATE {source} SET n = n - 1")
                connection.execute("INSERT INTO moves DEFAULT VALUES")
                connection.execute(f"UPDATE {target} SET n = n + 1")
                connection.execute("COMMIT")
                moves[0] += 1
                if moves[0] == 20:
                    started.set()
                stop.wait(0.001)

    thread = threading.Thread(target=move)
    thread.start()
    assert started.wait(30)
    yield moves
    stop.set()
    thread.join()


async def test_a_backup_ends_beside_a_busy_writer_and_holds_whole_transactions(
    writer: list[int], tmp_path: Path
) -> None:
    before = writer[0]
    async with asyncio.timeout(60):
        backup = await create_backup(tmp_path / "backups")
    assert writer[0] > before, "the writer went on meanwhile"
    with opened(backup) as connection:
        (total,) = connection.execute("SELECT a.n + b.n + c.n + d.n FROM a, b, c, d").fetchone()
        (moves,) = connection.execute("SELECT count(*) FROM moves").fetchone()
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert total == 4000
    assert before <= moves <= writer[0]


class CommitsAtEachStep(Stop):
    """Another connection commits between any two steps of the copy."""

    def __init__(self, app_db: Path) -> None:
        super().__init__()
        self.app_db = app_db
        self.commits = 0

    def check(self) -> None:
        assert self.commits < 200, "each commit made the copy begin anew"
        with closing(sqlite3.connect(self.app_db, isolation_level=None)) as connection:
            connection.execute("UPDATE users SET email = ?", (f"{self.commits}",))
        self.commits += 1


def test_commits_during_the_copy_never_restart_it(
    app_db: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a read transaction each commit would restart the copy, so beside a busy writer it
    would never end.
    """
    make_sqlite(app_db, megabytes=4)
    monkeypatch.setattr(sqlite, "STEP_PAGES", 100)
    stop = CommitsAtEachStep(app_db)
    backup = tmp_path / "made.backup.gz"
    backup.touch()
    request = BackupRequest("sqlite", str(app_db), "", clock.now(), Selection())
    with Archive(backup, request.started) as archive:
        sqlite.write(request, archive, BackupMeter(None), stop)
    assert 10 < stop.commits < 30
    with opened(backup) as copy:
        assert copy.execute("SELECT email FROM users").fetchone() == ("a@example.org",), (
            "the instant of its start"
        )


async def test_rows_that_are_only_in_the_wal_are_in_the_backup(
    app_db: Path, tmp_path: Path
) -> None:
    make_sqlite(app_db)
    with closing(sqlite3.connect(app_db)) as connection:
        connection.execute("INSERT INTO users VALUES (2, 'only-in-the-wal@example.org')")
        connection.commit()
        assert b"only-in-the-wal" not in app_db.read_bytes()
        backup = await create_backup(tmp_path / "backups")
    with opened(backup) as copy:
        assert copy.execute("SELECT count(*) FROM users").fetchone() == (2,)


async def test_a_backup_is_a_tar_with_a_header_the_database_and_a_manifest(
    app_db: Path, tmp_path: Path
) -> None:
    make_sqlite(app_db, megabytes=5)
    backup = await create_backup(tmp_path / "backups")
    assert list(members(backup)) == ["header.json", "database.sqlite3", "manifest.json"]
    listed = manifest(backup)["members"][1:]
    assert {member["name"] for member in listed} == {"database.sqlite3"} and len(listed) == 3
    assert sum(member["bytes"] for member in listed) == len(members(backup)["database.sqlite3"])
    with LocalFile(backup) as file:
        assert b"".join(Backup.open(file).pieces()) == members(backup)["database.sqlite3"]
    assert backup.stat().st_mode & 0o777 == 0o600


async def test_a_database_without_wal_is_backed_up_too(app_db: Path, tmp_path: Path) -> None:
    with closing(sqlite3.connect(app_db)) as connection:
        connection.execute("CREATE TABLE kept (id)")
    backup = await create_backup(tmp_path / "backups")
    with opened(backup) as copy:
        assert copy.execute("SELECT count(*) FROM kept").fetchone() == (0,)


async def test_a_missing_database_is_an_error_and_is_not_made(app_db: Path, tmp_path: Path) -> None:
    with pytest.raises(
        BackupError, match=r"there is no database at .*app.db: look at DATABASE_URL"
    ):
        await create_backup(tmp_path / "backups")
    assert not app_db.exists()
    assert list((tmp_path / "backups").iterdir()) == []


async def test_an_empty_file_is_not_taken_for_a_database(app_db: Path, tmp_path: Path) -> None:
    app_db.touch()
    with pytest.raises(BackupError, match="no table in the database"):
        await create_backup(tmp_path / "backups")


@pytest.mark.parametrize(
    ("offset", "message"), [(0, "not a database"), (4096 * 3, "is damaged|malformed")]
)
async def test_a_damaged_database_is_an_error(
    app_db: Path, tmp_path: Path, offset: int, message: str
) -> None:
    make_sqlite(app_db, megabytes=1)
    with app_db.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * 4096)
    with pytest.raises(BackupError, match=message):
        await create_backup(tmp_path / "backups")
    assert list((tmp_path / "backups").iterdir()) == []


async def test_an_index_that_lacks_rows_is_an_error_because_no_restore_would_accept_it(
    app_db: Path, tmp_path: Path
) -> None:
    make_sqlite(app_db)
    with closing(sqlite3.connect(app_db, isolation_level=None)) as connection:
        connection.execute("CREATE INDEX emails ON users (email)")
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute(
            "UPDATE sqlite_master SET sql = 'CREATE INDEX emails ON users (id)' "
            "WHERE name = 'emails'"
        )
    with pytest.raises(
        BackupError,
        match=r"is damaged, so it was not backed up: row 1 .* index emails\. .* REINDEX",
    ):
        await create_backup(tmp_path / "backups")
    assert list((tmp_path / "backups").iterdir()) == []


async def test_tables_that_need_a_function_or_collation_of_the_application_are_backed_up_unchecked(
    app_db: Path, tmp_path: Path
) -> None:
    make_sqlite(app_db)
    with closing(sqlite3.connect(app_db)) as connection:
        connection.create_function("regexp", 2, lambda pattern, value: True, deterministic=True)
        connection.create_collation("backwards", lambda a, b: (a < b) - (a > b))
        connection.executescript(
            "CREATE TABLE checked (v CHECK (v REGEXP 'x')); INSERT INTO checked VALUES ('x');"
            "CREATE TABLE sorted (v TEXT PRIMARY KEY COLLATE backwards); INSERT INTO sorted "
            "VALUES ('a'), ('b');"
        )
    with LocalFile(await create_backup(tmp_path / "backups")) as file:
        assert [(str(t), t.rows) for t in Backup.open(file).tables if t.rows] == [
            ("checked", 1), ("sorted", 2), ("users", 1)
        ]  # fmt: skip
    with closing(sqlite3.connect(app_db, isolation_level=None)) as connection:
        connection.execute("CREATE INDEX emails ON users (email)")
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute(
            "UPDATE sqlite_master SET sql = 'CREATE INDEX emails ON users (id)' "
            "WHERE name = 'emails'"
        )
    with pytest.raises(
        BackupError, match=r"is damaged, so it was not backed up: row 1 .* index emails"
    ):
        await create_backup(tmp_path / "backups")


@pytest.mark.parametrize("url", ["sqlite+aiosqlite://", "sqlite+aiosqlite:///file:app.db?uri=true"])
async def test_a_database_that_is_not_a_file_is_an_error(
    use_database: Callable[[str], None], tmp_path: Path, url: str
) -> None:
    use_database(url)
    with pytest.raises(BackupError, match="DATABASE_URL must name a file"):
        await create_backup(tmp_path / "backups")


async def test_another_kind_of_database_is_an_error_that_says_what_is_supported(
    use_database: Callable[[str], None], tmp_path: Path
) -> None:
    use_database("mysql+aiomysql://root:secret@localhost/app")
    with pytest.raises(
        BackupError,
        match=r"can't back up mysql\+aiomysql: .* sqlite\+aiosqlite, postgresql\+asyncpg$",
    ):
        await create_backup(tmp_path / "backups")


ODD = """
CREATE TABLE plain (
    id INTEGER PRIMARY KEY AUTOINCREMENT, "Größe" REAL, twice INT AS (id * 2) STORED,
    UNIQUE ("Größe"));
CREATE TABLE pairs (b TEXT, a INT, v BLOB, PRIMARY KEY (a, b)) WITHOUT ROWID;
CREATE TABLE "a b""c" (n REAL) STRICT;
CREATE VIEW "sum" AS SELECT total("Größe") FROM plain;
CREATE TRIGGER copied AFTER INSERT ON plain BEGIN
    INSERT INTO pairs VALUES ('t', new.id, x'00ff'); END;
CREATE VIRTUAL TABLE words USING fts5 (text);
INSERT INTO plain ("Größe") VALUES (1.5), (9e999), (NULL);
INSERT INTO words VALUES ('a cat on a mat'), ('a dog');
"""


async def test_everything_that_a_database_can_hold_is_in_its_backup(
    app_db: Path, tmp_path: Path
) -> None:
    with closing(sqlite3.connect(app_db)) as connection:
        connection.executescript(ODD)
        before = list(connection.iterdump())
        backup = await create_backup(tmp_path / "backups")
    with opened(backup) as copy:
        assert list(copy.iterdump()) == before
        assert copy.execute("SELECT * FROM words WHERE words MATCH 'cat'").fetchall() == [
            ("a cat on a mat",)
        ]
        copy.execute("INSERT INTO plain DEFAULT VALUES")
        assert copy.execute("SELECT count(*), max(a) FROM pairs").fetchone() == (4, 4)
        assert copy.execute("PRAGMA integrity_check").fetchone() == ("ok",)


async def test_the_manifest_has_each_tables_rows_columns_types_and_key(
    app_db: Path, tmp_path: Path
) -> None:
    with closing(sqlite3.connect(app_db)) as connection:
        connection.executescript(ODD)
    with LocalFile(await create_backup(tmp_path / "backups")) as file:
        backup = Backup.open(file)
    assert [
        (str(table), table.rows, table.columns, table.types, table.key) for table in backup.tables
    ] == [
        ('a b"c', 0, ("n",), ("REAL",), ()),
        ("pairs", 3, ("b", "a", "v"), ("TEXT", "INT", "BLOB"), ("a", "b")),
        ("plain", 3, ("id", "Größe"), ("INTEGER", "REAL"), ("id",)),
        ("words", 2, ("text",), ("",), ()),
    ]
    assert (
        backup.header.rows == 8
        and backup.sequences == ()
        and backup.members_of(backup.tables[0]) == ()
    )


async def test_the_header_has_the_revision_of_every_alembic_history(
    app_db: Path, tmp_path: Path
) -> None:
    with closing(sqlite3.connect(app_db)) as connection:
        connection.executescript(
            "CREATE TABLE alembic_version (version_num TEXT); INSERT INTO alembic_version "
            "VALUES ('app_0001');"
            "CREATE TABLE of_a_plugin (version_num TEXT);"
        )
    header = read_header(await create_backup(tmp_path / "backups"))
    assert (header.revision, header.revisions) == (
        "app_0001",
        {"alembic_version": "app_0001", "of_a_plugin": ""},
    )
    assert (header.kind, header.database) == ("sqlite", "app.db")


def make_ledger(app_db: Path) -> None:
    with closing(sqlite3.connect(app_db)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        for name in (
            "users",
            "batch_alembic_version",
            "batch_runs",
            "batch_once",
            "batch_checkpoints",
        ):
            connection.execute(f"CREATE TABLE {name} (text UNIQUE)")
            connection.executemany(
                f"INSERT INTO {name} VALUES (?)", [(f"{name}'s own {n}",) for n in range(200)]
            )
        connection.execute("CREATE VIEW seen AS SELECT * FROM batch_runs")
        connection.commit()


async def test_the_ledgers_tables_in_the_same_file_are_dropped_and_no_byte_of_them_is_in_the_copy(
    app_db: Path, tmp_path: Path
) -> None:
    make_ledger(app_db)
    backup = await create_backup(tmp_path / "backups")
    assert [table["name"] for table in manifest(backup)["tables"]] == [
        "batch_checkpoints",
        "batch_once",
        "users",
    ]
    assert manifest(backup)["left_out"] == ["batch_alembic_version", "batch_runs"]
    file = members(backup)["database.sqlite3"]
    assert file.count(b"users's own") > 100 and b"batch_runs's own" not in file
    with (
        opened(backup) as copy,
        pytest.raises(sqlite3.OperationalError, match="no such table: batch_runs"),
    ):
        copy.execute("SELECT * FROM batch_runs")
    with closing(sqlite3.connect(app_db)) as connection:
        assert connection.execute("SELECT count(*) FROM batch_runs").fetchone() == (200,)


async def test_an_authors_table_beside_the_ledger_may_have_a_name_like_those_of_the_ledger(
    app_db: Path, tmp_path: Path
) -> None:
    make_ledger(app_db)
    with closing(sqlite3.connect(app_db)) as connection:
        connection.execute("CREATE TABLE batch_orders (id)")
    backup = await create_backup(tmp_path / "backups")
    assert "batch_orders" in [table["name"] for table in manifest(backup)["tables"]]


def test_each_table_of_the_ledger_is_known_by_its_name() -> None:
    assert {*ledger.tables, selection.LEDGERS_MARK} == LEDGER_TABLES


async def test_a_setting_includes_the_ledger_in_the_backup(
    app_db: Path, tmp_path: Path, settings: Callable[..., None]
) -> None:
    make_ledger(app_db)
    settings(BACKUP_LEDGER="1")
    backup = await create_backup(tmp_path / "backups")
    assert len(manifest(backup)["tables"]) == 5 and manifest(backup)["left_out"] == []


@pytest.mark.parametrize(
    ("chosen", "left_out"),
    [
        ({"BACKUP_EXCLUDE": "p*"}, ["pairs", "plain"]),
        ({"BACKUP_INCLUDE": "p*"}, ['a b"c', "words"]),
    ],
)
async def test_patterns_choose_the_tables(
    app_db: Path,
    tmp_path: Path,
    settings: Callable[..., None],
    chosen: dict[str, str],
    left_out: list[str],
) -> None:
    with closing(sqlite3.connect(app_db)) as connection:
        connection.executescript(ODD)
    settings(**chosen)
    backup = await create_backup(tmp_path / "backups")
    assert manifest(backup)["left_out"] == left_out
    with opened(backup) as copy:
        assert copy.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        names = {
            name for (name,) in copy.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        }
        assert names.isdisjoint(left_out) and not (("words" in left_out) and "words_data" in names)
    settings(BACKUP_EXCLUDE="plane")
    with pytest.raises(BackupError, match="BACKUP_EXCLUDE has 'plane', which matches no table"):
        await create_backup(tmp_path / "backups")


async def test_progress_tells_each_stage(app_db: Path, tmp_path: Path) -> None:
    make_sqlite(app_db, megabytes=5)
    seen: list[BackupProgress] = []
    await create_backup(tmp_path / "backups", on_progress=seen.append)
    await asyncio.sleep(0)
    assert list(dict.fromkeys(progress.stage for progress in seen)) == [
        "copying",
        "packing",
        "verifying",
    ]
    assert all(progress.estimate > 5_000_000 for progress in seen)


@pytest.fixture
def ticks() -> Iterator[list[int]]:
    """A thread that counts to 100 in a second. On a machine that stands still, it stands still
    too.
    """
    count, stop = [0], threading.Event()

    def tick() -> None:
        while not stop.wait(0.01):
            count[0] += 1

    thread = threading.Thread(target=tick)
    thread.start()
    yield count
    stop.set()
    thread.join()


async def test_the_event_loop_is_never_blocked(
    in_a_process: None, app_db: Path, tmp_path: Path, ticks: list[int]
) -> None:
    make_sqlite(app_db, megabytes=20)
    backup = asyncio.create_task(create_backup(tmp_path / "backups"))
    gaps, last = [], ticks[0]
    while not backup.done():
        await asyncio.sleep(0.001)
        gaps.append(ticks[0] - last)
        last = ticks[0]
    await backup
    assert len(gaps) > 50
    assert max(gaps) < 25
