"""The forecast of Night: which promised deadlines are kept, are in danger or will be missed, and
the path that decides it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from datetime import datetime
from zoneinfo import ZoneInfo

from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.incidents import promises
from batch_system.batch.incidents.forecast import Forecast, Step, forecasts
from batch_system.batch.incidents.forecast_telling import WORDS, Words, summary
from batch_system.batch.incidents.watched import WatchedTask
from batch_system.concurrency.offload import offload
from batch_system.operations.asking.context import Context
from batch_system.operations.night.results import MOST, Forecasts, ForecastStep, SlotForecast


async def read(
    connection: AsyncConnection,
    context: Context,
    watched: Mapping[str, WatchedTask],
    hidden: Collection[str],
    since: datetime,
    now: datetime,
    zone: ZoneInfo,
) -> Forecasts:
    """The forecast for deadlines since then. `hidden`: tasks of which only states and times are
    shown.
    """
    asked = await promises.read(connection, watched.values(), since, now, context.settings.pools)
    found = await offload(forecasts, asked.facts, asked.promises)
    numbers: Counter[str] = Counter(each.state for each in found)
    worst_first = list(WORDS)
    found.sort(
        key=lambda each: (
            worst_first.index(each.state),
            each.promise.deadline <= now,
            each.promise.deadline,
        )
    )
    words = Words(now, zone)
    return Forecasts(
        as_of=now,
        until=now + promises.AHEAD,
        zone=str(zone),
        sentence=summary({state: numbers[state] for state in WORDS}),
        **{state: numbers[state] for state in WORDS},
        slots=[_shown(each, words, hidden) for each in found[:MOST]],
        more=max(0, len(found) - MOST) + asked.left_out,
    )


def _shown(each: Forecast, words: Words, hidden: Collection[str]) -> SlotForecast:
    is_open = not any(step.task in hidden for step in each.path)
    return SlotForecast(
        task=each.promise.task,
        slot=each.promise.slot,
        deadline=each.promise.deadline,
        state=each.state,
        ends_at=each.ends_at,
        retry_until=each.retry_until,
        text=words.title(each),
        why=words.detail(each, has_progress=is_open),
        path=[_step(step, step.task in hidden) for step in each.path],
    )


def _step(step: Step, is_hidden: bool) -> ForecastStep:
    run = step.run
    return ForecastStep(
        task=step.task,
        slot=step.slot,
        run=run.id if run is not None else None,
        state=run.state if run is not None else None,
        is_over=step.is_over,
        obstacle=step.obstacle,
        begins_at=step.begins_at,
        ends_at=step.ends_at,
        usual=step.usual.p50,
        done=run.done if run is not None and not is_hidden else None,
        total=run.total if run is not None and not is_hidden else None,
    )
