"""Tasks that harm their node: by the ledger's lock, by memory, by children that stay, and by all
threads.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from tests.days.story import TWELVE, Story
from tests.processes import BATCH

pytestmark = pytest.mark.days

LOCKING = '''

class Locking(BaseTask):
    """A sync task that holds the write lock of the ledger for 45 seconds each time it runs."""

    name, schedule = "locking", None

    def run(self):
        import sqlite3

        note("began")
        with sqlite3.connect("ledger.db", isolation_level=None, timeout=60) as connection:
            connection.execute("BEGIN IMMEDIATE")
            time.sleep(45)
            connection.execute("ROLLBACK")
        note("ended")
'''

FORKING = '''

class Forking(BaseTask):
    """Leaves a child that stays."""

    name, schedule = "forking", None

    def run(self):
        note("began")
        if os.fork() == 0:
            time.sleep(300)
            os._exit(0)
        note("ended")
'''

FILLING = '''

class Filling(BaseTask):
    """200 of them hold all threads, as long as there is a file."""

    name, schedule, overlap = "filling", None, "allow"

    def run(self):
        while os.path.exists("hold"):
            time.sleep(0.5)
'''


EATING = '''

class Eating(BaseTask):
    """Takes memory in the service process, until the kernel kills that."""

    name, schedule = "eating", None

    def run(self):
        import signal

        note("began")
        taken = []
        while len(taken) < 30:
            taken.append(bytearray(10_000_000))
            time.sleep(0.05)
        note("ended")
        os.kill(os.getpid(), signal.SIGKILL)
'''


def test_a_run_that_eats_the_memory_of_the_service_waits_longer_each_time(
    settings: dict[str, str], tmp_path: Path
) -> None:
    """A supervisor starts each killed process again. The others go on, and it is told which run it
    was.
    """
    with Story(tmp_path / "story", settings, TWELVE + EATING) as story:
        story.start("a", "b")
        story.until(lambda: len(story.ended_since(0)) >= 12, 30, "the others run")
        story.request_runs("eating")
        story.until(lambda: has_begun(story, "eating", 4), 150, "it was tried four times")
        begun = [
            float(line[5]) for line in story.witness() if line[0] == "began" and line[1] == "eating"
        ]
        waits = [second - first for first, second in pairwise(begun)]
        assert waits[0] < 25 < waits[1] < 55 < waits[2], waits
        story.until(
            lambda: has_begun(story, "eating", 4) and all_live(story), 60, "the nodes live again"
        )
        since = story.now()
        # A run of `long` that was lost with it more than once waits as well: which of the two it
        # was can't be known.
        others = {"tick", *(f"short{number}" for number in range(10))}
        story.until(lambda: story.ended_since(since) >= others, 30, "the others go on")
        text = (
            "SELECT id FROM batch_incidents WHERE task = 'eating' "
            "AND text LIKE '% 4 times without progress%'"
        )
        story.until(lambda: story.rows(text), 60, "its incident knows of the fourth loss")
        story.batch("cancel", "eating", code=None)
        story.check_end(others)
        story.messages[:] = [
            message
            for message in story.messages
            if " failed long: the node was lost" not in message
        ]
        story.check_told(
            "opened failed eating: the node was lost while it ran, 2 times without progress: it "
            "goes on after 30 s",
            f"opened node : {CRASHES}",
            "closed failed eating: the node was lost while it ran, 4 times without progress: it "
            "goes on after 120 s",
            headline=f"problem: crashes of HOST: {CRASHES}",
        )


CRASHES = (
    "N services on HOST have ended within 10 minutes without saying so, the last one with pid N: "
    "look at its log, and whether its machine has enough memory"
)


def has_begun(story: Story, task: str, times: int) -> bool:
    """Whether runs of the task have begun so often. Nodes that were killed are started, as by a
    supervisor.
    """
    for name, node in story.nodes.items():
        if not node.is_alive:
            story.deaths[node.process.pid] = story.now()
            story.launch(name)  # it may be killed again before it is ready
    return sum(line[:2] == ["began", task] for line in story.witness()) >= times


def all_live(story: Story) -> bool:
    return all(node.is_alive for node in story.nodes.values())


def test_a_run_that_holds_the_lock_of_the_ledger_for_45_seconds_waits_longer_each_time(
    tmp_path: Path,
) -> None:
    """It is not resumed at once, again and again: the slots of the others fire in between, and an
    incident names it.
    """
    with Story(tmp_path / "story", {}, TWELVE + LOCKING) as story:
        story.start("a")
        story.until(lambda: len(story.ended_since(0)) >= 12, 30, "the others run")
        story.request_runs("locking")
        lost = "SELECT id FROM batch_runs WHERE task = 'locking' AND losses = 3"
        story.until(lambda: story.rows(lost), 300, "it pays the third time")
        begun = [
            float(line[5])
            for line in story.witness()
            if line[0] == "began" and line[1] == "locking"
        ]
        assert len(begun) == 3, begun
        waits = [second - first for first, second in pairwise(begun)]
        assert waits[0] > 45 + 25, waits
        story.batch("cancel", "locking", code=None)
        story.until(lambda: story.nodes["a"].readiness() == {}, 60, "the lock is free")
        story.check_end()
        held = "failed locking: its process held the ledger's lock for SOME TIME while it ran"
        story.check_told(
            f"opened {held}: it goes on after 30 s",
            f"closed {held}, 3 times without progress: it goes on after 120 s",
        )


def test_a_child_that_a_task_has_left_keeps_no_port_after_a_kill(tmp_path: Path) -> None:
    with Story(tmp_path / "story", {}, TWELVE + FORKING) as story:
        story.start("a")
        port = story.nodes["a"].at.rpartition(":")[2]
        story.request_runs("forking")
        story.until(lambda: "forking" in story.ended_since(0), 30, "it has left a child")
        story.kill("a")
        story.start("a", command=(*BATCH, "serve", "--port", port))
        story.check_end()
        story.check_told()


def test_200_runs_that_hold_all_threads_are_said_to_do_so(tmp_path: Path) -> None:
    with Story(tmp_path / "story", {}, TWELVE + FILLING) as story:
        story.start("a")
        (story.folder / "hold").touch()
        story.request_runs("filling", 200)
        story.until(
            lambda: "no thread has been free" in story.nodes["a"].get("/readyz").text,
            60,
            "it says so",
        )
        since = story.now()
        assert "no thread has been free" in story.nodes["a"].said
        story.wait(60)
        assert len(story.ended_since(since)) >= 12  # what runs on the event loop goes on
        assert "no thread has been free" in story.batch("status", code=None)
        (story.folder / "hold").unlink()
        story.until(lambda: story.count_runs("filling", "succeeded") == 200, 60, "they end")
        story.check_end()
        story.check_told()
