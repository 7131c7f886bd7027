from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from apscheduler.schedulers.asyncio import AsyncIOScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from batch_system import BaseTask, TaskRegistry, clock
from batch_system.batch.cron.cron import Schedule, schedule
from batch_system.batch.firing import apscheduler as module
from batch_system.batch.firing.apscheduler import (
    LEAD,
    SlotTrigger,
    describe_jobs,
    next_run_times,
    set_schedule,
)

SECONDS = 5.0
RARELY = "0 0 1 1 *"
secret: ContextVar[str] = ContextVar("secret", default="nothing")


class Every(BaseTask):
    name = "every"
    description = "Every second"
    schedule = "* * * * * *"

    def run(self) -> Any: ...


def register(run: Any, name: str = "every", **attributes: Any) -> None:
    TaskRegistry.register(
        type("Made", (Every,), {"__module__": __name__, "run": run, "name": name, **attributes})
    )


@pytest.fixture
async def started() -> AsyncIterator[Callable[..., AsyncIOScheduler]]:
    """A scheduler that runs, with a job for each registered task; stopped at the end."""
    made: list[AsyncIOScheduler] = []

    def begin(notify: module.Notify) -> AsyncIOScheduler:
        made.append(with_jobs(notify))
        module.start(made[-1])
        return made[-1]

    yield begin
    for scheduler in made:
        module.stop(scheduler)


def with_jobs(notify: module.Notify) -> AsyncIOScheduler:
    scheduler = module.new_scheduler()
    module.report_to(scheduler, notify)
    module.add_jobs(scheduler, TaskRegistry.tasks().values())
    return scheduler


def fire_now(scheduler: AsyncIOScheduler, name: str = "every") -> None:
    scheduler.get_job(name).modify(next_run_time=clock.now())


class Calls:
    """Collects what happened, and waits for the n-th of it. Usable from threads."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self._loop = asyncio.get_running_loop()
        self._more = asyncio.Event()

    def add(self, what: Any, *_: Any) -> None:
        self.seen.append(what)
        self._loop.call_soon_threadsafe(self._more.set)

    async def reach(self, number: int) -> list[Any]:
        async with asyncio.timeout(SECONDS):
            while len(self.seen) < number:
                self._more.clear()
                await self._more.wait()
        return self.seen


async def test_no_context_of_the_starter_leaks_into_a_job(started: Any) -> None:
    calls = Calls()

    async def job() -> None:
        calls.add(secret.get())

    secret.set("of the starter")
    scheduler = started(calls.add)
    scheduler.add_job(job, "interval", seconds=60, id="job")
    fire_now(scheduler, "job")
    assert await calls.reach(1) == ["nothing"]


async def test_jobs_carry_the_names_of_their_tasks(started: Any) -> None:
    register(Every.run, "b", schedule="0 5 * * *", timezone="Asia/Tokyo")
    register(Every.run, "a", description="", schedule=None)
    before = with_jobs(lambda *_: None)
    assert next_run_times(before) == {"a": None, "b": None}
    jobs = {job["id"]: job for job in describe_jobs(started(lambda *_: None))}
    assert (jobs["a"]["name"], jobs["a"]["next_run_time"], jobs["a"]["trigger"]) == (
        "a",
        None,
        "manual",
    )
    assert (jobs["b"]["name"], jobs["b"]["trigger"]) == (
        "Every second",
        "cron[0 5 * * *] Asia/Tokyo",
    )
    assert jobs["b"]["next_run_time"].endswith("T20:00:00+00:00")


async def test_a_due_slot_is_reported_and_the_scheduler_runs_no_task(started: Any) -> None:
    calls = Calls()
    # So that no other slot is due within the test.
    register(lambda self: calls.add("ran"), schedule=RARELY)
    fire_now(started(calls.add))
    assert await calls.reach(1) == ["every"]


async def test_a_job_of_the_application_goes_on_firing_whatever_it_returns_or_raises(
    started: Any,
) -> None:
    calls = Calls()

    def job(error: BaseException | None) -> int:
        calls.add(error)
        if error is not None:
            raise error
        return 5

    scheduler = started(lambda *_: None)
    for error in (SystemExit(3), ValueError(), None):
        scheduler.add_job(
            job, "interval", args=[error], seconds=60, id="plain", replace_existing=True
        )
        for _ in range(2):
            before = len(calls.seen)
            fire_now(scheduler, "plain")
            await calls.reach(before + 1)


async def test_a_job_can_lose_its_schedule_and_get_another_one(started: Any) -> None:
    register(Every.run, schedule=RARELY)
    scheduler = started(lambda *_: None)
    set_schedule(scheduler, "every", None)
    set_schedule(scheduler, "no_such_task", None)
    assert next_run_times(scheduler) == {"every": None}
    set_schedule(scheduler, "every", schedule("0 0 1 2 *"))
    at = next_run_times(scheduler)["every"]
    assert at is not None and (at.month, at.day) == (2, 1)


async def test_the_watchdog_fires_a_slot_that_a_clock_step_made_due(
    started: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step is simulated: the job's next run time is set to now, while APScheduler's timer is
    left as it is.
    """
    monkeypatch.setattr(module, "WATCHDOG_SECONDS", 0.05)
    calls = Calls()
    register(Every.run, schedule=RARELY)
    scheduler = started(calls.add)
    await asyncio.sleep(0.1)
    scheduler._jobstores["default"]._jobs[0][0].next_run_time = clock.now()
    scheduler._jobstores["default"]._jobs[0] = (scheduler._jobstores["default"]._jobs[0][0], 0.0)
    assert await calls.reach(1) == ["every"]


async def test_after_a_step_back_of_the_clock_jobs_wait_for_the_next_slots_by_the_new_time(
    started: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WATCHDOG_SECONDS", 0.05)
    register(Every.run, schedule="0 * * * *")
    with clock.moved(datetime(2030, 1, 1, 12, 30, tzinfo=UTC)):
        scheduler = started(lambda *_: None)
        set_schedule(scheduler, "every", schedule("30 * * * *"))
        assert next_run_times(scheduler)["every"] == datetime(2030, 1, 1, 13, 30, tzinfo=UTC)
        await asyncio.sleep(0.1)
        clock.advance(-timedelta(hours=2))
        before = datetime(2030, 1, 1, 11, 30, tzinfo=UTC)
        async with asyncio.timeout(10):
            while next_run_times(scheduler)["every"] != before:
                await asyncio.sleep(0.01)


async def test_after_a_blocked_event_loop_the_scheduler_fires_once_and_goes_on(
    started: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One report stands for all slots that have come due meanwhile: the dispatcher looks which are
    due.
    """
    monkeypatch.setattr(module, "LEAD", timedelta())
    slots = Calls()
    register(Every.run)
    started(lambda _, slot: slots.add(slot))
    before = len(await slots.reach(1))
    time.sleep(2.1)
    unblocked_at = clock.now()
    first, second = (await slots.reach(before + 2))[before : before + 2]
    assert first <= unblocked_at - timedelta(seconds=1)
    assert second > unblocked_at


fields = st.sampled_from(["*", "*/7", "1", "0,20", "5-9"])
ends = [datetime.max.replace(tzinfo=UTC), datetime.min.replace(tzinfo=UTC)]
instants = st.datetimes(timezones=st.just(UTC)) | st.sampled_from(ends)


@settings(deadline=None)
@given(fields, fields, st.sampled_from(["UTC", "Europe/Berlin"]), st.none() | instants, instants)
def test_a_trigger_never_raises_and_never_returns_a_past_slot(
    minute: str, hour: str, zone: str, previous: datetime | None, now: datetime
) -> None:
    at = SlotTrigger(Schedule(f"{minute} {hour} * * *", zone)).get_next_fire_time(previous, now)
    assert at is None or at + LEAD > max(previous or now, now)


def test_a_trigger_skips_past_slots_and_keeps_its_order_after_a_step_back_of_the_clock() -> None:
    trigger = SlotTrigger(schedule("* * * * * *"))
    slot, day, second = datetime(2026, 1, 1, tzinfo=UTC), timedelta(days=1), timedelta(seconds=1)
    assert trigger.get_next_fire_time(slot - LEAD, slot + day) == slot + day + second - LEAD
    assert trigger.get_next_fire_time(slot - LEAD, slot - day) == slot + second - LEAD
    assert SlotTrigger(None).get_next_fire_time(None, slot) is None


def test_a_trigger_reports_a_slot_that_is_closer_than_its_lead() -> None:
    trigger, slot = SlotTrigger(schedule("0 0 1 * *")), datetime(2026, 1, 1, tzinfo=UTC)
    assert trigger.get_next_fire_time(None, slot - LEAD / 2) == slot - LEAD


async def test_a_job_reports_its_slot_and_shows_it_as_its_next_run_time(started: Any) -> None:
    calls = Calls()
    register(Every.run, schedule="* * * * * *")
    began_at = clock.now()
    scheduler = started(lambda *reported: calls.add(reported))
    (name, slot) = (await calls.reach(1))[0]
    assert (name, slot.microsecond) == ("every", 0) and began_at < slot <= clock.now() + LEAD
    shown = next_run_times(scheduler)["every"]
    assert shown is not None and shown.microsecond == 0 and shown > slot


async def test_each_slot_is_reported_that_comes_within_the_lead(started: Any) -> None:
    """At the start of a scheduler, several slots of a task that fires each second are closer than
    the lead.
    """
    slots = Calls()
    register(Every.run, schedule="* * * * * *")
    began_at = clock.now()
    started(lambda name, slot: slots.add(slot))
    begun_at = clock.now()
    first, *others = (await slots.reach(4))[:4]
    assert others == [first + timedelta(seconds=number) for number in (1, 2, 3)]
    assert began_at < first <= begun_at + timedelta(seconds=1)


async def test_a_coroutine_job_of_the_application_is_awaited(started: Any) -> None:
    done = asyncio.Event()

    async def job() -> None:
        await asyncio.sleep(0)
        done.set()

    scheduler = started(lambda *_: None)
    scheduler.add_job(job)
    await asyncio.wait_for(done.wait(), SECONDS)
