"""Missed slots that a person leaves as they are: Night no longer asks people to watch them, and
says who decided it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import pytest

from batch_system import clock
from batch_system.batch.ledger import schedules, tables
from batch_system.batch.ledger.missed_ranges import Cause, MissedRange, record
from batch_system.config import get_settings
from batch_system.database.engine import Database
from batch_system.errors import InvalidParameters, UnknownTask, WrongState
from batch_system.operations.asking.actor import Actor
from batch_system.operations.asking.context import Loaded
from batch_system.operations.bulks import bulk, outage_backfills
from batch_system.operations.operations import Operations
from batch_system.verbs.access import ListChanges
from batch_system.verbs.slots import LeaveSlots, ReopenSlots
from tests.batch.ledger_world import fire, know, make_task, rows, until_waiting
from tests.incidents.watching import Watching
from tests.night.conftest import START
from tests.night.test_night import night

MINUTE = timedelta(minutes=1)
NOTE = "planned maintenance"


@pytest.fixture
def mara(ledger: Database) -> Operations:
    operations = Operations(ledger, ledger, lambda: Loaded({}, []), get_settings(), are_ready=True)
    return operations.by(Actor("mara"))


@pytest.fixture
async def loaded(ledger: Database, watch: Watching) -> Mapping[str, Any]:
    """Two tasks of which nine slots each were missed."""
    known = await know(
        ledger, *(make_task(name, "* * * * *", missed="skip") for name in ("load", "tick"))
    )
    watch.later(600)
    await fire(ledger, known, clock.now())
    await _finish(ledger)
    await watch.turn(2)
    return known


async def _finish(ledger: Database) -> None:
    async with ledger.engine.begin() as connection:
        await connection.execute(
            tables.runs.update().values(state="succeeded", finished_at=clock.now())
        )


@pytest.mark.usefixtures("loaded")
async def test_slots_that_were_left_as_they_are_need_no_further_watching(
    watch: Watching, mara: Operations
) -> None:
    answer = await night(watch, mara)
    assert (answer.level, answer.headline) == ("watch", "Nothing failed. 18 slots were missed.")
    load, tick = answer.did_not_run
    assert (load.task, load.first_slot, load.last_slot) == (
        "load",
        START + MINUTE,
        START + 9 * MINUTE,
    )
    assert load.first_slot is not None and load.last_slot is not None
    left = await mara(
        LeaveSlots(since=load.first_slot, until=load.last_slot, note=NOTE, task="load", slots=9)
    )
    assert (left.slots, left.tasks) == (9, {"load": 9})
    answer = await night(watch, mara)
    assert answer.headline == "Nothing failed. 9 slots were missed."
    load, tick = answer.did_not_run
    assert (load.left_by, load.left_note, tick.left_by) == ("mara", NOTE, None)
    left = await mara(
        LeaveSlots(since=load.first_slot or START, until=load.last_slot or START, note=NOTE)
    )
    assert left.tasks == {"tick": 9}
    answer = await night(watch, mara)
    assert (answer.level, answer.slots.missed) == ("calm", 18)
    changes = (await mara(ListChanges(action="slots.leave"))).changes
    assert [(change.actor, change.task, change.note) for change in changes] == [
        ("mara", name, NOTE) for name in ("tick", "load")
    ]
    assert [change.kind for change in answer.changes if change.actor == "mara"] == [
        "slots.leave"
    ] * 2
    assert (await mara(ReopenSlots(since=START, until=clock.now()))).slots == 18
    assert (await night(watch, mara)).level == "watch"


@pytest.mark.usefixtures("loaded")
async def test_slots_that_were_missed_later_are_not_left_with_a_range(
    ledger: Database, mara: Operations
) -> None:
    await mara(LeaveSlots(since=START, until=clock.now(), note=NOTE, task="tick"))
    async with ledger.engine.begin() as connection:
        opened = (await schedules.open_schedules(connection))["tick"]
        begin = START + 10 * MINUTE
        more = MissedRange(begin, begin + MINUTE, 2, "the service was down", Cause.DOWN)
        await record(connection, [(opened, more)], clock.now())
    left = {
        row["last_slot"]: row["left_by"] for row in await rows(ledger, tables.missed, task="tick")
    }
    assert left == {START + 9 * MINUTE: "mara", START + 11 * MINUTE: None}


@pytest.mark.usefixtures("loaded")
async def test_only_the_slots_that_the_person_has_seen_are_left(mara: Operations) -> None:
    """A range that has grown ends after the interval."""
    seen = await mara(LeaveSlots(since=START, until=clock.now(), dry_run=True))
    assert seen.tasks == {"load": 9, "tick": 9}
    with pytest.raises(WrongState, match="18 such slots by now, not 9"):
        await mara(LeaveSlots(since=START, until=clock.now(), note=NOTE, slots=9))
    assert (await mara(LeaveSlots(since=START, until=START + 8 * MINUTE, note=NOTE))).slots == 0
    assert (
        await mara(LeaveSlots(since=START + 2 * MINUTE, until=clock.now(), note=NOTE))
    ).slots == 0
    assert (await mara(ListChanges(action="slots.leave"))).changes == []
    assert (await mara(LeaveSlots(since=START, until=clock.now(), note=NOTE, slots=18))).slots == 18
    assert (
        await mara(LeaveSlots(since=START, until=clock.now(), note=NOTE, slots=18))
    ).slots == 0  # sent twice


@pytest.mark.parametrize("ledger_url", ["postgresql"], indirect=True)
@pytest.mark.usefixtures("loaded")
async def test_a_range_that_is_being_noticed_can_be_left_and_reopened_as_well(
    ledger: Database, mara: Operations
) -> None:
    for does in (
        mara(LeaveSlots(since=START, until=clock.now(), note=NOTE)),
        mara(ReopenSlots(since=START, until=clock.now())),
    ):
        async with ledger.engine.begin() as noticing:
            await noticing.execute(tables.missed.update().values(unnoticed=None))
            changing = asyncio.create_task(does)
            await until_waiting(ledger, 1)
        assert (await changing).slots == 18


@pytest.mark.usefixtures("loaded")
async def test_a_note_and_a_known_task_are_needed(mara: Operations) -> None:
    for note in (None, "no", "x" * 501):
        with pytest.raises(InvalidParameters, match="3 to 500 characters"):
            await mara(LeaveSlots(since=START, until=clock.now(), note=note))
    with pytest.raises(UnknownTask):
        await mara(LeaveSlots(since=START, until=clock.now(), note=NOTE, task="nothing"))


async def test_slots_of_a_pause_are_not_left_because_a_person_chose_it(
    ledger: Database, mara: Operations
) -> None:
    await know(ledger, make_task("load", "* * * * *"))
    async with ledger.engine.begin() as connection:
        opened = (await schedules.open_schedules(connection))["load"]
        paused = MissedRange(START, START + MINUTE, 2, "paused by ann", Cause.PAUSED)
        await record(connection, [(opened, paused)], START)
    assert (await mara(LeaveSlots(since=START, until=START + MINUTE, note=NOTE))).slots == 0


@pytest.mark.usefixtures("loaded")
async def test_the_slots_of_several_tasks_are_backfilled_together(
    ledger: Database, mara: Operations
) -> None:
    """One preview for all of them, and an event of the audit for each task."""
    await know(ledger, make_task("other", "* * * * *"))
    plan = await outage_backfills.plan(mara.context, START, clock.now())
    planned = {
        each.task: (each.preview and each.preview.count, each.first, each.last)
        for each in plan.tasks
    }
    assert planned == dict.fromkeys(("load", "tick"), (9, START + MINUTE, START + 9 * MINUTE))
    assert (plan.count, plan.more) == (18, 0)
    for _ in range(2):  # sent twice
        begun = await outage_backfills.begin(mara.context, plan.previews, NOTE)
        assert [each.started_at is not None for each in begun] == [True, True]
    for each in begun:
        await bulk.carry_out(mara.context, each.id)
    made = [row for row in await rows(ledger, tables.runs) if row["origin"] == "backfill"]
    assert {(row["task"], row["slot"]) for row in made} == {
        (task, START + number * MINUTE) for task in ("load", "tick") for number in range(1, 10)
    }
    changes = (await mara(ListChanges(action="bulk.backfill"))).changes
    assert {
        (each.after["request"]["task"], each.after["count"], each.note) for each in changes
    } == {
        ("load", 9, NOTE),
        ("tick", 9, NOTE),
    }
    assert len(changes) == 2


@pytest.mark.usefixtures("loaded")
async def test_a_task_that_can_t_be_backfilled_is_named_with_the_reason(
    ledger: Database, mara: Operations
) -> None:
    plan = await outage_backfills.plan(mara.context, START, clock.now())
    async with ledger.engine.begin() as connection:
        of_tick = tables.schedules.c.task == "tick"
        await connection.execute(
            tables.schedules.update().where(of_tick).values(valid_until=clock.now())
        )
    begun = await outage_backfills.begin(mara.context, plan.previews)
    assert {each.task: each.started_at is not None for each in begun} == {
        "load": True,
        "tick": False,
    }
    plan = await outage_backfills.plan(mara.context, START, clock.now())
    why = {each.task: each.why for each in plan.tasks}
    assert (why["load"], plan.count) == (None, 9)
    assert "the ledger has no schedule for it" in (why["tick"] or "")
