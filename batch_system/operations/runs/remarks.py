"""What stands beside a run in a list: what it has returned, who asked for it and why, who has
acknowledged its failure, and what holds it in the queue.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Row, Text, case, cast, func, null, select, type_coerce
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger import database_time, json_rows
from batch_system.batch.ledger.incidents.tables import incidents
from batch_system.batch.ledger.people import audit
from batch_system.batch.ledger.people.audit import Asked
from batch_system.batch.ledger.states import Origin, RunState
from batch_system.batch.ledger.tables import runs
from batch_system.operations.asking.context import Context
from batch_system.operations.asking.results import Result, RunSummary
from batch_system.operations.people.redacting import hidden_tasks
from batch_system.operations.runs import late
from batch_system.operations.runs.waiting import Blocker
from batch_system.operations.system.nodes import living_services

LONGEST_RESULT = 200
"""A longer result, in characters of its JSON, stands on the page of its run only."""
MOST_STARTS = 200
"""At most this many of the newest starts by hand are read for their notes."""
MOST_QUEUED = 20
"""At most this many queued runs are asked for what holds them: the first of the list."""
_RECORDED_WITHIN = timedelta(minutes=1)
"""A start is in the audit this long after its run was made, at the latest."""


class Remark(Result):
    """What stands beside a run.

    Attributes:
        result: What it has returned, if that is short.
        by: Who asked for it, if it was made by hand.
        note: Why, in the words of that person.
        acknowledged_by: Who has acknowledged its failure.
        blocker: What holds it in the queue.
    """

    result: Any = None
    by: str | None = None
    note: str | None = None
    acknowledged_by: str | None = None
    blocker: Blocker | None = None


async def remarks(context: Context, listed: Sequence[RunSummary]) -> dict[str, Remark]:
    """What stands beside each of these runs, by its id."""
    if not listed:
        return {}
    async with context.databases.reading() as connection:
        if connection is None:
            return {}
        hidden = await hidden_tasks(connection, context)
        told = {row.id: row for row in await _rows(connection, listed)}
        notes = await _notes(connection, listed)
        held = await _blockers(connection, context, listed)
    return {
        run.id: Remark(
            result=None if run.task in hidden else context.redaction.masked(told[run.id].result),
            by=told[run.id].requested_by if run.origin == Origin.MANUAL else None,
            note=None if run.task in hidden else notes.get(run.id),
            acknowledged_by=told[run.id].acknowledged_by,
            blocker=held.get(run.id),
        )
        for run in listed
        if run.id in told
    }


async def _rows(
    connection: AsyncConnection, listed: Sequence[RunSummary]
) -> Sequence[Row[Any, Any, Any, Any]]:
    is_short = func.length(cast(runs.c.result, Text)) <= LONGEST_RESULT
    result = type_coerce(case((is_short, runs.c.result), else_=null()), runs.c.result.type)
    query = select(
        runs.c.id, runs.c.requested_by, incidents.c.acknowledged_by, result.label("result")
    ).select_from(runs.outerjoin(incidents, incidents.c.id == runs.c.acknowledged))
    ids = json_rows.is_among(runs.c.id, [run.id for run in listed], connection.dialect.name)
    return (await connection.execute(query.where(ids))).all()


async def _notes(connection: AsyncConnection, listed: Sequence[RunSummary]) -> dict[str, str]:
    """The notes of starts by hand, by the id of the run."""
    made = [run.created_at for run in listed if run.origin == Origin.MANUAL]
    if not made:
        return {}
    asked = Asked(("run.start",), min(made) - _RECORDED_WITHIN, max(made) + _RECORDED_WITHIN)
    found = await audit.newest_of_each(connection, [asked], MOST_STARTS)
    return {row.run: row.note for row in found[asked] if row.note}


async def _blockers(
    connection: AsyncConnection, context: Context, listed: Sequence[RunSummary]
) -> dict[str, Blocker]:
    queued = [run.id for run in listed if run.state == RunState.QUEUED][:MOST_QUEUED]
    if not queued:
        return {}
    now: datetime = await database_time.now_of(connection)
    living = await living_services(connection, context, now)
    return await late.blockers_of(connection, queued, living, now)
