"""Running a run again, and with it the runs that come after it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.ledger.states import RunState
from service.batch.queue import retry
from service.errors import InvalidParameters
from service.operations.asking.context import Context
from service.operations.asking.results import RunsAfter
from service.operations.runs.reading import row_of

Record = Callable[
    [AsyncConnection, str, Mapping[str, Any], str | None, str | None], Awaitable[None]
]


async def retry_run(
    context: Context,
    run: str,
    record: Record,
    note: str | None,
    from_the_beginning: bool,
    and_after: bool,
) -> None:
    """See `operations.runs.retry`. `record`: writes to the audit what was done with a run."""
    if and_after and not from_the_beginning:
        raise InvalidParameters(
            "--and-after needs --again: what comes after is run again from the beginning"
        )
    name, databases = context.actor.name, context.databases
    after: Sequence[str] = ()
    if from_the_beginning:
        await databases.migrate_both()
        after = (
            [each for ids in (await _after(context, run)).values() for each in ids]
            if and_after
            else []
        )
        await retry.retry_from_the_beginning(
            databases.ledger, databases.application, run, name, after
        )
    async with databases.changing() as connection:
        row = await row_of(connection, run)
        if not from_the_beginning:
            await retry.retry(connection, run, name)
        action = "run.retry_from_the_beginning" if from_the_beginning else "run.retry"
        await record(connection, action, row, RunState.QUEUED, note)
        for other in after:
            await record(
                connection, action, await row_of(connection, other), RunState.WAITING, note
            )


async def comes_after(context: Context, run: str) -> RunsAfter:
    """See `operations.runs.comes_after`."""
    return RunsAfter(
        run=run, tasks={task: len(ids) for task, ids in (await _after(context, run)).items()}
    )


async def _after(context: Context, run: str) -> Mapping[str, Sequence[str]]:
    """The ids of the runs that come after a run and have ended, by task."""
    async with context.databases.changing() as connection:
        return await retry.comes_after(connection, run)
