"""APScheduler: it says when a slot is due, and runs no task. The only module that imports it."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import sys
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from apscheduler.events import EVENT_JOB_EXECUTED, JobExecutionEvent
from apscheduler.executors.base import BaseExecutor
from apscheduler.schedulers.asyncio import AsyncIOScheduler
from apscheduler.schedulers.base import BaseScheduler
from apscheduler.triggers.base import BaseTrigger

from service import clock
from service.batch.cron.cron import Schedule
from service.batch.tasks.registry import Task
from service.logs import get_logger

logger = get_logger("service.batch")

WATCHDOG_SECONDS = 1.0


class SlotTrigger(BaseTrigger):  # type: ignore[misc] # APScheduler 3 has no types
    """Fires at the slots of a Schedule; of those that are past only once, whatever their number. Never raises."""

    def __init__(self, schedule: Schedule | None, is_paused: bool = False) -> None:
        self.schedule = schedule
        self.is_paused = is_paused

    def get_next_fire_time(self, previous_fire_time: datetime | None, now: datetime) -> datetime | None:
        if self.schedule is None or self.is_paused:
            return None
        return self.schedule.next(max(previous_fire_time, now) if previous_fire_time else now)

    def __str__(self) -> str:
        return f"cron[{self.schedule.cron}] {self.schedule.timezone}" if self.schedule else "manual"


class LoopExecutor(BaseExecutor):  # type: ignore[misc] # the same
    """For jobs that an application adds: calls the function on the event loop, and awaits what it returns in a task."""

    def __init__(self) -> None:
        super().__init__()
        self.running: set[asyncio.Task[None]] = set()

    def _do_submit_job(self, job: Any, run_times: list[datetime]) -> None:
        events = [JobExecutionEvent(EVENT_JOB_EXECUTED, job.id, job._jobstore_alias, at) for at in run_times]
        try:
            result = job.func(*job.args, **job.kwargs)
        except BaseException:  # noqa: BLE001 - a background loop's boundary: one job must not stop the scheduler
            self._run_job_error(job.id, *sys.exc_info()[1:])
            return
        if not inspect.isawaitable(result):
            self._run_job_success(job.id, events)
            return
        # Of its own context: APScheduler's is that of whoever added the first job.
        task = asyncio.get_running_loop().create_task(
            self._finish(result, job.id, events), context=contextvars.Context()
        )
        self.running.add(task)
        task.add_done_callback(self.running.discard)

    async def _finish(self, result: Awaitable[Any], job_id: str, events: list[JobExecutionEvent]) -> None:
        try:
            await result
        except BaseException:  # noqa: BLE001 - the same
            self._run_job_error(job_id, *sys.exc_info()[1:])
        else:
            self._run_job_success(job_id, events)


class NotifyExecutor(LoopExecutor):
    """For jobs that only say that a slot is due: without the books that APScheduler keeps on what runs."""

    def submit_job(self, job: Any, run_times: list[datetime]) -> None:
        job.func(*job.args, **job.kwargs)


def new_scheduler() -> AsyncIOScheduler:
    """A scheduler without jobs, in UTC. It belongs to the event loop on which it is started."""
    return AsyncIOScheduler(
        timezone=UTC,
        executors={"default": LoopExecutor(), "notify": NotifyExecutor()},
        job_defaults={"coalesce": False, "max_instances": 1, "misfire_grace_time": None},
    )


def add_job(scheduler: AsyncIOScheduler, task: Task, notify: Callable[[str], None]) -> None:
    """Add a job that calls `notify(task.name)`, which must return at once, at each slot of the task.

    Its id is the task's name, and its name the task's description. A task that has a job already keeps it.
    """
    if scheduler.get_job(task.name) is None:
        scheduler.add_job(
            functools.partial(notify, task.name),
            executor="notify",
            trigger=SlotTrigger(task.schedule),
            id=task.name,
            name=task.description or task.name,
        )


def start(scheduler: AsyncIOScheduler) -> None:
    """Start it on the running event loop, unless it runs."""
    if not scheduler.running:
        scheduler.start()
        _watch(scheduler)
        logger.info("Scheduler started")


def stop(scheduler: AsyncIOScheduler) -> None:
    """Fire nothing more from now on."""
    if scheduler.running:
        BaseScheduler.shutdown(scheduler, wait=False)  # AsyncIOScheduler's own comes an iteration later
        scheduler._stop_timer()
        logger.info("Scheduler stopped")


def set_schedule(scheduler: AsyncIOScheduler, name: str, schedule: Schedule | None, is_paused: bool = False) -> None:
    """Give a job this schedule, or none; paused, or with none, its next run time is null. Else it is left alone."""
    job = scheduler.get_job(name)
    if job is None or (job.trigger.schedule, job.trigger.is_paused) == (schedule, is_paused):
        return
    trigger = SlotTrigger(schedule, is_paused)
    job.modify(trigger=trigger, next_run_time=trigger.get_next_fire_time(None, clock.now()))


def next_run_times(scheduler: AsyncIOScheduler) -> Mapping[str, datetime | None]:
    return {job.id: _next_run_time(job) for job in scheduler.get_jobs()}


def _next_run_time(job: Any) -> datetime | None:
    """Before the start APScheduler's jobs have no such attribute."""
    at: datetime | None = getattr(job, "next_run_time", None)
    return at


def describe_jobs(scheduler: AsyncIOScheduler) -> list[dict[str, Any]]:
    """Each job's id, name, next_run_time (ISO 8601, or None) and trigger."""
    return [
        {
            "id": job.id,
            "name": job.name,
            "next_run_time": at.isoformat() if (at := _next_run_time(job)) else None,
            "trigger": str(job.trigger),
        }
        for job in scheduler.get_jobs()
    ]


def _watch(scheduler: AsyncIOScheduler, before: datetime | None = None) -> None:
    """A step of the wall clock makes APScheduler's one long timer late by the step; this bounds it.

    `before`: what time it was when this was called last.
    """
    if scheduler.running:
        now = clock.now()
        if before is not None and now < before:
            _wait_anew(scheduler, now)
        scheduler.wakeup()
        asyncio.get_running_loop().call_later(WATCHDOG_SECONDS, _watch, scheduler, now)


def _wait_anew(scheduler: AsyncIOScheduler, now: datetime) -> None:
    """The clock was set back, and each job waits for a time that was near before."""
    for job in scheduler.get_jobs():
        if isinstance(job.trigger, SlotTrigger):
            job.modify(next_run_time=job.trigger.get_next_fire_time(None, now))
