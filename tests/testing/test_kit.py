"""The fixture `batch`, as an author of tasks uses it, on both databases."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from batch_system import (
    BaseTask,
    Done,
    ItemTask,
    Limit,
    Missed,
    Rate,
    Retry,
    Skip,
    Start,
    Upstream,
    call_async,
    clock,
    current_run,
    get_db,
    get_logger,
    get_settings,
    start,
    start_all,
)
from batch_system.config import forget_settings
from batch_system.errors import (
    BatchError,
    InvalidParameters,
    InvalidTask,
    UnknownRun,
    UnknownTask,
    WrongState,
)
from batch_system.testing.kit import START, Batch
from batch_system.testing.records import RunRecord
from service.application.models import User

HOUR = timedelta(hours=1)
logger = get_logger("tests.kit")


class Hello(BaseTask):
    """Says hello, and writes it down."""

    name = "hello"
    schedule = "0 * * * *"
    timezone = "Asia/Tokyo"
    retry = Retry(attempts=3, wait=60, jitter=0)

    async def run(self, whom: str = "world", slot: datetime | None = None) -> str:
        logger.info(f"Hello, {whom}", slot=slot)
        logging.getLogger("a.library").warning("a line of somebody else")
        async with get_db() as db:
            db.add(User(email=f"{whom} {slot}"))
            await db.commit()
        return whom


class InAThread(BaseTask):
    name = "in_a_thread"
    schedule = "30 0 * * *"
    missed = Missed("all", max_count=2, max_age=timedelta(days=30))

    def run(self) -> int:
        logger.warning("from a thread")
        return 7


async def test_a_run_is_returned_when_it_has_ended_with_its_result_and_logs(batch: Batch) -> None:
    run = await batch.run(Hello, whom="you")
    assert (run.state, run.reason, run.result, run.params) == (
        "succeeded",
        None,
        "you",
        {"whom": "you"},
    )
    assert (run.task, run.origin, run.attempt, run.slot, run.error) == (
        "hello",
        "manual",
        1,
        None,
        None,
    )
    assert [line.level for line in run.logs] == ["info", "warning"]
    assert (
        run.logs[0].text.startswith("Hello, you slot=")
        and run.logs[1].text == "a line of somebody else"
    )
    assert run.created_at == run.finished_at == batch.now == START
    async with get_db(readonly=True) as db:
        assert await db.scalar(select(func.count(User.id))) == 1


async def test_a_run_may_be_for_a_slot(batch: Batch) -> None:
    slot = datetime(2026, 3, 1, 9, 0, tzinfo=UTC)
    run = await batch.run(Hello, slot=slot)
    assert run.slot == slot and "2026-03-01 18:00:00+09:00" in run.logs[0].text


async def test_sync_tasks_run_in_threads(batch: Batch) -> None:
    run = await batch.run(InAThread)
    assert (run.result, run.logs[0].text) == (7, "from a thread")


@pytest.mark.rest
async def test_advancing_fires_each_slot_at_its_instant(batch: Batch) -> None:
    batch.add(Hello, InAThread)
    made = await batch.advance(hours=3)
    assert [(run.task, run.slot, run.started_at) for run in made if run.task == "hello"] == [
        ("hello", START + n * HOUR, START + n * HOUR) for n in (1, 2, 3)
    ]
    assert [run.slot for run in batch.runs("in_a_thread")] == [START + HOUR / 2]
    assert batch.now == START + 3 * HOUR
    assert {run.state for run in batch.runs()} == {"succeeded"}
    assert await batch.advance(minutes=59) == []
    [run] = await batch.advance(minutes=1)
    assert run.slot == START + 4 * HOUR and batch.runs(Hello)[-1] == run


async def test_the_tasks_of_the_folder_fire_too(
    batch_database: str, request: pytest.FixtureRequest
) -> None:
    Path("tasks/from_a_file.py").write_text(
        "from batch_system import BaseTask\nclass F(BaseTask):\n    name = 'f'\n    schedule = "
        "'@hourly'\n"
        "    async def run(self) -> int:\n        return 5\n"
    )
    batch: Batch = request.getfixturevalue("batch")
    [run] = await batch.advance(hours=1)
    assert (run.task, run.result) == ("f", 5)
    assert (await batch.run("f")).result == 5


async def test_only_some_tasks_fire_if_the_test_wants_that(batch: Batch) -> None:
    batch.add(Hello, InAThread)
    batch.only("in_a_thread")
    assert {run.task for run in await batch.advance(hours=2)} == {"in_a_thread"}
    assert (await batch.run(Hello)).state == "succeeded"


@pytest.mark.rest
async def test_a_task_that_is_made_to_fail_fails_and_is_retried_on_the_moved_clock(
    batch: Batch,
) -> None:
    batch.add(Hello)
    batch.fail_next(Hello, ConnectionError("no network"))
    run = await batch.run(Hello)
    assert (run.state, run.attempt) == ("succeeded", 2)
    assert run.error and (run.error["type"], run.error["message"]) == (
        "ConnectionError",
        "no network",
    )
    assert batch.now == START + timedelta(seconds=60)
    batch.fail_next("hello", times=3)
    run = await batch.run(Hello)
    assert (run.state, run.attempt, run.reason) == (
        "failed",
        3,
        "RuntimeError: made to fail by fail_next()",
    )
    assert (await batch.run(Hello, whom="again")).attempt == 1


async def test_a_retry_runs_when_the_clock_comes_to_it(batch: Batch) -> None:
    batch.add(Hello)
    batch.fail_next(Hello)
    assert await batch.advance(hours=1) == []
    [waiting] = batch.runs()
    assert (waiting.state, waiting.attempt) == ("retrying", 1)
    [done] = await batch.advance(seconds=60)
    assert (done.id, done.state, done.attempt) == (waiting.id, "succeeded", 2)
    assert done.finished_at == START + HOUR + timedelta(seconds=60)


async def test_a_sync_task_is_made_to_fail_too(batch: Batch) -> None:
    batch.add(InAThread)
    batch.fail_next(InAThread, ValueError("no"))
    run = await batch.run(InAThread)
    assert (run.state, run.reason) == ("failed", "ValueError: no")
    assert "fail" in str(run.error)


async def test_after_a_downtime_the_missed_policies_decide(batch: Batch) -> None:
    batch.add(Hello, InAThread)
    made = await batch.down(days=5, minutes=5)
    caught_up = [run.slot for run in made if run.task == "in_a_thread"]
    assert caught_up == [START + timedelta(days=n, minutes=30) for n in (3, 4)]
    assert [run.slot for run in made if run.task == "hello"] == [START + timedelta(days=5)]
    [missed] = batch.missed("in_a_thread")
    assert (missed.first_slot, missed.count) == (START + timedelta(minutes=30), 3)
    assert missed.reason and len(batch.missed()) == 2


async def test_a_run_that_code_has_started_runs_when_the_test_says_so(batch: Batch) -> None:
    batch.add(Hello)
    await batch.settle()
    run_id = await start(Hello, whom="later", key="k")
    assert [run.state for run in batch.runs()] == ["queued"]
    [run] = await batch.settle()
    assert (run.id, run.state, run.result, run.key) == (run_id, "succeeded", "later", "k")
    assert batch.now == START


class Parent(BaseTask):
    name = "parent"
    schedule = None

    async def run(self) -> str:
        return await start(Hello, whom=current_run().id)


class SyncParent(BaseTask):
    name = "sync_parent"
    schedule = None

    def run(self) -> str:
        return call_async(start(Hello, whom=current_run().id))


@pytest.mark.rest
@pytest.mark.parametrize("parent", [Parent, SyncParent])
async def test_what_a_run_starts_runs_in_the_same_call(
    batch: Batch, parent: type[BaseTask]
) -> None:
    batch.add(Hello)
    run = await batch.run(parent)
    [child] = batch.runs("hello")
    assert (child.id, child.parent, child.state) == (run.result, run.id, "succeeded")


async def test_the_clock_starts_where_a_test_puts_it_and_never_goes_back(batch: Batch) -> None:
    at = datetime(2025, 10, 25, 22, 0, tzinfo=UTC)
    batch.set_time(at)
    assert batch.now == clock.now() == at
    batch.add(Hello)
    await batch.advance(hours=1)
    with pytest.raises(
        BatchError, match="set_time\\(\\) works only before the first run or missed slot"
    ):
        batch.set_time(at)
    with pytest.raises(ValueError, match="can't go back by 1:00:00"):
        await batch.advance(hours=-1)


LATE = """
from batch_system import BaseTask

class Late(BaseTask):
    name, schedule = "late", None

    async def run(self) -> str:
        return "loaded by its name"
"""


async def test_a_name_that_is_not_known_is_looked_for_in_tasks_dir(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("tasks/late.py").write_text(LATE)
    assert (await batch.run("late")).result == "loaded by its name"
    Path("jobs").mkdir()
    Path("jobs/later.py").write_text(LATE.replace('"late"', '"later"'))
    monkeypatch.setenv("TASKS_DIR", "jobs")
    forget_settings()
    batch.only("later")
    assert (await batch.run("later")).result == "loaded by its name"


async def test_a_task_that_can_t_be_run_is_refused(batch: Batch) -> None:
    class NoName(BaseTask):
        schedule = None

        async def run(self) -> None: ...

    with pytest.raises(InvalidTask, match=r"NoName.*name is missing"):
        await batch.run(NoName)
    looked = rf"the tasks are: none \(TASKS_DIR is tasks, in {re.escape(str(Path.cwd()))} and "
    with pytest.raises(UnknownTask, match=f"no task is named 'nowhere'; {looked}"):
        await batch.run("nowhere")
    with pytest.raises(InvalidParameters, match="there is no parameter 'who'"):
        await batch.run(Hello, who="x")
    assert batch.runs() == []


@pytest.mark.rest
async def test_a_run_that_does_not_end_fails_the_test_and_is_given_up(batch: Batch) -> None:
    class Endless(BaseTask):
        name = "endless"
        schedule = None

        async def run(self) -> None:
            await asyncio.Event().wait()

    batch.patience = 0.5
    with pytest.raises(
        TimeoutError, match=r"still running after batch\.patience, which is 0\.5 s: endless"
    ):
        await batch.run(Endless)
    assert [run.state for run in batch.runs()] == ["interrupted"]


async def test_backups_go_to_a_folder_of_the_test(batch: Batch, tmp_path: Path) -> None:
    assert tmp_path in get_settings().BACKUP_DIR.parents


@pytest.mark.parametrize("time", [1, 2])
async def test_each_test_has_an_empty_database_also_on_a_loop_that_they_share(
    batch: Batch, time: int
) -> None:
    async with get_db() as db:
        assert await db.scalar(select(func.count(User.id))) == 0
        db.add(User(email="once@example.com"))
        await db.commit()


async def test_a_file_that_can_t_be_used_fails_the_test_that_would_fire_it(
    batch_database: str, request: pytest.FixtureRequest
) -> None:
    Path("tasks/broken.py").write_text("1 / 0")
    batch: Batch = request.getfixturevalue("batch")
    batch.add(Hello)
    with pytest.raises(
        BatchError, match=r"tasks/broken\.py can't be used: ZeroDivisionError in line 1"
    ):
        await batch.advance(hours=1)
    batch.only(Hello)
    assert len(await batch.advance(hours=1)) == 1


async def test_two_calls_at_once_are_refused(batch: Batch) -> None:
    first, second = await asyncio.gather(
        batch.run(Hello), batch.run(InAThread), return_exceptions=True
    )
    assert isinstance(first, RunRecord) and first.state == "succeeded"
    assert (
        isinstance(second, BatchError) and "another call of `batch` is not over" in second.message
    )


async def test_the_arguments_of_fail_next_and_set_time_are_checked(batch: Batch) -> None:
    with pytest.raises(TypeError, match=r"fail_next\(\) was given 'no'; allowed: an exception"):
        batch.fail_next(Hello, "no")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="allowed: an aware datetime"):
        batch.set_time(datetime(2026, 1, 1))


@pytest.fixture
def before_and_after() -> Iterator[None]:
    before = clock.is_moved()
    yield
    assert clock.is_moved() == before is False


async def test_afterwards_the_clock_goes_on(before_and_after: None, batch: Batch) -> None:
    assert clock.is_moved()


# What people can ask of runs and tasks, a test can ask too.


class Greets(ItemTask):
    """Sets one user aside until it is told to stop that."""

    name, schedule = "greets", None
    skip = Skip(limit=5)
    refuses = True

    def items(self) -> Any:
        return select(User)

    async def save(self, item: Any, fetched: Any, db: Any) -> None:
        if self.refuses and item.id == 2:
            raise ValueError("not this one")


@pytest.mark.rest
async def test_a_run_that_has_failed_is_given_a_new_attempt(batch: Batch) -> None:
    batch.fail_next(InAThread, OSError("no network"))
    failed = await batch.run(InAThread)
    assert failed.state == "failed"
    retried = await batch.retry(failed)
    assert (retried.id, retried.state, retried.requested_by) == (failed.id, "succeeded", "test")
    with pytest.raises(WrongState, match="has succeeded"):
        await batch.retry(failed.id)
    assert (await batch.retry(failed.id, from_the_beginning=True)).attempt == 3


async def test_a_run_that_waits_is_cancelled(batch: Batch) -> None:
    batch.add(Hello)
    await batch.advance(seconds=1)
    waiting = await start(Hello)
    cancelled = await batch.cancel(waiting)
    assert (cancelled.state, cancelled.reason) == ("cancelled", "cancelled by test")
    with pytest.raises(WrongState, match="can't be cancelled"):
        await batch.cancel(waiting)


@pytest.mark.rest
async def test_items_that_were_set_aside_are_done_again(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with get_db() as db:
        db.add_all([User(email=f"{number}") for number in range(3)])
        await db.commit()
    run = await batch.run(Greets)
    [item] = await batch.quarantine(run)
    assert (item.item, item.error["type"], item.redriven_by) == ("2", "ValueError", None)
    monkeypatch.setattr(Greets, "refuses", False)
    redriven = await batch.redrive(run)
    assert (redriven.state, redriven.parent) == ("succeeded", run.id)
    [item] = await batch.quarantine(run)
    assert item.redriven_by == redriven.id
    with pytest.raises(WrongState, match="none is left"):
        await batch.redrive(run)


@pytest.mark.rest
async def test_a_task_stands_for_its_newest_run(batch: Batch) -> None:
    with pytest.raises(UnknownRun, match="the task greets has no run yet"):
        await batch.quarantine(Greets)
    async with get_db() as db:
        db.add_all([User(email=f"{number}") for number in range(3)])
        await db.commit()
    await batch.run(Greets)
    newest = await batch.run(Greets)
    assert [item.item for item in await batch.quarantine("greets")] == ["2"]
    redriven = await batch.redrive(Greets, items=["2"])
    assert (redriven.parent, redriven.result) == (newest.id, {"done": 0, "set_aside": 1})
    again = await batch.retry("greets", from_the_beginning=True)
    assert (again.id, again.attempt) == (redriven.id, 2)


@pytest.mark.rest
async def test_a_redrive_has_the_slot_and_the_parameters_of_its_run(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    class From(Greets):
        name = "from"

        def items(self, slot: datetime, first: int) -> Any:
            logger.info(f"from {first} at {slot.isoformat()}")
            return select(User).where(User.id >= first)

    async with get_db() as db:
        db.add_all([User(email=f"{number}") for number in range(3)])
        await db.commit()
    for slot, at in ((None, START), (START + HOUR, START + HOUR)):
        run = await batch.run(From, first=2, slot=slot)
        assert run.result == {"done": 1, "set_aside": 1}
        redriven = await batch.redrive(run)
        assert redriven.params == {"first": 2, "redrive": run.id} and redriven.slot == at
        assert redriven.logs[0].text == f"from 2 at {at.isoformat()}" == run.logs[0].text
    second = await batch.redrive(redriven, items=["2"])
    third = await batch.redrive(second)
    assert third.params == {"first": 2, "redrive": second.id}


@pytest.mark.rest
async def test_a_paused_task_misses_its_slots(batch: Batch) -> None:
    batch.add(Hello)
    await batch.advance(hours=1)
    await batch.pause(Hello)
    assert await batch.advance(hours=2) == []
    await batch.unpause(Hello)
    [missed] = batch.missed(Hello)
    assert (missed.count, missed.reason) == (2, "paused by test")
    assert [run.state for run in await batch.advance(hours=1)] == ["succeeded"]


@pytest.mark.rest
async def test_the_pool_of_a_task_does_not_matter(batch: Batch) -> None:
    class Elsewhere(Hello):
        name = "elsewhere"
        pool = "gpu"

    assert (await batch.run(Elsewhere, whom="you")).state == "succeeded"
    assert [run.task for run in await batch.advance(hours=1)] == ["elsewhere"]


class Extract(BaseTask):
    name = "extract"
    schedule = "0 3 * * *"

    async def run(self) -> dict[str, str]:
        return {"file": "monday.csv"}


class Load(BaseTask):
    name = "load"
    after = "extract"

    async def run(self, upstream: Upstream, day: str = "") -> str:
        return f"{upstream['extract'].result['file']}{day}"


class Report(BaseTask):
    name = "report"
    schedule = None

    def run(self, upstream: Upstream) -> list[Any]:
        async def results() -> list[Any]:
            return [done.result async for done in upstream]

        return call_async(results())


class Starter(BaseTask):
    name = "starter"
    schedule = None

    async def run(self) -> None:
        await start_all(
            [Start(Hello, whom="ann"), Start(Hello, whom="bob", delay=60)], then=Start(Report)
        )
        await start(Hello, whom="later", at=START + 2 * HOUR)


@pytest.mark.rest
async def test_a_slot_that_waits_runs_after_the_one_that_it_waits_for(batch: Batch) -> None:
    batch.add(Extract, Load)
    batch.only(Extract, Load)
    ended = await batch.advance(hours=4)
    assert [(run.task, run.state, run.result) for run in ended] == [
        ("extract", "succeeded", {"file": "monday.csv"}),
        ("load", "succeeded", "monday.csv"),
    ]
    batch.fail_next(Extract)
    extract, load = await batch.advance(days=1)
    assert (extract.state, load.state, load.reason) == (
        "failed",
        "skipped",
        f"extract failed: run {extract.id}",
    )
    await batch.retry(extract)
    assert batch.runs(Load)[-1].state == "succeeded"


@pytest.mark.rest
async def test_run_gives_a_task_what_it_has_waited_for(batch: Batch) -> None:
    batch.add(Extract, Load, Report)
    run = await batch.run(Load, upstream={"extract": {"file": "tuesday.csv"}}, day="!")
    assert (run.state, run.result) == ("succeeded", "tuesday.csv!")
    made = Done("extract", None, None, None, result={"file": "none"})
    assert (await batch.run(Load, upstream={"extract": made})).result == "none"
    assert (await batch.run(Report, upstream=[1, {"two": 2}])).result == [1, {"two": 2}]
    without = await batch.run(Load)
    assert (without.state, "it has waited for no slot" in str(without.reason)) == ("failed", True)
    with pytest.raises(InvalidParameters, match="no parameter with the annotation Upstream"):
        await batch.run(Extract, upstream={})


@pytest.mark.rest
async def test_groups_and_later_starts_are_opened_when_it_is_time(batch: Batch) -> None:
    batch.add(Starter, Hello, Report)
    batch.only()
    await batch.run(Starter)
    assert [run.state for run in batch.runs(Hello)] == ["succeeded", "waiting", "waiting"]
    ended = await batch.advance(hours=1)
    assert {run.task: run.result for run in ended} == {"hello": "bob", "report": ["ann", "bob"]}
    [later] = await batch.advance(hours=1)
    assert (later.result, later.started_at) == ("later", START + 2 * HOUR)


class Letters(BaseTask):
    """Two at a time for each customer, and two in a minute."""

    name, schedule = "letters", None
    limit = Limit(lambda tenant: 0 if tenant == "closed" else 2, key="tenant", default=1)
    rate = Rate(2, per=60, key="tenant")

    async def run(self, tenant: str = "acme") -> None: ...


async def test_limits_and_rates_hold_while_the_clock_stands_still(batch: Batch) -> None:
    batch.add(Letters)
    for tenant in ("acme", "acme", "acme", "acme", "acme", "bolt", "closed"):
        assert (await batch.start(Letters, tenant=tenant)).state == "queued"
    begun = [run.params for run in await batch.settle()]
    assert sorted(each["tenant"] for each in begun if each) == ["acme", "acme", "bolt"]
    begun = [run.params for run in await batch.advance(seconds=60)]
    assert [each["tenant"] for each in begun if each] == ["acme", "acme"]
    assert len(await batch.advance(minutes=5)) == 1
    assert [run.params for run in batch.runs() if run.state == "queued"] == [{"tenant": "closed"}]


async def test_a_run_waits_for_its_rate_while_the_clock_moves(batch: Batch) -> None:
    batch.add(Letters)
    began = batch.now
    runs = [await batch.run(Letters) for _ in range(3)]
    assert [run.state for run in runs] == ["succeeded"] * 3
    assert batch.now == began + timedelta(minutes=1)
