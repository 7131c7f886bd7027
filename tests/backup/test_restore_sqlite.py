from __future__ import annotations

import asyncio
import errno
import os
import re
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from batch_system.backup import create_backup
from batch_system.backup.file.reader import Backup, LocalFile
from batch_system.backup.restoring.count import TableCounts
from batch_system.backup.restoring.restore import planned
from batch_system.backup.sqlite import plain_file
from batch_system.batch.ledger.migration import LEDGER_HISTORY
from batch_system.config import forget_settings
from batch_system.errors import BackupError
from tests.backup.here import make_backups_here
from tests.backup.restores import damage, killed_in_the_middle, restored
from tests.databases import migrated, url_of
from tests.migrations import APPLICATION_HISTORIES, add_migration

SCHEMA = """
PRAGMA journal_mode = WAL;
CREATE TABLE authors (
    id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, best INT REFERENCES books,
    shout TEXT AS (upper(name)) STORED);
CREATE TABLE books (
    id INTEGER PRIMARY KEY, author INT NOT NULL REFERENCES authors ON DELETE CASCADE, price REAL);
CREATE TABLE "Größe ""x"" y" (a TEXT, b BLOB, PRIMARY KEY (a)) WITHOUT ROWID;
CREATE TABLE plain (data);
CREATE TABLE blank (id INT);
CREATE TRIGGER late AFTER INSERT ON books BEGIN SELECT RAISE(ABORT, 'a trigger fired'); END;
DROP TRIGGER late;
INSERT INTO authors (name, best) VALUES ('ann', 2), ('日本', NULL);
INSERT INTO books VALUES (1, 1, 9e999), (2, 1, 0.1);
INSERT INTO "Größe ""x"" y" VALUES ('k', x'00ff');
INSERT INTO plain VALUES (1), ('two'), (x'03'), (NULL);
DELETE FROM plain WHERE rowid = 2;
CREATE TRIGGER late AFTER INSERT ON books BEGIN SELECT RAISE(ABORT, 'a trigger fired'); END;
"""
CHANGES = """
INSERT INTO authors (name) VALUES ('late'), ('later');
DELETE FROM books;
UPDATE plain SET data = 'changed';
"""


@pytest.fixture
def url(app_db: Path, use_database: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of the application's database."""
    make_backups_here(monkeypatch)
    execute(app_db, SCHEMA)
    found = f"sqlite+aiosqlite:///{app_db}"
    use_database(found)
    return found


@pytest.fixture
async def backup(url: str, tmp_path: Path) -> Path:
    return await create_backup(tmp_path / "backups")


@pytest.fixture
def leaves_nothing_beside(tmp_path: Path) -> Iterator[None]:
    yield
    assert {path.name for path in tmp_path.iterdir()} <= {
        "app.db",
        "app.db-wal",
        "app.db-shm",
        "backups",
        "tasks",
    }


def execute(path: Path, script: str) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.executescript(script)


def everything(path: Path) -> dict[str, Any]:
    with closing(sqlite3.connect(path)) as connection:
        schema = connection.execute(
            "SELECT type, name, sql FROM sqlite_master ORDER BY 1, 2"
        ).fetchall()
        names = [name for kind, name, _ in schema if kind == "table"]
        found = {
            name: sorted(
                map(repr, connection.execute('SELECT * FROM "' + name.replace('"', '""') + '"'))
            )
            for name in names
        }
        rowids = connection.execute("SELECT rowid FROM plain").fetchall()
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return {"schema": schema, "rows": found, "rowids": rowids}


@pytest.mark.usefixtures("leaves_nothing_beside")
async def test_a_restored_file_equals_the_snapshot(app_db: Path, url: str, backup: Path) -> None:
    before = everything(app_db)
    execute(app_db, CHANGES)
    report = await restored(backup, url)
    assert everything(app_db) == before
    assert (
        TableCounts("authors", 4, 2) in report.tables
        and TableCounts("blank", 0, 0) in report.tables
    )
    with closing(sqlite3.connect(app_db)) as connection:
        assert connection.execute(
            "INSERT INTO authors (name) VALUES ('next') RETURNING id"
        ).fetchone() == (3,)


async def test_readers_see_the_old_rows_to_their_end_and_the_new_ones_then(
    app_db: Path, url: str, backup: Path
) -> None:
    execute(app_db, CHANGES)
    with closing(sqlite3.connect(app_db, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        count = "SELECT count(*) FROM authors"
        assert reader.execute(count).fetchone() == (4,)
        await restored(backup, url)
        assert reader.execute(count).fetchone() == (4,)
        reader.execute("COMMIT")
        assert reader.execute(count).fetchone() == (2,)


@pytest.mark.usefixtures("leaves_nothing_beside")
async def test_a_dry_run_changes_nothing(app_db: Path, url: str, backup: Path) -> None:
    execute(app_db, CHANGES)
    before = everything(app_db)
    report = await restored(backup, url, dry_run=True)
    assert report.dry_run and TableCounts("authors", 4, 2) in report.tables
    assert everything(app_db) == before


KILLED = """
import asyncio, sys, threading
from pathlib import Path
from batch_system.backup.restoring import restore_sqlite
from batch_system.backup.file.reader import LocalFile
from batch_system.backup.restoring.restore import restore

async def last_check():
    print("in the middle", flush=True)
    threading.Event().wait()

restore_sqlite.STEP_PAGES = 10_000
asyncio.run(restore(LocalFile(Path(sys.argv[1])), sys.argv[2], last_check=last_check))
"""


@pytest.mark.usefixtures("leaves_nothing_beside")
async def test_kill_9_in_the_middle_leaves_the_old_rows_and_the_next_one_cleans_up(
    app_db: Path, url: str, tmp_path: Path
) -> None:
    execute(app_db, "INSERT INTO plain SELECT randomblob(4000000)")
    snapshot, backup = everything(app_db), await create_backup(tmp_path / "backups")
    execute(app_db, CHANGES)
    before = everything(app_db)
    await killed_in_the_middle(backup, url, KILLED)
    assert list(tmp_path.glob(".restore_*"))
    assert (tmp_path / "app.db-wal").stat().st_size > 1_000_000, (
        "it had written most of the new pages"
    )
    assert everything(app_db) == before
    await restored(backup, url)
    assert everything(app_db) == snapshot


@pytest.mark.parametrize("is_partial", [False, True])
async def test_the_last_check_is_made_when_nobody_else_can_write(
    app_db: Path, url: str, backup: Path, is_partial: bool
) -> None:
    execute(app_db, CHANGES + ("CREATE TABLE apart (id INT)" if is_partial else ""))
    before = everything(app_db)

    async def last_check() -> None:
        refused = pytest.raises(sqlite3.OperationalError, match="locked")
        with closing(sqlite3.connect(app_db, timeout=0)) as writer, refused:
            writer.execute("DELETE FROM plain")
        raise BackupError("a run has begun")

    with pytest.raises(BackupError, match="a run has begun"):
        await restored(backup, url, last_check=last_check)
    assert everything(app_db) == before


@pytest.mark.parametrize("is_partial", [False, True])
async def test_a_writer_that_does_not_end_is_reported(
    app_db: Path, url: str, backup: Path, is_partial: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain_file, "BUSY_SECONDS", 0.05)
    execute(app_db, "CREATE TABLE apart (id INT)" if is_partial else "")
    with closing(sqlite3.connect(app_db, isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        with pytest.raises(
            BackupError, match=r"restored into .*app.db: another program has held its write lock"
        ):
            await restored(backup, url)


@pytest.mark.usefixtures("leaves_nothing_beside")
@pytest.mark.parametrize("is_partial", [False, True])
async def test_a_cancel_ends_the_wait_for_a_writer(
    app_db: Path, url: str, backup: Path, is_partial: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain_file, "BUSY_SECONDS", 3600.0)
    execute(app_db, CHANGES + ("CREATE TABLE apart (id INT)" if is_partial else ""))
    before, waits, loop = everything(app_db), asyncio.Event(), asyncio.get_running_loop()
    again = plain_file.Patience.again

    def told(self: plain_file.Patience) -> None:
        loop.call_soon_threadsafe(waits.set)
        again(self)

    monkeypatch.setattr(plain_file.Patience, "again", told)
    with closing(sqlite3.connect(app_db, isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        restoring = asyncio.create_task(restored(backup, url))
        await waits.wait()
        restoring.cancel()
        with pytest.raises(asyncio.CancelledError):
            await restoring
    assert everything(app_db) == before


@pytest.mark.usefixtures("leaves_nothing_beside")
@pytest.mark.parametrize("size", [512, 65536])
async def test_a_file_keeps_its_page_size_and_rows_keep_their_rowids(
    app_db: Path, url: str, backup: Path, size: int
) -> None:
    before = everything(app_db)
    rebuild = (
        f"PRAGMA journal_mode = DELETE; PRAGMA page_size = {size}; VACUUM; PRAGMA journal_mode = "
        "WAL;"
    )
    execute(app_db, rebuild + CHANGES)
    await restored(backup, url)
    assert everything(app_db) == before
    with closing(sqlite3.connect(app_db)) as connection:
        assert connection.execute("PRAGMA page_size").fetchone() == (size,)
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


@pytest.mark.usefixtures("leaves_nothing_beside")
async def test_tables_without_trusted_sql_are_named_and_nothing_is_made(
    app_db: Path, url: str, backup: Path
) -> None:
    """No migration makes them, and there is no live file. The SQL in the backup is never used."""
    for path in app_db.parent.glob("app.db*"):
        path.unlink()
    with LocalFile(backup) as source:
        plan = await planned(source, url)
    assert plan.is_new and len(plan.problems) == 1
    with pytest.raises(
        BackupError, match=r'the tables Größe "x" y, authors, .* let the application make them'
    ):
        await restored(backup, url)
    assert not app_db.exists()


@pytest.mark.usefixtures("leaves_nothing_beside")
async def test_tables_that_are_not_in_the_backup_are_kept(
    app_db: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BACKUP_EXCLUDE", "blank")
    forget_settings()
    backup = await create_backup(tmp_path / "backups")
    before = everything(app_db)
    execute(app_db, CHANGES + "INSERT INTO blank VALUES (7)")
    with LocalFile(backup) as source:
        plan = await planned(source, url)
    assert plan.notes == ("blank is not in the backup and stays as it is",)
    dry = await restored(backup, url, dry_run=True)
    assert everything(app_db)["rows"]["authors"] != before["rows"]["authors"]
    report = await restored(backup, url)
    after = everything(app_db)
    assert after["rows"].pop("blank") == ["(7,)"] and before["rows"].pop("blank") == []
    before["rows"].pop("sqlite_sequence")
    assert after["rows"].pop("sqlite_sequence") == ["('authors', 4)"], (
        "numbers that were given are not given again"
    )
    assert after == before
    assert report.tables == dry.tables and TableCounts("books", 0, 2) in report.tables


async def test_a_restore_that_would_break_the_foreign_keys_of_another_table_is_refused(
    app_db: Path, url: str, backup: Path
) -> None:
    execute(
        app_db,
        CHANGES
        + "CREATE TABLE reviews (author INT REFERENCES authors); INSERT INTO reviews VALUES (4)",
    )
    before = everything(app_db)
    with pytest.raises(
        BackupError, match="rows of reviews would refer to rows of authors that are not there"
    ):
        await restored(backup, url)
    assert everything(app_db) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("DROP TABLE blank", "the table blank is missing in the database"),
        ("DROP TABLE plain; CREATE TABLE plain (other)", "the column data of plain is missing"),
        ("ALTER TABLE blank ADD more INT NOT NULL DEFAULT 1", ""),
        (
            "DROP TABLE blank; CREATE TABLE blank (id INT, more INT NOT NULL)",
            "the column more of blank is not in",
        ),
        (
            "DROP TABLE blank; CREATE TABLE blank (id TEXT)",
            "has the type TEXT, but INT in the backup",
        ),
        ("CREATE TABLE alembic_version AS SELECT 'b' AS version_num", "has none, the database b"),
    ],
)
async def test_beside_tables_that_are_not_restored_another_shape_is_refused(
    app_db: Path, url: str, backup: Path, change: str, words: str
) -> None:
    execute(app_db, f"CREATE TABLE apart (id INT); {change}")
    with LocalFile(backup) as source:
        problems = (await planned(source, url)).problems
    assert [words in problem for problem in problems] == ([True] if words else [])
    if words:
        with pytest.raises(BackupError, match="nothing was changed"):
            await restored(backup, url)


async def test_another_revision_goes_into_a_new_file_only(
    tmp_path: Path, use_database: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = tmp_path / "old.db", tmp_path / "new.db"
    await migrated(url_of(old), *APPLICATION_HISTORIES)
    use_database(url_of(old))
    backup = await create_backup(tmp_path / "backups")
    for history in APPLICATION_HISTORIES:
        add_migration(monkeypatch, tmp_path, history)
    await migrated(url_of(old), *APPLICATION_HISTORIES)
    with pytest.raises(
        BackupError, match=r"the backup has app_0004, the database app_0005. Restore it into a new"
    ):
        await restored(backup, url_of(old), histories=APPLICATION_HISTORIES)
    await restored(backup, url_of(new), histories=APPLICATION_HISTORIES)
    with closing(sqlite3.connect(new)) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [
            ("app_0004",)
        ]


@pytest.mark.usefixtures("leaves_nothing_beside")
async def test_a_damaged_backup_changes_nothing(app_db: Path, url: str, backup: Path) -> None:
    before = everything(app_db)
    damage(backup, lambda name: name == "database.sqlite3")
    with pytest.raises(BackupError, match="is damaged"):
        await restored(backup, url)
    assert everything(app_db) == before


@pytest.mark.parametrize(
    ("place", "words"),
    [(":memory:", "must name a file"), ("/nowhere/at/all.db", "make its folder first")],
)
async def test_a_path_where_no_file_can_be_made_is_refused(
    url: str, backup: Path, place: str, words: str
) -> None:
    with pytest.raises(BackupError, match=words):
        await restored(backup, f"sqlite+aiosqlite:///{place}")


async def test_a_target_that_is_not_a_database_is_refused(
    tmp_path: Path, url: str, backup: Path
) -> None:
    (tmp_path / "cat.db").write_bytes(b"meow" * 1000)
    with pytest.raises(
        BackupError, match=r"cat.db: file is not a database. Check that it is a SQLite database"
    ):
        await restored(backup, f"sqlite+aiosqlite:///{tmp_path}/cat.db")
    assert (tmp_path / "cat.db").read_bytes() == b"meow" * 1000


async def test_writers_go_on_after_the_restore(app_db: Path, url: str, backup: Path) -> None:
    """Their later writes change the restored rows."""
    execute(app_db, "DELETE FROM plain")
    begun, done = threading.Event(), threading.Event()

    def write() -> None:
        with closing(sqlite3.connect(app_db, isolation_level=None, timeout=30)) as writer:
            begun.set()
            writer.execute("INSERT INTO plain SELECT count(*) FROM plain")
            done.set()

    thread = threading.Thread(target=write)

    async def last_check() -> None:
        thread.start()
        begun.wait()

    await restored(backup, url, last_check=last_check)
    thread.join()
    with closing(sqlite3.connect(app_db)) as connection:
        assert connection.execute("SELECT data FROM plain ORDER BY rowid DESC").fetchone() == (3,)


async def test_rows_that_a_present_constraint_drops_are_noticed_before_the_commit(
    app_db: Path, url: str, backup: Path
) -> None:
    execute(
        app_db,
        "DROP TABLE plain; CREATE TABLE plain (data NOT NULL "
        "ON CONFLICT IGNORE); CREATE TABLE apart (id)",
    )
    execute(app_db, "INSERT INTO plain VALUES ('present')")
    before = everything(app_db)
    with pytest.raises(BackupError, match="plain has 2 rows after the restore, but the backup"):
        await restored(backup, url)
    assert everything(app_db) == before


async def test_a_row_that_a_present_constraint_refuses_is_reported_with_the_reason(
    app_db: Path, url: str, backup: Path
) -> None:
    execute(
        app_db,
        "DROP TABLE plain; CREATE TABLE plain (data CHECK (data > 1)); CREATE TABLE apart (id)",
    )
    with pytest.raises(
        BackupError, match=r"CHECK constraint failed: .* The table refuses a row of the backup"
    ):
        await restored(backup, url)


async def test_the_ledger_in_the_same_file_is_restored_without_its_records_of_backups(
    app_db: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await migrated(url, LEDGER_HISTORY)
    monkeypatch.setenv("BACKUP_LEDGER", "1")
    forget_settings()
    row = (
        "INSERT INTO batch_missed (id, task, first_slot, last_slot, count, reason, created_at, "
        "cause, unnoticed) "
        "VALUES (hex(randomblob(16)), 't', 0, 0, 3, 'down', 0, 'down', 3);"
    )
    execute(app_db, row)
    before, backup = everything(app_db), await create_backup(tmp_path / "backups")
    execute(
        app_db,
        row + "INSERT INTO batch_backups (name, place, taken_at, created_at) "
        "VALUES ('b', 'folder', 0, 0)",
    )
    with LocalFile(backup) as source:
        assert (await planned(source, url)).holds_ledger
    report = await restored(backup, url)
    after = everything(app_db)
    assert TableCounts("batch_missed", 2, 1) in report.tables
    assert [name for name, rows in after["rows"].items() if rows != before["rows"][name]] == [
        "batch_backups"
    ]


async def test_an_error_after_the_commit_is_not_a_failed_restore(
    app_db: Path, url: str, backup: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = everything(app_db)
    execute(app_db, CHANGES)

    class Full(sqlite3.Connection):
        def execute(self, sql: str, *given: Any) -> sqlite3.Cursor:
            if "checkpoint" in sql:
                raise sqlite3.OperationalError("database or disk is full")
            return super().execute(sql, *given)

    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=Full))
        await restored(backup, url)
    assert everything(app_db) == before


async def test_only_the_files_of_a_killed_restore_are_removed(
    url: str, backup: Path, tmp_path: Path
) -> None:
    folder, left, elsewhere = (
        tmp_path / "room",
        ".restore_20260101_000000_abcdefgh",
        tmp_path / "elsewhere",
    )
    for name in (".restore_mine", left):
        (folder / name).mkdir(parents=True)
        (folder / name / "new.sqlite3").write_text("left")
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("of somebody else")
    (folder / left.replace("a", "b")).symlink_to(elsewhere)
    (folder / left.replace("a", "c")).write_text("no folder")
    if os.geteuid() == 0:  # only root can give a file to another user
        (folder / left.replace("a", "d")).mkdir()
        os.chown(folder / left.replace("a", "d"), 65534, 65534)
    kept = {path.name for path in folder.iterdir()} - {left}
    await restored(backup, url, folder=folder)
    assert {path.name for path in folder.iterdir()} == kept
    assert (elsewhere / "precious").read_text() == "of somebody else"


async def test_an_index_that_needs_a_function_of_the_applications_is_named_and_nothing_is_restored(
    app_db: Path, url: str, tmp_path: Path
) -> None:
    with closing(sqlite3.connect(app_db, isolation_level=None)) as connection:
        connection.create_function("mine", 1, str, deterministic=True)
        connection.execute("CREATE INDEX by_mine ON plain (mine(data))")
        backup = await create_backup(tmp_path / "backups")
        connection.execute("DELETE FROM plain")
        with pytest.raises(
            BackupError,
            match=r"the index by_mine of plain can't be made here \(no such function: mine",
        ):
            await restored(backup, url)
        assert connection.execute("SELECT count(*) FROM plain").fetchone() == (0,)


@pytest.mark.usefixtures("leaves_nothing_beside")
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
async def test_a_disk_that_is_full_in_the_middle_changes_nothing(
    app_db: Path, url: str, backup: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = everything(app_db)

    pieces_of = Backup.pieces

    def pieces(backup: Backup) -> Iterator[bytes]:
        yield next(pieces_of(backup))
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Backup, "pieces", pieces)
    words = (
        f"can't be unpacked in {re.escape(str(app_db.parent))}, and nothing was changed: "
        f"{os.strerror(number)}"
    )
    with pytest.raises(BackupError, match=words):
        await restored(backup, url)
    assert everything(app_db) == before
