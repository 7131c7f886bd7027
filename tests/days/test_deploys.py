"""Rolling deploys: the task that others wait for is renamed, one is removed, one moves, and `after`
comes and goes.
"""

from __future__ import annotations

import pytest

from tests.days.story import MISSED, TWELVE, Story

pytestmark = pytest.mark.days

TASKS = """

class {leader}(BaseTask):
    name, schedule = "{name}", "*/10 * * * * *"

    async def run(self):
        note("began")
        note("ended")


class Follower(BaseTask):
    name, schedule = "follower", "*/10 * * * * *"
    {after}

    async def run(self):
        note("began")
        note("ended")
"""


@pytest.fixture
def tasks() -> str:
    return TWELVE + TASKS.format(leader="Leader", name="leader", after='after = "leader"')


def test_after_comes_and_goes_and_a_task_is_removed_and_comes_back(story: Story) -> None:
    story.start("a", "b")
    story.until(lambda: "follower" in story.ended_since(0), 60, "all run")
    story.deploy(TWELVE + TASKS.format(leader="Leader", name="leader", after="pass"), "a", "b")
    since = story.now()
    story.until(
        lambda: {"leader", "follower"} <= story.ended_since(since), 60, "both run by themselves"
    )
    story.deploy(TWELVE, "a", "b")
    story.wait(45)
    story.deploy(
        TWELVE + TASKS.format(leader="Leader", name="leader", after='after = "leader"'), "a", "b"
    )
    since = story.now()
    story.until(
        lambda: {"leader", "follower"} <= story.ended_since(since),
        90,
        "both run, one after the other",
    )
    story.check_end()
    story.check_told(headline=MISSED)  # what a person has removed has no slots


def test_the_leader_is_renamed_by_a_deploy_and_its_follower_is_not(story: Story) -> None:
    """The follower has nothing to wait for any more: that is told, and not passed over."""
    story.start("a", "b")
    story.until(lambda: "follower" in story.ended_since(0), 60, "all run")
    story.deploy(
        TWELVE + TASKS.format(leader="Chief", name="chief", after='after = "leader"'), "a", "b"
    )
    story.until(
        lambda: "follower" in story.told(), 150, "a message says that the follower is kept back"
    )
    assert "follower" in story.status()
    story.deploy(
        TWELVE + TASKS.format(leader="Chief", name="chief", after='after = "chief"'), "a", "b"
    )
    since = story.now()
    story.until(lambda: {"chief", "follower"} <= story.ended_since(since), 90, "both run again")
    story.check_end()
    text = (
        "kept_back follower: there is no task leader, which it comes after; deploy that task or "
        "change `after`, and retry the skipped slots"
    )
    story.check_told(f"opened {text}", f"closed {text}", headline=MISSED)
