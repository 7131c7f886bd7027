"""Queries on incidents: they open, continue, close and list them."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import cache
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Row,
    Select,
    and_,
    case,
    delete,
    func,
    or_,
    select,
    text,
    true,
    update,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger import json_rows
from batch_system.batch.ledger.incidents.tables import OPEN_SQL, incidents
from batch_system.batch.ledger.states import OF_RUNS, Closed, IncidentKind, RunState
from batch_system.batch.ledger.tables import OPEN_FAILURE_SQL, is_one_of, new_id, runs
from batch_system.database import sql

_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_END = re.compile(r"[0-9a-f]{4,12}")

LONGEST_TEXT = 1_000
"""The text of an incident has at most this many characters."""


MORE = "more"
"""The fingerprint of the one incident for all further errors of a task that already has many
incidents.
"""


@dataclass(frozen=True)
class Opening:
    """What opens an incident, or continues an open one. `count`: how many more runs, slots or rows
    it has now.
    """

    kind: IncidentKind
    text: str
    last_at: datetime
    task: str = ""
    subject: str = ""
    fingerprint: str = ""
    count: int = 1
    first_run: str | None = None
    newest_run: str | None = None
    details: dict[str, Any] | None = None

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What an open incident is found by."""
        return (self.kind, self.task, self.subject, self.fingerprint)


@dataclass(frozen=True)
class Like:
    """Which incidents are wanted: of a `kind`, of a `task`, of a condition on their tasks. None
    stands for all.
    """

    kind: str | None = None
    task: str | None = None
    among: ColumnElement[bool] | None = None

    @property
    def conditions(self) -> list[ColumnElement[bool]]:
        """The same as conditions on the table of incidents."""
        wanted = ((incidents.c.kind, self.kind), (incidents.c.task, self.task))
        equal = [column == value for column, value in wanted if value is not None]
        return equal if self.among is None else [*equal, self.among]


ANY = Like()


# Incidents of missed slots keep their first details; all others have the newest.
_DETAILS = (
    f"CASE WHEN batch_incidents.kind = '{IncidentKind.MISSED}' THEN batch_incidents.details ELSE "
    "coalesce(excluded.details, batch_incidents.details) END"
)
# A failure may be written later than one that came after it.
_LAST_AT = (
    "CASE WHEN excluded.last_at > batch_incidents.last_at THEN excluded.last_at ELSE "
    "batch_incidents.last_at END"
)
_COLUMNS = [incidents.c[name] for name in ("id", *Opening.__dataclass_fields__, "opened_at")]


async def open_or_continue(
    connection: AsyncConnection, openings: Collection[Opening], now: datetime
) -> list[Row[Any]]:
    """Open incidents, or continue those that are open. At most one opening for each key. Returns
    their rows.
    """
    if not openings:
        return []
    kind = connection.dialect.name
    names = ", ".join(column.name for column in _COLUMNS)
    returned = ", ".join(f"batch_incidents.{column.name}" for column in incidents.c)
    statement = text(
        f"INSERT INTO batch_incidents ({names}) SELECT {names} "
        f"FROM {json_rows.source(_COLUMNS, kind)} WHERE true "
        f"ON CONFLICT (kind, task, subject, fingerprint) WHERE {OPEN_SQL} DO UPDATE SET "
        f"count = batch_incidents.count + excluded.count, last_at = {_LAST_AT}, successes = 0, "
        "newest_run = coalesce(excluded.newest_run, batch_incidents.newest_run), text = "
        "excluded.text, "
        f"details = {_DETAILS} RETURNING {returned}"
    )
    rows = [
        {**asdict(opening), "id": new_id(), "opened_at": now, "text": opening.text[:LONGEST_TEXT]}
        for opening in sorted(openings, key=lambda opening: opening.key)
    ]
    result = await connection.execute(
        statement.columns(*incidents.c), {"rows": json_rows.encode(rows, kind)}
    )
    return list(result)


async def told(connection: AsyncConnection, rows: Sequence[Row[Any]], now: datetime) -> None:
    """Record that people got a message about these incidents, or need none."""
    theirs = json_rows.is_among(incidents.c.id, sorted(ids_of(rows)), connection.dialect.name)
    await connection.execute(update(incidents).where(theirs).values(told_at=now))


async def close(
    connection: AsyncConnection, ids: Collection[str], why: Closed, now: datetime
) -> list[Row[Any]]:
    """Close those of these incidents that are open. Returns their rows."""
    if not ids:
        return []
    theirs = json_rows.is_among(incidents.c.id, sorted(ids), connection.dialect.name)
    closing = update(incidents).where(theirs, text(OPEN_SQL)).values(closed_at=now, closed_why=why)
    return list(await connection.execute(closing.returning(*incidents.c)))


async def are_open(
    connection: AsyncConnection, kinds: Collection[IncidentKind] | None = None
) -> list[Row[Any]]:
    """The open incidents, oldest first; only of these kinds if they are given."""
    query = _are_open(None if kinds is None else tuple(kinds))
    # Sorted here: with an ORDER BY, SQLite might read all incidents by the index on their openings.
    return sorted(
        await connection.execute(query), key=lambda incident: (incident.opened_at, incident.id)
    )


@cache
def _are_open(kinds: tuple[IncidentKind, ...] | None) -> Select[Any]:
    query = select(incidents).where(text(OPEN_SQL))
    return query if kinds is None else query.where(incidents.c.kind.in_(kinds))


async def numbers_open(connection: AsyncConnection) -> dict[str, tuple[int, int]]:
    """How many incidents of each kind are open, and how many runs, slots or rows these have
    together.
    """
    query = select(incidents.c.kind, func.count(), func.sum(incidents.c.count)).where(
        text(OPEN_SQL)
    )
    found = {
        kind: (number, int(count))
        for kind, number, count in await connection.execute(query.group_by("kind"))
    }
    return {str(kind): found.get(kind, (0, 0)) for kind in IncidentKind}


async def without_open_runs(connection: AsyncConnection) -> list[str]:
    """The ids of the open incidents of runs that are over, because each of their runs was made good
    or acknowledged.
    """
    kinds = ", ".join(repr(str(kind)) for kind in OF_RUNS)
    statement = text(
        f"SELECT i.id FROM batch_incidents i WHERE i.{OPEN_SQL} AND i.kind IN ({kinds}) AND CASE "
        f"WHEN i.fingerprint = '{MORE}' THEN NOT EXISTS ({_FURTHER}) ELSE NOT EXISTS ({_OF_IT}) END"
    )
    return list((await connection.execute(statement.columns(incidents.c.id))).scalars())


async def with_cancelled_runs(connection: AsyncConnection, ids: Collection[str]) -> set[str]:
    """Those of these incidents whose newest run a person has cancelled, so that no run was made
    good.
    """
    theirs = json_rows.is_among(incidents.c.id, sorted(ids), connection.dialect.name)
    query = select(incidents.c.id).join(runs, runs.c.id == incidents.c.newest_run)
    is_cancelled = text(is_one_of([RunState.CANCELLED], "(batch_runs.state || '')"))
    cancelled = await connection.execute(query.where(theirs, is_cancelled))
    return set(cancelled.scalars())


_IS_OPEN = " AND ".join(f"r.{part}" for part in OPEN_FAILURE_SQL.split(" AND "))
_OF_IT = (
    "SELECT 1 FROM batch_runs r WHERE r.task = i.task AND r.fingerprint = i.fingerprint "
    f"AND {_IS_OPEN}"
)
_HAS_ITS_OWN = (
    f"SELECT 1 FROM batch_incidents o WHERE o.{OPEN_SQL} AND o.kind = i.kind AND o.task = r.task "
    "AND o.subject = '' AND o.fingerprint = r.fingerprint"
)
_FURTHER = (
    f"SELECT 1 FROM batch_runs r WHERE r.task = i.task AND {_IS_OPEN} "
    f"AND NOT EXISTS ({_HAS_ITS_OWN})"
)


async def quiet(
    connection: AsyncConnection, keys: Collection[tuple[str, str]], now: datetime
) -> dict[tuple[str, str], Row[Any]]:
    """The acknowledged incidents that include new failures with these (task, fingerprint) until
    `quiet_until`.
    """
    if not keys:
        return {}
    columns = [incidents.c.task, incidents.c.fingerprint]
    kind = connection.dialect.name
    statement = sql.statement(
        "SELECT i.task, i.fingerprint, i.id, i.acknowledged_at FROM batch_incidents i "
        f"JOIN {json_rows.source(columns, kind)} ON i.task = v.task "
        "AND i.fingerprint = v.fingerprint "
        "WHERE i.quiet_until IS NOT NULL AND i.quiet_until > :now ORDER BY i.quiet_until",
        now=incidents.c.quiet_until,
    )
    rows = [{"task": task, "fingerprint": fingerprint} for task, fingerprint in keys]
    selected = statement.columns(*columns, incidents.c.id, incidents.c.acknowledged_at)
    values = {"rows": json_rows.encode(rows, kind), "now": now}
    found = await connection.execute(selected, values)
    return {(row.task, row.fingerprint): row for row in found}


def listing(
    limit: int,
    before: tuple[datetime, str] | None = None,
    is_open: bool | None = None,
    like: Like = ANY,
    closed_since: datetime | None = None,
) -> Select[Any]:
    """A query for a page of incidents, the newest first. `before`: (opened_at, id) of the last one
    shown.
    """
    query = (
        select(incidents).order_by(incidents.c.opened_at.desc(), incidents.c.id.desc()).limit(limit)
    )
    if before is not None:
        at, last = before
        query = query.where(
            or_(
                incidents.c.opened_at < at, and_(incidents.c.opened_at == at, incidents.c.id < last)
            )
        )
    if is_open is not None:
        query = query.where(
            incidents.c.closed_at.is_(None) if is_open else incidents.c.closed_at.is_not(None)
        )
    if closed_since is not None:
        query = query.where(incidents.c.closed_at >= closed_since)
    return query.where(*like.conditions)


async def number_closed(connection: AsyncConnection, like: Like, most: int) -> tuple[int, bool]:
    """How many of the `most` incidents that were closed last are like this, and whether there are
    no others.
    """
    looked = (
        select(case((and_(true(), *like.conditions), 1), else_=0).label("number"))
        .where(incidents.c.closed_at.is_not(None))
        .order_by(incidents.c.closed_at.desc(), incidents.c.id.desc())
        .limit(most + 1)
        .subquery()
    )
    number = func.coalesce(func.sum(looked.c.number), 0)
    row = (await connection.execute(select(func.count(), number).select_from(looked))).one()
    return min(row[1], most), row[0] <= most


async def opened_since(
    connection: AsyncConnection, since: datetime, like: Like, most: int
) -> Sequence[Row[datetime, datetime | None]]:
    """When the newest `most` of the incidents like this were opened and closed, of those that were
    opened since an instant.
    """
    query = listing(most, like=like).where(incidents.c.opened_at >= since)
    times = query.with_only_columns(incidents.c.opened_at, incidents.c.closed_at)
    return (await connection.execute(times)).all()


async def find(connection: AsyncConnection, incident: str) -> Row[Any] | None:
    """The row of an incident, by its id, or by the last digits of the id of an open one; None if
    there is none.
    """
    if _ID.fullmatch(incident):
        return (
            await connection.execute(select(incidents).where(incidents.c.id == incident))
        ).first()
    if not _END.fullmatch(incident):
        return None
    ending = [row for row in await are_open(connection) if row.id.endswith(incident)]
    return ending[0] if len(ending) == 1 else None


async def prune(connection: AsyncConnection, before: datetime) -> int:
    """Delete the incidents that were closed before. Returns how many."""
    return (
        await connection.execute(delete(incidents).where(incidents.c.closed_at < before))
    ).rowcount


def ids_of(rows: Sequence[Row[Any]]) -> list[str]:
    """The ids of these rows."""
    return [row.id for row in rows]
