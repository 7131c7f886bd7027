"""`operations.quarantine`: the items that runs set aside, and redrives of them."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import inspect
from sqlalchemy.exc import DBAPIError

from service.batch.chunks import quarantine
from service.batch.chunks.quarantine import SetAside
from service.batch.execution.run_here import checked_parameters
from service.batch.ledger import runs as run_rows
from service.batch.queue import enqueue
from service.database import companions
from service.errors import UnknownRun, WrongState
from service.operations.context import Context
from service.operations.databases import Databases, is_missing_file
from service.operations.finding import only_run
from service.operations.results import Quarantined, Started


class Quarantine:
    """Reads the items that a run set aside, and queues redrives. Raises DatabaseError if a database can't be used."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def list(self, given: str) -> Sequence[Quarantined]:
        """The items that a run set aside, in the order in which they failed. Raises UnknownRun."""
        async with self._context.databases.reading() as connection:
            run = await only_run(connection, given)
        return [Quarantined.of(vars(item)) for item in await _items(self._context.databases, run)]

    async def redrive(self, given: str, items: Sequence[str] | None = None) -> Started:
        """Queue a run that processes again the items that a run set aside: all that are left, or `items`.

        It has the slot and the parameters of that run. `items`: keys as in Quarantined.item. Raises UnknownRun,
        UnknownTask if the task is not loaded, and WrongState if the run has no such items left.
        """
        context = self._context
        async with context.databases.reading() as connection:
            run = await only_run(connection, given)
            assert connection is not None
            row = await run_rows.get(connection, run)
        if row is None:
            raise UnknownRun(f"the run {run} was deleted just now")
        left = {item.item for item in await _items(context.databases, run) if item.redriven_by is None}
        if missing := sorted(set(items or ()) - left) or ([] if left else ["none is left"]):
            raise WrongState(f"the run {run} has no such items set aside: {', '.join(missing)}")
        task = context.task(row["task"])
        before = {name: value for name, value in (row["params"] or {}).items() if name != "items"}
        params = checked_parameters(task, {**before, "redrive": run, **({"items": list(items)} if items else {})})
        slot = row["slot"] or row["created_at"]
        async with context.databases.changing() as connection:
            started = await enqueue.enqueue(connection, task, params, slot, context.actor, parent=run)
        context.wake()
        return Started(id=started, task=task.name)


async def _items(databases: Databases, run: str) -> list[SetAside]:
    """The items that the run set aside; none if the application's database has no table of them yet."""
    application = databases.application
    if is_missing_file(application):
        return []
    try:
        async with application.reader.connect() as connection:
            has_table = await connection.run_sync(lambda sync: inspect(sync).has_table(companions.quarantine.name))
        return await quarantine.listed(application, run) if has_table else []
    except (DBAPIError, OSError) as error:
        raise application.unreachable(error) from error
