"""The forecast: when promised slots will have succeeded, what decides it, and that what it says
comes true.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import insert, update

from batch_system import Alerts, clock
from batch_system.batch.cron.zones import zone_of
from batch_system.batch.firing.pauses import NEVER
from batch_system.batch.incidents.forecast import (
    Facts,
    Forecast,
    KnownRun,
    KnownTask,
    Promise,
    Room,
    Slot,
    forecasts,
)
from batch_system.batch.incidents.forecast_telling import Words
from batch_system.batch.ledger import tables
from batch_system.batch.ledger.states import RunState
from batch_system.database.engine import Database
from batch_system.errors import InvalidTask
from batch_system.operations.asking.actor import Actor
from batch_system.operations.operations import Operations
from batch_system.server.digest import text_of
from batch_system.verbs.night import ShowForecast, ShowNight
from tests.batch.ledger_world import fire, know, make_task
from tests.commands import Batch, in_this_process
from tests.incidents.test_conditions import checked, opened
from tests.incidents.watching import Watching
from tests.night.generated_nights import scored
from tests.night.test_night import beat
from tests.night.test_night import operations as operations

AT = datetime(2026, 3, 10, 6, 0, tzinfo=UTC)
"""The slot of each task of the pure tests."""
NOW = AT + timedelta(minutes=30)
USUAL = KnownTask(p50=600.0, p95=900.0, successes=100)
WORDS = Words(NOW, zone_of("UTC"))


def minutes(number: float) -> timedelta:
    return timedelta(minutes=number)


def run(state: RunState, began: float | None = None, **more: Any) -> KnownRun:
    """A run of the slot that began so many minutes after it."""
    began_at = None if began is None else AT + minutes(began)
    return KnownRun("1", state, AT, began_at, **more)


def forecast(
    runs: Mapping[str, KnownRun],
    after: Mapping[str, list[str]] | None = None,
    deadline: float = 120,
    tasks: Mapping[str, KnownTask] | None = None,
    slot: datetime = AT,
    **more: Any,
) -> Forecast:
    """The forecast for the slot of `report`, which is promised this many minutes after AT."""
    before: dict[Slot, list[Slot]] = {
        (task, slot if task == "report" else AT): [(name, AT) for name in names]
        for task, names in (after or {}).items()
    }
    names = {"report", *runs, *(name for its in (after or {}).values() for name in its)}
    known = dict.fromkeys(names, USUAL) | dict(tasks or {})
    facts = Facts(NOW, known, {(name, AT): each for name, each in runs.items()}, before, **more)
    (found,) = forecasts(facts, [Promise("report", slot, AT + minutes(deadline))])
    return found


def ends(found: Forecast) -> float | None:
    """When the slot will have succeeded, in minutes after AT."""
    return (found.ends_at - AT).total_seconds() / 60 if found.ends_at is not None else None


@pytest.mark.parametrize(
    ("one", "end"),
    [
        (run(RunState.RUNNING, 25), 35),  # as usual
        (run(RunState.RUNNING, 20, done=50, total=100, rate=0.05), 30 + 1_000 / 60),
        (run(RunState.RUNNING, 18), 31.5),  # half of those that take so long end in the middle
        (run(RunState.RUNNING, 5), 40),  # 10 minutes slower than 95 of 100: 10 minutes more
        (run(RunState.QUEUED), 40),
        (replace(run(RunState.RETRYING), due_at=AT + minutes(50)), 60),
        (run(RunState.SUCCEEDED, 2, ended_at=AT + minutes(9)), 9),
        (run(RunState.FAILED, 2, good_at=AT + minutes(20)), 20),
    ],
)
def test_a_run_ends_by_its_progress_or_as_usual(one: KnownRun, end: float) -> None:
    assert ends(forecast({"report": one})) == pytest.approx(end)


def test_a_slot_to_come_ends_no_earlier_than_its_own_usual_time() -> None:
    assert ends(forecast({}, slot=NOW + minutes(60))) == 100


def test_the_latest_end_decides_and_the_path_says_so() -> None:
    found = forecast(
        {
            "orders": run(RunState.SUCCEEDED, 0, ended_at=AT + minutes(5)),
            "stock": run(RunState.RUNNING, 28),
            "export": run(RunState.RUNNING, 5, done=80, total=100, rate=0.01),
            "report": run(RunState.WAITING),
        },
        {"report": ["stock", "export"], "export": ["orders"]},
        deadline=60,
    )
    assert [step.task for step in found.path] == ["orders", "export", "report"]
    assert ends(found) == pytest.approx(30 + 2_000 / 60 + 10)
    assert found.state == "late"
    assert WORDS.title(found) == "report promised 07:00: about 07:13, 13 min late"
    assert WORDS.detail(found) == (
        "export takes 5.8 times as long as usual: 80 % after 25 min, usual is 10 min. "
        "It waits for export 06:00."
    )
    assert "80 %" not in WORDS.detail(found, has_progress=False)


def test_a_failed_run_in_the_path_is_a_risk_until_a_retry_would_be_too_late() -> None:
    runs = {"bank": run(RunState.FAILED, 0), "books": run(RunState.SKIPPED)}
    after = {"report": ["books"], "books": ["bank"]}
    found = forecast({**runs, "report": run(RunState.SKIPPED)}, after)
    assert (found.state, found.retry_until) == ("at_risk", AT + minutes(120 - 45))
    assert WORDS.title(found) == "report promised 08:00: not before bank is mended"
    assert WORDS.detail(found) == (
        "It waits for books 06:00, which waits for bank 06:00. "
        "With a retry by 07:15 it can still be there."
    )
    assert forecast(runs, after, deadline=58).state == "late"
    ended = {"bank": replace(USUAL), "report": replace(USUAL, needs_success=False)}
    alone = {"bank": run(RunState.FAILED, 0), "report": run(RunState.WAITING)}
    assert forecast(alone, {"report": ["bank"]}, tasks=ended).state == "on_time"


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        ({"load": replace(USUAL, handled=AT)}, "not before load is backfilled"),
        ({"load": replace(USUAL, pauses=[(AT, NEVER)])}, "not before load is resumed"),
        ({"report": replace(USUAL, within=600.0)}, "it will be skipped"),
    ],
)
def test_what_will_not_go_on_by_itself_is_a_risk(tasks: dict[str, KnownTask], words: str) -> None:
    found = forecast({"report": run(RunState.WAITING)}, {"report": ["load"]}, tasks=tasks)
    assert (found.state, WORDS.title(found)) == ("at_risk", f"report promised 08:00: {words}")


def test_tasks_that_wait_for_each_other_do_not_hang_it() -> None:
    found = forecast({}, {"report": ["load"], "load": ["report"]})
    assert (found.state, found.obstacle and found.obstacle.obstacle) == ("at_risk", "gone")


@pytest.mark.parametrize(("overlap", "end"), [("wait", 65), ("skip", None), ("replace", 60)])
def test_a_slot_waits_for_the_run_before_it(overlap: str, end: float | None) -> None:
    slow = run(RunState.RUNNING, 0, done=50, total=100, rate=50 / 1_500)
    earlier = [(AT - minutes(30), slow)]
    runs: dict[Slot, KnownRun] = {("report", AT - minutes(30)): slow}
    known = {"report": replace(USUAL, overlap=overlap)}
    facts = Facts(NOW, known, runs, active={"report": earlier})
    slot = AT + minutes(50)
    (found,) = forecasts(facts, [Promise("report", slot, AT + minutes(90))])
    assert ends(found) == end
    if overlap == "skip":
        assert WORDS.title(found) == "report promised 07:30: it will be skipped"
        assert WORDS.detail(found).startswith("Its run before goes on until about 06:55.")


def test_a_run_waits_for_a_place_in_its_pool() -> None:
    waiting = run(RunState.QUEUED)
    first = replace(waiting, id="0")
    room = Room(
        [("a", run(RunState.RUNNING, 29)), ("b", run(RunState.RUNNING, 25))],
        [("a", first), ("report", waiting)],
    )
    tasks = dict.fromkeys("ab", USUAL)
    assert ends(forecast({"report": waiting}, tasks=tasks, full={"default": room})) == 39 + 10
    # Those that took the places may have ended between two queries.
    free = Room([], [("report", waiting)])
    assert ends(forecast({"report": waiting}, tasks=tasks, full={"default": free})) == 30 + 10


def test_there_is_no_forecast_before_ten_successes() -> None:
    few = replace(USUAL, successes=9)
    found = forecast({"load": run(RunState.RUNNING, 29)}, {"report": ["load"]}, tasks={"load": few})
    assert (found.state, ends(found)) == ("unknown", None)
    assert WORDS.title(found) == "report promised 08:00: no forecast yet"
    assert "There are fewer than 10 successful runs of load." in WORDS.detail(found)


def test_it_is_late_only_by_more_than_the_forecast_is_exact() -> None:
    far = run(RunState.RUNNING, 0, done=50, total=100, rate=50 / 3_600)  # ends in an hour
    assert forecast({"report": far}, deadline=85).state == "on_time"
    assert forecast({"report": far}, deadline=83).state == "late"
    assert forecast({"report": run(RunState.RUNNING, 25)}, deadline=34).state == "on_time"
    assert forecast({"report": run(RunState.RUNNING, 25)}, deadline=33.9).state == "late"


@pytest.mark.rest
def test_most_broken_promises_of_made_up_nights_are_foreseen_and_few_are_called_falsely() -> None:
    _check(range(1_000, 1_100))


@pytest.mark.nightly
def test_it_is_so_in_a_thousand_nights() -> None:
    _check(range(1_000))


def _check(seeds: range) -> None:
    score = scored(seeds)
    assert score.broken >= score.nights / 3, score
    assert score.foreseen >= 0.9 * score.broken, score
    assert score.false <= score.nights / 20, score


# On a ledger.


async def usual(ledger: Database, **p50: float) -> None:
    """Durations of tasks that have succeeded a hundred times."""
    rows = [
        {"task": name, "p50": each, "p95": 1.5 * each, "longest": 2 * each, "runs": 100}
        for name, each in p50.items()
    ]
    async with ledger.engine.begin() as connection:
        for row in rows:
            await connection.execute(
                insert(tables.durations).values(**row, computed_at=clock.now())
            )


async def running(ledger: Database, task: str, **values: Any) -> str:
    """The run of the newest slot of a task runs since now. Returns its id."""
    async with ledger.engine.begin() as connection:
        changed = (
            update(tables.runs)
            .where(tables.runs.c.task == task, tables.runs.c.state == "queued")
            .values(state="running", attempt_started_at=clock.now(), attempt=1, **values)
            .returning(tables.runs.c.id)
        )
        return str((await connection.execute(changed)).scalar_one())


async def chain(ledger: Database, watch: Watching, **more: Any) -> dict[str, Any]:
    """An export and a report that comes after it, promised 40 minutes after its slot."""
    loaded = await know(
        ledger,
        make_task("export", "0 * * * *", tags=more.pop("tags", ())),
        make_task("report", "0 * * * *", after="export", deadline=minutes(40), **more),
    )
    await usual(ledger, export=1_200.0, report=300.0)
    watch.later(3_600)
    await fire(ledger, loaded, clock.now())
    return loaded


async def test_the_ledger_says_what_decides_and_everybody_reads_it(
    ledger: Database, watch: Watching, operations: Operations
) -> None:
    await chain(ledger, watch, tags=("secret",))
    began = clock.now()
    await running(ledger, "export", count=10, total=100, rate=90 / 3_600)
    watch.later(600)
    found = await operations(ShowForecast(zone="Europe/Berlin"))
    (late, *others) = found.slots
    assert (late.task, late.state, late.slot) == ("report", "late", began)
    assert [(step.task, step.state) for step in late.path] == [
        ("export", "running"),
        ("report", "waiting"),
    ]
    assert late.text == "report promised 04:40: about 05:15, 35 min late"
    assert late.why == (
        "export takes 3.5 times as long as usual: 10 % after 10 min, usual is 20 min. "
        "It waits for export 04:00."
    )
    assert others[0].text == "report promised 05:40: export will be skipped"
    assert [each.state for each in others] == ["at_risk", *["on_time"] * 10]
    assert found.sentence == "1 of 12 promises is late, 1 is at risk."
    seen = await operations.by(Actor("eve", "viewer", "page"))(ShowForecast())
    assert seen.slots[0].path[0].done is None and "%" not in seen.slots[0].why
    await beat(watch)
    night = await operations(ShowNight())
    assert night.forecast is not None and night.forecast.late == 1
    assert (night.level, night.headline) == ("watch", "Nothing failed. 2 promises are in danger.")
    assert "- report promised 03:40: about 04:15, 35 min late" in text_of(night)


@pytest.fixture
def batch(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Batch]:
    yield from in_this_process(capsys, monkeypatch)


async def test_the_commands_say_it_in_lines_and_by_the_exit_code(
    ledger: Database, ledger_url: str, watch: Watching, batch: Batch
) -> None:
    done = await asyncio.to_thread(batch, "forecast", LEDGER_URL=ledger_url)
    assert done.code == 0 and "none has a deadline" in done.out + done.err
    await chain(ledger, watch)
    await running(ledger, "export", count=10, total=100, rate=90 / 3_600)
    watch.later(60)
    done = await asyncio.to_thread(batch, "forecast", "--zone", "Asia/Tokyo")
    first, second, *_ = done.out.splitlines()
    assert (done.code, first) == (1, "1 of 12 promises is late.")
    assert second.startswith("late: report promised 12:40: about 13:06, 26 min late. export takes")
    found = (await asyncio.to_thread(batch, "forecast", "--json")).json
    assert (found["late"], found["at_risk"], found["on_time"]) == (1, 0, 11)
    night = await asyncio.to_thread(batch, "night")
    assert "Will it be there in time?" in night.out and "export takes" in night.out


async def test_a_kept_promise_and_tasks_without_one(
    ledger: Database, watch: Watching, operations: Operations
) -> None:
    await know(ledger, make_task("plain"))
    assert (await operations(ShowNight())).forecast is None
    assert (await operations(ShowForecast())).slots == []
    await chain(ledger, watch)
    run = await running(ledger, "export")
    watch.later(600)
    await claimed(ledger, run)
    found = await operations(ShowForecast())
    assert (found.slots[0].state, found.slots[0].path[-1].state) == ("on_time", "waiting")


async def claimed(ledger: Database, run: str) -> None:
    async with ledger.engine.begin() as connection:
        await connection.execute(
            update(tables.runs)
            .where(tables.runs.c.id == run)
            .values(state="succeeded", finished_at=clock.now())
        )


async def test_an_incident_opens_only_where_the_task_asks_for_it_and_closes_by_itself(
    ledger: Database, watch: Watching
) -> None:
    await chain(ledger, watch, alerts=Alerts(at_risk=True))
    run = await running(ledger, "export", count=10, total=100, rate=90 / 3_600)
    await checked(watch)
    (incident,) = await opened(watch, "at_risk")
    assert incident["task"] == "report"
    assert incident["text"].startswith("report promised 03:40: about 04:05, 25 min late (UTC). ")
    assert ("all", "opened", incident["text"]) in await watch.notes()
    async with ledger.engine.begin() as connection:
        faster = update(tables.runs).where(tables.runs.c.id == run).values(count=95)
        await connection.execute(faster)
    await checked(watch)
    assert await opened(watch, "at_risk") == []
    assert [kind for _, kind, _ in await watch.notes()] == ["opened", "closed"]


async def test_without_the_option_nobody_is_told(ledger: Database, watch: Watching) -> None:
    await chain(ledger, watch)
    await running(ledger, "export", count=10, total=100, rate=90 / 3_600)
    await checked(watch)
    assert await watch.incidents(kind="at_risk") == []


def test_the_option_needs_a_deadline() -> None:
    with pytest.raises(InvalidTask, match=r"Alerts\(at_risk\) is True; allowed: False for a task"):
        make_task("hasty", alerts=Alerts(at_risk=True))
    with pytest.raises(InvalidTask, match=r"Alerts\(at_risk\) is 5; allowed: True or False"):
        Alerts(at_risk=5)  # type: ignore[arg-type]
