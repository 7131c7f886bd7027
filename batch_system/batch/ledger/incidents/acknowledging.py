"""Acknowledgements: a person takes care of an incident. Its runs are locked before it, as
everywhere.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Row, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger import json_rows
from batch_system.batch.ledger.incidents import incidents as incident_rows
from batch_system.batch.ledger.incidents import marks
from batch_system.batch.ledger.incidents.incidents import MORE
from batch_system.batch.ledger.incidents.tables import incidents
from batch_system.batch.ledger.states import ACTIVE, OF_RUNS, Closed, IncidentKind
from batch_system.batch.ledger.tables import OPEN_FAILURE_SQL, is_one_of, new_id, runs

ENDED_BY_A_PERSON = (*OF_RUNS, IncidentKind.MISSED, IncidentKind.DEADLINE)
"""Kinds of incidents that an acknowledgement closes. The others stay open until their cause is
over.
"""


@dataclass(frozen=True)
class Done:
    """What an acknowledgement did. `runs`: how many failed runs it is about. `is_new`: False if it
    changed nothing.

    `closed`: the incidents that it has closed. `still_open`: failed runs that ended too late to be
    included.
    """

    runs: int
    is_new: bool
    closed: Sequence[Row[Any]] = ()
    still_open: int = 0


@dataclass(frozen=True)
class Undone:
    """How many runs count as open again, and the incidents that are open again with them."""

    runs: int
    reopened: Sequence[Row[Any]]


async def acknowledge(
    connection: AsyncConnection,
    incident: str,
    by: str,
    note: str,
    quiet_until: datetime | None,
    now: datetime,
    failed_until: datetime | None = None,
) -> Done:
    """Acknowledge an open incident. One that is closed or acknowledged already is left as it is.

    `failed_until`: acknowledge only the runs that had failed by then. If others are open, the
    incident stays open.
    """
    row = (await connection.execute(select(incidents).where(incidents.c.id == incident))).one()
    number = still_open = 0
    if row.kind in OF_RUNS:
        number, still_open = await _acknowledge_runs(connection, row, failed_until)
    if still_open:
        return Done(number, bool(number), still_open=still_open)
    is_open = (
        incidents.c.id == incident,
        incidents.c.closed_at.is_(None),
        incidents.c.acknowledged_at.is_(None),
    )
    values = {
        "acknowledged_at": now,
        "acknowledged_by": by,
        "note": note,
        "quiet_until": quiet_until,
    }
    if row.kind in ENDED_BY_A_PERSON:
        values |= {"closed_at": now, "closed_why": Closed.ACKNOWLEDGED}
    changed = (
        await connection.execute(
            update(incidents).where(*is_open).values(values).returning(incidents)
        )
    ).all()
    return Done(number, bool(changed), [row for row in changed if row.closed_at is not None])


async def _acknowledge_runs(
    connection: AsyncConnection, incident: Row[Any], failed_until: datetime | None
) -> tuple[int, int]:
    """Acknowledge the failed runs of an incident. Runs that a person has retried go on, and are not
    acknowledged.

    Returns how many were acknowledged, and how many have failed after `failed_until`.
    """
    theirs = (
        runs.c.task == incident.task,
        text(OPEN_FAILURE_SQL),
        text(f"NOT ({is_one_of(ACTIVE)})"),
    )
    query = select(runs.c.id, runs.c.finished_at).where(
        *theirs, is_of(incident.task, incident.fingerprint)
    )
    rows = (await connection.execute(query.order_by(runs.c.id).with_for_update())).all()
    meant = [row.id for row in rows if failed_until is None or row.finished_at <= failed_until]
    return await marks.mark(connection, meant, {"acknowledged": incident.id}), len(rows) - len(
        meant
    )


def is_of(task: str, fingerprint: str) -> ColumnElement[bool]:
    """Whether a run of the task belongs to the incident of this fingerprint. The incident of all
    further errors has the fingerprint MORE.
    """
    if fingerprint != MORE:
        return runs.c.fingerprint == fingerprint
    own = select(incidents.c.fingerprint).where(
        incidents.c.task == task, incidents.c.closed_at.is_(None)
    )
    return runs.c.fingerprint.not_in(own)


async def acknowledge_runs(
    connection: AsyncConnection, ids: Collection[str], by: str, note: str, now: datetime
) -> Done:
    """Acknowledge those of these runs that have failed and are open.

    This closes an incident that has no open runs left. A failure that the watch has not seen yet
    belongs to no incident, and opens none.
    """
    theirs = (
        json_rows.is_among(runs.c.id, sorted(ids), connection.dialect.name),
        text(OPEN_FAILURE_SQL),
    )
    query = select(runs.c.id, runs.c.task, runs.c.fingerprint).where(
        *theirs, text(f"NOT ({is_one_of(ACTIVE)})")
    )
    rows = (await connection.execute(query.order_by(runs.c.id).with_for_update())).all()
    by_key = {
        (incident.task, incident.fingerprint): incident.id
        for incident in await incident_rows.are_open(connection, OF_RUNS)
    }
    none = new_id()
    runs_by_incident: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        incident = by_key.get((row.task, row.fingerprint)) or by_key.get((row.task, MORE))
        runs_by_incident[incident or none].append(row.id)
    for incident, its in sorted(runs_by_incident.items()):
        await marks.mark(connection, its, {"acknowledged": incident})
    over = runs_by_incident.keys() & set(await incident_rows.without_open_runs(connection))
    closing = update(incidents).where(
        incidents.c.id.in_(sorted(over)), incidents.c.closed_at.is_(None)
    )
    ending = {"closed_at": now, "closed_why": Closed.ACKNOWLEDGED}
    values = ending | {"acknowledged_at": now, "acknowledged_by": by, "note": note}
    closed = (await connection.execute(closing.values(values).returning(incidents))).all()
    return Done(len(rows), bool(rows), closed)


async def undo(connection: AsyncConnection, incident: str, now: datetime) -> bool:
    """Undo an acknowledgement of the incident, or of some of its runs. Returns False if there is
    none.
    """
    row = (await connection.execute(select(incidents).where(incidents.c.id == incident))).one()
    if row.acknowledged_at is None:
        return bool(await marks.reopen_acknowledged(connection, incident))
    await marks.reopen_acknowledged(connection, incident)
    await _reopen(connection, row)
    return True


async def undo_runs(connection: AsyncConnection, ids: Collection[str]) -> Undone:
    """Let those of these runs that were acknowledged count as open again, and with them their
    incidents.
    """
    theirs = json_rows.is_among(runs.c.id, sorted(ids), connection.dialect.name)
    query = select(runs.c.id, runs.c.acknowledged).where(theirs, runs.c.acknowledged.is_not(None))
    rows = (await connection.execute(query.order_by(runs.c.id).with_for_update())).all()
    await marks.mark(connection, [row.id for row in rows], {"acknowledged": None})
    closed = select(incidents).where(
        incidents.c.id.in_(sorted({row.acknowledged for row in rows})),
        incidents.c.acknowledged_at.is_not(None),
    )
    found = (await connection.execute(closed.order_by(incidents.c.id).with_for_update())).all()
    reopened = [row for row in found if await _reopen(connection, row)]
    return Undone(len(rows), reopened)


async def _reopen(connection: AsyncConnection, row: Row[Any]) -> bool:
    """Open an acknowledged incident again, unless another one of the same has been opened since.
    Returns whether it was closed and is open now.
    """
    same = (
        incidents.c[name] == getattr(row, name)
        for name in ("kind", "task", "subject", "fingerprint")
    )
    another = select(incidents.c.id).where(
        *same, incidents.c.closed_at.is_(None), incidents.c.id != row.id
    )
    values = dict.fromkeys(("acknowledged_at", "acknowledged_by", "note", "quiet_until"))
    is_last = (await connection.execute(another)).first() is None
    is_open = is_last and row.closed_why in (None, Closed.ACKNOWLEDGED)
    if is_open:
        values |= {"closed_at": None, "closed_why": None}
    await connection.execute(update(incidents).where(incidents.c.id == row.id).values(values))
    return is_open and row.closed_at is not None
