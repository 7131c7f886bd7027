"""A node is frozen for three minutes, by SIGSTOP or a debugger, in the middle of something, and
then goes on.
"""

from __future__ import annotations

from contextlib import suppress

import httpx
import pytest

from tests.days.story import TWELVE, Node, Story, boottime
from tests.processes import is_stopped

pytestmark = pytest.mark.days

FROZEN_SECONDS = 180

FREEZING = '''

import signal

from sqlalchemy import Engine, event, text

MOMENT = os.environ.get("FREEZE")
INSERTED = 'INSERT INTO batch_runs'
CLAIMED = "UPDATE batch_runs SET state = 'running'"


def freeze():
    """Stop this process, once, as soon as the file `freeze` is there."""
    try:
        os.rename("freeze", "frozen")
    except OSError:
        return
    os.kill(os.getpid(), signal.SIGSTOP)


@event.listens_for(Engine, "after_cursor_execute")
def look(connection, cursor, statement, parameters, *_):
    if MOMENT == "claim" and statement.startswith(CLAIMED):
        freeze()
    if MOMENT == "prepared slots" and statement.startswith(INSERTED):
        if str(parameters).count("wide") > 20:
            freeze()


class Work(BaseTask):
    """Notes each of its items once, in its chunks."""

    name, schedule = "work", None

    async def run(self):
        async for chunk in self.chunks(range(400), size=20, pause=0.2):
            async with chunk as (db, numbers):
                await db.execute(text("CREATE TABLE IF NOT EXISTS done (number INTEGER)"))
                await db.execute(text("INSERT INTO done VALUES (:n)"), [{"n": n} for n in numbers])
                if MOMENT == "chunk" and chunk.number > 3 and 0.3 < time.time() % 1 < 0.9:
                    freeze()  # at an instant at which of the other tasks only `long` may run
'''
WIDE = "".join(
    f"""

class Wide{number}(BaseTask):
    name, schedule = "wide{number}", "5/10 * * * * *"

    async def run(self):
        pass
"""
    for number in range(25)
)
"""So many slots of one instant that they are prepared before it."""


@pytest.fixture(params=["claim", "prepared slots", "chunk"])
def moment(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tasks(moment: str) -> str:
    return TWELVE + FREEZING + (WIDE if moment == "prepared slots" else "")


def test_a_node_is_frozen_for_three_minutes_in_the_middle_of_it(story: Story, moment: str) -> None:
    """The other node does all of its work. On SQLite it has to kill one that holds the lock of the
    ledger meanwhile; while it holds the lock of the application's database, its runs wait for
    that, and a person is told only that such a run is slow.
    """
    story.settings["FREEZE"] = moment
    story.start("a", "b")
    story.until(lambda: len(story.ended_since(0)) == 12, 30, "all twelve tasks run")
    (story.folder / "freeze").touch()
    frozen = story.until(
        lambda: frozen_node(story, "work" if moment == "chunk" else "tick"), 60, "one is frozen"
    )
    began = boottime()
    is_sqlite = not story.settings.get("DATABASE_URL")
    waiting = tasks_of(story, frozen) if moment == "chunk" and is_sqlite else set()
    story.wait(FROZEN_SECONDS - 20)
    since = boottime()
    story.until(
        lambda: len(story.ended_since(since) | waiting) == 12,
        20,
        "the other node fires and runs everything",
    )
    assert "silent" in story.batch("nodes") or "lost" in story.batch("nodes")
    story.frozen.append((frozen.process.pid, began, boottime()))
    if moment != "chunk" and is_sqlite:
        assert not frozen.is_alive
        story.start(frozen.name)
    frozen.thaw()
    story.check_end()
    if moment == "chunk":
        (runs,) = story.rows("SELECT count(*) AS number FROM batch_runs WHERE task = 'work'")
        story.until(
            lambda: story.count_runs("work", "succeeded") == runs["number"],
            60,
            "the chunks are done",
        )
        done = story.rows(
            "SELECT number, count(*) AS times FROM done GROUP BY number", of="DATABASE_URL"
        )
        assert {row["number"]: row["times"] for row in done} == dict.fromkeys(
            range(400), runs["number"]
        )
    slow = "slow long: it has run for SOME TIME; 95 of 100 runs take at most 7 seconds"
    story.check_told(*([f"opened {slow}", f"closed {slow}"] if "long" in waiting else []))


def tasks_of(story: Story, node: Node) -> set[str]:
    """The tasks of which this node has begun runs that have not ended."""
    lines = [line for line in story.witness() if line[4] == str(node.process.pid)]
    ended = {line[2] for line in lines if line[0] == "ended"}
    return {line[1] for line in lines if line[2] not in ended}


def frozen_node(story: Story, task: str) -> Node | None:
    """The node that has frozen. If none has, a run is started, in the middle of which one may."""
    if not any(is_stopped(node.process.pid) for node in story.nodes.values()):
        with suppress(httpx.TimeoutException):  # it has frozen before it could answer
            story.request_runs(task, seconds=5)
        story.wait(2)
    return next((node for node in story.nodes.values() if is_stopped(node.process.pid)), None)
