"""What the ledger knows of backups, on both databases."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch import records
from service.batch.records import CHECKSUMS, RESTORED, Facts, Row
from service.batch.tables import new_id
from service.config import forget_settings, get_settings
from service.database.engine import Database
from service.keeping import known, recorded

AT = datetime(2026, 3, 29, 12, 0, 0, tzinfo=UTC)
LATER = AT + timedelta(hours=1)
NAME = "backup_20260329_120000.backup.gz"


def facts(name: str = NAME, **more: object) -> Facts:
    given: dict[str, object] = {"kind": "sqlite", "database": "app.db", "revision": "app_0004", "size": 5_000_000_000}
    return Facts(name, AT, **{**given, "rows": 3_000_000_000, "tables": 4, **more})  # type: ignore[arg-type]


async def row_of(connection: AsyncConnection, name: str = NAME) -> Row:
    row = await records.get(connection, name)
    assert row is not None
    return row


async def test_the_file_s_facts_are_written_anew_and_what_was_done_stays(ledger: Database) -> None:
    run = new_id()
    async with ledger.engine.begin() as connection:
        await records.record(connection, facts(taken_by_run=run), AT)
        assert await records.verified(connection, NAME, CHECKSUMS, AT)
        assert await records.pin(connection, NAME, "bob", AT)
        await records.record(connection, facts(size=6, rows=None), LATER, local=False, url="s3://b/p")
        row = await row_of(connection)
    assert (row["size"], row["rows"], row["taken_by_run"], row["created_at"]) == (6, 3_000_000_000, run, AT)
    assert (row["verified_at"], row["verified_how"], row["pinned_by"]) == (AT, CHECKSUMS, "bob")
    assert (row["local"], row["url"], row["uploaded_at"]) == (True, "s3://b/p", LATER)


async def test_a_restored_one_stays_restored_until_a_check_fails(ledger: Database) -> None:
    async with ledger.engine.begin() as connection:
        await records.record(connection, facts(), AT)
        states = [records.state(await row_of(connection))]
        for how in (CHECKSUMS, RESTORED, CHECKSUMS):
            await records.verified(connection, NAME, how, AT)
            states.append(records.state(await row_of(connection)))
        await records.failed(connection, NAME, "a byte", LATER)
        row = await row_of(connection)
        assert (row["failed_check"], row["failed_at"], row["verified_at"]) == ("a byte", LATER, None)
        states.append(records.state(row))
        await records.verified(connection, NAME, CHECKSUMS, LATER)
        states.append(records.state(await row_of(connection)))
    assert states == ["not verified", CHECKSUMS, RESTORED, RESTORED, "failed", CHECKSUMS]


async def test_of_two_who_pin_at_once_one_is_the_first(ledger: Database) -> None:
    async with ledger.engine.begin() as connection:
        await records.record(connection, facts(), AT)

    async def pin(by: str) -> bool:
        async with ledger.engine.begin() as connection:
            return await records.pin(connection, NAME, by, AT)

    assert sorted(await asyncio.gather(pin("ann"), pin("bob"))) == [False, True]
    async with ledger.engine.begin() as connection:
        assert await records.unpin(connection, NAME) and not await records.unpin(connection, NAME)
        assert (await row_of(connection))["pinned_by"] is None


async def test_many_may_record_one_backup_at_once(ledger: Database) -> None:
    async def record(size: int) -> None:
        async with ledger.engine.begin() as connection:
            await records.record(connection, facts(size=size), AT)

    await asyncio.gather(*(record(size) for size in range(5)))
    async with ledger.engine.connect() as connection:
        assert len(await records.listed(connection)) == 1


async def test_a_row_goes_when_its_file_is_in_no_place_any_more(ledger: Database) -> None:
    async with ledger.engine.begin() as connection:
        await records.record(connection, facts(), AT)
        await records.uploaded(connection, NAME, "s3://b/p", AT)
        await records.gone(connection, NAME, local=True)
        row = await row_of(connection)
        assert (row["local"], row["url"]) == (False, "s3://b/p")
        await records.gone(connection, NAME, local=False)
        assert await records.get(connection, NAME) is None
        assert not await records.restored(connection, NAME, AT)


async def test_a_rescan_drops_the_others_but_none_that_is_newer_than_its_look(ledger: Database) -> None:
    async with ledger.engine.begin() as connection:
        for name, at in (("kept", AT), ("lost", AT), ("new", LATER)):
            await records.record(connection, facts(name), at)
        await records.record(connection, facts("pinned"), AT)
        await records.pin(connection, "pinned", "bob", AT)
        assert await records.keep_only(connection, ["kept"], LATER) == 1
        assert {row["name"] for row in await records.listed(connection)} == {"kept", "new", "pinned"}


async def test_a_ledger_that_is_one_version_behind_is_migrated_before_it_is_written(
    ledger_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = Database(ledger_url, setting="LEDGER_URL", pooled=False)
    async with database.engine.begin() as connection:
        await connection.execute(text("DROP TABLE batch_backups"))
        await connection.execute(text("UPDATE batch_alembic_version SET version_num = 'ledger_0005'"))
    await database.dispose()
    monkeypatch.setenv("LEDGER_URL", ledger_url)
    forget_settings()
    await recorded(get_settings(), lambda connection: records.record(connection, facts(), AT))
    assert list(await known(get_settings())) == [NAME]


async def test_where_no_ledger_is_yet_nothing_is_made_and_nothing_written(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEDGER_URL", database_url)
    forget_settings()
    assert await recorded(get_settings(), lambda connection: records.record(connection, facts(), AT)) is None
    assert await known(get_settings()) == {} and list(tmp_path.glob("*.db")) == []
