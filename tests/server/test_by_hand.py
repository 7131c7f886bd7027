"""create_scheduler, start_scheduler and stop_scheduler, called by an application without the
lifespan.
"""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from batch_system import (
    BaseTask,
    BatchError,
    TaskRegistry,
    config,
    create_scheduler,
    get_logger,
    start_scheduler,
    stop_scheduler,
)
from batch_system.batch.firing.apscheduler import describe_jobs

SECONDS = 10.0
DROPPED = """
from batch_system import BaseTask

class Filed(BaseTask):
    name, schedule = "filed", "0 1 * * *"
    async def run(self): pass
"""


def register(run: Any, **attributes: Any) -> None:
    values = {
        "name": "tick",
        "description": "Every second",
        "schedule": "* * * * * *",
        **attributes,
    }
    TaskRegistry.register(type("Tick", (BaseTask,), {"__module__": __name__, "run": run, **values}))


def runs(columns: str = "task, state") -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect("ledger.db")) as ledger:
        return ledger.execute(f"SELECT {columns} FROM batch_runs ORDER BY slot").fetchall()


async def test_jobs_fire_run_tasks_and_stand_in_the_ledger(tmp_path: Path) -> None:
    (tmp_path / "tasks" / "filed.py").write_text(DROPPED)
    ran = asyncio.Event()

    async def run(self: object) -> None:
        get_logger("mine").warning("it has run")
        ran.set()

    register(run)
    scheduler = create_scheduler()
    assert [job["id"] for job in describe_jobs(scheduler)] == ["tick"]
    started = start_scheduler(scheduler)
    [job] = describe_jobs(scheduler)
    assert (job["name"], job["trigger"]) == ("Every second", "cron[* * * * * *] UTC") and job[
        "next_run_time"
    ]
    await asyncio.wait_for(started, SECONDS)
    assert {job["id"] for job in describe_jobs(scheduler)} == {"filed", "tick"}
    assert {job.id for job in scheduler.get_jobs()} == {"filed", "tick"}
    await asyncio.wait_for(ran.wait(), SECONDS)
    await asyncio.wait_for(stop_scheduler(scheduler), SECONDS)
    assert not scheduler.running and ("tick", "succeeded") in runs()
    with closing(sqlite3.connect("ledger.db")) as ledger:
        assert ledger.execute("SELECT count(*) FROM batch_log").fetchone()[0] > 0


async def test_stopping_fires_nothing_more_and_can_be_awaited_for_what_runs() -> None:
    begun, release = asyncio.Event(), asyncio.Event()

    async def run(self: object) -> None:
        begun.set()
        await release.wait()

    register(run)
    scheduler = create_scheduler()
    await start_scheduler(scheduler)
    await asyncio.wait_for(begun.wait(), SECONDS)
    over = stop_scheduler(scheduler)
    assert not scheduler.running
    await asyncio.sleep(0.02)
    assert not over.done()
    release.set()
    await asyncio.wait_for(stop_scheduler(scheduler), SECONDS)
    await over
    assert "running" not in [state for _, state in runs()]


async def test_an_error_that_keeps_the_service_from_starting_is_raised_and_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TASKS_DIR", "nowhere")
    config.forget_settings()
    scheduler = create_scheduler()
    with pytest.raises(BatchError, match="nowhere"):
        await start_scheduler(scheduler)
    assert not scheduler.running and "the batch service has ended: " in caplog.text
    await asyncio.wait_for(stop_scheduler(scheduler), SECONDS)


async def test_a_start_that_has_not_ended_is_stopped() -> None:
    scheduler = create_scheduler()
    started = start_scheduler(scheduler)
    await asyncio.wait_for(stop_scheduler(scheduler), SECONDS)
    with pytest.raises(BatchError, match="stopped before it had started"):
        await started


async def test_a_scheduler_starts_once() -> None:
    scheduler = create_scheduler()
    await start_scheduler(scheduler)
    with pytest.raises(BatchError, match="was started before"):
        start_scheduler(scheduler)
    await stop_scheduler(scheduler)


async def test_a_scheduler_that_never_started_can_be_stopped() -> None:
    await asyncio.wait_for(stop_scheduler(create_scheduler()), SECONDS)


def test_starting_outside_of_a_loop_says_what_it_needs() -> None:
    with pytest.raises(BatchError, match=r"start_scheduler\(\) needs a running event loop"):
        start_scheduler(create_scheduler())
