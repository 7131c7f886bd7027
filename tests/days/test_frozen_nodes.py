"""A node is frozen for three minutes, by SIGSTOP or a debugger, and then goes on."""

from __future__ import annotations

import pytest

from tests.days.story import Story, boottime

pytestmark = pytest.mark.days

FROZEN_SECONDS = 180


def test_a_node_is_frozen_for_three_minutes(story: Story) -> None:
    story.start("a", "b")
    story.until(lambda: len(story.ended_since(0)) == 12, 30, "all twelve tasks run")
    began = boottime()
    frozen = story.nodes["a"]
    frozen.freeze()
    story.wait(FROZEN_SECONDS - 20)
    since = boottime()
    story.until(lambda: len(story.ended_since(since)) == 12, 20, "the other node fires and runs everything")
    assert "silent" in story.batch("nodes") or "lost" in story.batch("nodes")
    frozen.thaw()
    story.frozen.append((frozen.process.pid, began, boottime()))
    story.check_end()
    assert story.told() == ""  # the other node has done all of its work
    assert "Nothing needs you." in story.status()
