"""Runs that wait for a slot of another task which is late itself, or will not succeed by itself;
and who is in the way.

A run that waits for a slot that is on its way is not late: what it waits for takes its time.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Row, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.ledger import chains
from service.batch.ledger.states import RunState
from service.batch.ledger.tables import WAITING_SQL, runs
from service.batch.ledger.waits import Upstream
from service.operations.runs.awaited import shown_cause
from service.operations.runs.waiting import Blocker, LateRun

MOST_WAITING = 200
"""So many runs that wait are looked at, those that have waited for the longest time."""
OF_A_TASK = 10
"""Blocked runs of one task that are shown, at most."""
NOT_FIRED = timedelta(minutes=1)
"""A slot that was not fired for this time is late."""

_WILL_NOT_SUCCEED = (RunState.FAILED, RunState.CANCELLED, RunState.SKIPPED)
_NAMES = ("id", "task", "slot", "state", "due_at", "created_at")


async def blocked_runs(
    connection: AsyncConnection, late: Sequence[LateRun], now: datetime, shown_after: timedelta
) -> list[LateRun]:
    """The runs that wait in vain, or for one of the runs that are `late`, each with what is in its
    way.
    """
    rows = (await connection.execute(_waiting(now - shown_after))).all()
    found = await chains.in_the_way(connection, [row.id for row in rows]) if rows else {}
    late_ids = {run.run for run in late}
    shown: dict[str, int] = {}
    blocked = []
    for row in rows:
        cause = chains.root(found, row.id)
        if (
            cause is None
            or not _is_late(cause, late_ids, now)
            or shown.get(row.task, 0) >= OF_A_TASK
        ):
            continue
        shown[row.task] = shown.get(row.task, 0) + 1
        blocked.append(_blocked(row, blocker_of(found, row.id), now))
    return blocked


def blocker_of(found: Mapping[str, Upstream], run: str) -> Blocker | None:
    """What is in the way of a run. `found`: what `chains.in_the_way` has returned."""
    first, cause = found.get(run), chains.root(found, run)
    if first is None:
        return None
    reason = first.why_none if not first.is_pending else None
    return Blocker(
        kind="slot",
        task=first.task,
        run=first.run,
        state=first.state,
        reason=reason,
        cause=shown_cause(cause) if cause is not first else None,
    )


def _waiting(before: datetime) -> Any:
    """The runs of slots that wait for other slots since before an instant, by the index of what
    waits.
    """
    columns = [runs.c[name] for name in _NAMES]
    query = select(*columns).where(
        text(WAITING_SQL), runs.c.due_at <= before, runs.c.gate.is_not(None)
    )
    query = query.with_hint(runs, "INDEXED BY ix_batch_runs_waits", "sqlite")
    return (
        query.where(runs.c.slot.is_not(None)).order_by(runs.c.due_at, runs.c.id).limit(MOST_WAITING)
    )


def _is_late(cause: Upstream, late: Collection[str], now: datetime) -> bool:
    if cause.run is not None:
        return cause.run in late or cause.state in _WILL_NOT_SUCCEED
    return not cause.is_pending or (cause.slot is not None and cause.slot <= now - NOT_FIRED)


def _blocked(row: Row[Any], blocker: Blocker | None, now: datetime) -> LateRun:
    return LateRun(
        run=row.id,
        task=row.task,
        slot=row.slot,
        state=row.state,
        why="waits",
        elapsed=(now - row.due_at).total_seconds(),
        blocker=blocker,
    )
