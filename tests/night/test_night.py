"""What Night says: the verdict, what needs a person, what is late, and what did not
run and why.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
from sqlalchemy import insert, update

from batch_system import clock
from batch_system.batch.firing import pauses
from batch_system.batch.ledger import nodes, runs, tables
from batch_system.batch.ledger.incidents.tables import incidents
from batch_system.batch.ledger.people import audit
from batch_system.batch.ledger.people.audit import By
from batch_system.batch.ledger.runs import NewRun
from batch_system.batch.ledger.states import RunState
from batch_system.batch.ledger.tables import new_id
from batch_system.config import get_settings
from batch_system.database.engine import Database
from batch_system.errors import InvalidParameters, InvalidSchedule
from batch_system.operations.asking.actor import Actor
from batch_system.operations.asking.context import Loaded
from batch_system.operations.asking.filter import RunFilter
from batch_system.operations.bulks import bulk, retrying
from batch_system.operations.night import page
from batch_system.operations.night.night import night as night_of
from batch_system.operations.night.results import Night, RetryProgress
from batch_system.operations.operations import Operations
from batch_system.operations.system.nodes import living
from batch_system.operations.tasks import overview
from batch_system.verbs.bulks import BeginBulk, PreviewBulk, ShowBulk
from batch_system.verbs.incidents import AcknowledgeIncident, ListIncidents, ReopenIncident
from batch_system.verbs.night import ShowNight
from batch_system.verbs.run_changes import CancelRun
from batch_system.verbs.runs import ShowBlocker
from tests.batch.ledger_world import fire, know, make_task, rows
from tests.incidents.test_conditions import checked
from tests.incidents.watching import (
    Watching,
    claimed_and_ended,
    ended,
    failed,
    retried,
    started,
    succeeded,
)
from tests.night.conftest import START

MINUTE = timedelta(minutes=1)


@pytest.fixture
def operations(ledger: Database) -> Operations:
    return Operations(ledger, ledger, lambda: Loaded({}, []), get_settings(), are_ready=True)


async def beat(watch: Watching) -> None:
    """The node of the watch lives now, and has all tasks."""
    async with watch.ledger.engine.begin() as connection:
        names = (
            [row["name"] for row in await rows(watch.ledger, tables.tasks)]
            if watch.ledger.kind != "sqlite"
            else []
        )
        mine = update(tables.nodes).where(tables.nodes.c.id == watch.node)
        await connection.execute(mine.values(seen_at=clock.now(), tasks=names or ["load", "tick"]))


async def night(watch: Watching, operations: Operations, **window: datetime) -> Night:
    watch.later(1)  # the window ends before the present instant
    await beat(watch)
    answer = await night_of(operations.context, **window)
    classes = answer.slots.model_dump(exclude={"due", "recounted_until"})
    assert answer.slots.due == sum(classes.values())
    not_run = answer.slots.missed + answer.slots.paused + answer.slots.skipped
    assert sum(each.slots for each in answer.did_not_run) == not_run
    return answer


async def test_a_calm_night(ledger: Database, watch: Watching, operations: Operations) -> None:
    loaded = await know(ledger, make_task("tick", "*/10 * * * *"))
    for _ in range(3):
        watch.later(600)
        await fire(ledger, loaded, clock.now())
        async with ledger.engine.begin() as connection:
            done = update(tables.runs).where(tables.runs.c.state == "queued")
            await connection.execute(done.values(state="succeeded", finished_at=clock.now()))
    answer = await night(watch, operations)
    assert (answer.level, answer.headline) == ("calm", "Nothing needs you.")
    assert answer.sentence == "3 slots were due since 18:00 yesterday: 3 succeeded, 0 unaccounted."


async def test_a_failed_run_needs_a_person_until_it_is_made_good(
    ledger: Database, watch: Watching, operations: Operations
) -> None:
    await know(
        ledger, make_task("load", None, owner="payments", runbook="https://wiki.example/load")
    )
    run = await failed(ledger, "load")
    await watch.turn(2)
    answer = await night(watch, operations)
    assert (answer.level, answer.headline) == ("bad", "load needs a person")
    (need,) = answer.needs
    assert (need.task, need.open, need.error, need.owner) == (
        "load",
        1,
        "ValueError: boom",
        "payments",
    )
    assert (need.newest_run, need.failing_since, need.first_seen) == (run, START, START)
    assert (answer.beside.runs, answer.beside.failed) == (1, 1)
    watch.later(60)
    await retried(ledger, run, RunState.SUCCEEDED, fingerprint=None)
    await watch.turn(2)
    answer = await night(watch, operations)
    assert (answer.level, answer.needs) == ("calm", [])
    (dealt,) = answer.dealt_with
    assert (dealt.task, dealt.how, dealt.runs, dealt.by) == ("load", "made_good", 1, "ann")


async def test_a_failure_that_the_next_slot_makes_good_is_shown_as_dealt_with_by_nobody(
    ledger: Database, watch: Watching, operations: Operations
) -> None:
    await know(ledger, make_task("load"))
    await failed(ledger, "load", START)
    await watch.turn(2)
    watch.later(60)
    await succeeded(ledger, "load", START + MINUTE)
    await watch.turn(2)
    (dealt,) = (await night(watch, operations)).dealt_with
    assert (dealt.how, dealt.by) == ("made_good", None)


@pytest.mark.parametrize("actions", [["service.deploy", "service.start"], ["service.start"], []])
async def test_a_row_says_what_changed_between_the_last_success_and_the_first_failure(
    ledger: Database, watch: Watching, operations: Operations, actions: list[str]
) -> None:
    await know(ledger, make_task("load", None))
    by = By("pid 1", "service", None, "here")
    async with ledger.engine.begin() as connection:  # what was before the success does not count
        await audit.record(connection, by, "settings.change", clock.now())
    watch.later(60)
    await succeeded(ledger, "load")
    watch.later(60)
    for action in actions:
        async with ledger.engine.begin() as connection:
            await audit.record(connection, by, action, clock.now(), after={"application": "2.14.1"})
        watch.later(5)
    watch.later(60)
    await failed(ledger, "load")
    await watch.turn(2)
    (need,) = (await night(watch, operations)).needs
    if not actions:
        assert need.after is None
        return
    assert need.after is not None
    assert (need.after.kind, need.after.seconds) == (actions[0], 60 + 5 * len(actions))
    assert need.after.version == ("2.14.1" if actions[0] == "service.deploy" else None)


async def test_a_lane_has_the_failure_of_a_run_that_was_retried(
    ledger: Database, watch: Watching, operations: Operations
) -> None:
    await know(ledger, make_task("load"))
    run = await failed(ledger, "load", START)
    await watch.turn(2)
    watch.later(600)
    await retried(ledger, run, RunState.SUCCEEDED, fingerprint=None)
    await watch.turn(2)
    watch.later(1)
    (lane,) = (await page.night_page(operations.context, None, None, "UTC")).lanes.lanes
    assert [(each.id, each.state, each.slot) for each in lane.runs] == [
        (run, "failed", None),
        (run, "succeeded", START),
    ]
    first, second = lane.runs
    assert first.end is not None and second.begin is not None and first.end <= second.begin


async def test_while_a_retry_goes_on_the_row_stays(
    ledger: Database, watch: Watching, operations: Operations
) -> None:
    await know(ledger, make_task("load", None))
    run = await failed(ledger, "load")
    await watch.turn(2)
    async with ledger.engine.begin() as connection:
        reopening = update(tables.runs).where(tables.runs.c.id == run)
        await connection.execute(reopening.values(state="queued", finished_at=None))
    (need,) = (await night(watch, operations)).needs
    assert (need.open, need.retrying, need.failing_since) == (0, 1, START)


async def test_a_row_says_how_far_the_retry_of_its_runs_is(
    ledger: Database, watch: Watching, operations: Operations
) -> None:
    await know(ledger, make_task("load", None))
    failures = [await failed(ledger, "load") for _ in range(5)]
    await watch.turn(2)
    (incident,) = (await operations(ListIncidents())).incidents
    plan = await retrying.plan_retry(operations.context, incident.id)
    watch.later(60)
    later = await failed(ledger, "load")  # it is not one of those that are retried
    await watch.turn(2)
    await bulk.begin(operations.context, plan.preview.id, "bulk")

    async def progress() -> RetryProgress | None:
        (need,) = (await night(watch, operations)).needs
        return need.progress

    assert await progress() is None
    await bulk.carry_out(operations.context, plan.preview.id)
    assert await progress() == RetryProgress(total=5, done=0, failed=0, left=5)
    good, bad, other_error, cancelled, _ = failures
    for run, state, outcome in (
        (good, RunState.SUCCEEDED, {"fingerprint": None}),
        (bad, RunState.FAILED, {}),
        (other_error, RunState.FAILED, {"fingerprint": "1:other"}),
    ):
        await claimed_and_ended(ledger, run, state, **outcome)
    await operations(CancelRun(run=cancelled))
    await watch.turn(2)
    need = next(
        each for each in (await night(watch, operations)).needs if each.fingerprint == "1:boom"
    )
    assert need.progress == RetryProgress(total=5, done=1, failed=2, left=1)
    assert (need.retrying, need.newest_run) == (1, bad)
    assert later not in failures
    watch.later(2 * 86_400)
    need = next(
        each for each in (await night_of(operations.context)).needs if each.fingerprint == "1:boom"
    )
    assert need.progress is None  # the preview is no longer kept


async def test_an_acknowledged_failure_needs_nobody(
    ledger: Database, watch: Watching, operations: Operations
) -> None:
    await know(ledger, make_task("load", None))
    await failed(ledger, "load")
    await watch.turn(2)
    (incident,) = (await operations(ListIncidents())).incidents
    await operations.by(Actor("ann"))(
        AcknowledgeIncident(incident=incident.id, note="the bank is down")
    )
    answer = await night(watch, operations)
    assert answer.level == "calm"
    assert [(each.how, each.by, each.note) for each in answer.dealt_with] == [
        ("acknowledged", "ann", "the bank is down")
    ]
    assert [change.kind for change in answer.changes] == ["incident.acknowledge"]
    await operations(ReopenIncident(incident=incident.id))
    assert (await night(watch, operations)).level == "bad"


async def test_tasks_that_need_attention_are_those_that_the_night_lists(
    ledger: Database, watch: Watching, operations: Operations
) -> None:
    silent = make_task("silent", expect_every=timedelta(hours=1))
    await know(
        ledger,
        silent,
        *(make_task(name, None) for name in ("load", "dealt_with", "made_good", "tick")),
    )
    for name in ("tick", "silent"):
        await succeeded(ledger, name, START)
    for name in ("load", "dealt_with"):
        await failed(ledger, name)
    run = await failed(ledger, "made_good")
    await retried(ledger, run, RunState.SUCCEEDED, fingerprint=None)
    await checked(watch, 7_201)
    incidents = {each.task: each.id for each in (await operations(ListIncidents())).incidents}
    await operations.by(Actor("ann"))(
        AcknowledgeIncident(incident=incidents["dealt_with"], note="known")
    )
    found = {need.task for need in (await night(watch, operations)).needs if need.task}
    assert found == {"load", "silent"}
    everything = await overview.overview(operations.context, "all")
    assert {row.task.name for row in everything.rows if row.needs_attention} == found
    assert {
        row.task.name for row in (await overview.overview(operations.context, "attention")).rows
    } == found
    assert everything.shares["attention"] == len(found)


async def test_what_waits_says_what_it_waits_for(
    ledger: Database, watch: Watching, operations: Operations
) -> None:
    await know(ledger, make_task("load"))
    running = await started(ledger, "load", START)
    waiting = NewRun.scheduled(
        "load", START + MINUTE, clock.now(), catch_up=False, exclusive="load", priority=0
    )
    async with ledger.engine.begin() as connection:
        await runs.insert(connection, [waiting])
    watch.later(90)
    answer = await night(watch, operations)
    assert answer.level == "watch"
    (late,) = answer.late
    assert (late.run, late.why, late.elapsed) == (waiting.id, "waits", 91)
    assert late.blocker is not None
    assert (late.blocker.kind, late.blocker.run) == ("run", running.id)
    await ended(ledger, running, RunState.SUCCEEDED, fingerprint=None)


async def test_a_waiting_run_says_what_holds_it(
    ledger: Database, watch: Watching, operations: Operations
) -> None:
    await know(ledger, make_task("load"), make_task("tick"))
    await beat(watch)

    async def queued(task: str, **values: str | None) -> str:
        run = NewRun.queued(task, None, clock.now(), exclusive=values.get("exclusive"), priority=0)
        async with ledger.engine.begin() as connection:
            await runs.insert(connection, [run])
        return run.id

    async def blocker(run: str) -> tuple[str, str | None, str | None] | None:
        found = (await operations(ShowBlocker(run=run))).blocker
        return None if found is None else (found.kind, found.by, found.run)

    running = await started(ledger, "load", START)
    behind, beside = await queued("load", exclusive="load"), await queued("tick")
    assert await blocker(behind) == ("run", None, running.id)
    assert await blocker(beside) is None  # it starts with the next poll
    watch.later(20)
    await beat(watch)
    assert await blocker(beside) == ("room", None, running.id)
    async with ledger.engine.begin() as connection:
        await pauses.pause(connection, "tick", "mara", {}, watch.node)
    assert await blocker(beside) == ("paused", "mara", None)
    assert await blocker(await queued("unknown")) == ("unserved", None, None)
    await ended(ledger, running, RunState.SUCCEEDED, fingerprint=None)
    assert await blocker(running.id) is None


async def test_an_error_names_the_other_tasks_that_have_it(
    ledger: Database, watch: Watching, operations: Operations
) -> None:
    await know(ledger, *(make_task(name, None) for name in ("load", "tick", "sync")))
    for task, fingerprint in (("load", "1:boom"), ("tick", "1:boom"), ("sync", "1:other")):
        await failed(ledger, task, fingerprint=fingerprint)
    await watch.turn(2)
    needs = (await night(watch, operations)).needs
    assert {need.task: list(need.also_in) for need in needs} == {
        "load": ["tick"],
        "tick": ["load"],
        "sync": [],
    }


async def test_a_slot_that_a_run_by_hand_has_made_good_stays_failed_and_is_shown_as_made_good(
    ledger: Database, watch: Watching, operations: Operations
) -> None:
    loaded = await know(ledger, make_task("load", each_slot_counts=True))
    watch.later(60)
    await fire(ledger, loaded, clock.now())
    slots = [row["slot"] for row in await rows(ledger)]
    for row in await rows(ledger):
        async with ledger.engine.begin() as connection:
            await connection.execute(
                update(tables.runs)
                .where(tables.runs.c.id == row["id"])
                .values(
                    state="failed",
                    fingerprint="1:boom",
                    reason="boom",
                    finished_at=clock.now(),
                    exclusive=None,
                )
            )
    await watch.turn(2)
    by_hand = NewRun.queued("load", slots[0], clock.now(), exclusive=None, priority=0)
    by_hand.start(watch.node, clock.now())
    async with ledger.engine.begin() as connection:
        await runs.insert(connection, [by_hand])
    watch.later(1)
    await ended(ledger, by_hand, RunState.SUCCEEDED, fingerprint=None)
    watch.later(10)
    await watch.turn(2)
    answer = await night(watch, operations)
    assert answer.slots.failed == len(slots)
    assert (answer.failed.made_good_since, answer.failed.made_good_by_hand) == (1, 1)
    assert answer.failed.open == len(slots) - 1


async def test_what_people_did_to_many_runs_is_a_change(
    ledger: Database, watch: Watching, operations: Operations
) -> None:
    await know(ledger, make_task("load", None))
    await failed(ledger, "load")
    preview = await operations(PreviewBulk(action="retry", filter=RunFilter(task="load")))
    await bulk.begin(operations.context, preview.id, "bulk")
    assert [change.kind for change in (await night(watch, operations)).changes] == ["bulk.retry"]


async def test_slots_that_did_not_run_are_shown_by_their_cause(
    ledger: Database, watch: Watching, operations: Operations
) -> None:
    loaded = await know(
        ledger, make_task("tick", "* * * * *", missed="skip"), make_task("load", "* * * * *")
    )
    async with ledger.engine.begin() as connection:
        await pauses.pause(connection, "load", "mara", loaded)
    watch.later(600)
    await fire(ledger, loaded, clock.now())
    await watch.turn(2)
    answer = await night(watch, operations)
    causes = {(each.cause, each.task): (each.slots, each.by) for each in answer.did_not_run}
    assert causes == {("down", "tick"): (9, None), ("paused", "load"): (10, "mara")}
    assert answer.slots.missed == 9 and answer.slots.paused == 10


async def test_slots_that_a_slow_task_has_skipped_are_one_row_whichever_runs_were_in_the_way(
    ledger: Database, watch: Watching, operations: Operations
) -> None:
    loaded = await know(ledger, make_task("tick", "*/10 * * * *"))
    for _ in range(2):
        # The second slot is skipped, because the run of the first one has not begun.
        for _ in range(2):
            watch.later(600)
            await fire(ledger, loaded, clock.now())
        async with ledger.engine.begin() as connection:
            done = update(tables.runs).where(tables.runs.c.state == "queued")
            await connection.execute(done.values(state="succeeded", finished_at=clock.now()))
    (row,) = (await night(watch, operations)).did_not_run
    assert (row.cause, row.task, row.slots, row.run) == ("overlap", "tick", 2, None)
    assert row.reason == "a run of an earlier slot was still queued"


async def test_an_unaccounted_slot_is_an_alarm(
    ledger: Database, watch: Watching, operations: Operations
) -> None:
    await know(ledger, make_task("tick", "* * * * *"))
    watch.later(300)
    answer = await night(watch, operations)
    assert (answer.level, answer.headline) == ("alarm", "4 slots are unaccounted for")


async def test_a_night_without_a_service_is_an_alarm(
    ledger: Database, watch: Watching, operations: Operations
) -> None:
    await beat(watch)
    clock.advance(timedelta(hours=1))
    answer = await night_of(operations.context)
    assert (answer.level, answer.headline) == (
        "alarm",
        "No service runs since 2026-03-10 02:00 UTC",
    )


async def test_what_a_node_reports_as_wrong_comes_first_and_once(
    ledger: Database, watch: Watching, operations: Operations
) -> None:
    away = {"application": "the database does not answer", "clock": "the clock was ahead"}
    async with ledger.engine.begin() as connection:
        row = {
            "host": "far",
            "pid": 7,
            "version": "1",
            "draining": False,
            "fires": True,
            "broken": [],
            "pools": [],
        }
        row |= {"started_at": clock.now(), "seen_at": clock.now(), "tasks": []}
        for pid in (7, 8):
            await nodes.register(connection, {**row, "pid": pid, "id": new_id(), "troubles": away})
    answer = await night(watch, operations)
    said = "Process 7 on far and 1 more: application: the database does not answer"
    assert (answer.level, answer.headline, len(answer.needs)) == ("alarm", said, 1)
    assert (
        answer.needs[0].error
        == "application: the database does not answer; clock: the clock was ahead"
    )
    async with ledger.engine.begin() as connection:
        about = {
            "kind": "clock",
            "task": "",
            "subject": "far",
            "fingerprint": "",
            "text": "the clock was ahead",
        }
        await connection.execute(
            insert(incidents).values(**about, id=new_id(), opened_at=START, last_at=START)
        )
    answer = await night(watch, operations)
    assert [need.kind for need in answer.needs] == ["readiness", "clock"]
    assert (answer.headline, answer.needs[0].error) == (
        said,
        "application: the database does not answer",
    )
    (beyond,) = [node for node in await living(operations.context) if node.pid == 8]
    assert beyond.troubles == away, "the node itself says all"
    until = clock.now() - MINUTE
    assert (await night_of(operations.context, until=until)).needs[0].kind != "readiness", (
        "of a window that is over"
    )


async def test_an_invalid_window_is_refused(watch: Watching, operations: Operations) -> None:
    with pytest.raises(InvalidParameters, match="31 days"):
        await night_of(operations.context, START - timedelta(days=40))
    with pytest.raises(InvalidParameters, match="before the end"):
        await night_of(operations.context, START + timedelta(days=1))
    far = timezone(timedelta(hours=14))
    for since, until in (
        (datetime.min.replace(tzinfo=far), None),
        (None, datetime.min.replace(tzinfo=UTC)),
    ):
        with pytest.raises(InvalidParameters, match="ten years"):
            await night_of(operations.context, since, until)
    with pytest.raises(InvalidParameters, match="before the end"):
        await night_of(
            operations.context, datetime.max.replace(tzinfo=timezone(-timedelta(hours=14)))
        )
    assert await night_of(
        operations.context, until=datetime.max.replace(tzinfo=UTC)
    ) == await night_of(operations.context)
    with pytest.raises(InvalidSchedule):
        await night_of(operations.context, zone="Mars/Base")


async def test_the_default_begins_at_six_in_the_evening_of_the_zone(
    watch: Watching, operations: Operations
) -> None:
    answer = await night_of(operations.context, zone="Asia/Tokyo")
    assert answer.since == datetime(2026, 3, 9, 9, 0, tzinfo=UTC)


async def test_a_viewer_does_not_learn_an_error_of_a_secret_task_from_another_task_or_from_a_bulk(
    ledger: Database, watch: Watching, operations: Operations
) -> None:
    await know(ledger, make_task("load", None, tags=("secret",)), make_task("plain", None))
    await failed(ledger, "load")
    await failed(ledger, "plain")
    await watch.turn(2)
    preview = await operations(PreviewBulk(action="acknowledge", filter=RunFilter(task="load")))
    await operations(BeginBulk(preview=preview.id, note="the amount 4711 was wrong"))
    clock.advance(timedelta(seconds=1))
    viewer = operations.by(Actor("vera", role="viewer"))
    answer = await viewer(ShowNight())
    need, plain = sorted(answer.needs, key=lambda each: each.task or "")
    assert (need.error, need.last_line, need.fingerprint) == ("", None, None)
    assert need.also_in == () and plain.also_in == (), (
        "an error that a hidden task has too would tell what it is"
    )
    (incident,) = [
        each for each in (await viewer(ListIncidents(state="all"))).incidents if each.task == "load"
    ]
    assert (incident.text, incident.fingerprint, incident.note) == ("", None, None)
    (bulk,) = [change for change in answer.changes if change.kind == "bulk.acknowledge"]
    assert (bulk.note, bulk.after) == (None, None)
    assert (await viewer(ShowBulk(preview=preview.id))).note is None
    assert (await operations(ShowBulk(preview=preview.id))).note == "the amount 4711 was wrong"


async def test_a_viewer_does_not_see_what_runs_of_a_secret_task_have_said(
    ledger: Database, watch: Watching, operations: Operations
) -> None:
    await know(ledger, make_task("load", None, tags=("secret",)))
    await failed(ledger, "load")
    await watch.turn(2)
    viewer = operations.by(Actor("vera", role="viewer"))
    (need,) = (await viewer(ShowNight())).needs
    assert (need.error, need.last_line) == ("", None)
    assert [text for _, _, text in await watch.notes()] == [
        "what its runs say is not sent, because the task has the tag secret"
    ]
    await succeeded(ledger, "load")
