"""How long the runs of a task usually take, and when one last succeeded. Computed, then kept for
ten minutes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import cache

from sqlalchemy import TextClause, case, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger import json_rows
from batch_system.batch.ledger.parts import is_split
from batch_system.batch.ledger.states import RunState
from batch_system.batch.ledger.tables import NO_PART_SQL, durations, runs, tasks
from batch_system.database import sql
from batch_system.database.engine import whole_tables

LAST = 100
"""How many of the last successes count."""
LOOKED = (2 * LAST, 1_000)
"""How many of the newest runs of a task are read; the larger number if too few of the first have
succeeded.
"""
FRESH = timedelta(minutes=10)
"""How long computed values are used again."""


@dataclass(frozen=True)
class Durations:
    """How long the last successes of a task took, in seconds; None without a success. `runs`: the
    number of these successes.

    `last_success_at`: when a run last ended with success (UTC).
    """

    task: str
    p50: float | None
    p95: float | None
    longest: float | None
    runs: int
    last_success_at: datetime | None
    computed_at: datetime


class UsualDurations:
    """The durations of tasks at one instant, each read or computed once. `computed`: those that
    have to be kept.
    """

    def __init__(self, connection: AsyncConnection, now: datetime) -> None:
        self._connection = connection
        self._now = now
        self._known: dict[str, Durations] = {}
        self.computed: list[Durations] = []

    async def of_task(self, task: str, fresh: timedelta = FRESH) -> Durations:
        """The durations of a task, computed again if they are older than `fresh`."""
        if (known := self._known.get(task)) is not None:
            return known
        row = (
            await self._connection.execute(select(durations).where(durations.c.task == task))
        ).first()
        if row is not None and self._now - fresh < row.computed_at <= self._now:
            self._known[task] = Durations(**row._mapping)
            return self._known[task]
        before = Durations(**row._mapping) if row is not None else None
        computed = await _compute(
            self._connection, task, self._now, before.last_success_at if before else None
        )
        if (
            before is None
            or replace(before, computed_at=computed.computed_at) != computed
            or fresh == FRESH
        ):
            self.computed.append(computed)
        self._known[task] = computed
        return computed


_BEGAN_AT = case((text(is_split()), runs.c.started_at), else_=runs.c.attempt_started_at)
"""When the last attempt of a run began. For a run that was split it is the first attempt, because
the last one is only the join.
"""


async def _compute(
    connection: AsyncConnection, task: str, now: datetime, before: datetime | None
) -> Durations:
    """Compute the durations from the newest runs of a task. `before`: the last success that was
    already known.
    """
    newest = (
        select(runs.c.state, _BEGAN_AT.label("began_at"), runs.c.finished_at)
        .where(runs.c.task == task, text(NO_PART_SQL))
        .order_by(runs.c.created_at.desc(), runs.c.id.desc())
    )
    for number in LOOKED:
        rows = (await connection.execute(newest.limit(number))).all()
        ended = [
            (row.finished_at, max(0.0, (row.finished_at - row.began_at).total_seconds()))
            for row in rows
            if row.state == RunState.SUCCEEDED
            and row.finished_at is not None
            and row.began_at is not None
        ][:LAST]
        if len(ended) == LAST or len(rows) < number:
            break
    seconds = sorted(duration for _, duration in ended)
    last = max((at for at, _ in ended), default=before)
    p50, p95 = (_percentile(seconds, share) for share in (0.5, 0.95))
    return Durations(task, p50, p95, seconds[-1] if seconds else None, len(seconds), last, now)


def _percentile(seconds: list[float], share: float) -> float | None:
    """The smallest of the sorted values that is not exceeded by at least this share of them."""
    if not seconds:
        return None
    return seconds[min(len(seconds) - 1, max(0, -int(-share * len(seconds) // 1) - 1))]


async def outdated(connection: AsyncConnection, now: datetime) -> list[str]:
    """The tasks whose newest run was made or has ended since their durations were computed.

    Tasks whose durations were computed less than FRESH ago are left out.
    """
    async with whole_tables(connection):
        values = {"latest": now - FRESH, "long_ago": _LONG_AGO}
        return sorted((await connection.execute(_OUTDATED, values)).scalars())


_NEWEST = (
    "SELECT coalesce(r.finished_at, r.created_at) FROM batch_runs r WHERE r.task = t.name "
    f"AND r.{NO_PART_SQL} "
    "ORDER BY r.created_at DESC, r.id DESC LIMIT 1"
)
_COMPUTED = (
    "coalesce((SELECT d.computed_at FROM batch_durations d WHERE d.task = t.name), :long_ago)"
)
_OUTDATED = sql.statement(
    "SELECT t.name FROM batch_tasks t "
    f"WHERE t.removed_at IS NULL AND {_COMPUTED} <= :latest AND ({_NEWEST}) > {_COMPUTED}",
    long_ago=durations.c.computed_at,
    latest=durations.c.computed_at,
).columns(tasks.c.name)
_LONG_AGO = datetime(1970, 1, 1, tzinfo=UTC)


async def keep(connection: AsyncConnection, computed: Sequence[Durations]) -> None:
    """Write computed durations."""
    if computed:
        rows = json_rows.encode(map(asdict, computed), connection.dialect.name)
        await connection.execute(_upsert(connection.dialect.name), {"rows": rows})


@cache
def _upsert(kind: str) -> TextClause:
    names = [column.name for column in durations.c]
    values = ", ".join(f"{name} = excluded.{name}" for name in names if name != "task")
    return text(
        f"INSERT INTO batch_durations ({', '.join(names)}) "
        f"SELECT {', '.join(f'v.{name}' for name in names)} "
        f"FROM {json_rows.source(durations.c, kind)} WHERE true ON CONFLICT (task) DO UPDATE "
        f"SET {values}"
    )
