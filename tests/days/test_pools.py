"""Runs in child processes: their nursery freezes, and a child takes more memory than it may."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.days.story import TWELVE, Story
from tests.faults.nodes import own_children_of

pytestmark = pytest.mark.days

CHILDREN = '''

class Apart(BaseTask):
    """In a child process of its own."""

    name, schedule, pool = "apart", "*/5 * * * * *", "cpu"

    def run(self):
        note("began")
        time.sleep(1)
        note("ended")


class Hungry(BaseTask):
    name, schedule, pool, memory = "hungry", None, "cpu", "200 MiB"

    def run(self):
        note("began")
        taken = []
        while True:
            taken.append(bytearray(10_000_000))
            time.sleep(0.05)
'''


@pytest.fixture
def tasks() -> str:
    return TWELVE + CHILDREN


def test_the_nursery_of_the_children_freezes_for_good(story: Story) -> None:
    """It is replaced within a lease, and runs go on in children of the new one."""
    story.settings["BATCH_POOL_CPU"] = "process:2"
    story.start("a")
    story.until(lambda: "apart" in story.ended_since(0), 60, "runs end in children")
    # A child of the nursery has the same command. A child that is frozen runs for ever.
    own = own_children_of(story.nodes["a"].process.pid)
    nurseries = [pid for pid in own if "nursery" in command_of(pid)]
    assert nurseries
    for pid in nurseries:
        os.kill(pid, signal.SIGSTOP)
    story.wait(60)
    since = story.now()
    story.until(lambda: "apart" in story.ended_since(since), 60, "runs end in children again")
    story.check_end()
    story.check_told()


def test_a_child_that_takes_too_much_memory_is_killed_and_the_others_go_on(story: Story) -> None:
    story.settings["BATCH_POOL_CPU"] = "process:2"
    story.start("a")
    story.until(lambda: "apart" in story.ended_since(0), 60, "runs end in children")
    for _ in range(3):
        story.request_runs("hungry")
        story.wait(20)
    since = story.now()
    story.until(lambda: "apart" in story.ended_since(since), 30, "the others go on")
    story.check_end()
    story.check_told(
        "opened failed hungry: used more than 200 MiB",
        headline="problem: hungry: 3 runs failed: used more than 200 MiB",
    )


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
        return ""
