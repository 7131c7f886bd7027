"""The progress of runs: its columns, and the statement by which the node of a running run writes
it.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.ledger import json_rows
from service.batch.ledger.tables import runs

PROGRESS_COLUMNS = ("count", "total", "count_before", "message", "progress_at")
PROGRESS = (
    "total = CASE WHEN v.count IS NULL THEN batch_runs.total ELSE v.total END, "
    "count = coalesce(v.count, batch_runs.count), "
    "count_before = coalesce(v.count_before, batch_runs.count_before), "
    "message = CASE WHEN v.count_before IS NULL THEN batch_runs.message ELSE v.message END, "
    "progress_at = coalesce(v.progress_at, batch_runs.progress_at)"
)
"""The SET clause for progress. Columns without a new value stay; `count_before` is NULL if nothing
was reported.
"""

IS_RUNNING = "coalesce(batch_runs.state, '') = 'running'"
"""The condition that a run is running, for statements that join many runs by their ids.

The state must not drive the join, which would take quadratic time: SQLite would use the index on
states, and PostgreSQL compare all pairs of rows, where its statistics are from a moment at which no
run was running.
"""


async def mirror(connection: AsyncConnection, progress: list[dict[str, Any]]) -> None:
    """Write the progress of running runs. `progress`: `id`, `fence`, `rate` and PROGRESS_COLUMNS of
    each run.
    """
    if not progress:
        return
    kind = connection.dialect.name
    columns = [runs.c[name] for name in ("id", "fence", "rate", *PROGRESS_COLUMNS)]
    statement = text(
        f"UPDATE batch_runs SET {PROGRESS}, rate = v.rate FROM {json_rows.source(columns, kind)} "
        f"WHERE batch_runs.id = v.id AND batch_runs.fence = v.fence AND {IS_RUNNING}"
    )
    await connection.execute(statement, {"rows": json_rows.encode(progress, kind)})
