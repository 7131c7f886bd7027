"""Changes: the audit, which says who changed what, when, and from where."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import Row

from batch_system.batch.ledger.people import audit
from batch_system.escaping import shortened
from batch_system.operations.asking.context import Context
from batch_system.operations.asking.cursors import cursor_of, parse_cursor
from batch_system.operations.people.redacting import hidden_tasks, hides_change
from batch_system.operations.people.results import (
    MOST_CHANGES,
    MOST_COUNTED,
    Change,
    ChangeCount,
    ChangeCounts,
    ChangeKind,
    ChangePage,
)

LONGEST_VALUE = 2_000
"""The longest JSON of a value before or after a change, in characters."""
_KIND_OF: Mapping[str, ChangeKind] = {
    "service": "deploys",
    "node": "deploys",
    "database": "deploys",
    "settings": "settings",
    "schedule": "settings",
    "task.change": "settings",
    "run.acknowledge": "acknowledged",
    "bulk.acknowledge": "acknowledged",
    "bulk.reopen": "acknowledged",
    "incident": "acknowledged",
    "run": "runs",
    "bulk": "runs",
    "slots": "runs",
    "task.backfill": "runs",
    "task": "pauses",
    "maintenance": "pauses",
}
"""The kind of an action, or of all actions whose name begins with this word."""


def kind_of(action: str) -> ChangeKind:
    """The kind of an action of the audit, which may be one of another version."""
    return _KIND_OF.get(action) or _KIND_OF.get(action.partition(".")[0]) or "access"


def _short(row: Mapping[Any, Any]) -> dict[str, Any]:
    return {
        **row,
        "before": shortened(row["before"], LONGEST_VALUE),
        "after": shortened(row["after"], LONGEST_VALUE),
    }


def _shown(change: Change, hidden: frozenset[str]) -> Change:
    """The event as the caller may see it. `hidden`: tasks whose parameters are hidden."""
    if not hides_change(change.action, change.task, hidden):
        return change
    return change.model_copy(update={"before": None, "after": None, "note": None})


async def list_changes(
    context: Context,
    limit: int = 50,
    after: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    task: str | None = None,
    action: str | None = None,
    with_counts: bool = False,
) -> ChangePage:
    """A page of at most `limit` events from `since` (aware, included) to `until` (excluded).

    Raises InvalidParameters for a cursor that no page has given.
    """
    limit = min(limit, MOST_CHANGES)
    before = parse_cursor(after) if after is not None else None
    async with context.databases.reading() as connection:
        if connection is None:
            return ChangePage(changes=[], after=None)
        query = audit.listing(limit + 1, before, since, until, task, action)
        rows = (await connection.execute(query)).mappings().all()
        hidden = await hidden_tasks(connection, context)
        counts = None
        if with_counts:
            counting = audit.numbers(MOST_COUNTED, before, since, until, task, action)
            counts = _counts((await connection.execute(counting)).all())
    changes = [_shown(Change.of(_short(row)), hidden) for row in rows[:limit]]
    key = cursor_of((changes[-1].at, changes[-1].id)) if len(rows) > limit else None
    return ChangePage(changes=changes, after=key, counts=counts)


def _counts(rows: Iterable[Row[Any]]) -> ChangeCounts:
    numbers: Counter[tuple[str | None, ChangeKind]] = Counter()
    for row in rows:
        who = row.actor if row.source != "service" else None
        numbers[who, kind_of(row.action)] += row.number
    in_order = sorted(numbers.items(), key=lambda each: (-each[1], each[0][1], each[0][0] or ""))
    return ChangeCounts(
        by=[ChangeCount(who=who, kind=kind, number=number) for (who, kind), number in in_order],
        has_all=numbers.total() < MOST_COUNTED,
    )
