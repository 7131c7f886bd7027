"""Our tables beside the authors' data, in the application's database: they commit with that
data.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Identity,
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

Number = BigInteger().with_variant(Integer, "sqlite")
"""A number that the database gives. In SQLite only a column of the type INTEGER has one."""

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

# Starts that were committed with the authors' data, for a ledger elsewhere: firing/handover.py.
# `number`: they are handed over in this order. `id`: that of the run. `follow_up`: in a group, the
# id of the follow-up, whose own row comes before those of the members.
starts = Table(
    "batch_starts",
    companions,
    Column("number", Number, Identity(), primary_key=True),
    Column("id", Id, nullable=False),
    Column("at", UtcDateTime, nullable=False),
    Column("follow_up", Id),
    Column("run", Json, nullable=False),
    Index("ix_batch_starts_follow_up", "follow_up", "number"),
)

# Which code may work with our tables here, and with those of the application: migrate.Window.
windows = Table(
    "batch_data_windows",
    companions,
    Column("history", String(100), primary_key=True),
    Column("oldest", String(100), nullable=False),
    Column("version", String(40), nullable=False),
)
