"""The file of a calendar changes on two services, one after the other, as with two images; one of
them is killed in between.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import pytest

from tests.days.story import TWELVE, Story

pytestmark = pytest.mark.days

CLOSING = '''

from batch_system import Calendar


class Closing(BaseTask):
    """It has no slots on the dates of the bank."""

    name, schedule, overlap = "closing", "* * * * * *", "allow"
    except_on = Calendar("bank")

    async def run(self):
        note("began")
        note("ended")
'''
SECOND = timedelta(seconds=1)
FOLDERS = {"a": "calendars", "b": "calendars_of_b"}


@pytest.fixture
def tasks() -> str:
    return TWELVE + CLOSING


def write(story: Story, node: str, closed: bool) -> None:
    """The file of the bank as this node has it: closed today and tomorrow, or not."""
    today = story.clock().date()
    days = [today + timedelta(days=number) for number in (0, 1)] if closed else []
    folder = story.folder / FOLDERS[node]
    folder.mkdir(exist_ok=True)
    text = "".join(f'{day} = "Closed"\n' for day in ["2020-01-01", *days])
    (folder / "bank.toml").write_text(f"[dates]\n{text}")


def start(story: Story, *nodes: str) -> None:
    for node in nodes:
        story.start(node, settings={"CALENDARS_DIR": FOLDERS[node]})


def schedules(story: Story) -> list[dict[str, Any]]:
    """Those that the task has had, oldest first."""
    return story.rows(
        "SELECT cron, valid_from, valid_until FROM batch_schedules WHERE task = 'closing' "
        "ORDER BY valid_from"
    )


def each_second(after: datetime, until: datetime) -> list[datetime]:
    """The slots of a schedule that was open in this time."""
    first = after.replace(microsecond=0) + SECOND
    number = (until - first) // SECOND + 1 if until >= first else 0
    return [first + place * SECOND for place in range(number)]


def test_a_calendar_changes_on_one_service_after_the_other_and_one_is_killed(story: Story) -> None:
    for node in FOLDERS:
        write(story, node, closed=False)
    start(story, "a", "b")
    story.until(lambda: "closing" in story.ended_since(0), 60, "the task runs")
    write(story, "a", closed=True)
    story.until(lambda: len(schedules(story)) == 2, 30, "the change is in the ledger")
    story.wait(10)  # the other service has the former file, and fires by the ledger
    story.kill("b")
    story.wait(5)
    write(story, "b", closed=True)
    start(story, "b")
    story.wait(45)  # longer than a lease
    first, closed = schedules(story)
    assert closed["valid_until"] is None and first["valid_until"] == closed["valid_from"]
    query = "SELECT count(*) AS n FROM batch_runs WHERE task = 'closing' AND slot > :since"
    assert story.rows(query, since=closed["valid_from"])[0]["n"] == 0
    write(story, "b", closed=False)
    story.until(lambda: len(schedules(story)) == 3, 30, "the change back is in the ledger")
    write(story, "a", closed=False)
    since = story.now()
    story.until(lambda: "closing" in story.ended_since(since), 30, "the task runs again")
    runs_again_at = story.clock()
    story.check_end()
    # One slot each second of the first and the third schedule, and none of the second.
    *_, last = schedules(story)
    assert len(schedules(story)) == 3 and last["cron"] == first["cron"]
    query += " AND slot <= :until"
    between = {"since": closed["valid_from"], "until": last["valid_from"]}
    assert story.rows(query, **between)[0]["n"] == 0
    (account,) = [each for each in story.account if each["task"] == "closing"]
    for finding in account["findings"]:
        # The account may be taken between the instant of the newest slot and its firing.
        assert finding["kind"] == "due"
        assert datetime.fromisoformat(finding["first"]) > runs_again_at
    assert account["left_out"][0]["name"] == "Closed"
    rows = story.rows("SELECT slot FROM batch_runs WHERE task = 'closing' ORDER BY slot")
    ran = [datetime.fromisoformat(str(row["slot"])) for row in rows]  # text on SQLite
    began, ended, begun_again = (
        datetime.fromisoformat(str(row["valid_from"])) for row in (first, closed, last)
    )
    of_first, of_last = each_second(began, ended), each_second(begun_again, max(ran))
    assert of_first and of_last and ran == of_first + of_last
