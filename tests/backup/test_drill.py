"""The task that restores the latest backup into tables or a file that nobody else sees."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from batch_system import clock
from batch_system.backup import create_backup
from batch_system.batch.ledger import backups
from batch_system.batch.ledger.migration import LEDGER_HISTORY
from batch_system.config import forget_settings, get_settings
from batch_system.errors import BackupError, DamagedBackup
from batch_system.testing.postgres import PostgresServer
from tasks.restore_drill import RestoreDrillTask
from tests.asking import access
from tests.backup.contents import execute
from tests.backup.here import make_backups_here
from tests.backup.restores import damage
from tests.databases import migrated
from tests.migrations import APPLICATION_HISTORIES


@pytest.fixture
async def url(
    database_url: str,
    use_database: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> str:
    """The URL of the application's database, with a ledger and a backup."""
    make_backups_here(monkeypatch)
    use_database(database_url)
    settings = get_settings()
    for place, histories in (
        (settings.DATABASE_URL, APPLICATION_HISTORIES),
        (settings.ledger_url, (LEDGER_HISTORY,)),
    ):
        await migrated(place, *histories)
    await create_backup(settings.BACKUP_DIR)
    return database_url


async def test_the_latest_backup_is_restored_and_that_is_recorded(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        told = await RestoreDrillTask().run()
    (row,) = (await access(get_settings()).records()).values()
    assert backups.state(row) == "restored" and row["restored_at"] is None, (
        "nothing of the application's was restored"
    )
    assert row["verified_at"] <= clock.now()
    # What says at which migration a database is, is never restored.
    versions = 0 if url.startswith("sqlite") else 2
    assert told["backup"] == f"backups/{row['name']}" and told["tables"] == row["tables"] - versions
    assert "a temporary file" in caplog.text or "a scratch schema in postgresql" in caplog.text


async def test_a_damaged_backup_fails_the_run_and_is_recorded_as_failed(url: str) -> None:
    (path,) = Path("backups").iterdir()
    damage(path, lambda name: name != "header.json")
    with pytest.raises(DamagedBackup, match="is damaged"):
        await RestoreDrillTask().run()
    (row,) = (await access(get_settings()).records()).values()
    assert (row["name"], backups.state(row), row["verified_how"]) == (path.name, "failed", None)
    assert "is damaged" in row["failed_check"]


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
async def test_a_drill_without_a_database_to_restore_into_records_nothing_about_the_backup(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESTORE_DRILL_URL", "postgresql://nobody@127.0.0.1:1/none")
    forget_settings()
    with pytest.raises(BackupError):
        await RestoreDrillTask().run()
    assert await access(get_settings()).records() == {}


async def test_a_drill_runs_in_the_database_of_its_own_setting(
    postgres_database: str,
    postgres_server: PostgresServer,
    use_database: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    drill = await postgres_server.create_database()
    try:
        make_backups_here(monkeypatch)
        monkeypatch.setenv("RESTORE_DRILL_URL", drill)
        use_database(postgres_database)
        await migrated(postgres_database, *APPLICATION_HISTORIES)
        await execute(
            postgres_database,
            "INSERT INTO users (email, created_at) VALUES ('a@example.org', now())",
        )
        await create_backup(get_settings().BACKUP_DIR)
        with caplog.at_level("INFO"):
            assert (await RestoreDrillTask().run())["rows"] == 2  # and the window of our tables
        assert drill.rpartition("/")[2].partition("?")[0] in caplog.text
    finally:
        await postgres_server.drop_database(drill)


@pytest.mark.parametrize(("cron", "schedule"), [("0 4 * * 0", "0 4 * * 0"), ("", None)])
def test_a_drill_without_a_cron_expression_is_only_started_by_hand(
    monkeypatch: pytest.MonkeyPatch, cron: str, schedule: str | None
) -> None:
    monkeypatch.setenv("RESTORE_DRILL_CRON", cron)
    forget_settings()
    assert RestoreDrillTask().schedule == schedule
