"""The skipped slots of a window: by the run that was in the way, or by what they have waited for in
vain.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger import chains
from batch_system.batch.ledger.run_rows import run_rows
from batch_system.batch.ledger.states import Origin
from batch_system.batch.ledger.tables import SKIPPED_SQL, runs
from batch_system.batch.ledger.waits import AwaitedSlot
from batch_system.operations.night.results import DidNotRun
from batch_system.operations.runs.awaited import shown_cause

MOST_SLOTS = 10_000

_ID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_RUN = re.compile(rf"\brun {_ID.pattern}( of slot [-0-9]{{10}} [:0-9]{{8}} UTC)?")
"""How a reason names a run. Without the run, slots skipped because of one slow task have one
reason.
"""
_OTHERS = re.compile(r" \(and \d+ more\)")


class Key(NamedTuple):
    """What skipped slots that are reported together have in common. `after`, `state`: the task and
    the state of the run that was in the way of closed ones.
    """

    task: str
    reason: str
    is_closed: bool
    after: str
    state: str


async def by_reason(
    connection: AsyncConnection, since: datetime, until: datetime, hidden: frozenset[str]
) -> list[DidNotRun]:
    """The skipped slots by task and reason, whichever runs were in the way."""
    names = ("id", "task", "reason", "origin", "gate")
    query = run_rows(names, SKIPPED_SQL, runs.c.slot >= since, runs.c.slot < until)
    rows = [
        row
        for row in await connection.execute(query.limit(MOST_SLOTS))
        if row.origin != Origin.MANUAL
    ]
    found = await chains.in_the_way(connection, [row.id for row in rows if row.gate is not None])
    slots: Counter[Key] = Counter()
    in_the_way: dict[Key, set[str]] = defaultdict(set)
    causes: dict[Key, AwaitedSlot] = {}
    for row in rows:
        cause = chains.root(found, row.id) if row.gate is not None else None
        key = _key(row, cause)
        slots[key] += 1
        in_the_way[key].update(_ID.findall(row.reason or ""))
        if cause is not None:
            causes[key] = cause
    return [
        _told(key, number, in_the_way[key], causes, hidden) for key, number in sorted(slots.items())
    ]


def _without_id(run: re.Match[str]) -> str:
    return "a run of an earlier slot" if run[1] else "another run"


def _key(row: Row[Any], cause: AwaitedSlot | None) -> Key:
    reason = _OTHERS.sub("", _RUN.sub(_without_id, row.reason or ""))
    if cause is None:
        return Key(row.task, reason, row.gate is not None, "", "")
    return Key(row.task, "", True, cause.task, cause.state or "")


def _told(
    key: Key,
    number: int,
    in_the_way: set[str],
    causes: Mapping[Key, AwaitedSlot],
    hidden: frozenset[str],
) -> DidNotRun:
    return DidNotRun(
        cause="after" if key.is_closed else "overlap",
        task=key.task,
        reason=None if key.task in hidden else key.reason or None,
        run=min(in_the_way) if len(in_the_way) == 1 and not key.is_closed else None,
        slots=number,
        tasks={},
        after=shown_cause(causes.get(key)),
    )
