"""The page of changes: each event as a sentence, what went wrong in between, filters, and files."""

from __future__ import annotations

import csv
import io
import json
import re
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from starlette.requests import Request

from batch_system import clock
from batch_system.batch.cron.zones import zone_of
from batch_system.batch.ledger.people import audit
from batch_system.batch.ledger.people.audit import By
from batch_system.database.engine import Database
from batch_system.errors import InvalidParameters
from batch_system.operations.asking.actor import Actor
from batch_system.operations.asking.context import Loaded
from batch_system.operations.operations import Operations
from batch_system.operations.people import changes as people_changes
from batch_system.operations.people.changes import kind_of
from batch_system.operations.people.results import Change
from batch_system.pages.changes import changes
from batch_system.pages.changes.sentences import KINDS, line_of, lines_of
from batch_system.pages.frame.viewer import Viewer
from batch_system.settings.reading import get_settings
from batch_system.verbs.access import ListChanges
from batch_system.verbs.verb import all_verbs
from batch_system.words import EVENTS
from tests.pages.conftest import People, failed_run

AT = datetime(2026, 10, 24, 20, 48, tzinfo=UTC)
NOTHING: dict[str, Any] = dict.fromkeys(
    ("role", "address", "task", "run", "target", "before", "after", "note")
)


def change(action: str, minutes: float = 0, **values: Any) -> Change:
    source = values.pop("source", "page")
    actor = values.pop("actor", "mara")
    given = {**NOTHING, **values}
    at = AT + timedelta(minutes=minutes)
    return Change(id=str(minutes), at=at, actor=actor, source=source, action=action, **given)


def sentence(event: Change) -> str:
    line = line_of(event)
    words = " ".join(part for part in (line.shown, line.did, line.task) if part)
    return f"{words}{line.rest}" + (f": “{line.note}”" if line.note else "")


@pytest.mark.parametrize(
    ("event", "said"),
    [
        (change("task.pause", task="load", note="disk"), "mara paused load: “disk”"),
        (change("run.start", task="load", run="1"), "mara ran load by hand"),
        (change("incident.acknowledge", target="1"), "mara acknowledged an incident"),
        (
            change("bulk.retry", after={"count": 2_000, "request": {"task": "load"}}),
            "mara retried 2,000 runs of load",
        ),
        (change("bulk.retry", after={"count": 2, "request": {}}), "mara retried 2 runs"),
        (
            change("maintenance.pause", after={"selection": "all tasks", "from": AT.isoformat()}),
            "mara paused all tasks",
        ),
        (
            change(
                "maintenance.pause",
                after={"selection": "all tasks", "kind": "pause", "from": "2026-10-25T00:00:00"},
            ),
            "mara planned a pause of all tasks",
        ),
        (change("token.create", target="laptop"), "mara made the token laptop"),
        (
            change(
                "service.deploy",
                source="service",
                before={"application": "2.14.0"},
                after={"application": "2.14.1"},
            ),
            "2.14.1 was deployed, was 2.14.0",
        ),
        (change("moon.landing", target="Eagle"), "mara moon landing Eagle"),
        (change("bulk.retry", after="cut…"), "mara retried 0 runs"),
    ],
)
def test_an_event_is_a_sentence(event: Change, said: str) -> None:
    assert sentence(event) == said


def test_each_change_of_a_verb_has_a_sentence_and_a_kind() -> None:
    actions = {verb.doors.audit for verb in all_verbs() if verb.doors.audit is not None}
    assert len(actions) > 20
    assert {action for action in actions if not EVENTS[action].did} == set()
    assert {kind_of(action) for action in actions} <= KINDS.keys()


def test_processes_that_start_together_are_one_line_and_a_changed_schedule_names_its_deploy() -> (
    None
):
    versions = {"before": {"application": "1"}, "after": {"application": "2"}}
    crons = {"before": {"cron": "0 2 * * *"}, "after": {"cron": "0 * * * *"}}
    events = [
        change("schedule.change", 2, source="service", task="load", **crons),
        change("service.start", 1, source="service", actor="pid 2"),
        change("service.start", 0.5, source="service", actor="pid 1"),
        change("service.deploy", 0, source="service", **versions),
    ]
    lines = lines_of(events, [])
    assert [line.did + line.rest for line in lines] == [
        "load runs at the start of every hour, was at 02:00 every day, with deploy 2",
        "A service started",
        "2 was deployed, was 1",
    ]
    assert lines[0].detail == "0 * * * *, was 0 2 * * *"
    assert lines[1].detail == "pid 1, pid 2"


@pytest.mark.rest
def test_a_schedule_that_this_version_does_not_know_is_shown_as_it_was_written() -> None:
    unknown = {"before": None, "after": {"cron": "0 26 * * *", "timezone": "Mars/Base"}}
    line = line_of(change("schedule.change", task="load", **unknown))
    assert line.did == "load runs at 0 26 * * * Mars/Base, was by no schedule"


async def test_changes_are_counted_by_person_and_kind_and_no_more_than_the_newest_thousand(
    ledger: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with ledger.engine.begin() as connection:
        for number in range(6):
            by = By("ann", "api") if number % 3 else By("pid 1 on here")
            action = "run.cancel" if number % 3 else "service.start"
            await audit.record(connection, by, action, AT + timedelta(minutes=number))
    operations = Operations(ledger, ledger, lambda: Loaded({}, []), get_settings(), are_ready=True)

    async def counted(**asked: Any) -> tuple[list[tuple[str | None, str, int]], bool]:
        counts = (await operations(ListChanges(counts=True, limit=2, **asked))).counts
        assert counts is not None
        return [(each.who, each.kind, each.number) for each in counts.by], counts.has_all

    assert await counted() == ([("ann", "runs", 4), (None, "deploys", 2)], True)
    assert await counted(action="run.cancel") == ([("ann", "runs", 4)], True)
    page = await operations(ListChanges(limit=2))
    assert page.counts is None  # nobody has asked for them
    assert await counted(after=page.after) == ([(None, "deploys", 2), ("ann", "runs", 2)], True)
    monkeypatch.setattr(people_changes, "MOST_COUNTED", 3)
    assert await counted() == ([("ann", "runs", 2), (None, "deploys", 1)], False)


def text_of(html: str) -> str:
    return " ".join(re.sub("<[^>]+>", " ", html).split())


async def ask(ledger: Database, path: str, as_file: bool = False) -> Any:
    operations = Operations(ledger, ledger, lambda: Loaded({}, []), get_settings(), are_ready=True)
    actor = Actor("mara", "viewer", "page")
    address, _, query = path.partition("?")
    scope = {"type": "http", "method": "GET", "path": address, "headers": []}
    scope |= {"query_string": query.encode(), "path_params": {}, "root_path": ""}
    viewer = Viewer(
        actor,
        operations.by(actor),
        zone_of("Europe/Berlin"),
        "auto",
        "0",
        "",
        path,
        "http://localhost",
        clock.now(),
    )
    show: Any = changes.download if as_file else changes.show_changes
    return await show(Request(scope), viewer)


async def test_the_page_and_the_files_show_what_the_filter_finds(ledger: Database) -> None:
    with clock.moved(AT + timedelta(days=1)):
        async with ledger.engine.begin() as connection:
            for number, (actor, action, note) in enumerate(
                (
                    ("mara", "task.pause", "=HYPERLINK(1)"),
                    ("jonas", "run.start", None),
                    ("jonas", "run.cancel", "<b>wrong</b>"),
                )
            ):
                at = AT + timedelta(hours=number)
                by = By(actor, "page")
                await audit.record(connection, by, action, at, task="load", note=note)
        page = text_of(await ask(ledger, "/changes"))
        assert "mara paused load" in page and "&lt;b&gt;wrong" in page
        only = text_of(await ask(ledger, "/changes?who=jonas&kind=runs&from=2026-10-25"))
        assert "cancelled a run of load" in only and "paused load" not in only
        assert "batch changes --since 2026-10-25" in only
        assert "3 changes, newest first" in page and "All 3 " in page
        assert "Pauses and mutes 1 " in page and "Runs: by hand, retried, cancelled 2 " in page
        assert "Everyone 3 jonas 2 mara 1 " in page
        of_jonas = text_of(await ask(ledger, "/changes?who=jonas"))
        assert "Everyone 3 jonas 2 mara 1 " in of_jonas and "All 2 " in of_jonas
        assert "No change is like this" in text_of(await ask(ledger, "/changes?who=nobody"))
        (row, *_) = list(
            csv.DictReader(
                io.StringIO(
                    (await ask(ledger, "/changes/file?format=csv&who=mara", True)).body.decode()
                )
            )
        )
        assert (row["action"], row["note"]) == ("task.pause", "'=HYPERLINK(1)")
        listed = json.loads((await ask(ledger, "/changes/file?kind=runs", True)).body)
        assert [each["action"] for each in listed] == ["run.cancel", "run.start"]
        for wrong in ("from=yesterday", "kind=moon", f"task={'a' * 101}"):
            with pytest.raises(InvalidParameters):
                await ask(ledger, f"/changes?{wrong}")


async def test_a_change_says_what_has_become_of_it_and_what_can_be_done_about_it(
    people: People,
) -> None:
    run = await failed_run(people.operator)
    await people.operator.send("/tasks/report/pause", note="the disk is full")
    html = await people.operator.page("/changes")
    assert re.search(
        r"operator paused report : the disk is full It is still paused. Resume…", text_of(html)
    )
    assert re.search(
        r"operator ran report by hand It failed after [\d.]+ m?s. Show the run", text_of(html)
    )
    assert 'href="/tasks/report/resume"' in html and f'href="/runs/{run}"' in html
    of_viewer = await people.viewer.page("/changes")
    assert "It is still paused." in of_viewer and "/resume" not in of_viewer
    assert "still paused" not in await people.operator.page("/changes?action=task.pause")
    await people.operator.send("/tasks/report/resume")
    assert "still paused" not in await people.operator.page("/changes")
