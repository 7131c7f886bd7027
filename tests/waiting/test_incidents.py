"""One incident, not two: a failed run says what it keeps back, and the runs that it has closed open
no incident of their own.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest

from batch_system import After, Alerts, clock
from batch_system.alerts.messages import message_of
from batch_system.batch.ledger.incidents.tables import outbox
from batch_system.batch.ledger.states import RunState
from batch_system.batch.queue.retry import retry
from batch_system.config import get_settings
from batch_system.operations.asking.context import Loaded
from batch_system.operations.night.night import night as night_of
from batch_system.operations.night.results import Need, Night
from batch_system.operations.operations import Operations
from batch_system.verbs.incidents import ShowIncident
from tests.batch.ledger_world import make_task, rows
from tests.incidents.watching import Watching, watching
from tests.waiting.test_after import THREE, again, daily, load_after, make_slots
from tests.waiting.test_kept_back import chain_of_three, fail
from tests.waiting.world import MINUTE, Waits

HOUR = timedelta(hours=1)


@pytest.fixture
async def watch(waits: Waits) -> AsyncIterator[Watching]:
    async with watching(waits.ledger, waits.ledger) as node:
        yield node


@pytest.fixture
def operations(waits: Waits) -> Operations:
    return Operations(
        waits.ledger, waits.ledger, lambda: Loaded({}, []), get_settings(), are_ready=True
    )


async def settle(waits: Waits, watch: Watching) -> None:
    """Open and close what is ready, and have the watch notice what has gone wrong."""
    for _ in range(3):
        await waits.look()
    watch.watch._changes = None  # the time was moved by the test, and no service was down
    await watch.turn(3)


async def night(waits: Waits, watch: Watching, operations: Operations) -> Night:
    watch.later(1)  # the window ends before the present instant
    return await night_of(operations.context, since=THREE - HOUR)


def of_runs(found: Night) -> list[Need]:
    """What needs a person, except the alarm that no service lives: there is none in these tests."""
    return [need for need in found.needs if need.kind != "down"]


async def contents(watch: Watching) -> list[dict[str, Any]]:
    """What the messages about failed runs are made from."""
    return [
        row["content"]
        for row in await rows(watch.ledger, outbox)
        if row["content"]["kind"] == "failed"
    ]


async def failed_ones(watch: Watching) -> list[dict[str, Any]]:
    """All incidents but those of the slots before THREE, which were missed because the test begins
    before them.
    """
    return [row for row in await watch.incidents() if row["kind"] != "missed"]


async def test_runs_that_a_failed_slot_has_closed_open_no_incident_of_their_own(
    waits: Waits, watch: Watching, operations: Operations
) -> None:
    await chain_of_three(waits)
    await fail(waits, "extract", THREE)
    await settle(waits, watch)
    (incident,) = await failed_ones(watch)
    assert (incident["kind"], incident["task"]) == ("failed", "extract")
    assert (await waits.state("load", THREE), await waits.state("report")) == ("skipped", "skipped")
    (need,) = of_runs(await night(waits, watch, operations))
    kept = [each.model_dump() for each in need.keeps_back]
    assert kept == [
        {"task": "load", "slots": 1, "runs": 0, "at_least": False},
        {"task": "report", "slots": 1, "runs": 0, "at_least": False},
    ]
    shown = await operations(ShowIncident(incident=incident["id"]))
    assert [each.model_dump() for each in shown.keeps_back] == kept


@pytest.mark.rest
async def test_a_slot_that_is_kept_back_although_nothing_has_failed_is_an_incident_of_its_own(
    waits: Waits, watch: Watching, operations: Operations
) -> None:
    """Because what it waits for takes too long, or because no service has it. A success of the slot
    makes it good.
    """
    tasks = (
        daily("extract"),
        load_after(After("extract", within=HOUR)),
        make_task("lost", "0 3 * * *", after="gone"),
    )
    await make_slots(waits, *tasks)
    await waits.start((await waits.run_of("extract"))["id"])
    watch.later(3601)
    await settle(waits, watch)
    late, lost = await failed_ones(watch)
    assert [(each["kind"], each["task"], each["text"]) for each in (late, lost)] == [
        ("kept_back", "load", "extract was still running after 60 min"),
        (
            "kept_back",
            "lost",
            "there is no task gone, which it comes after; deploy that task or change `after`, "
            "and retry the skipped slots",
        ),
    ]
    needs = of_runs(await night(waits, watch, operations))
    assert [(need.kind, need.task, need.open) for need in needs] == [
        ("kept_back", "load", 1),
        ("kept_back", "lost", 1),
    ]
    told = message_of(
        "m", [("opened", each["content"]) for each in await rows(watch.ledger, outbox)], str, {}
    )
    assert "slots of load were kept back" in told.body
    await waits.finish((await waits.run_of("extract"))["id"])
    await again(waits, (await waits.run_of("load"))["id"])
    await waits.end("load")
    await settle(waits, watch)
    assert [(each["task"], each["closed_why"]) for each in await failed_ones(watch)] == [
        ("load", "made_good"),
        ("lost", None),
    ]


async def test_the_message_to_people_says_what_it_keeps_back(waits: Waits, watch: Watching) -> None:
    await chain_of_three(waits)
    await fail(waits, "extract", THREE)
    await settle(waits, watch)
    (content,) = await contents(watch)
    assert [each["task"] for each in content["keeps_back"]] == ["load", "report"]
    message = message_of("1", [("opened", content)], lambda _: None, {})
    assert "\nKeeps back 1 slot of load, 1 of report.\n" in message.body


async def test_a_message_of_an_older_version_says_nothing_of_it(
    waits: Waits, watch: Watching
) -> None:
    await chain_of_three(waits)
    await fail(waits, "extract", THREE)
    await settle(waits, watch)
    (content,) = await contents(watch)
    del content["keeps_back"]
    assert "Keeps back" not in message_of("1", [("opened", content)], lambda _: None, {}).body


async def test_names_in_a_message_are_escaped(waits: Waits, watch: Watching) -> None:
    await chain_of_three(waits)
    await fail(waits, "extract", THREE)
    await settle(waits, watch)
    (content,) = await contents(watch)
    content["keeps_back"][0]["task"] = "lo\x1b[2Jad\n"
    assert (
        "Keeps back 1 slot of lo\\x1b[2Jad , 1 of report."
        in message_of("1", [("opened", content)], str, {}).body
    )


async def test_a_retry_with_success_lets_it_go_on_and_nothing_is_left_to_say(
    waits: Waits, watch: Watching, operations: Operations
) -> None:
    await chain_of_three(waits)
    run = await fail(waits, "extract", THREE)
    await settle(waits, watch)
    clock.advance(MINUTE)
    async with waits.ledger.engine.begin() as connection:
        await retry(connection, run, "ann")
    await waits.end("extract", THREE)
    await settle(waits, watch)
    assert await waits.state("load", THREE) == "queued"
    (incident,) = await failed_ones(watch)
    assert incident["closed_why"] == "made_good"
    found = await night(waits, watch, operations)
    assert of_runs(found) == []
    assert [each.task for each in found.did_not_run if each.task == "load"] == []


async def test_night_names_the_cause_of_what_was_closed(
    waits: Waits, watch: Watching, operations: Operations
) -> None:
    await chain_of_three(waits)
    run = await fail(waits, "extract", THREE)
    await settle(waits, watch)
    found = await night(waits, watch, operations)
    causes = {each.task: each for each in found.did_not_run}
    assert {task: (each.cause, each.slots) for task, each in causes.items()} == {
        "load": ("after", 1),
        "report": ("after", 1),
    }
    for each in causes.values():
        assert each.after is not None
        assert (each.after.task, each.after.run, each.after.state) == ("extract", run, "failed")
    assert found.slots.skipped == 2


async def test_night_names_the_blocker_of_a_run_that_waits_in_vain(
    waits: Waits, watch: Watching, operations: Operations
) -> None:
    report = make_task("report", "0 3 * * *", after="load")
    await make_slots(
        waits, daily("extract"), daily("rates"), load_after("extract", "rates"), report
    )
    run = await fail(waits, "rates")
    clock.advance(2 * MINUTE)
    await settle(waits, watch)
    late = {each.task: each for each in (await night(waits, watch, operations)).late}
    load, report_run = late["load"].blocker, late["report"].blocker
    assert load is not None
    assert report_run is not None
    assert (load.kind, load.task, load.run, load.state, load.cause) == (
        "slot",
        "rates",
        run,
        "failed",
        None,
    )
    assert (report_run.task, report_run.state) == ("load", "waiting")
    assert report_run.cause is not None
    assert (report_run.cause.task, report_run.cause.run, report_run.cause.state) == (
        "rates",
        run,
        "failed",
    )


async def test_a_run_that_waits_for_one_that_is_on_its_way_is_not_late(
    waits: Waits, watch: Watching, operations: Operations
) -> None:
    await make_slots(waits, daily("extract"), load_after())
    await waits.start((await waits.run_of("extract"))["id"])
    clock.advance(2 * HOUR)
    await settle(waits, watch)
    found = await night(waits, watch, operations)
    assert [each for each in found.late if each.task == "load"] == []
    assert [row for row in await watch.incidents() if row["task"] == "load"] == []
    assert found.slots.active == 2


async def test_a_run_that_was_opened_is_late_from_its_opening_and_not_from_its_slot(
    waits: Waits, watch: Watching, operations: Operations
) -> None:
    await make_slots(waits, daily("extract"), load_after())
    await waits.start((await waits.run_of("extract"))["id"])
    clock.advance(2 * HOUR)
    await waits.finish((await waits.run_of("extract"))["id"])
    await settle(waits, watch)
    assert await waits.state("load") == "queued"
    clock.advance(30 * timedelta(seconds=1))
    await settle(waits, watch)
    assert [each.task for each in (await night(waits, watch, operations)).late] == []
    assert [row["kind"] for row in await watch.incidents(task="load")] == []
    clock.advance(6 * MINUTE)
    await settle(waits, watch)
    (incident,) = await watch.incidents(task="load")
    assert (incident["kind"], "after 6 minutes" in incident["text"]) == ("late", True)
    (late,) = (await night(waits, watch, operations)).late
    assert late.task == "load"
    assert 380 <= late.elapsed <= 420


@pytest.mark.rest
async def test_a_run_that_was_opened_is_slow_from_its_begin(waits: Waits, watch: Watching) -> None:
    slow = load_after(alerts=Alerts(slow_after=60))
    await make_slots(waits, daily("extract"), slow)
    await waits.start((await waits.run_of("extract"))["id"])
    clock.advance(2 * HOUR)
    await waits.finish((await waits.run_of("extract"))["id"], RunState.SUCCEEDED)
    await settle(waits, watch)
    await waits.start((await waits.run_of("load"))["id"])
    clock.advance(timedelta(seconds=50))
    await settle(waits, watch)
    assert await watch.incidents(task="load", kind="slow") == []
    clock.advance(timedelta(seconds=20))
    await settle(waits, watch)
    (incident,) = await watch.incidents(task="load", kind="slow")
    assert incident["text"] == "it has run for 70 seconds"
