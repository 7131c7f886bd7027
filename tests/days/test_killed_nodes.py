"""Nodes are killed: one again and again, as by a lack of memory, and both for five minutes."""

from __future__ import annotations

import pytest

from tests.days.story import MISSED, Story, boottime, down

pytestmark = pytest.mark.days


def test_a_node_is_killed_and_started_again_every_20_seconds(story: Story) -> None:
    story.start("a", "b")
    story.until(lambda: len(story.ended_since(0)) == 12, 30, "all twelve tasks run")
    for _ in range(8):
        story.wait(17)
        story.kill("a")
        story.start("a")
    since = boottime()
    story.until(
        lambda: len(story.ended_since(since)) == 12, 30, "the other node fires and runs everything"
    )
    said = story.batch("nodes")
    assert said.count("lost") == 8, said
    events = story.batch("changes")
    assert events.count("node.lost") == 8, events
    story.check_end()
    assert story.told() == (
        "opened node : N services on HOST have ended within 10 minutes without saying so, the "
        "last one with pid N: look at its log, and whether its machine has enough memory"
    )
    assert "N services on HOST have ended" in story.status()


def test_both_nodes_are_gone_for_five_minutes(story: Story) -> None:
    story.start("a", "b")
    story.until(lambda: len(story.ended_since(0)) == 12, 30, "all twelve tasks run")
    story.kill("a")
    story.kill("b")
    story.wait(300)
    story.start("a", "b")
    story.check_end()
    story.check_told(down(), headline=MISSED)
