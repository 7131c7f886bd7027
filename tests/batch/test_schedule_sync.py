"""The schedule sync reads the cursors of due schedules from the ledger, unless this process has
fired them.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import event

from batch_system import clock
from batch_system.batch.cron.cron import schedule
from batch_system.batch.firing import pauses, task_sync
from batch_system.batch.ledger import tables
from batch_system.batch.ledger.people.access_tables import events
from batch_system.batch.ledger.tables import new_id
from batch_system.batch.nodes.ledger_poll import LedgerChanges
from batch_system.batch.tasks.registry import Task
from batch_system.database.engine import Database
from tests.batch.ledger_world import NODE, fire, know, make_task, refresh, rows, schedule_sync_of

START = datetime(2026, 3, 10, 12, 0, 30, tzinfo=UTC)
MINUTE = timedelta(minutes=1)


@pytest.fixture(autouse=True)
def still_clock() -> Iterator[None]:
    with clock.moved(START):
        yield


class Sync:
    """A schedule sync whose refreshes the test starts. `notified`: the tasks that it has asked to
    have fired.
    """

    def __init__(self, ledger: Database, loaded: dict[str, Task]) -> None:
        self.ledger = ledger
        self.notified: list[str] = []
        self.schedules = schedule_sync_of(ledger, loaded, NODE, self._notify)
        self._reads = 0
        event.listen(ledger.reader.sync_engine, "before_cursor_execute", self._see)

    def _notify(self, name: str, slot: datetime | None = None, /) -> None:
        self.notified.append(name)

    def _see(self, connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        self._reads += "FROM batch_schedules" in statement

    async def reads_at(self, now: datetime) -> int:
        """Refresh when a poll has read this time from the database. Returns how often schedules
        were read by it.
        """
        reads_before = self._reads
        self.schedules.on_changes(LedgerChanges(now=now, is_claimable=False, catalog=1))
        await self.schedules._refresh()
        return self._reads - reads_before


async def at_start(ledger: Database, loaded: dict[str, Task]) -> Sync:
    sync = Sync(ledger, loaded)
    await refresh(sync.schedules)
    await sync.reads_at(START)
    return sync


def go_to_slot(number: int) -> datetime:
    """Move the clock to a slot of the tasks; the first one after START has the number 1. Returns
    its instant.
    """
    slot = (START + number * MINUTE).replace(second=0)
    clock.advance(slot - clock.now())
    return slot


async def test_schedules_that_this_process_has_fired_are_not_read(ledger: Database) -> None:
    loaded = await know(ledger, make_task("tick"), make_task("tock"))
    sync = await at_start(ledger, loaded)
    for n in range(1, 4):
        slot = go_to_slot(n)
        fired = await fire(ledger, loaded, slot)
        assert sorted(fired.handled) == ["tick", "tock"]
        sync.schedules.on_fired(fired.handled, slot)
        assert await sync.reads_at(slot) == 0
    assert sync.notified == []


async def test_a_due_schedule_that_nobody_has_fired_is_read_and_fired(ledger: Database) -> None:
    loaded = await know(ledger, make_task("tick"), make_task("tock"))
    sync = await at_start(ledger, loaded)
    slot = go_to_slot(1)
    await fire(ledger, {"tick": loaded["tick"]}, slot)
    sync.schedules.on_fired(["tick"], slot)
    assert await sync.reads_at(slot) == 1
    assert sync.notified == ["tock"]


async def test_a_slot_that_is_due_since_the_firing_is_read(ledger: Database) -> None:
    """The firing was told up to an earlier slot than the one that is due now."""
    loaded = await know(ledger, make_task("tick"))
    sync = await at_start(ledger, loaded)
    first, second = go_to_slot(1), go_to_slot(2)
    await fire(ledger, loaded, first)
    sync.schedules.on_fired(["tick"], first)
    assert await sync.reads_at(second) == 1
    assert sync.notified == ["tick"]


async def test_another_nodes_firing_is_read_from_its_cursor(ledger: Database) -> None:
    loaded = await know(ledger, make_task("tick"))
    sync = await at_start(ledger, loaded)
    slot = go_to_slot(1)
    await fire(ledger, loaded, slot, node=new_id())
    assert await sync.reads_at(slot) == 1
    assert await sync.reads_at(slot) == 0
    assert sync.notified == []


async def test_a_pause_ends_by_itself_and_the_slot_at_its_end_is_fired(ledger: Database) -> None:
    """The code that fires the slot leaves the pause to the schedule sync, whichever of them is
    first; that ends it in the ledger.
    """
    loaded = await know(ledger, make_task("tick"), make_task("tock", None))
    sync = await at_start(ledger, loaded)
    end = (START + 3 * MINUTE).replace(second=0)
    for name in loaded:
        async with ledger.engine.begin() as connection:
            await pauses.pause(connection, name, "ann", loaded, NODE, end + MINUTE)
        async with ledger.engine.begin() as connection:  # the end of a pause can be changed
            paused = await pauses.pause(connection, name, "bob", loaded, NODE, end)
        assert (paused.by, paused.until) == ("ann", end + MINUTE) if paused else False
    await refresh(sync.schedules)
    for n in (1, 2, 3):
        await fire(ledger, loaded, go_to_slot(n))
        assert await rows(ledger) == []
    assert [row["paused_until"] for row in await rows(ledger, tables.tasks)] == [end, end]
    sync.notified.clear()
    await sync.reads_at(end)
    assert sync.notified == ["tick"]
    assert {
        row["paused_at"] or row["paused_until"] for row in await rows(ledger, tables.tasks)
    } == {None}
    await fire(ledger, loaded, end)
    assert [run["slot"] for run in await rows(ledger)] == [end]
    missed = await rows(ledger, tables.missed)
    assert sum(each["count"] for each in missed) == 2 and {each["reason"] for each in missed} == {
        "paused by ann"
    }
    resumed = await rows(ledger, events, action="task.resume")
    assert sorted((each["task"], each["actor"]) for each in resumed) == [
        ("tick", f"node {NODE}"),
        ("tock", f"node {NODE}"),
    ]


async def test_of_a_pause_that_has_ended_while_no_service_ran_only_its_own_slots_are_paused(
    ledger: Database,
) -> None:
    loaded = await know(ledger, make_task("tick", missed="all"))
    end = (START + 3 * MINUTE).replace(second=0)
    async with ledger.engine.begin() as connection:
        await pauses.pause(connection, "tick", "ann", loaded, NODE, end)
    now = go_to_slot(5)
    sync = await at_start(ledger, loaded)
    await sync.reads_at(now)
    await fire(ledger, loaded, now)
    assert [run["slot"] for run in await rows(ledger)] == [end, end + MINUTE, end + 2 * MINUTE]
    (missed,) = await rows(ledger, tables.missed)
    assert (missed["count"], missed["reason"]) == (2, "paused by ann")


async def test_a_pause_after_the_end_of_another_one_is_a_new_pause(ledger: Database) -> None:
    loaded = await know(ledger, make_task("tick"))
    for person, number in (("ann", 1), ("bob", 3)):
        async with ledger.engine.begin() as connection:
            until = (START + number * MINUTE).replace(second=0)
            assert await pauses.pause(connection, "tick", person, until=until) is None
        go_to_slot(number + 1)
    async with ledger.engine.begin() as connection:
        await pauses.resume(connection, "tick")
    missed = [(each["reason"], each["count"]) for each in await rows(ledger, tables.missed)]
    assert sorted(missed) == [("not handled yet when it was paused by bob", 2)]
    await fire(ledger, loaded, clock.now())
    assert [run["slot"] for run in await rows(ledger)] == [clock.now() - MINUTE, clock.now()]


async def test_a_schedule_that_changes_after_the_end_of_a_pause_loses_no_slot(
    ledger: Database,
) -> None:
    """As after a deploy during which the pause has ended: the slots from its end on are those of
    the old schedule.
    """
    loaded = await know(ledger, make_task("tick", missed="all"))
    end = (START + 3 * MINUTE).replace(second=0)
    async with ledger.engine.begin() as connection:
        await pauses.pause(connection, "tick", "ann", loaded, NODE, end)
    go_to_slot(5)
    async with ledger.engine.begin() as connection:
        await task_sync.set_schedules(
            connection, {"tick": schedule("0 4 * * *", "UTC")}, loaded, NODE
        )
    assert [run["slot"] for run in await rows(ledger)] == [end, end + MINUTE, end + 2 * MINUTE]
    (missed,) = await rows(ledger, tables.missed)
    assert (missed["count"], missed["reason"]) == (2, "paused by ann")
