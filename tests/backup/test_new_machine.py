"""The machine is gone: its backups are restored on a new one, which then makes backups by its own
schedule.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import bindparam, text

from batch_system import clock
from batch_system.backup.file.verify import verify
from batch_system.backup.places.pins import Pin, read
from batch_system.backup.places.place import Places, backups
from batch_system.batch.ledger.migration import LEDGER_HISTORY
from batch_system.concurrency.stoppable import Stop
from batch_system.config import get_settings
from batch_system.database.engine import Database
from batch_system.database.types import UtcDateTime
from batch_system.errors import DamagedBackup
from batch_system.operations.backups.make import check
from batch_system.operations.backups.pins import pin
from batch_system.operations.backups.restore import RestoreRequest, restore
from batch_system.testing.postgres import PostgresServer
from tasks.backup import BackupTask
from tests.asking import access
from tests.backup.s3 import Bucket, bucket, s3_server
from tests.databases import migrated, url_of
from tests.migrations import APPLICATION_HISTORIES

__all__ = ["bucket", "s3_server"]

DAY, YEAR = timedelta(days=1), timedelta(days=365)
FIRST = datetime(2025, 3, 1, 2, 0, tzinfo=UTC)
"""The first night on the new machine. A night is at two."""
LOST = (-12, -11, -10)
"""The last nights of the old one."""


def named(night: int, off: timedelta = timedelta()) -> str:
    return f"backup_{FIRST + night * DAY + off:%Y%m%d_%H%M%S}.backup.gz"


async def backed_up(night: int, off: timedelta = timedelta()) -> None:
    """Run the backup task while the clock is wrong by this much."""
    with clock.moved(FIRST + night * DAY + off):
        await BackupTask().run()


async def people(url: str) -> list[str]:
    database = Database(url, setting="DATABASE_URL", pooled=False)
    async with database.reader.connect() as connection:
        found = (await connection.execute(text("SELECT email FROM users"))).scalars().all()
    await database.dispose()
    return list(found)


async def in_places() -> list[set[str]]:
    """The names in BACKUP_DIR, and those at BACKUP_URL."""
    return [set(backups(storage.listed())) for storage in Places.of(get_settings()).all()]


@pytest.fixture
async def new_database(
    database_url: str, tmp_path: Path, request: pytest.FixtureRequest
) -> AsyncIterator[str]:
    """The URL of an empty database of the same kind, on the new machine."""
    if database_url.startswith("sqlite"):
        (tmp_path / "new").mkdir()
        yield url_of(tmp_path / "new" / "app.db")
        return
    server: PostgresServer = request.getfixturevalue("postgres_server")
    url = await server.create_database()
    yield url
    await server.drop_database(url)


@pytest.fixture
async def lost_machine(database_url: str, bucket: Bucket, settings: Callable[..., None]) -> str:
    """Has made three backups, pinned the first, and is gone for ten days; only the bucket is left.
    Returns what was
    pinned.
    """
    settings(DATABASE_URL=database_url, BACKUP_DIR="lost")
    for histories, url in (
        (APPLICATION_HISTORIES, database_url),
        ((LEDGER_HISTORY,), get_settings().ledger_url),
    ):
        await migrated(url, *histories)
    database = Database(database_url, setting="DATABASE_URL", pooled=False)
    async with database.engine.begin() as connection:
        insert = text("INSERT INTO users (email, created_at) VALUES ('ann@x', :at)")
        await connection.execute(insert.bindparams(bindparam("at", FIRST, UtcDateTime())))
    await database.dispose()
    for night in LOST:
        await backed_up(night)
        if night == LOST[0]:
            with clock.moved(FIRST + LOST[0] * DAY):
                await pin(access(get_settings()), named(night), "ann")
    return named(LOST[0])


async def test_after_a_restore_on_a_new_machine_no_backup_is_lost(
    lost_machine: str,
    new_database: str,
    bucket: Bucket,
    settings: Callable[..., None],
    tmp_path: Path,
) -> None:
    pinned = lost_machine
    settings(DATABASE_URL=new_database, BACKUP_DIR=str(tmp_path / "new" / "backups"))
    with clock.moved(FIRST - DAY / 2):
        done = await restore(access(get_settings()), RestoreRequest("latest"))
    assert done.report.backup == f"{bucket.url}/{named(LOST[-1])}" and await people(
        new_database
    ) == ["ann@x"]
    for histories, url in (
        (APPLICATION_HISTORIES, new_database),
        ((LEDGER_HISTORY,), get_settings().ledger_url),
    ):
        await migrated(url, *histories)  # a service migrates when it starts

    await backed_up(0)
    assert await in_places() == [{named(0)}, {named(night) for night in (*LOST, 0)}]
    rows = await access(get_settings()).records()
    assert {name for (_, name), row in rows.items() if row["verified_at"]} == {named(0)}, (
        "the others were only read"
    )

    for night in range(1, 7):
        await backed_up(night)
    await backed_up(7, off=YEAR)
    assert (await in_places())[1] >= {pinned, *(named(night) for night in range(7))}
    await backed_up(8, off=-YEAR)
    here, there = await in_places()
    assert here >= {named(night) for night in range(7)} and there >= {pinned, *here}

    damaged = tmp_path / "new" / "backups" / named(6)
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(DamagedBackup):
        await check(access(get_settings()), str(damaged))
    for night in range(9, 14):
        await backed_up(night)

    here, there = await in_places()
    sound = {named(night) for night in (4, 5, 6, 9, 10, 11, 12, 13)}
    assert here == sound | {named(7, YEAR)} and there == here | {pinned}
    assert read(Places.of(get_settings()).all()[1], pinned) == Pin("ann", FIRST + LOST[0] * DAY)
    rows = await access(get_settings()).records()
    for storage, names in zip(Places.of(get_settings()).all(), (here, there), strict=True):
        for name in names:
            is_verified = rows[storage.place, name]["verified_at"] is not None
            was_checked = name != pinned and (storage.place, name) != ("folder", named(6))
            assert is_verified == was_checked, (storage.place, name)
            if is_verified:
                with storage.open(name) as source:
                    verify(source, Stop())
    assert rows["folder", named(6)]["failed_at"] is not None
