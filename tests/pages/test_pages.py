"""The pages: who may see and do what, that they work without JavaScript, and that nothing in them
is executed.
"""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from html import unescape
from pathlib import Path
from urllib.parse import urlencode

import pytest
from sqlalchemy import update

from batch_system import clock
from batch_system.batch.ledger import missed_ranges, schedules, tables
from batch_system.batch.ledger.buckets import buckets, tally
from batch_system.batch.ledger.incidents.tables import incidents
from batch_system.batch.ledger.missed_ranges import Cause, MissedRange
from batch_system.batch.ledger.tables import new_id
from batch_system.operations.asking.actor import ROLES, Role
from batch_system.operations.incidents.results import Incident
from batch_system.operations.people import access
from batch_system.operations.runs import read
from batch_system.pages.routes import routes
from batch_system.pages.tasks import tasks
from batch_system.verbs.access import ListChanges
from batch_system.verbs.incidents import ListIncidents
from batch_system.verbs.run_changes import AcknowledgeRun, StartRun
from batch_system.web.access import Guard
from tests.batch.ledger_world import rows, until
from tests.pages.conftest import People
from tests.web.conftest import Served

RUN = "01a171c9-9b90-7000-8520-e12eb0030372"
PAGES: dict[str, Role] = {
    "/": "viewer",
    "/?since=24h": "viewer",
    "/unaccounted": "viewer",
    "/tasks": "viewer",
    "/tasks/report": "viewer",
    "/tasks/report/start": "operator",
    "/tasks/report/pause": "operator",
    "/tasks/report/resume": "operator",
    "/incidents": "viewer",
    "/runs": "viewer",
    "/runs?state=failed&task=report": "viewer",
    "/backups": "viewer",
    "/nodes": "viewer",
    "/changes": "viewer",
    "/calendars": "viewer",
    "/maintenance": "viewer",
    "/maintenance/pause": "operator",
    "/you": "viewer",
}
"""Pages, and the role that each needs."""

HOSTILE = "<script>alert(1)</script>\x1b[31m\u202e\x00'\"&amp;"
INLINE = re.compile(
    r"<script(?![^>]*\bsrc=)[^>]*>|<style|\sstyle=|\son[a-z]+=|javascript:", re.IGNORECASE
)
"""What the policy forbids."""


@pytest.mark.rest
@pytest.mark.parametrize("path", PAGES)
async def test_a_page_is_shown_to_its_role_and_to_no_lower_one(people: People, path: str) -> None:
    needed = ROLES.index(PAGES[path])
    for number, role in enumerate(ROLES):
        html = await people.of(role).page(path, 200 if number >= needed else 403)
        assert "<h1" in html
        assert INLINE.search(html) is None, INLINE.search(html)
    answer = await people.nobody.get(path)
    assert answer.status_code == 303
    assert answer.headers["location"].startswith("/signin?next=")


@pytest.mark.rest
async def test_every_form_needs_its_csrf_token_and_its_role(people: People) -> None:
    forms = [route for route in routes if "POST" in (getattr(route, "methods", None) or ())]
    paths = {
        route.path.format(
            task="report",
            run=RUN,
            incident=RUN,
            backup="latest",
            id=RUN,
            bulk=RUN,
            name="x",
            window=RUN,
        )
        for route in forms
    } - {"/signin", "/preferences", "/runs/views"}
    assert len(paths) >= 9
    for path in sorted(paths):
        assert (await people.admin.client.post(path, data={"x": "1"})).status_code == 403, path
        assert (await people.admin.client.post(path, data={"csrf": "0" * 64})).status_code == 403, (
            path
        )
        assert (await people.nobody.post(path, data={"x": "1"})).status_code == 401, path
        foreign = {"Origin": "http://evil.example"}
        csrf = await people.admin.csrf()
        assert (
            await people.admin.client.post(path, data={"csrf": csrf}, headers=foreign)
        ).status_code == 403, path
        if path not in ("/you/signout", "/you/sessions/end"):  # a viewer may send these
            await people.viewer.send(path, 403)


@pytest.mark.rest
async def test_a_person_starts_a_run_with_a_form_and_sees_how_it_fails(people: People) -> None:
    operator = people.operator
    form = await operator.page("/tasks/report/start")
    assert 'name="param-day"' in form and 'name="param-api_key"' in form
    answer = await operator.send("/tasks/report/start", **{"param-day": "never"})
    path = answer.headers["location"]
    assert re.fullmatch(r"/runs/[0-9a-f-]{36}", path)

    async def has_failed() -> str:
        html = await operator.page(path)
        return html if "Failed" in html else ""

    html = await until(has_failed)
    assert "ValueError: there is no such day" in html
    assert "Traceback" in html
    assert "ValueError: there is no such day" in await operator.page("/runs?state=failed")

    async def needs_a_person() -> str:
        night = await operator.page("/")
        return night if "report needs a person" in night and "/retry" in night else ""

    night = await until(needs_a_person)
    assert "<title>(1) Night" in night
    (incident,) = set(re.findall(r"/incidents/([0-9a-f-]{36})/retry", night))
    (address,) = re.findall(
        r'href="(/runs\?task=report&amp;fingerprint=[^"]+)"',
        await operator.page(f"/incidents/{incident}"),
    )
    of_error = await operator.page(unescape(address))
    assert of_error.count('class="c-state c-failed"') == 1
    asked = await operator.page(f"/incidents/{incident}/acknowledge")
    assert "there is no such day" in asked
    await operator.send(f"/incidents/{incident}/acknowledge", 422, note="no")
    await operator.send(f"/incidents/{incident}/acknowledge", note="the day is wrong", quiet="day")
    assert "Nothing needs you." in await operator.page("/")
    changes = await operator.page("/changes")
    assert (
        "acknowledged an incident of" in changes
        and "the day is wrong" in changes
        and "operator" in changes
    )


@pytest.mark.rest
async def test_an_acknowledgement_is_about_the_failures_that_the_page_has_shown(
    people: People,
) -> None:
    operator = people.operator

    async def fail(number: int) -> str:
        await operator.send("/tasks/report/start", **{"param-day": "never"})

        async def is_noticed() -> str:
            found = (await people.served.operations(ListIncidents())).incidents
            return found[0].id if found and found[0].count == number else ""

        return str(await until(is_noticed))

    incident = await fail(1)
    asked = re.search(
        r'name="failed_until" value="([^"]+)"',
        await operator.page(f"/incidents/{incident}/acknowledge"),
    )
    assert asked is not None
    await fail(2)
    fields = {"note": "the day is wrong", "quiet": "no", "failed_until": asked[1]}
    answer = await operator.send(f"/incidents/{incident}/acknowledge", **fields)
    page = await operator.page(answer.headers["location"])
    assert "1 run acknowledged; 1 failed since, it is still open." in page
    assert "report needs a person" in await operator.page("/")
    await operator.send(f"/incidents/{incident}/reopen")  # the button on that page
    assert "Retry all 2" in await operator.page("/")
    for wrong in ("yesterday", "2026-11-27T10:00:00"):
        await operator.send(
            f"/incidents/{incident}/acknowledge", 422, **{**fields, "failed_until": wrong}
        )


@pytest.mark.rest
async def test_tasks_that_have_failed_together_with_one_error_are_one_row_with_one_retry(
    people: People,
) -> None:
    now, names = clock.now(), [f"fleet{number}" for number in range(5)]
    ended = {
        "origin": "manual",
        "state": "failed",
        "rank": 2,
        "catch_up": False,
        "attempt": 1,
        "fence": 1,
    }
    at = {"due_at": now, "created_at": now, "finished_at": now, "noticed_at": now}
    incident = {
        "kind": "failed",
        "text": "OSError: away",
        "opened_at": now,
        "last_at": now,
        "details": {"error": "1"},
    }
    async with people.served.service.ledger.engine.begin() as connection:
        for name in names:
            run = {
                "id": new_id(),
                "task": name,
                "fingerprint": f"1:{name}",
                "reason": "OSError: away",
            }
            await connection.execute(tables.runs.insert().values(**run, **ended, **at))
            of = {"id": new_id(), "task": name, "fingerprint": f"1:{name}", "newest_run": run["id"]}
            await connection.execute(incidents.insert().values(**of, **incident))
    night = await people.operator.page("/")
    assert night.count('<p class="err">OSError: away<') == 1 and "5 tasks" in night
    assert all(f'href="/tasks/{name}"' in night for name in names)
    (address,) = re.findall(r'href="(/incidents/[0-9a-f-]{36}/retry\?same=1)"', night)
    asked = await people.operator.page(address)
    assert "Retry all 5 runs of 5 tasks?" in asked
    (preview,) = re.findall(r'name="preview" value="([^"]+)"', asked)
    await people.operator.send(address, which="all", preview=preview)
    assert "retry?same=1" not in await people.viewer.page("/")


async def _miss(people: People, slot: datetime) -> str:
    """The task `report` has existed for a while, and no service ran at this slot. Returns the
    address of Night.
    """
    since, ledger = slot - timedelta(hours=1), people.served.service.ledger
    async with ledger.engine.begin() as connection:
        for table, key, begin in (
            (tables.schedules, tables.schedules.c.task, "valid_from"),
            (tables.tasks, tables.tasks.c.name, "accounted_from"),
        ):
            await connection.execute(table.update().where(key == "report").values({begin: since}))
        await connection.execute(tally.delete())
        await connection.execute(buckets.delete())
        opened = (await schedules.open_schedules(connection))["report"]
        await missed_ranges.record(
            connection,
            [(opened, MissedRange(slot, slot, 1, "the service was down", Cause.DOWN))],
            clock.now(),
        )
    return f"/?{urlencode({'since': since.isoformat()})}"


@pytest.mark.rest
async def test_missed_slots_are_left_with_a_note_and_taken_up_again(people: People) -> None:
    operator = people.operator
    today = clock.now().replace(hour=3, minute=0, second=0, microsecond=0)
    night = await _miss(people, today - timedelta(days=1))
    html = await operator.page(night)
    assert "Left by" not in html
    (address,) = [unescape(path) for path in re.findall(r'href="(/slots/leave[^"]+)"', html)]
    asked = await operator.page(address)
    assert "Leave 1 slot as it is?" in asked and "report 1" in asked
    await operator.send(address, 422, note="no", slots="1")
    await operator.send(address, 422, note="planned maintenance")
    await operator.send(address, 409, note="planned maintenance", slots="7")
    assert (await operator.send(address, note="planned maintenance", slots="1")).headers[
        "location"
    ] == "/"
    html = await operator.page(night)
    assert "Left by operator" in html and "“planned maintenance”" in html
    assert "1 missed slot left as they are" in html
    changes = await operator.page("/changes")
    assert "missed slots of" in changes and "planned maintenance" in changes
    assert "Nothing to leave" in await operator.page(address)
    assert "/slots/" not in await people.viewer.page(night)
    (undo,) = re.findall(r'action="(/slots/reopen[^"]+)"', html)
    await operator.send(unescape(undo))
    assert "Left by" not in await operator.page(night)
    for wrong in ("", "?since=2026-01-01T00:00:00Z", "?since=1&until=2"):
        await operator.page(f"/slots/leave{wrong}", 422)


@pytest.mark.rest
async def test_missed_slots_are_backfilled_after_one_preview(people: People) -> None:
    operator, slot = (
        people.operator,
        clock.now().replace(hour=3, minute=0, second=0, microsecond=0) - timedelta(days=1),
    )
    night = await _miss(people, slot)
    ledger = people.served.service.ledger
    address = f"/backfill?{urlencode({'since': slot.isoformat(), 'until': slot.isoformat()})}"
    # It is about one task, whose page has a backfill.
    assert "/backfill?since" not in await operator.page(night)
    html = await operator.page(address)
    assert "This will create 1 run." in html and "Create 1 run</button>" in html
    assert await rows(ledger, tables.runs, task="report") == []
    previews = re.search(r'name="previews" value="([^"]+)"', html)
    assert previews is not None
    begun = [
        await operator.send("/backfill", previews=previews[1], note="the outage") for _ in range(2)
    ]
    assert len({answer.headers["location"] for answer in begun}) == 1

    async def is_made() -> str:
        page = await operator.page(begun[0].headers["location"])
        return page if "Done" in page else ""

    assert "1 of 1" in await until(is_made)
    (run,) = await rows(ledger, tables.runs, task="report")
    assert (run["slot"], run["origin"], run["requested_by"]) == (slot, "backfill", "operator")
    changes = (await people.served.operations(ListChanges(action="bulk.backfill"))).changes
    assert [(change.after["count"], change.note) for change in changes] == [(1, "the outage")]
    again = await operator.page(address)
    assert "There is nothing to backfill" in again and "1 slot that has a run" in again
    await people.viewer.page(address, 403)
    for wrong in ("/backfill", "/backfill?since=2026-01-01T00:00:00Z", "/backfill?begun=1"):
        await operator.page(wrong, 422)
    await operator.page(f"/backfill?begun={RUN}", 404)
    await operator.send("/backfill", 422, previews=",".join([RUN] * 51))
    days = {"first": "2024-01-01", "last": "2025-12-31"}
    preview = re.search(
        r'name="preview" value="([^"]+)"',
        (await operator.send("/tasks/report/backfill", 200, **days)).text,
    )
    assert preview is not None  # of more than 500 runs
    await operator.send("/backfill", 422, previews=preview[1])
    await operator.send("/backfill", previews=preview[1], number="731")


async def test_slots_to_come_are_counted_once(people: People) -> None:
    """Where none of them is of a task with a name on Night, the number in the heading is all there
    is to say.
    """
    async with people.served.service.ledger.engine.begin() as connection:
        report = tables.schedules.c.task == "report"
        await connection.execute(update(tables.schedules).where(report).values(cron="* * * * *"))
    night = await people.viewer.page("/")
    assert re.search(r"[1-9]\d* slots? until", night)
    assert "more slot" not in night


@pytest.mark.rest
async def test_a_task_is_paused_and_resumed_with_forms(people: People) -> None:
    operator = people.operator
    await operator.send("/tasks/report/pause", note="the disk is swapped")
    assert "Paused by operator" in await operator.page("/tasks/report")
    assert "report" in await operator.page("/tasks?show=paused")
    await operator.send("/tasks/report/pause", **{"for": "hour"})
    assert "report is paused until" in await operator.page("/tasks/report")
    await operator.send("/tasks/report/pause", 422, **{"for": "ever"})
    await operator.send("/tasks/report/resume")
    assert "Paused by" not in await operator.page("/tasks/report")


async def test_what_is_wrong_with_a_request_is_said_on_a_page(people: People) -> None:
    viewer = people.viewer
    for path, status, words in (
        ("/?since=yesterday", 422, "night, 24h, or an instant"),
        ("/?since=2026-01-01T00:00:00Z&until=2020-01-01T00:00:00Z", 422, "since"),
        ("/tasks/nothing", 404, "nothing"),
        (f"/runs/{RUN}", 404, RUN),
        ("/runs?state=lost", 422, "lost"),
        ("/runs?after=1", 422, "after"),
        ("/tasks/report/start", 403, "needs the role operator"),
    ):
        html = await viewer.page(path, status)
        assert words in html, html


@pytest.mark.rest
@pytest.mark.parametrize("name", ["task", "text", "state", "origin", "tag", "created_since"])
async def test_hostile_values_of_a_filter_are_refused_or_shown_as_text(
    people: People, name: str
) -> None:
    for value in (
        HOSTILE,
        "x" * 5_000,
        "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"),
    ):
        answer = await people.viewer.client.get("/runs", params={name: value})
        assert answer.status_code in (200, 422)
        assert "<script>alert" not in answer.text
        assert "\x1b" not in answer.text and "\u202e" not in answer.text


HOSTILE_TASK = f'''
from batch_system import BaseTask, get_logger

TEXT = {HOSTILE!r}

class Hostile(BaseTask):
    """Says {HOSTILE.replace(chr(0), "").replace(chr(34), "")}"""
    name, schedule = "hostile", None

    async def run(self, text: str = TEXT):
        get_logger(__name__).error(TEXT)
        raise ValueError(TEXT)
'''


@pytest.mark.rest
async def test_texts_of_authors_are_shown_and_never_executed(
    people: People, tmp_path: Path
) -> None:
    (tmp_path / "tasks" / "hostile.py").write_text(HOSTILE_TASK)
    admin, operations = people.admin, people.served.operations

    async def is_loaded() -> bool:
        return "hostile" in await admin.page("/tasks")

    await until(is_loaded)
    started = await operations(
        StartRun(name="hostile", parameters={"text": HOSTILE.replace("\x00", "")})
    )
    await until(lambda: rows(people.served.service.ledger, id=started.id, state="failed"))

    async def opened() -> list[Incident]:
        return (await operations(ListIncidents(task="hostile"))).incidents

    (found,) = await until(opened)
    incident = found.id
    await operations(AcknowledgeRun(run=started.id, note=f"note {HOSTILE.replace(chr(0), '')}"))
    for path in (
        "/",
        "/tasks",
        "/tasks/hostile",
        "/runs",
        f"/runs/{started.id}",
        "/incidents",
        f"/incidents/{incident}",
        "/changes",
        "/tasks/hostile/start",
    ):
        html = await admin.page(path)
        assert "<script>alert" not in html, path
        assert not any(char in html for char in "\x1b\u202e\x00"), path
        assert INLINE.search(html) is None, path
    answer = await admin.client.get(f"/incidents/{incident}/why.txt")
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert not any(char in answer.text for char in "\x1b\u202e\x00")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;\\x1b[31m" in await admin.page(
        f"/runs/{started.id}"
    )


async def test_signing_in_leads_back_to_the_page_and_to_no_other_site(people: People) -> None:
    secret = people.served.secrets["viewer"]
    for given, expected in (
        ("/tasks?show=paused", "/tasks?show=paused"),
        ("//evil.example", "/"),
        ("https://evil.example/", "/"),
        ("/\\evil.example", "/"),
        ("", "/"),
    ):
        answer = await people.nobody.post("/signin", data={"secret": secret, "next": given})
        assert (answer.status_code, answer.headers["location"]) == (303, expected)
    wrong = await people.nobody.post("/signin", data={"secret": "bt_wrong", "next": "/tasks"})
    assert wrong.status_code == 401
    assert (
        'role="alert"' in wrong.text
        and 'value="/tasks"' in wrong.text
        and "bt_wrong" not in wrong.text
    )


async def test_who_has_signed_out_sees_nothing_any_more(people: People) -> None:
    answer = await people.viewer.send("/you/signout")
    assert answer.headers["location"] == "/signin"
    assert (await people.viewer.client.get("/")).status_code == 303


async def test_the_zone_and_the_colours_are_kept(people: People) -> None:
    viewer = people.viewer
    answer = await viewer.client.post(
        "/preferences", data={"zone": "Asia/Kathmandu", "theme": "dark", "next": "/nodes"}
    )
    assert (answer.status_code, answer.headers["location"]) == (303, "/nodes")
    html = await viewer.page("/tasks/report")
    assert 'data-theme="dark"' in html and "Kathmandu" in html
    refused = await viewer.client.post("/preferences", data={"zone": "Nowhere/Land"})
    assert refused.status_code == 422


async def test_an_admin_makes_a_token_that_is_shown_once(people: People) -> None:
    answer = await people.admin.send("/you/tokens", 200, name="laptop", role="viewer", days="7")
    (secret,) = re.findall(r"bt_[A-Za-z0-9_-]+", answer.text)
    assert secret not in await people.admin.page("/you")
    given = {"Authorization": f"Bearer {secret}"}
    assert (await people.nobody.get("/api/v1/tasks", headers=given)).status_code == 200
    for wrong in ({"days": "0"}, {"days": "x"}, {"role": "king"}, {"name": ""}):
        await people.admin.send(
            "/you/tokens", 422, **{"name": "other", "role": "viewer", "days": "7", **wrong}
        )


async def test_sessions_and_tokens_are_listed_and_ended_by_an_admin_and_by_their_own_person(
    people: People,
) -> None:
    def ids(page: str) -> list[str]:
        return re.findall(r'name="session" value="([0-9a-f]{12})"', page)

    (own,) = ids(await people.viewer.page("/you"))
    every = ids(await people.admin.page("/you"))
    assert len(every) == 3 and own in every
    (other, *_) = [each for each in every if each != own]
    await people.viewer.send("/you/sessions/end", 404, session=other)
    await people.admin.send("/you/sessions/end", session=own)
    assert (await people.viewer.client.get("/you")).status_code == 303
    answer = await people.admin.send("/you/tokens", 200, name="laptop", role="viewer", days="7")
    (secret,) = re.findall(r"bt_[A-Za-z0-9_-]+", answer.text)
    page = await people.admin.page("/you")
    found = re.search(
        r'value="([0-9a-f]{12})"><button[^>]*aria-label="Revoke the token laptop"', page
    )
    assert found is not None
    await people.admin.send("/you/tokens/revoke", name=found[1])
    given = {"Authorization": f"Bearer {secret}"}
    assert (await people.nobody.get("/api/v1/tasks", headers=given)).status_code == 401
    changes = await people.admin.page("/changes")
    assert "ended the session of viewer" in changes and "revoked the token laptop" in changes


async def test_a_form_that_is_too_large_is_refused(people: People) -> None:
    csrf = await people.operator.csrf()
    client = people.operator.client
    large = await client.post("/tasks/report/pause", data={"csrf": csrf, "note": "x" * 70_000})
    many = await client.post(
        "/tasks/report/pause", data={"csrf": csrf, **{f"f{n}": "" for n in range(300)}}
    )
    other = await client.post("/tasks/report/pause", json={"csrf": csrf})
    assert [answer.status_code for answer in (large, many, other)] == [413, 400, 400]


async def test_without_pages_the_api_answers_alone(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard: Guard = served.service_app.guard
    monkeypatch.setattr(guard, "has_pages", False)
    for path in ("/", "/tasks", "/signin", "/live?topic=night", "/static/pages.css"):
        answer = await served.nobody.get(path)
        assert answer.status_code == 404, path
        assert answer.json()["kind"] == "not_found"
    assert (await served.nobody.post("/signin", data={"secret": "x"})).status_code == 404
    assert (await served.viewer.get("/api/v1/tasks")).status_code == 200


@pytest.mark.rest
@pytest.mark.parametrize("what", ["cancel", "retry", "acknowledge", "redrive"])
async def test_only_a_whole_id_is_asked_about(people: People, what: str) -> None:
    """A part of it, or the name of a task, may mean another run by the time at which the form is
    sent.
    """
    run = (await people.served.operations(StartRun(name="report", parameters={}))).id
    await people.operator.page(f"/runs/{run}/{what}")
    for part in (run[-8:], "report"):
        assert "it has to be whole" in await people.operator.page(f"/runs/{part}/{what}", 404)
        await people.operator.send(f"/runs/{part}/{what}", 404)


async def test_nul_and_long_notes_are_refused(people: People) -> None:
    for path in ("/tasks/%00", "/runs?text=%00", "/changes?task=a%00", "/search?q=%00"):
        assert "NUL" in await people.viewer.page(path, 422)
    await people.operator.send("/tasks/report/pause", 422, note="a\0b")
    await people.operator.send("/tasks/report/pause", 422, note="x" * 2_001)
    assert "Paused by" not in await people.viewer.page("/tasks/report")


async def test_ids_of_bulks_and_previews_are_checked(people: People) -> None:
    await people.viewer.page("/bulks/foo", 404)
    await people.operator.send("/runs/bulk/retry", 422, preview="foo")


@pytest.mark.rest
async def test_a_text_that_looks_like_json_stays_a_text(people: People) -> None:
    answer = await people.operator.send("/tasks/report/start", **{"param-day": "[urgent] x"})
    run = answer.headers["location"].rpartition("/")[2]
    assert (await read.get(people.served.operations.context, run)).params == {"day": "[urgent] x"}
    await people.operator.send("/tasks/payroll/start", 422, **{"param-month": "[" * 20_000})


async def test_only_who_held_a_token_is_told_that_it_has_expired(people: People) -> None:
    context = people.served.operations.context
    short = (await access.create_token(context, "short", "viewer", timedelta(days=1))).secret
    revoked = (await access.create_token(context, "revoked", "viewer", timedelta(days=1))).secret
    await access.revoke_token(context, "revoked")
    with clock.moved(clock.now() + timedelta(days=2)):
        for secret, says in (
            (short, "This token has expired on"),
            (revoked, "is not valid"),
            (short[:-1] + "x", "is not valid"),
        ):
            answer = await people.nobody.post("/signin", data={"secret": secret})
            assert answer.status_code == 401 and says in answer.text


@pytest.mark.rest
async def test_a_browser_gets_a_page_where_there_is_nothing_and_a_program_gets_problem_details(
    people: People,
) -> None:
    client, accept = people.nobody, {"Accept": "text/html,*/*"}
    for path in ("/nothing", "/tasks/a/b/c", "/static2/x"):
        answer = await client.get(path, headers=accept)
        assert answer.status_code == 404 and answer.headers["content-type"].startswith("text/html")
        assert (await client.get(path)).json()["kind"] == "not_found"
    assert (await client.get("/api/v1/nothing", headers=accept)).json()["kind"] == "not_found"


async def test_a_page_that_fails_by_a_mistake_of_ours_is_a_page_and_is_logged(
    people: People, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a mistake")

    monkeypatch.setattr(tasks, "shell_of", fail)
    html = await people.viewer.page("/tasks", 500)
    assert "its log has the error" in html and "a mistake" not in html
    assert "RuntimeError: a mistake" in caplog.text
