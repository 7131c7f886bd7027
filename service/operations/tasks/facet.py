"""`operations.tasks`: the tasks that are loaded or that the ledger knows, and their pauses."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from service.batch.firing import task_sync
from service.batch.firing.task_sync import Pause
from service.batch.ledger import database_time, schedules
from service.batch.ledger import tasks as task_rows
from service.batch.ledger.people import audit
from service.concurrency.offload import offload
from service.errors import DatabaseError, InvalidParameters, UnknownTask
from service.escaping import echoed
from service.operations.asking.context import Context
from service.operations.asking.results import ScheduleSpan, Slot
from service.operations.starting.startable import unknown_task
from service.operations.system.nodes import living_nodes
from service.operations.tasks import details, lint, listing
from service.operations.tasks.details import TaskRows
from service.operations.tasks.lint import LintedTask
from service.operations.tasks.listing import Known
from service.operations.tasks.results import Paused, Resumed, TaskDetails, TaskSummary
from service.settings.pools import DEFAULT_POOL

if TYPE_CHECKING:
    from service.batch.tasks.broken_files import BrokenFile
    from service.operations.tasks.history import TaskHistory
    from service.operations.tasks.overview import Numbers, Overview


class Tasks:
    """Lists, shows, checks, pauses and resumes tasks. Each method raises DatabaseError if the
    ledger can't be used.
    """

    def __init__(self, context: Context, pools: Collection[str] = ()) -> None:
        """`pools`: the names of the pools that the settings of this process describe."""
        self._context = context
        self._pools = pools

    async def list(self, with_others: bool = False) -> Sequence[TaskSummary]:
        """The loaded tasks by name, followed by the files that can't be used, with the names of
        their tasks if known.

        `with_others`: also the tasks that only other processes have loaded.
        """
        loaded, broken = self._context.loaded()
        async with self._context.databases.reading() as connection:
            known = await Known.read(connection)
        listed = {name: known.rows.get(name, {}) for name in loaded}
        if with_others:
            listed |= {name: row for name, row in known.rows.items() if row["removed_at"] is None}
        summaries = await offload(listing.summaries, listed, loaded, known)
        return [
            *summaries,
            *(TaskSummary(name=file.task, source=file.source, error=file.error) for file in broken),
        ]

    async def overview(
        self, wanted: str = "all", part: str = "", first: int = 0, hours: int = 12
    ) -> Overview:
        """A page of 50 tasks from number `first` on. `wanted`: all, running, attention or paused.

        `part`: of the name, or a tag; empty: any. `hours`: of the timeline, before and after now;
        0: no timeline.

        Raises NoLedger.
        """
        from service.operations.tasks.overview import overview

        return await overview(self._context, wanted, part, first, hours)

    async def numbers(self) -> Numbers:
        """The numbers of `overview` alone. Raises NoLedger."""
        from service.operations.tasks.overview import numbers

        return await numbers(self._context)

    async def are_known(self) -> bool:
        """Whether this process has loaded a task, or the ledger has ever had one."""
        if self._context.loaded().tasks:
            return True
        async with self._context.databases.reading() as connection:
            return connection is not None and await task_rows.are_known(connection)

    def broken_files(self) -> Sequence[BrokenFile]:
        """The files that can't be used."""
        return self._context.loaded().broken

    async def history(self, name: str, zone: str) -> TaskHistory:
        """The next slots of a task, its last 90 days, and how long its last runs took.

        `zone`: in which the days of a task without a schedule are counted. Raises NoLedger.
        """
        from service.operations.tasks.history import history

        return await history(self._context, name, zone)

    def broken(self, source: str) -> BrokenFile:
        """A file that can't be used, with its traceback. Raises UnknownTask if all is well with it,
        or it is gone.
        """
        found = next(
            (each for each in self._context.loaded().broken if each.source == source), None
        )
        if found is None:
            raise UnknownTask(f"there is no file {echoed(source)} that can't be used")
        return found

    async def show(self, name: str) -> TaskDetails:
        """The details of one task, which is loaded or in the ledger. Raises UnknownTask."""
        loaded = self._context.loaded().tasks.get(name)
        async with self._context.databases.reading() as connection:
            row = await task_rows.get(connection, name) if connection is not None else None
            if loaded is None and row is None:
                raise await unknown_task(connection, self._context, name)
            rows = await TaskRows.read(connection, self._context, name)
        return await offload(
            details.details, name, loaded, row or {}, rows, self._context.redaction
        )

    async def next_slots(self, name: str, number: int) -> Sequence[Slot]:
        """The next slots of a task; empty without a schedule and during a pause. Raises
        UnknownTask.
        """
        loaded = self._context.loaded().tasks.get(name)
        async with self._context.databases.reading() as connection:
            row = await task_rows.get(connection, name) if connection is not None else None
            if loaded is None and row is None:
                raise await unknown_task(connection, self._context, name)
            spans = (
                [ScheduleSpan.of(span) for span in await schedules.history(connection, name)]
                if connection
                else []
            )
        current = details.current_schedule(
            spans, loaded, is_removed=bool(row and row["removed_at"])
        )
        if current is None or (row is not None and row["paused_at"] is not None):
            return []
        return await offload(details.next_slots, current, number)

    async def lint(self, names: Collection[str] = (), next_slots: int = 5) -> Sequence[LintedTask]:
        """Check all loaded tasks, or those of `names`, for likely mistakes. Raises UnknownTask.

        Each result has up to `next_slots` future slots. Without `names` the files that can't be
        used follow. The ledger is read only if a task waits for one that is not loaded, or is of a
        pool of which the settings say nothing; a ledger that can't be read knows none.
        """
        loaded = self._context.loaded()
        known = await lint.known_elsewhere(self._context.databases, loaded)
        unset = {task.pool for task in loaded.tasks.values()} - {DEFAULT_POOL, *self._pools}
        served = {*self._pools, *(await self._claimed() if unset else ())}
        return await offload(lint.check, loaded, names, next_slots, served, known)

    async def _claimed(self) -> set[str]:
        """The pools that living nodes claim; none where the ledger can't be read."""
        try:
            async with self._context.databases.reading() as connection:
                if connection is None:
                    return set()
                nodes = await living_nodes(
                    connection, self._context, await database_time.now_of(connection)
                )
        except DatabaseError:
            return set()
        return {name for node in nodes for name in node.pools}

    async def pause(
        self, name: str, note: str | None = None, until: datetime | None = None
    ) -> Paused:
        """Stop firing a task, until it is resumed, or until an instant (aware). Returns the pause.

        Of an existing pause only the end is changed, if `until` is given. Raises UnknownTask and
        InvalidParameters.
        """
        context = self._context
        async with context.databases.changing() as connection:
            now = await database_time.now_of(connection)
            if until is not None and until <= now:
                raise InvalidParameters("the end of a pause: allowed is an instant after now")
            loaded = context.loaded().tasks if context.node else task_sync.NO_TASKS
            before = await task_sync.pause(
                connection, name, context.actor.name, loaded, context.node, until
            )
            pause = await task_sync.pause_of(connection, name)
            assert pause is not None
            if pause != before:
                after = {"until": until.isoformat()} if until is not None else None
                await audit.record(
                    connection,
                    context.actor.by,
                    "task.pause",
                    now,
                    task=name,
                    after=after,
                    note=note,
                )
        return _paused(pause, is_new=before is None)

    async def resume(self, name: str, note: str | None = None) -> Resumed:
        """Fire a task again from now on: it was paused, or a clock ahead has fired its slots.
        Raises UnknownTask.
        """
        async with self._context.databases.changing() as connection:
            ended = await task_sync.resume(connection, name)
            ahead = (await task_sync.set_back(connection, [name])).get(name)
            before = {"paused_at": ended.at.isoformat()} if ended is not None else {}
            before |= {"fired_until": ahead.isoformat()} if ahead is not None else {}
            if before:
                now, by = await database_time.now_of(connection), self._context.actor.by
                await audit.record(
                    connection, by, "task.resume", now, task=name, before=before, note=note
                )
        return Resumed(
            ended=_paused(ended, is_new=True) if ended is not None else None, ahead_until=ahead
        )

    async def resume_ahead(self, note: str | None = None) -> Mapping[str, datetime]:
        """Fire all tasks again whose slots a clock ahead has fired. Returns up to which instant it
        had, by task.
        """
        async with self._context.databases.changing() as connection:
            ahead = await task_sync.set_back(connection)
            now, by = await database_time.now_of(connection), self._context.actor.by
            for name, until in sorted(ahead.items()):
                before = {"fired_until": until.isoformat()}
                await audit.record(
                    connection, by, "task.resume", now, task=name, before=before, note=note
                )
        return ahead

    async def pause_of(self, name: str) -> Paused | None:
        """The pause of a task; None if it is not paused. Raises UnknownTask."""
        async with self._context.databases.reading() as connection:
            row = await task_rows.get(connection, name) if connection is not None else None
        if row is None:
            raise UnknownTask(f"the ledger knows no task {echoed(name)}")
        if row["paused_at"] is None:
            return None
        pause = Pause(row["paused_at"], row["paused_by"] or "somebody", row["paused_until"])
        return _paused(pause, is_new=False)


def _paused(pause: Pause, *, is_new: bool) -> Paused:
    return Paused(at=pause.at, by=pause.by, is_new=is_new, until=pause.until)
