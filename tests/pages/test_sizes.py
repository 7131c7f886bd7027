"""Pages of a ledger in which there is very much: they stay small, and none of them fails."""

from __future__ import annotations

import re
from datetime import timedelta

import pytest
from sqlalchemy import insert, text, update

from batch_system import clock
from batch_system.batch.ledger import tables
from batch_system.batch.ledger.incidents.tables import incidents
from batch_system.batch.ledger.tables import new_id
from tests.batch.crowd import crowd
from tests.pages.conftest import People

PAGES = (
    "/",
    "/?since=24h",
    "/tasks",
    "/tasks?range=24",
    "/incidents",
    "/runs",
    "/nodes",
    "/changes",
    "/search?q=many",
    "/search?q=x",
)
MOST_BYTES = 2_000_000
"""Of a page before it is packed. It has 50 or 100 rows, whatever there is."""
LONG = "<b>x</b>\x1b[31m\u202e" * 700_000
"""About ten megabytes."""


async def small(people: People, path: str, least: int = 500) -> str:
    html = await people.admin.page(path)
    assert least < len(html.encode()) < MOST_BYTES, (path, len(html))
    return html


async def insert_run(people: People, **values: object) -> str:
    """A failed run of the task report, with these values, and its attempt with a large error."""
    now, row = clock.now(), failed_run(**values)
    async with people.served.service.ledger.engine.begin() as connection:
        await connection.execute(insert(tables.runs), [row])
        attempt = {
            "run": row["id"],
            "fence": 1,
            "number": 1,
            "started_at": now,
            "ended_at": now,
            "outcome": "failed",
        }
        error = {
            "type": LONG[:1_000_000],
            "message": LONG[:1_000_000],
            "traceback": LONG[:1_000_000],
        }
        await connection.execute(insert(tables.attempts), [{**attempt, "error": error}])
    return str(row["id"])


def failed_run(**values: object) -> dict[str, object]:
    now = clock.now()
    return {
        "id": new_id(),
        "task": "report",
        "origin": "manual",
        "state": "failed",
        "rank": 0,
        "catch_up": False,
        "attempt": 1,
        "fence": 1,
        "fingerprint": "1:abc",
        **dict.fromkeys(
            ("due_at", "created_at", "started_at", "attempt_started_at", "finished_at"), now
        ),
        **values,
    }


async def test_night_shows_twenty_failures_in_full_and_the_runs_of_a_task_once(
    people: People,
) -> None:
    async with people.served.service.ledger.engine.begin() as connection:
        many = [
            failed_run(fingerprint=f"1:{number}", reason="ValueError: no") for number in range(45)
        ]
        await connection.execute(insert(tables.runs), many)
    html = await people.admin.page("/")
    assert html.count('<article class="pb"') == 20
    assert html.count("<dt>Last ") == 1
    assert "<b>25 more</b>" in html
    assert html.index("<b>25 more</b>") > html.rindex('<article class="pb"')
    assert len(html.encode()) < 200_000


@pytest.mark.rest
async def test_texts_of_ten_megabytes_are_cut(people: People) -> None:
    plain = LONG.replace("\x1b", "?")
    run = await insert_run(
        people, reason=plain, message=plain, params={"day": plain}, result={"said": plain}
    )
    for path in (
        f"/runs/{run}",
        "/runs",
        "/",
        "/tasks/report",
        f"/runs/{run}/attempts/1",
        "/search?q=report",
    ):
        html = await small(people, path)
        assert "<b>x</b>" not in html and "\u202e" not in html, path


async def test_a_run_that_is_pruned_under_the_page_is_not_found_and_the_others_stay(
    people: People,
) -> None:
    run = await insert_run(people, reason="ValueError: no")
    assert run in await people.admin.page("/runs")
    async with people.served.service.ledger.engine.begin() as connection:
        await connection.execute(text("DELETE FROM batch_attempts"))
        await connection.execute(text("DELETE FROM batch_runs"))
    for path in (
        f"/runs/{run}",
        f"/runs/{run}/attempts/1",
        f"/runs/{run}/cancel",
        f"/runs/{run}/log.txt",
    ):
        assert "no run" in await people.admin.page(path, 404)
    for path in PAGES:
        await small(people, path)


async def test_the_page_of_an_incident_without_task_and_without_events_is_shown(
    people: People,
) -> None:
    now = clock.now()
    row = {"id": new_id(), "kind": "pool", "task": "", "subject": "heavy", "fingerprint": ""}
    times = {"opened_at": now, "last_at": now, "told_at": now}
    async with people.served.service.ledger.engine.begin() as connection:
        values = {**row, **times, "text": "no node executes its runs", "count": 1, "successes": 0}
        await connection.execute(insert(incidents), [values])
    html = await people.viewer.page(f"/incidents/{row['id']}")
    assert "heavy" in html and "no node executes its runs" in html and "<dt>Owner" not in html


@pytest.mark.nightly
async def test_ten_thousand_tasks_and_many_runs_are_shown_in_pages(people: People) -> None:
    await crowd(people.served.service.ledger, 20_000, tasks=10_000, nodes=100)
    for path in PAGES:
        await small(people, path)
    html = await small(people, "/tasks")
    assert len(re.findall(r'<tr id="t-', html)) <= 50
    assert "1 to 50 of 10,0" in html


@pytest.mark.nightly
async def test_a_task_with_a_hundred_thousand_slots_in_the_window_is_one_lane(
    people: People,
) -> None:
    since = clock.now() - timedelta(hours=28)
    async with people.served.service.ledger.engine.begin() as connection:
        await connection.execute(
            update(tables.schedules)
            .where(tables.schedules.c.task == "report")
            .values(cron="* * * * * *", valid_from=since, fired_until=since)
        )
        await connection.execute(
            update(tables.tasks).values(accounted_from=None, first_seen_at=since)
        )
    for path in ("/", f"/?since={since:%Y-%m-%dT%H:%MZ}", "/tasks?range=24", "/tasks/report"):
        await small(people, path)
