from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import asyncpg
import pytest
from sqlalchemy import make_url, text
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from batch_system.testing.postgres import OwnServer, PostgresServer, find_binaries, start_server

ROOT = Path(__file__).parents[2]
OWNER = """
from batch_system.testing.postgres import find_binaries, OwnServer
server = OwnServer(find_binaries(), fast=True)
print(server.directory, flush=True)
input()
"""


async def fetch(url: str, *statements: str) -> object:
    """Execute all of them in one transaction. Returns the value that the last one selects."""
    engine = create_async_engine(url, poolclass=NullPool)
    async with engine.begin() as connection:
        for statement in statements:
            result = await connection.execute(text(statement))
        return result.scalar() if result.returns_rows else None


@pytest.fixture(scope="module")
def server() -> Iterator[OwnServer]:
    with OwnServer(find_binaries(), fast=True) as server:
        yield server


@pytest.fixture
async def database(server: PostgresServer) -> AsyncIterator[str]:
    url = await server.create_database()
    yield url
    await server.drop_database(url)


async def test_the_server_is_recent_and_speaks_utf8(database: str) -> None:
    assert int(str(await fetch(database, "SHOW server_version_num"))) >= 140000
    assert await fetch(database, "SHOW server_encoding") == "UTF8"
    assert await fetch(database, "SHOW fsync") == "off"


async def test_two_databases_are_separate(server: PostgresServer, database: str) -> None:
    other = await server.create_database()
    await fetch(database, "CREATE TABLE here (id int)")
    with pytest.raises(ProgrammingError, match='relation "here" does not exist'):
        await fetch(other, "SELECT * FROM here")
    await server.drop_database(other)


async def test_a_database_in_use_can_be_dropped(server: PostgresServer) -> None:
    url = await server.create_database()
    engine = create_async_engine(url)
    async with engine.connect() as connection:
        await connection.execute(text("SELECT 1"))
        await server.drop_database(url)
        await connection.invalidate()
    await engine.dispose()
    assert (
        await fetch(
            server.url, "SELECT array_agg(datname) FROM pg_database WHERE datname LIKE 'batch%'"
        )
        is None
    )


async def test_a_url_serves_asyncpg_itself(database: str) -> None:
    connection = await asyncpg.connect(database.replace("+asyncpg", ""))
    assert await connection.fetchval("SELECT current_database()") == make_url(database).database
    await connection.close()


@pytest.mark.parametrize("mode", ["fast", "immediate"])
async def test_committed_rows_outlive_a_restart(
    server: PostgresServer, database: str, mode: str
) -> None:
    await fetch(database, "CREATE TABLE kept (id int)", "INSERT INTO kept VALUES (7)")
    server.restart(mode)
    assert await fetch(database, "SELECT id FROM kept") == 7


async def test_a_stopped_server_refuses_until_it_is_started_again(
    server: PostgresServer, database: str
) -> None:
    server.stop()
    with pytest.raises(FileNotFoundError):
        await fetch(database, "SELECT 1")
    server.start()
    assert await fetch(database, "SELECT 1") == 1


async def test_a_server_with_default_settings_writes_durably() -> None:
    with OwnServer(find_binaries(), fast=False) as server:
        assert await fetch(server.url, "SHOW fsync") == "on"
        assert await fetch(server.url, "SHOW synchronous_commit") == "on"
    assert not server.directory.exists()


async def test_a_failing_command_shows_the_servers_log(server: OwnServer) -> None:
    with pytest.raises(
        RuntimeError, match=r"pg_ctl start failed:(?s:.*)another server might be running"
    ):
        server.start()


def test_kill_9_of_the_owner_ends_the_server_and_removes_its_directory() -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with owner:
        assert owner.stdout
        directory = Path(owner.stdout.readline().strip())
        postmaster = int((directory / "data/postmaster.pid").read_text().split()[0])
        assert is_alive(postmaster)
        owner.kill()
    deadline = time.monotonic() + 20
    while (is_alive(postmaster) or directory.exists()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(postmaster)
    assert not directory.exists()


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return not is_zombie(pid)


def is_zombie(pid: int) -> bool:
    """In a container without an init process, it may be that nobody collects orphaned processes."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z"


async def test_an_existing_server_is_used_but_never_stopped(
    server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_DATABASE_URL", server.url.replace("postgresql+asyncpg", "postgres"))
    with start_server() as existing:
        url = await existing.create_database()
        assert await fetch(url, "SELECT 1") == 1
        await existing.drop_database(url)
        with pytest.raises(RuntimeError, match="they can't stop it"):
            existing.stop()
    assert await fetch(server.url, "SELECT 1") == 1


def test_finding_no_server_names_every_way_to_get_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PG_BINDIR", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"PG_BINDIR.*TEST_DATABASE_URL"):
        find_binaries()
