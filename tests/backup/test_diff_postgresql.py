"""Comparing PostgreSQL backups with each other, and with the database as it is."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from batch_system.backup import create_backup
from batch_system.backup.comparing import postgresql_rows
from batch_system.backup.comparing.compare import diff
from batch_system.backup.comparing.differences import Difference, TableDifference
from batch_system.batch.ledger.tables import ledger
from batch_system.config import forget_settings, get_settings
from batch_system.errors import BackupError
from tests.backup.contents import connected, execute, make_sqlite, until
from tests.backup.here import make_backups_here
from tests.docs_blocks import ROOT
from tests.processes import environment

SCHEMA = """
CREATE SCHEMA "Other.Schema";
CREATE TABLE "Other.Schema"."Größe" ("Key" text, n int, "select" text, PRIMARY KEY (n, "Key"));
CREATE TABLE floats (
    id float8 PRIMARY KEY, n numeric, f float4, twice float8 GENERATED ALWAYS AS (id * 2) STORED
);
CREATE TABLE events (id int, day date, what text, PRIMARY KEY (id, day)) PARTITION BY RANGE (id);
CREATE TABLE events_1 PARTITION OF events FOR VALUES FROM (0) TO (10);
CREATE TABLE events_2 PARTITION OF events FOR VALUES FROM (10) TO (20);
CREATE TABLE notes (v text, at timestamptz);
CREATE TABLE columns (gone int, id int PRIMARY KEY, kind int, v text);
CREATE TABLE rekeyed (a int PRIMARY KEY, b int);
CREATE TABLE dropped (id int);
CREATE TABLE ids (a uuid, b bytea, PRIMARY KEY (b, a));
"""
ROWS = r"""
INSERT INTO "Other.Schema"."Größe"
    VALUES ('日本', 1, NULL), ('', 1, '\N'), (E'tab\t\n', 2, E'\\'), ('x', 2, 'y');
INSERT INTO floats VALUES ('NaN', 'NaN', 'Infinity'), ('-Infinity', 0, 0), (0.1, 0.1, 0.1);
INSERT INTO events VALUES (1, '2026-01-01', 'a'), (2, '2026-01-02', 'b'), (11, '2026-01-03', NULL);
INSERT INTO notes VALUES ('a', '2026-03-04 05:06+00'), ('a', '2026-03-04 05:06+00'), (NULL, NULL);
INSERT INTO columns SELECT n, n, n, n FROM generate_series(1, 5) n;
INSERT INTO rekeyed VALUES (1, 1), (2, 2);
INSERT INTO dropped VALUES (1), (2);
INSERT INTO ids VALUES ('12345678-1234-1234-1234-123456789abc', '\x00'), (gen_random_uuid(), '');
INSERT INTO ids VALUES (gen_random_uuid(), '\x0a09');
"""
CHANGES = """
UPDATE "Other.Schema"."Größe" SET "select" = '' WHERE "Key" = '日本';
DELETE FROM "Other.Schema"."Größe" WHERE "select" = 'y';
INSERT INTO "Other.Schema"."Größe" VALUES ('日本', 2, NULL);
UPDATE floats SET f = 'NaN', n = 1 WHERE id = 'NaN';
UPDATE floats SET n = 0.10 WHERE id = 0.1::float8;
UPDATE events SET id = 12 WHERE id = 2;
UPDATE events SET what = '' WHERE id = 11;
DELETE FROM notes WHERE ctid = (SELECT min(ctid) FROM notes);
INSERT INTO notes VALUES ('b', NULL);
ALTER TABLE columns DROP COLUMN gone;
ALTER TABLE columns ADD COLUMN more int DEFAULT 1;
ALTER TABLE columns ALTER COLUMN kind TYPE bigint;
UPDATE columns SET v = 'new', more = 2 WHERE id = 3;
ALTER TABLE rekeyed DROP CONSTRAINT rekeyed_pkey;
ALTER TABLE rekeyed ADD PRIMARY KEY (b, a);
DROP TABLE dropped;
CREATE TABLE fresh (id int PRIMARY KEY);
INSERT INTO fresh VALUES (1), (2), (3);
UPDATE ids SET b = '\\xff' WHERE b = '';
"""
COUNTED = {
    "Other.Schema.Größe": (1, 1, 1),
    "floats": (0, 2, 0),
    "events_1": (0, 0, 1),
    "events_2": (1, 1, 0),
    "notes": (None, None, None),
    "columns": (0, 1, 0),
    "rekeyed": (None, None, None),
    "dropped": (0, 0, 2),
    "fresh": (3, 0, 0),
    "ids": (1, 0, 1),
}
CHANGED = [
    "columns: column more added, integer",
    "columns: column gone removed",
    "columns: column kind was integer, is bigint",
    "table fresh added",
    "table dropped removed",
    "rekeyed: primary key was a, is b, a",
]


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    make_backups_here(monkeypatch)  # one process for each of many backups would be slow


async def made(tmp_path: Path) -> str:
    return str(await create_backup(tmp_path / "backups"))


def by_name(found: Difference) -> dict[str, TableDifference]:
    return {table.table: table for table in found.tables}


def rows(table: TableDifference) -> tuple[int | None, ...]:
    return table.added, table.changed, table.removed


async def test_rows_tables_and_columns_that_differ_are_found_now_and_in_a_later_backup(
    database: str, tmp_path: Path
) -> None:
    await execute(database, SCHEMA, ROWS)
    before = await made(tmp_path)
    nothing = await diff(get_settings(), before)
    assert (
        all(table.same for table in nothing.tables)
        and len(nothing.tables) == 9
        and not nothing.schema
    )
    await execute(database, CHANGES)
    now = await diff(get_settings(), before)
    later = await diff(get_settings(), before, await made(tmp_path))
    back = await diff(get_settings(), await made(tmp_path), before)
    assert now.tables == later.tables
    assert {name: rows(table) for name, table in by_name(now).items()} == COUNTED
    assert {name: rows(table)[::-1] for name, table in by_name(back).items()} == COUNTED
    assert now.schema == CHANGED
    assert (now.added, now.changed, now.removed) == (6, 5, 5)
    assert [name for name, table in by_name(now).items() if table.same] == ["rekeyed"]
    sizes = [(table.rows_before, table.rows_after) for table in now.tables]
    assert sizes == sorted(sizes, key=lambda pair: -max(one or 0 for one in pair))


async def test_a_key_with_a_generated_column_does_not_tell_rows_apart(
    database: str, tmp_path: Path
) -> None:
    """Generated columns are not in a backup."""
    await execute(
        database,
        "CREATE TABLE t (id int, day int GENERATED ALWAYS AS (id / 10) STORED, v int, PRIMARY "
        "KEY (day, id))",
    )
    await execute(database, "INSERT INTO t (id, v) VALUES (1, 1), (2, 2)")
    before = await made(tmp_path)
    assert by_name(await diff(get_settings(), before))["t"].same
    await execute(database, "UPDATE t SET v = 3 WHERE id = 2")
    now = await diff(get_settings(), before)
    later = await diff(get_settings(), before, await made(tmp_path))
    assert (
        rows(by_name(now)["t"]) == (None, None, None)
        and not by_name(now)["t"].same
        and now.tables == later.tables
    )


async def test_a_table_without_a_key_is_the_same_whatever_the_order_of_its_rows(
    database: str, tmp_path: Path
) -> None:
    await execute(
        database, "CREATE TABLE notes AS SELECT n % 7 AS v FROM generate_series(1, 100) n"
    )
    before = await made(tmp_path)
    await execute(
        database, "CREATE TABLE other AS SELECT v FROM notes ORDER BY 1", "TRUNCATE notes",
        "INSERT INTO notes SELECT v FROM other", "DROP TABLE other",
    )  # fmt: skip
    assert by_name(await diff(get_settings(), before))["notes"].same
    await execute(database, "UPDATE notes SET v = 9 WHERE ctid = (SELECT min(ctid) FROM notes)")
    assert not by_name(await diff(get_settings(), before))["notes"].same


async def test_the_settings_of_a_role_do_not_make_rows_differ(
    database: str, tmp_path: Path
) -> None:
    await execute(
        database, "CREATE TABLE t (id int PRIMARY KEY, at timestamptz, f float8, b bytea)"
    )
    await execute(database, r"INSERT INTO t VALUES (1, '2026-03-04 05:06:07+00', 0.1, '\x00')")
    before = await made(tmp_path)
    name = database.rpartition("/")[2].partition("?")[0]
    for setting in ("datestyle = 'German'", "timezone = 'Asia/Tokyo'", "bytea_output = 'escape'"):
        await execute(database, f'ALTER DATABASE "{name}" SET {setting}')
    assert by_name(await diff(get_settings(), before))["t"].same


async def test_one_instant_is_compared_while_others_write(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await execute(
        database, "CREATE TABLE a (id int PRIMARY KEY)", "CREATE TABLE z (id int PRIMARY KEY)"
    )
    before = await made(tmp_path)
    count = postgresql_rows._count

    async def with_a_write(*args: Any) -> Any:
        await execute(database, "INSERT INTO z SELECT count(*) FROM z")
        return await count(*args)

    monkeypatch.setattr(postgresql_rows, "_count", with_a_write)
    assert all(table.same for table in (await diff(get_settings(), before)).tables)
    async with connected(database) as connection:
        assert await connection.fetchval("SELECT count(*) FROM z") == 2


async def test_tables_that_one_side_leaves_out_are_named_and_not_compared(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = ("batch_alembic_version", "batch_runs", "users", "scratch")
    await execute(database, *(f"CREATE TABLE {name} (id int PRIMARY KEY)" for name in tables))
    assert {"batch_alembic_version", "batch_runs"} - {
        "batch_alembic_version"
    } <= ledger.tables.keys()
    before = await made(tmp_path)
    found = await diff(get_settings(), before)
    assert [table.table for table in found.tables] == ["scratch", "users"] and found.left_out == ()
    monkeypatch.setenv("BACKUP_EXCLUDE", "scratch")
    forget_settings()
    found = await diff(get_settings(), before)
    assert [table.table for table in found.tables] == ["users"] and found.left_out == (
        "public.scratch",
    )
    monkeypatch.setenv("BACKUP_LEDGER", "1")
    forget_settings()
    with_ledger = await made(tmp_path)
    found = await diff(get_settings(), with_ledger)
    assert [table.table for table in found.tables] == [
        "batch_alembic_version",
        "batch_runs",
        "users",
    ]
    assert (await diff(get_settings(), before, with_ledger)).left_out == (
        "public.batch_alembic_version",
        "public.batch_runs",
        "public.scratch",
    )


async def test_a_cancel_ends_a_comparison_that_waits_for_a_table(
    database: str, tmp_path: Path
) -> None:
    await execute(database, "CREATE TABLE t (id int PRIMARY KEY)")
    before = await made(tmp_path)
    waits = (
        "SELECT count(*) > 0 FROM pg_stat_activity WHERE wait_event_type = 'Lock' "
        "AND datname = current_database()"
    )
    async with connected(database) as connection, connected(database) as watching:
        async with connection.transaction():
            await connection.execute("LOCK TABLE t")
            comparing = asyncio.create_task(diff(get_settings(), before))
            await until(lambda: watching.fetchval(waits))
            comparing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await comparing
        await until(lambda: watching.fetchval(waits.replace("> 0", "= 0")))


async def test_two_kinds_of_databases_can_not_be_compared(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await execute(database, "CREATE TABLE users (id int PRIMARY KEY)")
    of_postgresql = await made(tmp_path)
    make_sqlite(tmp_path / "app.db")
    monkeypatch.setenv("DATABASE_URL", "sqlite:///app.db")
    forget_settings()
    of_sqlite = await made(tmp_path)
    with pytest.raises(
        BackupError,
        match=r"backup of PostgreSQL, but the database .*app\.db.* is of SQLite: both must",
    ):
        await diff(get_settings(), of_postgresql)
    with pytest.raises(
        BackupError, match=f"of SQLite, but {of_postgresql} is of PostgreSQL: both must be"
    ):
        await diff(get_settings(), of_sqlite, of_postgresql)


async def test_no_password_is_shown_when_the_server_can_not_be_reached(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await execute(database, "CREATE TABLE t (id int PRIMARY KEY)")
    before = await made(tmp_path)
    monkeypatch.setenv("DATABASE_URL", "postgresql://user:hunter2@127.0.0.1:1/shop")
    forget_settings()
    with pytest.raises(BackupError, match="could not be compared") as refused:
        await diff(get_settings(), before)
    assert "hunter2" not in refused.value.message and "127.0.0.1" in refused.value.message


async def test_a_comparison_does_not_wait_for_ever_for_a_locked_table(
    database: str, tmp_path: Path
) -> None:
    await execute(database, "CREATE TABLE t (id int PRIMARY KEY)", "INSERT INTO t VALUES (1)")
    before = await made(tmp_path)
    async with connected(database) as connection:
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute("LOCK TABLE t IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(BackupError, match="something holds the lock of a table"):
            await _with_short_patience(before)
        await transaction.rollback()


async def _with_short_patience(before: str) -> Difference:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(postgresql_rows.snapshot.SETTINGS, "lock_timeout", "50ms")
        return await diff(get_settings(), before)


MEMORY = """
import asyncio, sys
from batch_system.backup.comparing import tally
from batch_system.backup.comparing.compare import diff
from batch_system.config import get_settings

tally.WAITING_BYTES //= 16
tally.PREPARE = tally.PREPARE.replace("-8000", "-1000")
found = asyncio.run(diff(get_settings(), sys.argv[1]))
peak = next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM'))
print(found.changed, peak // 1024)
"""


async def test_memory_does_not_grow_with_the_table(database: str, tmp_path: Path) -> None:
    await execute(database, "CREATE TABLE t (id int PRIMARY KEY, v text)")
    found = {}
    for size in (6_000, 42_000):
        await execute(
            database,
            "TRUNCATE t",
            f"INSERT INTO t SELECT n, repeat(md5(n::text), 30) FROM generate_series(1, {size}) n",
        )
        before = await made(tmp_path)
        await execute(database, "UPDATE t SET v = 'x' || v")
        command = [sys.executable, "-c", MEMORY, before]
        settings = environment({"DATABASE_URL": database})
        ran = await asyncio.to_thread(
            subprocess.run,
            command,
            cwd=ROOT,
            env=settings,
            capture_output=True,
            text=True,
            check=True,
        )
        changed, found[size] = map(int, ran.stdout.split())
        assert changed == size
    assert found[42_000] < found[6_000] + 20, found  # the rows that are more take 36 MB
