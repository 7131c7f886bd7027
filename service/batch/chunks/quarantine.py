"""batch_quarantine, beside the authors' data: the items that a run set aside, committed with its chunks."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import bindparam, func, select, text, update
from sqlalchemy.ext.asyncio import AsyncSession

from service import clock, failures
from service.batch.chunks import cursor_json
from service.batch.context.current_run import CurrentRun
from service.batch.ledger import json_rows
from service.batch.ledger.tables import new_id
from service.database.companions import quarantine
from service.database.engine import Database

INSERT = text(
    "INSERT INTO batch_quarantine (id, run, task, item, error, times, at) "
    "VALUES (:id, :run, :task, :item, :error, :times, :at) ON CONFLICT (run, item) DO UPDATE SET "
    "error = excluded.error, times = batch_quarantine.times + excluded.times, at = excluded.at"
).bindparams(*(bindparam(name, type_=quarantine.c[name].type) for name in ("id", "run", "error", "at")))


@dataclass(frozen=True)
class SetAside:
    """One item. `item`: its key as JSON text; `error`: type, message and traceback; `times`: how often it was tried."""

    run: str
    task: str
    item: str
    error: dict[str, str]
    times: int
    at: datetime
    redriven_by: str | None


def as_text(key: Sequence[Any]) -> str:
    """A key as people see it and give it: `7`, or `["b", 7]` for one of several columns."""
    encoded = cursor_json.encode(key)
    return json.dumps(encoded[0] if len(encoded) == 1 else encoded)


def from_text(item: str, columns: int) -> tuple[Any, ...]:
    stored = json.loads(item)
    return cursor_json.decode([stored] if columns == 1 else stored)


async def set_aside(db: AsyncSession, run: CurrentRun, key: Sequence[Any], error: BaseException, times: int) -> None:
    """In the session's transaction."""
    told = json_rows.storable(failures.facts_of(error))
    values = {"id": new_id(), "run": run.id, "task": run.task, "item": as_text(key), "error": told}
    await db.execute(INSERT, {**values, "times": times, "at": clock.now()})


async def count(database: Database, run: str) -> int:
    async with database.reader.connect() as connection:
        query = select(func.count()).where(quarantine.c.run == run)
        return int((await connection.execute(query)).scalar_one())


async def listed(database: Database, run: str, items: Collection[str] | None = None) -> list[SetAside]:
    """Those of one run, in the order in which they failed; only these `items` if they are given."""
    columns = [quarantine.c[name] for name in ("run", "task", "item", "error", "times", "at", "redriven_by")]
    query = select(*columns).where(quarantine.c.run == run).order_by(quarantine.c.id)
    if items is not None:
        query = query.where(quarantine.c.item.in_(items))
    async with database.reader.connect() as connection:
        return [SetAside(*row) for row in await connection.execute(query)]


async def redriven(db: AsyncSession, run: str, key: Sequence[Any], by: str) -> None:
    """In the session's transaction: another run has dealt with this item."""
    mine = (quarantine.c.run == run) & (quarantine.c.item == as_text(key))
    await db.execute(update(quarantine).where(mine).values(redriven_by=by))
