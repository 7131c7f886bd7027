"""Reads backups with the standard library only, as a person without this package would."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import io
import json
import sqlite3
import tarfile
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
from sqlalchemy import make_url

from batch_system.backup.file.format import TAR_END, Trailer, padding
from batch_system.backup.file.writer import Archive

HEADER = {
    "database": "app",
    "server_version": "18",
    "revision": None,
    "revisions": {},
    "tool": "batch-system 1",
}


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
    """Make a database in WAL mode with one row and this number of incompressible megabytes."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE users (id INTEGER PRIMARY KEY, email TEXT)")
        connection.execute("INSERT INTO users VALUES (1, 'a@example.org')")
        connection.execute("CREATE TABLE filler (data BLOB)")
        with connection:
            connection.execute("BEGIN")
            connection.executemany(
                "INSERT INTO filler VALUES (randomblob(100000))", [()] * (10 * megabytes)
            )


async def connect(url: str) -> Any:
    return await asyncpg.connect(
        **make_url(url).get_dialect()().create_connect_args(make_url(url))[1]
    )


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
    """Load every table of the backup by COPY into a database that has the same tables without
    rows.
    """
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


def is_written(folder: Path, pattern: str) -> bool:
    """Whether there is something in a file of this pattern yet. Those that are made for a moment
    may be gone by now.
    """
    for path in folder.glob(pattern):
        with suppress(FileNotFoundError):
            if path.stat().st_size:
                return True
    return False


def gzip_members(backup: Path) -> list[bytes]:
    """The packed bytes of each gzip member, as zlib separates them."""
    found, rest = [], backup.read_bytes()
    while rest:
        one = zlib.decompressobj(wbits=31)
        one.decompress(rest)
        found.append(rest[: len(rest) - len(one.unused_data)])
        rest = one.unused_data
    return found


def make_archive(path: Path, tables: int = 2, parts: int = 3) -> Path:
    """Write a small backup of PostgreSQL without a server."""
    path.touch()
    with Archive(path, datetime(2026, 3, 29, 12, tzinfo=UTC)) as archive:
        archive.add_header("postgresql", **HEADER)
        described = []
        for number in range(1, tables + 1):
            folder, rows = (
                f"data/{number:04}-public.t{number}",
                [f"{number}\t{n}\n".encode() for n in range(parts)],
            )
            for part, row in enumerate(rows, 1):
                for future in archive.add_rows(f"{folder}/{part:04}.copy", [row]):
                    future.result()
            described.append(
                {
                    "schema": "public",
                    "name": f"t{number}",
                    "folder": folder,
                    "columns": ["a", "b"],
                    "types": ["integer", "text"],
                    "key": ["a"],
                    "rows": parts,
                    "bytes": sum(map(len, rows)),
                }
            )
        archive.finish(tables=described, sequences=[], left_out=[])
    return path


def forge(path: Path, files: list[tuple[str, bytes]], **changes: Any) -> Path:
    """Write a backup with these gzip members (name, content), and a manifest that describes them,
    with changes.
    """
    packed, listed = [], []
    for name, content in files:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        data = gzip.compress(
            info.tobuf(tarfile.GNU_FORMAT) + content + padding(len(content)), 1, mtime=0
        )
        digest = hashlib.sha256(data).hexdigest()
        place = {
            "name": name,
            "offset": sum(map(len, packed)),
            "packed": len(data),
            "sha256": digest,
        }
        listed.append(
            {
                **place,
                "bytes": len(content),
                "rows": content.count(b"\n") if "copy" in name else None,
            }
        )
        packed.append(data)
    header = json.loads(files[0][1])
    contents = {
        "header": header,
        "tables": [],
        "sequences": [],
        "left_out": [],
        "members": listed,
        **changes,
    }
    manifest = json.dumps(contents).encode()
    info = tarfile.TarInfo("manifest.json")
    info.size = len(manifest)
    last = gzip.compress(
        info.tobuf(tarfile.GNU_FORMAT) + manifest + padding(len(manifest)) + TAR_END, 1, mtime=0
    )
    trailer = Trailer(sum(map(len, packed)), len(last), hashlib.sha256(last).digest())
    path.write_bytes(b"".join([*packed, last, trailer.pack()]))
    return path
