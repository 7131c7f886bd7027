from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from batch_system import clock
from batch_system.backup import create_backup
from batch_system.backup.places.s3 import Objects
from batch_system.config import forget_settings, get_settings
from batch_system.errors import BackupError
from tasks.backup import BackupTask
from tests.asking import access
from tests.backup.contents import make_archive, make_sqlite
from tests.backup.here import make_backups_here
from tests.backup.s3 import Bucket, bucket, network, s3_server
from tests.commands import Batch, in_this_process

__all__ = ["bucket", "s3_server"]

ROOT = Path(__file__).parents[2]
OLD = "backup_20200101_000000.backup.gz"
YOUNG = "backup_20260328_120000.backup.gz"
NOW = datetime(2026, 3, 29, 12, 0, 0, tzinfo=UTC)


batch = pytest.fixture(in_this_process)


@pytest.fixture(autouse=True)
def in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    make_backups_here(monkeypatch)


@pytest.fixture
def folder(app_db: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "backups"
    folder.mkdir()
    for name in (OLD, YOUNG, "backup_of_the_cat.backup.gz"):
        (folder / name).write_bytes(b"")
    return folder


@pytest.fixture
def keeping_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings that keep as little as possible: the newest backup, and those of the last day."""
    monkeypatch.setenv("BACKUP_KEEP_LAST", "1")
    monkeypatch.setenv("BACKUP_RETENTION_DAYS", "1")
    forget_settings()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


async def test_old_backups_are_deleted_after_a_new_one_is_complete(
    app_db: Path, folder: Path, keeping_one: None, caplog: pytest.LogCaptureFixture
) -> None:
    make_sqlite(app_db)
    with clock.moved(NOW), caplog.at_level("INFO"):
        await BackupTask().run()
    assert names(folder) == {
        "backup_20260329_120000.backup.gz",
        YOUNG,
        "backup_of_the_cat.backup.gz",
    }
    created = caplog.text.index("Backup created: backups/backup_20260329_120000.backup.gz")
    assert created < caplog.text.index(f"Deleted old backup: backups/{OLD}")


async def test_nothing_is_deleted_when_no_backup_could_be_made(app_db: Path, folder: Path) -> None:
    before = names(folder)
    with clock.moved(NOW), pytest.raises(BackupError, match="no database at"):
        await BackupTask().run()
    assert names(folder) == before


async def test_settings_choose_the_folder_and_the_retention(
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


async def test_the_bucket_gets_a_copy_and_keeps_by_the_same_rules(
    app_db: Path, folder: Path, bucket: Bucket, keeping_one: None, caplog: pytest.LogCaptureFixture
) -> None:
    make_sqlite(app_db)
    for name in (OLD, YOUNG, "notes.txt", "deeper/" + OLD):
        bucket.put(f"shop/db/{name}", b"")
    with clock.moved(NOW), caplog.at_level("INFO"):
        await BackupTask().run()
    new = "backup_20260329_120000.backup.gz"
    assert sorted(bucket.keys()) == [
        f"shop/db/{n}" for n in (YOUNG, new, "deeper/" + OLD, "notes.txt")
    ]
    uploaded = caplog.text.index(f"Backup uploaded: {bucket.url}/{new}")
    assert uploaded < caplog.text.index(f"Deleted old backup: {bucket.url}/{OLD}")


async def test_nothing_is_deleted_anywhere_when_the_upload_fails(
    app_db: Path, folder: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store lists objects, but accepts no upload, because its quota is used up."""
    make_sqlite(app_db)
    for name in (OLD, YOUNG):
        bucket.put(f"shop/db/{name}", b"")

    def refuse(self: Objects, *_: object) -> None:
        raise BackupError(f"{self.name}: the store refuses that (QuotaExceeded).")

    monkeypatch.setattr(Objects, "put", refuse)
    with clock.moved(NOW), pytest.raises(BackupError, match="QuotaExceeded"):
        await BackupTask().run()
    assert names(folder) >= {OLD, "backup_20260329_120000.backup.gz"} and len(bucket.keys()) == 2


def test_a_run_records_its_backup_and_the_next_run_uploads_those_that_an_outage_left(
    app_db: Path, batch: Batch, bucket: Bucket, tmp_path: Path
) -> None:
    (tmp_path / "tasks/backup.py").write_text((ROOT / "tasks/backup.py").read_text())
    with network(bucket.port, cut_after=0) as between:
        failed = batch("run", "backup", AWS_ENDPOINT_URL=f"http://127.0.0.1:{between.port}")
    assert failed.code == 1 and f"PlaceUnreachable: {bucket.url}" in failed.out
    assert bucket.keys() == []
    done = batch("run", "backup", AWS_ENDPOINT_URL=bucket.settings["AWS_ENDPOINT_URL"])
    assert done.code == 0, done.err
    rows = list(asyncio.run(access(get_settings()).records()).values())
    near, far = ([row for row in rows if row["place"] == place] for place in ("folder", bucket.url))
    assert len(far) == 2 and sorted(bucket.keys()) == sorted(
        f"shop/db/{row['name']}" for row in far
    )
    assert {row["verified_how"] for row in rows} == {"checksums"} and {
        row["name"] for row in near
    } == {row["name"] for row in far}
    run_ids = [run["id"] for run in batch("runs", "--json").json]
    assert [row["taken_by_run"] for row in near] == run_ids


async def test_a_much_smaller_backup_deletes_nothing_and_says_why(
    app_db: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_sqlite(app_db)
    make_archive(folder / YOUNG, tables=1, parts=400)
    with clock.moved(NOW), caplog.at_level("WARNING"):
        await BackupTask().run()
    assert OLD in names(folder)
    assert (
        "No old backup is deleted in backups: backup_20260329_120000.backup.gz has" in caplog.text
    )
    assert "(BACKUP_LEAST_SHARE)" in caplog.text


async def test_a_backup_that_has_failed_its_check_deletes_nothing(
    app_db: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is faulty: the file changes after it was read back."""
    make_sqlite(app_db)

    async def damaged(output_dir: Path, **more: object) -> Path:
        path = await create_backup(output_dir)
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - 1)
        return path

    monkeypatch.setattr("batch_system.operations.backups.make.create_backup", damaged)
    with (
        clock.moved(NOW),
        pytest.raises(BackupError, match=r"backups/backup_20260329_120000.* is damaged"),
    ):
        await BackupTask().run()
    assert OLD in names(folder)


def test_the_schedule_comes_from_the_settings(
    app_db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BACKUP_CRON", "30 4 * * 0")
    forget_settings()
    assert BackupTask().schedule == "30 4 * * 0"


def test_the_task_runs_by_hand_in_a_plain_interpreter(app_db: Path, tmp_path: Path) -> None:
    make_sqlite(app_db)
    code = "import asyncio; from tasks.backup import BackupTask; asyncio.run(BackupTask().run())"
    subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env={"PYTHONPATH": str(ROOT)}, check=True
    )
    assert len(list((tmp_path / "backups").glob("backup_*.backup.gz"))) == 1


PRUNE = """
import asyncio, os, signal
from pathlib import Path
from batch_system.backup.places.place import Folder
from batch_system.config import get_settings
from batch_system.operations.asking.context import Loaded
from batch_system.operations.backups.backups import Backups
from batch_system.operations.operations import open_operations

left = 3

def delete(self, name, unlink=Folder.delete):
    global left
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    unlink(self, name)

async def prune():
    Folder.delete = delete
    async with open_operations(get_settings(), Loaded) as operations:
        await Backups(operations.context).prune(print, allow_many=True)

asyncio.run(prune())
"""


def test_a_prune_that_is_killed_has_deleted_whole_files_and_the_next_one_continues(
    app_db: Path, batch: Batch, tmp_path: Path, keeping_one: None
) -> None:
    made = [f"backup_202001{day:02}_000000.backup.gz" for day in range(1, 11)]
    (tmp_path / "backups").mkdir()
    for name in made:
        make_archive(tmp_path / "backups" / name)
    killed = subprocess.run(
        [sys.executable, "-c", PRUNE], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert names(tmp_path / "backups") == set(made[3:])
    refused = batch("backup", "prune", "--json")
    assert "6 of 7 would go at once, more than half" in refused.err and names(
        tmp_path / "backups"
    ) == set(made[3:])
    assert {row["why"] for row in refused.json} == {"the newest", "more than half would go"}
    done = batch("backup", "prune", "--yes", "--json")
    assert [row["backup"] for row in done.json if row["then"] == "deleted"] == made[3:-1][::-1]
    assert names(tmp_path / "backups") == {made[-1]}
