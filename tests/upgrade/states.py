"""The states that were recorded: databases and backups of older code, which the present code takes
over.
"""

from __future__ import annotations

import gzip
import shutil
from datetime import datetime, timedelta
from pathlib import Path

from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from batch_system.backup.file.folder import taken_at

HERE = Path(__file__).parent
TASKS = HERE / "tasks"
STATES = HERE / "states"
NAMES = (
    sorted(folder.name for folder in STATES.iterdir() if folder.is_dir()) if STATES.is_dir() else []
)

SQLITE_FILES = ("app.db", "ledger.db")
DUMP = "postgresql.sql"


def unpack_sqlite(name: str, folder: Path) -> None:
    """Put the application's file and the ledger's into `folder`, as they were."""
    for file in SQLITE_FILES:
        _unpack(STATES / name / f"{file}.gz", folder / file)


async def load_postgresql(name: str, url: str) -> None:
    """Execute the dump in an empty database. It was written without what psql or another version
    would have to know.
    """
    statements = gzip.decompress((STATES / name / f"{DUMP}.gz").read_bytes()).decode()
    engine = create_async_engine(url, poolclass=NullPool)
    async with engine.connect() as connection:
        driver = (await connection.get_raw_connection()).driver_connection
        await driver.execute(statements)
    await engine.dispose()


def backups(name: str, kind: str) -> list[Path]:
    """The two that were made, the older one first. It was pinned, and verified by a restore."""
    return sorted((STATES / name / f"{kind}_backups").glob("*.backup.gz"))


def recorded_at(name: str) -> datetime:
    """A minute after the last thing that happened in a state: tests take it over at that instant,
    whenever they run.
    """
    taken = [taken_at(path) for path in (STATES / name).glob("*_backups/*")]
    return max(at for at in taken if at is not None) + timedelta(minutes=1)


def _unpack(packed: Path, to: Path) -> None:
    with gzip.open(packed) as source, to.open("wb") as target:
        shutil.copyfileobj(source, target)
