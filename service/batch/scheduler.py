"""APScheduler: it says that a slot is due, and carries nothing. The only module that imports it."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import sys
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from apscheduler.events import EVENT_JOB_EXECUTED, JobExecutionEvent
from apscheduler.executors.base import BaseExecutor
from apscheduler.schedulers.asyncio import AsyncIOScheduler
from apscheduler.triggers.base import BaseTrigger

from service import clock
from service.batch.registry import Task, TaskRegistry
from service.batch.runner import call
from service.batch.schedule import Schedule
from service.batch.threads import Threads
from service.logs import get_logger

logger = get_logger("service.batch")

WATCHDOG_SECONDS = 1.0


class SlotTrigger(BaseTrigger):  # type: ignore[misc] # APScheduler 3 has no types
    """Fires at the slots of a Schedule; of those that are past only once, whatever their number. Never raises."""

    def __init__(self, schedule: Schedule | None) -> None:
        self.schedule = schedule

    def get_next_fire_time(self, previous_fire_time: datetime | None, now: datetime) -> datetime | None:
        if self.schedule is None:
            return None
        return self.schedule.next(max(previous_fire_time, now) if previous_fire_time else now)

    def __str__(self) -> str:
        return f"cron[{self.schedule.cron}] {self.schedule.timezone}" if self.schedule else "manual"


class LoopExecutor(BaseExecutor):  # type: ignore[misc] # the same
    """Calls a job's function right on the event loop; what it returns may be awaitable, and is awaited in a task."""

    def __init__(self) -> None:
        super().__init__()
        self.running: set[asyncio.Task[None]] = set()

    def _do_submit_job(self, job: Any, run_times: list[datetime]) -> None:
        events = [JobExecutionEvent(EVENT_JOB_EXECUTED, job.id, job._jobstore_alias, at) for at in run_times]
        try:
            result = job.func(*job.args, **job.kwargs)
        except Exception:  # noqa: BLE001 - a background loop's boundary: one job must not stop the scheduler
            self._run_job_error(job.id, *sys.exc_info()[1:])
            return
        if result is None:
            self._run_job_success(job.id, events)
            return
        # Of its own context: APScheduler's is that of whoever added the first job.
        task = asyncio.get_running_loop().create_task(
            self._finish(result, job.id, events), context=contextvars.Context()
        )
        self.running.add(task)
        task.add_done_callback(self.running.discard)

    async def _finish(self, result: Awaitable[Any], job_id: str, events: list[JobExecutionEvent]) -> None:
        await result
        self._run_job_success(job_id, events)


def create_scheduler(fire: Callable[[str], None] | None = None, max_threads: int = 32) -> AsyncIOScheduler:
    """A scheduler with a job for each registered task: id = name, name = description.

    `fire(name)` is called when a slot is due, and must return at once. Without it the scheduler stands alone: it runs
    the tasks itself, with no ledger, so a slot that comes due while the process is down or blocked is not caught up.
    """
    scheduler = AsyncIOScheduler(
        timezone=UTC,
        executors={"default": LoopExecutor()},
        job_defaults={"coalesce": False, "max_instances": 1, "misfire_grace_time": None},
    )
    threads = Threads(max_threads)
    for task in TaskRegistry.tasks().values():
        call_at_slot = functools.partial(fire, task.name) if fire else functools.partial(_run_alone, task, threads)
        scheduler.add_job(
            call_at_slot,
            trigger=SlotTrigger(task.schedule),
            id=task.name,
            name=task.description or task.name,
            replace_existing=True,
        )
    return scheduler


def start_scheduler(scheduler: AsyncIOScheduler) -> None:
    """Start it on the running event loop."""
    scheduler.start()
    _watch(scheduler)
    logger.info("Scheduler started")


def stop_scheduler(scheduler: AsyncIOScheduler) -> asyncio.Future[None]:
    """Stop firing now. Await what it returns to wait for the tasks that a scheduler without a ledger is running."""
    executor = scheduler._executors.get("default") if scheduler.running else None
    if scheduler.running:
        scheduler.shutdown(wait=False)
        logger.info("Scheduler stopped")
    return asyncio.ensure_future(_all_over(executor))


async def _all_over(executor: LoopExecutor | None) -> None:
    while executor is not None and executor.running:
        await asyncio.wait(executor.running)


def set_schedule(scheduler: AsyncIOScheduler, name: str, schedule: Schedule | None) -> None:
    """Give a job this schedule, or none: then its next run time is null. Does nothing where that is so already."""
    job = scheduler.get_job(name)
    if job is None or job.trigger.schedule == schedule:
        return
    trigger = SlotTrigger(schedule)
    job.modify(trigger=trigger, next_run_time=trigger.get_next_fire_time(None, clock.now()))


def next_run_times(scheduler: AsyncIOScheduler) -> Mapping[str, datetime | None]:
    return {job.id: job.next_run_time for job in scheduler.get_jobs()}


def describe_jobs(scheduler: AsyncIOScheduler) -> list[dict[str, Any]]:
    """Each job's id, name, next_run_time (ISO 8601, or None) and trigger."""
    return [
        {
            "id": job.id,
            "name": job.name,
            "next_run_time": job.next_run_time.isoformat() if job.next_run_time else None,
            "trigger": str(job.trigger),
        }
        for job in scheduler.get_jobs()
    ]


def _watch(scheduler: AsyncIOScheduler) -> None:
    """A step of the wall clock makes APScheduler's one long timer late by the step; this bounds it."""
    if scheduler.running:
        scheduler.wakeup()
        asyncio.get_running_loop().call_later(WATCHDOG_SECONDS, _watch, scheduler)


async def _run_alone(task: Task, threads: Threads) -> None:
    try:
        await call(task.cls, task.parameters.to_call({}, clock.now()), threads)
    except Exception as error:  # the attempt's boundary, where there is no ledger
        logger.error(f"{task.name} failed: {error}", exc_info=error)
