"""What the benches about chunks share: a table with many rows, and a service that runs tasks."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import String, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from batch_system.config import Settings
from batch_system.database.engine import Database
from batch_system.server.service import BatchService
from batch_system.testing.postgres import PostgresServer

DATABASES = ("SQLite", "PostgreSQL")


class Base(DeclarativeBase):
    pass


class Columns:
    """Those of each table here."""

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(200))
    amount: Mapped[int]
    done: Mapped[int] = mapped_column(default=0)


class Item(Columns, Base):
    __tablename__ = "items"


async def fill(
    database: Database, rows: int, tables: Sequence[Any] = (Item,), padding: int = 0
) -> None:
    """Make these tables anew, each with ids from 1 to `rows`. `padding`: characters more in each
    row.
    """
    numbers = f"generate_series(1, {rows}) AS t(n)"
    if database.kind == "sqlite":
        numbers = (
            f"(WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t WHERE n < {rows}) "
            "SELECT n FROM t)"
        )
    async with database.engine.begin() as connection:
        await connection.run_sync(Base.metadata.drop_all)
        await connection.run_sync(Base.metadata.create_all)
        for table in tables:
            values = f"SELECT n, '{'.' * padding}item number ' || n, n % 1000, 0 FROM {numbers}"
            await connection.execute(
                text(f"INSERT INTO {table.__tablename__} (id, name, amount, done) {values}")
            )
    if database.kind == "postgresql":
        async with database.engine.connect() as connection:
            automatic = await connection.execution_options(isolation_level="AUTOCOMMIT")
            await automatic.execute(text("VACUUM ANALYZE"))


async def new_url(server: PostgresServer, kind: str) -> str:
    """Of an empty database: a file in a new folder of this one, or one on the server."""
    if kind == "PostgreSQL":
        return await server.create_database()
    return f"sqlite+aiosqlite:///{tempfile.mkdtemp(dir=os.getcwd())}/bench.db"


@asynccontextmanager
async def running(application: str, ledger: str) -> AsyncIterator[BatchService]:
    """A service in this process, with the tasks that are registered."""
    folder = Path(tempfile.mkdtemp(dir=os.getcwd())) / "tasks"
    folder.mkdir()
    places: dict[str, Any] = {
        "DATABASE_URL": application,
        "LEDGER_URL": ledger,
        "TASKS_DIR": folder,
    }
    batch = BatchService(Settings(_env_file=None, **places))
    await batch.start()
    try:
        yield batch
    finally:
        await batch.stop()
