"""Incidents that no failed run opens: late slots, slow runs, silence, deadlines, outages, lost
nodes, bad backups.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import insert, update

from batch_system import Alerts, Limit, clock
from batch_system.alerts.messages import still_news
from batch_system.batch.account.account import accounts
from batch_system.batch.account.slots import Kind
from batch_system.batch.firing import pauses, task_sync
from batch_system.batch.firing.backfill import Backfill
from batch_system.batch.firing.limit_functions import LimitFunctions
from batch_system.batch.firing.unfired import NotFired
from batch_system.batch.incidents.watched import Thresholds
from batch_system.batch.ledger import (
    missed_ranges,
    nodes,
    runs,
    schedules,
    tables,
    transitions,
    wakes,
)
from batch_system.batch.ledger.incidents import incidents
from batch_system.batch.ledger.incidents.incidents import Opening
from batch_system.batch.ledger.missed_ranges import Cause, MissedRange
from batch_system.batch.ledger.runs import NewRun
from batch_system.batch.ledger.states import IncidentKind, RunState
from batch_system.batch.ledger.tables import new_id
from batch_system.batch.nodes import orphans
from batch_system.batch.nodes.clock_steps import ClockStep
from batch_system.batch.nodes.outage import Outage
from batch_system.batch.queue.enqueue import Startable
from batch_system.batch.tasks.registry import Task
from batch_system.database.engine import Database
from batch_system.operations.asking.context import Loaded
from batch_system.operations.operations import Operations
from batch_system.settings.reading import get_settings
from batch_system.verbs.maintenance import MuteTasks, PauseTasks
from batch_system.verbs.tasks import PauseTask, ResumeTask
from tests.batch.ledger_world import NODE, fire, know, make_task, rows
from tests.batch.test_runs import insert as insert_runs
from tests.batch.test_runs import new
from tests.incidents.watching import Watching, ended, failed, started, succeeded, watching

START = datetime(2026, 3, 10, 2, 0, 0, tzinfo=UTC)
MINUTE = timedelta(minutes=1)


@pytest.fixture
async def watch(ledger: Database) -> AsyncIterator[Watching]:
    with clock.moved(START):
        async with watching(ledger, ledger) as node:
            yield node


async def opened(watch: Watching, kind: str) -> list[dict[str, Any]]:
    return [row for row in await watch.incidents(kind=kind) if row["closed_at"] is None]


async def queued(ledger: Database, task: str, slot: datetime) -> NewRun:
    run = NewRun.scheduled(task, slot, clock.now(), catch_up=False, exclusive=task, priority=0)
    async with ledger.engine.begin() as connection:
        await runs.insert(connection, [run])
    return run


async def checked(watch: Watching, seconds: float = 10) -> None:
    """Let time pass, and the watch look at what has no row of its own."""
    watch.later(seconds)
    await watch.turn(2)


async def test_a_slot_that_does_not_start_is_late_until_it_does(
    ledger: Database, watch: Watching
) -> None:
    await know(ledger, make_task("load"))
    await started(ledger, "load", START)
    run = await queued(ledger, "load", START + MINUTE)
    await checked(watch, 299)
    assert await opened(watch, "late") == []
    await checked(watch, 5)
    (incident,) = await opened(watch, "late")
    assert (incident["task"], incident["newest_run"]) == ("load", run.id)
    async with ledger.engine.begin() as connection:
        await connection.execute(
            update(tables.runs).where(tables.runs.c.id == run.id).values(state="cancelled")
        )
    await checked(watch)
    assert await opened(watch, "late") == []


async def test_what_waits_behind_a_backlog_is_late_and_the_backlog_is_not(
    ledger: Database, watch: Watching
) -> None:
    await know(ledger, make_task("load", alerts=Alerts(late_after=60)))
    await started(ledger, "load", START)
    for _ in range(50):
        run = NewRun.queued(
            "load", START, clock.now(), is_backfill=True, exclusive="load", priority=0
        )
        async with ledger.engine.begin() as connection:
            await runs.insert(connection, [run])
    await checked(watch, 100)
    assert await opened(watch, "late") == []
    await queued(ledger, "load", clock.now())
    await checked(watch, 61)
    assert len(await opened(watch, "late")) == 1


async def test_a_run_that_a_pause_holds_is_not_late(ledger: Database, watch: Watching) -> None:
    loaded = await know(ledger, make_task("load"))
    await queued(ledger, "load", START)
    async with ledger.engine.begin() as connection:
        await pauses.pause(connection, "load", "ann", loaded)
    await checked(watch, 600)
    assert await opened(watch, "late") == []


async def test_a_run_is_slow_by_what_its_task_usually_takes(
    ledger: Database, watch: Watching
) -> None:
    await know(ledger, make_task("load"))
    for number in range(10):
        run = await started(ledger, "load", START + number * MINUTE)
        watch.later(40)
        await ended(ledger, run, RunState.SUCCEEDED, fingerprint=None)
    running = await started(ledger, "load", START + 20 * MINUTE)
    await checked(watch, 119)
    assert await opened(watch, "slow") == []
    await checked(watch, 6)
    (incident,) = await opened(watch, "slow")
    assert (incident["subject"], incident["task"]) == (running.id, "load")
    assert "95 of 100 runs take at most 40 seconds" in incident["text"]
    await ended(ledger, running, RunState.SUCCEEDED, fingerprint=None)
    await checked(watch)
    assert await opened(watch, "slow") == []


async def test_a_task_may_say_what_is_slow_and_when_it_stalls(
    ledger: Database, watch: Watching
) -> None:
    await know(
        ledger,
        make_task("load", None, alerts=Alerts(slow_after=30)),
        make_task("copy", None, alerts=Alerts(stalled_after=30)),
    )
    await started(ledger, "load")
    copying = await started(ledger, "copy")
    at = {"progress_at": clock.now(), "count": 1}
    async with ledger.engine.begin() as connection:
        await connection.execute(
            update(tables.runs).where(tables.runs.c.id == copying.id).values(at)
        )
    await checked(watch, 31)
    assert sorted(row["text"] for row in await opened(watch, "slow")) == [
        "it has made no progress for 31 seconds",
        "it has run for 31 seconds",
    ]


async def test_a_task_without_a_success_for_too_long_is_silent(
    ledger: Database, watch: Watching
) -> None:
    await know(ledger, make_task("load", expect_every=timedelta(hours=2)))
    await succeeded(ledger, "load", START)
    await checked(watch, 7_199)
    assert await opened(watch, "silent") == []
    await checked(watch, 2)
    (incident,) = await opened(watch, "silent")
    assert incident["text"] == "no run has succeeded for 2 hours"
    await succeeded(ledger, "load", clock.now())
    await checked(watch)
    assert await opened(watch, "silent") == []


async def test_a_slot_that_has_not_succeeded_by_its_deadline(
    ledger: Database, watch: Watching
) -> None:
    """The clocks go forward in Berlin in the night to 29 March: 06:00 is 04:00 UTC then, and not
    05:00.
    """
    watch.later((datetime(2026, 3, 29, 0, 0, tzinfo=UTC) - START).total_seconds())
    loaded = await know(
        ledger, make_task("load", "30 1 * * *", timezone="Europe/Berlin", deadline="06:00")
    )
    await checked(watch, 60)
    watch.later(1_800)
    await fire(ledger, loaded, clock.now())
    slot = datetime(2026, 3, 29, 0, 30, tzinfo=UTC)
    (run,) = await rows(ledger, tables.runs)
    assert run["slot"] == slot
    watch.later((datetime(2026, 3, 29, 3, 59, tzinfo=UTC) - clock.now()).total_seconds())
    await watch.turn(2)
    assert await opened(watch, "deadline") == []
    await checked(watch, 61)
    (incident,) = await opened(watch, "deadline")
    assert incident["text"] == "the slot 2026-03-29 00:30 UTC has not succeeded by 06:00"
    async with ledger.engine.begin() as connection:
        done = {"state": "succeeded", "finished_at": clock.now()}
        await connection.execute(
            update(tables.runs).where(tables.runs.c.id == run["id"]).values(done)
        )
    await checked(watch)
    assert await opened(watch, "deadline") == []


async def test_an_incident_that_comes_and_goes_is_told_only_if_it_stays(
    ledger: Database, watch: Watching
) -> None:
    await know(ledger, make_task("load"))

    async def late(minute: int) -> NewRun:
        run = await queued(ledger, "load", START + minute * MINUTE)
        await checked(watch, 301)
        return run

    async def starts(run: NewRun) -> None:
        async with ledger.engine.begin() as connection:
            await connection.execute(
                update(tables.runs).where(tables.runs.c.id == run.id).values(state="succeeded")
            )
        await checked(watch)

    await starts(await late(1))
    again = await late(2)
    assert [kind for _, kind, _ in await watch.notes()] == ["opened", "closed"]
    await starts(again)
    assert [kind for _, kind, _ in await watch.notes()] == ["opened", "closed"], (
        "it was over again within two minutes"
    )
    await late(3)
    await checked(watch, 121)
    assert [kind for _, kind, _ in await watch.notes()] == ["opened", "closed", "opened"], (
        "it lasts"
    )


def test_an_incident_that_opened_and_closed_before_a_message_is_not_in_it() -> None:
    notes = [
        ("opened", {"id": "a"}),
        ("opened", {"id": "b"}),
        ("closed", {"id": "c"}),
        ("closed", {"id": "a"}),
    ]
    assert still_news(notes) == [("opened", {"id": "b"}), ("closed", {"id": "c"})]
    assert still_news([notes[0], notes[3]]) == []
    test = [("test", {"kind": "test"}), ("test", {"kind": "test"})]
    assert still_news(test) == test


async def test_an_outage_is_one_incident_and_its_slots_are_not_further_ones(
    ledger: Database,
) -> None:
    with clock.moved(START):
        loaded = await know(
            ledger, *(make_task(f"task{n}", "* * * * *", missed="skip") for n in range(40))
        )
        async with watching(ledger, ledger) as first, ledger.engine.begin() as connection:
            stop = update(tables.nodes).where(tables.nodes.c.id == first.node)
            await connection.execute(stop.values(stopped_at=clock.now(), seen_at=clock.now()))
        clock.advance(timedelta(minutes=30))
        second = Watching(ledger, ledger)
        await second.register()
        await fire(ledger, loaded, clock.now())
        await second.turn(3)
        assert await second.notes() == [], "its slots are counted first"
        await checked(second, 6)
        assert [row["kind"] for row in await second.incidents()] == ["down"]
        ((channel, kind, text),) = await second.notes()
    assert (channel, kind) == ("all", "opened")
    assert text == (
        "no service fired from 2026-03-10 02:00:00 to 02:30:00 UTC (30 minutes). 1,160 slots of "
        "40 tasks (task0, task1, task10, task11, task12, …) did not run; `batch night` lists "
        "them, `batch backfill` runs them."
    )


async def test_slots_that_a_living_service_has_not_fired_are_not_those_of_the_outage_after_it(
    ledger: Database,
) -> None:
    with clock.moved(START):
        loaded = await know(ledger, make_task("tick", "* * * * *", missed="skip"))
        clock.advance(timedelta(minutes=10))
        async with watching(ledger, ledger) as first, ledger.engine.begin() as connection:
            stop = update(tables.nodes).where(tables.nodes.c.id == first.node)
            await connection.execute(stop.values(stopped_at=clock.now(), seen_at=clock.now()))
        clock.advance(timedelta(minutes=2))
        second = Watching(ledger, ledger)
        await second.register()
        await fire(ledger, loaded, clock.now())
        await second.turn(3)
        (_, missed) = sorted(await second.incidents(), key=lambda row: row["kind"])
    assert (missed["kind"], missed["count"]) == ("missed", 11)
    assert missed["text"] == "11 slots up to 2026-03-10 02:11 UTC did not run: no service fired it"


async def test_nothing_from_before_the_first_watch_of_a_ledger_is_sent(ledger: Database) -> None:
    """An upgrade stops the old processes. Their slots belong to an outage, which nobody is told
    about.
    """
    with clock.moved(START):
        loaded = await know(
            ledger, *(make_task(f"task{n}", "* * * * *", missed="skip") for n in range(3))
        )
        old = Watching(ledger, ledger)
        await old.register()
        async with ledger.engine.begin() as connection:
            await connection.execute(update(tables.nodes).values(stopped_at=clock.now()))
        clock.advance(timedelta(minutes=30))
        new = Watching(ledger, ledger)
        await new.register()
        await fire(ledger, loaded, clock.now())
        await new.turn(3)
        assert [row["kind"] for row in await new.incidents()] == ["down"]
        assert await new.notes() == []


async def test_a_restart_within_a_minute_is_no_outage(ledger: Database) -> None:
    with clock.moved(START):
        async with watching(ledger, ledger) as first, ledger.engine.begin() as connection:
            stop = update(tables.nodes).where(tables.nodes.c.id == first.node)
            await connection.execute(stop.values(stopped_at=clock.now()))
        clock.advance(timedelta(seconds=50))
        second = Watching(ledger, ledger)
        await second.register()
        await second.turn(3)
        assert await second.incidents() == []


async def four_missed(ledger: Database, watch: Watching, policy: str) -> Mapping[str, Task]:
    """A task whose first slots were missed: its policy decides what becomes of them."""
    loaded = await know(ledger, make_task("load", "* * * * *", missed=policy))
    watch.later(300)
    await fire(ledger, loaded, clock.now())
    return loaded


async def test_slots_that_were_missed_without_an_outage_are_an_incident(
    ledger: Database, watch: Watching
) -> None:
    loaded = await four_missed(ledger, watch, "skip")
    await watch.turn(2)
    (incident,) = await opened(watch, "missed")
    assert (incident["task"], incident["count"]) == ("load", 4)
    await checked(watch)
    assert len(await opened(watch, "missed")) == 1
    fill = Backfill(ledger, ledger, Startable.of(loaded["load"]), "ann")
    await fill._make(
        await fill._decide([START + number * MINUTE for number in range(1, 5)]), after=None
    )
    await checked(watch)
    assert await opened(watch, "missed") == []


async def test_slots_that_a_living_service_did_not_fire_are_one_incident(
    ledger: Database, watch: Watching
) -> None:
    """Its message at the end says what did not run."""
    loaded = await know(ledger, make_task("load", "* * * * *", missed="skip"))
    now = watch.later(300)
    wrong = NotFired(now - 4 * MINUTE, "pid 12 (psql)", "slots are not fired: end that transaction")
    watch.watch.unfired = lambda: wrong
    await checked(watch)
    await fire(ledger, loaded, now)
    watch.watch.unfired = lambda: None
    await checked(watch)
    assert [row["kind"] for row in await watch.incidents()] == ["unfired"]
    (begin, end) = await watch.notes()
    assert begin == ("all", "opened", "slots are not fired: end that transaction")
    assert end[:2] == ("all", "closed")
    assert end[2] == (
        "a service lived, but slots were not fired, from 2026-03-10 02:01:00 to 02:05:20 UTC (4 "
        "minutes): their schedules were locked by pid 12 (psql). 4 slots of load did not run; "
        "`batch night` lists them, `batch backfill` runs them."
    )


async def test_slots_of_an_outage_in_which_the_ledger_could_be_read_are_one_incident(
    ledger: Database, watch: Watching
) -> None:
    """As on a disk that is full: the polls go on."""
    loaded = await know(
        ledger, *(make_task(name, "* * * * *", missed="skip") for name in ("extract", "load"))
    )
    watch.watch._outage.cause_for("engine", ledger, OSError("away"))
    now = watch.later(300)
    await fire(ledger, loaded, now)
    await watch.turn(2)
    await checked(watch)
    ((_, _, text),) = await watch.notes()
    assert text == (
        "no service fired from 2026-03-10 02:00:00 to 02:05:00 UTC (5 minutes): the ledger could "
        "not be used (its server can't be reached). 8 slots of extract, load did not run; `batch "
        "night` lists them, `batch backfill` runs them."
    )


async def test_slots_over_which_a_clock_was_set_are_one_incident(
    ledger: Database, watch: Watching
) -> None:
    loaded = await know(
        ledger, *(make_task(name, "* * * * *", missed="skip") for name in ("extract", "load"))
    )
    now = watch.later(3_600)
    reason = str(ClockStep(START, now))
    async with ledger.engine.begin() as connection:
        opened_schedules = await schedules.open_schedules(connection)
        over = MissedRange(START + MINUTE, START + 59 * MINUTE, 59, reason, Cause.OTHER)
        await missed_ranges.record(
            connection, [(opened_schedules[name], over) for name in loaded], now
        )
    await watch.turn(2)
    await checked(watch)
    ((_, _, text),) = await watch.notes()
    assert text == (
        "the clock was set forward from 2026-03-10 02:01:00 to 02:59:00 UTC (58 minutes). 118 "
        "slots of extract, load did not run; `batch night` lists them, `batch backfill` runs them."
    )


async def test_slots_that_ran_on_time_do_not_make_the_missed_ones_around_them_good(
    ledger: Database, watch: Watching
) -> None:
    loaded = await four_missed(ledger, watch, "skip")
    await watch.turn(2)
    for _ in range(10):
        watch.later(60)
        await fire(ledger, loaded, clock.now())
    watch.later(300)
    await fire(ledger, loaded, clock.now())
    assert [row["count"] for row in await rows(ledger, tables.missed)] == [4, 4]
    await checked(watch)
    assert len(await opened(watch, "missed")) == 1
    ranges = await rows(ledger, tables.missed)
    async with ledger.engine.begin() as connection:
        await missed_ranges.leave(
            connection, [ranges[0]["id"]], "ann", "No sales then.", clock.now()
        )
    await checked(watch)
    assert len(await opened(watch, "missed")) == 1
    async with ledger.engine.begin() as connection:
        await missed_ranges.leave(connection, [ranges[1]["id"]], "ann", "Nor then.", clock.now())
    await checked(watch)
    assert [row["closed_why"] for row in await watch.incidents(kind="missed")] == ["over"]


async def test_an_incident_of_missed_slots_closes_at_once_if_the_newest_was_caught_up(
    ledger: Database, watch: Watching
) -> None:
    await four_missed(ledger, watch, "once")
    await watch.turn(3)
    assert [row["closed_why"] for row in await watch.incidents(kind="missed")] == ["over"]


async def test_tasks_that_a_clock_ahead_has_fired_are_an_incident_until_they_are_resumed(
    ledger: Database, watch: Watching
) -> None:
    """Then each slot has one run: those that the clock has fired before keep theirs, and the others
    get one.
    """
    loaded = await know(
        ledger, make_task("load", "* * * * *", overlap="allow"), make_task("paused", "0 * * * *")
    )
    async with ledger.engine.begin() as connection:
        await pauses.pause(connection, "paused", "ann", loaded)
    await checked(watch)
    watch.later(3600)
    await watch.turn()
    await fire(ledger, loaded, clock.now())
    # Its schedule changes meanwhile.
    other = await know(ledger, make_task("load", "*/2 * * * *", overlap="allow"))
    before = {run["slot"]: run["id"] for run in await rows(ledger, task="load")}
    assert len(before) == 2, "one on time and one that is caught up"
    with clock.moved(START + timedelta(seconds=20)):
        assert await watch.poll(), "a clock that was set back wakes the watch"
        await watch.watch._turn()
        await checked(watch)
        (incident,) = await opened(watch, "clock")
        assert incident["text"] == (
            "the clock was ahead, up to 2026-03-10 03:00 UTC: 1 task fires again after 2026-03-10 "
            "03:00 UTC (load); `batch resume --ahead` lets them fire now"
        )
        async with ledger.engine.begin() as connection:
            assert list(await task_sync.set_back(connection)) == ["load"]
        await checked(watch)
        assert await opened(watch, "clock") == []
        for _ in range(65):
            clock.advance(MINUTE)
            await fire(ledger, other, clock.now())
        ran = {run["slot"]: run["id"] for run in await rows(ledger, task="load")}
        assert before.items() <= ran.items()
        assert sorted(ran.keys() - before.keys()) == [
            START + 2 * n * MINUTE for n in range(1, 33) if n != 30
        ]
        assert await rows(ledger, tables.missed, task="load") == []
        async with ledger.reader.connect() as connection:
            (account,) = [each async for each in accounts(connection, START, task="load")]
        assert account.is_complete
        assert account.counts[Kind.RUN] == account.slots == 32


async def test_slots_of_a_pause_are_no_incident(ledger: Database, watch: Watching) -> None:
    loaded = await know(ledger, make_task("load", "* * * * *"))
    async with ledger.engine.begin() as connection:
        await pauses.pause(connection, "load", "ann", loaded)
    watch.later(600)
    async with ledger.engine.begin() as connection:
        await pauses.resume(connection, "load")
    await watch.turn(3)
    assert await watch.incidents() == []


async def node_that_dies(ledger: Database) -> str:
    node = new_id()
    row = {"id": node, "host": "there", "pid": 7, "version": "1", "draining": False, "tasks": []}
    async with ledger.engine.begin() as connection:
        await nodes.register(
            connection, {**row, "started_at": clock.now(), "seen_at": clock.now(), "broken": []}
        )
    return node


async def test_a_run_that_harms_its_node_is_an_incident_while_it_waits_until_it_succeeds(
    ledger: Database, watch: Watching
) -> None:
    await know(ledger, make_task("load", None))
    node = await node_that_dies(ledger)
    run = await started(ledger, "load", node=node)
    async with ledger.engine.begin() as connection:
        await orphans.accuse(
            connection, node, run.id, "it blocked the event loop for 25 s, in ops.py line 96"
        )
        assert await orphans.rescue(connection, {node: 0}, clock.now()) == [node]
    (row,) = await rows(ledger, id=run.id)
    assert (row["state"], row["due_at"]) == ("retrying", clock.now() + timedelta(seconds=30))
    await watch.turn(2)
    (incident,) = await opened(watch, "failed")
    text = "it blocked the event loop for 25 s, in ops.py line 96: it goes on after 30 s"
    assert (incident["task"], incident["newest_run"], incident["text"]) == ("load", run.id, text)
    async with ledger.engine.begin() as connection:
        (claimed,) = await transitions.claim(
            connection, [run.id], NODE, clock.now() + timedelta(seconds=30)
        )
    await ended(ledger, run, RunState.SUCCEEDED, fingerprint=None)
    assert claimed.attempt - claimed.attempts_before == 1, "the wait has used up no attempt"
    await checked(watch)
    assert [row["closed_why"] for row in await watch.incidents(kind="failed")] == ["made_good"]


async def test_an_event_loop_that_stands_still_is_one_incident_and_its_runs_are_not_slow(
    ledger: Database, watch: Watching
) -> None:
    """A node that was frozen reports this once, in its first beat afterwards. That opens no
    incident.
    """
    await know(ledger, make_task("load", None, alerts=Alerts(slow_after=30)))
    node = await node_that_dies(ledger)
    await started(ledger, "load", node=node)

    async def beats(lag: float) -> list[str]:
        async with ledger.engine.begin() as connection:
            assert await nodes.beat(connection, node, lag)
        await checked(watch)
        return [row["text"] for row in await watch.incidents() if row["closed_at"] is None]

    assert await beats(0.1) == []
    clock.advance(timedelta(seconds=50))
    assert await beats(180.0) == []
    (text,) = await beats(190.0)
    assert text == (
        "a run has blocked the event loop of there (pid 7) for 3 minutes, so it answers nobody, "
        "and its runs do not go on: those of load. Restart it, or wait until it ends by itself "
        "(MAX_LOOP_BLOCK): then its log names the run and the line"
    )
    assert len(await beats(200.0)) == 1
    (slow,) = await beats(0.1)
    assert slow.startswith("it has run for ")


async def test_a_slow_run_whose_row_is_locked_is_reported_as_locked(
    ledger: Database, watch: Watching
) -> None:
    if ledger.kind == "sqlite":  # it has no locks of rows
        return
    await know(ledger, make_task("load", None, alerts=Alerts(slow_after=30)))
    run = await started(ledger, "load")
    async with ledger.engine.begin() as connection:
        await connection.execute(
            update(tables.runs).where(tables.runs.c.id == run.id).values(reason="mine")
        )
        await checked(watch, 40)
        (incident,) = await watch.incidents()
    assert re.search(r"its row is locked by pid \d+ .*; end that transaction", incident["text"]), (
        incident["text"]
    )


async def test_a_lost_node_is_an_incident_if_nobody_continues_its_runs(
    ledger: Database, watch: Watching
) -> None:
    await know(ledger, make_task("load", None))
    node = await node_that_dies(ledger)
    run = await started(ledger, "load", node=node)
    async with ledger.engine.begin() as connection:
        assert await orphans.rescue(connection, {node: 0}, clock.now()) == [node]
    await checked(watch, 30)
    assert await opened(watch, "node") == []
    await checked(watch, 31)
    (incident,) = await opened(watch, "node")
    assert (incident["subject"], incident["count"]) == (node, 1)
    assert incident["text"].startswith(
        "the node there (pid 7) was lost, and no other one goes on with its runs of load"
    )
    async with ledger.engine.begin() as connection:
        await connection.execute(
            update(tables.runs).where(tables.runs.c.id == run.id).values(state="cancelled")
        )
    await checked(watch)
    assert await opened(watch, "node") == []


async def test_a_lost_node_whose_runs_are_continued_is_not_an_incident(
    ledger: Database, watch: Watching
) -> None:
    node = await node_that_dies(ledger)
    async with ledger.engine.begin() as connection:
        await orphans.rescue(connection, {node: 0}, clock.now())
    await checked(watch, 61)
    await checked(watch, 61)
    assert await watch.incidents() == []


async def test_a_broken_file_is_an_incident_until_it_is_corrected(
    ledger: Database, watch: Watching
) -> None:
    broken = [{"source": "tasks/load.py", "error": "SyntaxError: invalid syntax", "task": "load"}]
    async with ledger.engine.begin() as connection:
        await nodes.record_broken(connection, watch.node, broken)
    await watch.turn(2)
    (incident,) = await opened(watch, "files")
    assert incident["text"] == "tasks/load.py can't be used: SyntaxError: invalid syntax"
    async with ledger.engine.begin() as connection:
        await nodes.record_broken(connection, watch.node, [])
    await watch.turn(2)
    assert await opened(watch, "files") == []


async def test_the_newest_verified_backup_may_become_too_old(
    ledger: Database, watch: Watching
) -> None:
    await know(ledger, make_task("backup"))
    await checked(watch, 2 * 86_400 - 11)
    assert await opened(watch, "backup") == []
    await checked(watch, 12)
    (incident,) = await opened(watch, "backup")
    assert incident["text"] == "there is no verified backup yet"
    good = {"name": "b1", "place": "backups", "taken_at": clock.now(), "verified_at": clock.now()}
    async with ledger.engine.begin() as connection:
        await connection.execute(insert(tables.backups).values(good | {"created_at": clock.now()}))
    await checked(watch)
    assert await opened(watch, "backup") == []


async def test_a_backup_of_which_a_check_fails_is_an_incident(
    ledger: Database, watch: Watching
) -> None:
    bad = {
        "name": "b1",
        "place": "backups",
        "taken_at": clock.now(),
        "failed_at": clock.now(),
        "failed_check": "crc",
    }
    async with ledger.engine.begin() as connection:
        await connection.execute(insert(tables.backups).values(bad | {"created_at": clock.now()}))
    await watch.turn(2)
    (incident,) = await opened(watch, "backup")
    assert incident["text"] == "the backup b1 is not usable: crc"


async def test_a_run_that_succeeded_with_nothing_done_is_an_incident(
    ledger: Database, watch: Watching
) -> None:
    await know(ledger, make_task("load"))
    run = await started(ledger, "load", START)
    await ended(
        ledger, run, RunState.SUCCEEDED, fingerprint="empty", reason="its result is not as expected"
    )
    await watch.turn(2)
    (incident,) = await opened(watch, "empty")
    assert (incident["task"], incident["text"]) == ("load", "its result is not as expected")
    watch.later(60)
    await succeeded(ledger, "load", clock.now())
    await checked(watch)
    assert await opened(watch, "empty") == []


async def test_items_that_an_attempt_put_into_quarantine_are_an_incident_although_it_is_tried_again(
    ledger: Database, watch: Watching
) -> None:
    await know(ledger, make_task("load"))
    run = await started(ledger, "load", START)
    await ended(ledger, run, RunState.RETRYING, fingerprint="quarantine", reason="ValueError: boom")
    await watch.turn(2)
    (incident,) = await opened(watch, "quarantine")
    assert (incident["task"], incident["text"]) == ("load", "it has put items into quarantine")


async def test_a_function_of_a_limit_that_fails_for_ten_minutes_is_an_incident_until_it_works(
    ledger: Database, watch: Watching
) -> None:
    does_fail = True

    def plan_of(tenant: str) -> int:
        if does_fail:
            raise ConnectionError("billing is away")
        return 3

    async def mail(self: Any, tenant: str = "acme") -> None: ...

    loaded = await know(
        ledger, make_task("mail", None, mail, limit=Limit(plan_of, key="tenant", default=1))
    )
    await insert_runs(ledger, new("mail", exclusive="mail[tenant=acme]", params={"tenant": "acme"}))
    functions = LimitFunctions(ledger, loaded, lambda: None, Outage())

    async def minutes_later(number: int) -> list[dict[str, Any]]:
        for _ in range(number):
            watch.later(61)
            await functions.look()
        await checked(watch, 5)
        return await opened(watch, "limit")

    await functions.look()
    assert await minutes_later(9) == []
    [incident] = await minutes_later(2)
    assert incident["task"] == "mail"
    assert incident["text"] == (
        "the function of its limit has failed for 11 minutes for 1 key, whose last numbers hold: "
        "ConnectionError: billing is away"
    )
    does_fail = False
    assert await minutes_later(1) == []


async def test_a_pause_without_an_end_that_lasts_for_long_may_have_been_forgotten(
    ledger: Database, watch: Watching
) -> None:
    loaded = await know(ledger, *(make_task(name) for name in ("load", "brief", "a", "b")))
    operations = Operations(ledger, ledger, lambda: Loaded({}, []), get_settings(), are_ready=True)
    await operations(PauseTask(name="load"))
    await operations(PauseTask(name="brief", until=START + timedelta(days=20)))
    await operations(PauseTasks(all_tasks=True))
    await checked(watch, timedelta(days=6).total_seconds())
    assert await opened(watch, "paused") == []
    await checked(watch, timedelta(days=1).total_seconds() + 1)
    window, own = sorted(await opened(watch, "paused"), key=lambda row: row["task"])
    assert own["task"] == "load" and "for 7 days; `batch resume load` lets it fire" in own["text"]
    assert (window["task"], window["count"]) == ("", 1)  # one incident for both tasks of it
    assert "many tasks are paused by" in window["text"]
    await operations(ResumeTask(name="load"))
    await checked(watch)
    assert [row["id"] for row in await opened(watch, "paused")] == [window["id"]]
    assert len(loaded) == 4


# What is held back.


async def test_nothing_is_sent_about_a_muted_task_until_the_end_of_the_mute(
    ledger: Database, watch: Watching
) -> None:
    await know(ledger, make_task("load"))
    async with ledger.engine.begin() as connection:
        muted = update(tables.tasks).where(tables.tasks.c.name == "load")
        await connection.execute(muted.values(muted_until=clock.now() + timedelta(hours=2)))
        await wakes.catalog_changed(connection)
    await failed(ledger, "load", START)
    await watch.turn(2)
    assert (len(await watch.incidents()), await watch.notes()) == (1, [])
    await checked(watch, 7_201)
    assert [kind for _, kind, _ in await watch.notes()] == ["opened"]


async def test_a_planned_mute_of_all_tasks_holds_back_what_is_about_no_task_too(
    ledger: Database, watch: Watching
) -> None:
    await know(ledger, make_task("load"), make_task("other", tags=("finance",)))
    operations = Operations(ledger, ledger, lambda: Loaded({}, []), get_settings(), are_ready=True)
    begin, end = START + timedelta(hours=1), START + timedelta(hours=3)
    await operations(MuteTasks(all_tasks=True, begins_at=begin, until=end))
    await operations(MuteTasks(tag="finance", until=end))
    await failed(ledger, "load", START)
    await failed(ledger, "other", START)
    await watch.turn(2)
    assert len(await watch.notes()) == 1  # about load: the mute of all tasks has not begun
    await checked(watch, 3_700)
    async with ledger.engine.begin() as connection:
        opening = Opening(IncidentKind.UNACCOUNTED, "a slot is gone", clock.now())
        await incidents.open_or_continue(connection, [opening], clock.now())
    await checked(watch)
    assert len(await watch.notes()) == 1
    await checked(watch, (end - clock.now()).total_seconds() + 1)
    assert sorted(row["kind"] for row in await watch.incidents()) == [
        "failed",
        "failed",
        "unaccounted",
    ]
    assert len(await watch.notes()) == 3


async def test_what_opens_and_closes_in_quiet_hours_is_not_sent(
    ledger: Database, watch: Watching
) -> None:
    await know(
        ledger, make_task("load", timezone="Europe/Berlin", alerts=Alerts(quiet="22:00-07:00"))
    )
    await failed(ledger, "load", START)
    await watch.turn(2)
    watch.later(60)
    await succeeded(ledger, "load", clock.now())
    await checked(watch)
    await failed(ledger, "load", clock.now(), fingerprint="1:other")
    await watch.turn(2)
    assert await watch.notes() == []
    watch.later((datetime(2026, 3, 10, 6, 0, 1, tzinfo=UTC) - clock.now()).total_seconds())
    await watch.turn(2)
    assert [kind for _, kind, _ in await watch.notes()] == ["opened"]


async def test_an_error_is_told_after_so_many_failures(ledger: Database, watch: Watching) -> None:
    await know(ledger, make_task("load", alerts=Alerts(after_failures=3, to=("payments",))))
    for number in range(3):
        assert await watch.notes() == []
        await failed(ledger, "load", START + number * MINUTE)
        await watch.turn(2)
    assert await watch.notes() == [("payments", "opened", "ValueError: boom")]


async def test_an_error_is_over_after_so_many_successes_in_a_row(
    ledger: Database, watch: Watching
) -> None:
    await know(ledger, make_task("load", alerts=Alerts(close_after=2)))
    await failed(ledger, "load", START)
    await watch.turn()
    await checked(watch)
    await succeeded(ledger, "load", clock.now())
    await checked(watch)
    assert len(await opened(watch, "failed")) == 1
    await succeeded(ledger, "load", clock.now())
    await checked(watch)
    assert await opened(watch, "failed") == []


async def test_an_open_incident_is_told_again_if_the_setting_asks_for_it(ledger: Database) -> None:
    with clock.moved(START):
        async with watching(ledger, ledger, **asdict(Thresholds(repeat=3_600))) as watch:
            await failed(ledger, "load", START)
            await watch.turn(2)
            await checked(watch, 3_601)
            assert [kind for _, kind, _ in await watch.notes()] == ["opened", "repeated"]


async def test_many_different_errors_of_a_task_are_few_incidents(
    ledger: Database, watch: Watching
) -> None:
    for number in range(120):
        await failed(ledger, "load", START + number * MINUTE, fingerprint=f"1:{number:03}")
    await watch.turn(2)
    incidents = await watch.incidents()
    assert len(incidents) == 51
    (more,) = [row for row in incidents if row["fingerprint"] == "more"]
    assert more["count"] == 70


async def test_after_an_outage_a_watch_that_another_node_has_taken_over_says_that_it_can_work(
    watch: Watching,
) -> None:
    await watch.turn(2)
    other = Watching(watch.ledger, watch.ledger)
    await other.register()
    outage = other.watch._outage
    assert not await other.poll(), "the watch of the first node is enough"
    outage.cause_for("watch", watch.ledger, OSError("refused"))
    assert await other.poll()
    await other.watch._turn()
    outage.over_for("watch")  # as its loop does after a turn
    assert not await other.poll() and not other.watch.holds
