"""The pages of tasks and runs: timeline, history, waterfall, log, backfill, bulk changes and
search.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import update

from batch_system import clock
from batch_system.batch.ledger.states import RunState
from batch_system.batch.ledger.tables import schedules
from batch_system.operations.tasks.history import history as history_of
from tests.batch.ledger_world import until
from tests.batch.test_runs import insert, new
from tests.pages.conftest import People, failed_run

INLINE = re.compile(
    r"<script(?![^>]*\bsrc=)[^>]*>|<style|\sstyle=|\son[a-z]+=|javascript:", re.IGNORECASE
)


async def test_new_pages_work_for_a_run_that_has_failed(people: People) -> None:
    operator = people.operator
    run = await failed_run(operator)
    for path in (
        *(
            "/tasks",
            "/tasks?range=1",
            "/tasks?range=24&group=tag",
            "/tasks?text=report&show=attention",
        ),
        *(
            "/tasks/report",
            "/tasks/payroll",
            "/search",
            f"/search?q={run[-8:]}",
            "/search?q=no+such+day",
        ),
        *(
            "/runs?within=24h",
            "/runs?since=2026-10-25T02:30&until=2036-10-25T02:30",
            "/tasks/report/backfill",
        ),
        *(
            f"/runs/{run}",
            f"/runs/{run}?to=1",
            f"/runs/{run}?level=ERROR&text=day",
            f"/runs/{run}/redrive",
        ),
    ):
        assert INLINE.search(await operator.page(path)) is None, path
    html = await operator.page(f"/runs/{run}")
    assert "Attempt 1" in html
    traceback = re.search(rf"/runs/{run}/attempts/\d+", html)
    assert traceback is not None
    assert "there is no such day" in await operator.page(traceback[0])
    assert run in await operator.page(f"/search?q={run[-8:]}")
    assert run in await operator.page("/search?q=no+such+day")
    log = await operator.client.get(f"/runs/{run}/log.txt")
    assert log.status_code == 200
    assert log.headers["content-type"] == "text/plain; charset=utf-8"
    assert "there is no such day" in log.text


async def test_the_page_of_a_task_says_which_policies_have_their_defaults(people: People) -> None:
    html = await people.viewer.page("/tasks/report")
    assert "One run at a time; a slot that comes while it runs is skipped." in html
    assert "<dt>overlap</dt><dd><code>&#34;skip&#34;</code></dd>" in html.partition("All values")[2]


@pytest.mark.rest
async def test_the_page_of_a_task_says_what_h_became(people: People) -> None:
    async with people.served.service.ledger.engine.begin() as connection:
        await connection.execute(
            update(schedules).where(schedules.c.task == "report").values(given="0 H * * *")
        )
    html = await people.viewer.page("/tasks/report")
    assert "0 H * * *</code>, which became <code" in html
    found = (await people.viewer.client.get("/api/v1/tasks/report")).json()
    assert (found["given"], found["schedule"]) == ("0 H * * *", "0 3 * * *")


async def test_the_page_of_a_secret_task_says_why_it_failed_only_to_operators(
    people: People,
) -> None:
    failed = new(
        "payroll",
        state=RunState.FAILED,
        reason="ValueError: no such account",
        created_at=clock.now(),
    )
    await insert(people.served.service.ledger, failed)
    html = await people.operator.page("/tasks/payroll")
    assert ">Failed</span>" in html and "no such account" in html and "DE-4711" in html
    html = await people.viewer.page("/tasks/payroll")
    assert ">Failed</span>" in html
    assert "no such account" not in html and "DE-4711" not in html


async def test_many_runs_are_changed_after_a_preview(people: People) -> None:
    run = await failed_run(people.operator)
    html = await people.operator.page("/runs/bulk/acknowledge?state=failed&within=24h")
    preview = re.search(r'name="preview" value="([^"]+)"', html)
    assert preview is not None
    assert "Acknowledge 1 run?" in html
    answer = await people.operator.send(
        "/runs/bulk/acknowledge", preview=preview[1], note="known since yesterday"
    )
    for _ in range(200):
        if "Done" in (html := await people.operator.page(answer.headers["location"])):
            break
    assert "1 of 1 run" in html
    assert f"/runs/{run}/acknowledge" not in await people.operator.page(f"/runs/{run}")
    assert "Nothing to acknowledge" in await people.operator.page(
        "/runs/bulk/acknowledge?state=failed&task=payroll"
    )
    await people.operator.page("/runs/bulk/acknowledge?state=succeeded", 422)
    await people.viewer.page("/runs/bulk/acknowledge", 403)
    bulk = answer.headers["location"]
    assert f'href="{bulk}/undo"' in html and "/undo" not in await people.viewer.page(bulk)
    changes = await people.operator.page("/changes")
    assert "1 run changed." in changes and f'href="{bulk}/undo">Undo…</a>' in changes
    asked = await people.operator.page(f"{bulk}/undo")
    assert "Reopen 1 run?" in asked and "<dd>acknowledge of 1 run by operator</dd>" in asked
    preview = re.search(r'name="preview" value="([^"]+)"', asked)
    assert preview is not None
    undone = await people.operator.send(f"{bulk}/undo", preview=preview[1])
    assert "1 run changed." in await done(people, undone.headers["location"])
    assert f"/runs/{run}/acknowledge" in await people.operator.page(f"/runs/{run}")
    assert "Nothing to undo" in await people.operator.page(f"{bulk}/undo")
    await people.viewer.page(f"{bulk}/undo", 403)


async def done(people: People, path: str) -> str:
    """The page of a bulk that is done."""

    async def found() -> str:
        html = await people.operator.page(path)
        return html if "Done" in html else ""

    return str(await until(found))


async def test_a_backfill_is_made_after_a_preview(people: People) -> None:
    days = {"first": "2026-05-01", "last": "2026-05-31", "already": "leave"}
    answer = await people.operator.send("/tasks/report/backfill", 200, **days)
    assert "This will create 31 runs." in answer.text
    assert "Fri 1 May" in answer.text
    preview = re.search(r'name="preview" value="([^"]+)"', answer.text)
    assert preview is not None
    begun = await people.operator.send("/tasks/report/backfill", preview=preview[1])
    assert "31 of 31 runs" in await done(people, begun.headers["location"])
    again = await people.operator.send("/tasks/report/backfill", 200, **days)
    assert "31 slots that have a run" in again.text


async def test_the_days_of_a_backfill_are_in_the_history(people: People) -> None:
    today = datetime.now(UTC).date()
    days = {
        "first": str(today - timedelta(days=40)),
        "last": str(today - timedelta(days=2)),
        "already": "leave",
    }
    preview = re.search(
        r'name="preview" value="([^"]+)"',
        (await people.operator.send("/tasks/report/backfill", 200, **days)).text,
    )
    assert preview is not None
    begun = await people.operator.send("/tasks/report/backfill", preview=preview[1])
    await done(people, begun.headers["location"])
    history = await history_of(people.served.operations.context, "report", "UTC")
    known = {day.date for day in history.days if day.worst is not None}
    assert {today - timedelta(days=number) for number in range(2, 41)} <= known
    assert sum(history.counts.values()) == sum(sum(day.counts.values()) for day in history.days)
    assert history.known_from == min(known)
    assert "39 slots" in await people.operator.page("/tasks/report")


@pytest.mark.parametrize("first", ["", "x", "2026-13-01", "9999-12-31", "2026-06-01"])
async def test_days_that_are_none_are_refused(people: People, first: str) -> None:
    await people.operator.send("/tasks/report/backfill", 422, first=first, last="2026-05-31")


async def test_over_500_runs_need_their_number(people: People) -> None:
    answer = await people.operator.send(
        "/tasks/report/backfill", 200, first="2024-01-01", last="2025-12-31"
    )
    preview = re.search(r'name="preview" value="([^"]+)"', answer.text)
    assert preview is not None
    await people.operator.send("/tasks/report/backfill", 422, preview=preview[1])
    await people.operator.send("/tasks/report/backfill", 422, preview=preview[1], number="730")
    await people.operator.send("/tasks/report/backfill", 303, preview=preview[1], number="731")


async def test_a_viewer_sees_no_log_of_a_secret_task(people: People) -> None:
    started = await people.operator.send("/tasks/payroll/start")
    html = await people.viewer.page(started.headers["location"])
    assert "a viewer may not read logs of payroll" in html
    assert (
        await people.viewer.client.get(f"{started.headers['location']}/log.txt")
    ).status_code == 403
