"""Schedule sync: keeps the schedules of the task classes, the ledger and APScheduler in step."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime

from apscheduler.schedulers.asyncio import AsyncIOScheduler
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system import clock
from batch_system.batch.cron.cron import Schedule
from batch_system.batch.firing import apscheduler as scheduler
from batch_system.batch.firing import followed_schedules, pauses, task_sync
from batch_system.batch.firing.unfired import Unfired
from batch_system.batch.ledger import database_time, nodes, schedules
from batch_system.batch.ledger import tasks as task_rows
from batch_system.batch.ledger.schedules import OpenSchedule, ahead_in_words
from batch_system.batch.nodes.clock_steps import AHEAD
from batch_system.batch.nodes.ledger_poll import FiringState, LedgerChanges
from batch_system.batch.nodes.new_tasks import NewTasks
from batch_system.batch.nodes.outage import Outage
from batch_system.batch.tasks import calendar_files
from batch_system.batch.tasks.broken_files import BrokenFile
from batch_system.batch.tasks.registry import Task
from batch_system.concurrency.background import Background, is_set_within
from batch_system.concurrency.offload import SlowCall
from batch_system.database.engine import Database, wait_for_locks, whole_tables
from batch_system.errors import BatchError, InvalidSetting
from batch_system.logs import get_logger
from batch_system.settings.reading import refresh_settings

logger = get_logger("batch_system.batch")

REFRESH_SECONDS = 3.0
"""The interval between two refreshes, unless the ledger has changed before."""
READ_SECONDS = 1.0
"""How long a refresh waits for schedules that are properties."""
SHORTEST_PAUSE = 0.2
"""The least number of seconds between a refresh because of a change and the next refresh."""
NEVER = datetime.max.replace(tzinfo=UTC)


class ScheduleSync(Background):
    """Refreshes the schedules every REFRESH_SECONDS. All nodes fire by the open schedules in the
    ledger.

    This process writes a schedule into the ledger at its start, and when the value in its own class
    has changed.
    """

    def __init__(
        self,
        database: Database,
        new_tasks: NewTasks,
        tasks: dict[str, Task],
        node: str,
        jobs: AsyncIOScheduler,
        notify: scheduler.Notify,
        lease: float,
        outage: Outage | None = None,
    ) -> None:
        self._database = database
        self._outage = outage or Outage()
        self._new_tasks = new_tasks
        self._tasks = tasks
        self._node = node
        self._jobs = jobs
        self._notify = notify
        self._lease = lease
        self._own_schedules: dict[str, Schedule | None] = {
            name: task.schedule for name, task in tasks.items()
        }
        self._reading = SlowCall(self._read_changed_schedules)
        self._being_read = ""
        """The task whose property was read last, or is being read; empty for the settings."""
        self._warned: dict[str, str] = {}
        self._started_at = clock.boottime()
        self._changes: LedgerChanges | None = None
        self._state_read: FiringState | None = None
        self._next_slots: dict[str, datetime] = {}
        self._next_slot = NEVER
        self._in_force: dict[str, Schedule] = {}
        self._fired: dict[str, datetime] = {}
        """Up to when this process has handled slots since it last read the ledger, by task."""
        self._cursors: dict[str, datetime] = {}
        self._unusable: list[BrokenFile] = []
        """Tasks of this process that can't work because of the tasks that they wait for in other
        services.
        """
        self._change_of_pauses = NEVER
        """The earliest end of all pauses that end by themselves."""
        self._read_at = datetime.min.replace(tzinfo=UTC)
        self._is_unsettled = True
        self.unfired = Unfired(database, self._outage)
        self._woken = asyncio.Event()
        self.refreshing = asyncio.Lock()
        """Held by each refresh, because two at a time would apply the same changes twice."""
        self.upstreams: frozenset[str] = frozenset()
        """The tasks whose slots others wait for."""

    async def open(self) -> None:
        """Write the schedules of this process into the ledger, at its start, after the maintenance
        that was due while no service was running.
        """
        await pauses.begin_due(self._database, self._tasks, self._node)
        async with self._database.engine.begin() as connection, whole_tables(connection):
            await wait_for_locks(connection)
            await task_sync.set_schedules(connection, self._own_schedules, self._tasks, self._node)

    def fire_due(self) -> None:
        """Fire the tasks with a due slot, by this machine's clock or by the ledger's at
        `update_jobs`.
        """
        now = max(self._read_at, clock.now())
        for name, at in self._next_slots.items():
            if at <= now:
                self._notify(name)

    async def stop(self) -> None:
        await super().stop()
        await self._new_tasks.stop()
        await self._reading.stop()
        await self.unfired.stop()

    async def _loop(self) -> None:
        while True:
            is_woken = await is_set_within(self._woken, REFRESH_SECONDS)
            self._woken.clear()
            try:
                async with self.refreshing, self.limited_turn():
                    await self._refresh()
                self._outage.over_for("schedules")
            except Exception as error:  # the background loop's boundary: slots must go on firing
                if self._outage.cause_for("schedules", self._database, error) is None:
                    logger.exception("refreshing the schedules failed")
            if is_woken:
                await asyncio.sleep(SHORTEST_PAUSE)

    async def _refresh(self) -> None:
        await self._read_own()
        if self._changes is not None and self._changes.now >= self._change_of_pauses:
            await self._begin_and_end_pauses()
        if self._is_outdated():
            await self._read_ledger()
        elif self._changes is not None and self._changes.now >= self._next_slot:
            await self._update_due_jobs(self._changes.now)
        else:
            self.unfired.are_due({})

    def on_fired(self, names: Iterable[str], until: datetime) -> None:
        """All slots of these tasks up to `until` were handled, so the ledger need not be read."""
        self._fired |= dict.fromkeys(names, until)

    def on_changes(self, changes: LedgerChanges) -> None:
        """Take the result of a ledger poll. It decides whether the next refresh reads the ledger
        again.
        """
        if self._changes is not None and changes.now < self._changes.now - AHEAD:
            self._is_unsettled = True  # the database's clock was set back
        if self._changes is not None and changes.firing_state != self._changes.firing_state:
            self._woken.set()
        if changes.now >= self._change_of_pauses:
            self._woken.set()
        self._changes = changes

    async def _read_own(self) -> None:
        """Load new files of tasks, and read schedules whose values have changed in this process."""
        if new := await self._new_tasks.take_up(self._record_new):
            self._own_schedules |= {name: task.schedule for name, task in new.items()}
            self._is_unsettled = True
            scheduler.add_jobs(self._jobs, new.values())
        changed = await self._reading.within(READ_SECONDS)
        if changed is None:
            task = self._being_read
            what = f"the schedule of {task}" if task else "the file of settings"
            self._warn_once(
                "reading", f"reading {what} takes long; no schedule that is a property is read"
            )
            return
        self._warned.pop("reading", None)
        if changed:
            await task_sync.change_schedules(self._database, changed, self._tasks, self._node)
            self._own_schedules |= changed
            self._is_unsettled = True

    async def _begin_and_end_pauses(self) -> None:
        turned = await pauses.begin_and_end(self._database, self._tasks, self._node)
        for window in turned.begun:
            logger.info(f"the pause of {window.selection} by {window.created_by} has begun")
        if turned.resumed:
            logger.info(f"a pause has ended; these fire again: {', '.join(turned.resumed)}")
        self._is_unsettled = True

    def _is_outdated(self) -> bool:
        """Whether the ledger has changed since it was last read."""
        changes = self._changes
        if self._is_unsettled or changes is None:
            return self._is_unsettled
        return changes.firing_state != self._state_read

    async def _read_ledger(self) -> None:
        state = self._changes.firing_state if self._changes is not None else None
        gone, removed = await self.update_jobs()
        # During the first lease, other nodes may still be starting, too.
        is_settled = clock.boottime() > self._started_at + self._lease
        if removed:
            await self._restore_tasks(removed)
        if gone and is_settled:
            await self._remove_tasks(gone)
        if is_settled:
            self._new_tasks.unusable = self._unusable
        if moved := await task_sync.record_moved(self._database, self._tasks, self._node):
            logger.warning(
                "the ledger had tasks in other pools than this code; now they are in these again: "
                f"{', '.join(moved)}"
            )
        self._state_read = state
        self._is_unsettled = bool(gone or removed or self._unusable != self._new_tasks.unusable)

    async def _record_new(self, connection: AsyncConnection, new: Mapping[str, Task]) -> None:
        """Write tasks whose files came into the folder while this process was running."""
        own = {name: task.schedule for name, task in new.items()}
        now = await database_time.now_of(connection)
        await task_sync.record_tasks(connection, new, now, self._node)
        await self._new_tasks.record_loaded(connection, new)
        await task_sync.set_schedules(connection, own, {**self._tasks, **new}, self._node)

    async def update_jobs(self) -> tuple[list[str], set[str]]:
        """Give APScheduler's jobs the open schedules of the ledger.

        First gives followers the schedules of the tasks that they follow, if these have changed
        without them. Returns the names of the tasks that no live node has, and of those of this
        process that another node removed.
        """
        opened, gone, removed = await self._read_tasks()
        if astray := followed_schedules.astray(opened, self._tasks):
            async with self._database.engine.begin() as connection:
                await task_sync.set_schedules(connection, astray, self._tasks, self._node)
            opened, gone, removed = await self._read_tasks()
        self.upstreams = frozenset(
            name for row in opened.values() if row.after for name in row.after["tasks"]
        )
        return gone, removed

    async def _read_tasks(self) -> tuple[dict[str, OpenSchedule], list[str], set[str]]:
        """Give the jobs the open schedules. Returns these, and the results of `update_jobs`."""
        async with self._database.reader.connect() as connection, whole_tables(connection):
            is_removed = await task_rows.known(connection)
            there = {name for name, removed in is_removed.items() if not removed}
            others = there - self._tasks.keys()
            gone = sorted(others - await self._live_tasks(connection)) if others else []
            self._read_at = await database_time.now_of(connection)
            self._fired.clear()
            opened = await schedules.open_schedules(connection)
            self._change_of_pauses = await pauses.next_change(connection, self._read_at)
            if self._read_at >= self._change_of_pauses:  # a person has just ended one
                self._woken.set()
            missing = followed_schedules.missing(self._tasks, there)
            for name, upstreams in missing.items():
                has_none = self._tasks[name].schedule is None
                what = "it has no slots" if has_none else "its slots are skipped"
                awaited = ", ".join(upstreams)
                self._warn_once(
                    f"after {name}", f"{name} waits for {awaited}, which no service has: {what}"
                )
            self._unusable = followed_schedules.unusable(self._tasks, opened, missing)
            for file in self._unusable:
                self._warn_once(
                    f"unusable {file.task}", f"{file.source} can't be used: {file.error}"
                )
            self._update_jobs_of(self._tasks, opened, self._read_at)
        return opened, gone, {name for name in self._tasks if is_removed.get(name, False)}

    async def _update_due_jobs(self, now: datetime) -> None:
        """Fire the tasks with a slot that is due by database time, even if this clock is behind."""
        self._skip_fired()
        names = [name for name, at in self._next_slots.items() if at <= now]
        if names:
            async with self._database.reader.connect() as connection:
                opened = await schedules.still_open(connection, names)
            self._update_jobs_of(names, opened, now)
        due = {
            name: at
            for name in names
            if (at := self._next_slots[name]) <= now and name in self._cursors
        }
        self.unfired.are_due(due)

    def _skip_fired(self) -> None:
        """Go on to the next slots of the tasks that this process has fired."""
        fired = self._fired
        self._fired = {}
        for name, until in fired.items():
            if self._next_slots.get(name, NEVER) <= until:
                self._next_slots[name] = self._in_force[name].next(until) or NEVER
        self._next_slot = min(self._next_slots.values(), default=NEVER)

    def _update_jobs_of(
        self, names: Iterable[str], opened: Mapping[str, OpenSchedule], now: datetime
    ) -> None:
        for name in names:
            self._next_slots[name] = self._update_job(name, opened.get(name), now) or NEVER
        self._next_slot = min(self._next_slots.values(), default=NEVER)
        if ahead := self.ahead:
            self._warn_once("cursors", ahead_in_words(ahead))
        else:
            self._warned.pop("cursors", None)

    @property
    def ahead(self) -> dict[str, datetime]:
        """The cursors that are ahead of the ledger's clock, by task. These tasks do not fire before
        that instant.
        """
        now = self._read_at if self._changes is None else self._changes.now
        return {name: at for name, at in self._cursors.items() if at > now + AHEAD}

    def _update_job(self, name: str, row: OpenSchedule | None, now: datetime) -> datetime | None:
        """Give the task's job its open schedule, and fire due slots. Returns its next slot."""
        self._cursors.pop(name, None)
        if row is None or not row.is_usable:
            scheduler.set_schedule(self._jobs, name, None)
            self._warn_of_difference(name, row, None)
            return None
        row = row.at(now)  # a window is written some seconds before it begins
        schedule = self._in_force[name] = row.schedule
        scheduler.set_schedule(self._jobs, name, schedule, is_paused=row.paused_by is not None)
        if (following := schedule.next(row.fired_until)) is not None and following <= now:
            self._notify(name)
        if row.paused_by is None:
            self._cursors[name] = row.fired_until
        self._warn_of_difference(name, row, schedule)
        return following

    async def _live_tasks(self, connection: AsyncConnection) -> set[str]:
        return await nodes.live_tasks(connection) | self._tasks.keys()

    def _read_changed_schedules(self) -> dict[str, Schedule | None]:
        """The schedules that are properties and have a new value. An invalid value is ignored. Runs
        in a thread.
        """
        self._being_read = ""
        try:
            refresh_settings()
        except InvalidSetting as error:
            self._warn_once("settings", f"the changed settings are not used: {error.message}")
        calendar_files.look()
        changed = {}
        # A copy, since tasks may be added while reading a property takes long.
        for name, task in list(self._tasks.items()):
            if not task.may_change:
                continue
            self._being_read = name
            try:
                schedule = task.read_schedule()
            except BatchError as error:
                self._warn_once(
                    f"value of {name}", f"{error.message}; the previous schedule is kept"
                )
                continue
            self._warned.pop(f"value of {name}", None)
            if schedule != self._own_schedules[name]:
                changed[name] = schedule
        return changed

    async def _remove_tasks(self, names: list[str]) -> None:
        async with self._database.engine.begin() as connection:
            gone = await task_sync.remove_gone(connection, names, self._live_tasks)
        for name in gone:
            logger.warning(f"task {name} was removed: no live node has it; its runs are kept")

    async def _restore_tasks(self, names: set[str]) -> None:
        """Write tasks of this process into the ledger again: another node believed that this one
        was dead, and removed them.
        """
        async with self._database.engine.begin() as connection:
            own = {name: self._tasks[name] for name in names}
            schedules = {name: self._own_schedules[name] for name in names}
            now = await database_time.now_of(connection)
            await task_sync.record_tasks(connection, own, now, self._node)
            await task_sync.set_schedules(connection, schedules, self._tasks, self._node)
        logger.warning(
            "another node had removed tasks that this node has; they are restored: "
            f"{', '.join(sorted(names))}"
        )

    def _warn_of_difference(
        self, name: str, row: OpenSchedule | None, in_force: Schedule | None
    ) -> None:
        if self._own_schedules[name] != in_force and self._tasks[name].follows is None:
            current = row.in_words if row else "none"
            message = f"{name} fires by another node's schedule ({current}), not by this code's"
            self._warn_once(f"schedule of {name}", message)

    def _warn_once(self, about: str, message: str) -> None:
        """Log this warning, unless the last one with the same `about` was the same."""
        if self._warned.get(about) != message:
            self._warned[about] = message
            logger.warning(message)
