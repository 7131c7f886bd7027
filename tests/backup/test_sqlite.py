from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from service import clock
from service.backup import create_backup
from service.errors import BackupError
from tests.backup.contents import make_sqlite, manifest, members, opened


@pytest.fixture
def writer(app_db: Path) -> Iterator[list[int]]:
    """A thread that moves money, and counts its moves, as fast as it can. Nothing of it ever leaves the WAL."""
    make_sqlite(app_db, megabytes=60)
    moves, stop, started = [0], threading.Event(), threading.Event()

    def move() -> None:
        with closing(sqlite3.connect(app_db, isolation_level=None, timeout=60)) as connection:
            connection.execute("PRAGMA wal_autocheckpoint = 0")
            connection.executescript("CREATE TABLE a AS SELECT 1000 AS n; CREATE TABLE b AS SELECT 0 AS n;")
            connection.execute("CREATE TABLE moves (id INTEGER PRIMARY KEY)")
            while not stop.is_set():
                connection.execute("BEGIN IMMEDIATE")
                connection.execute("UPDATE a SET n = n - 1")
                connection.execute("INSERT INTO moves DEFAULT VALUES")
                connection.execute("UPDATE b SET n = n + 1")
                connection.execute("COMMIT")
                moves[0] += 1
                if moves[0] == 20:
                    started.set()
                stop.wait(0.001)

    thread = threading.Thread(target=move)
    thread.start()
    assert started.wait(30)
    yield moves
    stop.set()
    thread.join()


async def test_a_backup_ends_beside_a_busy_writer_and_holds_whole_transactions(
    writer: list[int], tmp_path: Path
) -> None:
    before = writer[0]
    async with asyncio.timeout(60):
        backup = await create_backup(tmp_path / "backups")
    assert writer[0] > before, "the writer went on meanwhile"
    with opened(backup) as connection:
        a, b, moves = connection.execute("SELECT a.n, b.n, (SELECT count(*) FROM moves) FROM a, b").fetchone()
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert a + b == 1000
    assert b == moves
    assert before <= moves <= writer[0]


async def test_rows_that_are_only_in_the_wal_are_in_the_backup(app_db: Path, tmp_path: Path) -> None:
    make_sqlite(app_db)
    with closing(sqlite3.connect(app_db)) as connection:
        connection.execute("INSERT INTO users VALUES (2, 'only-in-the-wal@example.org')")
        connection.commit()
        assert b"only-in-the-wal" not in app_db.read_bytes()
        backup = await create_backup(tmp_path / "backups")
    with opened(backup) as copy:
        assert copy.execute("SELECT count(*) FROM users").fetchone() == (2,)


async def test_a_backup_is_a_tar_with_a_header_the_database_and_a_manifest(app_db: Path, tmp_path: Path) -> None:
    make_sqlite(app_db, megabytes=5)
    backup = await create_backup(tmp_path / "backups")
    assert list(members(backup)) == ["header.json", "database.sqlite3", "manifest.json"]
    (member,) = manifest(backup)["members"]
    assert member["bytes"] == len(members(backup)["database.sqlite3"])
    assert backup.stat().st_mode & 0o777 == 0o600


async def test_a_database_without_wal_is_backed_up_too(app_db: Path, tmp_path: Path) -> None:
    with closing(sqlite3.connect(app_db)) as connection:
        connection.execute("CREATE TABLE kept (id)")
    backup = await create_backup(tmp_path / "backups")
    with opened(backup) as copy:
        assert copy.execute("SELECT count(*) FROM kept").fetchone() == (0,)


async def test_a_missing_database_is_an_error_and_is_not_made(app_db: Path, tmp_path: Path) -> None:
    with pytest.raises(BackupError, match=r"there is no database at .*app.db: look at DATABASE_URL"):
        await create_backup(tmp_path / "backups")
    assert not app_db.exists()
    assert list((tmp_path / "backups").iterdir()) == []


async def test_an_empty_file_is_not_taken_for_a_database(app_db: Path, tmp_path: Path) -> None:
    app_db.touch()
    with pytest.raises(BackupError, match="no table in the database"):
        await create_backup(tmp_path / "backups")


@pytest.mark.parametrize(("offset", "message"), [(0, "not a database"), (4096 * 3, "is damaged|malformed")])
async def test_a_damaged_database_is_an_error(app_db: Path, tmp_path: Path, offset: int, message: str) -> None:
    make_sqlite(app_db, megabytes=1)
    with app_db.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * 4096)
    with pytest.raises(BackupError, match=message):
        await create_backup(tmp_path / "backups")
    assert list((tmp_path / "backups").iterdir()) == []


@pytest.mark.parametrize("url", ["sqlite+aiosqlite://", "sqlite+aiosqlite:///file:app.db?uri=true"])
async def test_what_is_not_a_file_is_an_error(use_database: Callable[[str], None], tmp_path: Path, url: str) -> None:
    use_database(url)
    with pytest.raises(BackupError, match="DATABASE_URL must name a file"):
        await create_backup(tmp_path / "backups")


async def test_another_kind_of_database_is_an_error_that_says_what_is_supported(
    use_database: Callable[[str], None], tmp_path: Path
) -> None:
    use_database("mysql+aiomysql://root:secret@localhost/app")
    with pytest.raises(BackupError, match=r"can't back up mysql\+aiomysql: .* sqlite\+aiosqlite, postgresql\+asyncpg$"):
        await create_backup(tmp_path / "backups")


async def test_the_loop_is_never_held_up(app_db: Path, tmp_path: Path) -> None:
    make_sqlite(app_db, megabytes=60)
    backup = asyncio.create_task(create_backup(tmp_path / "backups"))
    gaps, last = [], clock.monotonic()
    while not backup.done():
        await asyncio.sleep(0.001)
        gaps.append(clock.monotonic() - last)
        last = clock.monotonic()
    await backup
    assert len(gaps) > 50
    assert max(gaps) < 0.25
