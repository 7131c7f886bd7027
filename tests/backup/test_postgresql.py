from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import groupby
from pathlib import Path
from uuid import uuid4

import pytest
from sqlalchemy import make_url

from batch_system.backup import create_backup
from batch_system.backup.file.progress import BackupProgress
from batch_system.backup.file.reader import Backup, LocalFile, read_header
from batch_system.backup.file.verify import verify
from batch_system.backup.postgresql import unloading
from batch_system.concurrency.stoppable import Stop
from batch_system.database.companions import companions
from tests.backup.contents import connected, copies, execute, manifest, members, restore, until
from tests.backup.restores import restored

ODD_TYPES = """
CREATE TYPE mood AS ENUM ('fine', 'à la mode');
CREATE TABLE odd (
    id int PRIMARY KEY, f float8, g float4, n numeric, b bytea, a text[], m int[][], j jsonb,
    t timestamptz, s text, e mood, i interval, r int4range, u uuid, c "char", x bit varying
);
"""
ODD_ROWS = r"""
INSERT INTO odd VALUES
    (1, 'NaN', '-Infinity', 'NaN', '\x00ff0a5c',
     ARRAY['a,b', NULL, '"', '\', 'NULL', ''], '{{1,2},{3,4}}', '{"k": "\n"}',
     'infinity', E'tab\t newline\n return\r backslash\\ \\. 日本語 🎉', 'à la mode',
     '1 mon -1 day', '[1,5)', '12345678-1234-1234-1234-123456789abc', 'x', B'0101'),
    (2, 0.1, 0.1, 1e-30, '', '{}', '{}', 'null', '0044-03-15 12:00:00+00 BC', '', 'fine', '0',
     'empty', NULL, '', B'');
INSERT INTO odd VALUES (3);
"""


@asynccontextmanager
async def fresh_database(beside: str) -> AsyncIterator[str]:
    name = f"batch_{uuid4().hex}"
    await execute(beside, f"CREATE DATABASE {name}")
    yield make_url(beside).set(database=name).render_as_string(hide_password=False)
    await execute(beside, f"DROP DATABASE {name}")


@pytest.mark.parametrize("range_bytes", [unloading.RANGE_BYTES, 100_000])
async def test_transfers_between_tables_are_in_the_backup_whole(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, range_bytes: int
) -> None:
    """The sum over four tables is constant. Each connection of the backup copies some tables or
    pages.
    """
    monkeypatch.setattr(unloading, "RANGE_BYTES", range_bytes)
    tables = "abcd"
    for name in tables:
        await execute(
            database,
            f"CREATE TABLE {name} AS SELECT 1000 AS n, 0 AS moves",
            f"INSERT INTO {name} SELECT 0, 0 FROM generate_series(1, 20000)",
            f"CREATE INDEX ON {name} (n) WHERE n <> 0",
        )
    moves = 0

    async def move() -> None:
        nonlocal moves
        async with connected(database) as connection:
            while True:
                source, target = tables[moves % 4], tables[(moves + 1 + moves % 3) % 4]
                await connection.execute(
                    f"BEGIN; UPDATE {source} SET n = n - 1, moves = moves + 1 WHERE n <> 0;"
                    f" UPDATE {target} SET n = n + 1 WHERE n <> 0; COMMIT"
                )
                moves += 1

    async def some_moves() -> bool:
        return moves > 10

    writer = asyncio.create_task(move())
    await until(some_moves)
    before = moves
    backups = [await create_backup(tmp_path / "backups") for _ in range(3)]
    after = moves
    writer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writer
    assert after > before, "the writer went on meanwhile"
    for backup in backups:
        rows = [row.split(b"\t") for copy in copies(backup).values() for row in copy.splitlines()]
        assert len(rows) == 80_004
        assert sum(int(n) for n, _ in rows) == 4000
        assert before <= sum(int(count) for _, count in rows) <= after + 1
    async with fresh_database(database) as other, connected(other) as connection:
        for name in tables:
            await connection.execute(f"CREATE TABLE {name} (n int, moves int)")
        await restored(backups[-1], other)
        for name, saved in copies(backups[-1]).items():
            there = [
                b"%d\t%d" % (n, count)
                for n, count in await connection.fetch(f"SELECT * FROM {name}")
            ]
            assert sorted(there) == sorted(saved.splitlines())


async def test_a_backup_is_a_tar_of_whole_rows_with_a_manifest_that_counts_them(
    database: str, tmp_path: Path
) -> None:
    await execute(
        database,
        "CREATE TABLE t AS SELECT n, repeat(md5(n::text), 10) FROM generate_series(1, 20000) n",
    )
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


async def test_each_row_of_a_large_table_is_there_once_whatever_pages_it_is_on(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unloading, "RANGE_BYTES", 50_000)
    await execute(
        database,
        'CREATE TABLE t ("n\'" int, gone int, text text, seven int GENERATED ALWAYS AS (7) STORED)',
        "INSERT INTO t SELECT n, 0, repeat(md5(n::text), n % 9) FROM generate_series(1, 9000) n",
        "ALTER TABLE t DROP COLUMN gone",
        "UPDATE t SET text = 'moved' WHERE \"n'\" % 5 = 0",
        'DELETE FROM t WHERE "n\'" % 7 = 0',
    )
    backup = await create_backup(tmp_path / "backups")
    (table,) = manifest(backup)["tables"]
    assert table["parts"] > 10, "each range of pages begins a part"
    numbers = sorted(int(row.split(b"\t")[0]) for row in copies(backup)["public.t"].splitlines())
    assert numbers == [n for n in range(1, 9001) if n % 7]
    with LocalFile(backup) as file:
        opened = Backup.open(file)
        assert opened.tables[0].rows == len(numbers) == verify(file, Stop()).rows
        read = b"".join(opened.parts(opened.tables[0])).splitlines()
    async with connected(database) as connection:
        in_pages = await connection.fetch('SELECT "n\'" FROM t ORDER BY ctid')
    assert [int(row.split(b"\t")[0]) for row in read] == [number for (number,) in in_pages], (
        "as the pages have them"
    )


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


async def test_the_settings_of_a_role_do_not_change_how_values_are_written(
    database: str, tmp_path: Path
) -> None:
    name = make_url(database).database
    await execute(
        database,
        "CREATE TABLE t (at timestamptz, class regclass)",
        "INSERT INTO t VALUES ('2026-03-04 05:06:07+00', 't')",
    )
    settings = ("datestyle = 'German, DMY'", "timezone = 'Asia/Tokyo'", "statement_timeout = 1")
    settings += ("search_path = pg_catalog",)
    # In one connection, because a new one would have the timeout of a millisecond.
    await execute(database, *(f'ALTER DATABASE "{name}" SET {setting}' for setting in settings))
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
        "CREATE TABLE t (id int, dropped int, twice int GENERATED ALWAYS AS (id * 2) STORED, "
        "name text)",
        "ALTER TABLE t DROP COLUMN dropped",
        "INSERT INTO t VALUES (4, DEFAULT, 'four')",
        "CREATE TABLE only_generated (one int GENERATED ALWAYS AS (1) STORED)",
        "INSERT INTO only_generated DEFAULT VALUES",
    )
    backup = await create_backup(tmp_path / "backups")
    columns = {table["name"]: table["columns"] for table in manifest(backup)["tables"]}
    assert columns == {"t": ["id", "name"], "only_generated": []}
    assert copies(backup) == {"public.t": b"4\tfour\n", "public.only_generated": b"\n"}


async def test_each_row_of_a_partitioned_or_inherited_table_is_there_once(
    database: str, tmp_path: Path
) -> None:
    await execute(
        database,
        "CREATE TABLE events (id int, day date) PARTITION BY RANGE (id)",
        "CREATE TABLE events_1 PARTITION OF events FOR VALUES "
        "FROM (0) TO (10) PARTITION BY RANGE (day)",
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


async def test_the_manifest_has_the_types_and_the_key_of_each_table(
    database: str, tmp_path: Path
) -> None:
    await execute(
        database,
        "CREATE TYPE mood AS ENUM ('fine')",
        'CREATE TABLE t (b int, "A" varchar(7), mood mood, price numeric(10,2)[], PRIMARY KEY '
        '("A", b))',
        "CREATE TABLE without (n int UNIQUE)",
    )
    with LocalFile(await create_backup(tmp_path / "backups")) as file:
        t, without = Backup.open(file).tables
    assert t.columns == ("b", "A", "mood", "price")
    assert t.types == ("integer", "character varying(7)", "public.mood", "numeric(10,2)[]")
    assert t.key == ("A", "b") and without.key == ()


async def test_the_header_has_the_revision_of_every_alembic_history(
    database: str, tmp_path: Path
) -> None:
    await execute(
        database,
        "CREATE SCHEMA other",
        *(
            f"CREATE TABLE {name} (version_num varchar(32) PRIMARY KEY)"
            for name in (
                "alembic_version",
                "other.of_a_plugin",
                "batch_alembic_version",
                "other.empty_version",
            )
        ),
        "INSERT INTO alembic_version VALUES ('app_0001')",
        "INSERT INTO other.of_a_plugin VALUES ('two'), ('heads')",
        "INSERT INTO batch_alembic_version VALUES ('ledger_0006')",
        "CREATE TABLE users (id int)",
    )
    header = read_header(await create_backup(tmp_path / "backups"))
    assert header.revision == "app_0001"
    assert header.revisions == {
        "public.alembic_version": "app_0001",
        "public.batch_alembic_version": "ledger_0006",
        "other.of_a_plugin": "heads, two",
        "other.empty_version": "",
    }


async def test_cyclic_and_composite_foreign_keys_do_not_hinder_a_backup(
    database: str, tmp_path: Path
) -> None:
    await execute(
        database,
        "CREATE TABLE a (x int, y int, b int, PRIMARY KEY (x, y)); CREATE TABLE b (id int "
        "PRIMARY KEY, x int, y int)",
        "ALTER TABLE b ADD FOREIGN KEY (x, y) REFERENCES a DEFERRABLE INITIALLY DEFERRED",
        "ALTER TABLE a ADD FOREIGN KEY (b) REFERENCES b DEFERRABLE INITIALLY DEFERRED",
        "BEGIN; INSERT INTO a VALUES (1, 2, 3); INSERT INTO b VALUES (3, 1, 2); COMMIT",
    )
    assert copies(await create_backup(tmp_path / "backups")) == {
        "public.a": b"1\t2\t3\n",
        "public.b": b"3\t1\t2\n",
    }


async def test_a_field_of_ten_megabytes_is_whole_and_goes_over_members_of_the_usual_size(
    database: str, tmp_path: Path
) -> None:
    await execute(
        database,
        "CREATE TABLE t (id int, data bytea)",
        "INSERT INTO t SELECT 1, decode(repeat('00ff5c0a0d', 2 * 1024 * 1024), 'hex')",
        "INSERT INTO t VALUES (2, 'small')",
    )
    backup = await create_backup(tmp_path / "backups")
    with LocalFile(backup) as file:
        opened = Backup.open(file)
        assert verify(file, Stop()).rows == 2
        (table,) = opened.tables
        whole = b"".join(opened.parts(table))
        assert max(member.bytes for member in opened.members_of(table)) <= 3 * 1024 * 1024
    first, second = whole.splitlines()
    assert (
        bytes.fromhex(first.removeprefix(b"1\t\\\\x").decode())
        == b"\x00\xff\x5c\x0a\x0d" * 2 * 1024 * 1024
    )
    assert second == b"2\t\\\\x736d616c6c"


async def test_progress_rises_to_all_of_the_rows(database: str, tmp_path: Path) -> None:
    await execute(
        database,
        "CREATE TABLE t AS SELECT n, repeat(md5(n::text), 9) FROM generate_series(1, 30000) n",
    )
    await execute(database, "ANALYZE t")
    seen: list[BackupProgress] = []
    await create_backup(tmp_path / "backups", on_progress=seen.append)
    await asyncio.sleep(0)
    assert [stage for stage, _ in groupby(progress.stage for progress in seen)] == [
        "copying",
        "verifying",
    ]
    assert (
        seen[0] == BackupProgress(0, 0, seen[0].estimate, "copying")
        and 8_000_000 < seen[0].estimate < 12_000_000
    )
    assert seen[-1].rows == 30_000 and seen[-1].estimate > 0


async def test_the_ledgers_tables_are_left_out_and_named(database: str, tmp_path: Path) -> None:
    kept = sorted([*companions.tables, "alembic_version", "users"])
    ledgers = ["batch_alembic_version", "batch_log", "batch_runs"]
    await execute(database, *(f"CREATE TABLE {name} AS SELECT 1 AS id" for name in kept + ledgers))
    backup = await create_backup(tmp_path / "backups")
    assert [table["name"] for table in manifest(backup)["tables"]] == kept
    assert manifest(backup)["left_out"] == [f"public.{name}" for name in ledgers]


async def test_a_setting_includes_the_ledger_in_the_backup(
    database: str, tmp_path: Path, settings: Callable[..., None]
) -> None:
    await execute(
        database,
        *(f"CREATE TABLE {name} (id int)" for name in ("batch_alembic_version", "batch_runs", "t")),
    )
    settings(BACKUP_LEDGER="1")
    backup = await create_backup(tmp_path / "backups")
    assert [table["name"] for table in manifest(backup)["tables"]] == [
        "batch_alembic_version",
        "batch_runs",
        "t",
    ]
    assert manifest(backup)["left_out"] == []


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({"BACKUP_INCLUDE": "users, other.*"}, ["other.Users", "other.logs", "public.users"]),
        ({"BACKUP_EXCLUDE": "logs events"}, ["other.Users", "public.users"]),
        ({"BACKUP_EXCLUDE": "Users logs events"}, ["public.users"]),
        ({"BACKUP_EXCLUDE": "public.*"}, ["other.Users", "other.logs"]),
        (
            {"BACKUP_INCLUDE": "public.*", "BACKUP_EXCLUDE": "events_?"},
            ["public.logs", "public.users"],
        ),
        ({"BACKUP_INCLUDE": "events"}, ["public.events_1", "public.events_2"]),
    ],
)
async def test_patterns_choose_the_tables_and_the_rest_is_named(
    database: str,
    tmp_path: Path,
    settings: Callable[..., None],
    chosen: dict[str, str],
    expected: list[str],
) -> None:
    await execute(
        database,
        "CREATE SCHEMA other",
        'CREATE TABLE users (id serial); CREATE TABLE other."Users" (id int GENERATED ALWAYS AS '
        "IDENTITY)",
        "CREATE TABLE logs (id serial); CREATE TABLE other.logs (id serial)",
        "CREATE TABLE events (id int) PARTITION BY RANGE (id)",
        *(
            f"CREATE TABLE events_{n} PARTITION OF events FOR VALUES FROM ({n}) TO ({n + 1})"
            for n in (1, 2)
        ),
    )
    settings(**chosen)
    with LocalFile(await create_backup(tmp_path / "backups")) as file:
        backup = Backup.open(file)
    everything = [
        "other.Users",
        "other.logs",
        "public.events_1",
        "public.events_2",
        "public.logs",
        "public.users",
    ]
    assert [str(table) for table in backup.tables] == expected
    assert list(backup.left_out) == [name for name in everything if name not in expected]
    with_ids = [name for name in expected if "events" not in name]
    assert [str(sequence) for sequence in backup.sequences] == [
        f"{name}_id_seq" for name in with_ids
    ]


async def test_in_a_schema_without_a_ledger_an_authors_table_may_have_any_name(
    database: str, tmp_path: Path
) -> None:
    await execute(database, "CREATE TABLE batch_orders AS SELECT 1 AS id")
    assert copies(await create_backup(tmp_path / "backups")) == {"public.batch_orders": b"1\n"}


async def test_an_authors_table_beside_the_ledger_may_have_a_name_like_those_of_the_ledger(
    database: str, tmp_path: Path
) -> None:
    for name in ("alembic_version", "runs", "orders", "run", "checkpoints"):
        await execute(database, f"CREATE TABLE batch_{name} (id serial)")
    with LocalFile(await create_backup(tmp_path / "backups")) as file:
        backup = Backup.open(file)
    assert [str(table) for table in backup.tables] == [
        f"public.batch_{name}" for name in ("checkpoints", "orders", "run")
    ]
    assert {f"public.batch_{name}_id_seq" for name in ("orders", "run")} <= {
        str(one) for one in backup.sequences
    }
    assert backup.left_out == ("public.batch_alembic_version", "public.batch_runs")


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
