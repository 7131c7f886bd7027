"""Background loops that end, or hang: that is logged, shown and counted, and the process ends with
70.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from pathlib import Path

import pytest
import uvloop

from batch_system.batch.firing.dispatcher import Dispatcher
from batch_system.batch.nodes.loop_watchdog import EXIT_CODE
from batch_system.concurrency.background import Background
from batch_system.concurrency.limits import LimitReached, hold, limited
from batch_system.concurrency.supervisor import Supervisor
from batch_system.config import Settings
from batch_system.server.service import BatchService
from tests.processes import SERVE, service

LOOPS = {
    *(
        "localengine",
        "opener",
        "dispatcher",
        "schedulesync",
        "upkeep",
        "bulkworker",
        "watch",
        "sender",
        "tallykeeper",
    ),
    *("pings", "digest"),
}


class Defect(BaseException):
    """What no loop expects. It is thrown where the loop waits; its task then finds its coroutine
    ended.
    """


TASKS = """
import asyncio
import os
import re

from batch_system import BaseTask


class Patient(BaseTask):
    '''Goes on for as long as the drain lets it.'''
    name, schedule = "patient", "* * * * * *"
    async def run(self):
        await asyncio.sleep(60)


class Saboteur(BaseTask):
    '''Ends a loop of the service with an error, as a defect in it would.'''
    name, schedule = "saboteur", "* * * * * *"
    async def run(self):
        if not os.path.exists("sabotage"):
            return
        for loop in asyncio.all_tasks():
            if loop.get_name() == "batch-watch":
                try:
                    loop.get_coro().throw(Defect())
                except Defect:
                    # Its coroutine has ended, which the asyncio task finds when it goes on.
                    loop.cancel()


class Defect(BaseException):
    pass
"""


@pytest.fixture
def settings(tmp_path: Path, ledger_url: str, database_url: str) -> Settings:
    return Settings(
        DATABASE_URL=database_url,
        LEDGER_URL=ledger_url,
        TASKS_DIR=str(tmp_path / "tasks"),
        BATCH_DIGEST_CRON="0 8 * * *",
        BATCH_DIGEST_URLS="json://localhost",
    )


async def test_each_loop_that_ends_with_an_error_is_named_logged_shown_and_counted(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    loops = await names_of_loops(settings)
    assert loops >= LOOPS
    for name in sorted(loops):
        caplog.clear()
        node, ends = BatchService(settings), []
        await node.start()
        node.supervisor.on_failure = lambda ends=ends: ends.append(True)
        try:
            loop = next(each for each in node.supervisor._loops if each.name == name)
            assert isinstance(loop, Background)
            await asyncio.sleep(0.01)  # it begins
            databases = (node.ledger, node.application)
            pools = [pool for each in databases for pool in (each.engine.pool, each.reader.pool)]
            while any(pool.checkedout() for pool in pools):
                await asyncio.sleep(0.01)  # not while a connection waits for an answer
            with pytest.raises(Defect):
                loop.work.get_coro().throw(Defect())  # type: ignore[union-attr]
            loop.work.get_loop().call_soon(loop.work.cancel)
            await asyncio.wait([loop.work])
            await asyncio.sleep(0)
            assert ends == [True], name
            assert name in await node.readiness()
            assert node.snapshot().failed_parts == {name: 1}
            critical = [record for record in caplog.records if record.levelno == logging.CRITICAL]
            assert [name in record.getMessage() for record in critical] == [True], name
        finally:
            await node.stop()


async def names_of_loops(settings: Settings) -> set[str]:
    node = BatchService(settings)
    await node.start()
    names = {loop.name for loop in node.supervisor._loops if isinstance(loop, Background)}
    await node.stop()
    return names


def test_a_process_of_which_a_loop_has_ended_says_so_and_ends_with_70_when_its_runs_had_time_to_end(
    tmp_path: Path,
) -> None:
    (tmp_path / "tasks/all.py").write_text(TASKS)
    with service(tmp_path, SERVE, {"DRAIN_SECONDS": "4"}) as started:
        until(lambda: "patient" in started.get("/metrics").text)
        (tmp_path / "sabotage").touch()
        until(lambda: started.get("/healthz").status_code == 503)
        assert "watch" in started.get("/healthz").json()["reasons"]
        assert "watch" in started.get("/readyz").json()["reasons"]
        assert 'batch_failed_parts_total{part="watch"} 1.0' in started.get("/metrics").text
        assert started.process.wait(30) == EXIT_CODE
    # It ends with the defect itself if that comes while it waits for an answer of the database.
    ended = re.search(
        "watch: it has ended: (RuntimeError|Defect); this process ends with the exit code 70",
        started.stderr,
    )
    assert ended is not None
    assert re.search(rf"^\s*[\w.]*{ended[1]}\b", started.stderr, re.MULTILINE)


def until(condition, seconds: float = 30.0) -> None:  # type: ignore[no-untyped-def]
    give_up_at = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up_at
        time.sleep(0.1)


async def test_a_turn_that_is_not_ended_by_its_limit_is_a_failure_but_no_blocked_loop_is() -> None:
    class Stuck(Background):
        turn_seconds = 0.01

        async def _loop(self) -> None:
            async with self.limited_turn():
                while True:
                    try:
                        await asyncio.sleep(60)
                    except asyncio.CancelledError:
                        # What waits for an answer in a rollback does the same.
                        if self._is_asked_to_end:
                            raise

    supervisor = Supervisor()
    stuck = Stuck()
    supervisor.start(stuck)
    await asyncio.sleep(0.05)
    supervisor.look(0.0)  # the event loop was blocked since the last look
    assert supervisor.failures == {}
    supervisor.look(4.0)  # a busy machine: a short limit alone is no reason to end
    assert supervisor.failures == {}
    supervisor.look(2.0)
    assert supervisor.failures == {"stuck": "its turn has gone on for 6 s, and may take 0.01 s"}
    await stuck.stop()


async def test_at_its_limit_a_block_loses_what_it_holds_but_not_what_it_has_begun() -> None:
    cut: list[str] = []

    async def begun() -> None:
        hold(started, lambda: cut.append("what was begun in the block"))
        await asyncio.sleep(0.05)

    started, connection = object(), object()

    async def block() -> None:
        async with limited(0.01):
            hold(connection, lambda: cut.append("its connection"))
            others.append(asyncio.create_task(begun()))
            await asyncio.sleep(60)

    others: list[asyncio.Task[None]] = []
    with pytest.raises(LimitReached):
        await block()
    await asyncio.wait(others)
    assert cut == ["its connection"]


def test_on_uvloop_a_task_is_fired_again_after_less_than_half_a_millisecond_too() -> None:
    """Its call_later then gives a handle without when(), which ended the dispatcher's loop for
    good.
    """

    async def work() -> None:
        dispatcher = object.__new__(Dispatcher)
        dispatcher._timers, fired = {}, []
        dispatcher.notify = lambda name, slot=None: fired.append(name)  # type: ignore[method-assign]
        dispatcher._later(0.0003, "a")
        dispatcher._later(0.0002, "a")
        dispatcher._later(0.0004, "a")
        await asyncio.sleep(0.05)
        assert fired == ["a"]

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(work())
