"""A planned window in which nothing shall run, while services are killed and started again."""

from __future__ import annotations

import json
from datetime import timedelta

import pytest

from tests.days.story import Story, boottime

pytestmark = pytest.mark.days

SECONDS = 100
"""How long the window lasts: longer than two leases and a missed slot."""


def test_nothing_runs_in_a_window_in_which_all_services_are_killed(story: Story) -> None:
    story.start("a", "b")
    story.until(lambda: len(story.ended_since(0)) == 12, 30, "all twelve tasks run")
    begin = (story.clock() + timedelta(seconds=20)).replace(microsecond=0)
    end = begin + timedelta(seconds=SECONDS)
    words = ("--from", begin.isoformat(), "--until", end.isoformat(), "--note", "new disks")
    story.batch("pause", "--all", *words)
    story.until(lambda: story.clock() > begin + timedelta(seconds=10), 60, "it has begun")
    since = boottime()
    story.kill("a")
    story.kill("b")
    story.wait(45)
    story.start("a")
    story.until(lambda: story.clock() > end - timedelta(seconds=5), SECONDS, "it is nearly over")
    assert story.ended_since(since) == set()
    assert "new disks" in story.batch("maintenance", "list")
    story.until(lambda: story.clock() > end, 30, "it is over")
    story.start("b")
    story.check_end()
    last = end - timedelta(seconds=1)  # a slot at the end of the window fires
    window = ("--since", begin.isoformat(), "--until", last.isoformat())
    account = json.loads(story.batch("account", *window, "--json"))
    slots = sum(each["slots"] for each in account)
    assert len(account) == 12 and slots > 12 * SECONDS / 10
    assert all((each["missed"], each["gaps"]) == (each["slots"], 0) for each in account), account
    counts = story.night["slots"]
    assert (counts["paused"], counts["missed"]) == (slots, 0), counts
    story.check_told()
