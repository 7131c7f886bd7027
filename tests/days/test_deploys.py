"""Rolling deploys: the task that others wait for is renamed, one is removed, one moves, and `after` comes and goes."""

from __future__ import annotations

import pytest

from tests.days.story import TWELVE, Story

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


def deploy(story: Story, text: str) -> None:
    """Give both nodes new code, one after the other, as a rolling deploy does."""
    (story.folder / "tasks/all.py").write_text(text)
    for name in ("a", "b"):
        story.nodes[name].process.terminate()
        story.nodes[name].process.wait(60)
        story.deaths[story.nodes[name].process.pid] = story.now()
        story.start(name)


def test_after_comes_and_goes_and_a_task_is_removed_and_comes_back(story: Story) -> None:
    story.start("a", "b")
    story.until(lambda: "follower" in story.ended_since(0), 60, "all run")
    deploy(story, TWELVE + TASKS.format(leader="Leader", name="leader", after="pass"))
    since = story.now()
    story.until(lambda: {"leader", "follower"} <= story.ended_since(since), 60, "both run by themselves")
    deploy(story, TWELVE)
    story.wait(45)
    deploy(story, TWELVE + TASKS.format(leader="Leader", name="leader", after='after = "leader"'))
    since = story.now()
    story.until(lambda: {"leader", "follower"} <= story.ended_since(since), 90, "both run, one after the other")
    story.check_end()


def test_the_leader_is_renamed_by_a_deploy_and_its_follower_is_not(story: Story) -> None:
    """The follower has nothing to wait for any more: that is told, and not passed over."""
    story.start("a", "b")
    story.until(lambda: "follower" in story.ended_since(0), 60, "all run")
    deploy(story, TWELVE + TASKS.format(leader="Chief", name="chief", after='after = "leader"'))
    story.until(lambda: "follower" in story.told(), 150, "a message says that the follower is kept back")
    assert "follower" in story.status()
    deploy(story, TWELVE + TASKS.format(leader="Chief", name="chief", after='after = "chief"'))
    since = story.now()
    story.until(lambda: {"chief", "follower"} <= story.ended_since(since), 90, "both run again")
    story.check_end()
