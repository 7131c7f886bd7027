"""Background loops end when they are stopped, even at the moment when something wakes them."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from batch_system.concurrency import background
from batch_system.concurrency.background import Background, is_set_within


class Looping(Background):
    """A loop that waits to be woken, as those of the service do."""

    def __init__(self) -> None:
        self.woken = asyncio.Event()

    async def _loop(self) -> None:
        while True:
            await is_set_within(self.woken, 60)
            self.woken.clear()


async def test_a_loop_that_is_woken_as_it_is_stopped_ends() -> None:
    for steps in range(4):
        looping = Looping()
        looping.start()
        await asyncio.sleep(0.01)
        looping.woken.set()
        for _ in range(steps):  # of the event loop, between the wake and the stop
            await asyncio.sleep(0)
        async with asyncio.timeout(5):
            await looping.stop()
        assert not looping.is_alive


async def test_a_loop_ends_although_a_library_has_dropped_a_cancel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(background, "STOP_SECONDS", 0.05)

    class Dropping(Looping):
        async def _loop(self) -> None:
            with contextlib.suppress(asyncio.CancelledError):
                await self.woken.wait()
            await super()._loop()

    dropping = Dropping()
    dropping.start()
    await asyncio.sleep(0)
    async with asyncio.timeout(5):
        await dropping.stop()
    assert dropping.work.cancelled()


async def test_the_return_value_says_whether_the_event_was_set_in_time() -> None:
    event = asyncio.Event()
    assert not await is_set_within(event, 0.01)
    event.set()
    assert await is_set_within(event, 0)
