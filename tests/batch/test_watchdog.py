"""The watchdog's count of how long the event loop is blocked. That it ends processes is in
tests/server/test_drain.py.
"""

from __future__ import annotations

import asyncio
import threading

import pytest

from batch_system import clock
from batch_system.batch.nodes.loop_watchdog import ASK_SECONDS, TICK_SECONDS, Watchdog


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
    """A watchdog whose callback waits for the next turn of the event loop."""
    watchdog = Watchdog(2, leave=lambda: None, flush=lambda: None)
    at.now += ASK_SECONDS
    watchdog.measure()
    return watchdog


async def test_a_loop_that_runs_no_callbacks_counts_as_blocked_until_it_does(at: Time) -> None:
    watchdog = asked(at)
    for _ in range(8):
        at.now += TICK_SECONDS
        watchdog.measure()
    assert watchdog.blocked == 8 * TICK_SECONDS
    await asyncio.sleep(0)
    assert watchdog.blocked == 0
    watchdog.measure()
    assert watchdog.blocked == 0


async def test_an_hour_in_which_the_process_was_frozen_does_not_count_as_blocked(at: Time) -> None:
    watchdog = asked(at)
    at.now += 3600
    watchdog.measure()
    assert watchdog.blocked <= 2 * TICK_SECONDS


def test_a_loop_that_does_not_run_is_not_blocked(at: Time) -> None:
    """A loop does not run between two tests that use the same loop, for example."""
    loop = asyncio.new_event_loop()

    async def make() -> Watchdog:
        return asked(at)

    watchdog = loop.run_until_complete(make())
    at.now += TICK_SECONDS
    watchdog.measure()
    assert watchdog.blocked == 0
    loop.close()


async def test_stop_ends_the_thread_of_the_watchdog() -> None:
    others = set(threading.enumerate())
    looked = threading.Event()
    watchdog = Watchdog(2, leave=lambda: None, flush=lambda: None, look=lambda _: looked.set())
    watchdog.start()
    (thread,) = (
        each for each in set(threading.enumerate()) - others if each.name == "batch-watchdog"
    )
    assert await asyncio.to_thread(looked.wait, 30)
    watchdog.stop()
    await asyncio.to_thread(thread.join, 30)
    assert not thread.is_alive()
