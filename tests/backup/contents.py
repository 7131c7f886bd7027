"""Reads backups with nothing but the standard library, as somebody without this package would."""

from __future__ import annotations

import asyncio
import io
import json
import sqlite3
import tarfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Any

import asyncpg
from sqlalchemy import make_url


def members(backup: Path) -> dict[str, bytes]:
    with tarfile.open(backup, "r:gz") as tar:
        files = [(info.name, tar.extractfile(info)) for info in tar]
        return {name: file.read() for name, file in files if file}


def manifest(backup: Path) -> Any:
    return json.loads(members(backup)["manifest.json"])


def copies(backup: Path) -> dict[str, bytes]:
    """The COPY rows of every table, by `schema.name`."""
    files = members(backup)
    return {
        f"{table['schema']}.{table['name']}": b"".join(
            data for name, data in files.items() if name.startswith(table["folder"] + "/")
        )
        for table in json.loads(files["manifest.json"])["tables"]
    }


@contextmanager
def opened(backup: Path) -> Iterator[sqlite3.Connection]:
    """The SQLite database in a backup."""
    file = backup.parent / "opened.sqlite3"
    file.write_bytes(members(backup)["database.sqlite3"])
    with closing(sqlite3.connect(file)) as connection:
        yield connection


def make_sqlite(path: Path, megabytes: int = 0) -> None:
    """A database in WAL mode with one row, and so many incompressible megabytes."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE users (id INTEGER PRIMARY KEY, email TEXT)")
        connection.execute("INSERT INTO users VALUES (1, 'a@example.org')")
        connection.execute("CREATE TABLE filler (data BLOB)")
        with connection:
            connection.execute("BEGIN")
            connection.executemany("INSERT INTO filler VALUES (randomblob(100000))", [()] * (10 * megabytes))


async def connect(url: str) -> Any:
    return await asyncpg.connect(**make_url(url).get_dialect()().create_connect_args(make_url(url))[1])


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[Any]:
    connection = await connect(url)
    try:
        yield connection
    finally:
        await connection.close()


async def execute(url: str, *statements: str) -> None:
    async with connected(url) as connection:
        for statement in statements:
            await connection.execute(statement)


async def restore(backup: Path, url: str) -> None:
    """COPY every table of the backup into a database that has the same, empty, tables."""
    rows = copies(backup)
    async with connected(url) as connection:
        for table in manifest(backup)["tables"]:
            await connection.copy_to_table(
                table["name"],
                schema_name=table["schema"],
                columns=table["columns"] or None,
                source=io.BytesIO(rows[f"{table['schema']}.{table['name']}"]),
            )


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(20):
        while not await condition():
            await asyncio.sleep(0.005)
