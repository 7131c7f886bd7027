"""Forms without JavaScript: one with a mistake is shown again with what was entered, and an action
leads back.
"""

from __future__ import annotations

import re
from datetime import UTC, date, datetime
from decimal import Decimal
from enum import Enum
from html import unescape
from typing import Annotated, Literal

import pytest
from pydantic import Field
from sqlalchemy import select

from batch_system.batch.cron.zones import zone_of
from batch_system.batch.ledger.states import Rank
from batch_system.batch.ledger.tables import runs
from batch_system.errors import InvalidParameters
from batch_system.operations.tasks import details
from batch_system.pages.frame.forms import local_path, wrong_in
from batch_system.pages.tasks.start_form import fields_of_schema, parameters_in
from batch_system.verbs.access import ListChanges
from batch_system.verbs.runs import ShowBlocker
from tests.batch.ledger_world import make_task
from tests.pages.conftest import People, failed_run
from tests.pages.test_run_page import running


def problem_in(html: str) -> str:
    """What the page says is wrong with the form."""
    (found,) = re.findall(r'<p class="c-failed" id="problem" role="alert">([^<]*)</p>', html)
    return str(found)


def mistakes_in(html: str) -> dict[str, str]:
    """What the form of a start says at each of its fields, by the end of the field's id."""
    found = re.findall(r'<p class="bad-f" id="e-[pf]-(\w+)">(?:<i [^>]*></i>)?<span>([^<]*)', html)
    return {name: unescape(words) for name, words in found}


async def test_a_start_with_a_mistake_is_asked_again_with_what_was_entered(people: People) -> None:
    answer = await people.operator.send(
        "/tasks/payroll/start", 422, **{"param-month": "x]", "param-account": "<i>12"}
    )
    assert "<h1>Start payroll</h1>" in answer.text
    assert mistakes_in(answer.text)["month"].startswith(
        "month is 'x]': Input should be a valid int"
    )
    month = re.search(r'<input id="p-month"[^>]*>', answer.text)
    assert month is not None and 'value="x]"' in month[0] and 'aria-invalid="true"' in month[0]
    assert 'aria-describedby="h-p-month e-p-month"' in month[0] and " autofocus" in month[0]
    assert 'value="&lt;i&gt;12"' in answer.text
    assert 'action="/tasks/payroll/start"' in answer.text
    assert "data-answer" in answer.text  # the page is not read anew under what was typed
    wrong = await people.operator.send("/tasks/payroll/start", 422, **{"param-month": "1.5"})
    assert mistakes_in(wrong.text)["month"].startswith("month is '1.5': ")
    assert (
        await people.operator.send("/tasks/payroll/start", **{"param-month": "2"})
    ).status_code == 303


async def test_what_is_secret_is_never_shown_again(people: People) -> None:
    given = {"param-api_key": "abc-0815", "param-day": '{"password": "def-0815"}', "key": "x" * 300}
    answer = await people.operator.send("/tasks/report/start", 422, **given)
    assert "c-0815" not in answer.text and "f-0815" not in answer.text
    assert re.search(r'role="alert">.*?<p>key: allowed', answer.text, re.DOTALL)
    assert re.search(r'<input id="p-api_key"[^>]* type="password" value=""', answer.text)


async def test_what_is_confirmed_is_asked_again_with_the_note_and_the_choice(
    people: People,
) -> None:
    note = "the disk\r\nis <b>full</b> " + "x" * 2_000
    for what in ("pause", "mute"):
        answer = await people.operator.send(
            f"/tasks/report/{what}", 422, note=note, **{"for": "week"}
        )
        assert problem_in(answer.text) == "note: allowed are 2,000 characters"
        assert "the disk\nis &lt;b&gt;full&lt;/b&gt; xxx" in answer.text
    assert '<input type="radio" name="for" value="week" checked>' in answer.text
    assert "for: allowed are" in problem_in(
        (await people.operator.send("/tasks/report/mute", 422, note="why")).text
    )
    assert "Paused by" not in await people.viewer.page("/tasks/report")


async def test_an_acknowledgement_without_a_note_is_asked_again(people: People) -> None:
    run = await failed_run(people.operator)
    preview = re.search(
        r'name="preview" value="([^"]+)"',
        await people.operator.page("/runs/bulk/acknowledge?state=failed"),
    )
    assert preview is not None
    for path, fields in (
        (f"/runs/{run}/acknowledge", {}),
        ("/runs/bulk/acknowledge?state=failed", {"preview": preview[1]}),
    ):
        answer = await people.operator.send(path, 422, note="no", **fields)
        assert problem_in(answer.text) == "note: 3 to 500 characters are needed, which say why"
        assert re.search(r'aria-invalid="true"[^>]*>no</textarea>', answer.text)
        assert f'action="{path}"' in answer.text
    expired = await people.operator.send(
        "/runs/bulk/acknowledge?state=failed", 422, note="known", preview=run
    )
    assert (
        "a preview is good for an hour" in problem_in(expired.text)
        and ">known</textarea>" in expired.text
    )


async def test_what_no_longer_fits_is_an_error_and_not_asked_again(people: People) -> None:
    run = await failed_run(people.operator)
    answer = await people.operator.send(f"/runs/{run}/cancel", 409)
    assert "has failed" in answer.text and "<form" not in answer.text
    html = await people.operator.page(f"/runs/{run}/cancel")
    assert "The run has ended: it is failed." in html and ">Cancel the run<" not in html
    goes_on = await running(people)
    html = await people.operator.page(f"/runs/{goes_on}/retry")
    assert "The run has not ended: it is running." in html and ">Retry the run<" not in html


async def test_a_backfill_keeps_its_days_and_its_preview(people: People) -> None:
    days = {"first": "2024-01-01", "last": "2023-12-31", "already": "redo"}
    answer = await people.operator.send("/tasks/report/backfill", 422, **days)
    assert problem_in(answer.text) == "last: the last day is before the first one"
    assert 'value="2024-01-01"' in answer.text and '<option value="redo" selected>' in answer.text
    days["last"] = "2025-12-31"
    answer = await people.operator.send("/tasks/report/backfill", 200, **days)
    preview = re.search(r'name="preview" value="([^"]+)"', answer.text)
    assert preview is not None
    wrong = await people.operator.send(
        "/tasks/report/backfill", 422, preview=preview[1], number="730", note="again", **days
    )
    assert problem_in(wrong.text) == "number: enter the number of runs, 731, because there are many"
    assert "This will create 731 runs." in wrong.text
    assert 'value="730"' in wrong.text and ">again</textarea>" in wrong.text


async def test_a_token_with_a_mistake_is_asked_again(people: People) -> None:
    answer = await people.admin.send("/you/tokens", 422, name="robot", role="viewer", days="never")
    assert problem_in(answer.text) == "days: allowed is a whole number from 1"
    assert 'value="robot"' in answer.text and '<option value="viewer" selected>' in answer.text


async def test_an_action_leads_back_to_the_page_that_it_was_asked_from(people: People) -> None:
    here = "http://localhost"
    asked = await people.operator.client.get(
        "/tasks/report/pause", headers={"Referer": f"{here}/tasks?show=running&text=re"}
    )
    assert '<a class="btn" href="/tasks?show=running&amp;text=re"' in asked.text
    assert 'name="next" value="/tasks?show=running&amp;text=re"' in asked.text
    done = await people.operator.send("/tasks/report/pause", next="/tasks?show=running&text=re")
    assert done.headers["location"] == "/tasks?show=running&text=re"
    again = await people.operator.send(
        "/tasks/report/pause", 422, next="/tasks?show=running", note="x" * 2_001
    )
    assert 'name="next" value="/tasks?show=running"' in again.text


@pytest.mark.parametrize(
    "given",
    [
        *(
            "http://evil.example/tasks",
            "http://localhost.evil.example/",
            "http://localhost@evil.example/x",
            "http://[x",
        ),
        *(
            "http://localhost//evil.example",
            "http://localhost/\\evil.example",
            "http://localhost/signin?next=/",
            "",
        ),
        "http://localhost/tasks/report/pause?again",
    ],
)
async def test_a_referer_that_is_no_page_of_ours_is_not_gone_back_to(
    people: People, given: str
) -> None:
    asked = await people.operator.client.get("/tasks/report/pause", headers={"Referer": given})
    assert 'name="next" value=""' in asked.text
    assert '<a class="btn" href="/tasks/report"' in asked.text


@pytest.mark.parametrize(
    "given",
    [
        *(
            "//evil.example",
            "/\\evil.example",
            "\\\\evil.example",
            "/a\\..\\\\evil",
            "http://evil.example",
            "evil",
        ),
        *("/\t/evil.example", "/\n/evil.example", "javascript:alert(1)", "/x" * 2_000),
    ],
)
async def test_an_action_leads_to_no_other_site(people: People, given: str) -> None:
    assert local_path(given, "/there") == "/there"
    done = await people.operator.send("/tasks/report/resume", next=given)
    assert done.headers["location"] == "/tasks/report"


async def test_a_start_has_a_note_a_priority_and_an_instant_in_the_zone_of_the_viewer(
    people: People,
) -> None:
    given = {"param-month": "2", "at": "2027-03-01T09:30", "note": "the month was wrong"}
    given["priority"] = "high"
    wrong = await people.operator.send("/tasks/payroll/start", 422, **{**given, "at": "soon"})
    assert mistakes_in(wrong.text) == {"at": "at: allowed is an instant such as 2026-10-24T18:00"}
    assert 'value="soon"' in wrong.text and ">the month was wrong</textarea>" in wrong.text
    assert '<option value="high" selected>' in wrong.text
    odd = await people.operator.send("/tasks/payroll/start", 422, **{**given, "priority": "most"})
    assert mistakes_in(odd.text)["priority"] == "priority is 'most'; allowed: high, low"
    done = await people.operator.send("/tasks/payroll/start", **given)
    run = done.headers["location"].removeprefix("/runs/")
    waits = (await people.served.operations(ShowBlocker(run=run))).awaits
    assert [each.at for each in waits] == [datetime(2027, 3, 1, 9, 30, tzinfo=UTC)]
    async with people.served.operations.context.databases.changing() as connection:
        rank = select(runs.c.rank).where(runs.c.id == run)
        assert (await connection.execute(rank)).scalar_one() == Rank.INTERRUPTED
    (change,) = (
        await people.served.operations(ListChanges(action="run.start", task="payroll", limit=1))
    ).changes
    assert (change.note, change.after["at"]) == ("the month was wrong", "2027-03-01T09:30:00+00:00")


def test_each_mistake_stands_at_its_field() -> None:
    async def run(self: object, day: int, month: int = 1) -> None: ...

    task = make_task("made", None, run)
    with pytest.raises(InvalidParameters) as raised:
        task.parameters.to_json({"day": "x", "month": "1.5"})
    wrong = wrong_in(raised.value, ["csrf", "param-day", "param-month"])
    assert wrong is not None and wrong.field == "param-day" and wrong.words.startswith("day is")
    assert list(wrong.others) == ["param-month"] and wrong.others["param-month"].startswith(
        "month is"
    )
    assert "month" not in wrong.words


async def test_the_first_field_of_a_start_has_the_focus_and_defaults_stand_as_one_types_them(
    people: People,
) -> None:
    html = await people.operator.page("/tasks/payroll/start")
    (focused,) = [each for each in re.findall(r"<(?:input|a)[^>]*>", html) if " autofocus" in each]
    assert 'id="p-month"' in focused
    assert 'placeholder="DE-4711"' in html


class Region(Enum):
    EU = "eu"
    US = "us"


async def kinds(
    self: object,
    day: date,
    at: datetime | None = None,
    region: Region = Region.EU,
    level: Literal[1, 2] | None = None,
    price: Decimal = Decimal("10.50"),
    number: Annotated[int, Field(ge=1, description="How many.")] = 100,
    is_dry: bool = True,
    is_wet: bool | None = None,
    banks: list[str] = ["giro"],  # noqa: B006
    days: list[date] = [],  # noqa: B006
    options: dict[str, int] = {},  # noqa: B006
    pairs: list[list[int]] = [],  # noqa: B006
    text: str = "eu",
) -> None: ...


def test_a_field_has_the_kind_of_its_parameter_and_its_default_as_one_types_it() -> None:
    loaded = make_task("kinds", None, kinds)
    fields = fields_of_schema(details.schema_of(loaded, {}))
    assert {each.name: (each.kind, each.words, each.default) for each in fields} == {
        "day": ("date", "date", None),
        "at": ("datetime", "date and time", ""),
        "region": ("select", "eu or us", "eu"),
        "level": ("select", "1 or 2", ""),
        "price": ("decimal", "number", "10.50"),
        "number": ("integer", "whole number", "100"),
        "is_dry": ("checkbox", "yes or no", "yes"),
        "is_wet": ("select", "yes or no", ""),
        "banks": ("lines", "list of texts", "giro"),
        "days": ("lines", "list of dates", ""),
        "options": ("json", "JSON", "{}"),
        "pairs": ("json", "JSON", "[]"),
        "text": ("text", "text", "eu"),
    }
    assert [each.name for each in fields if each.is_needed] == ["day"]
    (number,) = [each for each in fields if each.name == "number"]
    assert (number.description, number.hint) == ("How many.", "At least 1.")


def test_what_is_entered_becomes_the_values_that_the_check_of_the_task_takes() -> None:
    loaded = make_task("kinds", None, kinds)
    fields = fields_of_schema(details.schema_of(loaded, {}))
    entered = {
        "day": "2026-10-24",
        "at": "2026-10-25T12:00",
        "region": "us",
        "level": "2",
        "price": "12.5",
        "number": "",
        "is_wet": "no",
        "banks": "giro\n\n sparkasse \n",
        "options": '{"a": 1}',
    }
    given = parameters_in(
        fields, {f"param-{k}": v for k, v in entered.items()}, zone_of("Asia/Tokyo")
    )
    assert loaded.parameters.to_json(given) == {
        "day": "2026-10-24",
        "at": "2026-10-25T12:00:00+09:00",
        "region": "us",
        "level": 2,
        "price": "12.5",
        "is_dry": False,
        "is_wet": False,
        "banks": ["giro", "sparkasse"],
        "options": {"a": 1},
    }
    wrong = {
        "day": "x",
        "number": "0",
        "days": "2026-10-24\nsoon",
        "options": '{"a"',
        "is_dry": "on",
    }
    given = parameters_in(fields, {f"param-{k}": v for k, v in wrong.items()}, zone_of("UTC"))
    with pytest.raises(InvalidParameters) as raised:
        loaded.parameters.to_json(given)
    found = wrong_in(raised.value, ())
    assert found is not None
    assert [found.field, *found.others] == [
        f"param-{name}" for name in ("day", "number", "days", "options")
    ]


async def test_all_mistakes_of_a_start_are_said_at_once_and_each_at_its_field(
    people: People,
) -> None:
    given = {"param-month": "x", "at": "2027-03-01T09:30", "when": "now", "note": "n" * 2_001}
    answer = await people.operator.send("/tasks/payroll/start", 422, **given)
    assert list(mistakes_in(answer.text)) == ["month", "at", "note"]
    assert "Nothing was started: 3 fields" in " ".join(answer.text.split())
    assert re.findall(r'<a href="#(p-month|f-at|f-note)">', answer.text) == [
        *("p-month", "f-at", "f-note")
    ]
    asked = await people.served.operator.post(
        "/api/v1/tasks/payroll/runs", json={"parameters": {"month": "x", "moth": 1}}
    )
    assert asked.status_code == 422
    errors = {each["field"]: each["message"] for each in asked.json()["errors"]}
    assert list(errors) == ["body.parameters.month", "body.parameters.moth"]
    assert errors["body.parameters.month"] == mistakes_in(answer.text)["month"]
    later = await people.operator.send("/tasks/payroll/start", 422, when="later")
    assert list(mistakes_in(later.text)) == ["at"]
