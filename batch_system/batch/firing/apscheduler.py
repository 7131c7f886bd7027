"""APScheduler, which only says when a slot is due; it executes no task."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import sys
from collections.abc import Awaitable, Iterable, Mapping
from datetime import UTC, datetime, timedelta, tzinfo
from types import MappingProxyType
from typing import Any, Protocol

from apscheduler.events import EVENT_JOB_EXECUTED, JobExecutionEvent
from apscheduler.executors.base import BaseExecutor
from apscheduler.job import Job
from apscheduler.schedulers import base
from apscheduler.schedulers.asyncio import AsyncIOScheduler
from apscheduler.schedulers.base import STATE_PAUSED, STATE_STOPPED, BaseScheduler
from apscheduler.triggers.base import BaseTrigger

from batch_system import clock
from batch_system.batch.cron.cron import Schedule
from batch_system.batch.tasks.registry import Task
from batch_system.logs import get_logger

logger = get_logger("batch_system.batch")

LEAD = timedelta(seconds=2)
"""How long before a slot APScheduler reports it. Reporting 10,000 slots of one instant takes half a
second.
"""

LAST_RUN_TIME = datetime.max.replace(tzinfo=UTC) - LEAD

JOB_DEFAULTS = {"coalesce": False, "max_instances": 1, "misfire_grace_time": None}
NO_ARGUMENTS: Mapping[str, Any] = MappingProxyType({})

WATCHDOG_SECONDS = 1.0
"""How late a slot may be noticed after a step of the wall clock, at most."""


class _ShiftedDatetime(datetime):
    @classmethod
    def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
        return clock.now().astimezone(tz)


def follow_shifted_clock() -> None:
    """For the demonstration: APScheduler reads the wall clock as `clock.shift_to` has set it. It
    holds for all schedulers of this process.
    """
    base.datetime = _ShiftedDatetime


class Notify(Protocol):
    """Called with a task of which a slot is due, now or at `slot`. Returns at once."""

    def __call__(self, name: str, slot: datetime | None = None, /) -> None: ...


class SlotTrigger(BaseTrigger):  # type: ignore[misc] # APScheduler 3 has no types
    """Fires LEAD before each slot of a Schedule. Several past slots make it fire once. Never
    raises.
    """

    __slots__ = ("is_paused", "schedule")

    def __init__(self, schedule: Schedule | None, is_paused: bool = False) -> None:
        self.schedule = schedule
        self.is_paused = is_paused

    def get_next_fire_time(
        self, previous_fire_time: datetime | None, now: datetime
    ) -> datetime | None:
        if self.schedule is None or self.is_paused:
            return None
        slot = self.schedule.next(
            now if previous_fire_time is None else max(_slot_of(previous_fire_time), now)
        )
        return slot - LEAD if slot is not None else None

    def __str__(self) -> str:
        return (
            f"cron[{self.schedule.expression}] {self.schedule.timezone}"
            if self.schedule
            else "manual"
        )


@functools.lru_cache(maxsize=1_000)
def _trigger(schedule: Schedule | None, is_paused: bool) -> SlotTrigger:
    """An immutable trigger, which all jobs with this schedule share."""
    return SlotTrigger(schedule, is_paused)


class LoopExecutor(BaseExecutor):  # type: ignore[misc] # APScheduler 3 has no types
    """Executes jobs that an application adds: calls the function on the event loop, and awaits its
    result in a task.
    """

    def __init__(self) -> None:
        super().__init__()
        self.running: set[asyncio.Task[None]] = set()

    def _do_submit_job(self, job: Any, run_times: list[datetime]) -> None:
        events = [
            JobExecutionEvent(EVENT_JOB_EXECUTED, job.id, job._jobstore_alias, at)
            for at in run_times
        ]
        try:
            result = job.func(*job.args, **job.kwargs)
        except BaseException:  # noqa: BLE001
            # The boundary of a background loop: one job must not stop the scheduler.
            self._run_job_error(job.id, *sys.exc_info()[1:])
            return
        if not inspect.isawaitable(result):
            self._run_job_success(job.id, events)
            return
        # An empty context, because APScheduler's own is that of the code that added the first job.
        task = asyncio.get_running_loop().create_task(
            self._finish(result, job.id, events), context=contextvars.Context()
        )
        self.running.add(task)
        task.add_done_callback(self.running.discard)

    async def _finish(
        self, result: Awaitable[Any], job_id: str, events: list[JobExecutionEvent]
    ) -> None:
        try:
            await result
        except BaseException:  # noqa: BLE001
            # The boundary of a background loop: one job must not stop the scheduler.
            self._run_job_error(job_id, *sys.exc_info()[1:])
        else:
            self._run_job_success(job_id, events)


class NotifyExecutor(LoopExecutor):
    """Reports the slots of tasks to `notify`, and keeps no record of running jobs."""

    def __init__(self) -> None:
        super().__init__()
        self.notify: Notify = _ignore

    def submit_job(self, job: Any, run_times: list[datetime]) -> None:
        for run_time in run_times:  # several slots may lie within LEAD
            self.notify(job.id, _slot_of(run_time))


def _ignore(name: str, slot: datetime | None = None, /) -> None:
    """Used before the service starts: its start fires everything that is due."""


class SlotJob(Job):  # type: ignore[misc] # APScheduler 3 has no types
    """The job of a task, whose slots the NotifyExecutor reports. Its id is the task's name.

    It calls nothing, so it skips APScheduler's checks of the function to call, which take longer
    than the rest.
    """

    __slots__ = ()

    def __init__(self, scheduler: AsyncIOScheduler, task: Task) -> None:
        values = {
            "_scheduler": scheduler,
            "_jobstore_alias": None,
            "id": task.name,
            "name": task.description or task.name,
            "func": _ignore,
            "func_ref": None,
            "args": (),
            "kwargs": NO_ARGUMENTS,
            "trigger": _trigger(task.schedule, False),
            "executor": "notify",
            **JOB_DEFAULTS,
        }
        for name, value in values.items():
            setattr(self, name, value)


def new_scheduler() -> AsyncIOScheduler:
    """A scheduler without jobs, in UTC. It uses the event loop on which it is started."""
    return AsyncIOScheduler(
        timezone=UTC,
        executors={"default": LoopExecutor(), "notify": NotifyExecutor()},
        job_defaults=JOB_DEFAULTS,
    )


def report_to(scheduler: AsyncIOScheduler, notify: Notify) -> None:
    """Call `notify(task.name, slot)` LEAD before each slot from now on."""
    scheduler._lookup_executor("notify").notify = notify


def add_jobs(scheduler: AsyncIOScheduler, tasks: Iterable[Task]) -> None:
    """Add jobs that report each slot of these tasks.

    A job's id is the task's name, and its name is the task's description. An existing job of a task
    is kept.
    """
    existing = {job.id for job in scheduler.get_jobs()}
    with scheduler._jobstores_lock:
        for task in tasks:
            if task.name in existing:
                continue
            job = SlotJob(scheduler, task)
            if scheduler.state == STATE_STOPPED:
                scheduler._pending_jobs.append((job, "default", False))
            else:
                job.next_run_time = job.trigger.get_next_fire_time(None, clock.now())
                scheduler._real_add_job(job, "default", False)


def prepare(scheduler: AsyncIOScheduler) -> None:
    """Make the scheduler accept jobs on the running event loop, unless it is running. It reports no
    slot before `start`.

    It finds jobs quickly then; a stopped scheduler searches all of its jobs each time.
    """
    if not scheduler.running:
        scheduler.start(paused=True)


def start(scheduler: AsyncIOScheduler) -> None:
    """Start the scheduler on the running event loop, unless it is running."""
    prepare(scheduler)
    if scheduler.state == STATE_PAUSED:
        scheduler.resume()
        _watch(scheduler)
        logger.info("Scheduler started")


def stop(scheduler: AsyncIOScheduler) -> None:
    """Stop the scheduler: it fires no slot after this call."""
    if scheduler.running:
        # AsyncIOScheduler.shutdown() would take effect one turn of the event loop later.
        BaseScheduler.shutdown(scheduler, wait=False)
        scheduler._stop_timer()
        logger.info("Scheduler stopped")


def set_schedule(
    scheduler: AsyncIOScheduler, name: str, schedule: Schedule | None, is_paused: bool = False
) -> None:
    """Give the job called `name` this schedule. A paused job, or one without a schedule, has no
    next run time.

    Does nothing if the job has this schedule already, or if there is no such job.
    """
    job = scheduler.get_job(name)
    if job is None or (job.trigger.schedule, job.trigger.is_paused) == (schedule, is_paused):
        return
    trigger = _trigger(schedule, is_paused)
    job.modify(trigger=trigger, next_run_time=trigger.get_next_fire_time(None, clock.now()))


def next_run_times(scheduler: AsyncIOScheduler) -> Mapping[str, datetime | None]:
    """The next run time of each job (aware, or None), by the job's id."""
    return {job.id: _next_run_time(job) for job in scheduler.get_jobs()}


def _next_run_time(job: Any) -> datetime | None:
    """The job's next slot or run time. Before the scheduler's start, APScheduler's jobs lack the
    attribute.
    """
    at: datetime | None = getattr(job, "next_run_time", None)
    return _slot_of(at) if at is not None and isinstance(job.trigger, SlotTrigger) else at


def _slot_of(run_time: datetime) -> datetime:
    """The slot that a job reports at `run_time`."""
    return min(run_time, LAST_RUN_TIME) + LEAD


def describe_jobs(scheduler: AsyncIOScheduler) -> list[dict[str, Any]]:
    """The id, name, next_run_time (ISO 8601 with offset, or None) and trigger of each job."""
    return [
        {
            "id": job.id,
            "name": job.name,
            "next_run_time": at.isoformat() if (at := _next_run_time(job)) else None,
            "trigger": str(job.trigger),
        }
        for job in scheduler.get_jobs()
    ]


def _watch(scheduler: AsyncIOScheduler, last_call: datetime | None = None) -> None:
    """Wake the scheduler every WATCHDOG_SECONDS, because a step of the wall clock delays its timer
    by that step.
    """
    if scheduler.running:
        now = clock.now()
        if last_call is not None and now < last_call:
            _reset_next_run_times(scheduler, now)
        scheduler.wakeup()
        asyncio.get_running_loop().call_later(WATCHDOG_SECONDS, _watch, scheduler, now)


def _reset_next_run_times(scheduler: AsyncIOScheduler, now: datetime) -> None:
    """Compute the next run times from `now`, because the clock was set back and they are too far in
    the future.
    """
    for job in scheduler.get_jobs():
        if isinstance(job.trigger, SlotTrigger):
            job.modify(next_run_time=job.trigger.get_next_fire_time(None, now))
