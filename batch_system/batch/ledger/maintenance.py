"""Maintenance windows: from one instant to another, no task of a selection fires, or nothing is
sent about these tasks. The selection is all tasks, those of a pool, or those with a tag.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from typing import Any, Self

from sqlalchemy import (
    Column,
    Select,
    String,
    Table,
    Text,
    and_,
    case,
    delete,
    func,
    insert,
    or_,
    select,
    text,
    update,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger.states import MaintenanceKind
from batch_system.batch.ledger.tables import ledger
from batch_system.database.types import Id, UtcDateTime

OPEN_SQL = "ended_at IS NULL"
"""The condition that a window is planned or lasts."""

# `tag`, `pool`: which tasks are meant; without both: all. `ends_at`: null for a pause that
# lasts until a person ends it. `begun_at`: when its tasks were paused. `ended_at`: when it was
# over, by its time or by a person.
maintenance = Table(
    "batch_maintenance",
    ledger,
    Column("id", Id, primary_key=True),
    Column("kind", String(10), nullable=False),
    Column("tag", String(100)),
    Column("pool", String(40)),
    Column("begins_at", UtcDateTime, nullable=False),
    Column("ends_at", UtcDateTime),
    Column("created_at", UtcDateTime, nullable=False),
    Column("created_by", Text, nullable=False),
    Column("note", Text),
    Column("begun_at", UtcDateTime),
    Column("ended_at", UtcDateTime),
)

MOST_OPEN = 1_000
"""The most windows that may be planned or last at the same time."""


@dataclass(frozen=True)
class MaintenanceWindow:
    """A row of batch_maintenance. Instants are in UTC."""

    id: str
    kind: MaintenanceKind
    tag: str | None
    pool: str | None
    begins_at: datetime
    ends_at: datetime | None
    created_at: datetime
    created_by: str
    note: str | None
    begun_at: datetime | None
    ended_at: datetime | None = None

    @classmethod
    def of(cls, row: Any) -> Self:
        """`row`: of batch_maintenance, all columns."""
        values = dict(row._mapping)
        return cls(**values | {"kind": MaintenanceKind(row.kind)})

    def is_about(self, pool: str, tags: Collection[str] | None) -> bool:
        """Whether a task of this pool and with these tags is meant."""
        if self.tag is not None:
            return self.tag in (tags or ())
        return self.pool is None or self.pool == pool

    @property
    def is_about_all(self) -> bool:
        """Whether all tasks are meant."""
        return self.tag is None and self.pool is None

    def lasts_at(self, now: datetime) -> bool:
        """Whether it has begun by then, and is not over. A window does not include its end."""
        return self.begins_at <= now and (self.ends_at is None or now < self.ends_at)

    @property
    def selection(self) -> str:
        """In words, which tasks are meant."""
        return selection_in_words(self.tag, self.pool)


def selection_in_words(tag: str | None, pool: str | None) -> str:
    """Which tasks a maintenance window is about; without a tag and a pool all of them."""
    if tag is not None:
        return f"the tasks with the tag {tag}"
    return f"the tasks of the pool {pool}" if pool is not None else "all tasks"


async def open_windows(
    connection: AsyncConnection, kind: MaintenanceKind | None = None
) -> list[MaintenanceWindow]:
    """The windows that are planned or last, by their beginning; only of this kind if it is given.
    Those whose time is over may be among them, until a service has written that.
    """
    return [MaintenanceWindow.of(row) for row in await connection.execute(_open_windows(kind))]


@cache
def _open_windows(kind: MaintenanceKind | None) -> Select[Any]:
    query = select(maintenance).where(text(OPEN_SQL))
    if kind is not None:
        query = query.where(maintenance.c.kind == kind)
    most = MOST_OPEN * (len(MaintenanceKind) if kind is None else 1)
    return query.order_by(maintenance.c.begins_at, maintenance.c.id).limit(most)


async def pauses_since(connection: AsyncConnection, since: datetime) -> list[MaintenanceWindow]:
    """The pauses that are planned or last, or have ended since then; at most MOST_OPEN, those that
    begin last.
    """
    has_ended = and_(maintenance.c.begun_at.is_not(None), maintenance.c.ended_at > since)
    query = select(maintenance).where(
        maintenance.c.kind == MaintenanceKind.PAUSE, or_(text(OPEN_SQL), has_ended)
    )
    newest = query.order_by(maintenance.c.begins_at.desc(), maintenance.c.id).limit(MOST_OPEN)
    return [MaintenanceWindow.of(row) for row in await connection.execute(newest)]


async def next_change(connection: AsyncConnection, early: timedelta) -> datetime | None:
    """When the next of the planned pauses begins, less `early`, or the next window ends; None if
    neither is known.
    """
    first = case(
        (
            (maintenance.c.begun_at.is_(None)) & (maintenance.c.kind == MaintenanceKind.PAUSE),
            maintenance.c.begins_at,
        )
    )
    query = select(func.min(first), func.min(maintenance.c.ends_at)).where(text(OPEN_SQL))
    begins, ends = (await connection.execute(query)).one()
    instants = [begins - early if begins is not None else None, ends]
    return min((each for each in instants if each is not None), default=None)


async def are_over(connection: AsyncConnection, now: datetime) -> bool:
    """Whether the time of a window is over, and nobody has written that yet."""
    query = select(maintenance.c.id).where(text(OPEN_SQL), maintenance.c.ends_at <= now).limit(1)
    return (await connection.execute(query)).first() is not None


async def end_over(connection: AsyncConnection, now: datetime) -> None:
    """Mark the windows whose time is over as ended."""
    over = update(maintenance).where(text(OPEN_SQL), maintenance.c.ends_at <= now)
    await connection.execute(over.values(ended_at=maintenance.c.ends_at))


async def get(connection: AsyncConnection, window: str) -> MaintenanceWindow | None:
    """The window with this id, whose row is locked; None if there is none."""
    query = select(maintenance).where(maintenance.c.id == window).with_for_update()
    row = (await connection.execute(query)).first()
    return MaintenanceWindow.of(row) if row is not None else None


async def add(connection: AsyncConnection, window: MaintenanceWindow) -> None:
    """Write a new window."""
    await connection.execute(insert(maintenance).values(vars(window)))


async def change(connection: AsyncConnection, window: str, **values: Any) -> bool:
    """Write these values into a window that is not over. Returns False if it is over."""
    changing = update(maintenance).where(maintenance.c.id == window, text(OPEN_SQL)).values(values)
    return (await connection.execute(changing)).rowcount == 1


async def begin(connection: AsyncConnection, window: str, now: datetime) -> bool:
    """Mark a planned window as begun. Returns False if another node has done so, or it is over."""
    beginning = (
        update(maintenance)
        .where(
            maintenance.c.id == window,
            maintenance.c.begun_at.is_(None),
            text(OPEN_SQL),
        )
        .values(begun_at=now)
    )
    return (await connection.execute(beginning)).rowcount == 1


async def prune(connection: AsyncConnection, before: datetime) -> int:
    """Delete the windows that ended before. Returns how many."""
    old = delete(maintenance).where(maintenance.c.ended_at < before)
    return (await connection.execute(old)).rowcount
