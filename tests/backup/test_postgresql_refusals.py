from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from uuid import uuid4

import pytest
from sqlalchemy import make_url

from batch_system.backup import create_backup
from batch_system.backup.file.selection import Selection
from batch_system.backup.postgresql import snapshot
from batch_system.database.urls import connect_arguments
from batch_system.errors import BackupError
from tests.backup.contents import connected, copies, execute, manifest, until


@pytest.fixture
async def role(database: str) -> AsyncIterator[str]:
    """The URL of the database for a role that may only create tables in it."""
    name = f"batch_{uuid4().hex}"
    async with connected(database) as connection:
        await connection.execute(
            f"CREATE ROLE {name} LOGIN PASSWORD 'secret'; CREATE SCHEMA own AUTHORIZATION {name}"
        )
        yield (
            make_url(database)
            .set(username=name, password="secret")
            .render_as_string(hide_password=False)
        )
        await connection.execute(f"DROP OWNED BY {name}; DROP ROLE {name}")


async def waits_for_a_lock(url: str) -> bool:
    async with connected(url) as connection:
        return bool(await connection.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"))


async def test_forced_row_security_never_hides_rows(
    role: str, database: str, use_database: Callable[[str], None], tmp_path: Path
) -> None:
    await execute(
        role,
        "CREATE TABLE own.secrets (id int); INSERT INTO own.secrets VALUES (1), (2)",
        "ALTER TABLE own.secrets ENABLE ROW LEVEL SECURITY; ALTER TABLE own.secrets FORCE ROW "
        "LEVEL SECURITY",
    )
    use_database(role)
    with pytest.raises(
        BackupError, match=r"own.secrets has row-level security, which .*BYPASSRLS"
    ) as caught:
        await create_backup(tmp_path / "backups")
    assert ":secret@" not in caught.value.message
    assert list((tmp_path / "backups").iterdir()) == []
    use_database(database)
    assert copies(await create_backup(tmp_path / "backups")) == {"own.secrets": b"1\n2\n"}


async def test_a_table_that_the_role_may_not_read_is_an_error(
    role: str, database: str, use_database: Callable[[str], None], tmp_path: Path
) -> None:
    await execute(database, "CREATE TABLE not_yours (id int)")
    use_database(role)
    with pytest.raises(
        BackupError,
        match=r"public.not_yours may not be read by this role. A backup needs the owner",
    ):
        await create_backup(tmp_path / "backups")


async def test_large_objects_are_refused(database: str, tmp_path: Path) -> None:
    await execute(database, "CREATE TABLE t (id int)", "SELECT lo_from_bytea(0, 'large')")
    with pytest.raises(BackupError, match=r"holds large objects"):
        await create_backup(tmp_path / "backups")


REFUSED = {
    "CREATE FOREIGN TABLE far (id int) SERVER "
    "elsewhere": "public.far is a foreign table.*BACKUP_EXCLUDE",
    "CREATE UNLOGGED TABLE far (id "
    "int)": "public.far is unlogged, .* BACKUP_EXCLUDE, or ALTER TABLE … SET LOGGED",
    "CREATE UNLOGGED TABLE far (id int); CREATE UNLOGGED TABLE farther (id "
    "int)": r"far is .*1 more: public.farther\)",
}


@pytest.mark.parametrize("statement", REFUSED)
async def test_relations_that_a_backup_could_not_bring_back_are_refused_unless_excluded(
    database: str, tmp_path: Path, settings: Callable[..., None], statement: str
) -> None:
    await execute(
        database,
        "CREATE TABLE t (id int)",
        "CREATE FOREIGN DATA WRAPPER f",
        "CREATE SERVER elsewhere FOREIGN DATA WRAPPER f",
    )
    await execute(database, statement)
    with pytest.raises(BackupError, match=REFUSED[statement]):
        await create_backup(tmp_path / "backups")
    assert list((tmp_path / "backups").iterdir()) == []
    settings(BACKUP_EXCLUDE="far*")
    backup = await create_backup(tmp_path / "backups")
    assert copies(backup) == {"public.t": b""}
    assert manifest(backup)["left_out"][0] == "public.far"


@pytest.mark.parametrize("setting", ["BACKUP_INCLUDE", "BACKUP_EXCLUDE"])
async def test_a_pattern_that_matches_no_table_is_an_error(
    database: str, tmp_path: Path, settings: Callable[..., None], setting: str
) -> None:
    await execute(database, "CREATE TABLE users (id int)")
    settings(**{setting: "users, uesrs"})
    with pytest.raises(BackupError, match=f"{setting} has 'uesrs', which matches no table"):
        await create_backup(tmp_path / "backups")


async def test_an_excluded_table_need_not_be_readable(
    role: str,
    database: str,
    use_database: Callable[[str], None],
    tmp_path: Path,
    settings: Callable[..., None],
) -> None:
    await execute(database, "CREATE TABLE not_yours (id int)")
    await execute(role, "CREATE TABLE own.t AS SELECT 1 AS id")
    use_database(role)
    settings(BACKUP_EXCLUDE="not_yours")
    assert copies(await create_backup(tmp_path / "backups")) == {"own.t": b"1\n"}


async def test_one_connection_is_enough_if_the_role_may_have_no_second_one(
    role: str, database: str, use_database: Callable[[str], None], tmp_path: Path
) -> None:
    await execute(
        role, "CREATE TABLE own.t AS SELECT 1 AS id", "CREATE TABLE own.u AS SELECT 2 AS id"
    )
    await execute(database, f"ALTER ROLE {make_url(role).username} CONNECTION LIMIT 1")
    use_database(role)
    assert copies(await create_backup(tmp_path / "backups")) == {"own.t": b"1\n", "own.u": b"2\n"}


async def test_the_second_connection_never_waits_behind_a_migration_that_waits_for_the_first(
    database: str,
) -> None:
    await execute(database, "CREATE TABLE t (id int)")
    arguments = connect_arguments(make_url(database))
    async with snapshot.connected(arguments) as first:
        contents = await snapshot.take(first, Selection())
        async with snapshot.shared(first, arguments, contents.tables) as second:
            assert second is not None
        migration = asyncio.create_task(execute(database, "ALTER TABLE t ADD more int"))
        await until(lambda: waits_for_a_lock(database))
        async with (
            asyncio.timeout(20),
            snapshot.shared(first, arguments, contents.tables) as second,
        ):
            assert second is None
    await migration


async def test_both_connections_see_the_same_instant(database: str) -> None:
    await execute(database, "CREATE TABLE t AS SELECT 1 AS id")
    arguments = connect_arguments(make_url(database))
    async with snapshot.connected(arguments) as first:
        contents = await snapshot.take(first, Selection())
        await execute(database, "INSERT INTO t VALUES (2)")
        async with snapshot.shared(first, arguments, contents.tables) as second:
            assert [
                await one.fetchval("SELECT count(*) FROM public.t") for one in (first, second)
            ] == [1, 1]


@pytest.mark.parametrize("name", ["nonsense", "command_timeout"])
async def test_an_option_that_the_driver_does_not_accept_is_named(
    database: str, use_database: Callable[[str], None], tmp_path: Path, name: str
) -> None:
    use_database(
        make_url(database).update_query_dict({name: "x"}).render_as_string(hide_password=False)
    )
    with pytest.raises(
        BackupError, match=rf"DATABASE_URL has an option that the driver does not accept: .*{name}"
    ):
        await create_backup(tmp_path / "backups")


async def test_a_database_without_a_table_is_an_error(database: str, tmp_path: Path) -> None:
    with pytest.raises(
        BackupError, match=r"there is no table in the database postgresql\+asyncpg://.*DATABASE_URL"
    ):
        await create_backup(tmp_path / "backups")


@pytest.mark.parametrize(
    ("migration", "expected"),
    [
        ("TRUNCATE t; INSERT INTO t VALUES (2)", {"public.t": b"2\n"}),
        (
            "LOCK t; CREATE TABLE made AS SELECT 3 AS id",
            {"public.t": b"1\n", "public.made": b"3\n"},
        ),
        ("ALTER TABLE t ADD more int DEFAULT 4", {"public.t": b"1\t4\n"}),
        ("CREATE TABLE made AS TABLE t; DROP TABLE t", {"public.made": b"1\n"}),
    ],
)
async def test_a_migration_that_is_under_way_is_in_the_backup_whole(
    database: str, tmp_path: Path, migration: str, expected: dict[str, bytes]
) -> None:
    await execute(database, "CREATE TABLE t AS SELECT 1 AS id")
    async with connected(database) as connection, connection.transaction():
        await connection.execute(migration)
        backup = asyncio.create_task(create_backup(tmp_path / "backups"))
        await until(lambda: waits_for_a_lock(database))
    assert copies(await backup) == expected


async def test_a_cancel_ends_a_backup_that_waits_for_the_server(
    database: str, tmp_path: Path
) -> None:
    await execute(database, "CREATE TABLE t (id int)")
    async with connected(database) as connection, connection.transaction():
        await connection.execute("LOCK t")
        backup = asyncio.create_task(create_backup(tmp_path / "backups"))
        await until(lambda: waits_for_a_lock(database))
        backup.cancel()
        with pytest.raises(asyncio.CancelledError):
            async with asyncio.timeout(20):
                await backup
        assert list((tmp_path / "backups").iterdir()) == []


async def test_a_connection_lost_midway_leaves_nothing_and_names_the_database(
    database: str, tmp_path: Path
) -> None:
    await execute(database, "CREATE TABLE t (id int)")
    async with connected(database) as connection, connection.transaction():
        await connection.execute("LOCK t")
        backup = asyncio.create_task(create_backup(tmp_path / "backups"))
        await until(lambda: waits_for_a_lock(database))
        await connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name = 'batch/backup' AND datname = current_database()"
        )
        with pytest.raises(BackupError, match=r"could not be backed up: .*terminating connection"):
            await backup
    assert list((tmp_path / "backups").iterdir()) == []


async def test_a_server_that_cannot_be_reached_is_an_error_without_the_password(
    use_database: Callable[[str], None], tmp_path: Path
) -> None:
    use_database(f"postgresql+asyncpg://me:secret@/app?host={tmp_path}&password=secret")
    with pytest.raises(
        BackupError, match=r"could not be backed up: .*Look at DATABASE_URL and the server"
    ) as caught:
        await create_backup(tmp_path / "backups")
    assert "secret" not in caught.value.message
    assert list((tmp_path / "backups").iterdir()) == []


async def test_a_wrong_name_of_the_database_is_named_in_the_error(
    database: str, use_database: Callable[[str], None], tmp_path: Path
) -> None:
    use_database(make_url(database).set(database="nowhere").render_as_string(hide_password=False))
    with pytest.raises(BackupError, match='database "nowhere" does not exist'):
        await create_backup(tmp_path / "backups")


async def test_no_connection_stays_open(database: str, tmp_path: Path) -> None:
    await execute(database, "CREATE TABLE t (id int)")
    await create_backup(tmp_path / "backups")
    async with connected(database) as connection:

        async def none_is_left() -> bool:
            return not await connection.fetchval(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
                "AND pid <> pg_backend_pid()"
            )

        await until(none_is_left)


async def test_the_tables_of_an_extension_are_left_out_and_named(
    database: str, tmp_path: Path
) -> None:
    """CREATE EXTENSION makes them, and they may belong to a superuser."""
    await execute(
        database,
        "CREATE TABLE t AS SELECT 1 AS id",
        "CREATE TABLE its_own (id int)",
        "ALTER EXTENSION plpgsql ADD TABLE its_own",
    )
    said = manifest(await create_backup(tmp_path / "backups"))
    assert [table["name"] for table in said["tables"]] == ["t"]
    assert said["left_out"] == ["public.its_own"]
