"""Who retried or backfilled runs before incidents were made good, for the list of incidents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row

from batch_system.batch.ledger.people import audit
from batch_system.batch.ledger.people.audit import Asked
from batch_system.operations.asking.context import Context
from batch_system.operations.incidents.results import Incident
from batch_system.operations.people.redacting import hidden_tasks

OF_A_TASK = ("run.retry", "run.retry_from_the_beginning", "task.backfill")
OF_MANY = ("bulk.retry", "bulk.backfill")
MOST_EVENTS = 50
"""At most this many events are read for each incident, and of bulks: the newest."""


@dataclass(frozen=True)
class Mender:
    """What a person did last: retried so many runs, or backfilled so many slots."""

    by: str
    number: int
    is_backfill: bool
    note: str | None


async def menders(context: Context, listed: Sequence[Incident]) -> dict[str, Mender]:
    """Who mended those of these incidents that were made good after a person had done something, by
    the id of the incident.
    """
    good = [each for each in listed if each.closed_why == "made_good" and each.task is not None]
    if not good:
        return {}
    asked = {each.id: Asked(OF_A_TASK, each.opened_at, each.closed_at, each.task) for each in good}
    bulks = Asked(OF_MANY, min(each.opened_at for each in good))
    async with context.databases.reading() as connection:
        if connection is None:
            return {}
        hidden = await hidden_tasks(connection, context)
        found = await audit.newest_of_each(connection, [*asked.values(), bulks], MOST_EVENTS)
    mended = {}
    for each in good:
        theirs = [event for event in found[bulks] if _is_about(event, each)]
        if events := [*found[asked[each.id]], *theirs]:
            mended[each.id] = _mender(events, is_hidden=each.task in hidden)
    return mended


def _is_about(bulk: Row[Any], incident: Incident) -> bool:
    """Whether a bulk was for the task of the incident alone, while this was open."""
    request = (bulk.after or {}).get("request") or {}
    is_meanwhile = incident.closed_at is None or bulk.at < incident.closed_at
    return incident.opened_at <= bulk.at and is_meanwhile and request.get("task") == incident.task


def _mender(events: Sequence[Row[Any]], *, is_hidden: bool) -> Mender:
    """What the person of the newest event did in all."""
    newest = max(events, key=lambda event: (event.at, event.id))
    is_backfill = newest.action.endswith("backfill")
    same = [
        event
        for event in events
        if event.actor == newest.actor and event.action.endswith("backfill") == is_backfill
    ]
    number = sum(_number(event) for event in same)
    return Mender(newest.actor, number, is_backfill, None if is_hidden else newest.note)


def _number(event: Row[Any]) -> int:
    """How many runs or slots an event is about."""
    after = event.after or {}
    if event.action == "task.backfill":
        return int(after["new"]) + int(after["again"])
    return int(after["count"]) if event.action in OF_MANY else 1
