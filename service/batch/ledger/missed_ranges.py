"""Queries on missed ranges: slots that did not run, with the reason."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.ledger import json_rows, queues
from service.batch.ledger.schedules import OpenSchedule
from service.batch.ledger.tables import missed, new_id


@dataclass(frozen=True)
class MissedRange:
    """Consecutive slots of one task that do not run, and why. `first` and `last` are aware, and both included."""

    first: datetime
    last: datetime
    count: int
    reason: str


async def record(connection: AsyncConnection, ranges: list[tuple[OpenSchedule, MissedRange]], now: datetime) -> None:
    """Write missed ranges. One that goes on where the task's last one ended, for the same reason, makes that longer.

    Not across a change of schedule: the new one knows nothing of the old one's slots in between, which may have run.
    """
    if not ranges:
        return
    newest = await _newest_missed(connection, [row.task for row, _ in ranges])
    fresh = []
    for row, found in ranges:
        last = newest.get(row.task)
        if last is not None and last.reason == found.reason and _goes_on(row, last.last_slot, found.first):
            longer = update(missed).where(missed.c.id == last.id)
            await connection.execute(longer.values(last_slot=found.last, count=missed.c.count + found.count))
        else:
            fresh.append(_missed_row(row.task, found, now))
    await json_rows.insert(connection, missed, fresh)


def _goes_on(row: OpenSchedule, last: datetime, first: datetime) -> bool:
    return last > row.valid_from and last == row.schedule.previous(first)


def _missed_row(task: str, found: MissedRange, now: datetime) -> dict[str, Any]:
    return {
        "id": new_id(),
        "task": task,
        "first_slot": found.first,
        "last_slot": found.last,
        "count": found.count,
        "reason": found.reason,
        "created_at": now,
    }


async def _newest_missed(connection: AsyncConnection, names: list[str]) -> dict[str, Any]:
    kind = connection.dialect.name
    columns = [missed.c.id, missed.c.task, missed.c.reason, missed.c.last_slot]
    newest = "SELECT x.id FROM batch_missed x WHERE x.task = v.task ORDER BY x.last_slot DESC LIMIT 1"
    statement = text(
        "SELECT m.id, m.task, m.reason, m.last_slot FROM batch_missed m "
        f"WHERE {queues.among('m.id', f'SELECT ({newest}) FROM {json_rows.source([missed.c.task], kind)}', kind)}"
    ).columns(*columns)
    parameter = {"rows": json_rows.encode([{"task": name} for name in names], kind)}
    return {row.task: row for row in await connection.execute(statement, parameter)}


async def of_task(connection: AsyncConnection, task: str, limit: int) -> list[dict[str, Any]]:
    """The last missed ranges of a task, newest first; at most `limit`."""
    newest = select(missed).where(missed.c.task == task).order_by(missed.c.last_slot.desc()).limit(limit)
    return [dict(row) for row in (await connection.execute(newest)).mappings()]
