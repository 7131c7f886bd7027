from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import uuid4

import pytest
from sqlalchemy import make_url

from service.backup import create_backup
from service.batch.tables import companions
from tests.backup.contents import connected, copies, execute, manifest, members, restore, until

ODD_TYPES = """
CREATE TYPE mood AS ENUM ('fine', 'à la mode');
CREATE TABLE odd (
    id int PRIMARY KEY, f float8, g float4, n numeric, b bytea, a text[], m int[][], j jsonb, t timestamptz,
    s text, e mood, i interval, r int4range, u uuid, c "char", x bit varying
);
"""
ODD_ROWS = r"""
INSERT INTO odd VALUES
    (1, 'NaN', '-Infinity', 'NaN', '\x00ff0a5c',
     ARRAY['a,b', NULL, '"', '\', 'NULL', ''], '{{1,2},{3,4}}', '{"k": "\n"}',
     'infinity', E'tab\t newline\n return\r backslash\\ \\. 日本語 🎉', 'à la mode', '1 mon -1 day', '[1,5)',
     '12345678-1234-1234-1234-123456789abc', 'x', B'0101'),
    (2, 0.1, 0.1, 1e-30, '', '{}', '{}', 'null', '0044-03-15 12:00:00+00 BC', '', 'fine', '0', 'empty', NULL, '', B'');
INSERT INTO odd VALUES (3);
"""


@asynccontextmanager
async def fresh_database(beside: str) -> AsyncIterator[str]:
    name = f"batch_{uuid4().hex}"
    await execute(beside, f"CREATE DATABASE {name}")
    yield make_url(beside).set(database=name).render_as_string(hide_password=False)
    await execute(beside, f"DROP DATABASE {name}")


async def test_transfers_between_tables_are_in_the_backup_whole(database: str, tmp_path: Path) -> None:
    await execute(
        database,
        "CREATE TABLE a AS SELECT 1000 AS n",
        "CREATE TABLE b AS SELECT repeat('x', 1000) FROM generate_series(1, 30000)",
        "CREATE TABLE z AS SELECT 0 AS n",
    )
    moves = 0

    async def move() -> None:
        nonlocal moves
        async with connected(database) as connection:
            while True:
                await connection.execute("BEGIN; UPDATE a SET n = n - 1; UPDATE z SET n = n + 1; COMMIT")
                moves += 1

    async def some_moves() -> bool:
        return moves > 10

    writer = asyncio.create_task(move())
    await until(some_moves)
    before = moves
    backup = await create_backup(tmp_path / "backups")
    after = moves
    writer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writer
    rows = copies(backup)
    assert after > before, "the writer went on meanwhile"
    assert int(rows["public.a"]) + int(rows["public.z"]) == 1000
    assert before <= int(rows["public.z"]) <= after + 1


async def test_a_backup_is_a_tar_of_whole_rows_with_a_manifest_that_counts_them(database: str, tmp_path: Path) -> None:
    await execute(database, "CREATE TABLE t AS SELECT n, repeat(md5(n::text), 10) FROM generate_series(1, 20000) n")
    backup = await create_backup(tmp_path / "backups")
    files = members(backup)
    header = json.loads(files["header.json"])
    assert header["kind"] == "postgresql" and header["format"] == 1 and header["snapshot"]
    (table,) = manifest(backup)["tables"]
    parts = [name for name in files if name.startswith("data/")]
    assert parts == [f"data/0001-public.t/000{n}.copy" for n in range(1, table["parts"] + 1)]
    assert len(parts) > 2
    assert all(files[name].endswith(b"\n") for name in parts)
    rows = copies(backup)["public.t"].splitlines()
    assert [int(row.split(b"\t")[0]) for row in rows] == list(range(1, 20001))
    assert table["rows"] == 20000 and table["bytes"] == sum(len(files[name]) for name in parts)


async def test_values_of_every_kind_come_back_as_they_were(database: str, tmp_path: Path) -> None:
    await execute(database, ODD_TYPES, ODD_ROWS, "CREATE TABLE nothing (id int)")
    backup = await create_backup(tmp_path / "backups")
    every = "SELECT odd::text FROM odd ORDER BY id"
    async with connected(database) as connection, fresh_database(database) as other:
        await execute(other, ODD_TYPES, "CREATE TABLE nothing (id int)")
        await restore(backup, other)
        async with connected(other) as restored:
            assert await restored.fetch(every) == await connection.fetch(every)
            assert await restored.fetchval("SELECT count(*) FROM odd") == 3
            assert await restored.fetchval("SELECT count(*) FROM nothing") == 0


async def test_the_settings_of_a_role_do_not_change_how_values_are_written(database: str, tmp_path: Path) -> None:
    name = make_url(database).database
    await execute(
        database,
        "CREATE TABLE t (at timestamptz, class regclass)",
        "INSERT INTO t VALUES ('2026-03-04 05:06:07+00', 't')",
    )
    for setting in (
        "datestyle = 'German, DMY'",
        "timezone = 'Asia/Tokyo'",
        "statement_timeout = 1",
        "search_path = pg_catalog",
    ):
        await execute(database, f'ALTER DATABASE "{name}" SET {setting}')
    backup = await create_backup(tmp_path / "backups")
    assert copies(backup)["public.t"] == b"2026-03-04 05:06:07+00\tpublic.t\n"


async def test_names_of_every_kind_are_kept_apart(database: str, tmp_path: Path) -> None:
    names = [
        "Users",
        "users",
        "Größe",
        "日本語のテーブル",
        'quo"te',
        "a.b",
        "..",
        "a/b",
        "sp ace",
        "per%cent",
        "x" * 63,
    ]
    quoted = {name: '"' + name.replace('"', '""') + '"' for name in names}
    await execute(database, 'CREATE SCHEMA "Other.Schema"')
    for number, name in enumerate(names):
        await execute(
            database,
            f"CREATE TABLE {quoted[name]} AS SELECT {number} AS {quoted[name]}",
            f'CREATE TABLE "Other.Schema".{quoted[name]} AS SELECT {number + 100} AS id',
        )
    backup = await create_backup(tmp_path / "backups")
    expected = {f"public.{name}": b"%d\n" % n for n, name in enumerate(names)}
    expected |= {f"Other.Schema.{name}": b"%d\n" % (n + 100) for n, name in enumerate(names)}
    assert copies(backup) == expected
    assert all(len(name) <= 100 and ".." not in name.split("/") for name in members(backup))


async def test_generated_columns_are_left_out(database: str, tmp_path: Path) -> None:
    await execute(
        database,
        "CREATE TABLE t (id int, dropped int, twice int GENERATED ALWAYS AS (id * 2) STORED, name text)",
        "ALTER TABLE t DROP COLUMN dropped",
        "INSERT INTO t VALUES (4, DEFAULT, 'four')",
        "CREATE TABLE only_generated (one int GENERATED ALWAYS AS (1) STORED)",
        "INSERT INTO only_generated DEFAULT VALUES",
    )
    backup = await create_backup(tmp_path / "backups")
    columns = {table["name"]: table["columns"] for table in manifest(backup)["tables"]}
    assert columns == {"t": ["id", "name"], "only_generated": []}
    assert copies(backup) == {"public.t": b"4\tfour\n", "public.only_generated": b"\n"}


async def test_each_row_of_a_partitioned_or_inherited_table_is_there_once(database: str, tmp_path: Path) -> None:
    await execute(
        database,
        "CREATE TABLE events (id int, day date) PARTITION BY RANGE (id)",
        "CREATE TABLE events_1 PARTITION OF events FOR VALUES FROM (0) TO (10) PARTITION BY RANGE (day)",
        "CREATE TABLE events_1_all PARTITION OF events_1 DEFAULT",
        "CREATE TABLE events_2 PARTITION OF events FOR VALUES FROM (10) TO (20)",
        "INSERT INTO events VALUES (1, '2026-01-01'), (11, '2026-01-02')",
        "CREATE TABLE parent (id int)",
        "CREATE TABLE child () INHERITS (parent)",
        "INSERT INTO parent VALUES (1)",
        "INSERT INTO child VALUES (2)",
    )
    assert copies(await create_backup(tmp_path / "backups")) == {
        "public.events_1_all": b"1\t2026-01-01\n",
        "public.events_2": b"11\t2026-01-02\n",
        "public.parent": b"1\n",
        "public.child": b"2\n",
    }


async def test_the_ledgers_tables_are_left_out_and_named(database: str, tmp_path: Path) -> None:
    kept = sorted([*companions.tables, "alembic_version", "users"])
    ledgers = ["batch_alembic_version", "batch_log", "batch_runs"]
    await execute(database, *(f"CREATE TABLE {name} AS SELECT 1 AS id" for name in kept + ledgers))
    backup = await create_backup(tmp_path / "backups")
    assert [table["name"] for table in manifest(backup)["tables"]] == kept
    assert manifest(backup)["left_out"] == [f"public.{name}" for name in ledgers]


async def test_where_no_ledger_is_an_authors_table_may_have_any_name(database: str, tmp_path: Path) -> None:
    await execute(database, "CREATE TABLE batch_orders AS SELECT 1 AS id")
    assert copies(await create_backup(tmp_path / "backups")) == {"public.batch_orders": b"1\n"}


async def test_the_values_of_sequences_are_in_the_manifest(database: str, tmp_path: Path) -> None:
    await execute(
        database,
        "CREATE TABLE t (id int GENERATED ALWAYS AS IDENTITY)",
        "INSERT INTO t DEFAULT VALUES",
        "INSERT INTO t DEFAULT VALUES",
        'CREATE SEQUENCE "Not Called" START 7',
    )
    assert manifest(await create_backup(tmp_path / "backups"))["sequences"] == [
        {"schema": "public", "name": "Not Called", "last_value": 7, "is_called": False},
        {"schema": "public", "name": "t_id_seq", "last_value": 2, "is_called": True},
    ]
