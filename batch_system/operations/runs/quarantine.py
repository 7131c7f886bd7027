"""Quarantine: the items that runs set aside, and redrives of them."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import inspect
from sqlalchemy.exc import DBAPIError

from batch_system.batch.chunks import quarantine
from batch_system.batch.chunks.quarantine import SetAside
from batch_system.batch.ledger import database_time
from batch_system.batch.ledger import runs as run_rows
from batch_system.batch.ledger.people import audit
from batch_system.batch.queue import enqueue
from batch_system.database import companions
from batch_system.database.engine import Database
from batch_system.errors import UnknownRun, WrongState
from batch_system.escaping import brief
from batch_system.operations.asking.context import Context
from batch_system.operations.asking.databases import Databases, is_missing_file
from batch_system.operations.asking.results import Quarantined, Started
from batch_system.operations.people.redacting import NOTHING, hidden_tasks
from batch_system.operations.runs.read import run_of
from batch_system.operations.runs.results import RunPage
from batch_system.operations.starting.startable import startable_task

MOST_ITEMS = 10_000
"""Longest list of items in quarantine."""


async def list_items(
    context: Context, given: str | None = None, limit: int = MOST_ITEMS
) -> Sequence[Quarantined]:
    """The items that a run set aside, in the order in which they failed; at most `limit`.

    `given`: the id of a run, or a task, which stands for its newest run. None: the items of all
    runs that wait for a redrive, the newest first. Raises UnknownRun.
    """
    run = await run_of(context, given) if given is not None else None
    async with context.databases.reading() as connection:
        hidden = await hidden_tasks(connection, context) if connection is not None else NOTHING
    items = await _items(context.databases, run, limit)
    return [Quarantined.of(vars(item)) for item in items if item.task not in hidden]


async def redrive(
    context: Context, given: str, items: Sequence[str] | None = None, note: str | None = None
) -> Started:
    """Queue a run that processes again the items that a run set aside: all that are left, or
    `items`.

    It has the slot and the parameters of that run. `items`: keys as in Quarantined.item. Raises
    UnknownRun, UnknownTask if no process has loaded the task, and WrongState if the run has no
    such items left; it names the run that has processed them since.
    """
    run = await run_of(context, given)
    async with context.databases.reading() as connection:
        row = await run_rows.get(connection, run) if connection is not None else None
    if row is None:
        raise UnknownRun(f"the run {run} was deleted just now")
    set_aside = await _items(context.databases, run)
    left = {item.item for item in set_aside if item.redriven_by is None}
    if missing := sorted(set(items or ()) - left) or ([] if left else ["none is left"]):
        raise _not_set_aside(run, missing, set_aside)
    before = {name: value for name, value in (row["params"] or {}).items() if name != "items"}
    given_params = {**before, "redrive": run, **({"items": list(items)} if items else {})}
    slot = row["slot"] or row["created_at"]
    async with context.databases.changing() as connection:
        task = await startable_task(connection, context, row["task"])
        params = task.checked(given_params)
        started = await enqueue.enqueue(
            connection, task, params, slot, context.actor.name, parent=run
        )
        now, after = (
            await database_time.now_of(connection),
            {"run": started, "items": len(items or left)},
        )
        await audit.record(
            connection,
            context.actor.by,
            "run.redrive",
            now,
            task=task.name,
            run=run,
            after=after,
            note=note,
        )
    context.wake()
    return Started(id=started, task=task.name)


def _not_set_aside(run: str, missing: Sequence[str], set_aside: Sequence[SetAside]) -> WrongState:
    redriven_by = {item.redriven_by for item in set_aside if item.redriven_by is not None}
    newer = f" (processed since by run {', '.join(sorted(redriven_by)[:3])})" if redriven_by else ""
    words = f"the run {run} has no such items set aside: {', '.join(missing)}{newer}"
    return WrongState(brief(words, 2_000))


async def with_quarantined(databases: Databases, page: RunPage) -> RunPage:
    """The page with the number of items that each run has in quarantine."""
    counts = await left_of(databases, [run.id for run in page.runs])
    if not counts:
        return page
    runs = [run.model_copy(update={"quarantined": counts.get(run.id, 0)}) for run in page.runs]
    return page.model_copy(update={"runs": runs})


async def left_of(databases: Databases, runs: list[str]) -> dict[str, int]:
    """How many items that these runs have set aside wait for a redrive, by the id of the run.

    Empty if the application's database can't be read, so that what else is asked does not fail.
    """
    application = databases.application
    if not runs or is_missing_file(application):
        return {}
    try:
        return await quarantine.left(application, runs) if await has_table(application) else {}
    except (DBAPIError, OSError):
        return {}


async def has_table(application: Database) -> bool:
    """Whether the application's database has the table of items in quarantine yet."""
    async with application.reader.connect() as connection:
        return await connection.run_sync(
            lambda sync: inspect(sync).has_table(companions.quarantine.name)
        )


async def _items(databases: Databases, run: str | None, limit: int | None = None) -> list[SetAside]:
    """The items that the run set aside; none if the application's database has no table of them
    yet.
    """
    application = databases.application
    if is_missing_file(application):
        return []
    try:
        return (
            await quarantine.listed(application, run, limit=limit)
            if await has_table(application)
            else []
        )
    except (DBAPIError, OSError) as error:
        raise application.unreachable(error) from error
