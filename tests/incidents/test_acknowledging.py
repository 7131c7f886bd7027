"""Failed runs that people acknowledge: one at a time, and all that match a filter."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from batch_system import clock
from batch_system.batch.ledger.incidents.tables import fingerprints, outbox
from batch_system.batch.ledger.states import RunState
from batch_system.config import Settings, get_settings
from batch_system.database.engine import Database
from batch_system.errors import InvalidParameters, WrongState
from batch_system.operations.asking.actor import Actor
from batch_system.operations.asking.context import Loaded
from batch_system.operations.asking.filter import RunFilter
from batch_system.operations.bulks.bulk import carry_out
from batch_system.operations.operations import Operations
from batch_system.verbs.access import ListChanges
from batch_system.verbs.bulks import BeginBulk, PreviewBulk, ShowBulk, UndoBulk
from batch_system.verbs.incidents import AcknowledgeIncident, ListIncidents, ReopenIncident
from batch_system.verbs.run_changes import AcknowledgeRun
from tests.batch.ledger_world import know, make_task, rows
from tests.incidents.watching import Watching, ended, failed, retried, started, succeeded, watching

START = datetime(2026, 3, 10, 2, 0, 0, tzinfo=UTC)
HOUR = timedelta(hours=1)
NOTE = "the bank is down until noon"


@pytest.fixture
async def watch(ledger: Database) -> AsyncIterator[Watching]:
    with clock.moved(START):
        await know(ledger, make_task("load", None), make_task("other", None))
        async with watching(ledger, ledger) as node:
            yield node


@pytest.fixture
def ann(ledger: Database) -> Operations:
    operations = Operations(ledger, ledger, lambda: Loaded({}, []), get_settings(), are_ready=True)
    return operations.by(Actor("ann"))


async def acknowledged(ledger: Database) -> dict[str, str | None]:
    return {row["id"]: row["acknowledged"] for row in await rows(ledger)}


async def the_incident(watch: Watching) -> dict[str, Any]:
    (incident,) = await watch.incidents()
    return incident


async def test_an_incident_is_closed_with_the_last_of_its_runs(
    ledger: Database, watch: Watching, ann: Operations
) -> None:
    first, second = await failed(ledger, "load", START), await failed(ledger, "load", START + HOUR)
    await watch.turn()
    now = await ann(AcknowledgeRun(run=first, note=NOTE))
    await watch.turn()
    incident = await the_incident(watch)
    assert (now.id, now.state, now.acknowledged, incident["closed_at"]) == (
        first,
        "failed",
        incident["id"],
        None,
    )
    await ann(AcknowledgeRun(run=second, note=NOTE))
    incident = await the_incident(watch)
    assert (incident["closed_why"], incident["acknowledged_by"], incident["note"]) == (
        "acknowledged",
        "ann",
        NOTE,
    )
    events = (await ann(ListChanges(action="run.acknowledge"))).changes
    assert {(event.actor, event.task, event.run, event.note) for event in events} == {
        ("ann", "load", run, NOTE) for run in (first, second)
    }


async def test_reopening_an_incident_undoes_the_acknowledgements_of_its_runs(
    ledger: Database, watch: Watching, ann: Operations
) -> None:
    runs = [await failed(ledger, "load", START), await failed(ledger, "load", START + HOUR)]
    await watch.turn()
    await ann(AcknowledgeRun(run=runs[0], note=NOTE))
    incident = (await the_incident(watch))["id"]
    assert (await ann(ReopenIncident(incident=incident))).closed_at is None
    assert await acknowledged(ledger) == dict.fromkeys(runs)
    for run in runs:
        await ann(AcknowledgeRun(run=run, note=NOTE))
    reopened = await ann(ReopenIncident(incident=incident))
    assert (reopened.closed_at, reopened.acknowledged_by) == (None, None)
    assert await acknowledged(ledger) == dict.fromkeys(runs)


async def test_a_failure_that_nobody_has_noticed_yet_opens_no_incident(
    ledger: Database, watch: Watching, ann: Operations
) -> None:
    await ann(AcknowledgeRun(run=await failed(ledger, "load", START), note=NOTE))
    await watch.turn(2)
    assert (await watch.incidents(), await watch.notes()) == ([], [])
    assert [row["fingerprint"] for row in await rows(ledger, fingerprints)] == ["1:boom"]


async def test_a_run_that_failed_after_the_person_had_looked_stays_open(
    ledger: Database, watch: Watching, ann: Operations
) -> None:
    seen = await failed(ledger, "load", START)
    await watch.turn()
    (asked,) = (await ann(ListIncidents())).incidents
    watch.later(1)
    since = await failed(ledger, "load", START + HOUR)
    done = await ann(AcknowledgeIncident(incident=asked.id, note=NOTE, failed_until=asked.last_at))
    assert (done.runs, done.still_open, done.incident.closed_at) == (1, 1, None)
    assert await acknowledged(ledger) == {seen: asked.id, since: None}
    await watch.turn(2)
    (now,) = (await ann(ListIncidents())).incidents
    assert (now.id, now.last_at) == (asked.id, START + timedelta(seconds=1))
    done = await ann(AcknowledgeIncident(incident=asked.id, note=NOTE, failed_until=now.last_at))
    assert (done.runs, done.still_open, done.incident.closed_why) == (1, 0, "acknowledged")
    changes = (await ann(ListChanges(action="incident.acknowledge"))).changes
    assert [change.after["runs"] for change in changes] == [1, 1]


async def test_staying_quiet_includes_a_run_that_failed_after_the_person_had_looked(
    ledger: Database, watch: Watching, ann: Operations
) -> None:
    await failed(ledger, "load", START)
    await watch.turn()
    (asked,) = (await ann(ListIncidents())).incidents
    watch.later(1)
    await failed(ledger, "load", START + HOUR)
    done = await ann(
        AcknowledgeIncident(
            incident=asked.id, note=NOTE, quiet_until=clock.now() + HOUR, failed_until=asked.last_at
        )
    )
    assert (done.runs, done.still_open, done.incident.closed_why) == (2, 0, "acknowledged")


async def test_a_failure_that_is_written_late_does_not_move_the_last_one_back(
    ledger: Database, watch: Watching, ann: Operations
) -> None:
    """Otherwise nobody could acknowledge the last one."""
    late = await started(ledger, "load", START)
    watch.later(10)
    await failed(ledger, "load", START + HOUR)
    await watch.turn()
    with clock.moved(START):
        await ended(ledger, late)
    await watch.turn()
    (asked,) = (await ann(ListIncidents())).incidents
    assert (asked.count, asked.last_at) == (2, START + timedelta(seconds=10))
    assert (
        await ann(AcknowledgeIncident(incident=asked.id, note=NOTE, failed_until=asked.last_at))
    ).still_open == 0


async def test_an_acknowledged_run_that_is_retried_and_fails_is_open_again(
    ledger: Database, watch: Watching, ann: Operations
) -> None:
    run = await failed(ledger, "load", START)
    await watch.turn()
    await ann(AcknowledgeRun(run=run, note=NOTE))
    await retried(ledger, run, RunState.FAILED)
    await watch.turn()
    assert await acknowledged(ledger) == {run: None}
    assert len(await watch.incidents(closed_at=None)) == 1


async def test_only_a_failed_run_that_is_open_can_be_acknowledged(
    ledger: Database, watch: Watching, ann: Operations
) -> None:
    good, running = await succeeded(ledger, "load"), (await started(ledger, "load")).id
    known = await failed(ledger, "load", START)
    await ann(AcknowledgeRun(run=known, note=NOTE))
    for run in (good, running, known):
        with pytest.raises(WrongState, match=f"the run {run} can't be acknowledged"):
            await ann(AcknowledgeRun(run=run, note=NOTE))


async def test_programs_are_told_what_a_person_has_closed_and_people_are_not(
    ledger: Database, watch: Watching, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATCH_ALERT_WEBHOOK", "http://127.0.0.1:1/hook")
    monkeypatch.setenv("BATCH_ALERT_URLS", "mailto://127.0.0.1?to=oncall@example.com")
    settings = Settings(_env_file=None)
    ann = Operations(ledger, ledger, lambda: Loaded({}, []), settings, are_ready=True).by(
        Actor("ann")
    )
    run = await failed(ledger, "load", START)
    await watch.turn()
    await ann(AcknowledgeRun(run=run, note=NOTE))
    await ann(ReopenIncident(incident=(await the_incident(watch))["id"]))
    watch.later(1)
    await ann(AcknowledgeIncident(incident=(await the_incident(watch))["id"], note=NOTE))
    told = [
        (row["channel"], row["kind"], row["content"]["why"]) for row in await rows(ledger, outbox)
    ]
    closed = ("webhook", "closed", "acknowledged")
    assert told == [("all", "opened", None), closed, ("webhook", "repeated", None), closed]


@pytest.mark.parametrize("note", ["", "ok", "  ok  ", "x" * 501])
async def test_a_note_is_needed(
    ledger: Database, watch: Watching, ann: Operations, note: str
) -> None:
    run = await failed(ledger, "load", START)
    with pytest.raises(InvalidParameters, match="3 to 500 characters"):
        await ann(AcknowledgeRun(run=run, note=note))
    preview = await ann(PreviewBulk(action="acknowledge", filter=RunFilter(task="load")))
    with pytest.raises(InvalidParameters, match="3 to 500 characters"):
        await ann(BeginBulk(preview=preview.id, note=note))


async def test_a_bulk_acknowledges_the_failed_runs_that_match(
    ledger: Database, watch: Watching, ann: Operations
) -> None:
    theirs = [
        await failed(ledger, "load", START + HOUR * hour, fingerprint=f"1:{hour % 2}")
        for hour in range(4)
    ]
    other, good = await failed(ledger, "other", START), await succeeded(ledger, "third")
    await watch.turn()
    preview = await ann(PreviewBulk(action="acknowledge", filter=RunFilter(task="load")))
    assert preview.count == 4
    later = await failed(ledger, "load", START + HOUR * 5, fingerprint="1:0")
    await watch.turn()
    await ann(BeginBulk(preview=preview.id, note=NOTE))
    await carry_out(ann.context, preview.id)
    bulk = await ann(ShowBulk(preview=preview.id))
    assert (bulk.changed, bulk.note, bulk.finished_at is not None) == (4, NOTE, True)
    marked = await acknowledged(ledger)
    assert all(marked[run] for run in theirs) and not any(
        marked[run] for run in (other, good, later)
    )
    states = {
        (row["task"], row["fingerprint"]): row["closed_why"] for row in await watch.incidents()
    }
    assert states == {
        ("load", "1:1"): "acknowledged",
        ("load", "1:0"): None,
        ("other", "1:boom"): None,
    }
    undo = await ann(UndoBulk(preview=preview.id))
    assert (undo.action, undo.count, undo.tasks) == ("reopen", 4, {"load": 4})
    await ann(BeginBulk(preview=undo.id))
    await carry_out(ann.context, undo.id)
    assert (await ann(ShowBulk(preview=undo.id))).changed == 4
    assert not any((await acknowledged(ledger)).values())
    assert all(row["closed_why"] is None for row in await watch.incidents())
    assert (await ann(UndoBulk(preview=preview.id))).count == 0
    with pytest.raises(InvalidParameters, match="reopen can't be undone"):
        await ann(UndoBulk(preview=undo.id))
