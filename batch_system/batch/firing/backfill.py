"""Backfill: makes runs for slots of the past, by the task's present schedule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from graphlib import CycleError, TopologicalSorter
from itertools import islice
from typing import Any, NamedTuple

from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.cron.cron import Schedule
from batch_system.batch.firing import waiting
from batch_system.batch.firing.misfires import INSTANT
from batch_system.batch.ledger import buckets, database_time, runs, schedules, transitions, waits
from batch_system.batch.ledger.run_rows import run_rows
from batch_system.batch.ledger.runs import NewRun
from batch_system.batch.ledger.states import FINAL, Rank
from batch_system.batch.ledger.tables import OF_SLOT_SQL
from batch_system.batch.ledger.tables import runs as runs_table
from batch_system.batch.queue.enqueue import Startable
from batch_system.batch.queue.retry import again
from batch_system.batch.tasks.after import After
from batch_system.batch.tasks.declaration import ON_TIME
from batch_system.concurrency.offload import offload
from batch_system.database.engine import Database
from batch_system.errors import InvalidParameters

MOST_LEFT_OUT = 100
PAGE = 250
"""How many slots one transaction handles. Their rows are made on the event loop."""


EARLIEST = datetime(1970, 1, 1, tzinfo=UTC)
"""Earlier slots are left out: computing them could go beyond the calendar."""


class SlotAction(StrEnum):
    """What a backfill does with a slot: makes a run (NEW), starts its run anew (AGAIN), or leaves
    its run as it is (LEFT).
    """

    NEW = "new"
    AGAIN = "again"
    LEFT = "left"


class SlotDecision(NamedTuple):
    """The action for one slot. `run` and `state` describe the run that the slot already had, if
    any.
    """

    slot: datetime
    action: SlotAction
    run: str | None = None
    state: str | None = None


@dataclass(frozen=True)
class Interval:
    """The slots of `schedule` from `since` to `until`, both included and aware. `schedule_id`: its
    id in the ledger.
    """

    schedule: Schedule
    since: datetime
    until: datetime
    schedule_id: str
    after: After | None = None
    """What the runs of these slots wait for."""

    async def count(self, most: int) -> int:
        """Count the slots, up to `most` + 1, which stands for more than `most`."""
        return await offload(lambda: sum(1 for _ in islice(self.slots(), most + 1)))

    async def left_out(self) -> list[str]:
        """The first dates of the interval that have no slots, with their names."""
        found = await offload(self.schedule.left_out, self.since - INSTANT, self.until)
        return [f"{each.date} {each.name}".strip() for each in found[:MOST_LEFT_OUT]]

    def slots(self) -> Iterable[datetime]:
        return self.schedule.between(self.since - INSTANT, self.until)


async def interval_of(
    connection: AsyncConnection, task: str, since: datetime, until: datetime
) -> Interval:
    """The slots from `since` to `until`, by the open schedule of the task, for which a backfill may
    make runs.

    Slots in the future are left out, and so are slots that a service may still fire on time,
    because the overlap policy would take their runs into account. Raises InvalidParameters if the
    task has no schedule, or if `since` is after `until`.
    """
    opened = (await schedules.open_schedules(connection)).get(task)
    if opened is None or not opened.is_usable:
        raise InvalidParameters(
            f"task {task}: the ledger has no schedule for it, so there are no slots to backfill"
        )
    if since > until:
        raise InvalidParameters(
            f"there are no slots from {since:%Y-%m-%d %H:%M:%S} to {until:%Y-%m-%d %H:%M:%S} UTC"
        )
    handled = max(opened.fired_until, await database_time.now_of(connection) - ON_TIME)
    after = After.from_json(opened.after)
    return Interval(opened.schedule, max(since, EARLIEST), min(until, handled), opened.id, after)


async def intervals_after(
    connection: AsyncConnection, task: str, first: Interval
) -> dict[str, Interval]:
    """The slots of all tasks that come after the slots of `first`, directly or through others. Each
    task stands after those that it waits for.

    Raises InvalidParameters if tasks wait for each other, which can happen between two versions of
    their code.
    """
    opened = await schedules.open_schedules(connection)
    rules = {name: After.from_json(row.after) for name, row in opened.items() if row.is_usable}
    awaits = {name: rule.tasks for name, rule in rules.items() if rule is not None}
    found = {task: first}
    try:
        order = list(TopologicalSorter(awaits).static_order())
    except CycleError as error:
        raise InvalidParameters(
            f"tasks wait for each other: {' after '.join(error.args[1][::-1])}"
        ) from None
    for name in order:
        spans = [
            span
            for each in awaits.get(name, ())
            if each in found and (span := await _span(found[each]))
        ]
        if spans and name not in found:
            since, until = min(span[0] for span in spans), max(span[1] for span in spans)
            found[name] = await interval_of(connection, name, since, until)
    del found[task]
    return found


async def _span(interval: Interval) -> tuple[datetime, datetime] | None:
    """The span from the first slot of an interval to just before the first slot after it; None if
    it has no slot.

    For any instant in this span, the last slot at or before it belongs to the interval.
    """

    def first_and_next() -> tuple[datetime, datetime] | None:
        first = next(iter(interval.slots()), None)
        if first is None:
            return None
        following = interval.schedule.next(interval.until)
        return first, following - INSTANT if following is not None else datetime.max.replace(
            tzinfo=UTC
        )

    return await offload(first_and_next)


def ignore(decision: SlotDecision) -> None:
    """Do nothing: the default of `see`."""


@dataclass(frozen=True)
class Backfill:
    """Makes runs of `task` for slots without one; with `redo`, also restarts runs in a final state
    from the beginning.

    The runs have the last rank in the queue: they start after runs that are on time or were started
    by hand. `by`: the person who asked for them. `application`: the database with the checkpoints
    of the task's runs. `comes_after`: restarted runs wait again for the slots that the task comes
    after.
    """

    ledger: Database
    application: Database
    task: Startable
    by: str
    redo: bool = False
    comes_after: bool = False

    async def look(
        self, interval: Interval, see: Callable[[SlotDecision], None] = ignore
    ) -> Counter[SlotAction]:
        """Count what `make` would do, without changing anything. `see` is called with the decision
        about each slot.
        """
        counts: Counter[SlotAction] = Counter()
        slots = iter(interval.slots())
        while page := await offload(lambda: list(islice(slots, PAGE))):
            for decision in await self._decide(page):
                counts[decision.action] += 1
                see(decision)
        return counts

    async def make(
        self, interval: Interval, see: Callable[[SlotDecision], None] = ignore
    ) -> Counter[SlotAction]:
        """Make the runs, PAGE slots in each transaction. A slot never gets a second run, even if
        two backfills run at once.

        Returns the numbers of actions. `see` is called with the decision about each slot after its
        commit.
        """
        counts: Counter[SlotAction] = Counter()
        slots = iter(interval.slots())
        while page := await offload(lambda: list(islice(slots, PAGE))):
            for decision in await self._make(await self._decide(page), interval.after):
                counts[decision.action] += 1
                see(decision)
        return counts

    async def _make(self, decisions: list[SlotDecision], after: After | None) -> list[SlotDecision]:
        """Carry out these decisions. Where another process was faster, the returned decision is
        LEFT.

        `after`: what the new runs wait for.
        """
        slots = [decision.slot for decision in decisions if decision.action == SlotAction.NEW]
        async with self.ledger.engine.begin() as connection:
            now = await database_time.now_of(connection)
            new = [self._new(slot, now) for slot in slots]
            if after is not None:
                new = list(waiting.as_waiting(new, after))
            changed = await runs.insert(connection, new)
            made = [(run, after) for run in new if after is not None and run.id in changed]
            await waiting.record_slots(connection, made)
            awaiting = await waits.lock_awaiting(connection, sorted(changed))
            others = await transitions.wait_again(connection, awaiting, now)
            await buckets.slots_have_changed(connection, [*slots, *others], now)
        again_ids = [d.run for d in decisions if d.action == SlotAction.AGAIN and d.run]
        if again_ids:
            ids, after_ids = ([], again_ids) if self.comes_after else (again_ids, [])
            changed |= await again(
                self.ledger, self.application, ids, Rank.CATCH_UP, self.by, after_ids
            )
        lost = {run.slot for run in new if run.id not in changed}
        lost |= {d.slot for d in decisions if d.action == SlotAction.AGAIN and d.run not in changed}
        return [d._replace(action=SlotAction.LEFT) if d.slot in lost else d for d in decisions]

    async def _decide(self, page: list[datetime]) -> list[SlotDecision]:
        statement = run_rows(
            ("slot", "id", "state"),
            runs_table.c.task == self.task.name,
            OF_SLOT_SQL,
            runs_table.c.slot.between(page[0], page[-1]),
        )
        async with self.ledger.reader.connect() as connection:
            existing = {
                slot: (run, state) for slot, run, state in await connection.execute(statement)
            }
        return [self._decision(slot, *existing.get(slot, (None, None))) for slot in page]

    def _decision(self, slot: datetime, run: str | None, state: str | None) -> SlotDecision:
        if run is None:
            return SlotDecision(slot, SlotAction.NEW)
        may_repeat = self.redo and state in FINAL
        return SlotDecision(slot, SlotAction.AGAIN if may_repeat else SlotAction.LEFT, run, state)

    def _new(self, slot: datetime, now: datetime) -> NewRun:
        task = self.task
        details: dict[str, Any] = {"priority": task.priority, "requested_by": self.by}
        return NewRun.queued(
            task.name, slot, now, is_backfill=True, exclusive=task.queueing.of(None), **details
        )
