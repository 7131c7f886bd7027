"""Maintenance windows: many tasks are paused at once, now or later, and fire again after it."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import select

from batch_system import clock
from batch_system.batch.firing import apscheduler, pauses, task_sync
from batch_system.batch.ledger import database_time, maintenance, tables
from batch_system.batch.nodes import ledger_poll
from batch_system.batch.tasks.registry import Task
from batch_system.database.engine import Database
from batch_system.errors import InvalidParameters, UnknownMaintenance
from batch_system.operations.asking.context import Loaded
from batch_system.operations.operations import Operations
from batch_system.settings.reading import get_settings
from batch_system.verbs.access import ListChanges
from batch_system.verbs.maintenance import EndMaintenance, ListMaintenance, PauseTasks
from batch_system.verbs.tasks import PauseTask, ResumeTask
from tests.batch.ledger_world import NODE, fire, know, make_task, rows
from tests.batch.test_schedule_sync import Sync, at_start

START = datetime(2026, 3, 10, 12, 0, 30, tzinfo=UTC)
MINUTE = timedelta(minutes=1)


@pytest.fixture(autouse=True)
def still_clock() -> Iterator[None]:
    with clock.moved(START):
        yield


@pytest.fixture
def operations(ledger: Database) -> Operations:
    return Operations(ledger, ledger, lambda: Loaded({}, []), get_settings(), are_ready=True)


def minute(number: int) -> datetime:
    """The slot of the tasks that is the first one after START, or a later one."""
    return (START + number * MINUTE).replace(second=0)


async def turn(sync: Sync, loaded: dict[str, Task], at: datetime) -> None:
    """Move the clock, and let the service do what is due then."""
    clock.advance(at - clock.now())
    await poll(sync)
    await fire(sync.ledger, loaded, at)


async def poll(sync: Sync) -> None:
    async with sync.ledger.reader.connect() as connection:
        sync.schedules.on_changes(await ledger_poll.read(connection, NODE))
    await sync.schedules._refresh()


def is_held(sync: Sync, name: str) -> bool:
    """Whether the job of the task fires nothing."""
    job = sync.schedules._jobs.get_job(name)
    assert job is not None
    return bool(job.trigger.is_paused)


async def paused(ledger: Database) -> dict[str, datetime | None]:
    """The tasks that are paused, each with the end of its pause."""
    listed = await rows(ledger, tables.tasks)
    return {row["name"]: row["paused_until"] for row in listed if row["paused_at"] is not None}


async def slots_of(ledger: Database, name: str) -> list[datetime]:
    query = select(tables.runs.c.slot).where(tables.runs.c.task == name)
    async with ledger.reader.connect() as connection:
        return list((await connection.execute(query.order_by(tables.runs.c.slot))).scalars())


async def missed_of(ledger: Database, name: str) -> list[tuple[str, int, datetime, datetime]]:
    return [
        (row["reason"], row["count"], row["first_slot"], row["last_slot"])
        for row in await rows(ledger, tables.missed, task=name)
    ]


async def test_a_planned_window_holds_the_slot_at_its_beginning_and_fires_the_one_at_its_end(
    ledger: Database, operations: Operations
) -> None:
    loaded = await know(ledger, make_task("tick", tags=("nightly",)), make_task("tock"))
    sync = await at_start(ledger, loaded)
    window = await operations(
        PauseTasks(tag="nightly", begins_at=minute(3), until=minute(5), note="new disk")
    )
    assert (window.state, window.tasks, window.is_new) == ("planned", 1, True)
    await poll(sync)
    for at in (minute(1), minute(2), minute(3) - timedelta(seconds=5)):
        await turn(sync, loaded, at)
    assert await paused(ledger) == {"tick": minute(5)}  # written, and not in force yet
    for at in (minute(3), minute(4)):
        await turn(sync, loaded, at)
    assert [each.state for each in (await operations(ListMaintenance())).windows] == ["now"]
    for at in (minute(5), minute(6)):
        await turn(sync, loaded, at)
    assert await slots_of(ledger, "tick") == [minute(number) for number in (1, 2, 5, 6)]
    assert len(await slots_of(ledger, "tock")) == 6
    (missed,) = await missed_of(ledger, "tick")
    assert missed[1:] == (2, minute(3), minute(4)) and missed[0].startswith("paused by ")
    assert (await operations(ListMaintenance())).windows == []
    events = (await operations(ListChanges(action="maintenance.pause"))).changes
    assert [(event.target, event.note) for event in events] == [
        ("the tasks with the tag nightly", "new disk")
    ]


async def test_a_slot_a_few_seconds_before_a_planned_window_is_fired(
    ledger: Database, operations: Operations
) -> None:
    loaded = await know(ledger, make_task("tick"))
    sync = await at_start(ledger, loaded)
    await operations(PauseTasks(all_tasks=True, begins_at=minute(1) + timedelta(seconds=4)))
    await poll(sync)
    await turn(sync, loaded, minute(1) - timedelta(seconds=2))
    assert await paused(ledger) == {"tick": None}
    await turn(sync, loaded, minute(1))
    await turn(sync, loaded, minute(2))
    assert await slots_of(ledger, "tick") == [minute(1)]


async def test_a_slot_before_a_planned_window_is_fired_by_its_job_or_later_and_never_held(
    ledger: Database, operations: Operations
) -> None:
    loaded = await know(ledger, make_task("tick"))
    sync = await at_start(ledger, loaded)
    apscheduler.add_jobs(sync.schedules._jobs, loaded.values())
    begin = minute(2) + timedelta(seconds=4)
    await operations(PauseTasks(all_tasks=True, begins_at=begin, until=minute(4)))
    await poll(sync)
    await turn(sync, loaded, minute(2) - timedelta(seconds=2))
    assert await paused(ledger) == {"tick": minute(4)}
    assert not is_held(sync, "tick")
    await turn(sync, loaded, begin + timedelta(seconds=1))  # late: the slot was two seconds ago
    assert is_held(sync, "tick")
    for at in (begin + timedelta(seconds=2), minute(3), minute(4)):
        await turn(sync, loaded, at)
    assert await slots_of(ledger, "tick") == [minute(1), minute(2), minute(4)]
    (missed,) = await missed_of(ledger, "tick")
    assert missed[1:] == (1, minute(3), minute(3)) and missed[0].startswith("paused by ")


async def test_slots_that_nobody_fired_before_a_window_are_missed_and_not_paused(
    ledger: Database, operations: Operations
) -> None:
    loaded = await know(ledger, make_task("tick"))
    sync = await at_start(ledger, loaded)
    await turn(sync, loaded, minute(1))
    begin = minute(2) + timedelta(seconds=4)
    await operations(PauseTasks(all_tasks=True, begins_at=begin, until=minute(4)))
    await poll(sync)
    clock.advance(minute(2) - timedelta(seconds=2) - clock.now())
    await poll(sync)
    assert await paused(ledger) == {"tick": minute(4)}
    clock.advance(minute(5) - clock.now())  # all services were gone until the window was over
    await poll(sync)
    await turn(sync, loaded, minute(5))
    missed = await missed_of(ledger, "tick")
    assert [(reason.partition(" by ")[0], number) for reason, number, *_ in missed] == [
        ("no service fired it", 1),
        ("paused", 1),
    ]
    assert await slots_of(ledger, "tick") == [minute(1), minute(4), minute(5)]


async def test_a_window_that_passed_while_no_service_was_running_holds_its_slots_all_the_same(
    ledger: Database, operations: Operations
) -> None:
    loaded = await know(ledger, make_task("tick", missed="all"))
    await operations(PauseTasks(all_tasks=True, begins_at=minute(2), until=minute(4)))
    clock.advance(minute(5) - clock.now())
    sync = Sync(ledger, loaded)
    await sync.schedules.open()
    await turn(sync, loaded, minute(5))
    await turn(sync, loaded, minute(6))
    assert await slots_of(ledger, "tick") == [minute(number) for number in (1, 4, 5, 6)]
    (missed,) = await missed_of(ledger, "tick")
    assert missed[1:] == (2, minute(2), minute(3))


async def test_one_task_of_a_window_can_be_resumed_and_a_pause_of_its_own_outlasts_the_window(
    ledger: Database, operations: Operations
) -> None:
    loaded = await know(ledger, *(make_task(name) for name in ("free", "held", "mine", "taken")))
    sync = await at_start(ledger, loaded)
    await operations(PauseTask(name="mine", until=minute(9)))
    window = await operations(PauseTasks(all_tasks=True))
    assert (window.tasks, window.state) == (4, "now")
    await operations(ResumeTask(name="free"))
    taken = await operations(PauseTask(name="taken", until=minute(8), note="needs another day"))
    assert taken.is_new
    clock.advance(timedelta(seconds=1))
    await know(ledger, make_task("added"))
    assert await paused(ledger) == {
        "added": None,
        "held": None,
        "mine": minute(9),
        "taken": minute(8),
    }
    await operations(EndMaintenance(window=window.id, note="done early"))
    await poll(sync)
    assert sync.schedules._woken.is_set()  # it need not wait for the next poll
    await poll(sync)
    assert await paused(ledger) == {"mine": minute(9), "taken": minute(8)}
    await fire(ledger, loaded, minute(1))
    assert await slots_of(ledger, "held") == await slots_of(ledger, "free") == [minute(1)]
    again = await operations(EndMaintenance(window=window.id))
    assert again.state == "over"
    open_one = await operations(PauseTasks(all_tasks=True))
    async with ledger.engine.begin() as connection:
        assert await maintenance.prune(connection, minute(60)) == 1  # what is old is deleted
    assert (await operations(ListMaintenance())).windows[0].id == open_one.id


async def test_a_task_stays_paused_until_the_last_window_about_it_is_over(
    ledger: Database, operations: Operations
) -> None:
    loaded = await know(ledger, make_task("tick", tags=("nightly",)))
    sync = await at_start(ledger, loaded)
    await operations(PauseTask(name="tick", until=minute(2)))
    await operations(PauseTasks(tag="nightly", until=minute(3)))
    await operations(PauseTasks(pool="default", until=minute(4)))
    longer = await operations(PauseTasks(pool="default", until=minute(5)))
    assert (longer.is_new, longer.ends_at) == (False, minute(5))
    for number in range(1, 7):
        await turn(sync, loaded, minute(number))
    assert await slots_of(ledger, "tick") == [minute(5), minute(6)]
    assert sum(count for _, count, _, _ in await missed_of(ledger, "tick")) == 4


async def test_bad_input_is_refused_in_words_and_changes_nothing(
    ledger: Database, operations: Operations
) -> None:
    await know(ledger, make_task("tick", tags=("nightly",)))
    refused = {
        "name either a tag, a pool, or all tasks": PauseTasks(tag="nightly", all_tasks=True),
        "no task has the tag nigthly; there are: nightly": PauseTasks(tag="nigthly"),
        "no task is of the pool gpu; there are: default": PauseTasks(pool="gpu"),
        "the end: allowed is an instant after now and after the beginning": PauseTasks(
            all_tasks=True, begins_at=minute(9), until=minute(9)
        ),
    }
    for message, asked in refused.items():
        with pytest.raises(InvalidParameters, match=message):
            await operations(asked)
    with pytest.raises(UnknownMaintenance):
        await operations(EndMaintenance(window="01a230e3-57e3-7352-ac77-221a8d380bd2"))
    assert (await operations(ListMaintenance())).windows == []
    assert await paused(ledger) == {}


async def test_two_nodes_begin_a_window_once(ledger: Database, operations: Operations) -> None:
    loaded = await know(ledger, make_task("tick"))
    await operations(PauseTasks(all_tasks=True, begins_at=minute(1)))
    clock.advance(minute(1) - clock.now())
    begun = [await pauses.begin_due(ledger, loaded, node) for node in (NODE, tables.new_id())]
    assert [len(windows) for windows in begun] == [1, 0]
    async with ledger.engine.begin() as connection:
        now = await database_time.now_of(connection)
        await task_sync.record_tasks(connection, loaded, now)  # known already: it joins nothing
    assert await paused(ledger) == {"tick": None}
