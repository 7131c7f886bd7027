"""Acknowledgements: a person takes care of an incident. Its runs are locked before it, as everywhere."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.ledger.incidents import marks
from service.batch.ledger.incidents.incidents import MORE, OF_RUNS, Closed, IncidentKind
from service.batch.ledger.incidents.tables import incidents
from service.batch.ledger.states import ACTIVE
from service.batch.ledger.tables import OPEN_FAILURE_SQL, is_one_of, runs

ENDED_BY_A_PERSON = (*OF_RUNS, IncidentKind.MISSED, IncidentKind.DEADLINE)
"""Kinds of incidents that an acknowledgement closes. The others stay open until their cause is over."""


@dataclass(frozen=True)
class Done:
    """What an acknowledgement did. `runs`: how many failed runs it is about. `is_new`: False if it changed nothing."""

    runs: int
    is_new: bool


async def acknowledge(
    connection: AsyncConnection, incident: str, by: str, note: str, quiet_until: datetime | None, now: datetime
) -> Done:
    """Acknowledge an open incident. One that is closed or acknowledged already is left as it is."""
    row = (await connection.execute(select(incidents).where(incidents.c.id == incident))).one()
    number = await _acknowledge_runs(connection, row.id, row.task, row.fingerprint) if row.kind in OF_RUNS else 0
    is_open = (incidents.c.id == incident, incidents.c.closed_at.is_(None), incidents.c.acknowledged_at.is_(None))
    values = {"acknowledged_at": now, "acknowledged_by": by, "note": note, "quiet_until": quiet_until}
    if row.kind in ENDED_BY_A_PERSON:
        values |= {"closed_at": now, "closed_why": Closed.ACKNOWLEDGED}
    changed = await connection.execute(update(incidents).where(*is_open).values(values))
    return Done(number, changed.rowcount == 1)


async def _acknowledge_runs(connection: AsyncConnection, incident: str, task: str, fingerprint: str) -> int:
    """Acknowledge the failed runs of an incident. Runs that a person has retried go on, and are not acknowledged."""
    theirs = (runs.c.task == task, text(OPEN_FAILURE_SQL), text(f"NOT ({is_one_of(ACTIVE)})"))
    query = select(runs.c.id).where(*theirs).order_by(runs.c.id).with_for_update()
    if fingerprint == MORE:
        own = select(incidents.c.fingerprint).where(incidents.c.task == task, incidents.c.closed_at.is_(None))
        query = query.where(runs.c.fingerprint.not_in(own))
    else:
        query = query.where(runs.c.fingerprint == fingerprint)
    ids = (await connection.execute(query)).scalars().all()
    return await marks.mark(connection, ids, {"acknowledged": incident})


async def undo(connection: AsyncConnection, incident: str, now: datetime) -> bool:
    """Undo an acknowledgement. Returns False if there is none, or another incident of the same error is open."""
    row = (await connection.execute(select(incidents).where(incidents.c.id == incident))).one()
    if row.acknowledged_at is None:
        return False
    same = (incidents.c[name] == getattr(row, name) for name in ("kind", "task", "subject", "fingerprint"))
    another = select(incidents.c.id).where(*same, incidents.c.closed_at.is_(None), incidents.c.id != incident)
    await marks.reopen_acknowledged(connection, incident)
    values = dict.fromkeys(("acknowledged_at", "acknowledged_by", "note", "quiet_until"))
    is_last = (await connection.execute(another)).first() is None
    if is_last and row.closed_why in (None, Closed.ACKNOWLEDGED):
        values |= {"closed_at": None, "closed_why": None}
    await connection.execute(update(incidents).where(incidents.c.id == incident).values(values))
    return True
