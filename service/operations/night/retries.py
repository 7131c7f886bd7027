"""How far the retries of the runs of a need are, by the preview that a person has begun."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.ledger import json_rows
from service.batch.ledger.people import previews
from service.batch.ledger.states import ACTIVE, RunState
from service.batch.ledger.tables import runs
from service.concurrency.offload import offload
from service.operations.night.models import Need, RetryProgress

MOST_BULKS = 100
"""The newest bulks that are looked at."""
MOST_RUNS = 1_000
"""Retries of more runs are not followed here: the page of the bulk says how many are queued."""


async def with_progress(
    connection: AsyncConnection, needs: Sequence[Need], now: datetime
) -> list[Need]:
    """The needs; those whose runs are being retried together say how far that is."""
    retried = {need.incident for need in needs if need.retrying and need.incident is not None}
    if not retried:
        return list(needs)
    by_incident: dict[str, Mapping[Any, Any]] = {}
    for bulk in await previews.begun(connection, "retry", now, MOST_BULKS):
        incident = bulk["request"].get("incident")
        if incident in retried and bulk["count"] <= MOST_RUNS:
            by_incident.setdefault(incident, bulk)
    progress = {
        incident: await _progress(connection, bulk) for incident, bulk in by_incident.items()
    }
    return [
        need.model_copy(update={"progress": progress[need.incident]})
        if need.incident in progress
        else need
        for need in needs
    ]


async def _progress(connection: AsyncConnection, bulk: Mapping[Any, Any]) -> RetryProgress:
    ids = await offload(
        previews.unpack, await previews.packed_ids(connection, bulk["id"]), 0, bulk["count"]
    )
    theirs = json_rows.is_among(runs.c.id, ids, connection.dialect.name)
    rows = await connection.execute(select(runs.c.state, runs.c.finished_at).where(theirs))
    counts = Counter(_place(state, finished_at, bulk["started_at"]) for state, finished_at in rows)
    return RetryProgress(
        total=bulk["count"], done=counts["done"], failed=counts["failed"], left=counts["left"]
    )


def _place(state: str, finished_at: datetime | None, begun_at: datetime) -> str:
    """Where a run of the bulk stands. One that ended before the begin is not queued yet."""
    if state in ACTIVE or finished_at is None or finished_at < begun_at:
        return "left"
    return {RunState.SUCCEEDED: "done", RunState.FAILED: "failed"}.get(RunState(state), "other")
