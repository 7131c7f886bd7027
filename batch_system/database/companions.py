"""Our tables beside the authors' data, in the application's database: they commit with that
data.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    UniqueConstraint,
    text,
)

from batch_system.database.types import Id, Json, UtcDateTime

companions = MetaData()

checkpoints = Table(
    "batch_checkpoints",
    companions,
    Column("run", Id, nullable=False),
    Column("name", String(100), nullable=False),
    Column("fence", BigInteger, nullable=False),
    Column("cursor", Json),
    Column("count", BigInteger),
    Column("finished", Boolean, nullable=False, server_default=text("false")),
    Column("result", Json),
    Column("at", UtcDateTime),
    PrimaryKeyConstraint("run", "name"),
)

quarantine = Table(
    "batch_quarantine",
    companions,
    Column("id", Id, primary_key=True),
    Column("run", Id, nullable=False),
    Column("task", String(100), nullable=False),
    Column("item", String(1000), nullable=False),
    Column("error", Json, nullable=False),
    Column("times", Integer, nullable=False),
    Column("at", UtcDateTime, nullable=False),
    Column("redriven_by", Id),
    UniqueConstraint("run", "item"),
)

once = Table(
    "batch_once",
    companions,
    Column("key", String(200), primary_key=True),
    Column("run", Id, nullable=False),
    Column("at", UtcDateTime, nullable=False),
    Index("ix_batch_once_run", "run"),
)

# Which code may work with our tables here, and with those of the application: migrate.Window.
windows = Table(
    "batch_data_windows",
    companions,
    Column("history", String(100), primary_key=True),
    Column("oldest", String(100), nullable=False),
    Column("version", String(40), nullable=False),
)
