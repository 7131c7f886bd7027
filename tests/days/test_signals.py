"""SIGHUP, SIGINT and SIGTERM, once and twice, in each phase of a start and a drain."""

from __future__ import annotations

import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.days.story import Story

pytestmark = pytest.mark.days

SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
DRAIN_SECONDS = 25.0
AT_ONCE = 6.0


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_at_any_time_ends_the_service_in_order_and_a_second_one_at_once(
    tmp_path: Path, number: signal.Signals
) -> None:
    """A run of seven seconds has time to end; whatever is interrupted goes on when the service
    starts again.
    """
    moments = [0.05, 0.2, 0.5, 1.0, 2.0]
    with ThreadPoolExecutor(len(moments) + 2) as threads:
        early = [
            threads.submit(signal_early, tmp_path / f"early{moment}", number, moment)
            for moment in moments
        ]
        once = threads.submit(signal_while_it_runs, tmp_path / "once", number, False)
        twice = threads.submit(signal_while_it_runs, tmp_path / "twice", number, True)
        assert all(each.result() < AT_ONCE for each in early)
        assert 0.5 < once.result() < DRAIN_SECONDS
        assert twice.result() < AT_ONCE


def signal_early(folder: Path, number: signal.Signals, moment: float) -> float:
    """Send it while the service starts. Returns how long that took to end."""
    with Story(folder, {}) as story:
        node = story.launch("a", waits=False)
        time.sleep(moment)
        return end(story, node.name, number)


def signal_while_it_runs(folder: Path, number: signal.Signals, is_twice: bool) -> float:
    with Story(folder, {}) as story:
        story.start("a")
        story.until(lambda: story.is_running("long"), 20, "a run of `long` goes on")
        if is_twice:
            story.nodes["a"].process.send_signal(number)
            time.sleep(1)
        took = end(story, "a", number)
        story.start("a")
        story.check_end()
        story.check_told()
        return took


def end(story: Story, name: str, number: signal.Signals) -> float:
    began, node = time.monotonic(), story.nodes[name]
    node.process.send_signal(number)
    try:
        node.process.wait(60)
    except subprocess.TimeoutExpired:
        pytest.fail(f"{name} did not end after {number.name}; it printed:\n{node.said}")
    story.deaths[node.process.pid] = story.now()
    return time.monotonic() - began
