"""The dispatcher: its retries and its readiness while firing fails, and its calls to the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import text

from batch_system import clock
from batch_system.batch.execution.engine import LocalEngine
from batch_system.batch.firing.dispatcher import Dispatcher
from batch_system.batch.firing.firing import Fired
from batch_system.batch.ledger.runs import Claimed
from batch_system.batch.nodes.ledger_poll import LedgerChanges
from batch_system.batch.queue.claiming import Capacity
from batch_system.config import get_settings
from batch_system.database.engine import Database
from batch_system.server.service import BatchService
from tests.batch.ledger_world import NODE, know, make_task


class Failing(Dispatcher):
    """Each firing fails until `succeeds` is set. `tries` counts them."""

    tries = 0
    succeeds = False

    async def _fire(self, names: Collection[str]) -> Fired:
        self.tries += 1
        if not self.succeeds:
            raise OSError("the disk is full")
        return Fired(clock.now())


async def test_while_firing_fails_all_tasks_are_tried_together_until_the_ledger_is_reached(
    ledger: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a timer for each task, or a try for each slot, an outage of 200 tasks would be 200 tries
    at a time.
    """
    names = [f"task{number}" for number in range(20)]
    tasks = await know(ledger, *(make_task(name) for name in names))
    dispatcher = Failing(ledger, tasks, NODE, LocalEngine(ledger, tasks, NODE))
    # No pause is over within the test.
    monkeypatch.setattr("batch_system.batch.firing.dispatcher.LONGEST_PAUSE", 3600.0)
    dispatcher._pause = 3600.0
    dispatcher.start()
    for tries in range(1, 4):
        for name in names:
            dispatcher.notify(name)
        async with asyncio.timeout(30):
            while dispatcher.tries < tries or dispatcher.trouble is None:
                await asyncio.sleep(0.001)
        for name in names:  # a slot that comes due in the pause causes no try
            dispatcher.notify(name)
        await asyncio.sleep(0.01)
        assert dispatcher.tries == tries
        assert not dispatcher._timers
        assert dispatcher._due == set(names)
        dispatcher.on_changes(LedgerChanges(clock.now(), False, 0))
    await dispatcher.stop()


class Recording:
    """An engine that executes nothing, and records the calls of the dispatcher."""

    losses = 3

    def __init__(self) -> None:
        self.claiming = asyncio.Lock()
        self.capacity = Capacity(1, 1)
        self.launched: list[tuple[str, int]] = []
        self.wakes = self.checks = 0

    def may_work(self) -> bool:
        return True

    def make_ready(self, claimed: Sequence[Claimed]) -> None:
        pass

    async def launch_all(self, claimed: Sequence[Claimed], losses: int) -> None:
        assert self.claiming.locked()
        self.launched += [(run.task, losses) for run in claimed]

    def wake(self) -> None:
        self.wakes += 1

    def recheck_claims(self) -> None:
        self.checks += 1


async def test_the_dispatcher_launches_runs_on_any_engine_and_makes_it_recheck_after_a_failure(
    ledger: Database,
) -> None:
    tasks = await know(ledger, make_task("a", "* * * * * *"))
    recording = Recording()
    engine: Any = recording
    dispatcher = Failing(ledger, tasks, NODE, engine)
    await dispatcher._turn({"a"})
    assert (recording.checks, recording.launched) == (1, [])
    due = Dispatcher(ledger, tasks, NODE, engine)
    with clock.moved(clock.now() + timedelta(seconds=5)):
        async with asyncio.timeout(30):
            while not recording.launched:
                await due._turn({"a"})
    assert recording.launched == [("a", 3)]
    for timer in [*dispatcher._timers.values(), *due._timers.values()]:
        timer.cancel()


async def test_a_failed_firing_is_tried_again_until_it_succeeds(ledger: Database) -> None:
    tasks = await know(ledger, make_task("a"))
    dispatcher = Failing(ledger, tasks, NODE, LocalEngine(ledger, tasks, NODE))
    dispatcher._pause = 0.001
    dispatcher.start()
    dispatcher.notify("a")
    while dispatcher.tries < 4:
        await asyncio.sleep(0.001)
    assert str(dispatcher.trouble).endswith("(LEDGER_URL): the disk is full")
    dispatcher.succeeds = True
    while dispatcher.trouble is not None:
        await asyncio.sleep(0.001)
    await dispatcher.stop()


async def test_a_service_is_not_ready_while_no_slot_can_be_fired(
    ledger_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That holds although its heartbeat is written and its database answers."""
    monkeypatch.setenv("LEDGER_URL", ledger_url)
    service = BatchService(get_settings())
    await service.start()
    service.tasks["a"] = make_task("a")
    refused = "ALTER TABLE batch_schedules RENAME TO away"
    allowed = "ALTER TABLE away RENAME TO batch_schedules"
    try:
        for statement, is_ready in ((refused, False), (allowed, True)):
            async with service.ledger.engine.begin() as connection:
                await connection.execute(text(statement))
            service.dispatcher.notify("a")
            while (service.dispatcher.trouble is None) is not is_ready:
                await asyncio.sleep(0.01)
            while service.engine.is_recheck_due:
                await asyncio.sleep(0.01)
            # An outage is over when nothing has failed for some seconds.
            async with asyncio.timeout(30):
                while ("ledger" not in await service.readiness()) is not is_ready:
                    await asyncio.sleep(0.1)
    finally:
        await service.stop()
