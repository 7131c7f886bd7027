"""The watch on an SQLite file: it hears what others have committed, and rests while nobody
writes.
"""

from __future__ import annotations

import asyncio
import errno
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing

import pytest

from batch_system.batch.ledger.wakes import CATALOG, Wake
from batch_system.batch.nodes import file_watch
from batch_system.batch.nodes.file_watch import FileWatch
from batch_system.database.engine import Database
from tests.batch.ledger_world import until

pytestmark = pytest.mark.parametrize("ledger_url", ["sqlite"], indirect=True)

TOLD = (
    f"INSERT INTO batch_catalog VALUES ({CATALOG}, 1) ON CONFLICT (id) DO UPDATE "
    "SET version = version + 1"
)
MUCH = (
    "INSERT INTO filled WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n "
    "WHERE i < 500) "
    "SELECT hex(randomblob(500)) FROM n"
)


class Watched:
    """A watch, what it has heard, and how often it has looked."""

    def __init__(self, ledger: Database, monkeypatch: pytest.MonkeyPatch) -> None:
        self.file = str(ledger.url.database)
        self.heard: list[Wake] = []
        self.looks = 0
        version = file_watch._version

        def counted(cursor: sqlite3.Cursor) -> int:
            self.looks += 1
            return version(cursor)

        monkeypatch.setattr(file_watch, "_version", counted)
        self.watch = FileWatch(ledger, self.heard.append)

    async def hears(self) -> Wake:
        async def heard() -> list[Wake]:
            return self.heard

        await until(heard)
        return self.heard.pop(0)

    async def rests(self) -> bool:
        """Whether it stops looking, apart from once a second."""
        for _ in range(10):
            looks = self.looks
            await asyncio.sleep(0.3)
            if self.looks - looks <= 1:
                return True
        return False


@pytest.fixture
async def watched(ledger: Database, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Watched]:
    watched = Watched(ledger, monkeypatch)
    yield watched
    await watched.watch.stop()
    await asyncio.to_thread(watched.watch._thread.join, 30)
    assert not watched.watch._thread.is_alive()


async def test_it_rests_while_nobody_writes_and_hears_a_commit_long_after_its_first_writes(
    watched: Watched,
) -> None:
    assert await watched.hears() == Wake(None)
    assert await watched.rests()
    with closing(sqlite3.connect(watched.file, isolation_level=None)) as other:
        # So that SQLite writes to the file before the commit.
        other.execute("PRAGMA cache_size = 1")
        other.execute("CREATE TABLE filled (x)")
        other.execute("BEGIN IMMEDIATE")
        other.execute(MUCH)
        other.execute(TOLD)
        assert await watched.rests()
        assert watched.heard == []
        other.execute("COMMIT")
        assert await watched.hears() == Wake(frozenset(), True)
        assert await watched.rests()
        other.execute(TOLD)
    assert await watched.hears() == Wake(frozenset(), True)


async def test_it_hears_the_same_where_the_system_has_no_watch_left(
    ledger: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left() -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(file_watch, "INotify", none_left)
    monkeypatch.setattr(file_watch, "LONGEST_REST", 3600.0)  # a resting watch does not look
    watched = Watched(ledger, monkeypatch)
    assert await watched.hears() == Wake(None)
    await until(lambda: asyncio.sleep(0, watched.looks > 2 * file_watch.COMMIT_STEPS))
    with closing(sqlite3.connect(watched.file, isolation_level=None)) as other:
        other.execute(TOLD)
    assert await watched.hears() == Wake(frozenset(), True)
    await watched.watch.stop()
