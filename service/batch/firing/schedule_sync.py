"""Keeps three things in step: what the authors' classes say, what the ledger says, and what APScheduler fires."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta

from apscheduler.schedulers.asyncio import AsyncIOScheduler
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from service import clock
from service.batch.cron.cron import Schedule
from service.batch.firing import apscheduler as scheduler
from service.batch.firing import task_sync
from service.batch.ledger import database_time, nodes, schedules
from service.batch.ledger.schedules import OpenSchedule
from service.batch.nodes.ledger_poll import FiringState, LedgerChanges
from service.batch.tasks.live_reload import TasksFolder
from service.batch.tasks.registry import Task
from service.concurrency.background import Background
from service.concurrency.offload import offload
from service.config import refresh_settings
from service.database.engine import Database
from service.errors import BatchError, DatabaseError, InvalidSetting
from service.logs import get_logger

logger = get_logger("service.batch")

REFRESH_SECONDS = 3.0
AHEAD = timedelta(minutes=1)
NEVER = datetime.max.replace(tzinfo=UTC)
IMPORT_SECONDS = 1.0
"""How long a look waits for the import of files that were dropped in. One that hangs holds up no schedule."""


class Schedules(Background):
    """All nodes fire by the ledger's open schedules. This process writes one there only when its own value changed."""

    def __init__(
        self,
        database: Database,
        folder: TasksFolder,
        tasks: dict[str, Task],
        node: str,
        jobs: AsyncIOScheduler,
        notify: Callable[[str], None],
        lease: float,
    ) -> None:
        self._database = database
        self._folder = folder
        self._tasks = tasks
        self._arrived: dict[str, Task] = {}
        self._importing: asyncio.Task[dict[str, Task]] | None = None
        self._node = node
        self._jobs = jobs
        self._notify = notify
        self._lease = lease
        self._own: dict[str, Schedule | None] = {name: task.schedule for name, task in tasks.items()}
        self._told: dict[str, str] = {}
        self._started_at = clock.boottime()
        self._changes: LedgerChanges | None = None
        self._state: FiringState | None = None
        self._next: dict[str, datetime] = {}
        self._next_at = NEVER
        self._is_unsettled = True

    async def open(self) -> None:
        """Write this process's schedules, at its start."""
        async with self._database.engine.begin() as connection:
            await task_sync.set_schedules(connection, self._own, self._tasks, self._node)

    async def stop(self) -> None:
        await super().stop()
        if self._importing is not None:
            self._importing.cancel()
            await asyncio.wait([self._importing])

    async def _loop(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_SECONDS)
            try:
                await self._read_own()
                if self._is_outdated():
                    await self._read_ledger()
                elif self._changes is not None and self._changes.now >= self._next_at:
                    await self._follow_due(self._changes.now)
            except (DBAPIError, DatabaseError, OSError) as error:
                self._tell("ledger", f"schedules can't be read from the ledger: {self._database.why(error)}")
            except Exception:  # the background loop's boundary: what is due must go on firing
                logger.exception("refreshing the schedules failed")

    def on_changes(self, changes: LedgerChanges) -> None:
        """Keep them: the next refresh decides by them whether it reads the ledger again."""
        if self._changes is not None and changes.now < self._changes.now - AHEAD:  # its clock was set back
            self._is_unsettled = True
        self._changes = changes

    async def _read_own(self) -> None:
        """What is new in this process: files, and values of schedules."""
        await self._load_new()
        if self._arrived:
            await self._take_in(self._arrived)
        changed = await offload(self._changed)
        if changed:
            async with self._database.engine.begin() as connection:
                await task_sync.set_schedules(connection, changed, self._tasks, self._node)
            self._own.update(changed)
            self._is_unsettled = True

    def _is_outdated(self) -> bool:
        """Whether the ledger says something else than when it was last read."""
        changes = self._changes
        if self._is_unsettled or changes is None:
            return self._is_unsettled
        return changes.firing_state != self._state

    async def _read_ledger(self) -> None:
        state = self._changes.firing_state if self._changes is not None else None
        gone, removed = await self.follow()
        if removed:
            await self._restore(removed)
        if gone and clock.boottime() > self._started_at + self._lease:
            await self._remove(gone)
        self._state, self._is_unsettled = state, bool(gone or removed)

    async def _load_new(self) -> None:
        """What is not imported by then is waited for no longer; a later look finds it."""
        patience = IMPORT_SECONDS if self._importing is None else 0
        if self._importing is None:
            self._importing = asyncio.create_task(offload(self._folder.load_new))
        done, _ = await asyncio.wait([self._importing], timeout=patience)
        if done:
            imported, self._importing = self._importing, None
            self._arrived |= imported.result()

    async def _take_in(self, new: dict[str, Task]) -> None:
        """Tasks whose files were dropped into the folder while this process ran."""
        own = {name: task.schedule for name, task in new.items()}
        async with self._database.engine.begin() as connection:
            await task_sync.record_tasks(connection, new, await database_time.now_of(connection))
            await nodes.record_loaded(connection, self._node, {**self._tasks, **new})
            await task_sync.set_schedules(connection, own, {**self._tasks, **new}, self._node)
        self._own |= own
        self._tasks |= new
        self._arrived = {}
        self._is_unsettled = True
        for task in new.values():
            scheduler.add_job(self._jobs, task, self._notify)

    async def follow(self) -> tuple[list[str], set[str]]:
        """Make APScheduler's jobs those of the ledger's open schedules.

        Returns the tasks that no live node has, and those of this process that somebody has removed.
        """
        async with self._database.reader.connect() as connection:
            opened = await schedules.open_schedules(connection)
            now = await database_time.now_of(connection)
            known = await task_sync.known(connection)
            others = {name for name, is_removed in known.items() if not is_removed} - self._tasks.keys()
            gone = sorted(others - await self._live(connection)) if others else []
        self._follow_these(self._tasks, opened, now)
        return gone, {name for name in self._tasks if known.get(name, False)}

    async def _follow_due(self, now: datetime) -> None:
        """Have those fired whose first slot has come by the ledger's time: this node's clock may be behind."""
        names = [name for name, at in self._next.items() if at <= now]
        async with self._database.reader.connect() as connection:
            opened = await schedules.still_open(connection, names)
        self._follow_these(names, opened, now)

    def _follow_these(self, names: Iterable[str], opened: Mapping[str, OpenSchedule], now: datetime) -> None:
        for name in names:
            self._next[name] = self._follow_one(name, opened.get(name), now) or NEVER
        self._next_at = min(self._next.values(), default=NEVER)

    def _follow_one(self, name: str, row: OpenSchedule | None, now: datetime) -> datetime | None:
        """Returns the first slot that is not handled."""
        if row is None or not row.is_usable:
            scheduler.set_schedule(self._jobs, name, None)
            self._tell_of_difference(name, row, None)
            return None
        scheduler.set_schedule(self._jobs, name, row.schedule, is_paused=row.paused_by is not None)
        if (following := row.schedule.next(row.fired_until)) is not None and following <= now:
            self._notify(name)
        if row.fired_until > now + AHEAD:
            until = f"{row.fired_until:%Y-%m-%d %H:%M} UTC"
            self._tell(f"cursor of {name}", f"a clock ahead has fired {name} up to {until}: it fires again after that")
        self._tell_of_difference(name, row, row.schedule)
        return following

    async def _live(self, connection: AsyncConnection) -> set[str]:
        return await nodes.live_tasks(connection) | self._tasks.keys()

    def _changed(self) -> dict[str, Schedule | None]:
        """Schedules that are properties and read differently now. A bad value keeps the old one. Runs in a thread."""
        try:
            refresh_settings()
        except InvalidSetting as error:
            self._tell("settings", f"the changed settings are not used: {error.message}")
        changed = {}
        for name, task in self._tasks.items():
            if not task.may_change:
                continue
            try:
                schedule = task.read_schedule()
            except BatchError as error:
                self._tell(f"value of {name}", f"{error.message}; the schedule before it stays")
                continue
            self._told.pop(f"value of {name}", None)
            if schedule != self._own[name]:
                changed[name] = schedule
        return changed

    async def _remove(self, names: list[str]) -> None:
        async with self._database.engine.begin() as connection:
            gone = await task_sync.remove_gone(connection, names, self._live)
        for name in gone:
            logger.warning(f"task {name} is gone: no live node has it; its history stays")

    async def _restore(self, names: set[str]) -> None:
        """Somebody took this node for dead; it has these tasks."""
        async with self._database.engine.begin() as connection:
            own = {name: self._tasks[name] for name in names}
            await task_sync.record_tasks(connection, own, await database_time.now_of(connection))
            await task_sync.set_schedules(connection, {n: self._own[n] for n in names}, self._tasks, self._node)
        logger.warning(f"restored, for this node has them: {', '.join(sorted(names))}")

    def _tell_of_difference(self, name: str, row: OpenSchedule | None, in_force: Schedule | None) -> None:
        if self._own[name] != in_force:
            shown = f"{row.cron} {row.timezone}" if row else "none"
            self._tell(f"schedule of {name}", f"{name} fires by another node's schedule ({shown}), not by this code's")

    def _tell(self, about: str, message: str) -> None:
        """Say it once, until it changes."""
        if self._told.get(about) != message:
            self._told[about] = message
            logger.warning(message)
