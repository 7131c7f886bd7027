"""The records of backups in the ledger, on both databases."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.backup.places.place import FOLDER
from batch_system.batch.ledger import backups
from batch_system.batch.ledger.backups import CHECKSUMS, RESTORED, Facts, Row
from batch_system.batch.ledger.migration import LEDGER_HISTORY
from batch_system.batch.ledger.tables import new_id
from batch_system.config import forget_settings, get_settings
from batch_system.database.engine import Database
from batch_system.errors import DatabaseError
from tests.asking import access
from tests.databases import migrated
from tests.migrations import add_migration

AT = datetime(2026, 3, 29, 12, 0, 0, tzinfo=UTC)
LATER = AT + timedelta(hours=1)
NAME = "backup_20260329_120000.backup.gz"
FAR = "s3://b/p"


def facts(name: str = NAME, **more: object) -> Facts:
    given: dict[str, object] = {
        "kind": "sqlite",
        "database": "app.db",
        "revision": "app_0004",
        "size": 5_000_000_000,
    }
    return Facts(name, AT, **{**given, "rows": 3_000_000_000, "tables": 4, **more})  # type: ignore[arg-type]


async def row_of(connection: AsyncConnection, name: str = NAME, place: str = FOLDER) -> Row:
    row = await backups.get(connection, name, place)
    assert row is not None
    return row


async def test_recording_a_backup_again_updates_the_facts_of_its_file_and_keeps_its_checks(
    ledger: Database,
) -> None:
    run = new_id()
    async with ledger.engine.begin() as connection:
        await backups.record(connection, facts(taken_by_run=run), FOLDER, AT)
        assert await backups.mark_verified(connection, NAME, FOLDER, CHECKSUMS, AT)
        await backups.record(connection, facts(rows=None, revision="app_0005"), FOLDER, LATER)
        row = await row_of(connection)
    assert (row["revision"], row["rows"], row["taken_by_run"]) == ("app_0005", 3_000_000_000, run)
    assert (row["verified_at"], row["verified_how"], row["created_at"]) == (AT, CHECKSUMS, AT)


async def test_a_file_of_another_size_is_another_file_and_was_never_checked(
    ledger: Database,
) -> None:
    async with ledger.engine.begin() as connection:
        await backups.record(connection, facts(), FOLDER, AT)
        await backups.mark_verified(connection, NAME, FOLDER, RESTORED, AT)
        await backups.mark_restored(connection, NAME, FOLDER, AT)
        await backups.record(connection, facts(size=6), FOLDER, LATER)
        row = await row_of(connection)
    assert backups.state(row) == "not verified" and (row["verified_at"], row["restored_at"]) == (
        None,
        None,
    )


async def test_the_record_of_a_backup_in_one_place_does_not_apply_to_its_copy(
    ledger: Database,
) -> None:
    async with ledger.engine.begin() as connection:
        for place in (FOLDER, FAR):
            await backups.record(connection, facts(), place, AT)
        await backups.mark_failed(connection, NAME, FOLDER, "a byte", AT)
        await backups.mark_verified(connection, NAME, FAR, RESTORED, AT)
        rows = await backups.all_rows(connection)
        assert [(row["place"], backups.state(row)) for row in rows] == [
            (FOLDER, "failed"),
            (FAR, "restored"),
        ]
        await backups.remove(connection, NAME, FOLDER)
        assert [row["place"] for row in await backups.all_rows(connection)] == [FAR]


async def test_the_hash_of_the_manifest_at_its_making_is_known_for_every_copy(
    ledger: Database,
) -> None:
    async with ledger.engine.begin() as connection:
        await backups.record(connection, facts(manifest="made"), FOLDER, AT, is_new=True)
        await backups.record(connection, facts(manifest="read later"), FOLDER, AT)
        await backups.record(connection, facts(manifest="of the copy"), FAR, AT)
        await backups.record(connection, facts("found", manifest="found"), FAR, AT)
        await backups.remove(connection, NAME, FOLDER)
        assert await backups.manifests(connection, NAME) == ["made"]
        assert await backups.manifests(connection, "found") == []


async def test_a_restored_one_stays_restored_until_a_check_fails(ledger: Database) -> None:
    async with ledger.engine.begin() as connection:
        await backups.record(connection, facts(), FOLDER, AT)
        states = [backups.state(await row_of(connection))]
        for how in (CHECKSUMS, RESTORED, CHECKSUMS):
            await backups.mark_verified(connection, NAME, FOLDER, how, AT)
            states.append(backups.state(await row_of(connection)))
        await backups.mark_failed(connection, NAME, FOLDER, "a byte", LATER)
        row = await row_of(connection)
        assert (row["failed_check"], row["failed_at"], row["verified_at"]) == (
            "a byte",
            LATER,
            None,
        )
        states.append(backups.state(row))
        await backups.mark_verified(connection, NAME, FOLDER, CHECKSUMS, LATER)
        states.append(backups.state(await row_of(connection)))
    assert states == ["not verified", CHECKSUMS, RESTORED, RESTORED, "failed", CHECKSUMS]


async def test_many_may_record_one_backup_at_once(ledger: Database) -> None:
    async def record(size: int) -> None:
        async with ledger.engine.begin() as connection:
            await backups.record(connection, facts(size=size), FOLDER, AT)

    await asyncio.gather(*(record(size) for size in range(5)))
    async with ledger.engine.connect() as connection:
        assert len(await backups.all_rows(connection)) == 1


async def test_a_rescan_drops_missing_backups_of_its_place_but_none_recorded_after_it_began(
    ledger: Database,
) -> None:
    async with ledger.engine.begin() as connection:
        for name, at in (("kept", AT), ("lost", AT), ("new", LATER)):
            await backups.record(connection, facts(name), FOLDER, at)
        await backups.record(connection, facts("lost"), FAR, AT)
        assert await backups.remove_others(connection, FOLDER, ["kept"], LATER) == 1
        found = {(row["name"], row["place"]) for row in await backups.all_rows(connection)}
        assert found == {("kept", FOLDER), ("new", FOLDER), ("lost", FAR)}


@pytest.fixture
async def old_ledger(database_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A ledger that lacks the newest migration that this code knows."""
    await migrated(database_url, LEDGER_HISTORY)
    add_migration(monkeypatch, tmp_path, LEDGER_HISTORY)
    database = Database(database_url, setting="LEDGER_URL", pooled=False)
    async with database.engine.begin() as connection:
        await connection.execute(text("ALTER TABLE batch_backups DROP COLUMN kind"))
    monkeypatch.setenv("LEDGER_URL", database_url)
    forget_settings()
    return database_url


async def test_reading_does_not_migrate_an_older_ledger_and_reports_that_it_is_older(
    old_ledger: str,
) -> None:
    with pytest.raises(
        DatabaseError,
        match="the ledger is at an older migration than this code; `batch serve` migr",
    ):
        await access(get_settings()).records()
    database = Database(old_ledger, setting="LEDGER_URL", pooled=False)
    async with database.reader.connect() as connection:
        version = await connection.execute(text("SELECT version_num FROM batch_alembic_version"))
        assert version.scalar_one() == LEDGER_HISTORY.revisions[-2]
    await database.dispose()


async def test_an_optional_record_does_not_migrate_an_older_ledger(
    old_ledger: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A restore records the backup that it makes first, and may then restore the ledger at an older
    migration.
    """

    async def write(connection: AsyncConnection) -> None:
        await backups.record(connection, facts(), FOLDER, AT)

    await access(get_settings()).record_if_possible(NAME, write)
    assert (
        f"What was done with {NAME} could not be recorded in the ledger: the ledger is at an "
        "older migration" in caplog.text
    )
    with pytest.raises(DatabaseError):
        await access(get_settings()).records()


async def test_without_a_ledger_nothing_is_created_or_recorded(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEDGER_URL", database_url)
    forget_settings()
    assert (
        await access(get_settings()).in_ledger(
            lambda connection: backups.record(connection, facts(), FOLDER, AT)
        )
        is None
    )
    assert await access(get_settings()).records() == {} and list(tmp_path.glob("*.db")) == []
