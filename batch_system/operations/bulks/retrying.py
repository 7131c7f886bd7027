"""What a retry of all failed runs of an incident would do."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Row, and_, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.incidents.durations import UsualDurations
from batch_system.batch.ledger import database_time
from batch_system.batch.ledger.incidents import incidents
from batch_system.batch.ledger.incidents.acknowledging import is_of
from batch_system.batch.ledger.states import RunState
from batch_system.batch.ledger.tables import OPEN_FAILURE_SQL, runs
from batch_system.errors import UnknownIncident
from batch_system.escaping import echoed
from batch_system.operations.asking.context import Context
from batch_system.operations.asking.results import Result
from batch_system.operations.bulks import bulk
from batch_system.operations.bulks.results import Preview
from batch_system.operations.incidents.open_failures import one_problem
from batch_system.operations.why import changes

MOST = 100_000


class RetryPlan(Result):
    """A retry of the failed runs of an incident that are open. `preview`: acts on these runs, never
    on later ones.

    `newest`: the run that is tried first. `attempt`: the number of the next attempt of it. `p50`:
    how many seconds a run usually takes; None if that is not known. `task`: the number of the
    tasks, if these are one problem. `changed`: what has changed since the last failure, by its
    action.
    """

    incident: str
    task: str
    error: str
    preview: Preview
    newest: str | None
    attempt: int
    p50: float | None
    changed: list[str]


def _of(meant: Sequence[Row[Any]]) -> ColumnElement[bool]:
    """Whether a run belongs to one of these incidents."""
    if len(meant) == 1:
        (row,) = meant
        return and_(runs.c.task == row.task, is_of(row.task, row.fingerprint))
    # Not one condition for each, joined by OR: SQLite refuses more than a thousand of them.
    pairs = [f"{row.task} {row.fingerprint}" for row in meant]
    is_of_tasks = runs.c.task.in_(sorted({row.task for row in meant}))
    return and_(is_of_tasks, (runs.c.task + " " + runs.c.fingerprint).in_(pairs))


async def plan_retry(context: Context, incident: str, with_same_error: bool = False) -> RetryPlan:
    """What a retry of the failed runs of an incident would do. Nothing is retried yet. Raises
    UnknownIncident.

    `with_same_error`: include the incidents that form one problem with it.
    """
    async with context.databases.changing() as connection:
        row = await incidents.find(connection, incident)
        if row is None:
            raise UnknownIncident(f"there is no incident {echoed(incident)}")
        now = await database_time.now_of(connection)
        columns = [
            runs.c[name]
            for name in ("id", "task", "state", "slot", "created_at", "attempt", "finished_at")
        ]
        meant = await one_problem(connection, row) if with_same_error else [row]
        theirs = _of(meant)
        query = select(*columns).where(
            theirs, runs.c.state == RunState.FAILED, text(OPEN_FAILURE_SQL)
        )
        found = (
            (await connection.execute(query.order_by(runs.c.finished_at.desc()).limit(MOST)))
            .mappings()
            .all()
        )
        usual = await UsualDurations(connection, now).of_task(row.task)
        request = {"incident": row.id, "task": row.task}
        return RetryPlan(
            incident=row.id,
            task=row.task if len(meant) == 1 else f"{len(meant):,} tasks",
            error=row.text,
            preview=await bulk.keep(context, connection, "retry", found, request),
            newest=found[0]["id"] if found else None,
            attempt=found[0]["attempt"] + 1 if found else 1,
            p50=usual.p50,
            changed=await _changed(connection, row.task, row.last_at) if found else [],
        )


async def _changed(connection: AsyncConnection, task: str, since: datetime) -> list[str]:
    """The actions since an instant that may have fixed the cause, each once, the newest first."""
    rows = await changes.between(connection, task, since)
    return list(dict.fromkeys(row.action for row in rows))
