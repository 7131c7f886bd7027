"""Tasks that harm their node: by the ledger's lock, by memory, by children that stay, and by all threads."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from tests.days.story import TWELVE, Story
from tests.processes import BATCH

pytestmark = pytest.mark.days

LOCKING = '''

class Locking(BaseTask):
    """A sync task that holds the write lock of the ledger's file for 45 seconds each time it runs."""

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
    """200 of them hold all threads."""

    name, schedule, overlap = "filling", None, "allow"

    def run(self):
        time.sleep(90)
'''


def test_a_run_that_holds_the_lock_of_the_ledger_for_45_seconds_waits_longer_each_time(tmp_path: Path) -> None:
    """It is not resumed at once, again and again: the slots of the others fire in between, and an incident names it."""
    with Story(tmp_path / "story", {}, TWELVE + LOCKING) as story:
        story.start("a")
        story.until(lambda: len(story.ended_since(0)) >= 12, 30, "the others run")
        story.request_runs("locking")
        story.wait(240)
        begun = [float(line[5]) for line in story.witness() if line[0] == "began" and line[1] == "locking"]
        assert 2 <= len(begun) <= 4, begun
        waits = [second - first for first, second in pairwise(begun)]
        assert waits[0] > 45 + 25, waits
        assert "locking" in story.told(), story.told()
        story.batch("cancel", "locking", code=None)
        story.wait(50)
        story.check_end({"tick", "long", *(f"short{number}" for number in range(10))})


def test_a_child_that_a_task_has_left_keeps_no_port_after_a_kill(tmp_path: Path) -> None:
    with Story(tmp_path / "story", {}, TWELVE + FORKING) as story:
        story.start("a")
        port = story.nodes["a"].at.rpartition(":")[2]
        story.request_runs("forking")
        story.until(lambda: "forking" in story.ended_since(0), 30, "it has left a child")
        story.kill("a")
        story.start("a", command=(*BATCH, "serve", "--port", port))
        story.check_end()


def test_200_runs_that_hold_all_threads_are_said_to_do_so(tmp_path: Path) -> None:
    with Story(tmp_path / "story", {}, TWELVE + FILLING) as story:
        story.start("a")
        story.request_runs("filling", 200)
        since = story.now()
        story.until(lambda: "no thread is free" in story.nodes["a"].get("/readyz").text, 60, "it says so")
        assert "no thread is free" in story.nodes["a"].said
        assert len(story.ended_since(since)) >= 12  # what runs on the event loop goes on
