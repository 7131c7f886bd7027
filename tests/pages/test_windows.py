"""The windows of Night, and the page that is shown as long as there is no task."""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import text

from batch_system import clock
from batch_system.pages.frame import visits
from batch_system.pages.frame.viewer import ZONE_COOKIE
from batch_system.pages.frame.visits import VISIT_COOKIE
from tests.batch.ledger_world import until
from tests.pages.conftest import People


def visit(people: People, before: str) -> None:
    people.viewer.client.cookies.set(VISIT_COOKIE, before, domain="localhost.local", path="/")


async def test_a_visit_begins_where_the_one_before_it_ended(people: People) -> None:
    html = await people.viewer.page("/")
    assert 'aria-disabled="true" title="This browser has not looked before."' in html
    earlier = int((clock.now() - timedelta(hours=5)).timestamp())
    visit(people, f".{earlier}")
    html = await people.viewer.page("/")
    (address,) = set(re.findall(r'href="(/\?since=[^"]+)"><span>Since', html))
    await people.viewer.page("/runs")  # the same visit goes on
    html = await people.viewer.page(address.replace("&amp;", "&"))
    assert f'href="{address}" aria-current="true"' in html


def in_zone_where_it_is(people: People, hour: int) -> None:
    ahead = hour - clock.now().hour
    ahead -= 24 if ahead > 14 else 0  # there is no zone that is farther ahead
    people.viewer.client.cookies.set(
        ZONE_COOKIE, f"Etc/GMT{-ahead:+}", domain="localhost.local", path="/"
    )


async def test_from_six_in_the_evening_on_there_is_the_window_of_tonight_too(
    people: People,
) -> None:
    with clock.moved(clock.now().replace(minute=30)):
        in_zone_where_it_is(people, 12)
        assert ">Tonight</a>" not in await people.viewer.page("/")
        in_zone_where_it_is(people, 20)
        html = await people.viewer.page("/")
        (address,) = re.findall(r'href="(/\?since=[^"]+)">Tonight</a>', html)
        assert (
            'href="/" aria-current="true"><span>Since 18:00<span class="pw"> '
            "yesterday</span></span></a>" in html
        )
        tonight = await people.viewer.page(address.replace("&amp;", "&"))
        assert f'href="{address}" aria-current="true">Tonight</a>' in tonight
        assert re.search(r"<p>[^<]*18:00[^<]* to now, 2 h", tonight), re.findall(
            r"<h1>.*?</p>", tonight
        )


@pytest.mark.parametrize(
    "cookie", ["", ".", "x.y", "1.99999999999", "-1.5", f"{'9' * 400}.1", "٣.٣", "0.0"]
)
async def test_a_cookie_of_visits_may_hold_anything(people: People, cookie: str) -> None:
    people.viewer.client.headers["Cookie"] = "; ".join(
        [
            f"{name}={value}"
            for name, value in people.viewer.client.cookies.items()
            if name != VISIT_COOKIE
        ]
        + [f"{VISIT_COOKIE}={cookie.encode('unicode_escape').decode()}"]
    )
    assert "Since<span" in await people.viewer.page("/")


async def test_a_look_long_ago_counts_as_one_of_seven_days_ago(people: People) -> None:
    visit(people, "1.2")
    with clock.moved(clock.now()):
        html = await people.viewer.page("/")
        week = (clock.now() - visits.FARTHEST).strftime("%Y-%m-%dT%H")
    assert f"since={week}" in html


async def test_a_window_of_a_form_is_in_the_zone_of_the_viewer(people: People) -> None:
    await people.viewer.send("/preferences", zone="Asia/Kathmandu", next="/")
    html = await people.viewer.page("/?since=2026-01-01T05:45&until=2026-01-02T05:45")
    assert re.findall(r'type="datetime-local" name="\w+" value="([^"]*)"', html) == [
        "2026-01-01T05:45",
        "2026-01-02T05:45",
    ]
    assert "No slot was due in this window." in html
    assert 'data-say="' in html


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("since=yesterday", "allowed are night, 24h, or an instant"),
        ("since=0001-01-01T00:00", "ten years"),
        ("until=0001-01-01T00:00Z", "ten years"),
        ("since=2026-01-01T00:00", "31 days"),
        ("since=9999-12-31T23:59", "before the end of the window"),
        ("since=2026-01-02T00:00&until=2026-01-01T00:00", "before the end of the window"),
    ],
)
async def test_a_window_that_can_not_be_is_refused(people: People, query: str, words: str) -> None:
    assert words in await people.viewer.page(f"/?{query}", 422)


async def test_without_tasks_the_pages_say_how_to_make_one(people: People, tmp_path: Path) -> None:
    service = people.served.service
    (tmp_path / "tasks" / "some.py").unlink()

    async def is_empty() -> bool:
        async with service.ledger.engine.begin() as connection:
            for table in ("batch_schedules", "batch_tasks"):
                await connection.execute(text(f"DELETE FROM {table}"))
        return "No tasks yet" in await people.admin.page("/")

    service.tasks.clear()
    await until(is_empty)
    for path in ("/", "/tasks"):
        html = await people.viewer.page(path)
        assert "Drop a file into" in html and "class Hello(BaseTask)" in html
