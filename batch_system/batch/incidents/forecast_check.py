"""The incident of a deadline in danger, for tasks that ask for it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime

from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.incidents import promises
from batch_system.batch.incidents.forecast import Forecast, forecasts
from batch_system.batch.incidents.forecast_telling import Words
from batch_system.batch.incidents.watched import UTC_ZONE, WatchedTask
from batch_system.batch.ledger.incidents.incidents import Opening
from batch_system.batch.ledger.states import IncidentKind
from batch_system.concurrency.offload import offload


async def at_risk(
    connection: AsyncConnection, watched: Mapping[str, WatchedTask], now: datetime
) -> tuple[list[Opening], datetime | None]:
    """An incident for each task that asks for it and has a deadline ahead that will be missed, or
    is at risk; and when there is more to look at.

    When the deadline has passed, the incident of the missed deadline follows.
    """
    meant = [task for task in watched.values() if task.warns_at_risk]
    if not meant:
        return [], None
    asked = await promises.read(connection, meant, now, now)
    found = await offload(forecasts, asked.facts, asked.promises)
    by_task: dict[str, list[Forecast]] = {}
    for each in found:
        if each.state in ("late", "at_risk") and not each.path[-1].is_over:
            by_task.setdefault(each.promise.task, []).append(each)
    secret = {task.name for task in watched.values() if task.is_secret}
    return [_opening(theirs, secret, now) for theirs in by_task.values()], asked.next_at


def _opening(theirs: Sequence[Forecast], secret: Collection[str], now: datetime) -> Opening:
    first, words = theirs[0], Words(now, UTC_ZONE)
    others = f"; {len(theirs) - 1:,} later ones as well" if len(theirs) > 1 else ""
    why = words.detail(first, has_progress=not any(step.task in secret for step in first.path))
    run = next((step.run.id for step in first.path if step.obstacle and step.run), None)
    return Opening(
        IncidentKind.AT_RISK,
        f"{words.title(first)} (UTC){others}{f'. {why}' if why else ''}",
        now,
        task=first.promise.task,
        count=len(theirs),
        newest_run=run,
        details={"slots": [each.promise.slot.isoformat() for each in theirs[:20]]},
    )
