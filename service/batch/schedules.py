"""Keeps three things in step: what the authors' classes say, what the ledger says, and what APScheduler fires."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from datetime import datetime

from apscheduler.schedulers.asyncio import AsyncIOScheduler
from sqlalchemy.exc import DBAPIError

from service import clock
from service.batch import catalog, scheduler, slots
from service.batch.registry import Task
from service.batch.schedule import Schedule
from service.config import refresh_settings
from service.database.engine import Database
from service.errors import BatchError, DatabaseError, InvalidSetting
from service.logs import get_logger

logger = get_logger("service.batch")

REFRESH_SECONDS = 3.0


class Schedules:
    """All nodes fire by the ledger's open schedules. This process writes one there only when its own value changed."""

    def __init__(
        self, database: Database, tasks: Mapping[str, Task], node: str, notify: Callable[[str], None], lease: float
    ) -> None:
        self._database = database
        self._tasks = tasks
        self._node = node
        self._notify = notify
        self._lease = lease
        self._own: dict[str, Schedule | None] = {name: task.schedule for name, task in tasks.items()}
        self._told: dict[str, str] = {}
        self._started_at = clock.boottime()

    async def open(self) -> None:
        """Write this process's schedules, at its start."""
        async with self._database.engine.begin() as connection:
            await catalog.set_schedules(connection, self._own, self._tasks, self._node)

    def start(self, jobs: AsyncIOScheduler) -> None:
        self._jobs = jobs
        self._work = asyncio.create_task(self._loop(), name="batch-schedules")

    async def stop(self) -> None:
        self._work.cancel()
        await asyncio.wait([self._work])

    async def _loop(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_SECONDS)
            try:
                await self.refresh()
            except (DBAPIError, DatabaseError, OSError) as error:
                self._tell("ledger", f"schedules can't be read from the ledger: {str(error).splitlines()[0]}")
            except Exception:  # the background loop's boundary: what is due must go on firing
                logger.exception("refreshing the schedules failed")

    async def refresh(self) -> None:
        """Read everything again, and change what differs."""
        changed = await asyncio.to_thread(self._changed)
        if changed:
            async with self._database.engine.begin() as connection:
                await catalog.set_schedules(connection, changed, self._tasks, self._node)
            self._own.update(changed)
        if await self.follow(self._jobs):
            await self._remove_gone()

    async def follow(self, jobs: AsyncIOScheduler) -> bool:
        """Make APScheduler's jobs those of the ledger's open schedules. Returns whether tasks have gone since."""
        async with self._database.reader.connect() as connection:
            opened = await slots.open_schedules(connection)
            now = await slots.now_of(connection)
            is_settled = clock.boottime() > self._started_at + self._lease
            gone = await catalog.unloaded(connection, self._tasks, self._lease) if is_settled else []
        for name in self._tasks:
            row = opened.get(name)
            in_force = row.schedule if row is not None else None
            is_paused = row is not None and row.paused_by is not None
            scheduler.set_schedule(jobs, name, in_force, is_paused)
            if row is not None and is_paused and _is_due(row, now):
                self._notify(name)
            self._tell_of_difference(name, in_force)
        return bool(gone)

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

    async def _remove_gone(self) -> None:
        async with self._database.engine.begin() as connection:
            gone = await catalog.remove_gone(connection, self._tasks, self._lease)
        for name in gone:
            logger.warning(f"task {name} is gone: no live node has it; its history stays")

    def _tell_of_difference(self, name: str, in_force: Schedule | None) -> None:
        own = self._own[name]
        if own != in_force:
            shown = f"{in_force.cron} {in_force.timezone}" if in_force else "none"
            self._tell(f"schedule of {name}", f"{name} fires by another node's schedule ({shown}), not by this code's")

    def _tell(self, about: str, message: str) -> None:
        """Say it once, until it changes."""
        if self._told.get(about) != message:
            self._told[about] = message
            logger.warning(message)


def _is_due(row: slots.OpenSchedule, now: datetime) -> bool:
    following = row.schedule.next(row.fired_until)
    return following is not None and following <= now
