"""Backups and restores by another role than the application's: BACKUP_DATABASE_URL."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from sqlalchemy import make_url

from batch_system.backup import create_backup
from batch_system.backup.comparing.compare import diff
from batch_system.config import get_settings
from batch_system.errors import BackupError
from batch_system.operations.backups.restore import RestoreRequest, check_by_restoring, restore
from batch_system.testing.postgres import PostgresServer
from tests.asking import access
from tests.backup.contents import connected, execute
from tests.databases import migrated
from tests.migrations import APPLICATION_HISTORIES

APPLICATION, BACKUPS = "batch_application", "batch_backups_role"
OWNERS = "SELECT DISTINCT tableowner FROM pg_tables WHERE schemaname = 'public'"


def as_role(url: str, name: str) -> str:
    return (
        make_url(url).set(username=name, password="hunter2").render_as_string(hide_password=False)
    )


@pytest.fixture
async def empty(postgres_server: PostgresServer) -> AsyncIterator[str]:
    url = await postgres_server.create_database()
    yield url
    await postgres_server.drop_database(url)


@pytest.fixture
async def application(
    postgres_database: str,
    empty: str,
    settings: Callable[..., None],
    postgres_server: PostgresServer,
) -> AsyncIterator[str]:
    """The URL of an ordinary role, which owns the tables of two databases, but is not shown all
    rows of one table.
    """
    await execute(
        postgres_database,
        f"CREATE ROLE {APPLICATION} LOGIN",
        f"CREATE ROLE {BACKUPS} LOGIN BYPASSRLS IN ROLE {APPLICATION}, pg_read_all_data",
    )
    for url in (postgres_database, empty):
        await execute(url, f'ALTER DATABASE "{make_url(url).database}" OWNER TO {APPLICATION}')
    url = as_role(postgres_database, APPLICATION)
    await migrated(url, *APPLICATION_HISTORIES)
    await execute(
        url,
        "INSERT INTO users (email, created_at) "
        "VALUES ('a@example.org', now()), ('b@example.org', now())",
        "ALTER TABLE users ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY",
        "CREATE POLICY few ON users USING (id < 2) WITH CHECK (true)",
    )
    settings(DATABASE_URL=url, BACKUP_DATABASE_URL=as_role(postgres_database, BACKUPS))
    yield url
    for name in (postgres_database, empty):
        await postgres_server.drop_database(name)
    await postgres_server._execute(f"DROP ROLE {BACKUPS}")
    await postgres_server._execute(f"DROP ROLE {APPLICATION}")


async def test_the_backup_role_backs_up_compares_and_restores_rows_hidden_from_the_application(
    application: str, postgres_database: str, settings: Callable[..., None], tmp_path: Path
) -> None:
    other = get_settings().BACKUP_DATABASE_URL
    settings(BACKUP_DATABASE_URL="")
    with pytest.raises(
        BackupError, match=r"row-level security.* BYPASSRLS \(BACKUP_DATABASE_URL\)"
    ):
        await create_backup(tmp_path / "backups")
    settings(BACKUP_DATABASE_URL=str(other))
    path = str(await create_backup(tmp_path / "backups"))
    assert (await check_by_restoring(access(get_settings()), path)).rows == 3
    await execute(postgres_database, "DELETE FROM users WHERE id = 2")
    (users,) = [one for one in (await diff(get_settings(), path)).tables if one.table == "users"]
    assert users.removed == 1
    assert (
        await restore(access(get_settings()), RestoreRequest(path, safety=False))
    ).report.rows == 3
    async with connected(postgres_database) as connection:
        assert await connection.fetchval("SELECT count(*) FROM users") == 2
        assert [row["tableowner"] for row in await connection.fetch(OWNERS)] == [APPLICATION]


async def test_a_restore_into_an_empty_database_makes_the_application_role_the_owner_of_the_tables(
    application: str, empty: str, settings: Callable[..., None], tmp_path: Path
) -> None:
    path = str(await create_backup(tmp_path / "backups"))
    settings(DATABASE_URL=as_role(empty, APPLICATION), BACKUP_DATABASE_URL=as_role(empty, BACKUPS))
    assert (await restore(access(get_settings()), RestoreRequest(path))).report.rows == 3
    async with connected(empty) as connection:
        assert [row["tableowner"] for row in await connection.fetch(OWNERS)] == [APPLICATION]


async def test_an_error_names_the_setting_and_not_the_password(
    application: str, settings: Callable[..., None], tmp_path: Path
) -> None:
    path = str(await create_backup(tmp_path / "backups"))
    wrong = make_url(application).set(username="nobody_at_all", password="hunter2")
    settings(BACKUP_DATABASE_URL=wrong.render_as_string(hide_password=False))
    with pytest.raises(BackupError, match="Look at BACKUP_DATABASE_URL and the server") as caught:
        await create_backup(tmp_path / "backups")
    with pytest.raises(BackupError, match="nobody_at_all") as again:
        await restore(access(get_settings()), RestoreRequest(path))
    assert "hunter2" not in caught.value.message + again.value.message
