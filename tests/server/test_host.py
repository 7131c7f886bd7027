"""The whole service in this process, on both databases: tasks fire, end, are retried, drained and
resumed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, text, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system import Retry, clock, config, current_run, get_logger, logs
from batch_system.alerts import pings
from batch_system.batch.execution.engine import LocalEngine
from batch_system.batch.execution.outcomes import Group
from batch_system.batch.execution.tickets import Look
from batch_system.batch.firing import pauses, schedule_sync, task_sync
from batch_system.batch.ledger import run_logs, tables, transitions
from batch_system.batch.ledger.attempts import Outcome
from batch_system.batch.ledger.tables import new_id
from batch_system.batch.nodes import new_tasks
from batch_system.batch.nodes.outage import Outage
from batch_system.batch.nodes.roles import BY_HAND
from batch_system.batch.tasks import discovery
from batch_system.config import get_settings
from batch_system.database.engine import LOCK_SECONDS, Database
from batch_system.errors import InvalidSetting
from batch_system.server.service import BatchService
from batch_system.server.shutdown import Stopping
from batch_system.settings.settings import ENV_FILE
from batch_system.testing.postgres import OwnServer, find_binaries
from batch_system.verbs.run_changes import CancelRun
from batch_system.verbs.system import Diagnose
from tests.batch.ledger_world import make_task, refresh, rows, until
from tests.incidents.receivers import http_receiver

START = datetime(2026, 3, 10, 12, 0, 30, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
Begin = Callable[[], Awaitable[BatchService]]

DROPPED = """
from batch_system import BaseTask

class Dropped(BaseTask):
    name = "dropped"
    schedule = "* * * * *"

    async def run(self) -> str:
        return "here"
"""
HANGS = """
import time
from pathlib import Path
while not Path("go on").exists():
    time.sleep(0.01)
"""

logger = get_logger("tests")


@pytest.fixture
async def begin(ledger_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Begin]:
    """Starts a service with the registered tasks, on a clock that stands still."""
    monkeypatch.setenv("LEDGER_URL", ledger_url)
    monkeypatch.setenv("POLL_SECONDS", "0.05")
    monkeypatch.setenv("DRAIN_SECONDS", "0.2")
    config.forget_settings()
    logs.set_up("INFO")
    begun: list[BatchService] = []

    async def begin() -> BatchService:
        service = BatchService(get_settings())
        await service.start()
        begun.append(service)
        return service

    with clock.moved(START):
        yield begin
        for service in begun:
            if not service.is_stopping:
                await service.stop()


def fire(service: BatchService, name: str) -> None:
    """Notify the dispatcher as APScheduler does at a slot: it follows the real clock, while ours
    stands still.
    """
    service.dispatcher.notify(name)


@pytest.mark.rest
async def test_a_service_writes_what_its_calls_of_the_dead_mans_switch_came_to(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def pinged() -> list[dict[str, Any]]:
        return [row for row in await rows(service.ledger, tables.nodes) if row["ping"]]

    monkeypatch.setattr(pings, "EVERY_SECONDS", 0.05)
    async with http_receiver() as receiver:
        monkeypatch.setenv("BATCH_PING_URL", f"{receiver.url}/hunter2")
        config.forget_settings()
        service = await begin()
        (row,) = await until(pinged)
        assert row["ping"] == {"good_at": START.isoformat()}
        receiver.answers = ["503 Service Unavailable"]

        async def failed() -> list[dict[str, Any]]:
            return [row for row in await pinged() if "error" in row["ping"]]

        (row,) = await until(failed)
        when = START.isoformat()
        assert row["ping"] == {"good_at": when, "failed_at": when, "error": "has answered 503"}
        checks = (await service.operations(Diagnose())).checks
        (found,) = [check for check in checks if check.part == "ping"]
        assert found.text.endswith("the dead man's switch has answered 503")
        receiver.answers = ["204 No Content"]

        async def mended() -> bool:
            return all("error" not in row["ping"] for row in await pinged())

        await until(mended)


async def run_in(service: BatchService, state: str, **equal: Any) -> dict[str, Any]:
    found = await until(lambda: rows(service.ledger, state=state, **equal))
    return found[0]


async def lines_of(service: BatchService, run: str) -> list[str]:
    async with service.ledger.engine.connect() as connection:
        return [line.text for line in await run_logs.tail(connection, run, 1_000)]


@pytest.mark.rest
async def test_a_due_slot_runs_and_is_recorded_in_the_ledger(begin: Begin) -> None:
    async def run(self: object) -> dict[str, str]:
        logger.info("working", step=1)
        logging.getLogger("a.library").warning("a line of somebody else")
        return {"slot": current_run().slot.isoformat()}

    make_task("tick", run=run, timezone="Asia/Tokyo")
    service = await begin()
    clock.advance(MINUTE)
    fire(service, "tick")
    found = await run_in(service, "succeeded")
    assert found["slot"] == START + 0.5 * MINUTE
    assert found["result"] == {"slot": "2026-03-10T21:01:00+09:00"}
    assert (found["node"], found["attempt"], found["origin"]) == (service.node.id, 1, "schedule")
    (attempt,) = await rows(service.ledger, tables.attempts)
    assert (attempt["run"], attempt["outcome"]) == (found["id"], "succeeded")
    assert await lines_of(service, found["id"]) == ["working step=1", "a line of somebody else"]


@pytest.mark.rest
async def test_the_next_slot_runs_after_the_first_has_ended(begin: Begin) -> None:
    make_task("tick")
    service = await begin()
    for n in range(1, 4):
        clock.advance(MINUTE)
        fire(service, "tick")
        await until(lambda n=n: at_least(service, n))
    assert len(await rows(service.ledger, tables.attempts)) == 3


async def at_least(service: BatchService, n: int, state: str = "succeeded") -> bool:
    return len(await rows(service.ledger, state=state)) >= n


@pytest.mark.rest
async def test_a_failed_attempt_is_retried_with_a_fresh_instance_and_each_is_recorded(
    begin: Begin,
) -> None:
    instances: list[object] = []

    async def run(self: object) -> str:
        instances.append(self)
        if len(instances) < 3:
            raise ConnectionError("not yet")
        return "done"

    make_task("flaky", run=run, retry=Retry(attempts=3, wait=60, jitter=0))
    service = await begin()
    clock.advance(MINUTE)
    fire(service, "flaky")
    waiting = await run_in(service, "retrying", attempt=1)
    assert waiting["reason"] == "ConnectionError: not yet"
    assert waiting["due_at"] - clock.now() == timedelta(seconds=60)
    clock.advance(MINUTE)
    await run_in(service, "retrying", attempt=2)
    clock.advance(2 * MINUTE)
    done = await run_in(service, "succeeded")
    assert (done["attempt"], done["result"], done["reason"]) == (3, "done", None)
    assert len(set(map(id, instances))) == 3
    attempts = await rows(service.ledger, tables.attempts)
    assert [(a["number"], a["outcome"]) for a in attempts] == [
        (1, "failed"),
        (2, "failed"),
        (3, "succeeded"),
    ]
    assert "ConnectionError: not yet" in attempts[0]["error"]["traceback"]


def make_tasks_that_end_in_each_way() -> None:
    """`stuck` ends by a cancel, `long` when the service stops. Each has one slot, so the real clock
    fires no more.
    """

    async def flaky(self: object) -> None:
        if current_run().attempt == 1:
            raise ConnectionError("not yet")

    async def bad(self: object) -> None:
        raise KeyError("gone")

    async def waits(self: object) -> None:
        await asyncio.Event().wait()

    make_task("flaky", "1 12 10 3 *", run=flaky, retry=Retry(attempts=2, wait=60, jitter=0))
    make_task("bad", "1 12 10 3 *", run=bad)
    make_task("slow", "1 12 10 3 *", run=waits, timeout=0.05)
    make_task("stuck", "1 12 10 3 *", run=waits)
    make_task("long", "1 12 10 3 *", run=waits)


@pytest.mark.rest
async def test_a_json_line_about_the_end_of_an_attempt_has_what_it_says_as_fields(
    begin: Begin,
) -> None:
    make_tasks_that_end_in_each_way()
    service = await begin()
    stream = StringIO()
    logs.set_up("INFO", "json", stream)
    clock.advance(MINUTE)
    for name in service.tasks:
        fire(service, name)
    await run_in(service, "retrying", task="flaky")
    for name in ("bad", "slow"):
        await run_in(service, "failed", task=name)
    stuck = await run_in(service, "running", task="stuck")
    clock.advance(MINUTE)
    await service.operations(CancelRun(run=stuck["id"], wait=10))
    flaky = await run_in(service, "succeeded", task="flaky")
    await service.stop()
    logs.flush()
    lines = [line for line in map(json.loads, stream.getvalue().splitlines()) if "duration" in line]
    assert {(line["task"], line["state"], line["attempt"]) for line in lines} == {
        ("flaky", "retrying", 1),
        ("flaky", "succeeded", 2),
        ("bad", "failed", 1),
        ("slow", "failed", 1),
        ("stuck", "cancelled", 1),
        ("long", "interrupted", 1),
    }
    assert {line["slot"] for line in lines} == {"2026-03-10T12:01:00Z"}
    assert [line["run"] for line in lines if line["task"] == "flaky"] == [flaky["id"]] * 2
    assert all(type(line["duration"]) in (int, float) for line in lines)
    assert [line["duration"] for line in lines if line["task"] == "stuck"] == [60]
    again = await begin()
    kept = await lines_of(again, stuck["id"])
    assert (
        len(kept) == 1
        and kept[0].startswith("stuck was cancelled: cancelled by")
        and "duration" not in kept[0]
    )


@pytest.mark.rest
async def test_an_error_that_is_not_on_the_list_is_not_retried(begin: Begin) -> None:
    async def run(self: object) -> None:
        raise KeyError("gone")

    make_task("picky", run=run, retry=Retry(attempts=3, on=(ConnectionError,)))
    service = await begin()
    clock.advance(MINUTE)
    fire(service, "picky")
    failed = await run_in(service, "failed")
    assert (failed["attempt"], failed["reason"]) == (1, "KeyError: 'gone'")
    assert any("Traceback" in line for line in await lines_of(service, failed["id"]))


@pytest.mark.rest
async def test_a_run_past_its_timeout_has_failed(begin: Begin) -> None:
    async def run(self: object) -> None:
        await asyncio.Event().wait()

    make_task("slow", run=run, timeout=0.05)
    service = await begin()
    clock.advance(MINUTE)
    fire(service, "slow")
    assert (await run_in(service, "failed"))["reason"] == "timed out after 0.05 s"


@pytest.mark.rest
async def test_a_file_that_is_added_while_the_service_runs_is_loaded_and_fires(
    begin: Begin,
) -> None:
    service = await begin()
    await refresh(service.schedules)
    Path("tasks/dropped.py").write_text(DROPPED)
    for _ in range(2):
        await refresh(service.schedules)
    clock.advance(MINUTE)
    fire(service, "dropped")
    assert (await run_in(service, "succeeded", task="dropped"))["result"] == "here"
    [node] = await rows(service.ledger, tables.nodes)
    assert node["tasks"] == ["dropped"]


@pytest.mark.rest
async def test_a_file_whose_import_hangs_delays_no_schedule_and_is_named(
    begin: Begin, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(new_tasks, "IMPORT_SECONDS", 0.05)
    monkeypatch.setattr(discovery, "SLOW_SECONDS", 0.1)
    ENV_FILE.write_text('CUSTOM_TASK_CRON="0 7 * * *"\n')
    make_task("dynamic", property(lambda self: get_settings().CUSTOM_TASK_CRON))
    service = await begin()
    logging.getLogger().addHandler(caplog.handler)
    await refresh(service.schedules)
    Path("tasks/dropped.py").write_text(HANGS + DROPPED)
    async with asyncio.timeout(10):
        for _ in range(2):
            await refresh(service.schedules)
        ENV_FILE.write_text('CUSTOM_TASK_CRON="0 8 * * *"\n')
        await refresh(service.schedules)
    assert str(service.scheduler.get_job("dynamic").trigger) == "cron[0 8 * * *] UTC"
    await until(lambda: told(caplog, "tasks/dropped.py: its import has not ended after 0.1 s"))
    Path("go on").touch()

    async def loaded() -> bool:
        await refresh(service.schedules)
        return "dropped" in service.tasks

    await until(loaded)
    assert caplog.text.count("has not ended") == 1


@pytest.mark.rest
async def test_a_property_that_hangs_keeps_no_other_change_from_taking_effect_and_is_named(
    begin: Begin, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(schedule_sync, "READ_SECONDS", 0.05)
    goes_on = threading.Event()
    goes_on.set()
    crons = ["0 7 * * *"]

    def read(_: object) -> str:
        goes_on.wait()
        return crons[0]

    make_task("dynamic", property(read))
    service = await begin()
    logging.getLogger().addHandler(caplog.handler)
    await refresh(service.schedules)
    goes_on.clear()
    crons[0] = "0 8 * * *"
    Path("tasks/dropped.py").write_text(DROPPED)
    async with asyncio.timeout(10):
        while "dropped" not in service.tasks:
            await refresh(service.schedules)
    assert caplog.text.count("reading the schedule of dynamic takes long") == 1
    assert str(service.scheduler.get_job("dynamic").trigger) == "cron[0 7 * * *] UTC"
    goes_on.set()

    async def has_changed() -> bool:
        await refresh(service.schedules)
        return str(service.scheduler.get_job("dynamic").trigger) == "cron[0 8 * * *] UTC"

    await until(has_changed)


async def test_a_file_of_settings_whose_reading_hangs_is_named(
    begin: Begin, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(schedule_sync, "READ_SECONDS", 0.02)
    goes_on = threading.Event()
    make_task("dynamic", property(lambda self: "0 7 * * *"))
    service = await begin()
    logging.getLogger().addHandler(caplog.handler)
    monkeypatch.setattr(schedule_sync, "refresh_settings", goes_on.wait)
    await refresh(service.schedules)
    goes_on.set()
    assert (
        "reading the file of settings takes long; no schedule that is a property is read"
        in caplog.text
    )


async def told(caplog: pytest.LogCaptureFixture, text: str) -> bool:
    return text in caplog.text


@pytest.mark.rest
async def test_a_file_that_is_added_while_the_ledger_is_unreachable_is_loaded_later(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = await begin()
    await refresh(service.schedules)
    Path("tasks/dropped.py").write_text(DROPPED)
    await refresh(service.schedules)

    async def away(*_: object) -> None:
        raise DBAPIError("INSERT", {}, OSError("away"))

    with monkeypatch.context() as patch:
        patch.setattr(task_sync, "record_tasks", away)
        with pytest.raises(DBAPIError):
            await refresh(service.schedules)
    assert "dropped" not in service.tasks
    await refresh(service.schedules)
    assert "dropped" in service.tasks and service.scheduler.get_job("dropped").next_run_time


@pytest.mark.rest
async def test_the_log_of_a_long_run_is_in_the_ledger_before_its_end(begin: Begin) -> None:
    go_on = asyncio.Event()

    async def run(self: object) -> None:
        logger.info("half way")
        current_run().progress(5, 10, "at five")
        await go_on.wait()
        current_run().progress(6, 10)
        logger.info("the end")

    make_task("long", run=run)
    service = await begin()
    clock.advance(MINUTE)
    fire(service, "long")
    running = await run_in(service, "running")
    assert await until(lambda: lines_of(service, running["id"])) == ["half way"]
    halfway = await run_in(service, "running", count=5)
    assert (halfway["total"], halfway["message"], halfway["progress_at"]) == (
        10,
        "at five",
        clock.now(),
    )
    go_on.set()
    done = await run_in(service, "succeeded")
    assert (done["count"], done["message"], done["rate"]) == (6, "at five", None)
    assert await lines_of(service, running["id"]) == ["half way", "the end"]


@pytest.mark.rest
async def test_progress_is_written_twice_a_second_at_most(begin: Begin) -> None:
    mirrored: list[str] = []
    took = []
    is_seen = asyncio.Event()

    async def run(self: object) -> None:
        began_at = clock.monotonic()
        number = 0
        while len(mirrored) < 3 or not is_seen.is_set():
            current_run().progress(number := number + 1)
            await asyncio.sleep(0.001)
        took.append(clock.monotonic() - began_at)

    def see(*given: Any) -> None:
        if given[2].startswith("UPDATE batch_runs SET total"):
            mirrored.append(given[2])

    make_task("long", run=run)
    service = await begin()
    event.listen(service.ledger.engine.sync_engine, "before_cursor_execute", see)
    clock.advance(MINUTE)
    fire(service, "long")
    await run_in(service, "running")
    await until(lambda: is_faster_than(service, 10))
    is_seen.set()
    await run_in(service, "succeeded")
    assert 3 <= len(mirrored) <= took[0] / 0.5 + 1


async def is_faster_than(service: BatchService, rate: float) -> bool:
    [found] = await rows(service.ledger)
    return (found["rate"] or 0) > rate


@pytest.mark.rest
async def test_a_run_that_outlasts_the_drain_is_interrupted_and_resumes_at_the_next_start(
    begin: Begin,
) -> None:
    starts: list[int] = []

    async def run(self: object) -> str:
        starts.append(current_run().attempt)
        if len(starts) == 1:
            await asyncio.Event().wait()
        return "resumed"

    make_task("long", run=run)
    first = await begin()
    clock.advance(MINUTE)
    fire(first, "long")
    await run_in(first, "running")
    await first.stop()
    second = await begin()
    done = await run_in(second, "succeeded")
    assert starts == [1, 1]
    assert (done["attempt"], done["fence"], done["result"]) == (1, 2, "resumed")
    attempts = await rows(second.ledger, tables.attempts)
    assert [(a["number"], a["outcome"]) for a in attempts] == [(1, "interrupted"), (1, "succeeded")]
    nodes = {node["id"]: node for node in await rows(second.ledger, tables.nodes)}
    assert nodes[first.node.id]["stopped_at"] is not None
    assert nodes[second.node.id]["stopped_at"] is None


@pytest.mark.rest
async def test_what_the_service_logs_at_a_signal_belongs_to_no_run_even_if_it_interrupts_one(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run(self: object) -> str:
        signal.raise_signal(signal.SIGINT)  # its handler runs at once, in the context of this run
        while not current_run().cancelled:
            await asyncio.sleep(0.01)
        logger.info("the last line of the run")
        return "drained"

    monkeypatch.setenv("DRAIN_SECONDS", "10")
    make_task("long", run=run)
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        service = await begin()
        stream = StringIO()
        logs.set_up("INFO", "json", stream)
        stopping = Stopping(service, get_settings(), is_guest=True)
        with stopping.watching():
            clock.advance(MINUTE)
            fire(service, "long")
            found = await run_in(service, "succeeded")
            lines = await lines_of(service, found["id"])
            await stopping.by_server()
    finally:
        signal.signal(signal.SIGINT, before)
    logs.flush()
    [told] = [
        line
        for line in map(json.loads, stream.getvalue().splitlines())
        if "Stopping" in line["event"]
    ]
    assert (
        told["event"] == "Stopping: 1 running, with 10 s to end"
        and "run" not in told
        and "task" not in told
    )
    assert lines == ["the last line of the run"]


@pytest.mark.rest
async def test_a_run_that_ends_within_the_drain_is_not_interrupted(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRAIN_SECONDS", "10")
    config.forget_settings()
    stop_seen = asyncio.Event()

    async def run(self: object) -> None:
        while not current_run().cancelled:
            await asyncio.sleep(0.01)
        stop_seen.set()

    make_task("polite", run=run)
    service = await begin()
    clock.advance(MINUTE)
    fire(service, "polite")
    await run_in(service, "running")
    stopping = asyncio.create_task(service.stop())
    await asyncio.wait_for(stop_seen.wait(), 5)
    await asyncio.wait_for(stopping, 5)
    again = await begin()
    assert [run["state"] for run in await rows(again.ledger)] == ["succeeded"]


async def test_a_checkpoint_stops_a_draining_run_at_once(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRAIN_SECONDS", "10")
    config.forget_settings()

    async def run(self: object) -> None:
        while True:
            with contextlib.suppress(Exception):  # what careless authors write must not swallow it
                current_run().checkpoint()
            await asyncio.sleep(0.01)

    make_task("chunky", run=run)
    service = await begin()
    clock.advance(MINUTE)
    fire(service, "chunky")
    await run_in(service, "running")
    await asyncio.wait_for(service.stop(), 5)
    again = BatchService(get_settings(), BY_HAND)
    await again.start()
    assert [run["state"] for run in await rows(again.ledger)] == ["interrupted"]
    await again.stop()


async def test_an_outcome_whose_fence_is_gone_is_not_recorded(
    begin: Begin, caplog: pytest.LogCaptureFixture
) -> None:
    go_on = asyncio.Event()

    async def run(self: object) -> None:
        await go_on.wait()

    make_task("lost", run=run)
    service = await begin()
    logging.getLogger().addHandler(caplog.handler)
    clock.advance(MINUTE)
    fire(service, "lost")
    await run_in(service, "running")
    other = new_id()
    async with service.ledger.engine.begin() as connection:
        await connection.execute(update(tables.runs).values(fence=2, node=other))
    go_on.set()
    await until(lambda: nothing_running(service))
    (found,) = await rows(service.ledger)
    assert (found["state"], found["node"], found["fence"]) == ("running", other, 2)
    assert "another node holds run" in caplog.text


async def nothing_running(service: BatchService) -> bool:
    return service.engine.running == 0


async def test_a_run_whose_claim_was_committed_without_a_reply_is_started(begin: Begin) -> None:
    make_task("tick", schedule=None)
    service = await begin()
    row = {
        "id": new_id(),
        "task": "tick",
        "origin": "manual",
        "state": "running",
        "rank": 2,
        "catch_up": False,
    }
    times = dict.fromkeys(["due_at", "created_at", "started_at", "attempt_started_at"], clock.now())
    async with service.ledger.engine.begin() as connection:
        claim = {"node": service.node.id, "fence": 1, "attempt": 1, "exclusive": "tick"}
        await connection.execute(tables.runs.insert().values(**row, **times, **claim))
    service.engine.recheck_claims()
    assert (await run_in(service, "succeeded"))["id"] == row["id"]


async def test_sixty_sync_tasks_due_at_once_all_run_and_leave_the_loops_own_threads_alone(
    begin: Begin,
) -> None:
    release = threading.Event()

    def run(self: object) -> None:
        release.wait(20)

    names = [f"sync{n}" for n in range(60)]
    for name in names:
        make_task(name, run=run)
    service = await begin()
    clock.advance(MINUTE)
    for name in names:
        fire(service, name)
    await until(lambda: at_least(service, 32, "running"))
    # More runs wait in their own threads than the loop's executor has, and it is free all the same.
    assert await asyncio.wait_for(asyncio.to_thread(lambda: "free"), 5) == "free"
    release.set()
    await until(lambda: at_least(service, 60))
    assert {run["state"] for run in await rows(service.ledger)} == {"succeeded"}


@pytest.mark.rest
@pytest.mark.parametrize(
    "error", [SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError(), StopIteration()]
)
async def test_an_exception_that_would_end_the_process_ends_only_the_run(
    begin: Begin, error: BaseException
) -> None:
    async def run(self: object) -> None:
        raise error

    def sync(self: object) -> None:
        raise error

    make_task("rude", run=run)
    make_task("rude.sync", run=sync)
    make_task("next", overlap="allow")
    service = await begin()
    clock.advance(MINUTE)
    fire(service, "rude")
    fire(service, "rude.sync")
    await until(lambda: at_least(service, 2, "failed"))
    fire(service, "next")
    await until(lambda: at_least(service, 1))
    assert len(await rows(service.ledger, tables.attempts, outcome="failed")) == 2


@pytest.mark.rest
async def test_a_wall_clock_that_steps_back_fires_no_slot_twice(begin: Begin) -> None:
    make_task("tick", overlap="allow")
    service = await begin()
    clock.advance(MINUTE)
    fire(service, "tick")
    await until(lambda: at_least(service, 1))
    clock.advance(-MINUTE)
    fire(service, "tick")
    clock.advance(MINUTE)
    fire(service, "tick")
    clock.advance(MINUTE)
    fire(service, "tick")
    await until(lambda: at_least(service, 2))
    assert sorted(run["slot"] for run in await rows(service.ledger)) == [
        START + 0.5 * MINUTE,
        START + 1.5 * MINUTE,
    ]


@pytest.mark.rest
async def test_a_group_that_was_committed_without_a_reply_is_written_again_without_harm(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    committed = asyncio.Event()
    write = Group.write

    async def lose_the_reply(self: Group, connection: AsyncConnection) -> list[Outcome]:
        bounced = await write(self, connection)
        if self.outcomes and not committed.is_set():
            await connection.commit()
            committed.set()
            raise ConnectionResetError("the reply to COMMIT was lost")
        return bounced

    async def run(self: object) -> None:
        logger.info("once")

    make_task("tick", run=run)
    service = await begin()
    monkeypatch.setattr(Group, "write", lose_the_reply)
    clock.advance(MINUTE)
    fire(service, "tick")
    await asyncio.wait_for(committed.wait(), 5)
    await until(lambda: nothing_running(service))
    clock.advance(MINUTE)
    fire(service, "tick")
    await until(lambda: at_least(service, 2))
    attempts = await rows(service.ledger, tables.attempts)
    assert [a["outcome"] for a in attempts] == ["succeeded", "succeeded"]
    assert [await lines_of(service, a["run"]) for a in attempts] == [["once"], ["once"]]


@pytest.mark.rest
async def test_a_run_that_ended_and_was_claimed_again_in_a_commit_without_a_reply_goes_on(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim, lost = LocalEngine._claim, asyncio.Event()

    async def lose_the_reply(
        self: LocalEngine, connection: AsyncConnection, outcomes: Sequence[Outcome]
    ) -> Look:
        look = await claim(self, connection, outcomes)
        if look.claimed and not lost.is_set():
            await connection.commit()
            lost.set()
            raise ConnectionResetError("the reply to COMMIT was lost")
        return look

    async def run(self: object) -> None:
        if current_run().attempt == 1:
            raise ValueError("once more")

    make_task("flaky", run=run, retry=Retry(attempts=2, wait=0))
    service = await begin()
    monkeypatch.setattr(LocalEngine, "_claim", lose_the_reply)
    clock.advance(MINUTE)
    fire(service, "flaky")
    done = await run_in(service, "succeeded")
    assert lost.is_set()
    assert (done["attempt"], done["fence"]) == (2, 2)


async def test_authors_who_use_all_threads_of_the_loop_do_not_delay_the_ledger(
    begin: Begin,
) -> None:
    release = threading.Event()
    hogs = [asyncio.create_task(asyncio.to_thread(release.wait, 20)) for _ in range(40)]

    async def run(self: object) -> None:
        logger.info("a line, which is compressed in a thread")

    make_task("tick", run=run)
    service = await begin()
    clock.advance(MINUTE)
    fire(service, "tick")
    await run_in(service, "succeeded")
    release.set()
    await asyncio.gather(*hogs)


async def test_a_task_that_was_taken_for_gone_is_restored_by_the_node_that_has_it(
    begin: Begin,
) -> None:
    make_task("tick")
    service = await begin()

    async def nobody(_: AsyncConnection) -> set[str]:
        return set()

    async with service.ledger.engine.begin() as connection:
        assert await task_sync.remove_gone(connection, ["tick"], nobody) == ["tick"]
    await refresh(service.schedules)
    await refresh(service.schedules)
    (task,) = await rows(service.ledger, tables.tasks)
    assert task["removed_at"] is None
    assert service.scheduler.get_job("tick").next_run_time is not None


async def test_a_row_that_cannot_be_stored_delays_no_other(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = transitions.finish

    async def choosy(
        connection: AsyncConnection, outcomes: Sequence[Outcome], *given: Any
    ) -> list[Outcome]:
        if any(outcome.result == "poison" for outcome in outcomes):
            refusal = Exception("this database can't hold it")
            # As asyncpg's, which has no class of its own.
            refusal.sqlstate = "22P02"  # type: ignore[attr-defined]
            raise DBAPIError("…", {}, refusal)
        return await finish(connection, outcomes, *given)

    async def poison(self: object) -> str:
        return "poison"

    monkeypatch.setattr(transitions, "finish", choosy)
    make_task("poison", run=poison)
    make_task("healthy")
    service = await begin()
    clock.advance(MINUTE)
    fire(service, "poison")
    fire(service, "healthy")
    await until(lambda: at_least(service, 2))
    assert [run["result"] for run in await rows(service.ledger)] == [None, None]


async def test_a_result_too_large_for_the_ledger_is_cut(begin: Begin) -> None:
    async def run(self: object) -> str:
        return "x" * 2_000_000

    make_task("wordy", run=run)
    service = await begin()
    clock.advance(MINUTE)
    fire(service, "wordy")
    done = await run_in(service, "succeeded")
    assert len(done["result"]) < 2_000
    assert "more than 1,000,000 bytes" in (await lines_of(service, done["id"]))[0]


async def test_a_schedule_from_settings_is_read_again_and_an_invalid_one_is_ignored(
    begin: Begin, caplog: pytest.LogCaptureFixture
) -> None:
    env = ENV_FILE
    env.write_text('CUSTOM_TASK_CRON="0 7 * * *"\n')
    make_task("dynamic", property(lambda self: get_settings().CUSTOM_TASK_CRON))
    service = await begin()
    logging.getLogger().addHandler(caplog.handler)
    env.write_text('CUSTOM_TASK_CRON="0 8 * * *"\n')
    await refresh(service.schedules)
    assert str(service.scheduler.get_job("dynamic").trigger) == "cron[0 8 * * *] UTC"
    assert [s["cron"] for s in await rows(service.ledger, tables.schedules)] == [
        "0 7 * * *",
        "0 8 * * *",
    ]
    env.write_text('CUSTOM_TASK_CRON="0 99 * * *"\n')
    await refresh(service.schedules)
    await refresh(service.schedules)
    assert str(service.scheduler.get_job("dynamic").trigger) == "cron[0 8 * * *] UTC"
    assert caplog.text.count("'0 99 * * *'") == 1


@pytest.mark.rest
async def test_a_changed_setting_is_in_force_within_five_seconds(begin: Begin) -> None:
    ENV_FILE.write_text('CUSTOM_TASK_CRON="0 7 * * *"\n')
    make_task("dynamic", property(lambda self: get_settings().CUSTOM_TASK_CRON))
    service = await begin()
    ENV_FILE.write_text('CUSTOM_TASK_CRON="0 8 * * *"\n')
    job = service.scheduler.get_job("dynamic")

    async def follows() -> bool:
        return str(job.trigger) == "cron[0 8 * * *] UTC"

    await until(follows, seconds=5)


async def test_a_node_follows_the_ledgers_schedule_even_where_its_own_differs(
    begin: Begin, caplog: pytest.LogCaptureFixture
) -> None:
    task = make_task("tick", "0 7 * * *")
    service = await begin()
    logging.getLogger().addHandler(caplog.handler)
    other = make_task("donor", "0 9 * * *")
    async with service.ledger.engine.begin() as connection:
        await task_sync.set_schedules(
            connection, {"tick": other.schedule}, {"tick": task}, new_id()
        )
    await refresh(service.schedules)
    assert str(service.scheduler.get_job("tick").trigger) == "cron[0 9 * * *] UTC"
    assert "tick fires by another node's schedule (0 9 * * * UTC)" in caplog.text
    assert len(await rows(service.ledger, tables.schedules)) == 2


async def test_a_paused_task_has_no_next_run_time_and_resumes(begin: Begin) -> None:
    task = make_task("tick")
    service = await begin()
    async with service.ledger.engine.begin() as connection:
        await pauses.pause(connection, "tick", "ann", {"tick": task})
    await refresh(service.schedules)
    assert service.scheduler.get_job("tick").next_run_time is None
    clock.advance(3 * MINUTE)
    await refresh(service.schedules)
    (found,) = await until(lambda: rows(service.ledger, tables.missed))
    assert (found["count"], found["reason"]) == (3, "paused by ann")
    async with service.ledger.engine.begin() as connection:
        await pauses.resume(connection, "tick")
    await refresh(service.schedules)
    assert service.scheduler.get_job("tick").next_run_time is not None


async def test_the_ledger_and_the_application_in_one_sqlite_file_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LEDGER_URL", "sqlite:///./app.db")
    config.forget_settings()
    with pytest.raises(InvalidSetting, match=r"LEDGER_URL.*same SQLite file"):
        await BatchService(get_settings()).start()


BACK = "the ledger is reachable again after "


@pytest.mark.rest
async def test_the_end_of_an_outage_is_logged_once_for_all_parts_that_have_noticed_it(
    begin: Begin, caplog: pytest.LogCaptureFixture
) -> None:
    make_task("tick")
    service = await begin()
    logging.getLogger().addHandler(caplog.handler)

    async def rename(table: str, name: str) -> None:
        async with service.ledger.engine.begin() as connection:
            await connection.execute(text(f"ALTER TABLE {table} RENAME TO {name}"))

    for number in (1, 2):
        await rename("batch_runs", "away")
        clock.advance(MINUTE)
        fire(service, "tick")
        await until(lambda: told(caplog, "the ledger can't be used"))
        await until(lambda: asyncio.sleep(0, service.dispatcher.trouble and service.node.trouble))
        assert BACK not in caplog.text
        await rename("away", "batch_runs")
        await until(lambda number=number: at_least(service, number))
        await until(lambda: told(caplog, BACK))
        assert service.dispatcher.trouble is service.node.trouble is None
        assert caplog.text.count(BACK) == caplog.text.count("the ledger can't be used") == 1
        caplog.clear()


async def test_an_outage_lasts_until_each_part_that_has_noticed_it_can_work_again_for_some_seconds(
    ledger: Database, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    outage, seconds = Outage(), clock.boottime()
    monkeypatch.setattr(clock, "boottime", lambda: seconds)
    outage.over_for("engine")
    for part in ("engine", "heartbeat", "engine"):
        assert outage.cause_for(part, ledger, OSError("refused")) is not None
    assert outage.cause_for("engine", ledger, ValueError("a defect")) is None
    assert caplog.text.count("the ledger can't be used") == 1
    seconds += 12
    outage.over_for("heartbeat")
    assert BACK not in caplog.text  # the engine can't work yet
    outage.over_for("engine")
    assert caplog.text.count(BACK) == 1
    assert "engine 2, heartbeat 1" in caplog.text
    (interval,) = outage.unwritten()
    assert outage.during(interval.since, interval.until) == interval
    assert outage.cause_for("engine", ledger, OSError("refused")) is not None
    seconds += 1
    outage.over_for("engine")
    assert outage.cause is not None  # a disk that is nearly full works now and then


@pytest.mark.rest
async def test_an_outage_of_the_ledger_delays_slots_and_loses_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    go_on = asyncio.Event()
    calls: list[str] = []

    async def run(self: object) -> None:
        calls.append(current_run().id)
        await go_on.wait()

    make_task("patient", "* * * * * *", run)
    with OwnServer(find_binaries(), fast=True) as server:
        monkeypatch.setenv("LEDGER_URL", await server.create_database())
        monkeypatch.setenv("POLL_SECONDS", "0.05")
        config.forget_settings()
        service = BatchService(get_settings())
        await service.start()
        running = await run_in(service, "running")
        await asyncio.to_thread(server.stop, "immediate")
        go_on.set()
        assert set(await until(lambda: not_ready(service))) == {"ledger"}
        await asyncio.to_thread(server.start)
        done = await run_in(service, "succeeded", id=running["id"])
        assert done["reason"] is None
        await until(lambda: at_least(service, 3), 20)
        slots = [run["slot"] for run in await rows(service.ledger)]
        assert len(slots) == len(set(slots))
        first, last = min(slots), max(slots)
        assert len(slots) == (last - first).total_seconds() + 1
        assert len(calls) == len(set(calls))
        await service.stop()


async def not_ready(service: BatchService) -> dict[str, str]:
    return await service.readiness()


@pytest.mark.parametrize("ledger_url", ["postgresql"], indirect=True)
async def test_a_start_waits_for_a_lock_for_longer_than_a_turn_of_a_loop_does(
    begin: Begin, ledger: Database
) -> None:
    make_task("tick")
    await (await begin()).stop()
    async with ledger.engine.begin() as connection:
        await connection.execute(text("LOCK TABLE batch_tasks IN ACCESS EXCLUSIVE MODE"))
        starting = asyncio.create_task(begin())
        await connection.execute(text("SELECT pg_sleep(:seconds)"), {"seconds": LOCK_SECONDS + 0.5})
        assert not starting.done()
    assert (await starting).scheduler.running
