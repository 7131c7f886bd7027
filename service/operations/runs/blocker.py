"""`operations.runs.waiting()`: whether a run waits, and what for."""

from __future__ import annotations

from service.batch.ledger import database_time
from service.errors import UnknownRun
from service.operations.asking.context import Context
from service.operations.runs import late
from service.operations.runs.finding import run_of
from service.operations.runs.waiting import Waiting
from service.operations.system.nodes import living_services


async def waiting(context: Context, given: str) -> Waiting:
    """See `operations.runs.waiting`."""
    run = await run_of(context, given)
    async with context.databases.reading() as connection:
        assert connection is not None
        now = await database_time.now_of(connection)
        living = await living_services(connection, context, now)
        found = await late.waiting(connection, run, living, now)
    if found is None:
        raise UnknownRun(f"the run {run} was deleted just now")
    return found
