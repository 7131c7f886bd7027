"""Failed slots of a task are retried together, while slots of the task that comes after it fire."""

from __future__ import annotations

import pytest

from tests.days.story import TWELVE, Story

pytestmark = pytest.mark.days

PAIR = '''

class Extract(BaseTask):
    """Fails while the file `broken` is there."""

    name, schedule = "extract", "*/20 * * * * *"

    async def run(self):
        note("began")
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


def test_three_failed_slots_are_retried_in_bulk_while_todays_slots_fire(story: Story) -> None:
    """Each slot of both has a run that has succeeded at the end."""
    story.start("a", "b")
    story.until(lambda: "load" in story.ended_since(0), 60, "both run")
    (story.folder / "broken").touch()
    story.until(lambda: count(story, "extract", "failed") >= 3, 90, "three slots fail")
    (story.folder / "broken").unlink()
    story.wait(25)  # slots of today go on
    story.batch("retry", "--task", "extract", "--state", "failed", "--yes")
    story.until(lambda: count(story, "extract", "failed") == 0, 30, "they have succeeded")
    story.until(lambda: count(story, "load", "skipped") + count(story, "load", "waiting") <= 1, 90, "so has what waits")
    story.check_end()
    assert story.told() == (
        "opened failed extract: RuntimeError: the source does not answer\n"
        "closed failed extract: RuntimeError: the source does not answer"
    )
    assert "Nothing needs you." in story.status()
    assert count(story, "load", "skipped") == 0
    assert count(story, "load", "succeeded") >= count(story, "extract", "succeeded") - 2


def count(story: Story, task: str, state: str) -> int:
    (row,) = story.rows(
        "SELECT count(*) AS n FROM batch_runs WHERE task = :task AND state = :state", task=task, state=state
    )
    return int(row["n"])
