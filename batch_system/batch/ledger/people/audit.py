"""The audit: who changed what, when and from where. Rows are only added, in the transaction of the
change itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple

from sqlalchemy import Column, Integer, Row, Select, delete, func, select
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.sql.selectable import TextualSelect

from batch_system.batch.ledger import json_rows
from batch_system.batch.ledger.people.access_tables import events
from batch_system.batch.ledger.tables import new_id
from batch_system.database import sql

LONGEST_NOTE = 2_000
"""Longest note of a person, in characters."""


@dataclass(frozen=True)
class By:
    """Who changes something. `source`: "api", "cli", "page" or "service". `address`: where the
    request came from.
    """

    actor: str
    source: str = "service"
    role: str | None = None
    address: str | None = None


async def record(
    connection: AsyncConnection,
    by: By,
    action: str,
    now: datetime,
    *,
    task: str | None = None,
    run: str | None = None,
    target: str | None = None,
    before: Any = None,
    after: Any = None,
    note: str | None = None,
    key: str | None = None,
) -> None:
    """Add one event in the caller's transaction.

    `action`: what was done, such as "run.cancel". `before` and `after`: JSON values. `key`: an
    event with the same key is added only once.
    """
    event = {
        "id": new_id(),
        "at": now,
        "actor": by.actor,
        "role": by.role,
        "source": by.source,
        "address": by.address,
        "action": action,
        "task": task,
        "run": run,
        "target": target,
        "before": before,
        "after": after,
        "note": note,
        "key": key,
    }
    conflict = "(key) WHERE key IS NOT NULL" if key is not None else ""
    await json_rows.insert(connection, events, [event], conflict)


def listing(
    limit: int,
    before: tuple[datetime, str] | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    task: str | None = None,
    action: str | None = None,
) -> Select[Any]:
    """A query for a page of events, newest first. `before`: the (at, id) of the last event of the
    previous page.
    """
    query = select(events).order_by(events.c.at.desc(), events.c.id.desc()).limit(limit)
    if before is not None:
        at, last = before
        query = query.where((events.c.at < at) | ((events.c.at == at) & (events.c.id < last)))
    if since is not None:
        query = query.where(events.c.at >= since)
    if until is not None:
        query = query.where(events.c.at < until)
    if task is not None:
        query = query.where(events.c.task == task)
    if action is not None:
        query = query.where(events.c.action == action)
    return query


def numbers(
    most: int,
    before: tuple[datetime, str] | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    task: str | None = None,
    action: str | None = None,
) -> Select[Any]:
    """A query for how many events have each actor, source and action, among the newest `most` of
    those that `listing` finds.
    """
    of_all = listing(most, before, since, until, task, action)
    found = of_all.with_only_columns(events.c.actor, events.c.source, events.c.action).subquery()
    return select(*found.c, func.count().label("number")).group_by(*found.c)


class Asked(NamedTuple):
    """Events with one of these actions, from one instant up to another (excluded; None: up to now);
    only those of a task if one is given.
    """

    actions: tuple[str, ...]
    since: datetime
    until: datetime | None = None
    task: str | None = None


async def newest_of_each(
    connection: AsyncConnection, asked: Iterable[Asked], most: int
) -> dict[Asked, list[Row[Any]]]:
    """At most this many of the newest events of each question, in any order. There should be few
    questions.
    """
    parts = list(dict.fromkeys(asked))
    found: dict[Asked, list[Row[Any]]] = {each: [] for each in parts}
    if not parts:
        return found
    values: dict[str, Any] = {"most": most}
    for number, each in enumerate(parts):
        its = {"since": each.since, "until": each.until, "task": each.task}
        values |= {f"{name}_{number}": value for name, value in its.items() if value is not None}
    shapes = tuple((each.actions, each.until is not None, each.task is not None) for each in parts)
    for row in await connection.execute(_statement(shapes), values):
        found[parts[row.part]].append(row)
    return found


@lru_cache(maxsize=200)
def _statement(shapes: tuple[tuple[tuple[str, ...], bool, bool], ...]) -> TextualSelect:
    """A part for each question: its actions, and whether it has an end and a task. Neither database
    would otherwise stop after the newest events of one.
    """
    names = ", ".join(f'"{column.name}"' for column in events.c)
    parts: list[str] = []
    types: dict[str, Column[Any]] = {}
    for number, (actions, has_end, has_task) in enumerate(shapes):
        among = ", ".join(f"'{action}'" for action in actions)
        end = f" AND at < :until_{number}" if has_end else ""
        of_task = f" AND task = :task_{number}" if has_task else ""
        types |= {f"{name}_{number}": events.c.at for name in ("since", "until")[: 1 + has_end]}
        parts.append(
            f"SELECT * FROM (SELECT {number} AS part, {names} FROM batch_events "
            f"WHERE at >= :since_{number}{end}{of_task} AND action IN ({among}) "
            f"ORDER BY at DESC, id DESC LIMIT :most) AS part_{number}"
        )
    statement = sql.statement(" UNION ALL ".join(parts), **types)
    return statement.columns(Column("part", Integer), *events.c)


async def newest(connection: AsyncConnection, action: str) -> Mapping[Any, Any] | None:
    """The newest event with this action; None if there is none."""
    rows: Sequence[Mapping[Any, Any]] = (
        (await connection.execute(listing(1, action=action))).mappings().all()
    )
    return rows[0] if rows else None


async def prune(connection: AsyncConnection, before: datetime, limit: int) -> int:
    """Delete at most `limit` events that are older. Returns how many."""
    old = (
        select(events.c.id)
        .where(events.c.at < before)
        .order_by(events.c.at, events.c.id)
        .limit(limit)
    )
    return (await connection.execute(delete(events).where(events.c.id.in_(old)))).rowcount
