"""Checkpoints of SQLite: commits leave them to a background loop, until the log is large."""

from __future__ import annotations

import asyncio
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from batch_system.database import checkpoints, engine
from batch_system.database.checkpoints import Checkpoints
from batch_system.database.engine import Database
from tests.batch.ledger_world import until

PAGES = 2_000
"""More than SQLite leaves in the log without a checkpoint, by default."""


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    database = Database(f"sqlite+aiosqlite:///{tmp_path}/app.db", setting="DATABASE_URL")
    async with database.engine.begin() as connection:
        await connection.execute(text("CREATE TABLE texts (content TEXT NOT NULL)"))
    yield database
    await database.dispose()


@pytest.fixture
def pause() -> float:
    """The seconds between a commit and the checkpoint of the loop."""
    return 600.0


@pytest.fixture
async def checkpoint_loop(
    database: Database, pause: float, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Checkpoints]:
    monkeypatch.setattr(checkpoints, "CHECKPOINT_SECONDS", pause)
    (loop,) = checkpoints.of(database)
    loop.start()
    await asyncio.sleep(0)
    async with database.engine.begin():  # after the loop's own transaction
        pass
    yield loop
    await loop.stop()


async def write_pages(database: Database, number: int = PAGES) -> None:
    async with database.engine.begin() as connection:
        await connection.execute(
            text("INSERT INTO texts VALUES (:content)"), {"content": "x" * number * 4_096}
        )


def are_in_file(database: Database, texts: int = 1) -> bool:
    """Whether the file alone, without its log, has the texts."""
    assert database.url.database is not None
    copy = Path(database.url.database).with_name("copy.db")
    shutil.copy(database.url.database, copy)
    with closing(sqlite3.connect(copy)) as connection, suppress(sqlite3.Error):
        return bool(connection.execute("SELECT count(*) FROM texts").fetchone() == (texts,))
    return False


async def test_a_large_commit_makes_a_checkpoint_by_itself_without_the_loop(
    database: Database,
) -> None:
    await write_pages(database)
    assert are_in_file(database)


async def test_a_commit_leaves_the_checkpoint_to_the_loop(
    database: Database, checkpoint_loop: Checkpoints
) -> None:
    await write_pages(database)
    assert not are_in_file(database)


@pytest.mark.parametrize("pause", [0])
async def test_the_loop_makes_a_checkpoint_after_each_commit(
    database: Database, checkpoint_loop: Checkpoints
) -> None:
    for number in (1, 2):
        await write_pages(database, 1)
        await until(lambda number=number: asyncio.to_thread(are_in_file, database, number))


async def test_a_connection_that_is_opened_later_leaves_it_too(
    database: Database, checkpoint_loop: Checkpoints
) -> None:
    async with database.engine.connect() as connection:
        await connection.invalidate()
    await write_pages(database)
    assert not are_in_file(database)


async def test_a_log_that_has_grown_large_is_copied_by_a_commit(
    database: Database, checkpoint_loop: Checkpoints
) -> None:
    await write_pages(database, checkpoints.MOST_PAGES + 1)
    assert are_in_file(database)


async def test_a_checkpoint_disturbs_neither_a_reader_nor_a_writer(
    database: Database, checkpoint_loop: Checkpoints
) -> None:
    await write_pages(database)
    async with database.reader.connect() as reader, database.engine.begin() as writer:
        assert (await reader.execute(text("SELECT count(*) FROM texts"))).scalar() == 1
        await writer.execute(text("INSERT INTO texts VALUES ('new')"))
        await checkpoint_loop.checkpoint()
        assert are_in_file(database)
        await writer.execute(text("INSERT INTO texts VALUES ('newer')"))
        assert (await reader.execute(text("SELECT count(*) FROM texts"))).scalar() == 1
    async with database.reader.connect() as reader:
        assert (await reader.execute(text("SELECT count(*) FROM texts"))).scalar() == 3


READER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN")
print(connection.execute("SELECT count(*) FROM texts").fetchone(), flush=True)
sys.stdin.read()
"""


async def test_a_log_that_grows_because_a_reader_never_ends_is_reported_again_when_it_has_doubled(
    database: Database,
    checkpoint_loop: Checkpoints,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(checkpoints, "MOST_PAGES", 500)
    await write_pages(database, 1)
    command = [sys.executable, "-c", READER, str(database.url.database)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as reader:
        assert reader.stdin is not None and reader.stdout is not None
        await asyncio.to_thread(reader.stdout.readline)
        for _ in range(4):
            await write_pages(database, 600)
            await checkpoint_loop.checkpoint()
        reader.stdin.close()
    said = [message for message in caplog.messages if "can't be copied" in message]
    figures = [re.search(r"has (\d+) MB, and (\d+) MB of it", message) for message in said]
    assert [found and (found[1], found[2]) for found in figures] == [("3", "2"), ("7", "7")]
    assert re.search(rf"\(these processes read now: (\d+, )?{reader.pid}(, \d+)?\)", said[0])
    await checkpoint_loop.checkpoint()
    await write_pages(database, 600)
    await checkpoint_loop.checkpoint()
    assert [message for message in caplog.messages if "can't be copied" in message] == said


@pytest.mark.parametrize("pause", [0])
async def test_a_checkpoint_that_fails_is_reported_once_and_tried_again(
    database: Database,
    checkpoint_loop: Checkpoints,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tries = 0

    async def fail() -> None:
        nonlocal tries
        tries += 1
        raise OperationalError("PRAGMA", {}, sqlite3.OperationalError("disk I/O error"))

    monkeypatch.setattr(checkpoint_loop, "checkpoint", fail)
    for _ in range(3):
        before = tries
        await write_pages(database, 1)
        await until(lambda before=before: asyncio.sleep(0, tries > before))
    assert caplog.text.count("disk I/O error") == 1
    assert checkpoint_loop.is_alive


@pytest.mark.parametrize("pause", [0])
async def test_a_file_that_is_locked_at_the_start_does_not_end_the_loop(
    database: Database,
    pause: float,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(checkpoints, "CHECKPOINT_SECONDS", pause)
    monkeypatch.setattr(engine, "BUSY_GIVE_UP_SECONDS", 0.0)
    (loop,) = checkpoints.of(database)
    assert database.url.database is not None
    with closing(sqlite3.connect(database.url.database)) as other:
        other.execute("BEGIN IMMEDIATE")
        loop.start()
        await until(
            lambda: asyncio.sleep(0, "the write-ahead log can't be copied now" in caplog.text)
        )
    await write_pages(database)
    await until(lambda: asyncio.to_thread(are_in_file, database))
    await loop.stop()
