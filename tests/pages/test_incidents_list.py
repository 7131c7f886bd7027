"""The list of incidents: its tabs, its filter, and its files."""

from __future__ import annotations

import csv
import io
from datetime import timedelta

import pytest
from sqlalchemy import insert, update

from batch_system import clock
from batch_system.batch.incidents.watch import Watch
from batch_system.batch.ledger.incidents.tables import incidents
from batch_system.batch.ledger.people.access_tables import events
from batch_system.batch.ledger.tables import new_id, tasks
from batch_system.operations.incidents import read
from tests.pages.conftest import People
from tests.pages.conftest import people as people
from tests.pages.test_runs_list import insert_into, tabs_in

pytestmark = pytest.mark.rest

HOUR = timedelta(hours=1)
KINDS = {"report": "failed", "payroll": "failed", "sync": "late", "import": "failed"}


@pytest.fixture(autouse=True)
def unwatched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The watch would close these incidents, because no run has failed."""

    async def check(*_: object) -> None: ...

    monkeypatch.setattr(Watch, "_check", check)


async def put(people: People, task: str, text: str = "OSError: away", **values: object) -> None:
    now = clock.now()
    row = {"id": new_id(), "kind": KINDS[task], "task": task, "subject": "", "text": text}
    times = {"opened_at": now - HOUR, "last_at": now - HOUR, "told_at": None}
    numbers = {"fingerprint": new_id(), "count": 1, "successes": 0}
    async with people.served.service.ledger.engine.begin() as connection:
        await connection.execute(insert(incidents).values({**row, **times, **numbers, **values}))


@pytest.fixture
async def four(people: People) -> People:
    """One needs a person, of one a person takes care, one closes by itself, and two are over."""
    now = clock.now()
    await put(people, "report", "ValueError: one")
    taken = {"acknowledged_at": now, "acknowledged_by": "ann", "note": "the provider is down"}
    await put(people, "payroll", "ValueError: two", **taken)
    await put(people, "sync", "a slot waits")
    over = {"closed_at": now, "closed_why": "made_good"}
    await put(people, "import", "ValueError: three", **over)
    await put(people, "report", "ValueError: four", **over)
    return people


async def shown(people: People, query: str = "") -> set[str]:
    """Which of the four the page shows."""
    html = await people.operator.page(f"/incidents?{query}")
    texts = {"one", "two", "three", "four"}
    found = {text for text in texts if f"ValueError: {text}<" in html}
    return found | ({"late"} if "A slot waits<" in html else set())


async def rows(people: People, query: str) -> list[dict[str, str]]:
    answer = await people.operator.client.get(f"/incidents/file?format=csv&{query}")
    assert answer.headers["content-disposition"] == "attachment; filename=incidents.csv"
    return list(csv.DictReader(io.StringIO(answer.text, newline="")))


FOUND = {
    "": {"one", "two", "three", "four", "late"},
    "show=open": {"one", "late"},
    "show=acknowledged": {"two"},
    "show=over": {"three", "four"},
    "task=report": {"one", "four"},
    "task=report&show=over": {"four"},
    "kind=late": {"late"},
    "kind=failed&show=open": {"one"},
    "task=nobody": set[str](),
}


async def test_the_page_and_the_file_have_what_the_filter_finds(four: People) -> None:
    for query, expected in FOUND.items():
        assert await shown(four, query) == expected, query
        texts = {row["text"].removeprefix("ValueError: ") for row in await rows(four, query)}
        assert texts == {text.replace("late", "a slot waits") for text in expected}, query


async def test_tabs_count_the_incidents_under_the_other_filters(
    four: People, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = {"All": "5", "Open": "2", "Acknowledged": "1", "Over": "2"}
    for query in ("", "show=open", "show=acknowledged", "show=over"):
        assert tabs_in(await four.viewer.page(f"/incidents?{query}")) == numbers, query
    html = await four.viewer.page("/incidents?task=report&show=over")
    assert tabs_in(html) == {"All": "2", "Open": "1", "Acknowledged": "0", "Over": "1"}
    assert 'href="/incidents?show=over" aria-label="Remove the filter task"' in html
    assert "batch incidents --state closed --task report" in html
    monkeypatch.setattr(read, "COUNTED", 1)
    assert tabs_in(await four.viewer.page("/incidents"))["Over"] == "1+"


async def test_it_is_said_when_the_last_incident_was_over(people: People) -> None:
    assert "Nothing needs a person.</p>" in await people.viewer.page("/incidents")
    await put(people, "import", closed_at=clock.now() - HOUR, closed_why="over")
    html = await people.viewer.page("/incidents")
    assert "Nothing needs a person. The last incident was over <time" in html


async def test_texts_of_a_secret_task_are_in_no_file_of_a_viewer(people: People) -> None:
    await put(people, "payroll", "4711 of Ann")
    for path in ("/incidents", "/incidents/file?format=csv", "/incidents/file?format=json"):
        assert "4711 of Ann" not in (await people.viewer.client.get(path)).text
        assert "4711 of Ann" in (await people.operator.client.get(path)).text
    assert (await people.nobody.get("/incidents/file?format=csv")).status_code == 303


async def test_a_wrong_filter_is_a_page_that_says_what_is_allowed(people: People) -> None:
    wrong = {
        "/incidents?show=moon": "show: allowed are open, acknowledged, over",
        "/incidents?kind=moon": "kind is &#39;moon&#39;; allowed: failed",
        "/incidents?after=x": "the cursor that a page of this list has given",
        "/incidents/file": "format: allowed are csv, json",
    }
    for path, words in wrong.items():
        assert words in await people.viewer.page(path, 422), path


async def test_incidents_are_found_by_the_owner_of_their_task(four: People) -> None:
    is_report = tasks.c.name == "report"
    owned = update(tasks).where(is_report).values(monitoring={"owner": "payments #payments-oncall"})
    async with four.served.service.ledger.engine.begin() as connection:
        assert (await connection.execute(owned)).rowcount == 1
    for owner in ("payments", "PAYMENTS", "%23payments-oncall", "payments+%23payments-oncall"):
        assert await shown(four, f"owner={owner}") == {"one", "four"}, owner
        assert {row["task"] for row in await rows(four, f"owner={owner}")} == {"report"}
    assert await shown(four, "owner=pay") == set()
    html = await four.viewer.page("/incidents?owner=payments&show=over")
    assert tabs_in(html) == {"All": "2", "Open": "1", "Acknowledged": "0", "Over": "1"}
    assert "batch incidents --state closed --owner payments" in html
    assert '<option value="payments #payments-oncall">' in html
    await four.viewer.page(f"/incidents?owner={'x' * 201}", 422)


async def test_it_is_said_how_soon_half_of_the_incidents_of_ninety_days_were_over(
    people: People,
) -> None:
    now = clock.now()
    assert "90 days" not in await people.viewer.page("/incidents")
    for hours in (3, 1, 2):
        at = now - timedelta(days=89)
        over = {"opened_at": at, "closed_at": at + hours * HOUR, "closed_why": "over"}
        await put(people, "import", **over)
    await put(people, "import", **{**over, "opened_at": now - timedelta(days=91)})
    html = await people.viewer.page("/incidents")
    assert "90 days: 3 opened, half of them over within 2 h 00 min<" in html
    for task in ("report", "payroll"):
        await put(people, task)
    html = await people.viewer.page("/incidents")
    assert "90 days: 5 opened, half of them over within 3 h 00 min<" in html
    await put(people, "sync")
    await put(people, "report")
    assert "90 days: 7 opened<" in await people.viewer.page("/incidents")


async def test_it_is_said_who_retried_or_backfilled_what_before_an_incident_was_made_good(
    people: People,
) -> None:
    now = clock.now()
    over = {"closed_at": now - HOUR, "closed_why": "made_good", "opened_at": now - 3 * HOUR}
    for task in ("report", "import", "payroll"):
        await put(people, task, **over)
    by_hand = {"source": "web", "at": now - 2 * HOUR, "actor": "jonas", "action": "run.retry"}
    bulk = {**by_hand, "action": "bulk.retry", "note": "new token", "at": now - 1.5 * HOUR}
    filled = {**by_hand, "action": "task.backfill", "after": {"new": 1, "again": 1}}
    for event in (
        {**by_hand, "task": "report"},
        {**bulk, "after": {"count": 20, "request": {"task": "report"}}},
        {**bulk, "after": {"count": 99, "request": {}}},
        {**bulk, "at": now, "after": {"count": 99, "request": {"task": "report"}}},
        {**by_hand, "task": "report", "actor": "mara"},
        {**by_hand, "task": "import"},
        {**filled, "task": "import", "actor": "mara", "at": now - 1.5 * HOUR},
        {**by_hand, "task": "payroll", "note": "4711 of Ann"},
    ):
        await insert_into(people, events, {"id": new_id(), **event})
    html = await people.operator.page("/incidents?show=over")
    said = {"jonas retried 21 runs: “new token”", "mara backfilled 2 slots"}
    for words in (*said, "jonas retried 1 run: “4711 of Ann”"):
        assert f"<td>{words}</td>" in html, words
    html = await people.viewer.page("/incidents?show=over")
    for words in (*said, "jonas retried 1 run"):
        assert f"<td>{words}</td>" in html, words
