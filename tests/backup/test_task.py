from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from service import clock
from service.config import forget_settings
from service.errors import BackupError
from tasks.backup import BackupTask
from tests.backup.contents import make_sqlite

ROOT = Path(__file__).parents[2]
OLD = "backup_20200101_000000.backup.gz"
YOUNG = "backup_20260328_120000.backup.gz"
NOW = datetime(2026, 3, 29, 12, 0, 0, tzinfo=UTC)


@pytest.fixture
def folder(app_db: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "backups"
    folder.mkdir()
    for name in (OLD, YOUNG, "backup_of_the_cat.backup.gz"):
        (folder / name).write_bytes(b"")
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


async def test_old_backups_are_deleted_after_a_new_one_is_complete(
    app_db: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_sqlite(app_db)
    with clock.moved(NOW), caplog.at_level("INFO"):
        await BackupTask().run()
    assert names(folder) == {"backup_20260329_120000.backup.gz", YOUNG, "backup_of_the_cat.backup.gz"}
    created = caplog.text.index("Backup created: backups/backup_20260329_120000.backup.gz")
    assert created < caplog.text.index(f"Deleted old backup: backups/{OLD}")


async def test_nothing_is_deleted_when_no_backup_could_be_made(app_db: Path, folder: Path) -> None:
    before = names(folder)
    with clock.moved(NOW), pytest.raises(BackupError, match="no database at"):
        await BackupTask().run()
    assert names(folder) == before


async def test_the_settings_say_where_to_and_for_how_long(
    app_db: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_sqlite(app_db)
    monkeypatch.setenv("BACKUP_DIR", "elsewhere")
    monkeypatch.setenv("BACKUP_RETENTION_DAYS", "30")
    forget_settings()
    kept = tmp_path / "elsewhere" / "backup_20260228_120000.backup.gz"
    kept.parent.mkdir()
    kept.touch()
    with clock.moved(NOW):
        await BackupTask().run()
    assert names(kept.parent) == {kept.name, "backup_20260329_120000.backup.gz"}
    assert OLD in names(folder)


def test_the_schedule_is_the_settings(app_db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKUP_CRON", "30 4 * * 0")
    forget_settings()
    assert BackupTask().schedule == "30 4 * * 0"


def test_it_runs_by_hand_in_a_plain_interpreter(app_db: Path, tmp_path: Path) -> None:
    make_sqlite(app_db)
    code = "import asyncio; from tasks.backup import BackupTask; asyncio.run(BackupTask().run())"
    subprocess.run([sys.executable, "-W", "error", "-c", code], env={"PYTHONPATH": str(ROOT)}, check=True)
    assert len(list((tmp_path / "backups").glob("backup_*.backup.gz"))) == 1
