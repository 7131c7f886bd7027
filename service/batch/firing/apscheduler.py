"""APScheduler: it says that a slot is due, and carries nothing. The only module that imports it."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from apscheduler.events import EVENT_JOB_EXECUTED, JobExecutionEvent
from apscheduler.executors.base import BaseExecutor
from apscheduler.schedulers.asyncio import AsyncIOScheduler
from apscheduler.schedulers.base import BaseScheduler
from apscheduler.triggers.base import BaseTrigger

from service import clock
from service.batch.cron.cron import Schedule
from service.batch.execution.attempt import Attempt, Ending
from service.batch.ledger.runs import Claimed
from service.batch.ledger.states import Origin
from service.batch.ledger.tables import new_id
from service.batch.tasks.registry import Task, TaskRegistry
from service.concurrency.thread_pool import ThreadPool
from service.errors import BatchError
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
    """Calls a job's function right on the event loop; what it returns may be awaitable, and is awaited in a task."""

    def __init__(self, max_threads: int) -> None:
        super().__init__()
        self.threads = ThreadPool(max_threads)
        self.running: set[asyncio.Task[None]] = set()
        self.stopped = asyncio.Event()

    def shutdown(self, wait: bool = True) -> None:
        self.stopped.set()

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

    async def until_over(self) -> None:
        while self.running:
            await asyncio.wait(self.running)
        self.threads.close()


class NotifyExecutor(LoopExecutor):
    """For jobs that only say that a slot is due: without the books that APScheduler keeps on what runs."""

    def __init__(self) -> None:
        super().__init__(max_threads=1)

    def submit_job(self, job: Any, run_times: list[datetime]) -> None:
        job.func(*job.args, **job.kwargs)


def create_scheduler(fire: Callable[[str], None] | None = None, max_threads: int = 32) -> AsyncIOScheduler:
    """A scheduler with a job for each registered task: id = name, name = description.

    `fire(name)` is called when a slot is due, and must return at once. Without it the scheduler stands alone: it runs
    the tasks itself, with no ledger, so a slot that comes due while the process is down or blocked is not caught up.
    """
    scheduler = AsyncIOScheduler(
        timezone=UTC,
        executors={"default": LoopExecutor(max_threads), "notify": NotifyExecutor()},
        job_defaults={"coalesce": False, "max_instances": 1, "misfire_grace_time": None},
    )
    for task in TaskRegistry.tasks().values():
        add_job(scheduler, task, functools.partial(fire, task.name) if fire else None)
    return scheduler


def add_job(scheduler: AsyncIOScheduler, task: Task, fire: Callable[[], None] | None) -> None:
    """A job that calls `fire` at each slot of the task; None: that runs the task itself."""
    executor = scheduler._executors["default"]
    many = fire is None and task.policies.overlap == "allow"
    scheduler.add_job(
        fire or functools.partial(_run_alone, task, executor),
        executor="notify" if fire else "default",
        trigger=SlotTrigger(task.schedule),
        id=task.name,
        name=task.description or task.name,
        max_instances=sys.maxsize if many else 1,
        replace_existing=True,
    )


def start_scheduler(scheduler: AsyncIOScheduler) -> None:
    """Start it on the running event loop. Raises BatchError where there is none."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        raise BatchError("start_scheduler() needs a running event loop: call it in an `async def`") from None
    scheduler.start()
    _watch(scheduler)
    logger.info("Scheduler started")


def stop_scheduler(scheduler: AsyncIOScheduler) -> asyncio.Future[None]:
    """Stop firing now. Await what it returns to wait for the tasks that a scheduler without a ledger is running."""
    executor: LoopExecutor = scheduler._executors["default"]
    if scheduler.running:
        BaseScheduler.shutdown(scheduler, wait=False)  # AsyncIOScheduler's own comes an iteration later
        scheduler._stop_timer()
        logger.info("Scheduler stopped")
    return asyncio.ensure_future(executor.until_over())


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


async def _run_alone(task: Task, executor: LoopExecutor) -> None:
    """One slot of a task, its retries included. What the ledger would keep stands in the log only."""
    now = clock.now()
    slot = task.schedule.previous(now + timedelta(microseconds=1)) if task.schedule else None
    claimed = Claimed(new_id(), task.name, slot or now, Origin.SCHEDULE, None, 1, 0, now, now)
    while True:
        ending = await _attempt(claimed, task, executor.threads)
        if ending.wait is None or await _is_set_within(executor.stopped, ending.wait):
            return
        claimed = replace(claimed, attempt=claimed.attempt + 1)


async def _attempt(claimed: Claimed, task: Task, threads: ThreadPool) -> Ending:
    ended: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()
    attempt = Attempt(claimed, task, threads, lambda _, ending: ended.set_result(ending))
    attempt.start()
    try:
        return await asyncio.shield(ended)
    except asyncio.CancelledError:
        attempt.interrupt("the process stops")
        raise


async def _is_set_within(event: asyncio.Event, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            return await event.wait()
    except TimeoutError:
        return False
