"""The placer of Dask, with a scheduler and a worker in this process that host no node."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from itertools import pairwise

import pytest
from distributed import Scheduler, Worker

from batch_system import clock
from batch_system.batch.placing.placer import Needs
from batch_system.dask import cluster as cluster_module
from batch_system.dask import placer as placer_module
from batch_system.dask.cluster import Cluster
from batch_system.dask.placer import DaskPlacer
from tests.batch.ledger_world import until
from tests.dask import host
from tests.processes import free_port

NEEDS = Needs("cpu")


class World:
    """A scheduler with one worker of two places, and a placer. `woken`: what the placer's wakes
    have found.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.port = free_port()
        self.woken: list[asyncio.AbstractEventLoop | None] = []
        self.reached = 0
        monkeypatch.setattr(cluster_module, "LOOK_SECONDS", 0.0)
        monkeypatch.setattr(cluster_module, "CONNECT_SECONDS", 0.2)
        host.may_end.clear()
        self.cluster = Cluster(
            f"tcp://127.0.0.1:{self.port}", ["cpu"], host.__name__, self._on_change
        )
        self.placer = DaskPlacer("cpu", (), self.cluster, "service", self._wake, lease=30)

    def scheduler(self) -> Scheduler:
        return Scheduler(
            host="127.0.0.1", port=self.port, dashboard=False, dashboard_address="127.0.0.1:0"
        )

    def worker(self) -> Worker:
        return Worker(f"tcp://127.0.0.1:{self.port}", nthreads=2)

    async def has_places(self, number: int) -> None:
        async def as_many() -> bool:
            return await self.placer.places() == number

        await until(as_many)

    def _on_change(self) -> None:
        self.reached += 1

    def _wake(self) -> None:
        try:
            self.woken.append(asyncio.get_running_loop())
        except RuntimeError:
            self.woken.append(None)


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    world = World(monkeypatch)
    yield world
    host.may_end.set()
    await world.placer.close()


def soon(condition: Callable[[], bool]) -> Callable[[], object]:
    async def asked() -> bool:
        return condition()

    return asked


async def test_tickets_that_end_are_forgotten_and_wake_the_service_on_its_event_loop(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placer_module, "TICKET_SECONDS", 0.0)
    async with world.scheduler() as scheduler, world.worker():
        await world.has_places(2)
        await world.placer.place("a", 4, NEEDS)
        await until(soon(lambda: len(scheduler.tasks) == 4))
        await world.placer.place("a", 4, NEEDS)
        assert world.placer.open == 4 == len(scheduler.tasks)
        host.may_end.set()
        await until(soon(lambda: len(world.woken) == 4))
        assert set(world.woken) == {asyncio.get_running_loop()}
        assert world.placer.open == 0
        await until(soon(lambda: not scheduler.tasks))
        assert not world.cluster._client.futures


async def test_a_ticket_that_has_reached_no_run_within_a_lease_is_placed_once_more(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be in a worker that is frozen. One that executes a run is not; and what waits for long
    is not doubled.
    """
    async with world.scheduler(), world.worker():
        await world.has_places(2)
        await world.placer.place("a", 3, Needs("cpu", running=1))
        now = clock.monotonic()
        for leases, number in ((0.5, 3), (1.1, 5), (1.2, 5), (2.2, 5)):
            monkeypatch.setattr(
                placer_module.clock, "monotonic", lambda leases=leases: now + leases * 30
            )
            await world.placer.place("a", 3, Needs("cpu", running=1))
            assert world.placer.open == number, leases


async def test_tickets_that_are_not_needed_any_more_are_released(world: World) -> None:
    async with world.scheduler() as scheduler, world.worker():
        await world.has_places(2)
        await world.placer.place("a", 4, NEEDS)
        await until(soon(lambda: len(scheduler.tasks) == 4))
        await world.placer.place("a", 0, NEEDS)
        assert world.placer.open == 0
        await until(soon(lambda: not scheduler.tasks))


async def test_a_service_tries_ever_less_often_to_reach_a_lost_scheduler_and_logs_that_once(
    world: World, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "batch_system.batch")
    tried: list[float] = []
    new_client = cluster_module._new_client

    def noted(address: str) -> object:
        tried.append(clock.monotonic())
        return new_client(address)

    monkeypatch.setattr(cluster_module, "_new_client", noted)
    async with world.scheduler(), world.worker():
        await world.has_places(2)
        await world.placer.place("a", 2, NEEDS)
    tried.clear()
    caplog.clear()
    await world.has_places(0)
    await until(soon(lambda: world.placer.open == 0))

    async def are_tries() -> bool:
        assert await world.placer.places() == 0
        return len(tried) >= 5

    await until(are_tries)
    pauses = [later - earlier for earlier, later in pairwise(tried)]
    assert all(pause >= 0.2 * 2**number for number, pause in enumerate(pauses)), pauses
    async with world.scheduler() as scheduler, world.worker():
        await world.has_places(2)
        await world.placer.place("a", 2, NEEDS)
        assert world.placer.open == 2
        await until(soon(lambda: len(scheduler.tasks) == 2))
        host.may_end.set()
        await until(soon(lambda: not scheduler.tasks))
    lost = f"the Dask scheduler tcp://127.0.0.1:{world.port} can't be reached"
    assert sum(lost in message for message in caplog.messages) == 1
    assert sum("is reached again" in message for message in caplog.messages) == 1
    assert world.reached == 2
