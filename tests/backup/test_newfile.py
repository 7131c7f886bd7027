"""A restored SQLite file: its tables come from the live file or the migrations, its rows from the
backup.
"""

from __future__ import annotations

import os
import sqlite3
import stat
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from batch_system.backup import create_backup
from batch_system.backup.file.reader import LocalFile
from batch_system.backup.restoring.restore import planned
from batch_system.backup.restoring.scratch import restore_into_scratch
from batch_system.backup.sqlite.new_file import NewFile
from batch_system.batch.ledger.migration import LEDGER_HISTORY
from batch_system.config import forget_settings
from batch_system.errors import BackupError, DamagedBackup
from tests.backup.restores import restored
from tests.databases import migrated, url_of
from tests.migrations import APPLICATION_HISTORIES, add_migration

HISTORIES = (*APPLICATION_HISTORIES, LEDGER_HISTORY)
SCHEMA = """
PRAGMA page_size = 1024;
PRAGMA auto_vacuum = INCREMENTAL;
PRAGMA application_id = 77;
PRAGMA user_version = 5;
PRAGMA journal_mode = WAL;
CREATE TABLE people (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT COLLATE NOCASE UNIQUE,
    boss INT REFERENCES people, loud TEXT AS (upper(name)), long INT AS (length(name)) STORED);
CREATE TABLE notes (body, rowid TEXT);
CREATE TABLE pairs (a TEXT, b INT, PRIMARY KEY (b, a)) WITHOUT ROWID;
CREATE TABLE typed (n INT NOT NULL CHECK (n > 0), day TEXT DEFAULT 'today') STRICT;
CREATE TABLE texts (id INTEGER PRIMARY KEY, body TEXT);
CREATE INDEX people_long ON people (long) WHERE boss IS NULL;
CREATE UNIQUE INDEX notes_lower ON notes (lower(body));
CREATE VIRTUAL TABLE own USING fts5 (title, body, tokenize = 'porter');
CREATE VIRTUAL TABLE found USING fts5 (body, content = 'texts', content_rowid = 'id');
CREATE VIRTUAL TABLE words USING fts5vocab (own, row);
CREATE VIRTUAL TABLE boxes USING rtree (id, x0, x1);
CREATE VIEW bosses AS SELECT name FROM people WHERE id IN (SELECT boss FROM people);
CREATE TRIGGER added AFTER INSERT ON texts BEGIN
    INSERT INTO found (rowid, body) VALUES (new.id, new.body); END;
CREATE TRIGGER gone AFTER DELETE ON texts BEGIN
    INSERT INTO found (found, rowid, body) VALUES ('delete', old.id, old.body); END;
CREATE TRIGGER hired INSTEAD OF INSERT ON bosses BEGIN
    INSERT INTO people (name) VALUES (new.name); END;
INSERT INTO people (name, boss) VALUES ('ann', NULL), ('bob', 1), ('cyd', 1);
DELETE FROM people WHERE name = 'cyd';
INSERT INTO notes (_rowid_, body, rowid)
    VALUES (7, 'x', 'not a number'), (90, x'00ff', NULL), (12, 1.5, '');
INSERT INTO pairs VALUES ('a', 1), ('b', 1);
INSERT INTO typed (n) VALUES (1), (2);
INSERT INTO texts (id, body) VALUES (10, 'the quick fox'), (20, 'the lazy dog');
INSERT INTO own VALUES ('foxes', 'run and run'), ('dogs', 'are running');
INSERT INTO boxes VALUES (1, 0, 10), (2, 5, 20);
ANALYZE;
"""
CHANGES = """
INSERT INTO people (name) VALUES ('dan'), ('eve');
UPDATE notes SET body = rowid || 'changed';
DELETE FROM pairs;
DELETE FROM typed;
INSERT INTO texts (id, body) VALUES (30, 'a fox');
DELETE FROM texts WHERE id = 10;
DELETE FROM own;
DELETE FROM boxes WHERE id = 1;
"""
QUESTIONS = (
    "SELECT type, name, tbl_name, sql FROM sqlite_master WHERE name NOT GLOB 'sqlite_stat*' "
    "ORDER BY 1, 2",
    "SELECT id, name, boss, loud, long FROM people ORDER BY id",
    "SELECT _rowid_, * FROM notes ORDER BY 1",
    "SELECT * FROM pairs",
    "SELECT rowid, * FROM typed ORDER BY 1",
    "SELECT * FROM texts ORDER BY id",
    "SELECT rowid, title FROM own WHERE own MATCH 'run' ORDER BY 1",
    "SELECT rowid FROM found WHERE found MATCH 'fox OR dog' ORDER BY 1",
    "SELECT * FROM words ORDER BY 1",
    "SELECT id FROM boxes WHERE x0 < 3",
    "SELECT name FROM bosses",
    "SELECT * FROM sqlite_sequence",
    "SELECT count(*) > 0 FROM sqlite_stat1",
    "PRAGMA page_size",
    "PRAGMA auto_vacuum",
    "PRAGMA application_id",
    "PRAGMA user_version",
    "PRAGMA journal_mode",
    "PRAGMA integrity_check",
    "PRAGMA foreign_key_check",
)


def execute(path: Path, script: str) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.executescript(script)


def asked(path: Path, *questions: str) -> list[list[Any]]:
    with closing(sqlite3.connect(path)) as connection:
        return [connection.execute(question).fetchall() for question in questions]


@pytest.fixture
def url(app_db: Path, use_database: Callable[[str], None]) -> str:
    """The URL of the application's database, which has every kind of table and object."""
    execute(app_db, SCHEMA)
    use_database(url_of(app_db))
    return url_of(app_db)


@pytest.fixture
def exclude(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def change(names: str) -> None:
        monkeypatch.setenv("BACKUP_EXCLUDE", names)
        forget_settings()

    return change


@pytest.fixture
async def ours(tmp_path: Path, use_database: Callable[[str], None]) -> Path:
    """The URL of the application's database, which has the tables of the migrations."""
    path = tmp_path / "app.db"
    await migrated(url_of(path), *APPLICATION_HISTORIES)
    execute(path, "INSERT INTO users (id, email, created_at) VALUES (4, 'a@x', 0)")
    execute(path, "INSERT INTO sessions VALUES ('s', 4, 0, 0)")
    use_database(url_of(path))
    return path


def lost(path: Path) -> None:
    for file in path.parent.glob(f"{path.name}*"):
        file.unlink()


async def test_a_restore_brings_back_rows_indexes_views_triggers_and_virtual_tables(
    app_db: Path, url: str, tmp_path: Path
) -> None:
    before = asked(app_db, *QUESTIONS)
    backup = await create_backup(tmp_path / "backups")
    execute(app_db, CHANGES)
    assert asked(app_db, *QUESTIONS) != before
    report = await restored(backup, url)
    assert asked(app_db, *QUESTIONS) == before
    assert "words" not in {table.table for table in report.tables}, "it has no rows of its own"
    execute(
        app_db,
        "INSERT INTO texts (id, body) VALUES (40, 'a vixen'); INSERT INTO own "
        "VALUES ('x', 'one more run')",
    )
    execute(
        app_db,
        "INSERT INTO bosses VALUES ('zoe'); INSERT INTO found (found) VALUES ('integrity-check')",
    )
    assert asked(
        app_db, "SELECT rowid FROM found WHERE found MATCH 'vixen'", "SELECT max(id) FROM people"
    ) == [
        [(40,)],
        [(4,)],
    ]


async def test_tables_of_any_kind_that_are_not_restored_keep_their_rows_and_rowids(
    app_db: Path, url: str, tmp_path: Path, exclude: Callable[[str], None]
) -> None:
    exclude("notes, pairs, texts, own, found, boxes, words")
    backup = await create_backup(tmp_path / "backups")
    execute(app_db, CHANGES)
    kept = [
        question for question in QUESTIONS if "people" not in question and "typed" not in question
    ]
    kept = [question for question in kept if "bosses" not in question]
    before = asked(app_db, *kept)
    await restored(backup, url)
    assert asked(app_db, *kept) == before, (
        "with people's last number, to which what stays may refer"
    )
    assert asked(app_db, "SELECT name FROM people ORDER BY 1", "SELECT n FROM typed") == [
        [("ann",), ("bob",)],
        [(1,), (2,)],
    ]


def after_filling(monkeypatch: pytest.MonkeyPatch, path: Path, script: str) -> None:
    """Another connection commits this when the new file has the rows of the backup, before the
    restore locks.
    """
    fill = NewFile.fill

    def filled(*given: Any) -> dict[str, int]:
        rows = fill(*given)
        execute(path, script)
        return rows

    monkeypatch.setattr(NewFile, "fill", filled)


async def test_commits_before_the_lock_to_tables_that_are_not_restored_are_not_lost(
    app_db: Path,
    url: str,
    tmp_path: Path,
    exclude: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exclude("notes")
    backup = await create_backup(tmp_path / "backups")
    after_filling(
        monkeypatch,
        app_db,
        "INSERT INTO notes (body) VALUES ('late'); DELETE FROM notes WHERE _rowid_ = 7",
    )
    await restored(backup, url)
    assert asked(app_db, "SELECT _rowid_ FROM notes ORDER BY 1") == [[(12,), (90,), (91,)]]


async def test_tables_that_somebody_changes_meanwhile_are_not_overwritten(
    app_db: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup = await create_backup(tmp_path / "backups")
    after_filling(monkeypatch, app_db, "CREATE TABLE late AS SELECT 1 AS n; DELETE FROM pairs")
    with pytest.raises(BackupError, match="another program has changed its tables meanwhile"):
        await restored(backup, url)
    assert asked(app_db, "SELECT n FROM late", "SELECT * FROM pairs") == [[(1,)], []]


@pytest.mark.parametrize(
    ("left_out", "change", "child", "parent"),
    [
        (
            "sessions",
            "INSERT INTO users (id, email, created_at) VALUES (9, 'b', 0)",
            "sessions",
            "users",
        ),
        ("users", "", "sessions", "users"),
    ],
)
async def test_rows_that_would_refer_to_missing_rows_are_refused_whichever_table_is_restored(
    ours: Path,
    tmp_path: Path,
    exclude: Callable[[str], None],
    left_out: str,
    change: str,
    child: str,
    parent: str,
) -> None:
    exclude(left_out)
    backup = await create_backup(tmp_path / "backups")
    if left_out == "sessions":
        execute(ours, f"{change}; INSERT INTO sessions VALUES ('t', 9, 0, 0)")
    else:
        execute(ours, "DELETE FROM users")
    before = asked(ours, "SELECT id FROM users", "SELECT session_id FROM sessions")
    with pytest.raises(
        BackupError, match=f"rows of {child} would refer to rows of {parent} that are not there"
    ):
        await restored(backup, url_of(ours))
    assert asked(ours, "SELECT id FROM users", "SELECT session_id FROM sessions") == before


async def test_on_an_empty_machine_the_migrations_make_the_tables_that_the_backup_leaves_out(
    ours: Path, tmp_path: Path, exclude: Callable[[str], None]
) -> None:
    exclude("sessions")
    execute(
        ours,
        "PRAGMA journal_mode = DELETE; PRAGMA page_size = 1024; VACUUM; PRAGMA user_version = 3",
    )
    schema = "SELECT type, name, sql FROM sqlite_master ORDER BY 1, 2"
    facts = (
        schema,
        "SELECT * FROM users",
        "SELECT * FROM alembic_version",
        "PRAGMA page_size",
        "PRAGMA user_version",
    )
    before = asked(ours, *facts)
    backup = await create_backup(tmp_path / "backups")
    lost(ours)
    with LocalFile(backup) as source:
        plan = await planned(source, url_of(ours), histories=HISTORIES)
    assert (
        plan.is_new
        and plan.problems == ()
        and "made as of migration app_0004" in " ".join(plan.notes)
    )
    assert not ours.exists()
    dry = await restored(backup, url_of(ours), histories=HISTORIES, dry_run=True)
    assert not ours.exists()
    report = await restored(backup, url_of(ours), histories=HISTORIES)
    assert asked(ours, *facts) == before
    assert asked(ours, "SELECT count(*) FROM sessions") == [[(0,)]]
    assert report.tables == dry.tables
    assert report.rows == 2  # one says which code may use our tables
    assert stat.S_IMODE(ours.stat().st_mode) == 0o600


async def test_a_table_that_the_backup_leaves_out_and_no_migration_makes_is_named(
    ours: Path, tmp_path: Path, exclude: Callable[[str], None]
) -> None:
    """Otherwise it would be missing for ever in a database that is recorded as being at the newest
    migration.
    """
    execute(ours, "CREATE TABLE orders (id INT); CREATE TABLE cache (id INT)")
    exclude("cache")
    backup = await create_backup(tmp_path / "backups")
    lost(ours)
    with pytest.raises(
        BackupError, match=r"the tables orders, cache are missing .* let the application make them"
    ):
        await restored(backup, url_of(ours), histories=HISTORIES)
    assert not ours.exists()
    execute(ours, "CREATE TABLE orders (id INT); CREATE TABLE cache (id INT)")
    await restored(backup, url_of(ours), histories=HISTORIES)
    assert asked(ours, "SELECT email FROM users", "SELECT version_num FROM alembic_version") == [
        [("a@x",)],
        [("app_0004",)],
    ], "the application has made its own tables by then, and ours are made beside them"


async def test_a_table_that_was_dropped_by_mistake_is_made_by_its_migration(
    ours: Path, tmp_path: Path
) -> None:
    schema = "SELECT type, name, sql FROM sqlite_master ORDER BY 1, 2"
    before = asked(ours, schema, "SELECT * FROM sessions")
    backup = await create_backup(tmp_path / "backups")
    execute(ours, "DROP TABLE sessions")
    with pytest.raises(BackupError, match="the table sessions is missing in the database"):
        await restored(backup, url_of(ours))
    await restored(backup, url_of(ours), histories=HISTORIES)
    assert asked(ours, schema, "SELECT * FROM sessions") == before


async def test_the_ledger_in_the_same_file_stays_or_is_made_with_the_rest(
    ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await migrated(url_of(ours), LEDGER_HISTORY)
    missed = (
        "INSERT INTO batch_missed (id, task, first_slot, last_slot, count, reason, created_at, "
        "cause, unnoticed) "
        "VALUES (hex(randomblob(16)), 't', 0, 0, 3, 'down', 0, 'down', 3);"
    )
    execute(ours, missed)
    without = await create_backup(tmp_path / "backups")
    monkeypatch.setenv("BACKUP_LEDGER", "1")
    forget_settings()
    whole = await create_backup(tmp_path / "backups")
    execute(ours, f"{missed} DELETE FROM users")
    await restored(without, url_of(ours), histories=HISTORIES)
    counts = ("SELECT count(*) FROM batch_missed", "SELECT count(*) FROM users")
    assert asked(ours, *counts) == [[(2,)], [(1,)]]
    lost(ours)
    await restored(whole, url_of(ours), histories=HISTORIES)
    assert asked(ours, *counts, "SELECT count(*) FROM batch_alembic_version") == [
        [(1,)],
        [(1,)],
        [(1,)],
    ]
    lost(ours)
    await restored(without, url_of(ours), histories=HISTORIES)
    assert asked(ours, "SELECT count(*) FROM sqlite_master WHERE name = 'batch_runs'") == [[(0,)]]


async def tried(backup: Path, url: str, folder: Path) -> Any:
    with LocalFile(backup) as source:
        return await restore_into_scratch(source, url, folder=folder, histories=HISTORIES)


async def test_a_drill_is_the_same_restore_into_a_temporary_file(
    app_db: Path, url: str, tmp_path: Path, use_database: Callable[[str], None]
) -> None:
    backup, room = await create_backup(tmp_path / "backups"), tmp_path / "room"
    before = app_db.read_bytes()
    report = await tried(backup, url, room)
    assert {table.table: table.after for table in report.tables}["own"] == 2
    assert list(room.iterdir()) == [] and app_db.read_bytes() == before
    execute(
        app_db,
        "DROP TABLE typed; CREATE TABLE typed (n INT NOT NULL CHECK (n > 1), day TEXT) STRICT",
    )
    with pytest.raises(
        DamagedBackup, match=r"the rows of typed in the backup .* can't be loaded.*CHECK constraint"
    ):
        await tried(backup, url, room)
    execute(app_db, "DROP TABLE typed")
    with pytest.raises(
        BackupError, match=r"into a temporary file.*the table typed is missing"
    ) as raised:
        await tried(backup, url, room)
    assert not isinstance(raised.value, DamagedBackup), "that says nothing of the backup"
    assert list(room.iterdir()) == []


async def test_a_drill_of_an_older_migration_makes_its_tables_as_they_were(
    tmp_path: Path, use_database: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "app.db"
    await migrated(url_of(path), *APPLICATION_HISTORIES)
    use_database(url_of(path))
    backup = await create_backup(tmp_path / "backups")
    for history in APPLICATION_HISTORIES:
        add_migration(monkeypatch, tmp_path, history, "DROP TABLE IF EXISTS batch_once")
    await migrated(url_of(path), *APPLICATION_HISTORIES)
    for place in (
        url_of(path),
        url_of(tmp_path / "none.db"),
        "postgresql+asyncpg://nobody@127.0.0.1:1/none",
    ):
        report = await tried(backup, place, tmp_path / "room")
        assert {table.table for table in report.tables} == {
            *("alembic_version", "batch_data_alembic_version"),
            *("batch_checkpoints", "batch_data_windows", "batch_once", "batch_quarantine"),
            "batch_starts",
            *("sessions", "users"),
        }


async def test_only_this_user_may_read_the_databases_that_a_restore_makes(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        await migrated(url_of(tmp_path / "ledger.db"), LEDGER_HISTORY)
        (tmp_path / "linked.db").symlink_to(tmp_path / "target.db")
        await migrated(url_of(tmp_path / "linked.db"), *APPLICATION_HISTORIES)
        (tmp_path / "there.db").touch(0o640)
        await migrated(url_of(tmp_path / "there.db"), *APPLICATION_HISTORIES)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.glob("*.db")}
    assert modes == {"ledger.db": 0o600, "linked.db": 0o600, "target.db": 0o600, "there.db": 0o640}
