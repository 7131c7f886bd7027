"""Reads runs that are to be compared: the last good one, and what the ledger knows of a run and of
the process that executed it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from sqlalchemy import Row, select
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger import attempts as attempt_rows
from batch_system.batch.ledger import nodes as node_rows
from batch_system.batch.ledger import run_logs
from batch_system.batch.ledger.people.access_tables import events
from batch_system.batch.ledger.run_logs import LogLine
from batch_system.batch.ledger.run_rows import NEWEST_FIRST, run_rows
from batch_system.batch.ledger.states import RunState
from batch_system.batch.ledger.tables import NO_PART_SQL, durations, runs
from batch_system.operations.why.log_kinds import FROM_EACH_END
from batch_system.operations.why.results import Side

SEARCHED = (50, 5_000)
"""A success is searched for in at most this many runs before the first failure; in the larger
number if it is not among the first.
"""
MOST_STARTS = 200
"""The start of a node is searched for in at most this many of the starts before the run."""
START = timedelta(minutes=1)
"""A node may execute a run before its start is in the audit."""

_COLUMNS = (
    "id",
    "task",
    "slot",
    "state",
    "params",
    "node",
    "count",
    "created_at",
    "attempt_started_at",
    "finished_at",
)


class Compared(NamedTuple):
    """A run, with what the ledger knows of the process that executed it last."""

    row: Row[Any]
    side: Side
    versions: Mapping[str, Any]
    settings: Mapping[str, Any] | None
    log: Sequence[LogLine]

    @property
    def began_at(self) -> datetime:
        """When its last attempt began, or when it was made."""
        return self.side.started_at or self.side.created_at


async def last_good(connection: AsyncConnection, task: str, before: datetime) -> str | None:
    """The newest run of a task that was made before an instant and has succeeded; None if there is
    none among the runs that are searched.
    """
    for most in SEARCHED:
        if (found := await _newest_success(connection, task, before, most)) is not None:
            return found
    # So many others lie in between. The durations know when the task succeeded last.
    known = select(durations.c.last_success_at).where(durations.c.task == task)
    at: datetime | None = (await connection.execute(known)).scalar()
    if at is None or at >= before:
        return None
    return await _newest_success(connection, task, at, SEARCHED[-1])


async def _newest_success(
    connection: AsyncConnection, task: str, before: datetime, most: int
) -> str | None:
    newest = run_rows(
        ("id", "state", "fingerprint", "created_at"),
        runs.c.task == task,
        runs.c.created_at < before,
        NO_PART_SQL,
    )
    newest = newest.order_by(*NEWEST_FIRST).limit(most)
    searched = newest.subquery()
    query = (
        select(searched.c.id)
        .where(searched.c.state == RunState.SUCCEEDED, searched.c.fingerprint.is_(None))
        .order_by(searched.c.created_at.desc(), searched.c.id.desc())
        .limit(1)
    )
    found: str | None = (await connection.execute(query)).scalar()
    return found


async def compared(connection: AsyncConnection, run: str, is_bad: bool = False) -> Compared | None:
    """A run, by its last attempt. `is_bad`: by its last attempt that did not succeed, because a
    retry may have succeeded since.
    """
    row = (await connection.execute(run_rows(_COLUMNS, runs.c.id == run))).first()
    if row is None:
        return None
    ended = await attempt_rows.of_run(connection, run)
    bad = [each for each in ended if each["outcome"] != RunState.SUCCEEDED] if is_bad else []
    last = bad[-1] if bad else ended[-1] if ended else None
    node = last["node"] if last is not None else row.node
    began = last["started_at"] if last is not None else row.attempt_started_at
    over = last["ended_at"] if last is not None else row.finished_at
    known = await node_rows.get(connection, node) if node is not None else None
    start = await _start_of(connection, node, (began or row.created_at) + START) if node else None
    versions = mapping_of((start or {}).get("versions"))
    if not versions and known is not None:
        versions = {"application": known["application"], "package": known["version"]}
    fences = [
        each
        for each in await run_logs.fences(connection, run)
        if not is_bad or last is None or each.fence == last["fence"]
    ]
    side = Side.of(
        row._mapping,
        run=run,
        started_at=began,
        finished_at=over,
        seconds=(over - began).total_seconds() if over is not None and began is not None else None,
        version=versions.get("application") or versions.get("package"),
        host=known["host"] if known is not None else None,
        lines=sum(each.lines for each in fences),
    )
    settings = (start or {}).get("settings")
    settings = settings if isinstance(settings, Mapping) else None
    return Compared(
        row, side, versions, settings, await run_logs.ends(connection, run, fences, FROM_EACH_END)
    )


async def _start_of(
    connection: AsyncConnection, node: str, until: datetime
) -> Mapping[str, Any] | None:
    """What the audit says about the start of a node: its versions and settings; None if it says
    nothing. Rows of nodes are deleted sooner.
    """
    starts = (
        select(events.c.id, events.c.target)
        .where(events.c.action == "service.start", events.c.at <= until)
        .order_by(events.c.at.desc(), events.c.id.desc())
        .limit(MOST_STARTS)
    )
    found = [row.id for row in await connection.execute(starts) if row.target == node]
    if not found:
        return None
    after = (
        await connection.execute(select(events.c.after).where(events.c.id == found[0]))
    ).scalar()
    return mapping_of(after)


def mapping_of(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
