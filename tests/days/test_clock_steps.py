"""The wall clock steps by an hour and by a day, forward and back, of one node and of all."""

from __future__ import annotations

from pathlib import Path

import pytest

from batch_system.testing.databases import wait_for
from batch_system.testing.postgres import OwnServer
from tests.days.story import MISSED, Story
from tests.faults.wrong_clock import SERVE, WrongClock

pytestmark = pytest.mark.days

HOUR, DAY = 3_600.0, 86_400.0
AHEAD = (
    "clock : the clock was ahead, up to TIME UTC: 12 tasks fire again after TIME UTC (long, "
    "short0, short1, short2, short3, short4, short5, short6, short7, short8, …); `batch resume "
    "--ahead` lets them fire now"
)


@pytest.mark.parametrize("seconds", [HOUR, DAY])
def test_the_clock_of_the_only_machine_is_ahead_for_a_minute(
    tmp_path: Path, seconds: float
) -> None:
    """On SQLite the clock of the machine is that of the ledger. Afterwards one command lets the
    tasks fire again.
    """
    with Story(tmp_path / "story", {}) as story:
        wrong = WrongClock(tmp_path / "wrong")
        story.start("a", settings=wrong.settings, command=SERVE)
        story.until(lambda: len(story.ended_since(0)) == 12, 30, "all twelve tasks run")
        wrong.set(seconds)
        since = story.now()
        story.until(
            lambda: len(story.ended_since(since)) == 12, 30, "they fire by the clock that is ahead"
        )
        story.wait(45)
        wrong.set(0.0)
        story.until(
            lambda: "clock" in (story.nodes["a"].readiness() or {}),
            30,
            "it says that nothing fires",
        )
        story.until(
            lambda: any("opened clock" in told for told in story.messages), 60, "so does a message"
        )
        assert "`batch resume --ahead` lets them fire now" in story.status()
        story.batch("resume", "--ahead")
        story.check_end()
        story.check_told(
            "opened down : the clock was set forward from TIME to TIME UTC (SOME TIME). N slots "
            "of TASKS did not run; `batch night` lists them, `batch backfill` runs them.",
            f"opened {AHEAD}",
            f"closed {AHEAD}",
            headline=MISSED,
        )


def test_the_clock_of_one_node_steps_and_that_of_the_server_decides(
    server: OwnServer, tmp_path: Path
) -> None:
    with Story(tmp_path / "story", {"DATABASE_URL": wait_for(server.create_database())}) as story:
        wrong = WrongClock(tmp_path / "wrong")
        story.start("a", settings=wrong.settings, command=SERVE)
        story.start("b")
        story.until(lambda: len(story.ended_since(0)) == 12, 30, "all twelve tasks run")
        for seconds in (HOUR, -HOUR, DAY, -DAY, 0.0):
            wrong.set(seconds)
            since = story.now()
            story.wait(30)
            assert len(story.ended_since(since)) == 12
        story.check_end()
        story.check_told()


def test_the_clock_of_the_only_machine_is_set_back_by_an_hour(tmp_path: Path) -> None:
    """Then no slot is fired again: it is as if the clock had been ahead before.

    It is right again within a minute, so that all slots are still on time.
    """
    with Story(tmp_path / "story", {}) as story:
        wrong = WrongClock(tmp_path / "wrong")
        story.start("a", settings=wrong.settings, command=SERVE)
        story.until(lambda: len(story.ended_since(0)) == 12, 30, "all twelve tasks run")
        wrong.set(-HOUR)
        story.until(
            lambda: "clock" in (story.nodes["a"].readiness() or {}),
            30,
            "it says that nothing fires",
        )
        story.wait(40)
        wrong.set(0.0)
        story.check_end()
        story.check_told(f"opened {AHEAD}", f"closed {AHEAD}", headline=None)
