"""The list of runs: its tabs, and what it finds as a file."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping
from datetime import timedelta
from html import unescape
from typing import Any
from urllib.parse import parse_qsl, urlencode

import pytest
from sqlalchemy import Table, insert, update

from batch_system import clock
from batch_system.batch.ledger import run_query, tables
from batch_system.batch.ledger.incidents.tables import incidents
from batch_system.batch.ledger.tables import new_id
from batch_system.operations.runs import listing
from batch_system.operations.runs.results import RunPage
from batch_system.pages.frame import files
from tests.batch.ledger_world import until
from tests.pages.conftest import People
from tests.pages.test_sizes import failed_run as row_of

HOSTILE = (
    '=HYPERLINK("http://example.org")',
    "+1",
    "-1",
    "@SUM(1)",
    "\t=1",
    'a "quoted", <b>bold</b>\r\nsecond line',
    "\x1b[31m\u202eright",
)
NOTHING = dict.fromkeys(("reason", "message", "count", "total"))


async def make(people: People, *values: Mapping[str, object]) -> list[str]:
    """Insert failed runs with these values, each older than the one before it."""
    now = clock.now()
    rows = [
        row_of(**{"created_at": now - timedelta(minutes=n), **each})
        for n, each in enumerate(values)
    ]
    await insert_into(people, tables.runs, *({**NOTHING, **row} for row in rows))
    return [str(row["id"]) for row in rows]


async def insert_into(people: People, table: Table, *rows: Mapping[str, object]) -> None:
    async with people.served.service.ledger.engine.begin() as connection:
        await connection.execute(insert(table), [dict(row) for row in rows])


async def csv_of(people: People, query: str) -> list[dict[str, str]]:
    answer = await people.viewer.client.get(f"/runs/file?format=csv&{query}")
    assert answer.headers["content-disposition"] == "attachment; filename=runs.csv"
    return list(csv.DictReader(io.StringIO(answer.text, newline="")))


async def json_of(people: People, query: str) -> dict[str, Any]:
    answer = await people.viewer.client.get(f"/runs/file?format=json&{query}")
    assert answer.headers["content-type"] == "application/json; charset=utf-8"
    return dict(answer.json())


async def test_a_file_has_what_the_filter_finds_and_no_formula(people: People) -> None:
    made = await make(people, *({"reason": text} for text in HOSTILE), {"state": "succeeded"})
    rows = await csv_of(people, "state=failed&task=report")
    assert [row["id"] for row in rows] == made[:-1]
    shown = [f"'{text}" for text in HOSTILE[:5]] + list(HOSTILE[5:])
    assert [row["reason"] for row in rows] == shown
    listed = await json_of(people, "state=failed&task=report")
    assert [run["reason"] for run in listed["runs"]] == list(HOSTILE)
    assert (rows[0]["attempt"], rows[0]["slot"], listed["after"]) == ("1", "", None)
    assert await json_of(people, "state=retrying") == {"runs": [], "after": None}
    html = await people.viewer.page("/runs?state=failed&text=a+%3D+%26")
    assert 'href="/runs/file?format=csv&amp;state=failed&amp;text=a+%3D+%26"' in html


@pytest.mark.parametrize("secret", ["reason", "message"])
async def test_a_file_has_no_texts_of_a_secret_task_for_a_viewer(
    people: People, secret: str
) -> None:
    await make(people, {"task": "payroll", secret: "4711 of Ann"})
    for kind in ("csv", "json"):
        path = f"/runs/file?format={kind}"
        assert "4711 of Ann" not in (await people.viewer.client.get(path)).text
        assert "4711 of Ann" in (await people.operator.client.get(path)).text
        found = await people.viewer.client.get(f"{path}&text=4711")
        assert "payroll" not in found.text
    assert (await people.nobody.get("/runs/file?format=csv")).status_code == 303


async def test_a_file_has_all_pages_and_says_where_runs_are_left_out(
    people: People, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await make(people, *({} for _ in range(450)))
    assert [run["id"] for run in (await json_of(people, ""))["runs"]] == made
    assert [row["id"] for row in await csv_of(people, "")] == made
    monkeypatch.setattr(files, "MOST_PAGES", 2)
    cut = await json_of(people, "")
    assert [run["id"] for run in cut["runs"]] == made[:400]
    rest = await people.served.viewer.get(f"/api/v1/runs?limit=200&after={cut['after']}")
    assert [run["id"] for run in rest.json()["runs"]] == made[400:]
    rows = await csv_of(people, "")
    assert [row["id"] for row in rows] == [*made[:400], files.rest_of("runs")]


@pytest.mark.parametrize(
    ("query", "status", "words"),
    [
        ("", 422, "format: allowed are csv, json"),
        ("format=xml", 422, "format: allowed are csv, json"),
        ("format=csv&since=yesterday", 422, "since: allowed is a time"),
        ("format=csv&state=moon", 422, "moon"),
        ("format=json&task=nobody", 404, "nobody"),
    ],
)
async def test_a_file_of_a_wrong_filter_is_a_page_that_says_what_is_wrong(
    people: People, query: str, status: int, words: str
) -> None:
    assert words in await people.viewer.page(f"/runs/file?{query}", status)


def tabs_in(html: str) -> dict[str, str]:
    """The number of each tab, by its label."""
    tabs = html.partition('<nav class="tabs"')[2].partition("</nav>")[0]
    found = re.findall(r"<a [^>]+>(\w+)(?: <span[^>]*>([^<]+)</span>)?</a>", tabs)
    return dict(found)


async def test_tabs_count_each_state_under_the_other_filters(people: People) -> None:
    old = clock.now() - timedelta(days=3)
    await make(people, *({} for _ in range(3)), {"state": "succeeded"}, {"state": "running"})
    await make(people, {"task": "payroll", "created_at": old}, {"origin": "part", "part": 1})
    numbers = {"All": "6", "Active": "1", "Failed": "4", "Succeeded": "1", "Running": "1"}
    rest = dict.fromkeys(
        ("Retrying", "Interrupted", "Queued", "Waiting", "Skipped", "Cancelled"), "0"
    )
    for path in ("/runs", "/runs?state=succeeded", "/runs?state=active"):
        assert tabs_in(await people.viewer.page(path)) == numbers | rest, path
    recent = numbers | rest | {"All": "5", "Failed": "3"}
    for query in ("within=24h", "task=report", "task=report&within=7d&state=failed"):
        assert tabs_in(await people.viewer.page(f"/runs?{query}")) == recent, query
    html = await people.viewer.page("/runs?task=report&state=failed")
    assert '<a href="/runs?task=report&amp;state=failed" aria-current="page">Failed' in html


async def test_tabs_have_no_numbers_where_no_index_counts_the_runs(people: People) -> None:
    await make(people, {})
    for query in ("tag=daily", "pool=default", "text=x", "param=day%3Dx", "origin=part"):
        numbers = tabs_in(await people.viewer.page(f"/runs?{query}"))
        assert len(numbers) == 11 and set(numbers.values()) == {""}, query


async def test_runs_are_counted_up_to_a_number(
    people: People, monkeypatch: pytest.MonkeyPatch
) -> None:
    await make(people, *({} for _ in range(5)), {"state": "succeeded"})
    monkeypatch.setattr(run_query, "COUNTED", 4)
    monkeypatch.setattr(run_query, "LOOKED", 4)
    numbers = tabs_in(await people.viewer.page("/runs"))
    assert (numbers["All"], numbers["Failed"], numbers["Succeeded"]) == ("4+", "4+", "1")
    numbers = tabs_in(await people.viewer.page("/runs?task=report"))
    assert (numbers["All"], numbers["Failed"]) == ("4+", "")


async def test_an_empty_list_says_how_many_runs_there_are_in_other_states(people: People) -> None:
    await make(people, {}, {})
    html = await people.viewer.page("/runs?task=report&state=skipped")
    words = " ".join(re.sub("<[^>]+>", "", html).split())
    assert "No run is like this. Without Skipped there are 2." in words
    assert '<a href="/runs?task=report">2</a>' in html
    html = await people.viewer.page("/runs?task=payroll&state=skipped")
    assert "No run is like this" in html and "Without" not in html


async def test_each_condition_is_a_chip_that_leads_to_the_list_without_it(people: People) -> None:
    given = {"task": "report", "state": "failed", "text": '<b>"a" & b</b>', "within": "24h"}
    html = await people.viewer.page(f"/runs?{urlencode(given)}")
    chips = re.findall(
        r'"fchip"><span title="[^"]*">([^<]+) <b>(.*?)</b></span>\s*<a href="/runs\?([^"]*)"', html
    )
    assert [(name, unescape(value)) for name, value, _ in chips] == [
        ("Task", "report"),
        ("State", "failed"),
        ("Reason with", '<b>"a" & b</b>'),
        ("Made in the last", "24h"),
    ]
    for (name, _, without), left in zip(chips, given, strict=True):
        rest = {each: value for each, value in given.items() if each != left}
        assert dict(parse_qsl(unescape(without))) == rest, name
    html = await people.viewer.page("/runs?slot_since=2026-10-25T02:30:00%2B02:00")
    assert "Slots since <b>" in html
    assert '<a href="/runs" aria-label="Remove the filter slots since">' in html
    assert '"fchip"' not in await people.viewer.page("/runs")


def lines_in(html: str) -> list[tuple[str, int]]:
    """The newest run of each line of the list, and how many runs it has."""
    found = re.findall(r'<tr id="r-([^"]+)".*?</tr>', html, re.DOTALL)
    numbers = [
        int(number[1]) if (number := re.search(r"×(\d+)", row)) else 1
        for row in re.findall(r'<tr id="r-.*?</tr>', html, re.DOTALL)
    ]
    return list(zip(found, numbers, strict=True))


async def test_equal_runs_of_a_task_are_one_line_until_another_outcome(people: People) -> None:
    good = {"state": "succeeded", "fingerprint": None}
    made = await make(
        people,
        {"state": "running", "created_at": clock.now() - timedelta(days=1)},
        *({"reason": f"ValueError: {n}"} for n in range(3)),
        {"task": "payroll", **good},
        good,
        good,
        {"fingerprint": "1:other"},
        *(good for _ in range(4)),
    )
    html = await people.operator.page("/runs")
    alone = [(run, 1) for run in made]
    assert lines_in(html) == [alone[0], (made[1], 3), *alone[4:8], (made[8], 4)]
    assert html.index("Still going on · 1") < html.index(made[0])
    assert f'value="{",".join(made[1:4])}"' in html
    unfolded = await people.operator.page(f"/runs?unfold={made[1]}")
    assert lines_in(unfolded) == [*alone[:8], (made[8], 4)]
    assert lines_in(await people.operator.page("/runs?fold=0")) == alone
    assert "c-box" not in await people.viewer.page("/runs")


async def test_the_chosen_runs_are_changed_and_no_others(people: People) -> None:
    made = await make(people, *({} for _ in range(5)), {"state": "succeeded"})
    chosen = urlencode([("run", ",".join(made[1:3])), ("run", made[4]), ("run", made[5])])
    html = await people.operator.page(f"/runs/bulk/retry?task=report&{chosen}")
    assert "Retry 3 runs?" in html and "<dt>Chosen</dt><dd>4</dd>" in html
    assert 'href="/runs?task=report"' in html
    preview = re.search(r'name="preview" value="([^"]+)"', html)
    assert preview is not None
    done = await people.operator.send("/runs/bulk/retry", preview=preview[1])

    async def is_done() -> str:
        page = await people.operator.page(done.headers["location"])
        return page if "Done" in page else ""

    assert "3 runs changed." in await until(is_done)
    left = await json_of(people, "state=failed&task=report")
    assert {made[0], made[3]} <= {run["id"] for run in left["runs"]}
    nothing = await people.operator.page(f"/runs/bulk/retry?run={made[5]}")
    assert "None of the chosen runs is in a state" in nothing
    await people.operator.page("/runs/bulk/retry?run=moon", 422)


async def test_a_view_is_saved_as_a_tab_of_the_browser_and_forgotten(people: People) -> None:
    view = "task=report&state=failed"
    for wrong in ({"name": ""}, {"name": "x" * 41}, {"name": "a\x1b"}, {"view": "moon=1"}):
        await people.viewer.send("/runs/views", 422, **{"name": "Mine", "view": view, **wrong})
    name = '<b>"Mine" & yours</b>'
    saved = await people.viewer.send("/runs/views", name=name, view=view)
    assert saved.headers["location"] == "/runs?task=report&state=failed"
    html = await people.viewer.page("/runs")
    assert 'href="/runs?task=report&amp;state=failed">' in html
    assert name in unescape(html) and name not in html
    assert name not in unescape(await people.operator.page("/runs"))
    await people.viewer.send("/runs/views", name=name, view=view, forget="1")
    assert name not in unescape(await people.viewer.page("/runs"))
    people.viewer.client.cookies.set("batch_views", "%00;=" * 2_000)
    await people.viewer.page("/runs")


async def test_a_run_that_ends_while_its_page_is_made_is_on_it_once(
    people: People, monkeypatch: pytest.MonkeyPatch
) -> None:
    [run] = await make(people, {"state": "retrying", "due_at": clock.now() + timedelta(hours=1)})
    list_runs = listing.list_runs
    is_first = True

    async def ended_meanwhile(*given: Any) -> RunPage:
        nonlocal is_first
        found = await list_runs(*given)
        if is_first:
            is_first = False
            async with people.served.service.ledger.engine.begin() as connection:
                await connection.execute(update(tables.runs).values(state="failed"))
        return found

    monkeypatch.setattr(listing, "list_runs", ended_meanwhile)
    assert (await people.viewer.page("/runs")).count(f'<tr id="r-{run}"') == 1


def said_in(html: str) -> list[str]:
    """What each line says in its column "Reason, result or place"."""
    return [
        " ".join(unescape(re.sub("<[^>]+>", " ", cell)).split())
        for cell in re.findall(r'<td class="why">(.*?)</td>', html, re.DOTALL)
    ]


async def test_a_line_says_how_many_items_its_runs_have_processed(people: People) -> None:
    equal = {"task": "equal", "state": "succeeded", "fingerprint": None, "message": "done"}
    ended = {"task": "ended", "state": "succeeded", "message": "31 prices changed"}
    await make(
        people,
        *({**equal, "count": count} for count in (2_000, 300, None)),
        {**ended, "count": 1, "total": 1},
        {"task": "broken", "reason": "OSError: full", "count": 5, "total": 31_000},
        {"task": "counts nothing", "reason": "OSError: gone"},
    )
    assert said_in(await people.viewer.page("/runs"))[-4:] == [
        "×3 2,300 items together",
        "31 prices changed · 1 item",
        "OSError: full · 5 of 31,000 items",
        "OSError: gone",
    ]


async def test_a_line_says_what_its_run_has_returned(people: People) -> None:
    good = {"state": "succeeded", "fingerprint": None, "origin": "schedule"}
    results = (
        {"by": "<b>", "left": [1, None], "rows": 4118},
        {"rows": 1, "password": "4711 of Ann"},
        31,
        "x" * 300,
        None,
    )
    made = [{**good, "task": f"task {n}", "result": each} for n, each in enumerate(results)]
    await make(people, *made, {**good, "task": "payroll", "result": "4712 of Ann"})
    said = said_in(await people.viewer.page("/runs"))
    assert said == [
        "by: <b>, left: [1, null], rows: 4,118",
        "rows: 1, password: ***",
        "31",
        *[""] * 3,
    ]
    assert said_in(await people.operator.page("/runs"))[-1] == "4712 of Ann"


async def test_a_line_says_who_asked_for_its_run_and_why_and_who_takes_care_of_it(
    people: People,
) -> None:
    for task in ("report", "payroll"):
        await people.operator.send(f"/tasks/{task}/start", note="recount after the delivery")
    incident = new_id()
    values = {"id": incident, "kind": "failed", "task": "broken", "subject": "", "text": "OSError"}
    times = dict.fromkeys(("opened_at", "last_at", "acknowledged_at"), clock.now())
    await insert_into(
        people,
        incidents,
        {**values, **times, "acknowledged_by": "jonas", "count": 1, "successes": 0},
    )
    await make(people, {"task": "broken", "reason": "OSError: full", "acknowledged": incident})

    async def are_over() -> bool:
        return "Still going on" not in await people.viewer.page("/runs")

    await until(are_over)
    assert sorted(said_in(await people.viewer.page("/runs"))) == [
        "acknowledged by jonas · OSError: full",
        "by operator",
        "operator: “recount after the delivery” · day: today",
    ]


async def test_a_line_says_what_holds_a_queued_run(people: People) -> None:
    held = {"task": "report", "fingerprint": None, "exclusive": "report", "lane": 0}
    old = clock.now() - timedelta(hours=1)
    running, _ = await make(
        people,
        {**held, "state": "running", "due_at": old},
        {**held, "state": "queued", "due_at": old, "attempt": 0},
    )
    said = said_in(await people.viewer.page("/runs"))
    assert said == ["", f"waits for run {running[-8:]} of the same task"]
