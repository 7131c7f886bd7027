"""Quarantine: the items that a run has set aside. Its table is beside the authors' data, and is
committed with chunks.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Any

from sqlalchemy import Select, func, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from batch_system import clock, failures
from batch_system.batch.chunks import cursor_json
from batch_system.batch.context.current_run import CurrentRun, state_of
from batch_system.batch.ledger import json_rows
from batch_system.batch.ledger.tables import new_id
from batch_system.database import sql
from batch_system.database.companions import quarantine
from batch_system.database.engine import Database

INSERT = sql.statement(
    "INSERT INTO batch_quarantine (id, run, task, item, error, times, at) "
    "VALUES (:id, :run, :task, :item, :error, :times, :at) ON CONFLICT (run, item) DO UPDATE SET "
    "error = excluded.error, times = batch_quarantine.times + excluded.times, at = excluded.at",
    id=quarantine.c.id,
    run=quarantine.c.run,
    error=quarantine.c.error,
    at=quarantine.c.at,
)


@dataclass(frozen=True)
class SetAside:
    """An item in quarantine.

    Attributes:
      run: The id of the run that set it aside.
      item: The key of the item as JSON text.
      error: The `type`, `message` and `traceback` of the last error.
      times: How often the item was tried.
      at: When it was set aside, UTC.
      redriven_by: The id of the run that has processed it since, if any.
    """

    run: str
    task: str
    item: str
    error: dict[str, str]
    times: int
    at: datetime
    redriven_by: str | None


def as_text(key: Sequence[Any]) -> str:
    """A key as JSON text: `7`, or `["b", 7]` for a key of two columns."""
    encoded = cursor_json.encode(key)
    return json.dumps(encoded[0] if len(encoded) == 1 else encoded)


def from_text(item: str, columns: int) -> tuple[Any, ...]:
    """The values of a key from its JSON text; `columns` is the number of columns of the key."""
    stored = json.loads(item)
    return cursor_json.decode([stored] if columns == 1 else stored)


async def set_aside(
    db: AsyncSession, run: CurrentRun, key: Sequence[Any], error: BaseException, times: int
) -> None:
    """Put the item with this key into quarantine, in the session's transaction. `times`: how often
    it was tried.
    """
    facts = json_rows.storable(failures.facts_of(error))
    values = {"id": new_id(), "run": run.id, "task": run.task, "item": as_text(key), "error": facts}
    await db.execute(INSERT, {**values, "times": times, "at": clock.now()})
    state_of(run).has_set_aside = True


async def count(database: Database, run: str) -> int:
    """The number of items that this run has set aside."""
    async with database.reader.connect() as connection:
        query = select(func.count()).where(quarantine.c.run == run)
        return int((await connection.execute(query)).scalar_one())


async def left(database: Database, runs: Collection[str]) -> dict[str, int]:
    """How many items each of these runs has set aside that no other run has processed since. Runs
    without such items are left out.
    """
    theirs = quarantine.c.run.in_(json_rows.among(quarantine.c.run, runs, database.kind))
    query = select(quarantine.c.run, func.count()).where(theirs, quarantine.c.redriven_by.is_(None))
    async with database.reader.connect() as connection:
        rows = (await connection.execute(query.group_by(quarantine.c.run))).all()
    return {row[0]: row[1] for row in rows}


async def waiting(database: Database, most: int) -> int:
    """How many items wait for a redrive, counted up to `most`."""
    some = select(quarantine.c.id).where(quarantine.c.redriven_by.is_(None)).limit(most).subquery()
    async with database.reader.connect() as connection:
        return int((await connection.execute(select(func.count()).select_from(some))).scalar_one())


async def waiting_by_task(database: Database, looked: int) -> dict[str, int]:
    """How many items of each task wait for a redrive, among the `looked` items that were set aside
    last.
    """
    async with database.reader.connect() as connection:
        return {row[0]: row[1] for row in await connection.execute(_waiting_by_task(looked))}


@cache
def _waiting_by_task(looked: int) -> Select[Any]:
    columns = select(quarantine.c.task, quarantine.c.redriven_by)
    last = columns.order_by(quarantine.c.id.desc()).limit(looked).subquery()
    return (
        select(last.c.task, func.count()).where(last.c.redriven_by.is_(None)).group_by(last.c.task)
    )


async def listed(
    database: Database,
    run: str | None,
    items: Collection[str] | None = None,
    limit: int | None = None,
) -> list[SetAside]:
    """The items that a run has set aside, in the order in which they failed; only those in `items`
    if it is given.

    `run`: None for the unprocessed items of all runs, the newest first.
    """
    columns = [
        quarantine.c[name]
        for name in ("run", "task", "item", "error", "times", "at", "redriven_by")
    ]
    if run is None:
        query = (
            select(*columns)
            .where(quarantine.c.redriven_by.is_(None))
            .order_by(quarantine.c.id.desc())
        )
    else:
        query = select(*columns).where(quarantine.c.run == run).order_by(quarantine.c.id)
    if limit is not None:
        query = query.limit(limit)
    if items is not None:
        query = query.where(quarantine.c.item.in_(items))
    async with database.reader.connect() as connection:
        return [SetAside(*row) for row in await connection.execute(query)]


async def redriven(db: AsyncSession, run: str, key: Sequence[Any], by: str) -> None:
    """Record, in the session's transaction, that the run `by` has processed an item that `run` had
    set aside.
    """
    is_item = (quarantine.c.run == run) & (quarantine.c.item == as_text(key))
    await db.execute(update(quarantine).where(is_item).values(redriven_by=by))
