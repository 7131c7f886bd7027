"""The page that lists the slots which are unaccounted for, and the numbers that link to it."""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from urllib.parse import quote

import pytest
from sqlalchemy import delete, update

from batch_system import clock
from batch_system.batch.ledger import tables
from tests.pages.conftest import People

MINUTE = timedelta(minutes=1)


async def lose_slots(people: People, minutes: int, ends: bool = True) -> datetime:
    """Let the task report have a slot in each of the last minutes, which a service has gone past
    without a trace.

    `ends`: the schedule ends now, so that no slot comes while the test goes on. Returns the first
    of these slots.
    """
    now = clock.now().replace(second=0, microsecond=0)
    begin = now - minutes * MINUTE
    async with people.served.service.ledger.engine.begin() as connection:
        mine = update(tables.schedules).where(tables.schedules.c.task == "report")
        values = {
            "cron": "* * * * *",
            "valid_from": begin - MINUTE / 2,
            "fired_until": now,
            "valid_until": now if ends else None,
        }
        await connection.execute(mine.values(**values))
        await connection.execute(
            update(tables.tasks).values(accounted_from=None, first_seen_at=begin - MINUTE)
        )
        for table in (tables.missed, tables.runs):
            await connection.execute(delete(table))
    return begin


def slots_in(html: str) -> list[datetime]:
    return [
        datetime.fromisoformat(each) for each in re.findall(r'nw"><time datetime="([^"]+)"', html)
    ]


async def test_each_number_of_unaccounted_slots_leads_to_exactly_these_slots(
    people: People,
) -> None:
    begin = await lose_slots(people, 10)
    night = await people.operator.page("/?since=24h")
    found = re.search(
        r'<a href="(/unaccounted\?since=[^"]+)" class="c-missed">(\d+) unaccounted</a>', night
    )
    assert found is not None
    address, number = found.groups()
    assert f'><a href="{address}">{number} slots are unaccounted for</a></h2>' in night
    assert night.count(f'href="{address}"') == 3, (
        "the headline, the sentence, and the row of what needs a person"
    )
    tasks = await people.operator.page("/tasks")
    assert (
        '<a class="card tile" href="/unaccounted?since=24h">' in tasks
        and f"{number} unknown" in tasks
    )
    for path in (address, "/unaccounted?since=24h"):
        html = await people.operator.page(path)
        slots = slots_in(html)
        assert (len(slots), min(slots), slots) == (int(number), begin, sorted(slots, reverse=True))
        assert f"<h1>{number} slots unaccounted for</h1>" in html
        assert html.count("No run, no skip, no missed range.") == html.count("Gap") == int(number)


async def test_who_may_backfill_can_do_it_for_the_day_of_the_slot(people: People) -> None:
    begin = await lose_slots(people, 3, ends=False)
    address = f"/tasks/report/backfill?first={begin:%Y-%m-%d}&last={begin:%Y-%m-%d}"
    assert address.replace("&", "&amp;") in await people.operator.page("/unaccounted?since=24h")
    assert "backfill?" not in await people.viewer.page("/unaccounted?since=24h")
    assert f'value="{begin:%Y-%m-%d}"' in await people.operator.page(address)


async def test_a_slot_is_shown_in_the_zone_of_the_viewer_and_in_utc(people: People) -> None:
    begin = await lose_slots(people, 2)
    await people.viewer.send("/preferences", zone="Asia/Kathmandu", next="/")
    html = await people.viewer.page("/unaccounted?since=24h")
    local = begin + timedelta(hours=5, minutes=45)
    assert (
        f'{local:%H:%M:%S} <span class="t2">+05:45</span>' in html
        and f">{begin:%Y-%m-%d %H:%M:%S}<" in html
    )


async def test_of_very_many_slots_the_newest_are_listed_and_the_others_are_counted(
    people: People,
) -> None:
    await lose_slots(people, 260)
    html = await people.operator.page("/unaccounted?since=24h")
    found = re.search(r"<h1>(\d+) slots unaccounted for</h1>", html)
    assert found is not None and int(found[1]) >= 260
    slots = slots_in(html)
    assert len(slots) == 200 and slots[0] - slots[-1] == 199 * MINUTE
    assert f"{int(found[1]) - 200} more are not listed here" in html


async def test_where_nothing_is_unaccounted_for_the_page_says_so(people: People) -> None:
    html = await people.viewer.page("/unaccounted")
    assert (
        "<h1>0 slots unaccounted for</h1>" in html and "Each slot of this window has a run" in html
    )


async def test_a_window_that_is_over_ends_where_that_of_night_ends(people: People) -> None:
    begin = await lose_slots(people, 30)
    since, until = quote((begin - 20 * MINUTE).isoformat()), quote((begin + 5 * MINUTE).isoformat())
    night = await people.viewer.page(f"/?since={since}&until={until}")
    found = re.search(
        r'<a href="(/unaccounted\?[^"]+until=[^"]+)" class="c-missed">5 unaccounted</a>', night
    )
    assert found is not None
    slots = slots_in(await people.viewer.page(found[1].replace("&amp;", "&")))
    assert slots == [begin + number * MINUTE for number in (4, 3, 2, 1, 0)]


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("since=yesterday", "allowed are night, 24h, or an instant"),
        ("since=2026-01-01T00:00", "31 days"),
        ("since=2026-01-02T00:00&until=2026-01-01T00:00", "before the end of the window"),
    ],
)
async def test_a_window_that_can_not_be_is_refused(people: People, query: str, words: str) -> None:
    assert words in await people.viewer.page(f"/unaccounted?{query}", 422)
