"""`batch backup diff`: between a backup and the database, and between two backups, on both kinds of
databases.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from sqlalchemy import text

from batch_system.database.engine import Database
from tests.backup.here import make_backups_here
from tests.commands import Batch, in_this_process, refuses

TABLES = """
CREATE TABLE orders (id INTEGER PRIMARY KEY, state TEXT);
CREATE TABLE notes (v TEXT);
CREATE TABLE alembic_version (version_num VARCHAR(32) PRIMARY KEY);
INSERT INTO orders VALUES (1, 'new'), (2, 'new'), (3, NULL);
INSERT INTO notes VALUES ('a');
INSERT INTO alembic_version VALUES ('app_0004')
"""
CHANGES = """
UPDATE orders SET state = 'paid' WHERE id = 1;
DELETE FROM orders WHERE id = 2;
INSERT INTO orders VALUES (4, 'new'), (5, 'new');
INSERT INTO notes VALUES ('b');
ALTER TABLE orders ADD COLUMN total INTEGER;
UPDATE alembic_version SET version_num = 'app_0005'
"""


@pytest.fixture
def batch(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Batch]:
    make_backups_here(monkeypatch)
    yield from in_this_process(capsys, monkeypatch)


@pytest.fixture
def url(database_url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("DATABASE_URL", database_url)
    change(database_url, TABLES)
    return database_url


def change(url: str, script: str) -> None:
    async def execute() -> None:
        database = Database(url, setting="DATABASE_URL", pooled=False)
        async with database.engine.begin() as connection:
            for statement in script.split(";"):
                await connection.execute(text(statement))
        await database.dispose()

    asyncio.run(execute())


def test_what_has_changed_since_a_backup_is_shown_by_table(batch: Batch, url: str) -> None:
    assert batch("backup", "create").code == 0
    change(url, CHANGES)
    shown = batch("backup", "diff", "latest")
    assert shown.code == 0 and shown.err == ""
    assert [line.rstrip() for line in shown.out.splitlines()][2:] == [
        "migration  app_0004 to app_0005",
        "",
        "Schema",
        "orders: column total added, " + ("INTEGER" if url.startswith("sqlite") else "integer"),
        "",
        "Rows",
        "table            rows before  rows after  added  changed  removed  note",
        "orders                     3           4     +2        1       -1  -",
        "notes                      1           2      -        -        -  no usable primary "
        "key: some rows differ",
        "alembic_version            1           1     +1        0       -1  -",
        "",
        "3 tables · +3 added · 1 changed · -2 removed · 1 table without a usable key changed",
    ]
    said = batch("backup", "diff", "latest", "--json").json
    assert (said["added"], said["changed"], said["removed"]) == (3, 1, 2)
    assert (said["before"]["revision"], said["after"]["revision"]) == ("app_0004", "app_0005")
    orders = said["tables"][0]
    assert {
        name: orders[name] for name in ("table", "rows_before", "rows_after", "added", "key")
    } == {
        "table": "orders",
        "rows_before": 3,
        "rows_after": 4,
        "added": 2,
        "key": ["id"],
    }
    first = said["before"]["name"].rpartition("/")[2]
    assert batch("backup", "create").code == 0
    assert batch("backup", "diff", "latest").out.endswith(
        "3 tables · 0 added · 0 changed · 0 removed\n"
    )
    assert batch("backup", "diff", first, "latest", "--json").json["tables"] == said["tables"]


def test_a_file_that_is_not_a_backup_is_named(batch: Batch) -> None:
    refuses(batch("backup", "diff", "latest"), "there is no backup in", "BACKUP_DIR")
    refuses(
        batch("backup", "diff", "backup_20261125_020000.backup.gz"),
        "backup_20261125_020000.backup.gz",
    )
