"""What makes a failed run good: its own success, a success of the same slot, or any later success
if each run does the same work.

Acknowledging a failure is different, and does not make it good.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Row, text
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.execution.fingerprint import QUARANTINE
from batch_system.batch.ledger import json_rows
from batch_system.batch.ledger.run_rows import NEWEST_FIRST, run_rows
from batch_system.batch.ledger.states import ACTIVE, RunState
from batch_system.batch.ledger.tables import NO_PART_SQL, OPEN_FAILURE_SQL, runs

MOST = 1_000
"""The most open failures of a task, and successes of it, that are compared at a time."""

MOST_AROUND = 100
"""How many runs of a task are searched for a success before or after a failure."""

MARGIN = timedelta(seconds=30)
"""Rows of a transaction that is still open during a look become visible at most this much later."""


class Successes:
    """For each task with open failures, the creation instant up to which its runs were searched for
    successes.
    """

    def __init__(self) -> None:
        self._looked_until: dict[str, datetime] = {}

    async def find(
        self, connection: AsyncConnection, task: str, since: datetime, now: datetime
    ) -> list[Row[Any]]:
        """The successes of a task that no earlier call has returned, the newest first. `since`: the
        oldest open failure.
        """
        begin = max(since, self._looked_until.get(task, since))
        query = (
            run_rows(_COLUMNS, runs.c.task == task, runs.c.created_at >= begin, NO_PART_SQL)
            .order_by(*NEWEST_FIRST)
            .limit(MOST)
        )
        rows = (await connection.execute(query)).all()
        active = [row.created_at for row in rows if row.state in ACTIVE]
        self._looked_until[task] = min([now - MARGIN, *active])
        return [row for row in rows if row.state == RunState.SUCCEEDED and row.fingerprint is None]

    def forget(self, task: str) -> None:
        """Search all successes again, because one of them may make a new failure of the task
        good.
        """
        self._looked_until.pop(task, None)


_COLUMNS = (
    "id",
    "task",
    "slot",
    "origin",
    "state",
    "params",
    "created_at",
    "finished_at",
    "fingerprint",
)


async def open_failures(connection: AsyncConnection, task: str) -> Sequence[Row[Any]]:
    """The failed runs of a task that are neither made good nor acknowledged, the oldest first."""
    query = (
        run_rows(_COLUMNS, runs.c.task == task, OPEN_FAILURE_SQL)
        .order_by(runs.c.fingerprint, runs.c.finished_at)
        .limit(MOST)
    )
    return (await connection.execute(query)).all()


async def newest_failures(
    connection: AsyncConnection, errors: Iterable[tuple[str, str]]
) -> dict[tuple[str, str], Row[Any]]:
    """The open failure of each of these errors that has ended last, with its `reason`. `errors`:
    tasks and fingerprints.
    """
    asked = [{"task": task, "fingerprint": fingerprint} for task, fingerprint in errors]
    if not asked:
        return {}
    kind = connection.dialect.name
    columns = [runs.c.task, runs.c.fingerprint]
    is_open = " AND ".join(f"r.{part}" for part in OPEN_FAILURE_SQL.split(" AND "))
    query = text(
        f"SELECT n.task, n.fingerprint, n.id, n.reason FROM {json_rows.source(columns, kind)} "
        "CROSS JOIN batch_runs n WHERE n.id = (SELECT r.id FROM batch_runs r WHERE r.task = v.task "
        f"AND r.fingerprint = v.fingerprint AND {is_open} ORDER BY r.finished_at DESC LIMIT 1)"
    ).columns(*columns, runs.c.id, runs.c.reason)
    rows = await connection.execute(query, {"rows": json_rows.encode(asked, kind)})
    return {(row.task, row.fingerprint): row for row in rows}


async def successes_since(
    connection: AsyncConnection, task: str, since: datetime, most: int
) -> int:
    """How many of the newest runs of a task have ended with success after `since`, counted up to
    `most`.
    """
    newest = run_rows(("state", "finished_at"), runs.c.task == task, NO_PART_SQL)
    rows = await connection.execute(newest.order_by(*NEWEST_FIRST).limit(MOST))
    good = [row for row in rows if row.state == RunState.SUCCEEDED and row.finished_at > since]
    return min(len(good), most)


async def successes_around(
    connection: AsyncConnection,
    failures: Collection[tuple[str, str, datetime | None, datetime | None]],
) -> dict[tuple[str, str], tuple[datetime | None, datetime | None]]:
    """When tasks last ended with success after their last failure, and before their first one; None
    if they did not.

    `failures`: a task, a fingerprint, and when this error occurred last and first. Of each task, up
    to 100 of the newest runs and 100 of those before the first failure are read. Returns the
    instants by task and fingerprint.
    """
    kind = connection.dialect.name
    names = ("task", "fingerprint", "finished_at", "started_at")
    columns = [runs.c[name] for name in names]
    success = (
        "SELECT max(finished_at) FROM (SELECT r.state, r.finished_at FROM batch_runs r "
        "WHERE r.task = v.task "
    )
    success += f"AND r.{NO_PART_SQL}"
    newest = (
        f"ORDER BY r.created_at DESC, r.id DESC LIMIT {MOST_AROUND}) AS newest "
        "WHERE state = 'succeeded'"
    )
    query = text(
        f"SELECT v.task, v.fingerprint, ({success} {newest} "
        "AND finished_at > v.finished_at) AS finished_at, "
        f"({success} AND r.created_at < v.started_at {newest}) AS started_at "
        f"FROM {json_rows.source(columns, kind)}"
    ).columns(*columns)
    rows = json_rows.encode([dict(zip(names, failure, strict=True)) for failure in failures], kind)
    found = await connection.execute(query, {"rows": rows})
    return {(row.task, row.fingerprint): (row.finished_at, row.started_at) for row in found}


def matches(
    failures: Sequence[Row[Any]], successes: Sequence[Row[Any]], each_slot_counts: bool
) -> dict[str, str]:
    """Which success makes which failed run good, as ids. It is the first success that ended after
    the failure.

    Call it in a thread: there may be a thousand of both.
    """
    by_work: dict[object, list[Row[Any]]] = defaultdict(list)
    for success in sorted(successes, key=_finished_at):
        for work in _works(success, each_slot_counts):
            by_work[work].append(success)
    made_good: dict[str, str] = {}
    for failure in failures:
        if (
            failure.fingerprint == QUARANTINE
            or failure.finished_at is None
            or failure.state in ACTIVE
        ):
            continue
        firsts = [
            _first_after(by_work.get(work, ()), failure)
            for work in _works(failure, each_slot_counts)
        ]
        if found := [success for success in firsts if success is not None]:
            made_good[failure.id] = min(found, key=_finished_at).id
    return made_good


def _works(run: Row[Any], each_slot_counts: bool) -> Iterator[object]:
    """The work of the run: its slot; also its parameters, if all runs of the task with the same
    ones do the same work.
    """
    if run.slot is not None:
        yield run.slot
    if not each_slot_counts:
        yield json.dumps(run.params or {}, sort_keys=True)


def _first_after(successes: Sequence[Row[Any]], failure: Row[Any]) -> Row[Any] | None:
    """`successes`: in the order in which they ended."""
    first = bisect_left(successes, failure.finished_at, key=_finished_at)
    return next((each for each in successes[first : first + 2] if each.id != failure.id), None)


def _finished_at(run: Row[Any]) -> datetime:
    at: datetime = run.finished_at
    return at
