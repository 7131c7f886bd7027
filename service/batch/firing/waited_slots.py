"""The slots of upstream tasks that the run of a slot waits for: of each task the last slot at or
before its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.cron.cron import schedule
from service.batch.ledger import json_rows, schedules
from service.batch.ledger.runs import NewRun
from service.batch.ledger.schedules import OpenSchedule
from service.batch.ledger.states import Origin
from service.batch.ledger.waits import waits
from service.batch.tasks.after import After
from service.concurrency.offload import offload
from service.errors import InvalidSchedule

_SECOND = timedelta(seconds=1)
MANY = 100
"""The slots of more runs than this are computed in a thread."""


def waiting_runs(new: Iterable[NewRun], after: After) -> Iterator[NewRun]:
    """These new runs of slots, as waiting runs."""
    for run in new:
        run.wait(run.due_at, after.on)
        run.wait_until = run.due_at + timedelta(seconds=after.within)
        yield run


async def record(connection: AsyncConnection, waiting: Sequence[tuple[NewRun, After]]) -> None:
    """Write the slots that these new runs wait for. They stay the same even if a schedule changes
    later.

    A task without an open schedule is written without a slot, which closes the run, because there
    is nothing to wait for.
    """
    if not waiting:
        return
    names = {name for _, after in waiting for name in after.tasks}
    opened = await schedules.still_open(connection, names)
    rows = [(run, name, opened.get(name)) for run, after in waiting for name in after.tasks]
    found = await offload(_by_open, rows) if len(rows) > MANY else _by_open(rows)
    older = {
        name
        for (run, name, row), slot in zip(rows, found, strict=True)
        if row is not None and slot is None
    }
    histories = {name: await schedules.history(connection, name) for name in sorted(older)}
    slots = [
        slot
        if slot is not None or row is None
        else _by_history(histories[name], run.slot) or _before_all(run, row)
        for (run, name, row), slot in zip(rows, found, strict=True)
    ]
    new = [
        {"run": run.id, "task": name, "slot": slot}
        for (run, name, _), slot in zip(rows, slots, strict=True)
    ]
    await json_rows.insert(connection, waits, new)


def _by_open(rows: Sequence[tuple[NewRun, str, OpenSchedule | None]]) -> list[datetime | None]:
    """The slot of each row by the open schedule of its task; None if that schedule began later."""
    return [
        _last(row.cron, row.timezone, row.valid_from, run.slot)
        if row is not None and row.is_usable
        else None
        for run, _, row in rows
    ]


def _by_history(rows: Sequence[Mapping[str, Any]], at: datetime | None) -> datetime | None:
    """The last slot at or before `at` by all schedules that a task has had."""
    assert at is not None
    for row in reversed(rows):
        if row["valid_from"] < at:
            until = min(at, row["valid_until"] or at)
            try:
                slot = _last(row["cron"], row["timezone"], row["valid_from"], until)
            except InvalidSchedule:  # another version of the service has written it
                continue
            if slot is not None:
                return slot
    return None


def _before_all(run: NewRun, row: OpenSchedule) -> datetime | None:
    """For a backfilled run before the task's first schedule: the last slot at or before its own, by
    the present schedule.

    A backfill makes runs of such slots by the task's present schedule.
    """
    if run.origin != Origin.BACKFILL or run.slot is None or not row.is_usable:
        return None
    return schedule(row.cron, row.timezone).previous(run.slot + _SECOND)


def _last(cron: str, timezone: str, valid_from: datetime, at: datetime | None) -> datetime | None:
    """The last slot of a schedule at or before `at`, if it is after `valid_from`, when the schedule
    began.
    """
    assert at is not None
    slot = schedule(cron, timezone).previous(at + _SECOND)
    return slot if slot is not None and slot > valid_from else None
