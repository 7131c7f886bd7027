"""The watchdog's count of how long the event loop is blocked. That it ends processes is in tests/test_drain.py."""

from __future__ import annotations

import asyncio
import time

import pytest

from service import clock
from service.batch.nodes.loop_watchdog import ASK_SECONDS, TICK_SECONDS, Watchdog


class Time:
    """The monotonic clock, which stands still."""

    def __init__(self) -> None:
        self.now = 1000.0


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Time:
    made = Time()
    monkeypatch.setattr(clock, "monotonic", lambda: made.now)
    return made


def asked(at: Time) -> Watchdog:
    """One whose question waits for the event loop's next turn."""
    watchdog = Watchdog(2, leave=lambda: None, flush=lambda: None)
    at.now += ASK_SECONDS
    watchdog.measure()
    return watchdog


async def test_a_loop_that_gives_no_answer_is_blocked_until_it_does(at: Time) -> None:
    watchdog = asked(at)
    for _ in range(8):
        at.now += TICK_SECONDS
        watchdog.measure()
    assert watchdog.blocked == 8 * TICK_SECONDS
    await asyncio.sleep(0)
    assert watchdog.blocked == 0
    watchdog.measure()
    assert watchdog.blocked == 0


async def test_the_hour_for_which_a_process_was_frozen_does_not_count(at: Time) -> None:
    watchdog = asked(at)
    at.now += 3600
    watchdog.measure()
    assert watchdog.blocked <= 2 * TICK_SECONDS


def test_a_loop_that_does_not_run_is_not_blocked(at: Time) -> None:
    """Between two tests, for example, in which one loop is used again."""
    loop = asyncio.new_event_loop()

    async def make() -> Watchdog:
        return asked(at)

    watchdog = loop.run_until_complete(make())
    at.now += TICK_SECONDS
    watchdog.measure()
    assert watchdog.blocked == 0
    loop.close()


async def test_its_thread_ends_when_it_is_stopped() -> None:
    looks: list[float] = []
    watchdog = Watchdog(2, leave=lambda: None, flush=lambda: None, look=lambda: looks.append(time.monotonic()))
    watchdog.start()
    while not looks:
        await asyncio.sleep(0.01)
    watchdog.stop()
    await asyncio.sleep(2 * TICK_SECONDS)
    seen = len(looks)
    await asyncio.sleep(3 * TICK_SECONDS)
    assert len(looks) == seen
