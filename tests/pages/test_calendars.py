"""The pages of named calendars, and what other pages say about dates that are left out."""

from __future__ import annotations

import re
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from urllib.parse import urlencode

import pytest
from sqlalchemy import update

from batch_system import clock
from batch_system.batch.ledger import tables
from batch_system.batch.tasks import calendar_files
from batch_system.operations.night import left_out
from tests.pages.conftest import People

CLOSING = """
from batch_system import BaseTask, Calendar

class Closing(BaseTask):
    name, schedule, except_on = "closing", "0 18 * * *", Calendar("bank")
    async def run(self): ...

class Sweep(Closing):
    name = "sweep"
"""


@pytest.fixture
def days(tmp_path: Path) -> dict[str, str]:
    """The dates of the calendar bank, which the application of the test has."""
    today = clock.now().date()
    dates = {
        f"{today - timedelta(days=400)}": "Long & ago",
        f"{today + timedelta(days=1)}": "<b>Closed</b>",
        f"{today + timedelta(days=2)}": "",
    }
    (tmp_path / "calendars").mkdir(exist_ok=True)
    lines = [f'{day} = "{name}"' for day, name in dates.items()]
    text = "\n".join(['weekend = ["FRI", "SAT"]', "[dates]", *lines])
    (tmp_path / "calendars" / "bank.toml").write_text(text)
    (tmp_path / "calendars" / "wrong.toml").write_text("dates = 7")
    (tmp_path / "tasks" / "closing.py").write_text(CLOSING)
    calendar_files.forget()
    return dates


@pytest.mark.rest
async def test_pages_show_calendars_their_dates_and_their_tasks(
    days: dict[str, str], people: People
) -> None:
    past, next_, last = days
    html = await people.viewer.page("/calendars")
    assert 'href="/calendars/bank">bank</a>' in html and 'href="/tasks/closing"' in html
    assert f"{next_}</span> &lt;b&gt;Closed" in html and "FRI SAT" in html
    assert past not in html
    assert "calendars/wrong.toml, line 1, has `dates`" in html
    assert "/calendars/wrong" not in html
    html = await people.viewer.page("/calendars/bank")
    assert html.index(next_) < html.index(last) < html.index(past)
    assert 'href="/tasks/closing"' in html and "Long &amp; ago" in html


@pytest.mark.rest
async def test_a_calendar_that_is_not_there_is_named(days: dict[str, str], people: People) -> None:
    html = await people.viewer.page("/calendars/nope", 422)
    assert "the calendar nope can&#39;t be read" in html
    await people.viewer.page("/calendars/Not-a-name", 422)


@pytest.mark.rest
async def test_the_page_of_a_task_says_what_is_left_out(
    days: dict[str, str], people: People
) -> None:
    _, next_, last = days
    html = await people.viewer.page("/tasks/closing")
    assert f"Left out: {next_} (&lt;b&gt;Closed&lt;/b&gt;), {last}" in html
    assert 'Calendar: <a href="/calendars/bank">bank</a>' in html
    html = await people.viewer.page("/tasks/report")
    assert "Left out" not in html and "/calendars/" not in html
    assert 'href="/calendars"' in await people.viewer.page("/tasks")


@pytest.mark.rest
async def test_night_says_what_was_left_out_in_its_window(
    days: dict[str, str], people: People, monkeypatch: pytest.MonkeyPatch
) -> None:
    past = datetime.combine(date.fromisoformat(next(iter(days))), time(), UTC)
    async with people.served.service.ledger.engine.begin() as connection:
        before = update(tables.schedules).values(valid_from=past - timedelta(days=9))
        await connection.execute(before)

    async def said(since: datetime) -> list[str]:
        query = urlencode({"since": since.isoformat(), "until": since + timedelta(days=1)})
        html = await people.viewer.page(f"/?{query}")
        lines = re.findall(r'<p class="v-x">(Left out.*?)</p>', html, re.DOTALL)
        return [" ".join(re.sub(r"<[^>]*>", "", line).split()) for line in lines]

    assert await said(past) == [f"Left out on {past.date()} (Long &amp; ago): closing, sweep."]
    assert await said(past - timedelta(days=2)) == []
    monkeypatch.setattr(left_out, "MOST_TASKS", 1)
    assert await said(past) == [f"Left out on {past.date()} (Long &amp; ago): closing and 1 more."]
