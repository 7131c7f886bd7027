"""A task blocks the event loop of its node for 100 seconds."""

from __future__ import annotations

import pytest

from tests.days.story import TWELVE, Story

pytestmark = pytest.mark.days

BLOCKER = '''

class Blocker(BaseTask):
    """Blocks the event loop once, when the file `block` is there."""

    name, schedule = "blocker", "* * * * * *"

    async def run(self):
        try:
            os.rename("block", "blocked")
        except OSError:
            return
        note("blocks")
        time.sleep(100)
        note("gave")
'''


@pytest.fixture
def tasks() -> str:
    return TWELVE + BLOCKER


def test_a_task_blocks_the_event_loop_for_100_seconds(story: Story) -> None:
    """The other node takes the duties, fires and runs. What the blocked one runs goes on
    afterwards, as it lives.
    """
    story.start("a", "b")
    story.until(lambda: len(story.ended_since(0)) >= 12, 30, "all tasks run")
    (story.folder / "block").touch()
    (line,) = story.until(
        lambda: [line for line in story.witness() if line[0] == "blocks"], 20, "it blocks"
    )
    blocked, other = sorted(story.nodes.values(), key=lambda node: node.process.pid != int(line[4]))
    story.wait(40)
    since = story.now()
    story.until(lambda: "tick" in story.ended_since(since), 20, "the other node fires and runs")
    assert other.readiness() == {}
    (duty,) = story.rows(
        "SELECT n.pid FROM batch_duties d JOIN batch_nodes n ON n.id = d.node "
        "WHERE d.name = 'watch'"
    )
    assert duty["pid"] == other.process.pid
    story.until(lambda: [line for line in story.witness() if line[0] == "gave"], 80, "it gives way")
    story.frozen.append((blocked.process.pid, float(line[5]), story.now()))
    story.check_end()
    told = (
        "node : a run has blocked the event loop of HOST (pid N) for SOME TIME, so it answers "
        "nobody, and its runs do not go on: those of TASKS. Restart it, or wait until it ends by "
        "itself (MAX_LOOP_BLOCK): then its log names the run and the line"
    )
    story.check_told(f"opened {told}", f"closed {told}")
