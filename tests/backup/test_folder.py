from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from batch_system import clock
from batch_system.backup import create_backup
from batch_system.backup.file.folder import reserve, taken_at
from batch_system.errors import BackupError
from tests.backup.contents import connected, is_written, make_sqlite, manifest, until

ROOT = Path(__file__).parents[2]
NOON = datetime(2026, 3, 29, 12, 0, 0, 999_999, tzinfo=UTC)

SEVERAL = """
import asyncio
from pathlib import Path
from batch_system.backup import create_backup

async def main():
    for _ in range(5):
        print((await create_backup(Path("backups"))).name)

asyncio.run(main())
"""

SMALL_DISK = """
import asyncio, resource
from pathlib import Path
from batch_system.backup import create_backup
from batch_system.errors import BackupError

resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
try:
    asyncio.run(create_backup(Path("backups")))
except BackupError as error:
    print(error)
"""

GROWTH = """
import asyncio, resource
from pathlib import Path
from batch_system.backup import create_backup

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

before = peak()
asyncio.run(create_backup(Path("backups")))
print(peak() - before)
"""


def script(text: str) -> subprocess.Popen[str]:
    """Run Python code in a process, in the current directory and with the environment of the
    fixtures.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", text], stdout=subprocess.PIPE, text=True, env=environment
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def old_backup(tmp_path: Path) -> Path:
    """A folder with an older backup, which no test may change."""
    folder = tmp_path / "backups"
    folder.mkdir()
    (folder / "backup_20200101_000000.backup.gz").write_bytes(b"old")
    return folder


async def test_a_backup_is_named_after_the_time_in_utc_and_its_folder_is_made(
    app_db: Path, tmp_path: Path
) -> None:
    make_sqlite(app_db)
    with clock.moved(NOON):
        backup = await create_backup(tmp_path / "made" / "backups")
    assert backup == tmp_path / "made" / "backups" / "backup_20260329_120000.backup.gz"
    assert taken_at(backup) == NOON.replace(microsecond=0)


async def test_backups_of_the_same_second_each_get_a_second_of_their_own(
    app_db: Path, tmp_path: Path
) -> None:
    make_sqlite(app_db)
    with clock.moved(NOON):
        made = await asyncio.gather(*(create_backup(tmp_path / "backups") for _ in range(5)))
    assert sorted(path.name for path in made) == [
        f"backup_20260329_12000{n}.backup.gz" for n in range(5)
    ]
    assert names(tmp_path / "backups") == sorted(path.name for path in made)
    assert all(manifest(path) for path in made)


def test_two_processes_at_once_never_overwrite_each_other(app_db: Path, tmp_path: Path) -> None:
    make_sqlite(app_db)
    processes = [script(SEVERAL), script(SEVERAL)]
    printed = [name for process in processes for name in process.communicate()[0].split()]
    assert len(set(printed)) == 10
    assert names(tmp_path / "backups") == sorted(printed)


def test_a_partial_file_that_another_process_made_after_publishing_is_not_removed(
    tmp_path: Path,
) -> None:
    with reserve(tmp_path, NOON) as place:
        place.publish()
        place.partial.write_text(
            "another process has just taken the name, and is about to see that it is used"
        )
    assert place.partial.exists()


def test_a_backup_whose_name_was_taken_while_it_was_made_gets_the_next_one(tmp_path: Path) -> None:
    """A file with that name has been copied into the folder meanwhile."""
    with reserve(tmp_path, NOON) as place:
        place.partial.write_text("new")
        for second in (0, 1):
            (tmp_path / f"backup_20260329_12000{second}.backup.gz").write_text("copied")
        assert place.publish().name == "backup_20260329_120002.backup.gz"
    assert {path.name[-12:]: path.read_text() for path in tmp_path.glob("*.gz")} == {
        "00.backup.gz": "copied",
        "01.backup.gz": "copied",
        "02.backup.gz": "new",
    }


async def test_a_name_that_is_taken_is_never_written_to(app_db: Path, old_backup: Path) -> None:
    make_sqlite(app_db)
    with clock.moved(datetime(2020, 1, 1, tzinfo=UTC)):
        backup = await create_backup(old_backup)
    assert backup.name == "backup_20200101_000001.backup.gz"
    assert (old_backup / "backup_20200101_000000.backup.gz").read_bytes() == b"old"


async def test_a_file_with_the_name_of_the_folder_is_an_error_with_advice(
    app_db: Path, tmp_path: Path
) -> None:
    make_sqlite(app_db)
    (tmp_path / "backups").write_text("a file")
    with pytest.raises(
        BackupError, match=r"no backup was made in .*backups: File exists. A file stands where"
    ):
        await create_backup(tmp_path / "backups")
    with pytest.raises(
        BackupError, match=r"no backup was made in .*deeper: Not a directory. A file stands where"
    ):
        await create_backup(tmp_path / "backups" / "deeper")


async def test_a_folder_that_cannot_be_written_is_an_error_with_advice(app_db: Path) -> None:
    make_sqlite(app_db)
    with pytest.raises(
        BackupError, match=r"no backup was made in /proc/self: .*BACKUP_DIR to another"
    ):
        await create_backup(Path("/proc/self"))


def test_a_sqlite_backup_that_finds_the_disk_full_leaves_nothing(
    app_db: Path, old_backup: Path
) -> None:
    make_sqlite(app_db, megabytes=3)
    printed, _ = script(SMALL_DISK).communicate()
    assert re.search("could not be copied into backups: .*(larger disk|another folder)", printed)
    assert names(old_backup) == ["backup_20200101_000000.backup.gz"]


async def test_a_postgresql_backup_that_finds_the_disk_full_leaves_nothing(
    database: str, old_backup: Path, settings: Callable[..., None]
) -> None:
    await fill(database, rows=3_000)
    printed, _ = script(SMALL_DISK).communicate()
    assert "no backup was made in backups: File too large. Free some space there" in printed
    assert names(old_backup) == ["backup_20200101_000000.backup.gz"]


def test_memory_does_not_grow_with_a_sqlite_database(app_db: Path) -> None:
    make_sqlite(app_db, megabytes=80)
    printed, _ = script(GROWTH).communicate()
    assert int(printed) < 45


async def test_memory_does_not_grow_with_a_postgresql_database(database: str) -> None:
    await fill(database, rows=60_000)
    printed, _ = script(GROWTH).communicate()
    assert int(printed) < 45


async def test_rows_of_ten_megabytes_take_little_memory(database: str) -> None:
    async with connected(database) as connection:
        await connection.execute("CREATE TABLE large (data bytea)")
        for _ in range(4):
            await connection.execute(
                "INSERT INTO large SELECT decode(repeat('00ff5c0a', 2621440), 'hex')"
            )
    printed, _ = script(GROWTH).communicate()
    assert int(printed) < 75


async def fill(database: str, rows: int) -> None:
    """Insert this number of rows of 1.2 KB that do not compress well."""
    async with connected(database) as connection:
        await connection.execute(
            "CREATE TABLE filler AS SELECT (SELECT string_agg(md5((n * i)::text), '') "
            "FROM generate_series(1, 37) i)"
            f" AS text FROM generate_series(1, {rows}) n"
        )


@pytest.mark.parametrize("phase", ["copy", "partial"])
async def test_a_cancel_leaves_nothing(app_db: Path, old_backup: Path, phase: str) -> None:
    make_sqlite(app_db, megabytes=60)
    backup = asyncio.create_task(create_backup(old_backup))

    async def it_is_writing() -> bool:
        return is_written(old_backup, f".backup_*.{phase}*")

    await until(it_is_writing)
    backup.cancel()
    with pytest.raises(asyncio.CancelledError):
        await backup
    assert names(old_backup) == ["backup_20200101_000000.backup.gz"]


async def test_the_files_of_a_killed_process_are_removed_a_day_later(
    app_db: Path, old_backup: Path
) -> None:
    make_sqlite(app_db)
    left = [
        old_backup / f".backup_20260301_120000.{suffix}"
        for suffix in ("partial", "copy", "copy-wal")
    ]
    for path in left:
        path.touch()
    await create_backup(old_backup)
    assert all(path.exists() for path in left), "they may belong to a process that is at work"
    a_day_ago = (clock.now() - timedelta(days=1, minutes=1)).timestamp()
    for path in left:
        os.utime(path, (a_day_ago, a_day_ago))
    await create_backup(old_backup)
    assert not any(path.exists() for path in left)


async def test_links_and_files_of_others_are_neither_written_through_nor_removed(
    app_db: Path, old_backup: Path, tmp_path: Path
) -> None:
    """Another user who may write into the folder can guess the name of the next backup."""
    make_sqlite(app_db)
    precious = tmp_path / "precious"
    precious.write_text("of somebody else")
    soon = [(clock.now() + timedelta(seconds=n)).strftime("%Y%m%d_%H%M%S") for n in range(60)]
    links = [old_backup / f".backup_{stamp}.copy" for stamp in soon]
    links += [
        old_backup / ".backup_20260301_120000.partial",
        old_backup / ".backup_20260301_120000.copy",
    ]
    for link in links:
        link.symlink_to(precious)
    others = [
        old_backup / ".backup_20260302_120000.copy",
        old_backup / ".backup_20260303_120000.partial",
    ]
    others[0].mkdir()
    others[1].touch()
    if os.geteuid() == 0:  # only root can give a file to another user
        os.chown(others[1], 65534, 65534)
    else:
        others.pop()
    for path in (precious, *others):
        os.utime(path, (0, 0))
    await create_backup(old_backup)
    assert precious.read_text() == "of somebody else"
    assert all(path.is_symlink() for path in links) and all(path.exists() for path in others)


@pytest.mark.parametrize(
    "name",
    [
        "backup_20260329_120000.backup.gz.tmp",
        "my_backup_20260329_120000.backup.gz",
        "backup_20261329_120000.backup.gz",
        "backup_20260329_126000.backup.gz",
        "backup_2026329_120000.backup.gz",
        "backup_２０２６0329_120000.backup.gz",
        "backup_before_migration.backup.gz",
        ".backup_20260329_120000.partial",
    ],
)
def test_only_the_exact_name_of_a_backup_has_a_time(name: str) -> None:
    assert taken_at(Path(name)) is None
