"""What a search finds. Each statement reads a bounded number of rows, whatever the ledger has."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Text, and_, case, cast, func, or_, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.cron.cron import schedule
from batch_system.batch.ledger import calendars, database_time, json_rows, run_ids, run_query
from batch_system.batch.ledger.incidents.tables import OPEN_SQL, incidents
from batch_system.batch.ledger.run_query import Number, RunQuery
from batch_system.batch.ledger.states import IncidentKind, RunState
from batch_system.batch.ledger.tables import schedules, tasks
from batch_system.errors import BatchError
from batch_system.operations.asking.context import Context
from batch_system.operations.asking.filter import RunFilter
from batch_system.operations.asking.results import RunSummary
from batch_system.operations.people.redacting import (
    hidden_tasks,
    refuse_secret_filter,
    without_texts,
)
from batch_system.operations.runs.listing import query_of, tasks_of

LOOKED = 1_000
"""Runs are looked for among this many of the newest ones that an index finds."""
MOST_IDS = 10_000
"""The end of an id is looked for among this many of the newest runs while a person is typing."""
MOST_OPEN = 500
"""At most this many open incidents are read."""


@dataclass(frozen=True)
class FoundTask:
    """`words`: its schedule. `incident`: the oldest open one of failures, else of anything."""

    name: str
    tags: Sequence[str]
    is_paused: bool
    words: str | None = None
    incident: FoundIncident | None = None


@dataclass(frozen=True)
class FoundIncident:
    id: str
    kind: IncidentKind
    task: str
    opened_at: datetime
    is_acknowledged: bool


async def find_tasks(
    connection: AsyncConnection, words: Collection[str], limit: int
) -> Sequence[FoundTask]:
    """The tasks that have each of these words, in small letters, in the name or as a tag.

    First comes the one with exactly this name, then those that need a person, then those whose name
    begins with the first word.
    """
    if not words:
        return []
    first, name = next(iter(words)), func.lower(tasks.c.name)
    needs = tasks.c.name.in_(select(incidents.c.task).where(text(OPEN_SQL)))
    place = case((name == first, 0), (needs, 1), (name.startswith(first, autoescape=True), 2))
    query = (
        select(tasks.c.name, tasks.c.tags, tasks.c.paused_at)
        .where(tasks.c.removed_at.is_(None), *(_has(word) for word in words))
        .order_by(func.coalesce(place, 3), tasks.c.name)
        .limit(limit)
    )
    rows = (await connection.execute(query)).all()
    names = [row.name for row in rows]
    words_of = await _schedules(connection, names)
    opened = {each.task: each for each in reversed(await find_incidents(connection, names))}
    return [
        FoundTask(
            row.name,
            [tag for tag in row.tags or [] if isinstance(tag, str)],
            row.paused_at is not None,
            words_of.get(row.name),
            opened.get(row.name),
        )
        for row in rows
    ]


def _has(word: str) -> ColumnElement[bool]:
    tag = func.lower(cast(tasks.c.tags, Text)).contains(f'"{word}"', autoescape=True)
    return or_(
        func.lower(tasks.c.name).contains(word, autoescape=True),
        and_(tasks.c.tags.is_not(None), tag),
    )


async def _schedules(connection: AsyncConnection, names: Collection[str]) -> dict[str, str]:
    """The open schedules of these tasks in words. One that this version can't read is left out."""
    of_these = json_rows.is_among(schedules.c.task, names, connection.dialect.name)
    query = select(schedules.c.task, schedules.c.cron, schedules.c.timezone).where(
        schedules.c.valid_until.is_(None), of_these
    )
    found = {}
    rows = list(await connection.execute(query))
    await calendars.read(connection, (row.cron for row in rows))
    for task, cron, timezone in rows:
        try:
            found[task] = schedule(cron, timezone).words
        except BatchError:
            continue
    return found


async def find_incidents(
    connection: AsyncConnection, of: Collection[str] | None = None
) -> Sequence[FoundIncident]:
    """The open incidents of these tasks, or of all: those of failures first, then the oldest."""
    columns = ("id", "kind", "task", "opened_at", "acknowledged_at")
    query = select(*(incidents.c[name] for name in columns)).where(
        text(OPEN_SQL), incidents.c.task != ""
    )
    if of is not None:
        query = query.where(json_rows.is_among(incidents.c.task, of, connection.dialect.name))
    found = [
        FoundIncident(
            row.id, IncidentKind(row.kind), row.task, row.opened_at, row.acknowledged_at is not None
        )
        for row in await connection.execute(query.limit(MOST_OPEN))
    ]
    # Sorted here: with an ORDER BY, SQLite might read all incidents by the index on their openings.
    return sorted(
        found, key=lambda each: (each.kind != IncidentKind.FAILED, each.opened_at, each.id)
    )


async def find_runs(
    connection: AsyncConnection, digits: str, limit: int, most: int
) -> Sequence[dict[str, Any]]:
    """The runs whose id begins with these hex digits, or else ends in them: `most` is how many of
    the newest ones are looked at for that.
    """
    found = await run_ids.begin_with(connection, digits, limit)
    return found or await run_ids.end_in(connection, digits, limit, most)


async def _query(connection: AsyncConnection, context: Context, wanted: RunFilter) -> RunQuery:
    """Texts and parameters that the caller may not see do not find a run."""
    refuse_secret_filter(context, wanted)
    query = query_of(wanted, await tasks_of(connection, wanted))
    are_few = query.states and RunState.SUCCEEDED not in query.states
    if query.task is not None and are_few and query.fingerprint is None:
        # There are fewer runs of such states than of a task, and still fewer of an error.
        query = replace(query, task=None, tasks=frozenset((query.task,)))
    if query.reads_texts:
        hidden = await hidden_tasks(connection, context)
        query = replace(query, without=query.without | hidden)
    return query


async def number_of(connection: AsyncConnection, context: Context, wanted: RunFilter) -> Number:
    """How many runs are like this. Raises InvalidParameters for a filter by a secret value."""
    return await run_query.number(connection, await _query(connection, context, wanted), LOOKED)


async def newest_of(
    connection: AsyncConnection, context: Context, wanted: RunFilter, limit: int
) -> Sequence[RunSummary]:
    """The newest runs that are like this, as the caller may see them."""
    query = await _query(connection, context, wanted)
    rows = (await run_query.page(connection, query, limit, most=LOOKED)).rows
    now = await database_time.now_of(connection)
    hidden = await hidden_tasks(connection, context)
    return without_texts([RunSummary.at(row, now) for row in rows], hidden)
