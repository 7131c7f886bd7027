"""The forecast of slots that fall into a pause: a maintenance window, or a pause with an end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta

import pytest

from batch_system import Alerts, clock
from batch_system.batch.firing import pauses
from batch_system.batch.firing.pauses import NEVER
from batch_system.batch.firing.waiting import open_and_close
from batch_system.batch.incidents.forecast import KnownTask
from batch_system.batch.ledger import tables
from batch_system.batch.ledger.states import RunState
from batch_system.batch.tasks.registry import Task
from batch_system.database.engine import Database
from batch_system.operations.night.results import Forecasts
from batch_system.operations.operations import Operations
from batch_system.verbs.maintenance import EndMaintenance, PauseTasks
from batch_system.verbs.night import ShowForecast
from batch_system.verbs.tasks import PauseTask
from tests.batch.ledger_world import NODE, fire, know, make_task, rows
from tests.incidents.test_conditions import checked, opened
from tests.incidents.watching import Watching
from tests.night.conftest import START
from tests.night.test_forecast import AT, NOW, USUAL, WORDS, ends, forecast, minutes, run, usual
from tests.night.test_night import operations as operations

SLOT = NOW + minutes(30)
"""A slot to come of the pure tests, an hour after AT."""


def paused(*spans: tuple[float, float | None]) -> KnownTask:
    """A task that is paused from one minute after AT to another; None: until a person ends that."""
    ends = [(AT + minutes(begin), AT + minutes(end) if end else NEVER) for begin, end in spans]
    return replace(USUAL, pauses=ends)


@pytest.mark.parametrize(
    ("spans", "state", "words"),
    [
        ([(50, 100)], "at_risk", "not before it is backfilled"),
        ([(60, 100)], "at_risk", "not before it is backfilled"),  # its beginning belongs to it
        ([(50, 125)], "paused", "paused until 08:05"),
        ([(50, 100), (90, 125)], "paused", "paused until 08:05"),  # both are one pause
        ([(50, None)], "paused", "paused"),
        ([(50, 60)], "on_time", "about 07:10"),  # its end does not
        ([(61, 90)], "on_time", "about 07:10"),  # its run has a place at once
    ],
)
def test_a_slot_in_a_pause_does_not_run(
    spans: Sequence[tuple[float, float | None]], state: str, words: str
) -> None:
    found = forecast({}, slot=SLOT, tasks={"report": paused(*spans)})
    assert (found.state, WORDS.title(found)) == (state, f"report promised 08:00: {words}")
    if state == "at_risk":
        assert found.retry_until == AT + minutes(105)
        assert WORDS.detail(found) == (
            "It is paused until 07:40. With that by 07:45 it can still be there."
        )


def test_a_pause_holds_the_runs_that_were_made_before_it() -> None:
    made = replace(run(RunState.QUEUED), created_at=AT)
    assert ends(forecast({"report": made}, tasks={"report": paused((20, 90))})) == 90 + 10
    by_hand = replace(made, created_at=AT + minutes(25))  # a backfill in the pause runs at once
    assert ends(forecast({"report": by_hand}, tasks={"report": paused((20, 90))})) == 30 + 10
    for_ever = forecast({"report": made}, tasks={"report": paused((20, None))})
    assert (for_ever.state, for_ever.obstacle and for_ever.obstacle.obstacle) == (
        "paused",
        "paused",
    )
    running = run(RunState.RUNNING, 28)
    assert ends(forecast({"report": running}, tasks={"report": paused((20, 90))})) == 38


def test_a_run_that_opens_in_a_pause_begins_after_it() -> None:
    runs = {"load": run(RunState.RUNNING, 28), "report": run(RunState.WAITING)}
    found = forecast(runs, {"report": ["load"]}, tasks={"report": paused((35, 70))})
    assert (found.state, ends(found)) == ("on_time", 80)


def test_what_waits_for_a_slot_in_a_pause_waits_for_a_person_or_does_not_wait() -> None:
    tasks = {"load": paused((-10, 90))}
    found = forecast({"report": run(RunState.WAITING)}, {"report": ["load"]}, tasks=tasks)
    assert (found.state, found.retry_until) == ("at_risk", AT + minutes(120 - 30))
    assert WORDS.title(found) == "report promised 08:00: not before load is backfilled"
    assert WORDS.detail(found) == (
        "load is paused until 07:30. It waits for load 06:00. "
        "With that by 07:30 it can still be there."
    )
    at_the_end = {**tasks, "report": replace(USUAL, needs_success=False)}
    found = forecast({"report": run(RunState.WAITING)}, {"report": ["load"]}, tasks=at_the_end)
    assert (found.state, ends(found)) == ("on_time", 40)


# On a ledger.


def at(number: float) -> datetime:
    """An hour of the day of START."""
    return START.replace(hour=0) + timedelta(hours=number)


async def said(operations: Operations) -> dict[str, list[str]]:
    """The forecasts of each task for the deadlines until nine o'clock, in order."""
    found: Forecasts = await operations(ShowForecast())
    near = sorted((each.slot, each.task, each) for each in found.slots if each.slot < at(8))
    texts: dict[str, list[str]] = {}
    for _, task, each in near:
        text = each.text.removeprefix(f"{task} promised ")
        texts.setdefault(task, []).append(f"{each.state}: {text}")
    assert sum(
        (found.kept, found.on_time, found.late, found.at_risk, found.unknown, found.paused)
    ) == len(found.slots)
    return texts


async def go_to(ledger: Database, loaded: dict[str, Task], *hours: float) -> None:
    """Let a service do what is due at these hours."""
    for hour in hours:
        clock.advance(at(hour) - clock.now())
        await pauses.begin_and_end(ledger, loaded, NODE)
        await fire(ledger, loaded, clock.now())
        async with ledger.engine.begin() as connection:
            await open_and_close(connection, loaded, clock.now())


async def test_a_planned_window_comes_as_the_forecast_has_said(
    ledger: Database, watch: Watching, operations: Operations
) -> None:
    loaded = await know(
        ledger,
        make_task("report", "0 * * * *", tags=("nightly",), deadline=minutes(40)),
        make_task("books", "0 * * * *", after="report", deadline=minutes(50)),
        make_task("other", "0 * * * *", deadline=minutes(50)),
    )
    await usual(ledger, report=300.0, books=300.0, other=300.0)
    before = await said(operations)
    assert {state.partition(":")[0] for its in before.values() for state in its} == {"on_time"}
    window = await operations(PauseTasks(tag="nightly", begins_at=at(3.5), until=at(5.5)))
    planned = await said(operations)
    assert planned["report"] == [
        "on_time: 03:40: about 03:05",
        "paused: 04:40: paused until 05:30",
        "at_risk: 05:40: not before it is backfilled",
        "on_time: 06:40: about 06:05",
        "on_time: 07:40: about 07:05",
    ]
    assert planned["books"] == [
        "on_time: 03:50: about 03:10",
        "at_risk: 04:50: not before report is backfilled",
        "at_risk: 05:50: not before report is backfilled",
        "on_time: 06:50: about 06:10",
        "on_time: 07:50: about 07:10",
    ]
    assert planned["other"] == before["other"]
    await operations(EndMaintenance(window=window.id))
    assert await said(operations) == before
    await operations(PauseTasks(tag="nightly", begins_at=at(3.5), until=at(5.5)))
    await go_to(ledger, loaded, 3.49)
    assert (await said(operations))["report"][1:] == planned["report"][1:]
    await go_to(ledger, loaded, 3.5, 4, 4.2)
    assert (await said(operations))["report"][1:] == planned["report"][1:]
    skipped = await rows(ledger, tables.runs, task="books", slot=at(4))
    assert [row["state"] for row in skipped] == ["skipped"]
    await go_to(ledger, loaded, 5, 5.5, 5.6)
    assert (await said(operations))["report"][1:] == planned["report"][1:]
    (missed,) = await rows(ledger, tables.missed, task="report")
    assert (missed["cause"], missed["first_slot"], missed["last_slot"]) == ("paused", at(4), at(5))
    clock.advance(minutes(5))
    assert (await said(operations))["report"][1:3] == [
        "paused: 04:40: paused until 05:30",
        "late: 05:40: not before it is backfilled",
    ]


@pytest.mark.rest
async def test_a_pause_with_an_end_is_forecast_and_one_without_promises_nothing(
    ledger: Database, watch: Watching, operations: Operations
) -> None:
    await know(
        ledger,
        make_task("report", "0 * * * *", deadline=minutes(40), alerts=Alerts(at_risk=True)),
        make_task("books", "0 * * * *", after="report", deadline=minutes(50)),
    )
    await usual(ledger, report=300.0, books=300.0)
    await operations(PauseTask(name="report", until=at(4.5)))
    found = await said(operations)
    assert found["report"][:3] == [
        "paused: 03:40: paused until 04:30",
        "at_risk: 04:40: not before it is backfilled",
        "on_time: 05:40: about 05:05",
    ]
    assert [text.partition(":")[0] for text in found["books"][:3]] == [
        "at_risk",
        "at_risk",
        "on_time",
    ]
    await checked(watch)
    (incident,) = await opened(watch, "at_risk")
    assert incident["text"].startswith("report promised 04:40: not before it is backfilled (UTC).")
    assert "It is paused until 04:30." in incident["text"]
    await operations(PauseTask(name="books"))
    assert (await said(operations)).keys() == {"report"}
