from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

import pytest

from service import clock
from service.backup.retention import delete_expired, expired
from service.errors import BackupError

NOW = datetime(2026, 3, 29, 12, 0, 0, tzinfo=UTC)


def backups(folder: Path, *stamps: str) -> list[Path]:
    paths = [folder / f"backup_{stamp}.backup.gz" for stamp in stamps]
    for path in paths:
        path.touch()
    return paths


def test_the_time_in_the_name_counts_and_not_the_files(tmp_path: Path) -> None:
    old, edge, new = backups(tmp_path, "20260322_115959", "20260322_120000", "20260329_110000")
    os.utime(old, (NOW.timestamp(), NOW.timestamp()))
    os.utime(edge, (0, 0))
    os.utime(new, (0, 0))
    assert expired(tmp_path, 7, NOW) == [old]


def test_files_with_other_names_are_left_alone(tmp_path: Path) -> None:
    backups(tmp_path, "20260329_110000", "before_migration", "20201399_000000")
    (tmp_path / "backup_20200101_000000.backup.gz.keep").touch()
    (tmp_path / "notes.txt").touch()
    assert expired(tmp_path, 7, NOW) == []


def test_the_newest_backup_never_expires(tmp_path: Path) -> None:
    first, second, _ = backups(tmp_path, "20200101_000000", "20200102_000000", "20200103_000000")
    assert expired(tmp_path, 7, NOW) == [first, second]


def test_a_folder_that_is_missing_holds_nothing(tmp_path: Path) -> None:
    assert expired(tmp_path / "missing", 7, NOW) == []


async def test_each_backup_that_is_deleted_is_told(tmp_path: Path) -> None:
    old, older, new = backups(tmp_path, "20260301_000000", "20260201_000000", "20260329_110000")
    with clock.moved(NOW):
        deleted = [path async for path in delete_expired(tmp_path, 7)]
    assert deleted == [older, old]
    assert [path for path in (older, old, new) if path.exists()] == [new]


async def test_a_backup_that_cannot_be_deleted_is_an_error_that_names_it(tmp_path: Path) -> None:
    backups(tmp_path, "20260329_110000")
    (tmp_path / "backup_20200101_000000.backup.gz").mkdir()
    with clock.moved(NOW), pytest.raises(BackupError, match=r"backup_20200101_000000.backup.gz can't be deleted"):
        async for _ in delete_expired(tmp_path, 7):
            pass
