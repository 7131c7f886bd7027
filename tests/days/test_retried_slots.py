"""Failed slots of a task are retried together, while slots of the task that comes after it fire."""

from __future__ import annotations

import re

import pytest

from tests.days.story import TWELVE, Story

pytestmark = pytest.mark.days

PAIR = '''

class Extract(BaseTask):
    """Fails while the file `broken` is there, and takes long while the file `slow-extract` is."""

    name, schedule = "extract", "*/20 * * * * *"

    async def run(self):
        note("began")
        try:
            if os.path.exists(f"slow-{self.name}"):
                await asyncio.sleep(60)
        finally:
            note("ended")
        if os.path.exists("broken"):
            raise RuntimeError("the source does not answer")


class Load(BaseTask):
    name, schedule, after = "load", "*/20 * * * * *", "extract"

    async def run(self):
        note("began")
        await asyncio.sleep(3)
        note("ended")
'''


@pytest.fixture
def tasks() -> str:
    return TWELVE + PAIR


def let_three_fail(story: Story) -> None:
    story.start("a", "b")
    story.until(lambda: "load" in story.ended_since(0), 60, "both run")
    (story.folder / "broken").touch()
    story.until(lambda: story.count_runs("extract", "failed") >= 3, 90, "three slots fail")
    (story.folder / "broken").unlink()


def test_three_failed_slots_are_retried_in_bulk_while_todays_slots_fire(story: Story) -> None:
    """Each slot of both has a run that has succeeded at the end."""
    let_three_fail(story)
    story.wait(25)  # slots of today go on
    story.batch("retry", "--task", "extract", "--state", "failed", "--yes")
    story.until(lambda: story.count_runs("extract", "failed") == 0, 30, "they have succeeded")
    story.until(
        lambda: story.count_runs("load", "skipped") + story.count_runs("load", "waiting") <= 1,
        90,
        "so has what waits",
    )
    story.check_end()
    assert story.told() == (
        "opened failed extract: RuntimeError: the source does not answer\n"
        "closed failed extract: RuntimeError: the source does not answer"
    )
    assert "Nothing needs you." in story.status()
    assert story.count_runs("load", "skipped") == 0
    assert story.count_runs("load", "succeeded") >= story.count_runs("extract", "succeeded") - 2


def test_a_deploy_renames_what_is_retried_and_is_waited_for(story: Story) -> None:
    """The slots of today follow the new name. A person cancels the runs of the old one that are
    left.
    """
    let_three_fail(story)
    (story.folder / "slow-extract").touch()
    story.batch("retry", "--task", "extract", "--state", "failed", "--yes")
    story.until(lambda: story.count_runs("extract", "running"), 20, "they are retried")
    story.deploy(TWELVE + PAIR.replace('"extract"', '"source"'), "a", "b")
    since = story.now()
    story.until(lambda: {"source", "load"} <= story.ended_since(since), 60, "both run again")
    left = sum(
        story.count_runs("extract", state) for state in ("queued", "interrupted", "retrying")
    )
    assert left, "the deploy came too late"
    assert re.search(rf"queued +{left}\b", story.batch("status", code=None))
    story.batch("cancel", "--task", "extract", "--yes")
    story.check_end()
    failed = "failed extract: RuntimeError: the source does not answer"
    # If a slot of `load` came due before the first of it
    first = "kept_back load: source had no slot before this one"
    allowed = {f"{what} {text}" for what in ("opened", "closed") for text in (failed, first)}
    story.until(lambda: f"closed {failed}" in story.messages, 45, f"it is told: {story.told()}")
    assert set(story.messages) <= allowed
    assert len(story.messages) == len(set(story.messages))
