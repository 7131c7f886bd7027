from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from sqlalchemy import make_url

from service.backup import create_backup
from service.backup.count import Counted, Report
from service.backup.reader import Backup, LocalFile
from service.backup.scratch import restore_into_scratch
from service.errors import BackupError
from service.testing.postgres import PostgresServer
from tests.backup.contents import connected, execute, make_sqlite, until
from tests.backup.restores import CHANGES, ROWS, SCHEMA, TRIGGERS, damage, everything

SESSIONS = (
    "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'batch/restore' AND datname = current_database()"
)
SCHEMAS = "SELECT count(*) FROM pg_namespace WHERE nspname LIKE 'batch%'"


@pytest.fixture
def database(database: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("BACKUP_PROCESS", "0")
    return database


@pytest.fixture
async def backup(database: str, tmp_path: Path) -> Path:
    """Of a database with something of everything."""
    await execute(database, SCHEMA, ROWS, TRIGGERS)
    return await create_backup(tmp_path / "backups")


@pytest.fixture
async def drill(postgres_server: PostgresServer) -> AsyncIterator[str]:
    """Another database, which is empty."""
    url = await postgres_server.create_database()
    yield url
    await postgres_server.drop_database(url)


async def tried(path: Path, url: str, drill: str | None = None) -> Report:
    with LocalFile(path) as source:
        return await restore_into_scratch(source, url, drill_url=drill)


async def test_every_row_is_loaded_beside_the_application_and_nothing_stays(database: str, backup: Path) -> None:
    await execute(database, CHANGES)
    before = await everything(database)
    report = await tried(backup, database)
    assert {Counted("public.authors", None, 2), Counted("Größe.x.Zeilen", None, 2)} <= set(report.tables)
    assert report.rows == 11 and "a scratch schema in postgresql" in report.where
    assert "the foreign key" in " ".join(report.notes) and "Zeilen" in " ".join(report.notes), "to a partitioned table"
    assert await everything(database) == before
    async with connected(database) as connection:
        assert await connection.fetchval(SCHEMAS) == 0


async def test_in_a_database_of_its_own_the_types_that_it_lacks_are_text(
    database: str, backup: Path, drill: str
) -> None:
    assert (await tried(backup, database, drill)).rows == 11
    assert await everything(drill) == {**await everything(drill), "rows": {}, "sequences": {}}


async def test_a_table_that_has_changed_since_is_tried_as_it_was(database: str, backup: Path) -> None:
    await execute(database, "DROP TABLE nothing", "ALTER TABLE strays DROP author")
    report = await tried(backup, database)
    assert report.rows == 11
    assert "public.strays looks otherwise in the database now: only types and primary key were checked" in report.notes


@pytest.mark.parametrize("is_beside", [True, False])
async def test_rows_that_refer_to_nothing_are_found(database: str, drill: str, tmp_path: Path, is_beside: bool) -> None:
    """They were no violation when the backup was made: the key is younger."""
    await execute(database, "CREATE TABLE a (id int PRIMARY KEY)", "CREATE TABLE b (a int)", "INSERT INTO b VALUES (1)")
    path = await create_backup(tmp_path / "backups")
    await execute(database, "INSERT INTO a VALUES (1)", "ALTER TABLE b ADD FOREIGN KEY (a) REFERENCES a")
    with pytest.raises(
        BackupError, match=r"rows of public.b in the backup refer to rows of public.a that are not in it"
    ):
        await tried(path, database, None if is_beside else drill)


async def test_rows_that_the_present_table_refuses_are_found(database: str, tmp_path: Path) -> None:
    await execute(database, "CREATE TABLE t AS SELECT 1 AS id")
    path = await create_backup(tmp_path / "backups")
    await execute(database, "DELETE FROM t; ALTER TABLE t ADD CHECK (id > 1)")
    with pytest.raises(BackupError, match=r"the rows of public.t in the backup .* can't be loaded"):
        await tried(path, database)


async def test_damage_is_found(database: str, backup: Path) -> None:
    damage(backup, lambda name: name.startswith("data/"))
    with pytest.raises(BackupError, match="is damaged"):
        await tried(backup, database)


async def test_a_role_that_may_make_no_schema_is_told_what_to_do(database: str, backup: Path) -> None:
    await execute(database, "CREATE ROLE batch_poor LOGIN")
    try:
        poor = make_url(database).set(username="batch_poor").render_as_string(hide_password=False)
        with pytest.raises(
            BackupError, match=r"may not make a schema .* GRANT CREATE ON DATABASE .* RESTORE_DRILL_URL"
        ):
            await tried(backup, poor)
    finally:
        await execute(database, "DROP ROLE batch_poor")


async def test_the_applications_own_database_is_no_place_for_a_drill(database: str, backup: Path) -> None:
    with pytest.raises(BackupError, match="RESTORE_DRILL_URL is the application's own database"):
        await tried(backup, database, database)


async def test_a_cancel_in_the_middle_ends_the_servers_work_too(database: str, backup: Path) -> None:
    begun, loop, goes_on = asyncio.Event(), asyncio.get_running_loop(), threading.Event()

    class Slow(LocalFile):
        def read(self, offset: int, length: int) -> bytes:
            if offset == first.offset:
                loop.call_soon_threadsafe(begun.set)
                goes_on.wait()
            return super().read(offset, length)

    async def works() -> bool:
        async with connected(database) as connection:
            return bool(await connection.fetchval(SESSIONS))

    async def has_ended() -> bool:
        return not await works()

    with LocalFile(backup) as source:
        first = next(member for member in Backup.open(source).members if member.rows)
    with Slow(backup) as source:
        trying = asyncio.create_task(restore_into_scratch(source, database))
        await begun.wait()
        assert await works()
        trying.cancel()
        goes_on.set()
        with pytest.raises(asyncio.CancelledError):
            await trying
    await until(has_ended)
    async with connected(database) as connection:
        assert await connection.fetchval(SCHEMAS) == 0


async def test_sqlite_is_tried_in_a_file_that_goes_again(
    app_db: Path, tmp_path: Path, use_database: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BACKUP_PROCESS", "0")
    url = f"sqlite+aiosqlite:///{app_db}"
    use_database(url)
    make_sqlite(app_db)
    backup = await create_backup(tmp_path / "backups")
    before = {path.name for path in tmp_path.iterdir()}
    report = await tried(backup, url)
    assert report.tables == (Counted("filler", None, 0), Counted("users", None, 1))
    assert {path.name for path in tmp_path.iterdir()} == before
    damage(backup, lambda name: name == "database.sqlite3")
    with pytest.raises(BackupError, match="is damaged"):
        await tried(backup, url)
    assert {path.name for path in tmp_path.iterdir()} == before


async def test_rows_of_an_older_migration_are_not_held_against_the_present_tables(
    database: str, drill: str, tmp_path: Path
) -> None:
    await execute(
        database,
        "CREATE TABLE alembic_version AS SELECT 'old'::text AS version_num",
        "CREATE TABLE t AS SELECT 1 AS id",
    )
    path = await create_backup(tmp_path / "backups")
    await execute(
        database,
        "UPDATE alembic_version SET version_num = 'new'",
        "DELETE FROM t; ALTER TABLE t ADD CHECK (id > 1), ADD more int NOT NULL",
        "CREATE TABLE a (id int PRIMARY KEY); ALTER TABLE t ADD FOREIGN KEY (id) REFERENCES a",
    )
    for place in (None, drill):
        report = await tried(path, database, place)
        assert report.rows == 2 and "is at another migration" in " ".join(report.notes)


async def test_a_new_column_that_needs_a_value_is_no_damage(database: str, tmp_path: Path) -> None:
    await execute(database, "CREATE TABLE t AS SELECT 1 AS id")
    path = await create_backup(tmp_path / "backups")
    await execute(database, "DELETE FROM t; ALTER TABLE t ADD more int NOT NULL")
    assert "public.t looks otherwise" in " ".join((await tried(path, database)).notes)


async def test_postgresql_is_tried_in_the_drills_database_where_the_application_is_on_sqlite_by_now(
    backup: Path, drill: str, tmp_path: Path
) -> None:
    assert (await tried(backup, f"sqlite+aiosqlite:///{tmp_path}/app.db", drill)).rows == 11


async def test_a_key_over_periods_is_not_checked_and_that_is_said(database: str, tmp_path: Path) -> None:
    await execute(
        database,
        "CREATE EXTENSION btree_gist",
        "CREATE TABLE a (id int, days daterange, PRIMARY KEY (id, days WITHOUT OVERLAPS))",
        "CREATE TABLE b (id int, days daterange, FOREIGN KEY (id, PERIOD days) REFERENCES a (id, PERIOD days))",
        "INSERT INTO a VALUES (1, '[2026-01-01,2027-01-01)'); INSERT INTO b VALUES (1, '[2026-02-01,2026-03-01)')",
    )
    report = await tried(await create_backup(tmp_path / "backups"), database)
    assert report.notes == ("the foreign key b_id_days_fkey of public.b was not checked",)
