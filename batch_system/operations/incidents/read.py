"""Reads incidents: lists them, shows one, and finds those that form one problem with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import cache
from statistics import median_low
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from sqlalchemy import Select, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.incidents import problem as one_error
from batch_system.batch.incidents.watched import owned_by
from batch_system.batch.ledger import chains, database_time, json_rows
from batch_system.batch.ledger.incidents import incidents, outbox
from batch_system.batch.ledger.incidents.incidents import Like
from batch_system.batch.ledger.incidents.tables import OPEN_SQL
from batch_system.batch.ledger.incidents.tables import incidents as incident_table
from batch_system.batch.ledger.states import CLOSE_BY_THEMSELVES, OF_RUNS, IncidentKind
from batch_system.errors import UnknownIncident
from batch_system.escaping import echoed
from batch_system.operations.asking.context import Context
from batch_system.operations.asking.cursors import cursor_of, parse_cursor
from batch_system.operations.asking.results import KeptBack
from batch_system.operations.incidents import open_failures
from batch_system.operations.incidents.results import (
    MOST_INCIDENTS,
    Incident,
    IncidentDetails,
    IncidentPage,
    Message,
    MessagePage,
)
from batch_system.operations.people.redacting import hidden_tasks

COUNTED = 1_000
"""Incidents are counted up to this number."""
LATELY = timedelta(days=90)
NO_NUMBERS: Mapping[str, int] = MappingProxyType({})


class Numbers(NamedTuple):
    """How many of the newest COUNTED closed incidents are like this (`closed`), and whether there
    are no others; how many of these were opened within LATELY, and within how many seconds half of
    them were over; None if half of them are open.
    """

    closed: int = 0
    is_all: bool = True
    opened: int = 0
    half_over_within: float | None = None


async def list_incidents(
    context: Context,
    state: Literal["open", "closed", "all"] = "open",
    kind: IncidentKind | None = None,
    task: str | None = None,
    owner: str | None = None,
    limit: int = 50,
    after: str | None = None,
) -> IncidentPage:
    """A page of at most `limit` incidents. `owner`: only those of its tasks. Raises
    InvalidParameters for a cursor that no page has given.
    """
    limit = min(limit, MOST_INCIDENTS)
    before = parse_cursor(after) if after is not None else None
    is_open = None if state == "all" else state == "open"
    async with context.databases.reading() as connection:
        if connection is None:
            return IncidentPage(incidents=[], after=None)
        like = await _like(connection, kind, task, owner)
        query = incidents.listing(limit + 1, before, is_open=is_open, like=like)
        rows = (await connection.execute(query)).all()
        hidden = await hidden_tasks(connection, context)
        numbers = await open_runs_of(connection, rows)
    listed = [shown(row, hidden, numbers) for row in rows[:limit]]
    key = cursor_of((listed[-1].opened_at, listed[-1].id)) if len(rows) > limit else None
    return IncidentPage(incidents=listed, after=key)


async def numbers(
    context: Context,
    kind: IncidentKind | None = None,
    task: str | None = None,
    owner: str | None = None,
) -> Numbers:
    """How many incidents like this there are."""
    async with context.databases.reading() as connection:
        if connection is None:
            return Numbers()
        like = await _like(connection, kind, task, owner)
        closed, is_all = await incidents.number_closed(connection, like, COUNTED)
        since = await database_time.now_of(connection) - LATELY
        opened = await incidents.opened_since(connection, since, like, COUNTED)
    open_for_ever = float("inf")
    seconds = [
        (row.closed_at - row.opened_at).total_seconds() if row.closed_at else open_for_ever
        for row in opened
    ]
    half = median_low(seconds) if seconds else open_for_ever
    return Numbers(closed, is_all, len(opened), half if half < open_for_ever else None)


async def _like(
    connection: AsyncConnection, kind: IncidentKind | None, task: str | None, owner: str | None
) -> Like:
    if owner is None:
        return Like(kind, task)
    names = await owned_by(connection, owner)
    among = json_rows.is_among(incident_table.c.task, sorted(names), connection.dialect.name)
    return Like(kind, task, among)


async def number_waiting(connection: AsyncConnection) -> int:
    """How many problems wait for a person: open incidents that do not close by themselves and that
    nobody has acknowledged; those with one error count once. At most MOST_INCIDENTS are read.
    """
    rows = await connection.execute(_waiting())
    return len(one_error.groups(rows, lambda row: (row.key, row.opened_at)))


@cache
def _waiting() -> Select[Any]:
    table = incident_table
    key = table.c.details[one_error.KEY].as_string().label("key")
    waits = select(key, table.c.opened_at).where(
        text(OPEN_SQL),
        table.c.acknowledged_at.is_(None),
        table.c.kind.not_in(CLOSE_BY_THEMSELVES),
    )
    return waits.limit(MOST_INCIDENTS)


async def show(context: Context, incident: str) -> IncidentDetails:
    """An incident, by its id or the end of it. Raises UnknownIncident."""
    async with context.databases.reading() as connection:
        row = await find(connection, incident)
        assert connection is not None
        hidden = await hidden_tasks(connection, context)
        error = (row.task, row.fingerprint)
        is_open = row.kind == IncidentKind.FAILED and row.closed_at is None
        kept = (await chains.kept_back_by_errors(connection, [error] if is_open else [])).get(
            error, ()
        )
        numbers = await open_runs_of(connection, [row])
    keeps_back = [KeptBack(**vars(each)) for each in kept]
    return IncidentDetails(**dict(shown(row, hidden, numbers)), keeps_back=keeps_back)


async def with_same_error(context: Context, incident: str) -> Sequence[Incident]:
    """This incident, and the open ones that form one problem with it. Raises UnknownIncident."""
    async with context.databases.reading() as connection:
        row = await find(connection, incident)
        assert connection is not None
        hidden = await hidden_tasks(connection, context)
        return [shown(each, hidden) for each in await open_failures.one_problem(connection, row)]


async def list_messages(
    context: Context,
    state: Literal["waiting", "sent", "given_up"] | None = None,
    channel: str | None = None,
    limit: int = 50,
    after: str | None = None,
) -> MessagePage:
    """A page of the messages about incidents. Raises InvalidParameters for a cursor that no page
    has given.
    """
    limit = min(limit, MOST_INCIDENTS)
    before = parse_cursor(after) if after is not None else None
    async with context.databases.reading() as connection:
        if connection is None:
            return MessagePage(messages=[], after=None)
        query = outbox.listing(limit + 1, before, state, channel)
        rows = (await connection.execute(query)).mappings().all()
    listed = [message_of(row) for row in rows[:limit]]
    key = cursor_of((listed[-1].created_at, listed[-1].id)) if len(rows) > limit else None
    return MessagePage(messages=listed, after=key)


def message_of(row: Mapping[Any, Any]) -> Message:
    """A row of the outbox as people and programs read it."""
    state = "sent" if row["sent_at"] else "given_up" if row["given_up_at"] else "waiting"
    return Message.of(row, state=state)


async def find(connection: AsyncConnection | None, incident: str) -> Any:
    """The row of an incident, by its id or the end of it. Raises UnknownIncident."""
    row = await incidents.find(connection, incident) if connection is not None else None
    if row is None:
        raise UnknownIncident(f"there is no incident {echoed(incident)}")
    return row


async def open_runs_of(connection: AsyncConnection, rows: Sequence[Any]) -> dict[str, int]:
    """The number of open runs of each of these incidents, by id. Incidents that are closed or not
    about runs are left out.
    """
    about = {
        row.id: (row.task, row.fingerprint)
        for row in rows
        if row.closed_at is None and row.kind in OF_RUNS
    }
    if not about:
        return {}
    by_key = await open_failures.incidents_by_key(connection)
    groups = await open_failures.groups(connection, by_key, {task for task, _ in about.values()})
    numbers = {(group.task, group.fingerprint): group.number for group in groups}
    return {incident: numbers.get(key, 0) for incident, key in about.items()}


def shown(row: Any, hidden: frozenset[str], open_runs: Mapping[str, int] = NO_NUMBERS) -> Incident:
    """The incident as the caller may see it. `hidden`: tasks whose texts it may not see."""
    values = dict(row._mapping)
    empty = {name: values[name] or None for name in ("task", "subject", "fingerprint")}
    error = one_error.key_in(row.details)
    unseen = (
        {"text": "", "fingerprint": None, "note": None, "error": None} if row.task in hidden else {}
    )
    return Incident.of(
        {**values, **empty, "run": values["newest_run"], "error": error, **unseen},
        open=open_runs.get(row.id),
    )
